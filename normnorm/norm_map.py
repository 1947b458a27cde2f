"""The map between normalization layers of torch and other libraries and those of normnorm, and the
conversion of one layer.

The converted layer takes over the whole state of the original: the same parameters and buffers (no
copies), attributes, forward and backward hooks, and training flag. Optimizers and hook handles stay
valid.
"""

from __future__ import annotations

import functools
import importlib
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from normnorm import lazy, modules
from normnorm.checks import check_transform
from normnorm.distributed.sync import SyncBatchNormalNorm
from normnorm.eps import plain
from normnorm.modules import _RunningNorm, _Transform
from normnorm.registry import Registered, registered, registered_base

__all__ = [
    "Target",
    "counterpart",
    "obstacle",
    "original",
    "recast",
    "restored",
    "why_not_restored",
    "why_unknown",
]

# The class that a layer is converted to, or the user's registration for its class.
Target = type[nn.Module] | Registered

# torch's class -> ours, for exactly that class: a subclass may add state or behaviour.
_TORCH: dict[type, type] = {
    **{
        getattr(nn, f"{kind}Norm{dim}d"): getattr(modules, f"{kind}NormalNorm{dim}d")
        for kind in ("Batch", "Instance")
        for dim in (1, 2, 3)
    },
    **{
        getattr(nn, f"Lazy{kind}Norm{dim}d"): getattr(lazy, f"Lazy{kind}NormalNorm{dim}d")
        for kind in ("Batch", "Instance")
        for dim in (1, 2, 3)
    },
    nn.LayerNorm: modules.LayerNormalNorm,
    nn.SyncBatchNorm: SyncBatchNormalNorm,
    nn.GroupNorm: modules.GroupNormalNorm,
}
_ORIGINALS = {ours: theirs for theirs, ours in _TORCH.items()}

# Libraries with norm layers of their own; normnorm.integrations has a module for each.
_LIBRARIES = ("timm", "torchvision", "transformers")

# Names of norm layers (RMSNorm, EvoNorm2dB0, LayerNormAct2dFp32), not of blocks that contain one.
_A_NORM = re.compile(r"Norm(alization)?(\d[dP]?|Act|Fp32|Exp|Tlu|[BS]\da?)*$")
_ROOT_MEAN_SQUARE = ("RMSNorm", "RmsNorm", "T5LayerNorm", "SimpleNorm")

_TRANSFORM = ("noise_train", "alpha", "order", "transform_eps")
_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_FORWARD_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
# torch's tables of hooks that take keywords or always run.
_HOOK_KINDS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def counterpart(module: nn.Module) -> Target | None:
    """The class of normnorm for the module, or the user's registration; None if there is none."""
    cls = type(module)
    known = registered(cls)
    if known is not None:
        return known
    library = cls.__module__.partition(".")[0]
    if library in _LIBRARIES:
        found: type[nn.Module] | None
        found = importlib.import_module(f"normnorm.integrations.{library}").counterpart(module)
        return found
    return _TORCH.get(cls)


def original(module: nn.Module) -> Target | None:
    """The class that a layer of ours was converted from, or corresponds to; None if it has none or
    cannot be converted back."""
    found: type[nn.Module] | None
    found = vars(module).get("original_class") or _ORIGINALS.get(type(module))
    if type(module) is SyncBatchNormalNorm:
        return nn.SyncBatchNorm  # whatever its class was before convert_sync
    if "registered_class" in vars(module):
        known = registered(vars(module)["registered_class"])
        return None if known is None or known.restore is None else known
    if found is None and _is_of_a_library(module):
        found = importlib.import_module(type(module).__module__).original(module)
    if found is not None and not isinstance(module, LazyModuleMixin):
        # The layer was converted while lazy and is initialized now, as torch's would be.
        return getattr(found, "cls_to_become", None) or found
    return found


def _is_of_a_library(module: nn.Module) -> bool:
    """Whether a layer of ours comes from an integration with another library."""
    return type(module).__module__.startswith("normnorm.integrations.")


def why_not_restored(module: nn.Module) -> str:
    """Why a layer of ours has no :func:`original`."""
    cls = vars(module).get("registered_class")
    if cls is None:
        return "torch has no counterpart of it"
    if registered(cls) is None:
        return f"it was a {cls.__name__}, which is not registered here (normnorm.register_norm)"
    return f"it was a {cls.__name__}, which is registered without a way back"


def why_unknown(module: nn.Module) -> str | None:
    """Why a layer has no counterpart; None if it is not a normalization layer."""
    cls = type(module)
    if isinstance(module, _Transform):
        return None
    known = registered_base(cls)
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


def obstacle(module: nn.Module, target: Target) -> str | None:
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
    hooks = {name: len(state[name]) for name in (*_STATE_HOOKS, *_FORWARD_HOOKS)}
    if isinstance(module, LazyModuleMixin):
        for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks"):
            hooks[name] -= 1  # the layer's own, which initializes it
        if any(hooks.values()):
            return "it has hooks and is not initialized: run the model once first"
    elif any(hooks[name] for name in _STATE_HOOKS):
        return "its state_dict hooks belong to the object itself"
    elif any(_holds(hook, module) for name in _FORWARD_HOOKS for hook in state[name].values()):
        return "one of its hooks is bound to the object itself"
    return None


def _is_own_method(name: str, module: nn.Module) -> bool:
    """Whether an instance attribute is the class's own bound method: accelerate leaves such a
    ``forward``."""
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
    """Why a layer of normnorm would refuse this layer's eps or tensors; None if it would not."""
    eps: Any = module.eps
    try:
        check_transform(eps, 1.0, 2, 0.0)
    except ValueError as error:
        return str(error)
    for name in ("weight", "bias", "running_mean"):
        tensor = getattr(module, name, None)
        if tensor is not None and tensor.dtype not in _FLOATING:
            return f"its {name} is {tensor.dtype}"
    return None


def _shell(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
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
    like: dict[str, Any] = {}
    for tensor in (*module.buffers(), *module.parameters()):
        like = {"device": tensor.device, "dtype": tensor.dtype}
        if tensor.is_floating_point():
            break
    new = cls(
        float(module.eps), module.momentum, module.affine, module.track_running_stats, **like,
        **settings,
    )  # fmt: skip
    for name, parameter in module._parameters.items():
        # The same objects: an optimizer may hold them.
        new._parameters[name] = parameter
    return new.train(module.training)


def _by_function(module: nn.Module, function: Any, wanted: type, words: str) -> nn.Module:
    """The result of a user's conversion, with the layer's training flag and hooks."""
    new = function(module)
    if not isinstance(new, wanted) or new is module:
        got = "the layer itself" if new is module else f"a {type(new).__name__}"
        raise TypeError(
            f"what is registered for {type(module).__name__} must return {words}; it returned {got}"
        )
    assert isinstance(new, nn.Module)
    for name in (*_FORWARD_HOOKS, *_HOOK_KINDS):
        hooks = vars(module)[name]
        if hooks:  # the same dictionary, from which handles remove their hooks
            hooks.update(vars(new)[name])
            vars(new)[name] = hooks
    if module._backward_hooks:
        new._is_full_backward_hook = module._is_full_backward_hook
    return new.train(module.training)


def recast(module: nn.Module, cls: Target, settings: dict[str, Any]) -> nn.Module:
    """The normality layer for a layer, on the same tensors.

    Args:
        module: a layer whose :func:`counterpart` is ``cls``.
        cls: the class, or the user's registration.
        settings: ``noise_train``, ``alpha``, ``order``, ``transform_eps``; missing ones take the
            class's default.

    Raises:
        TypeError: a user's function did not return a layer of normnorm.
    """
    if isinstance(cls, Registered):
        new = _by_function(module, cls.convert, _Transform, "a layer of normnorm")
        assert isinstance(new, _Transform)
        new._set_transform(**{**new._transform(), **settings})
        vars(new)["registered_class"] = cls.cls
        return new
    if isinstance(module, LazyModuleMixin):
        new = _new_lazy(module, cls, settings)
    else:
        new = _shell(module, cls)
        defaults = {name: _default(cls, name) for name in _TRANSFORM}
        assert isinstance(new, _Transform)
        new._set_transform(**{**defaults, **settings})
        if isinstance(new, _RunningNorm):
            running_var = new._buffers.get("running_var")
            lmbda = None if running_var is None else torch.ones_like(running_var)
            new.register_buffer("running_lmbda", lmbda)
        if isinstance(new, SyncBatchNormalNorm):
            new._alone = None
    vars(new)["original_class"] = type(module)
    return new


def restored(module: nn.Module, cls: Target) -> nn.Module:
    """The original kind of layer for a layer of normnorm, on the same tensors."""
    if isinstance(cls, Registered):
        return _by_function(module, cls.restore, cls.cls, f"a {cls.cls.__name__}")
    if isinstance(module, LazyModuleMixin):
        return _new_lazy(module, cls, {})
    new = _shell(module, cls)
    for name in (*_TRANSFORM, "original_class", "registered_class", "_alone"):
        vars(new).pop(name, None)
    new._buffers.pop("running_lmbda", None)
    new._non_persistent_buffers_set.discard("running_lmbda")
    if new.__class__ is not vars(module).get("original_class") and _is_of_a_library(module):
        importlib.import_module(type(module).__module__).complete(new)
    return new


def _default(cls: type[nn.Module], name: str) -> Any:
    """The default of a constructor's keyword, from the first class in the MRO that has it."""
    for base in cls.__mro__:
        found = getattr(vars(base).get("__init__"), "__kwdefaults__", None) or {}
        if name in found:
            return found[name]
    raise AssertionError(f"{cls.__name__} has no default for {name}")
