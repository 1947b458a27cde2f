"""Which layer of ours stands for which of torch's, and how one becomes the other.

A layer becomes its counterpart by taking over its whole state: the parameters and buffers
themselves, not copies of them, its attributes, its forward and backward hooks, its place on a
device and its training flag. An optimizer made before, and handles of hooks, stay valid.
"""

from __future__ import annotations

import importlib
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from normnorm import lazy, modules
from normnorm.modules import _RunningNorm, _Transform
from normnorm.sync import SyncBatchNormalNorm

__all__ = ["counterpart", "obstacle", "original", "recast", "restored", "why_unknown"]

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


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that stands for the module's, or None."""
    cls = type(module)
    library = cls.__module__.partition(".")[0]
    if library in _LIBRARIES:
        found: type[nn.Module] | None
        found = importlib.import_module(f"normnorm.integrations.{library}").counterpart(module)
        return found
    return _TORCH.get(cls)


def original(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer of ours once was, or stands for; None if there is none."""
    found: type[nn.Module] | None
    found = vars(module).get("original_class") or _ORIGINALS.get(type(module))
    if type(module) is SyncBatchNormalNorm:
        return nn.SyncBatchNorm  # whatever it was before convert_sync made it one
    if found is None and _is_of_a_library(module):
        found = importlib.import_module(type(module).__module__).original(module)
    if found is not None and not isinstance(module, LazyModuleMixin):
        # Initialized since, a lazy layer has become what torch's would have.
        return getattr(found, "cls_to_become", None) or found
    return found


def _is_of_a_library(module: nn.Module) -> bool:
    """Whether a layer of ours is one that was written for another library."""
    return type(module).__module__.startswith("normnorm.integrations.")


def why_unknown(module: nn.Module) -> str | None:
    """Why a layer has no counterpart; None where it is no normalization layer at all."""
    cls = type(module)
    if isinstance(module, _Transform):
        return None
    if isinstance(module, tuple(_TORCH)):
        if parametrize.is_parametrized(module):
            return "it is parametrized: remove the parametrization first"
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
    return "normnorm has no counterpart of it"


def obstacle(module: nn.Module) -> str | None:
    """Why this layer cannot become its counterpart although its class could."""
    state = vars(module)
    if "forward" in state:
        return "its forward was replaced on the object"
    if state.get("_frozen_mode") is not None:
        return "its statistics are frozen: call normnorm.unfreeze_statistics first"
    hooks = {name: len(state[name]) for name in (*_STATE_HOOKS, *_FORWARD_HOOKS)}
    if isinstance(module, LazyModuleMixin):
        for name in ("_load_state_dict_pre_hooks", "_forward_pre_hooks"):
            hooks[name] -= 1  # its own, by which it initializes itself
        if any(hooks.values()):
            return "it has hooks and is not initialized: run the model once first"
    elif any(hooks[name] for name in _STATE_HOOKS):
        return "its state_dict hooks belong to the object itself"
    eps: Any = module.eps
    if not eps > 0:
        return f"eps must be positive; it is {eps}"
    for name in ("weight", "bias", "running_mean"):
        tensor = getattr(module, name, None)
        if tensor is not None and tensor.dtype not in _FLOATING:
            return f"its {name} is {tensor.dtype}"
    return None


def _shell(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """A module of another class with the state of this one, sharing tensors and hooks."""
    new = cls.__new__(cls)
    state = dict(vars(module))
    for name in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        state[name] = state[name].copy()
    vars(new).update(state)
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


def recast(module: nn.Module, cls: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """The layer of ours for a layer, on the same tensors.

    Args:
        module: a layer whose :func:`counterpart` is ``cls``.
        cls: the class wanted.
        settings: ``noise_train``, ``alpha``, ``order``, ``transform_eps``; what is absent takes
            the class's default.
    """
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


def restored(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """The layer of another library for a layer of ours, on the same tensors."""
    if isinstance(module, LazyModuleMixin):
        return _new_lazy(module, cls, {})
    new = _shell(module, cls)
    for name in (*_TRANSFORM, "original_class", "_alone"):
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
