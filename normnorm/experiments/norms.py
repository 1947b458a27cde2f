"""Normalization layers by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from normnorm import modules
from normnorm.experiments.decorrelated import DecorrelatedBatchNorm2d
from normnorm.experiments.iterated import IteratedBatchNormalNorm2d
from normnorm.experiments.libraries import ExperimentError

__all__ = ["CONVOLUTIONAL", "NORMS", "TOKENS", "make_norm", "noise_and_alpha_apply"]

_GROUPS = 32  # as the group normalization paper has it; fewer where they do not divide


def _group(cls: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def make(num_features: int, **options: Any) -> nn.Module:
        groups = math.gcd(_GROUPS, num_features)
        # A group of one channel is instance normalization.
        if groups == num_features:
            groups = max(1, num_features // 4)
        return cls(groups, num_features, **options)

    return make


def _decorrelated(power: bool) -> Callable[..., nn.Module]:
    def make(num_features: int, **options: Any) -> nn.Module:
        return DecorrelatedBatchNorm2d(num_features, power=power, **options)

    return make


def _iterated(iterations: int | None) -> Callable[..., nn.Module]:
    def make(num_features: int, **options: Any) -> nn.Module:
        return IteratedBatchNormalNorm2d(num_features, iterations, **options)

    return make


def _affine_instance(cls: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    return lambda num_features, **options: cls(num_features, affine=True, **options)


# For images (N, C, H, W).
CONVOLUTIONAL: dict[str, Callable[..., nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "batchnormal": modules.BatchNormalNorm2d,
    "batchnormal-2": _iterated(2),
    "batchnormal-optimal": _iterated(None),
    "group": _group(nn.GroupNorm),
    "groupnormal": _group(modules.GroupNormalNorm),
    "instance": _affine_instance(nn.InstanceNorm2d),
    "instancenormal": _affine_instance(modules.InstanceNormalNorm2d),
    "decorrelated": _decorrelated(False),
    "decorrelatednormal": _decorrelated(True),
    "none": nn.Identity,
}
# For tokens (N, L, C).
TOKENS: dict[str, Callable[..., nn.Module]] = {
    "layer": nn.LayerNorm,
    "layernormal": modules.LayerNormalNorm,
    "none": nn.Identity,
}
NORMS = tuple(dict.fromkeys((*CONVOLUTIONAL, *TOKENS)))


def noise_and_alpha_apply(name: str) -> bool:
    """Whether the layer of that name has a transform and noise."""
    return "normal" in name


def make_norm(
    name: str, tokens: bool, *, alpha: float | None = None, noise_train: float | None = None
) -> Callable[[int], nn.Module]:
    """A function that makes the layer of that name for a number of features.

    Args:
        name: one of :data:`NORMS`.
        tokens: whether the network normalizes tokens (N, L, C) or images (N, C, H, W).
        alpha, noise_train: for the normality layers; None for the layer's own default.

    Raises:
        ExperimentError: no norm has that name, the network cannot use it, or a plain layer was
            given an alpha or a noise_train.
    """
    if name not in NORMS:
        raise ExperimentError(f"norm must be one of {', '.join(NORMS)}; got '{name}'")
    table = TOKENS if tokens else CONVOLUTIONAL
    if name not in table:
        kind = "tokens" if tokens else "images"
        raise ExperimentError(
            f"norm '{name}' does not normalize {kind}; this model takes {', '.join(table)}"
        )
    if alpha is not None and name.startswith("batchnormal-"):
        raise ExperimentError(f"norm '{name}' has no alpha: it takes whole Newton steps")
    given = {"alpha": alpha, "noise_train": noise_train}
    options = {key: value for key, value in given.items() if value is not None}
    if options and not noise_and_alpha_apply(name):
        raise ExperimentError(f"norm '{name}' has no {' and no '.join(options)}")
    make = table[name]
    return lambda num_features: make(num_features, **options)
