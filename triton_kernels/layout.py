"""From tensors to a walk: what the groups of a layer are in memory, and in the order of the noise.

Every layer is ``outer x inner`` groups of ``runs x length`` elements each, as in
``csrc/cpu/layout.cpp``; the kinds differ in where the axes come from:

========  ===========================================  ==================================
kind      rows                                         columns (channels_last, (N, C))
========  ===========================================  ==================================
batch     1 x C groups of N runs of spatial            1 x C columns of N spatial rows
layer     samples x 1 groups of 1 run of n             -
instance  N x C groups of 1 run of spatial             N x C columns of spatial rows
group     N x G groups of C/G runs of spatial          N x G groups of spatial runs of C/G
========  ===========================================  ==================================
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from normnorm.config import Config

from . import walk

__all__ = ["Layout", "Strides", "make_layout"]


class Strides(NamedTuple):
    """Strides in elements; the innermost axis always has stride 1."""

    outer: int
    inner: int
    run: int


class Layout(NamedTuple):
    """How a layer's groups lie in a walk.

    Attributes:
        columns: neighbouring elements belong to different groups.
        outer, inner, runs, length: see above.
        affine: what a weight belongs to (``walk.PER_*``).
        noise: strides of the canonical order of the noise.
        kind, normalized_ndim, channels_last: whence it came; ``channels_last`` also where the
            walk counts channels innermost.
    """

    columns: bool
    outer: int
    inner: int
    runs: int
    length: int
    affine: int
    noise: Strides
    kind: str
    normalized_ndim: int
    channels_last: bool

    @property
    def groups(self) -> int:
        return self.outer * self.inner

    @property
    def group_size(self) -> int:
        return self.runs * self.length

    def strides(self, tensor: Tensor) -> Strides | None:
        """The tensor's strides in this walk; None where it has none."""
        if self.kind == "layer":
            lead = tensor.dim() - self.normalized_ndim
            outer, inner = _merged(tensor, 0, lead), _merged(tensor, lead, tensor.dim())
            return None if outer is None or inner != 1 else Strides(outer, 0, 0)
        spatial = _merged(tensor, 2, tensor.dim())
        sample, channel = _axis(tensor, 0), _axis(tensor, 1)
        if spatial is None:
            return None
        if not self.channels_last:
            if spatial != 1:
                return None
            if self.kind == "batch":
                return Strides(0, channel, sample)
            width = self.runs if self.kind == "group" else 1
            return Strides(sample, channel * width, channel)
        if tensor.size(1) > 1 and channel != 1:
            return None
        size = math.prod(tensor.shape[2:])
        if self.kind != "batch":
            return Strides(sample, self.length, spatial if size > 1 else 0)
        if size == 1:
            return Strides(0, 1, sample)
        follows = tensor.size(0) == 1 or sample == spatial * size  # an expanded sample does not
        return Strides(0, 1, spatial) if follows else None

    def dense(self, tensor: Tensor) -> Tensor:
        """A copy that this walk can take."""
        if self.kind == "layer" or not self.channels_last:
            return tensor.contiguous()
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _merged(tensor: Tensor, begin: int, end: int) -> int | None:
    """The stride of dimensions [begin, end) taken as one axis; None where they do not lie one
    behind the other. An axis of one element has stride 1, whatever the tensor says."""
    stride, expected = None, 0
    for i in reversed(range(begin, end)):
        if tensor.size(i) == 1:
            continue
        if stride is None:
            stride = tensor.stride(i)
        elif tensor.stride(i) != expected:
            return None
        expected = tensor.stride(i) * tensor.size(i)
    return 1 if stride is None else stride


def _axis(tensor: Tensor, i: int) -> int:
    return 0 if tensor.size(i) == 1 else tensor.stride(i)


def _channel_layout(input: Tensor, config: Config, channels_last: bool) -> Layout:
    samples, channels = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    one, element = int(walk.PER_GROUP.value), int(walk.PER_GROUP_ELEMENT.value)
    common = (config.kind, 0, channels_last)
    if config.kind == "group":
        groups = config.num_groups
        width = channels // groups
        if channels_last:
            noise = Strides(channels * spatial, width, channels)
            return Layout(False, samples, groups, spatial, width, element, noise, *common)
        noise = Strides(channels * spatial, width * spatial, spatial)
        run = int(walk.PER_RUN.value) if width > 1 else one
        return Layout(False, samples, groups, width, spatial, run, noise, *common)
    if config.kind == "batch":
        if channels_last:
            noise = Strides(0, 1, channels)
            return Layout(True, 1, channels, samples * spatial, 1, one, noise, *common)
        noise = Strides(0, spatial, channels * spatial)
        return Layout(False, 1, channels, samples, spatial, one, noise, *common)
    if channels_last:
        noise = Strides(channels * spatial, 1, channels)
        return Layout(True, samples, channels, spatial, 1, one, noise, *common)
    noise = Strides(channels * spatial, spatial, 0)
    return Layout(False, samples, channels, 1, spatial, one, noise, *common)


def make_layout(input: Tensor, output: Tensor, config: Config, noisy: bool) -> Layout:
    """The walk for an input that is not empty, and an output with its own strides.

    Where there is noise the walk must follow its order, so that neighbours share a counter;
    else it follows the tensors.
    """
    if config.kind == "layer":
        lead = input.dim() - config.normalized_ndim
        size = math.prod(input.shape[lead:])
        samples = math.prod(input.shape[:lead])
        noise = Strides(size, 0, 0)
        element = int(walk.PER_ELEMENT.value)
        ndim = config.normalized_ndim
        return Layout(False, samples, 1, 1, size, element, noise, "layer", ndim, False)
    if math.prod(input.shape[2:]) == 1:
        return _channel_layout(input, config, True)
    if noisy:
        return _channel_layout(input, config, config.channels_last)
    rows, columns = (_channel_layout(input, config, last) for last in (False, True))
    if rows.strides(input) is not None and rows.strides(output) is not None:
        return rows
    if columns.strides(output) is None:
        return rows
    fits = columns.strides(input) is not None or rows.strides(output) is None
    return columns if fits else rows


def natural_like(input: Tensor, layout: Layout) -> Tensor:
    """An empty tensor that the walk can take."""
    if layout.kind == "layer" or not layout.channels_last:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)
    last = (input.size(0), *input.shape[2:], input.size(1))
    return torch.empty(last, dtype=input.dtype, device=input.device).movedim(-1, 1)
