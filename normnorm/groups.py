"""The normalization groups of a norm layer: which values they hold, and these values transformed.

Shared by :func:`normnorm.monitor`, :mod:`normnorm.diagnostics` and the benchmarks.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import annealing, layer_outputs, reference
from .fused import AddLayerNormalNorm
from .modules import _InstanceNormalNorm, _RunningNorm, _Transform


def input_of(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor:
    """The tensor that a layer normalized, from the arguments and the output of its forward."""
    if isinstance(layer, AddLayerNormalNorm):
        return output[1]  # the sum
    # Other libraries' classes call it x or hidden_states.
    return args[0] if args else kwargs.get("input", next(iter(kwargs.values())))


def each_sample(layer: nn.Module) -> bool:
    """Whether every sample of (N, C, *) has groups of its own: channels, or groups of channels."""
    if isinstance(layer, layer_outputs.INSTANCE_NORMS):
        return not uses_running(layer)
    return isinstance(layer, nn.GroupNorm)


def groups_of(layer: Any, values: Tensor, at_most: int | None = None) -> Tensor:
    """A layer's normalization groups: (groups, elements).

    Args:
        layer: a norm of torch or normnorm; other layers count as batch layers.
        values: of the shape of the layer's input, which its output shares.
        at_most: number of groups, evenly spaced; None for all.

    Returns:
        In the order of the samples and of the channels in each. A group is a channel over the batch
        and all positions for batch layers, and for instance layers in evaluation with running
        statistics; the trailing dimensions of a sample for layer normalization; a group of
        channels, or one channel, of a sample for group and other instance layers.
    """
    if isinstance(layer, _InstanceNormalNorm) and values.dim() == layer._rank - 1:
        values = values.unsqueeze(0)
    if hasattr(layer, "normalized_shape"):
        if values.dim() > len(layer.normalized_shape):
            # Thins samples first, because the operations below may copy.
            values = thin(values, 0, at_most)
        if values.dim() > 2 and len(layer.normalized_shape) == 1:
            values = layer_outputs.channels_last(layer, values)
        return thin(values.reshape(-1, math.prod(layer.normalized_shape)), 0, at_most)
    if not each_sample(layer):
        return thin(values, 1, at_most).transpose(0, 1).flatten(1)
    values = thin(values, 0, at_most)
    number = layer.num_groups if isinstance(layer, nn.GroupNorm) else values.size(1)
    return thin(values.reshape(values.size(0) * number, -1), 0, at_most)


def thin(values: Tensor, dim: int, at_most: int | None) -> Tensor:
    """At most ``at_most`` slices along a dimension, evenly spaced; all for None.

    The step is coprime to the size: a step of an image's width would select one column, a step of a
    sequence's length only first tokens. A symbolic size under a compiler uses the plain step.
    """
    if at_most is None:
        return values
    size = values.size(dim)
    step = max(1, math.ceil(size / at_most))
    if not (torch.compiler.is_compiling() and annealing.is_symbolic(size)):
        while 1 < step < size and math.gcd(step, size) > 1:
            step += 1
    return values[(slice(None),) * dim + (slice(None, None, step),)]


def uses_running(layer: Any) -> bool:
    """Whether running statistics normalize: then a group is a channel over all batches."""
    if not isinstance(layer, _NormBase) or layer.training or layer.running_mean is None:
        return False
    return layer.track_running_stats or not isinstance(layer, layer_outputs.INSTANCE_NORMS)


class Part(NamedTuple):
    """A copied part of the normalization groups of a layer's input."""

    values: Tensor  # (groups, elements)
    # (groups,) each: mean, variance and lambda of a normality layer that used running statistics;
    # None if it estimated them from the input.
    running: list[Tensor] | None
    noisy: bool  # whether noise was added

    def transformed(self, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
        """The groups before noise and affine map, float64 on the CPU, and a normality layer's
        statistics (8, groups).

        For other layers the values as they are: the measures of normality do not depend on location
        and scale. A normality layer's statistics are estimated from the part.
        """
        values = self.values.cpu().double()
        if not isinstance(layer, _Transform):
            return values, None
        frozen = None
        if self.running is not None:
            mean, var, lmbda = (tensor.cpu() for tensor in self.running)
            frozen = reference.pack_running(mean, var, lmbda, float(layer.eps), torch.float64)
        # As kind layer, whose normalization groups are rows.
        return reference.normal_norm(
            values, kind="layer", normalized_ndim=1, eps=float(layer.eps), alpha=layer.alpha,
            order=layer.order, transform_eps=layer.transform_eps, noise_train=1.0,
            z=torch.zeros_like(values), frozen=frozen,
        )  # fmt: skip


def part_of(layer: Any, input: Tensor, groups: int, elements: int) -> Part:
    """At most ``groups`` groups of a layer's input and ``elements`` elements of each, evenly
    spaced. Does not synchronize with the device."""
    values = thin(groups_of(layer, input, groups), 1, elements)
    running = running_of(layer)
    if running is not None:
        running = [thin(tensor, 0, groups).clone() for tensor in running]
    transforms = isinstance(layer, _Transform)
    noisy = transforms and layer.training and layer.noise_train > 0.0
    return Part(values.clone(), running, noisy)


def running_of(layer: Any) -> list[Tensor] | None:
    """Running mean, variance and lambda of a normality layer that uses them; else None."""
    if not isinstance(layer, _RunningNorm) or not uses_running(layer):
        return None
    return [layer.running_mean, layer.running_var, layer.running_lmbda]  # type: ignore[list-item]
