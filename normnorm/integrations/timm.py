"""timm: counterparts of its norm and norm+activation layers, by class and by name.

:func:`register` adds normnorm's layers to timm's factories, so that ``norm_layer=`` takes them, and
their names, also in models that combine norm and activation. The classes here have the arguments
that timm's constructors pass, in timm's order.
"""

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import timm.layers
import timm.layers.norm_act
import timm.models
import timm.utils.distributed
import timm.utils.model
import torch
from timm.layers import create_norm, create_norm_act
from timm.layers.create_act import create_act_layer
from timm.layers.fast_norm import is_fast_norm
from timm.models import convnext
from torch import Tensor, nn

from .. import fused, modules
from ..modules import CANNOT_FOLD, _RunningNorm
from ..running import freeze_statistics, unfreeze_statistics
from ..sync import SYNCHRONISED, SyncBatchNormalNormAct2d

Layer = str | type[nn.Module] | Callable[..., nn.Module] | None


class _Act(nn.Module):
    """Dropout and activation after the norm, as in timm's norm+activation layers."""

    drop: nn.Module
    act: nn.Module

    def _set_act(
        self,
        apply_act: bool,
        act_layer: Layer,
        act_kwargs: dict[str, Any] | None,
        inplace: bool,
        drop_layer: Callable[[], nn.Module] | None,
    ) -> None:
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        act = None
        if apply_act:
            act = create_act_layer(act_layer, **{"inplace": inplace, **(act_kwargs or {})})
        self.act = nn.Identity() if act is None else act

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


class BatchNormalNormAct2d(fused.BatchNormalNormAct2d):
    """timm's ``BatchNormAct2d`` with normality normalization: norm, dropout, activation.

    :class:`normnorm.BatchNormalNormAct2d`, which fuses ReLU, with activations by timm's names.
    """

    def _make_act(
        self, act_layer: Any, inplace: bool, keywords: dict[str, Any]
    ) -> nn.Module | None:
        return create_act_layer(act_layer, **{"inplace": inplace, **keywords})


class SyncBatchNormalNormAct(SyncBatchNormalNormAct2d, BatchNormalNormAct2d):
    """timm's ``SyncBatchNormAct`` with normality normalization.

    ``normnorm.convert_sync`` converts :class:`BatchNormalNormAct2d` to this class, and
    ``normnorm.replace_norms`` the class that ``timm.layers.convert_sync_batchnorm`` converts a
    ``BatchNormAct2d`` to. Its constructor is that of
    :class:`normnorm.sync.SyncBatchNormalNormAct2d`, with activations by timm's names.
    """


SYNCHRONISED[BatchNormalNormAct2d] = SyncBatchNormalNormAct


class GroupNormalNorm(modules.GroupNormalNorm):
    """timm's ``GroupNorm`` with normality normalization: ``num_channels`` comes first."""

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        **keywords: Any,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, affine, **keywords)


class GroupNormalNorm1(GroupNormalNorm):
    """timm's ``GroupNorm1`` with normality normalization: all channels in one group."""

    def __init__(self, num_channels: int, **keywords: Any) -> None:
        super().__init__(num_channels, 1, **keywords)


class GroupNormalNormAct(_Act, GroupNormalNorm):
    """timm's ``GroupNormAct`` with normality normalization. ``group_size`` takes precedence over
    ``num_groups``, as in timm."""

    def __init__(
        self,
        num_channels: int,
        num_groups: int = 32,
        eps: float = 1e-5,
        affine: bool = True,
        group_size: int | None = None,
        apply_act: bool = True,
        act_layer: Layer = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        **keywords: Any,
    ) -> None:
        if group_size:
            if num_channels % group_size != 0:
                raise ValueError(
                    f"num_channels ({num_channels}) must be divisible by group_size ({group_size})"
                )
            num_groups = num_channels // group_size
        super().__init__(num_channels, num_groups, eps, affine, **keywords)
        self._set_act(apply_act, act_layer, act_kwargs, inplace, drop_layer)


class GroupNormalNorm1Act(GroupNormalNormAct):
    """timm's ``GroupNorm1Act`` with normality normalization: all channels in one group."""

    def __init__(self, num_channels: int, eps: float = 1e-5, **keywords: Any) -> None:
        super().__init__(num_channels, 1, eps, **keywords)


class LayerNormalNormAct(_Act, modules.LayerNormalNorm):
    """timm's ``LayerNormAct`` with normality normalization."""

    def __init__(
        self,
        normalization_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        act_layer: Layer = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(normalization_shape, eps, affine, **keywords)
        self._set_act(apply_act, act_layer, act_kwargs, inplace, drop_layer)


class LayerNormalNormAct2d(_Act, modules.LayerNormalNorm2d):
    """timm's ``LayerNormAct2d`` with normality normalization: over the channels of (N, C, H, W)."""

    def __init__(
        self,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        apply_act: bool = True,
        act_layer: Layer = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        **keywords: Any,
    ) -> None:
        super().__init__(num_channels, eps, affine, **keywords)
        self._set_act(apply_act, act_layer, act_kwargs, inplace, drop_layer)


# timm's class, by its name in timm.layers without the suffix Fp32 (half inputs compute in float32).
_COUNTERPARTS = {
    "BatchNormAct2d": BatchNormalNormAct2d,
    "SyncBatchNormAct": SyncBatchNormalNormAct,
    "GroupNorm": modules.GroupNormalNorm,
    "GroupNorm1": modules.GroupNormalNorm,
    "GroupNormAct": GroupNormalNormAct,
    "GroupNorm1Act": GroupNormalNormAct,
    "LayerNorm": modules.LayerNormalNorm,
    "LayerNorm2d": modules.LayerNormalNorm2d,
    "LayerNormExp2d": modules.LayerNormalNorm2d,
    "LayerNormAct": LayerNormalNormAct,
    "LayerNormAct2d": LayerNormalNormAct2d,
}

_NORMS = {
    "batchnormalnorm": modules.BatchNormalNorm2d,
    "batchnormalnorm2d": modules.BatchNormalNorm2d,
    "batchnormalnorm1d": modules.BatchNormalNorm1d,
    "groupnormalnorm": GroupNormalNorm,
    "groupnormalnorm1": GroupNormalNorm1,
    "layernormalnorm": modules.LayerNormalNorm,
    "layernormalnorm2d": modules.LayerNormalNorm2d,
}

_NORM_ACTS = {
    "batchnormalnorm": BatchNormalNormAct2d,
    "batchnormalnorm2d": BatchNormalNormAct2d,
    "groupnormalnorm": GroupNormalNormAct,
    "groupnormalnorm1": GroupNormalNorm1Act,
    "layernormalnorm": LayerNormalNormAct,
    "layernormalnorm2d": LayerNormalNormAct2d,
}


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The normnorm class for a timm module's class, or None."""
    cls = type(module)
    if not cls.__module__.startswith("timm.layers."):
        return None
    return _COUNTERPARTS.get(cls.__name__.removesuffix("Fp32"))


def original(module: nn.Module) -> type[nn.Module] | None:
    """timm's class for one of these layers, or None."""
    name = type(module).__name__.replace("NormalNorm", "Norm")
    return getattr(timm.layers, name, None)


def complete(module: nn.Module) -> None:
    """Sets the attributes of a timm layer that its own constructor would have set."""
    vars(module).setdefault("_fast_norm", is_fast_norm())


def wrap() -> None:
    """Makes timm's freeze, unfreeze and distribute_bn treat normnorm's batch layers like torch's,
    and its reparameterize_model raise for them, for this process. Calling it again has no effect.

    Called by :func:`register`, and by :func:`normnorm.replace_norms` if timm is loaded. Replaces
    the names that those functions look up when they run, so that an earlier ``from timm.utils
    import freeze`` is covered too.
    """
    freezing = (timm.layers.norm_act, timm.layers, timm.utils.model)
    models = (timm.models, timm.models._manipulate, timm.utils, timm.utils.model)
    for name, wrapper, places in (
        ("freeze_batch_norm_2d", functools.partial(_then, freeze_statistics), freezing),
        ("unfreeze_batch_norm_2d", functools.partial(_then, unfreeze_statistics), freezing),
        ("unwrap_model", _with_lmbda, (timm.utils.distributed,)),
        ("reparameterize_model", _without_ours, models),
    ):
        for module in places:
            theirs = getattr(module, name, None)
            if theirs is not None and not hasattr(theirs, "__wrapped__"):
                setattr(module, name, wrapper(theirs))


# Methods that reparameterize_model looks for in a model's blocks.
_FOLDS = ("fuse", "reparameterize", "switch_to_deploy")


def _without_ours(reparameterize_model: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(reparameterize_model)
    def checked(model: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        for path, block in model.named_modules():
            if block is model or not any(hasattr(block, fold) for fold in _FOLDS):
                continue
            for name, layer in block.named_modules(prefix=path):
                if isinstance(layer, _RunningNorm):
                    raise RuntimeError(f"'{name}': " + CANNOT_FOLD.format(type(layer).__name__))
        return reparameterize_model(model, *arguments, **keywords)

    return checked


def _then(ours: Callable[[nn.Module], int], theirs: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(theirs)
    def both(module: nn.Module) -> Any:
        ours(module)
        return theirs(module)

    return both


def _with_lmbda(unwrap_model: Callable[..., nn.Module]) -> Callable[..., Any]:
    """For distribute_bn, which averages buffers with running_mean or running_var in their names."""

    @functools.wraps(unwrap_model)
    def unwrapped(model: nn.Module) -> SimpleNamespace:
        buffers = [
            (name.replace("running_lmbda", "running_mean of lmbda"), buffer)
            for name, buffer in unwrap_model(model).named_buffers()
        ]
        return SimpleNamespace(named_buffers=lambda recurse: buffers)

    return unwrapped


def register() -> None:
    """Adds normnorm's layers to timm's tables, for this process. Calling it again has no effect.

    ``timm.create_model(name, norm_layer=...)`` then takes ``normnorm.BatchNormalNorm2d``, a
    ``functools.partial`` of it, or a name ("batchnormalnorm2d", "layernormalnorm2d", ...), also for
    models whose blocks combine norm and activation.
    """
    wrap()
    create_norm._NORM_MAP.update(_NORMS)
    create_norm._NORM_TYPES.update(_NORMS.values())
    create_norm_act._NORM_ACT_MAP.update(_NORM_ACTS)
    create_norm_act._NORM_TO_NORM_ACT_MAP.update(_NORM_ACTS)
    create_norm_act._NORM_ACT_TYPES.update(_NORM_ACTS.values())
    create_norm_act._NORM_ACT_REQUIRES_ARG.update(_NORM_ACTS.values())
    # ConvNeXt has its own table of layers for either layout, which also has classes as keys.
    norm_map: dict[Any, Any] = convnext._NORM_MAP
    both = (modules.LayerNormalNorm2d, modules.LayerNormalNorm)
    for key in ("layernormalnorm", "layernormalnorm2d", *both):
        norm_map[key] = both
