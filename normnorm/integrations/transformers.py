"""transformers: LayerNorms over channels that its vision models define for themselves.

Recognized by what they have, since each model file of that library has its own copy. Its other
models use torch's layers, or RMS norms, which have no counterpart.
"""

from __future__ import annotations

from torch import nn

from normnorm.modules import LayerNormalNorm, LayerNormalNorm2d

__all__ = ["counterpart"]

# Copies that know one layout alone, (N, C, H, W).
_CHANNELS_FIRST = ("EomtLayerNorm2d", "EomtDinov3LayerNorm2d", "VideomtLayerNorm2d")


def counterpart(module: nn.Module) -> type[nn.Module] | None:
    """The class of ours that stands for a transformers module's, or None."""
    cls = type(module)
    if cls.__bases__ != (nn.LayerNorm,):
        return None
    if cls.__name__ in _CHANNELS_FIRST:
        return LayerNormalNorm2d
    if cls.__name__.endswith("LayerNorm") and hasattr(module, "data_format"):
        return {"channels_first": LayerNormalNorm2d, "channels_last": LayerNormalNorm}.get(
            str(module.data_format)
        )
    return None
