"""MONAI: normnorm layers in its factory of normalization layers, by name.

::

    import normnorm.integrations.monai as normnorm_monai
    from monai.networks.nets import UNet

    normnorm_monai.register()
    net = UNet(3, 1, 2, (8, 16), (2,), norm="batchnormal")
    net = UNet(3, 1, 2, (8, 16), (2,), norm=("instancenormal", {"affine": True}))
"""

from __future__ import annotations

from typing import Any

from monai.networks.layers.factories import Norm
from torch import nn

import normnorm

__all__ = ["register"]


def _batch(dim: int) -> type[nn.Module]:
    """Batch normality normalization layers in 1, 2, 3 dimensions."""
    layers = (
        normnorm.BatchNormalNorm1d,
        normnorm.BatchNormalNorm2d,
        normnorm.BatchNormalNorm3d,
    )
    return layers[dim - 1]


def _instance(dim: int) -> type[nn.Module]:
    """Instance normality normalization layers in 1, 2, 3 dimensions."""
    layers = (
        normnorm.InstanceNormalNorm1d,
        normnorm.InstanceNormalNorm2d,
        normnorm.InstanceNormalNorm3d,
    )
    return layers[dim - 1]


def _group(dim: Any = None) -> type[nn.Module]:
    """Group normality normalization."""
    return normnorm.GroupNormalNorm


def _layer(dim: Any = None) -> type[nn.Module]:
    """Layer normality normalization."""
    return normnorm.LayerNormalNorm


_FACTORIES = {
    "batchnormal": _batch,
    "instancenormal": _instance,
    "groupnormal": _group,
    "layernormal": _layer,
}


def register() -> None:
    """Adds normnorm's layers to ``monai.networks.layers.Norm``, for this process.

    Names are MONAI's followed by "normal": "batchnormal", "instancenormal", "groupnormal",
    "layernormal". Calling it again has no effect.
    """
    for name, factory in _FACTORIES.items():
        if name.upper() not in Norm.names:
            Norm.add_factory_callable(name, factory)
