"""Which layer of ours stands for which of torch's, and how one becomes the other.

A layer becomes its counterpart by taking over its whole state: the parameters and buffers
themselves, not copies of them, its attributes, its forward and backward hooks, its place on a
device and its training flag. An optimizer made before, and handles of hooks, stay valid.
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

# What a layer is to become: a class, or what a user's function for its class makes of it.
Target = type[nn.Module] | Registered

# torch's class -> ours. Of exactly that class: what a subclass adds is not known here.
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

# Libraries with classes of their own; normnorm.integrations has a module for each.
_LIBRARIES = ("timm", "torchvision", "transformers")

# Names of norm layers (RMSNorm, EvoNorm2dB0, LayerNormAct2dFp32), not of what merely holds one.
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
# What torch keeps beside them: which hooks take keywords, or run after an error.
_HOOK_KINDS = (
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
)


def counterpart(module: nn.Module) -> Target | None:
    """What of ours stands for the module, or None."""
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
    """What a layer of ours once was, or stands for; None if there is no way back to it."""
    found: type[nn.Module] | None
    found = vars(module).get("original_class") or _ORIGINALS.get(type(module))
    if type(module) is SyncBatchNormalNorm:
        return nn.SyncBatchNorm  # whatever it was before convert_sync made it one
    if "registered_class" in vars(module):
        known = registered(vars(module)["registered_class"])
        return None if known is None or known.restore is None else known
    if found is None and _is_of_a_library(module):
        found = importlib.import_module(type(module).__module__).original(module)
    if found is not None and not isinstance(module, LazyModuleMixin):
        # Initialized since, a lazy layer has become what torch's would have.
        return getattr(found, "cls_to_become", None) or found
    return found


def _is_of_a_library(module: nn.Module) -> bool:
    """Whether a layer of ours is one that was written for another library."""
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
    """Why a layer has no counterpart; None where it is no normalization layer at all."""
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
        return None  # a block, such as ConvNormAct, that holds one
    if "Frozen" in cls.__name__:
        return "its statistics are frozen: there is nothing to estimate"
    if any(word in cls.__name__ for word in _ROOT_MEAN_SQUARE):
        return "it normalizes by the root mean square, without centring: no counterpart"
    return "normnorm has no counterpart of it; normnorm.register_norm can name one"


_PARAMETRIZED = "it is parametrized: remove the parametrization first"


def obstacle(module: nn.Module, target: Target) -> str | None:
    """Why this layer cannot become its counterpart although its class could."""
    return _bound(module) or (None if isinstance(target, Registered) else _unfit(module))


def _bound(module: nn.Module) -> str | None:
    """What a layer carries that belongs to this very object and would be lost, or go on without
    the new one."""
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
            hooks[name] -= 1  # its own, by which it initializes itself
        if any(hooks.values()):
            return "it has hooks and is not initialized: run the model once first"
    elif any(hooks[name] for name in _STATE_HOOKS):
        return "its state_dict hooks belong to the object itself"
    elif any(_holds(hook, module) for name in _FORWARD_HOOKS for hook in state[name].values()):
        return "one of its hooks is bound to the object itself"
    return None


def _is_own_method(name: str, module: nn.Module) -> bool:
    """Whether an attribute is but the class's method, as accelerate leaves ``forward`` behind."""
    value: Any = vars(module)[name]
    function = getattr(value, "__func__", None)
    return (
        function is not None
        and value.__self__ is module
        and function is getattr(type(module), name, None)
    )


def _holds(function: Any, module: nn.Module) -> bool:
    """Whether a method is one of this very module, or a partial call has it as an argument."""
    if isinstance(function, functools.partial):
        given = (*function.args, *function.keywords.values())
        return _holds(function.func, module) or any(value is module for value in given)
    return getattr(function, "__self__", None) is module


def _unfit(module: nn.Module) -> str | None:
    """What of a layer's numbers and tensors ours would refuse."""
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
    """A module of another class with the state of this one, sharing tensors and hooks."""
    new = cls.__new__(cls)
    state = {k: value for k, value in vars(module).items() if not _is_own_method(k, module)}
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    for name in ("eps", "_eps"):  # where a layer keeps it depends on its class
        state.pop(name, None)
    vars(new).update(state)
    new.eps = plain(module.eps)
    return new


def _new_lazy(module: Any, cls: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """A lazy layer of another class. Its hooks are bound to it, so it is built anew."""
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
        # The objects themselves: an optimizer may hold them.
        new._parameters[name] = parameter
    return new.train(module.training)


def _by_function(module: nn.Module, function: Any, wanted: type, words: str) -> nn.Module:
    """What a user's function makes of a layer, with the layer's training flag and hooks."""
    new = function(module)
    if not isinstance(new, wanted) or new is module:
        got = "the layer itself" if new is module else f"a {type(new).__name__}"
        raise TypeError(
            f"what is registered for {type(module).__name__} must return {words}; it returned {got}"
        )
    assert isinstance(new, nn.Module)
    for name in (*_FORWARD_HOOKS, *_HOOK_KINDS):
        hooks = vars(module)[name]
        if hooks:  # the dictionary itself, by which a hook's handle removes it
            hooks.update(vars(new)[name])
            vars(new)[name] = hooks
    if module._backward_hooks:
        new._is_full_backward_hook = module._is_full_backward_hook
    return new.train(module.training)


def recast(module: nn.Module, cls: Target, settings: dict[str, Any]) -> nn.Module:
    """The layer of ours for a layer, on the same tensors.

    Args:
        module: a layer whose :func:`counterpart` is ``cls``.
        cls: the class wanted, or what a user has registered.
        settings: ``noise_train``, ``alpha``, ``order``, ``transform_eps``; what is absent takes
            the class's default.

    Raises:
        TypeError: a user's function returned something that is no layer of ours.
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
    """The layer of another library for a layer of ours, on the same tensors."""
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
    """A constructor's default, from the first class that says it."""
    for base in cls.__mro__:
        found = getattr(vars(base).get("__init__"), "__kwdefaults__", None) or {}
        if name in found:
            return found[name]
    raise AssertionError(f"{cls.__name__} has no default for {name}")
