"""Normalization layers by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from accuracy.layers import DecorrelatedBatchNorm2d, IteratedBatchNormalNorm2d
from normnorm import modules
from normnorm.cli import CommandError

Make = Callable[..., nn.Module]
_GROUPS = 32  # the group normalization paper's; fewer where they do not divide the channels


def _group(cls: Make) -> Make:
    def make(num_features: int, **options: Any) -> nn.Module:
        groups = math.gcd(_GROUPS, num_features)
        if groups == num_features:  # a group of one channel is instance normalization
            groups = max(1, num_features // 4)
        return cls(groups, num_features, **options)

    return make


# For images (N, C, H, W).
IMAGES: dict[str, Make] = {
    "batch": nn.BatchNorm2d,
    "batchnormal": modules.BatchNormalNorm2d,
    "batchnormal-2": partial(IteratedBatchNormalNorm2d, iterations=2),
    "batchnormal-optimal": partial(IteratedBatchNormalNorm2d, iterations=None),
    "group": _group(nn.GroupNorm),
    "groupnormal": _group(modules.GroupNormalNorm),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "instancenormal": partial(modules.InstanceNormalNorm2d, affine=True),
    "decorrelated": DecorrelatedBatchNorm2d,
    "decorrelatednormal": partial(DecorrelatedBatchNorm2d, power=True),
    "none": nn.Identity,
}
# For tokens (N, L, C).
TOKENS: dict[str, Make] = {
    "layer": nn.LayerNorm,
    "layernormal": modules.LayerNormalNorm,
    "none": nn.Identity,
}
NORMS = tuple(dict.fromkeys((*IMAGES, *TOKENS)))


def has_transform(name: str) -> bool:
    """Whether the layer of that name has a transform and noise."""
    return "normal" in name


def make_norm(
    name: str, tokens: bool, *, alpha: float | None = None, noise_train: float | None = None
) -> Callable[[int], nn.Module]:
    """A function that makes the layer of that name for a number of features.

    Args:
        name: one of :data:`NORMS`.
        tokens: whether the network normalizes tokens (N, L, C) or images (N, C, H, W).
        alpha, noise_train: of the normality layers; None for the layer's own default.

    Raises:
        CommandError: no norm has that name, the network cannot use it, or a plain layer was given
            an alpha or a noise_train.
    """
    if name not in NORMS:
        raise CommandError(f"norm must be one of {', '.join(NORMS)}; got '{name}'")
    table = TOKENS if tokens else IMAGES
    if name not in table:
        kind = "tokens" if tokens else "images"
        raise CommandError(
            f"norm '{name}' does not normalize {kind}; this model takes {', '.join(table)}"
        )
    if alpha is not None and name.startswith("batchnormal-"):
        raise CommandError(f"norm '{name}' has no alpha: it takes whole Newton steps")
    given = {"alpha": alpha, "noise_train": noise_train}
    options = {key: value for key, value in given.items() if value is not None}
    if options and not has_transform(name):
        raise CommandError(f"norm '{name}' has no {' and no '.join(options)}")
    return partial(table[name], **options)
