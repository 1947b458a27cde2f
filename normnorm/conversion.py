"""Replacing a model's norm layers in place: :func:`replace_norms`, :func:`restore_norms`."""

import fnmatch
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from . import norm_map
from .checks import check_is_module, check_noise_train, check_transform
from .modules import _Transform
from .norm_map import Target

# By name, because importing these classes takes longer than the rest of this module.
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")

Where = str | type | tuple[type, ...] | Callable[[str, nn.Module], bool] | None


class NormSwap(NamedTuple):
    """One layer of a :class:`Replacement`.

    Attributes:
        name: its name in the model; the first of several names of a shared layer.
        before, after: names of its class; ``after`` is None for a layer that was left.
        reason: why it was left; the new settings of a changed layer; "" for a replaced one.
    """

    name: str
    before: str
    after: str | None
    reason: str


@dataclass(frozen=True, repr=False)
class Replacement:
    """The result of :func:`replace_norms` or :func:`restore_norms`. Prints as a table.

    Attributes:
        replaced: one :class:`NormSwap` per layer, in the model's order.
        left: likewise, with the reason.
        changed: layers that were normnorm's already and have new settings.
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
                some = names if len(names) <= 4 else [*names[:2], "...", names[-1]]
                lines.append(f"  {title} {len(names):4d}  {before}{space}{to}")
                lines.append(f"  {'':{len(title)}}       {', '.join(some)}")
        return "\n".join(lines)


def _named(model: nn.Module) -> tuple[dict[str, nn.Module], dict[nn.Module, list[str]]]:
    """Every module by each of its names, and the names of every module, in the model's order."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names: dict[nn.Module, list[str]] = {}
    for name, module in modules.items():
        names.setdefault(module, []).append(name)
    return modules, names


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
    check_is_module(model)
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


# A module's parent, its key there, and its replacement.
_Change = tuple[nn.Module, str, nn.Module]


def _plan(
    model: nn.Module,
    where: Where,
    decide: Callable[[nn.Module], tuple[Target | None, str | None]],
    make: Callable[[nn.Module, Target], nn.Module],
) -> tuple[list[_Change], Replacement]:
    """The replacements and their summary; changes nothing. ``decide`` returns a layer's target, or
    the reason to leave it; ``make`` returns the new layer."""
    if decide(model)[0] is not None:
        raise ValueError(
            f"the model is itself a {type(model).__name__}, which cannot be exchanged in place; "
            "wrap it in nn.Sequential"
        )
    chosen = _predicate(where)
    modules, every = _named(model)
    changes, replaced, left = [], [], []
    for module, names in every.items():
        target, reason = decide(module)
        if module is model or (target is None and reason is None):
            continue
        places = [(modules[name.rpartition(".")[0]], name.rpartition(".")[2]) for name in names]
        if not any(chosen(name, module) for name in names):
            reason = "not chosen by where"
        elif any(type(parent).__name__ == "OptimizedModule" for parent, _ in places):
            # torch.compile(layer) keeps calling the original object.
            reason = reason or "it is compiled by itself: exchange it first"
        before = type(module).__name__
        if target is None or reason is not None:
            left.append(NormSwap(names[0], before, None, reason or ""))
        else:
            new = make(module, target)
            changes += [(parent, key, new) for parent, key in places]
            replaced.append(NormSwap(names[0], before, type(new).__name__, ""))
    return changes, Replacement(tuple(replaced), tuple(left))


def _carry_out(model: nn.Module, changes: list[_Change]) -> None:
    for parent, key, new in changes:
        parent._modules[key] = new
    _guard_fast_paths(model)


def _guard_fast_paths(model: nn.Module) -> None:
    """Keeps nn.TransformerEncoderLayer from computing a plain LayerNorm for normnorm layers.

    In evaluation it may pass the weights of ``norm1`` and ``norm2`` to a fused kernel and never
    call them. ``activation_relu_or_gelu`` controls whether that kernel is used. Only for it can an
    nn.TransformerEncoder pack a padded batch into a nested tensor.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _disable(module, "activation_relu_or_gelu", _has_our_norms(module))
        elif isinstance(module, nn.TransformerEncoder):
            _disable(module, "use_nested_tensor", any(map(_has_our_norms, module.layers)))


def _has_our_norms(layer: nn.Module) -> bool:
    return any(isinstance(getattr(layer, name, None), _Transform) for name in ("norm1", "norm2"))


def _disable(module: nn.Module, attribute: str, disabled: bool) -> None:
    """Sets an attribute to 0 or False while disabled, and to its earlier value afterwards."""
    state, earlier = vars(module), f"{attribute}_before_normnorm"
    if disabled:
        state.setdefault(earlier, state[attribute])
        state[attribute] = type(state[attribute])(0)
    elif earlier in state:
        state[attribute] = state.pop(earlier)


def _plan_settings(
    model: nn.Module, where: Where, settings: dict[str, Any]
) -> tuple[list[tuple[_Transform, dict[str, Any]]], tuple[NormSwap, ...]]:
    """The changes of settings of layers that are normnorm's already; changes nothing."""
    chosen = _predicate(where)
    changes: list[tuple[_Transform, dict[str, Any]]] = []
    changed = []
    for module, names in _named(model)[1].items():
        if not isinstance(module, _Transform):
            continue
        now = module._transform()
        new = {key: value for key, value in settings.items() if value != now[key]}
        if new and any(chosen(name, module) for name in names):
            changes.append((module, new))
            cls = type(module).__name__
            words = ", ".join(f"{key}={value}" for key, value in new.items())
            changed.append(NormSwap(names[0], cls, cls, words))
    return changes, tuple(changed)


def replace_norms(
    model: nn.Module,
    where: Where = None,
    *,
    noise_train: float | None = None,
    alpha: float | None = None,
    order: int | None = None,
    transform_eps: float | None = None,
) -> Replacement:
    """Replaces a model's norm layers by their normality counterparts, in place.

    Supports torch's BatchNorm, SyncBatchNorm, LayerNorm, GroupNorm and InstanceNorm with their lazy
    variants, timm's norm and norm+activation layers, the channels-first LayerNorms of torchvision
    and transformers, and classes registered by :func:`register_norm`. Other norms are left, and the
    summary gives the reason: RMS norms, frozen statistics, unknown subclasses, and layers that are
    parametrized, compiled by themselves, or have other state bound to the object.

    A new layer has the same parameter, buffer and forward and backward hook objects as the old one,
    and its device, dtype, training flag and attributes; an existing optimizer stays valid. Lambda
    starts at 1. A shared module is replaced once, in all its positions. The fast path of
    ``nn.TransformerEncoderLayer``, which would skip new layers in evaluation, is disabled there.

    Layers that are normnorm's already get the given settings and keep the others; the summary's
    ``changed`` lists those whose settings differed.

    With ``alpha=0, noise_train=0`` the model's outputs stay the same. With the defaults those of
    batch layers in evaluation stay the same until training changes lambda; the other layers
    estimate lambda from each sample and change the outputs at once.

    Args:
        model: changed in place; must not yet be wrapped for data parallelism or compiled.
        where: which layers: a shell-style pattern of names ('layer1.*'), a class or a tuple of
            classes, or a function of (name, module); None for all.
        noise_train, alpha, order, transform_eps: as in the layers; None for each class's default,
            and to keep the settings of existing normnorm layers.

    Returns:
        The replaced, changed and left layers, with reasons; prints as a table.

    Raises:
        TypeError: a model, ``where`` or settings of another type, a scripted or already wrapped
            model, a registered function that returns no normnorm layer.
        ValueError: settings that the layers reject, or a model that is itself a norm. The model is
            unchanged after any error.
    """
    given = {
        "noise_train": noise_train, "alpha": alpha, "order": order, "transform_eps": transform_eps,
    }  # fmt: skip
    settings: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    check_noise_train(settings.get("noise_train", 0.0))
    check_transform(
        1.0, settings.get("alpha", 1.0), settings.get("order", 2),
        settings.get("transform_eps", 0.0),
    )  # fmt: skip
    _check_model(model, "replace")
    # timm and Lightning recognize the batch layers to freeze by torch's classes. If they are
    # loaded, this patches them to freeze normnorm's too.
    if "timm.utils" in sys.modules:
        importlib.import_module(".integrations.timm", __package__).wrap()
    if "lightning.pytorch" in sys.modules or "pytorch_lightning" in sys.modules:
        importlib.import_module(".integrations.lightning", __package__)
    changes, summary = _plan(
        model,
        where,
        norm_map.replacement,
        lambda module, target: norm_map.recast(module, target, settings),
    )
    ours, changed = _plan_settings(model, where, settings)
    for layer, new in ours:
        for name, value in new.items():
            setattr(layer, name, value)
    _carry_out(model, changes)
    return replace(summary, changed=changed)


def restore_norms(model: nn.Module, where: Where = None) -> Replacement:
    """Replaces normality layers by their counterparts, in place: reverses :func:`replace_norms`.

    A layer made by :func:`replace_norms` gets its former class; one that was constructed directly
    gets torch's. Weights, biases and running statistics stay as trained. Lambda is dropped, so
    outputs change unless it is 1. Arguments, result and errors: see :func:`replace_norms`.
    """
    _check_model(model, "restore")
    changes, summary = _plan(model, where, norm_map.restoration, norm_map.restored)
    _carry_out(model, changes)
    return summary
