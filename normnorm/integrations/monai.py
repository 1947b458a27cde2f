"""MONAI: normnorm layers in its factory of normalization layers, by name.

::

    import normnorm.integrations.monai as normnorm_monai
    from monai.networks.nets import UNet

    normnorm_monai.register()
    net = UNet(3, 1, 2, (8, 16), (2,), norm="batchnormal")
    net = UNet(3, 1, 2, (8, 16), (2,), norm=("instancenormal", {"affine": True}))
"""

from typing import Any

from monai.networks.layers.factories import Norm

from .. import modules

# MONAI calls these with the number of dimensions, or with nothing for a layer of any.
_FACTORIES: dict[str, Any] = {
    "batchnormal": lambda dim: getattr(modules, f"BatchNormalNorm{dim}d"),
    "instancenormal": lambda dim: getattr(modules, f"InstanceNormalNorm{dim}d"),
    "groupnormal": lambda dim=None: modules.GroupNormalNorm,
    "layernormal": lambda dim=None: modules.LayerNormalNorm,
}


def register() -> None:
    """Adds normnorm's layers to ``monai.networks.layers.Norm``, for this process.

    Names are MONAI's followed by "normal": "batchnormal", "instancenormal", "groupnormal",
    "layernormal". Calling it again has no effect.
    """
    for name, factory in _FACTORIES.items():
        if name.upper() not in Norm.names:
            Norm.add_factory_callable(name, factory, "normality normalization, by normnorm")
