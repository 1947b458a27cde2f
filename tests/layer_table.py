"""One row a layer class: how to build it, what it is compared with, how the ops describe it."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracle import Case
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import normnorm


@dataclass(frozen=True)
class Layer(Case):
    """A layer class of ours beside torch's, and a small input's shape."""

    cls: type[nn.Module] = nn.Module
    counterpart: type[nn.Module] = nn.Module

    @property
    def name(self) -> str:
        return self.cls.__name__

    @property
    def geometry(self) -> tuple[str, int, int]:
        return self.kind, self.num_groups, self.normalized_ndim

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments of both constructors."""
        if self.kind == "layer":
            return (self.parameter_shape,)
        return (self.num_groups, self.shape[1]) if self.kind == "group" else (self.shape[1],)

    @property
    def affine(self) -> dict[str, Any]:
        """Keyword arguments that give it a weight and a bias."""
        return {"affine": True} if self.kind == "instance" else {}

    def make(self, **keywords: Any) -> nn.Module:
        """Our layer, with a weight and a bias that are not the identity."""
        return set_parameters(self.cls(*self.args, **{**self.affine, **keywords}))

    def make_counterpart(self, **keywords: Any) -> nn.Module:
        return set_parameters(self.counterpart(*self.args, **{**self.affine, **keywords}))

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


# Kind, shape, num_groups, normalized_ndim, our class, torch's.
LAYERS = (
    Layer("batch", (6, 3), 0, 0, normnorm.BatchNormalNorm1d, nn.BatchNorm1d),
    Layer("batch", (2, 3, 4, 3), 0, 0, normnorm.BatchNormalNorm2d, nn.BatchNorm2d),
    Layer("batch", (2, 2, 2, 3, 2), 0, 0, normnorm.BatchNormalNorm3d, nn.BatchNorm3d),
    Layer("layer", (3, 2, 5), 0, 2, normnorm.LayerNormalNorm, nn.LayerNorm),
    Layer("group", (2, 4, 3), 2, 0, normnorm.GroupNormalNorm, nn.GroupNorm),
    Layer("instance", (2, 3, 5), 0, 0, normnorm.InstanceNormalNorm1d, nn.InstanceNorm1d),
    Layer("instance", (2, 2, 3, 2), 0, 0, normnorm.InstanceNormalNorm2d, nn.InstanceNorm2d),
    Layer("instance", (2, 2, 2, 3, 2), 0, 0, normnorm.InstanceNormalNorm3d, nn.InstanceNorm3d),
)


def few(rows, fast):
    """The rows as test parameters; those that are not in ``fast`` are left to the slow tests."""
    return [
        pytest.param(row, id=row.name, marks=() if row in fast else pytest.mark.slow)
        for row in rows
    ]


class Recorder(TorchDispatchMode):
    """Records the names of the operations that reach the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


NAMES = tuple(layer.name for layer in LAYERS)
LAZY_NAMES = tuple(name for name in normnorm.__all__ if name.startswith("Lazy"))
RUNNING = tuple(layer for layer in LAYERS if layer.kind in ("batch", "instance"))
# One row a kind: the ops know no other difference.
KINDS = tuple(
    next(row for row in LAYERS if row.kind == kind and len(row.shape) != 2)
    for kind in ("batch", "layer", "group", "instance")
)
