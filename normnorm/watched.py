"""Which of a model's layers a caller means, and how what they give out is read.

What :class:`normnorm.PER` and :mod:`normnorm.diagnostics` have in common, so that both take the
same numbers for a vector of channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normnorm.fused import AddLayerNormalNorm
from normnorm.modules import _InstanceNormalNorm

__all__ = ["channels_last", "named_layers", "tensor_of"]

# As in Conv1d, LayerNorm2d, LayerNormAct2dFp32: how many dimensions stand behind (batch, channels).
_POSITIONS = re.compile(r"([123])d(?![a-z])")
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, _InstanceNormalNorm)


def named_layers(
    model: nn.Module, layers: str | Iterable[str] | Callable[[str, nn.Module], bool]
) -> dict[str, nn.Module]:
    """The layers that are meant, by name; none where the names or the predicate choose none.

    Args:
        model: whose ``named_modules`` are meant.
        layers: a name, names, or a predicate of (name, module).

    Raises:
        ValueError: a name is not the model's.
    """
    modules = dict(model.named_modules())
    if callable(layers):
        return {name: module for name, module in modules.items() if layers(name, module)}
    names = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown:
        raise ValueError(f"the model has no layer named {', '.join(map(repr, unknown))}")
    return {name: modules[name] for name in names}


def tensor_of(name: str, module: nn.Module, output: Any) -> Tensor:
    """What a layer gave out as one tensor; of :class:`AddLayerNormalNorm` what it normalized,
    without the sum.

    Raises:
        TypeError: the output is anything else.
    """
    if isinstance(module, AddLayerNormalNorm):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name!r} ({type(module).__name__}) gave {type(output).__name__}; "
            "wanted is a layer that gives one tensor"
        )
    return output


def channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """The output with its channels as the last dimension; all others are positions.

    The channels are dimension 1 of what batch, group and instance layers give out, and of any
    layer whose class says how many dimensions follow them and gives that many: ``Conv1d`` of
    (N, C, L), ``LayerNorm2d`` of (N, C, H, W). They are the last dimension behind other layer
    normalizations and behind ``nn.Linear``. What no class tells is decided by the rank: (batch,
    length, features) of three dimensions, (batch, channels, ...) of more.

    Args:
        module: the layer that gave the output.
        output: (batch, ...), two dimensions or more.

    Returns:
        a view, (batch, ..., channels).

    Raises:
        ValueError: the output has fewer than two dimensions, or is a single sample of a
            convolution or an instance layer, without the dimension of the batch.
    """
    positions = _positions(module)
    # These also take a sample alone, whose dimension 1 is a position.
    unbatched = output.dim() - 1 == positions and (
        hasattr(module, "out_channels") or isinstance(module, _INSTANCE_NORMS)
    )
    if output.dim() < 2 or unbatched:
        raise ValueError(
            f"outputs of shape (batch, ...) are wanted; {type(module).__name__} gave "
            f"{tuple(output.shape)}"
        )
    first = isinstance(module, (_NormBase, nn.GroupNorm)) or output.dim() - 2 == positions
    return output.movedim(1, -1) if first or not _last(module, output) else output


def _positions(module: nn.Module) -> int | None:
    """How many dimensions the layer's class, or one that it derives from, says to follow the
    channels. By name: torchvision's and timm's channels-first ``LayerNorm2d`` derive from
    ``nn.LayerNorm`` like ours, and differ from it in nothing else that could be asked of them
    without importing these libraries."""
    for cls in type(module).__mro__:
        found = _POSITIONS.search(cls.__name__)
        if found:
            return int(found[1])
    return None


def _last(module: nn.Module, output: Tensor) -> bool:
    """Whether a layer that has not said otherwise by its class has its channels last."""
    # Layer and root mean square norms have this attribute, torch's and other libraries' alike;
    # those of transformers say the layout in a second one where they know both.
    if hasattr(module, "normalized_shape"):
        return getattr(module, "data_format", None) != "channels_first"
    return isinstance(module, nn.Linear) or output.dim() == 3
