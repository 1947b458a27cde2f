"""Swapping the normalization of a model in place: :func:`replace_norms`, :func:`restore_norms`."""

from __future__ import annotations

import fnmatch
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as torch_functional

from normnorm import counterparts
from normnorm.checks import check_noise_train, check_transform
from normnorm.counterparts import Target
from normnorm.modules import _Transform

__all__ = ["NormSwap", "Replacement", "replace_norms", "restore_norms"]

# By name: importing them all would take longer than everything else here.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

Where = str | type | tuple[type, ...] | Callable[[str, nn.Module], bool] | None


class NormSwap(NamedTuple):
    """One layer of a :class:`Replacement`.

    Attributes:
        name: its name in the model; the first one of a layer that stands in several places.
        before: the name of the class that it had.
        after: the name of the class that it has now; None for a layer that was left.
        reason: why it was left; the new settings of one of ours; "" for one that was replaced.
    """

    name: str
    before: str
    after: str | None
    reason: str


@dataclass(frozen=True, repr=False)
class Replacement:
    """What :func:`replace_norms` or :func:`restore_norms` did. Prints as a table.

    Attributes:
        replaced, left: a :class:`NormSwap` a layer, in the model's order.
        changed: the layers that were ours already and have other settings now.
    """

    replaced: tuple[NormSwap, ...]
    left: tuple[NormSwap, ...]
    changed: tuple[NormSwap, ...] = ()

    def __repr__(self) -> str:
        changed = f"{len(self.changed)} changed, " if self.changed else ""
        lines = [f"{len(self.replaced)} replaced, {changed}{len(self.left)} left"]
        for title in ("replaced", "changed", "left"):
            kinds: dict[tuple[str, str], list[str]] = {}
            for swap in getattr(self, title):
                to = f": {swap.reason}" if swap.reason else f"-> {swap.after}"
                kinds.setdefault((swap.before, to), []).append(swap.name)
            for (before, to), names in kinds.items():
                space = "" if to.startswith(":") else " "
                lines.append(f"  {title} {len(names):4d}  {before}{space}{to}")
                lines.append(f"  {'':{len(title)}}       {_some(names)}")
        return "\n".join(lines)


def _some(names: list[str]) -> str:
    if len(names) <= 4:
        return ", ".join(names)
    return f"{', '.join(names[:2])}, ..., {names[-1]}"


class _Slot(NamedTuple):
    """A place in which a module stands."""

    parent: nn.Module
    key: str
    name: str


def _slots(model: nn.Module) -> dict[nn.Module, list[_Slot]]:
    """Every module below the model with all the places in which it stands, in model order."""
    found: dict[nn.Module, list[_Slot]] = {}
    for prefix, parent in model.named_modules():
        for key, child in parent._modules.items():
            if child is not None:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(child, []).append(_Slot(parent, key, name))
    return {module: found[module] for module in model.modules() if module in found}


def _predicate(where: Where) -> Callable[[str, nn.Module], bool]:
    if where is None:
        return lambda name, module: True
    if isinstance(where, str):
        return lambda name, module: fnmatch.fnmatchcase(name, where)
    if isinstance(where, type) or (
        isinstance(where, tuple) and where and all(isinstance(cls, type) for cls in where)
    ):
        return lambda name, module: isinstance(module, where)
    if callable(where):
        return where
    raise TypeError(
        "where must be None, a class or a tuple of classes, a pattern of names such as "
        f"'layer1.*', or a function of (name, module); got {where!r}"
    )


def _check_model(model: nn.Module, what: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(
                f"a scripted model cannot be changed: {what} its norms before scripting"
            )
        wrapper = next((cls for cls in type(module).__mro__ if cls.__name__ in _WRAPPERS), None)
        if wrapper is not None:
            raise TypeError(
                f"{what} the norms before wrapping the model in {wrapper.__name__}, which has "
                "taken note of its parameters and buffers"
            )


def _plan(
    model: nn.Module,
    where: Where,
    decide: Callable[[nn.Module], tuple[Target | None, str | None]],
    make: Callable[[nn.Module, Target], nn.Module],
) -> tuple[list[tuple[list[_Slot], nn.Module]], Replacement]:
    """What is to be put where; nothing has changed yet."""
    chosen = _predicate(where)
    changes, replaced, left = [], [], []
    for module, slots in _slots(model).items():
        cls, reason = decide(module)
        name, before = slots[0].name, type(module).__name__
        if cls is None and reason is None:
            continue
        if not any(chosen(slot.name, module) for slot in slots):
            left.append(NormSwap(name, before, None, "not chosen by where"))
        elif cls is None or reason is not None:
            left.append(NormSwap(name, before, None, reason or ""))
        elif any(type(slot.parent).__name__ == "OptimizedModule" for slot in slots):
            # torch.compile(layer), which goes on calling the object that it was given.
            left.append(NormSwap(name, before, None, "it is compiled by itself: exchange it first"))
        else:
            new = make(module, cls)
            changes.append((slots, new))
            replaced.append(NormSwap(name, before, type(new).__name__, ""))
    return changes, Replacement(tuple(replaced), tuple(left))


def _carry_out(model: nn.Module, changes: list[tuple[list[_Slot], nn.Module]]) -> None:
    for slots, new in changes:
        for slot in slots:
            slot.parent._modules[slot.key] = new
    _guard_fast_paths(model)


def _guard_fast_paths(model: nn.Module) -> None:
    """Keeps nn.TransformerEncoderLayer from computing a plain LayerNorm in place of ours.

    In evaluation it may hand the weights of ``norm1`` and ``norm2`` to a fused kernel and never
    call them. It asks ``activation_relu_or_gelu`` whether that kernel knows its activation. An
    nn.TransformerEncoder around it packs a padded batch for that kernel, into a nested tensor
    that no other layer can read.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            ours = _has_our_norms(module)
            module.activation_relu_or_gelu = 0 if ours else _known_activation(module.activation)
        elif isinstance(module, nn.TransformerEncoder):
            if any(map(_has_our_norms, module.layers)):
                vars(module).setdefault("packed_before", module.use_nested_tensor)
                module.use_nested_tensor = False
            elif "packed_before" in vars(module):
                module.use_nested_tensor = vars(module).pop("packed_before")


def _has_our_norms(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), _Transform) for name in ("norm1", "norm2"))


def _known_activation(activation: Any) -> int:
    """What torch's constructor makes of it: 1 for ReLU, 2 for GELU, else 0."""
    if activation is torch_functional.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is torch_functional.gelu or isinstance(activation, nn.GELU) else 0


def _refuse_bare_norm(model: nn.Module, cls: Target | None) -> None:
    if cls is not None:
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be exchanged in place; "
            f"wrap it in nn.Sequential"
        )


def _decide_to_replace(module: nn.Module) -> tuple[Target | None, str | None]:
    target = counterparts.counterpart(module)
    if target is None:
        return None, counterparts.why_unknown(module)
    return target, counterparts.obstacle(module, target)


def _decide_to_restore(module: nn.Module) -> tuple[Target | None, str | None]:
    if not isinstance(module, _Transform):
        return None, None
    target = counterparts.original(module)
    if target is None:
        return None, counterparts.why_not_restored(module)
    return target, counterparts.obstacle(module, target)


def _plan_settings(
    model: nn.Module, where: Where, settings: dict[str, Any]
) -> tuple[list[tuple[_Transform, dict[str, Any]]], tuple[NormSwap, ...]]:
    """What is to be changed of the layers that are ours already; nothing has changed yet."""
    names: dict[Any, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _Transform):
            names.setdefault(module, []).append(name)
    chosen = _predicate(where)
    changes, changed = [], []
    for module, called in names.items():
        now = module._transform()
        new = {key: value for key, value in settings.items() if value != now[key]}
        if new and any(chosen(name, module) for name in called):
            changes.append((module, new))
            cls = type(module).__name__
            words = ", ".join(f"{key}={value}" for key, value in new.items())
            changed.append(NormSwap(called[0], cls, cls, words))
    return changes, tuple(changed)


def _teach_libraries() -> None:
    """Has the libraries that are loaded freeze our batch layers where they freeze torch's."""
    if "timm.utils" in sys.modules:
        importlib.import_module("normnorm.integrations.timm").wrap()
    if "lightning.pytorch" in sys.modules or "pytorch_lightning" in sys.modules:
        importlib.import_module("normnorm.integrations.lightning")


def replace_norms(
    model: nn.Module,
    where: Where = None,
    *,
    noise_train: float | None = None,
    alpha: float | None = None,
    order: int | None = None,
    transform_eps: float | None = None,
) -> Replacement:
    """Swaps a model's normalization layers for their normality counterparts, in place.

    Knows torch's BatchNorm, SyncBatchNorm, LayerNorm, GroupNorm and InstanceNorm with their lazy
    variants, timm's norm and norm+activation layers, the channels-first LayerNorms of torchvision
    and transformers, and what :func:`register_norm` has named. Everything else that looks like a
    norm is left, and the summary says why: RMS norms and frozen statistics, subclasses that nobody
    here knows, layers that are parametrized, compiled by themselves, or carry something else that
    is bound to the object.

    A new layer holds the old one's parameters, buffers and forward and backward hooks themselves,
    with its device, dtype, training flag and attributes; an optimizer made before stays valid.
    Lambda starts at 1. A module that stands in several places is replaced once, in all of them.
    ``nn.TransformerEncoderLayer``'s fast path, which would pass over the new layers in
    evaluation, is switched off in the layers that have them.

    Layers that are ours already take over the settings that are given and keep the others; the
    summary's ``changed`` has those whose settings were different.

    With ``alpha=0, noise_train=0`` the model computes what it did before. With the defaults a
    batch layer's evaluation does so too, until training moves its lambda; the other layers
    estimate lambda from each sample and change the outputs at once.

    Args:
        model: changed in place, before it is wrapped for data parallelism or compiled.
        where: which layers: a pattern of names as the shell has them ('layer1.*'), a class or a
            tuple of classes, or a function of (name, module); None for all.
        noise_train, alpha, order, transform_eps: as in the layers; None for each class's default,
            and for what a layer of ours has.

    Returns:
        What was replaced, what was left, and why; prints as a table.

    Raises:
        TypeError: a model, ``where`` or settings of another type, a scripted or already wrapped
            model, a registered function that returns no layer of ours.
        ValueError: settings that the layers would refuse, or a model that is itself a norm.
            The model is unchanged after any error.
    """
    given = {
        "noise_train": noise_train, "alpha": alpha, "order": order, "transform_eps": transform_eps,
    }  # fmt: skip
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if noise_train is not None:
        check_noise_train(noise_train)
    check_transform(
        1.0,
        1.0 if alpha is None else alpha,
        2 if order is None else order,
        0.0 if transform_eps is None else transform_eps,
    )
    _check_model(model, "replace")
    _teach_libraries()
    _refuse_bare_norm(model, counterparts.counterpart(model))
    changes, summary = _plan(
        model,
        where,
        _decide_to_replace,
        lambda module, target: counterparts.recast(module, target, settings),
    )
    ours, changed = _plan_settings(model, where, settings)
    for layer, new in ours:
        for name, value in new.items():
            setattr(layer, name, value)
    _carry_out(model, changes)
    return replace(summary, changed=changed)


def restore_norms(model: nn.Module, where: Where = None) -> Replacement:
    """Swaps normality layers back for the layers that they stand for, in place.

    A layer made by :func:`replace_norms` gets the class back that it had; one that was built as
    such gets torch's. Weights, biases and running statistics stay as trained, lambda is dropped:
    unless it is 1, the model's outputs change.

    Args:
        model, where: as in :func:`replace_norms`.

    Returns:
        As :func:`replace_norms`.

    Raises:
        TypeError, ValueError: as :func:`replace_norms`; the model is unchanged then.
    """
    _check_model(model, "restore")
    if isinstance(model, _Transform):
        _refuse_bare_norm(model, counterparts.original(model))
    changes, summary = _plan(model, where, _decide_to_restore, counterparts.restored)
    _carry_out(model, changes)
    return summary
