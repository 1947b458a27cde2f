"""Normalization layers by name."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from accuracy.layers import DecorrelatedBatchNorm2d, IteratedBatchNormalNorm2d
from normnorm import modules
from normnorm.cli import CommandError

Make = Callable[..., nn.Module]
_GROUPS = 32  # the group normalization paper's; fewer where they do not divide the channels


def _group(cls: Make) -> Make:
    def make(num_features: int, copies: int = 1, **options: Any) -> nn.Module:
        features = num_features // copies
        groups = math.gcd(_GROUPS, features)
        if groups == features:  # a group of one channel is instance normalization
            groups = max(1, features // 4)
        return cls(copies * groups, num_features, **options)

    return make


def _decorrelated(num_features: int, copies: int = 1, **options: Any) -> nn.Module:
    size = math.gcd(16, num_features // copies)
    return DecorrelatedBatchNorm2d(num_features, size, **options)


class AffineOfCopies(nn.Module):
    """A layer normalization without affine map, then each copy's own map:
    (copies, ..., features)."""

    def __init__(self, norm: nn.Module, num_features: int, copies: int) -> None:
        super().__init__()
        self.norm, self.copies = norm, copies
        self.weight = nn.Parameter(torch.ones(copies * num_features))
        self.bias = nn.Parameter(torch.zeros(copies * num_features))

    def forward(self, input: Tensor) -> Tensor:
        shape = self.copies, *(1,) * (input.dim() - 2), -1
        return self.norm(input) * self.weight.view(shape) + self.bias.view(shape)


def _layer(cls: Make) -> Make:
    def make(num_features: int, copies: int = 1, **options: Any) -> nn.Module:
        if copies == 1:
            return cls(num_features, **options)
        norm = cls(num_features, elementwise_affine=False, **options)
        return AffineOfCopies(norm, num_features, copies)

    return make


# For images (N, C, H, W), of copies * C channels in a network of copies.
IMAGES: dict[str, Make] = {
    "batch": nn.BatchNorm2d,
    "batchnormal": modules.BatchNormalNorm2d,
    "batchnormal-2": partial(IteratedBatchNormalNorm2d, iterations=2),
    "batchnormal-optimal": partial(IteratedBatchNormalNorm2d, iterations=None),
    "group": _group(nn.GroupNorm),
    "groupnormal": _group(modules.GroupNormalNorm),
    "instance": partial(nn.InstanceNorm2d, affine=True),
    "instancenormal": partial(modules.InstanceNormalNorm2d, affine=True),
    "decorrelated": _decorrelated,
    "decorrelatednormal": partial(_decorrelated, power=True),
    "none": nn.Identity,
}
# For tokens (..., C), of (copies, ..., C) in a network of copies.
TOKENS: dict[str, Make] = {
    "layer": _layer(nn.LayerNorm),
    "layernormal": _layer(modules.LayerNormalNorm),
    "none": nn.Identity,
}
NORMS = tuple(dict.fromkeys((*IMAGES, *TOKENS)))


def has_transform(name: str) -> bool:
    """Whether the layer of that name has a transform and noise."""
    return "normal" in name


def make_norm(
    name: str,
    tokens: bool,
    *,
    alpha: float | None = None,
    noise_train: float | None = None,
    copies: int = 1,
) -> Callable[[int], nn.Module]:
    """A function that makes the layer of that name for a number of features.

    Args:
        name: one of :data:`NORMS`.
        tokens: whether the network normalizes tokens (..., C) or images (N, C, H, W).
        alpha, noise_train: of the normality layers; None for the layer's own default.
        copies: of the network (:mod:`accuracy.nets`).

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
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    if options and not has_transform(name):
        raise CommandError(f"norm '{name}' has no {' and no '.join(options)}")
    if copies > 1 and name.removesuffix("normal") in ("decorrelated", "group", "layer"):
        options["copies"] = copies
    return partial(table[name], **options)
