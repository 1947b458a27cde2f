"""One row a layer class: how to build it, what it is compared with, how the ops describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import normnorm


@dataclass(frozen=True)
class Layer:
    """A layer class of ours.

    Attributes:
        cls, counterpart: our class and torch's.
        args: positional arguments of both constructors.
        shape: a small input's shape.
        kind, num_groups, normalized_ndim: the same layer in the words of the raw ops.
        affine: keyword arguments that give it a weight and a bias.
    """

    cls: type[nn.Module]
    counterpart: type[nn.Module]
    args: tuple[Any, ...]
    shape: tuple[int, ...]
    kind: str
    num_groups: int = 0
    normalized_ndim: int = 0
    affine: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def keeps_running(self) -> bool:
        """Whether running statistics are kept unless asked otherwise."""
        return self.kind == "batch"

    @property
    def groups(self) -> int:
        if self.kind == "batch":
            return self.shape[1]
        if self.kind == "layer":
            return math.prod(self.shape[: -self.normalized_ndim])
        return self.shape[0] * (self.num_groups if self.kind == "group" else self.shape[1])

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.kind == "layer":
            return self.shape[-self.normalized_ndim :]
        return (self.shape[1],)

    @property
    def geometry(self) -> tuple[str, int, int]:
        return self.kind, self.num_groups, self.normalized_ndim

    def make(self, **keywords: Any) -> nn.Module:
        """Our layer, with a weight and a bias that are not the identity."""
        layer = self.cls(*self.args, **{**dict(self.affine), **keywords})
        return set_parameters(layer)

    def make_counterpart(self, **keywords: Any) -> nn.Module:
        return set_parameters(self.counterpart(*self.args, **{**dict(self.affine), **keywords}))

    def input(self, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
        """Skewed values, so that no lambda is 1."""
        generator = torch.Generator().manual_seed(seed)
        normal = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        return (normal + 0.3 * normal.square()).to(dtype)


def set_parameters(layer: nn.Module) -> nn.Module:
    """Fills weight and bias with fixed values of either sign around 1 and around 0."""
    with torch.no_grad():
        for name, centre in (("weight", 1.0), ("bias", 0.0)):
            parameter = getattr(layer, name)
            if parameter is not None:
                steps = torch.linspace(-0.7, 0.9, parameter.numel()).reshape(parameter.shape)
                parameter.copy_(centre + steps)
    return layer


_AFFINE = (("affine", True),)

LAYERS = (
    Layer(normnorm.BatchNormalNorm1d, nn.BatchNorm1d, (3,), (6, 3), "batch"),
    Layer(normnorm.BatchNormalNorm2d, nn.BatchNorm2d, (3,), (2, 3, 4, 3), "batch"),
    Layer(normnorm.BatchNormalNorm3d, nn.BatchNorm3d, (2,), (2, 2, 2, 3, 2), "batch"),
    Layer(normnorm.LayerNormalNorm, nn.LayerNorm, ((2, 5),), (3, 2, 5), "layer", 0, 2),
    Layer(normnorm.GroupNormalNorm, nn.GroupNorm, (2, 4), (2, 4, 3), "group", 2),
    Layer(
        normnorm.InstanceNormalNorm1d, nn.InstanceNorm1d, (3,), (2, 3, 5), "instance",
        affine=_AFFINE,
    ),
    Layer(
        normnorm.InstanceNormalNorm2d, nn.InstanceNorm2d, (2,), (2, 2, 3, 2), "instance",
        affine=_AFFINE,
    ),
    Layer(
        normnorm.InstanceNormalNorm3d, nn.InstanceNorm3d, (2,), (2, 2, 2, 3, 2), "instance",
        affine=_AFFINE,
    ),
)  # fmt: skip


def few(rows, fast):
    """The rows as test parameters; those that are not in ``fast`` are left to the slow tests."""
    return [
        pytest.param(row, id=row.name, marks=() if row in fast else pytest.mark.slow)
        for row in rows
    ]


NAMES = tuple(layer.name for layer in LAYERS)
RUNNING = tuple(layer for layer in LAYERS if layer.kind in ("batch", "instance"))
# One row a kind: the ops know no other difference.
KINDS = tuple(
    next(row for row in LAYERS if row.kind == kind and len(row.shape) != 2)
    for kind in ("batch", "layer", "group", "instance")
)
