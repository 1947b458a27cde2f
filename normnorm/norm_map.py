"""The map between normalization layers of torch and other libraries and those of normnorm, and the
conversion of one layer.

The converted layer takes over the whole state of the original: the same parameters and buffers (no
copies), attributes, hooks, and training flag. Optimizers and hook handles stay valid.
"""

import functools
import importlib
import re
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from . import lazy, modules
from .checks import FLOATING, check_transform
from .modules import _RunningNorm, _Transform, plain
from .sync import SyncBatchNormalNorm

Convert = Callable[[Any], nn.Module]


class Registered(NamedTuple):
    """A class of layers and the functions that convert them to normnorm's and back."""

    cls: type[nn.Module]
    convert: Convert
    restore: Convert | None


# By the id of the handle; the last entry for a class is used.
_REGISTERED: OrderedDict[int, Registered] = OrderedDict()


def register_norm(
    cls: type[nn.Module], convert: Convert, restore: Convert | None = None
) -> RemovableHandle:
    """Makes :func:`replace_norms` and :func:`restore_norms` convert the layers of a class.

    ::

        def convert(norm):
            new = normnorm.LayerNormalNorm(norm.weight.shape, norm.variance_epsilon, bias=False)
            new.weight = norm.weight  # the parameter itself: an optimizer may hold it
            return new

        def restore(layer):
            old = CohereLayerNorm(layer.normalized_shape, layer.eps)
            old.weight = layer.weight
            return old

        normnorm.register_norm(CohereLayerNorm, convert, restore)

    Applies to layers of exactly that class, in this process, and takes precedence over normnorm's
    own rules. ``replace_norms`` copies the training flag and the forward and backward hooks to the
    new layer and applies the settings that it is given; the others are those of ``convert``.

    Args:
        cls: the class of the layers.
        convert: returns a layer of normnorm, or of a subclass of one, for a layer of ``cls``.
        restore: returns a layer of ``cls`` for a result of ``convert``; None if there is no way
            back. Called by :func:`restore_norms` in a process where ``cls`` is registered. For a
            layer with running statistics it must read ``float(layer.eps)``.

    Returns:
        A handle whose ``remove()`` ends the registration, as does the end of a block ``with
        register_norm(...):``. A later registration of the same class takes precedence until then.

    Raises:
        TypeError: ``cls`` is not a class of modules, or a function is not callable.
        ValueError: ``cls`` is a layer of normnorm already.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class derived from torch.nn.Module; got {cls!r}")
    if issubclass(cls, _Transform):
        raise ValueError(f"{cls.__name__} is a layer of normnorm, or derived from one, already")
    if not callable(convert):
        raise TypeError(f"convert must be a function of a layer; got {convert!r}")
    if restore is not None and not callable(restore):
        raise TypeError(f"restore must be a function of a layer, or None; got {restore!r}")
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = Registered(cls, convert, restore)
    return handle


def _registered(cls: type[nn.Module]) -> Registered | None:
    """The last registration of exactly this class."""
    return next((known for known in reversed(_REGISTERED.values()) if known.cls is cls), None)


# The class that a layer is converted to, or the user's registration for its class.
Target = type[nn.Module] | Registered

# torch's class -> ours, for exactly that class: a subclass may add state or behaviour.
_TORCH: dict[type, type] = {
    **{
        getattr(nn, f"{prefix}{kind}Norm{dim}d"): getattr(home, f"{prefix}{kind}NormalNorm{dim}d")
        for prefix, home in (("", modules), ("Lazy", lazy))
        for kind in ("Batch", "Instance")
        for dim in (1, 2, 3)
    },
    nn.LayerNorm: modules.LayerNormalNorm,
    nn.SyncBatchNorm: SyncBatchNormalNorm,
    nn.GroupNorm: modules.GroupNormalNorm,
}
_ORIGINALS = {ours: theirs for theirs, ours in _TORCH.items()}

# Libraries with several norm layers of their own; normnorm.integrations has a module for each.
_LIBRARIES = ("timm", "transformers")

# Names of norm layers (RMSNorm, EvoNorm2dB0, LayerNormAct2dFp32), not of blocks that contain one.
_A_NORM = re.compile(r"Norm(alization)?(\d[dP]?|Act|Fp32|Exp|Tlu|[BS]\da?)*$")
_ROOT_MEAN_SQUARE = ("RMSNorm", "RmsNorm", "T5LayerNorm", "SimpleNorm")

_TRANSFORM = ("noise_train", "alpha", "order", "transform_eps")
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# torch's tables of hooks that take keywords or always run.
_HOOK_KINDS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def replacement(module: nn.Module) -> tuple[Target | None, str | None]:
    """The target of :func:`recast` for a layer, and the reason to leave the layer, or None; twice
    None for a module that is not a normalization layer, and for layers of normnorm."""
    target = _counterpart(module)
    return target, _why_unknown(module) if target is None else _obstacle(module, target)


def restoration(module: nn.Module) -> tuple[Target | None, str | None]:
    """The target of :func:`restored` for a layer, and the reason to leave the layer, or None; twice
    None for a module that is not a layer of normnorm."""
    if not isinstance(module, _Transform):
        return None, None
    target = _original(module)
    if target is not None:
        return target, _obstacle(module, target)
    cls = vars(module).get("registered_class")
    if cls is None:
        return None, "torch has no counterpart of it"
    name = cls.__name__
    if _registered(cls) is None:
        return None, f"it was a {name}, which is not registered here (normnorm.register_norm)"
    return None, f"it was a {name}, which is registered without a way back"


def _counterpart(module: nn.Module) -> Target | None:
    """The class of normnorm for the module, or the user's registration; None if there is none."""
    cls = type(module)
    known = _registered(cls)
    if known is not None:
        return known
    if (cls.__module__, cls.__name__) == ("torchvision.models.convnext", "LayerNorm2d"):
        return modules.LayerNormalNorm2d
    library = cls.__module__.partition(".")[0]
    if library in _LIBRARIES:
        return importlib.import_module(f".integrations.{library}", __package__).counterpart(module)
    return _TORCH.get(cls)


def _original(module: nn.Module) -> Target | None:
    """The class to convert a layer of ours back to: its former one or its counterpart; or None."""
    if type(module) is SyncBatchNormalNorm:
        return nn.SyncBatchNorm  # whatever its class was before convert_sync
    if "registered_class" in vars(module):
        known = _registered(vars(module)["registered_class"])
        return None if known is None or known.restore is None else known
    found: Any = vars(module).get("original_class") or _ORIGINALS.get(type(module))
    if found is None and (integration := _integration(module)) is not None:
        found = integration.original(module)
    if found is not None and not isinstance(module, LazyModuleMixin):
        # The layer was converted while lazy and is initialized now, as torch's would be.
        return getattr(found, "cls_to_become", None) or found
    return found


def _integration(module: nn.Module) -> Any:
    """The module of :mod:`normnorm.integrations` that defines a layer's class, or None."""
    name = type(module).__module__
    return sys.modules[name] if name.startswith(f"{__package__}.integrations.") else None


def _why_unknown(module: nn.Module) -> str | None:
    """Why a layer has no counterpart; None if it is not a normalization layer."""
    cls = type(module)
    if isinstance(module, _Transform):
        return None
    known = next((r.cls for r in _REGISTERED.values() if issubclass(cls, r.cls)), None)
    if known is not None or isinstance(module, tuple(_TORCH)):
        if parametrize.is_parametrized(module):
            return _PARAMETRIZED
        if known is not None:
            return f"a class of its own, derived from {known.__name__}: register it as well"
        return "a class of its own: what it adds to torch's layer is not known"
    # torch.nn.utils has parametrizations named _WeightNorm and _SpectralNorm.
    if not _A_NORM.search(cls.__name__) or cls.__module__.startswith("torch.nn.utils."):
        return None
    if any(_A_NORM.search(type(child).__name__) for child in list(module.modules())[1:]):
        return None  # a block, such as ConvNormAct, that contains one
    if "Frozen" in cls.__name__:
        return "its statistics are frozen: there is nothing to estimate"
    if any(word in cls.__name__ for word in _ROOT_MEAN_SQUARE):
        return "it normalizes by the root mean square, without centring: no counterpart"
    return "normnorm has no counterpart of it; normnorm.register_norm can name one"


_PARAMETRIZED = "it is parametrized: remove the parametrization first"


def _obstacle(module: nn.Module, target: Target) -> str | None:
    """Why this layer cannot be converted although its class can."""
    return _bound(module) or (None if isinstance(target, Registered) else _unfit(module))


def _bound(module: nn.Module) -> str | None:
    """Why the layer cannot be replaced by another object: state or hooks that are bound to it."""
    state = vars(module)
    if parametrize.is_parametrized(module):
        return _PARAMETRIZED
    if "forward" in state and not _is_own_method("forward", module):
        return "its forward was replaced on the object"
    if state.get("_frozen_mode") is not None:
        return "its statistics are frozen: call normnorm.unfreeze_statistics first"
    if state.get("_compiled_call_impl") is not None:
        return "it is compiled by itself: exchange it first, then compile"
    for name, value in state.items():
        if _holds(value, module) and not _is_own_method(name, module):
            return f"its attribute '{name}' is bound to the object itself"
    if isinstance(module, LazyModuleMixin):
        # Two hooks are the layer's own, which initialize it.
        if sum(len(state[name]) for name in (*_STATE_HOOKS, *_FORWARD_HOOKS)) > 2:
            return "it has hooks and is not initialized: run the model once first"
    elif any(state[name] for name in _STATE_HOOKS):
        return "its state_dict hooks belong to the object itself"
    elif any(_holds(hook, module) for name in _FORWARD_HOOKS for hook in state[name].values()):
        return "one of its hooks is bound to the object itself"
    return None


def _is_own_method(name: str, module: nn.Module) -> bool:
    """Whether an instance attribute is the class's own method: accelerate leaves a ``forward``."""
    value: Any = vars(module)[name]
    function = getattr(value, "__func__", None)
    return (
        function is not None
        and value.__self__ is module
        and function is getattr(type(module), name, None)
    )


def _holds(function: Any, module: nn.Module) -> bool:
    """Whether a function is a bound method of this module, or a partial with it as an argument."""
    if isinstance(function, functools.partial):
        given = (*function.args, *function.keywords.values())
        return _holds(function.func, module) or any(value is module for value in given)
    return getattr(function, "__self__", None) is module


def _unfit(module: nn.Module) -> str | None:
    """Why a layer of normnorm would reject this layer's eps or tensors; None if it would not."""
    eps: Any = module.eps
    try:
        check_transform(eps, 1.0, 2, 0.0)
    except ValueError as error:
        return str(error)
    for name in ("weight", "bias", "running_mean"):
        tensor = getattr(module, name, None)
        if tensor is not None and tensor.dtype not in FLOATING:
            return f"its {name} is {tensor.dtype}"
    return None


def _shell(module: nn.Module, cls: type[nn.Module]) -> Any:
    """A module of another class that shares this module's tensors, hooks and attributes."""
    new = cls.__new__(cls)
    state = {k: value for k, value in vars(module).items() if not _is_own_method(k, module)}
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    for name in ("eps", "_eps"):  # the attribute's name depends on the class
        state.pop(name, None)
    vars(new).update(state)
    new.eps = plain(module.eps)
    return new


def _new_lazy(module: Any, cls: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """A new lazy layer of another class, since a lazy layer's hooks are bound to the object."""
    tensors = (*module.buffers(), *module.parameters())
    floating = next((t for t in tensors if t.is_floating_point()), torch.empty(0))
    new = cls(
        float(module.eps), module.momentum, module.affine, module.track_running_stats,
        floating.device, floating.dtype, **settings,
    )  # fmt: skip
    new._parameters.update(module._parameters)  # the same objects: an optimizer may hold them
    new._buffers.update({k: v for k, v in module._buffers.items() if k in new._buffers})
    return new.train(module.training)


def _by_function(module: nn.Module, function: Any, wanted: Any, words: str) -> Any:
    """The result of a user's conversion, with the layer's training flag and hooks."""
    new = function(module)
    if not isinstance(new, wanted) or new is module:
        got = "the layer itself" if new is module else f"a {type(new).__name__}"
        raise TypeError(
            f"what is registered for {type(module).__name__} must return {words}; it returned {got}"
        )
    for name in (*_FORWARD_HOOKS, *_HOOK_KINDS):
        hooks = vars(module)[name]
        if hooks:  # the same dictionary, from which handles remove their hooks
            hooks.update(vars(new)[name])
            vars(new)[name] = hooks
    if module._backward_hooks:
        new._is_full_backward_hook = module._is_full_backward_hook
    return new.train(module.training)


def recast(module: nn.Module, cls: Target, settings: dict[str, Any]) -> nn.Module:
    """The normality layer for a layer, on the same tensors, with ``settings`` of the transform;
    missing ones take the class's default. TypeError if a user's function returns none."""
    if isinstance(cls, Registered):
        new = _by_function(module, cls.convert, _Transform, "a layer of normnorm")
        new._set_transform(**{**new._transform(), **settings})
        vars(new)["registered_class"] = cls.cls
        return new
    if isinstance(module, LazyModuleMixin):
        new = _new_lazy(module, cls, settings)
    else:
        new = _shell(module, cls)
        new._set_transform(**{**_defaults(cls), **settings})
        if isinstance(new, _RunningNorm):
            running_var = new._buffers.get("running_var")
            lmbda = None if running_var is None else torch.ones_like(running_var)
            new.register_buffer("running_lmbda", lmbda)
    vars(new)["original_class"] = type(module)
    return new


def restored(module: nn.Module, cls: Target) -> nn.Module:
    """The original kind of layer for a layer of normnorm, on the same tensors."""
    if isinstance(cls, Registered):
        return _by_function(module, cls.restore, cls.cls, f"a {cls.cls.__name__}")
    if isinstance(module, LazyModuleMixin):
        return _new_lazy(module, cls, {})
    new = _shell(module, cls)
    for name in (*_TRANSFORM, "original_class", "registered_class", "_before_sync"):
        vars(new).pop(name, None)
    new._buffers.pop("running_lmbda", None)
    new._non_persistent_buffers_set.discard("running_lmbda")
    if cls is not vars(module).get("original_class") and _integration(module) is not None:
        _integration(module).complete(new)
    return new


def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    """The defaults of a class for the settings of the transform; a constructor that passes
    ``**keywords`` on has those of its base class."""
    keywords: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        keywords |= getattr(vars(base).get("__init__"), "__kwdefaults__", None) or {}
    return {name: keywords[name] for name in _TRANSFORM}
