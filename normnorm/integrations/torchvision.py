"""torchvision: the counterpart of its channels-first LayerNorm. Its constructors take normnorm
layers directly."""

from __future__ import annotations

from torch import nn
from torchvision.models.convnext import LayerNorm2d

from normnorm.modules import LayerNormalNorm2d

__all__ = ["counterpart"]


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The normnorm class for a torchvision module's class, or None."""
    return LayerNormalNorm2d if type(module) is LayerNorm2d else None
