"""torchvision: its channels-first LayerNorm. The constructors take our layers as they are."""

from __future__ import annotations

from torch import nn
from torchvision.models.convnext import LayerNorm2d

from normnorm.modules import LayerNormalNorm2d

__all__ = ["counterpart"]


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that stands for a torchvision module's, or None."""
    return LayerNormalNorm2d if type(module) is LayerNorm2d else None
