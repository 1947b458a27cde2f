"""The arguments of the ops, as named tuples in the order of their schemas."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

from torch import Tensor

# In the order of the enumerations in csrc/common.
KINDS = ("batch", "layer", "group", "instance")
ACTIVATIONS = ("", "relu")


# Schemas: the fields of Config without the backend; the results of packed().
CONFIG_SCHEMA = (
    "str kind, SymInt num_groups, int normalized_ndim, float eps, float noise_train, float alpha, "
    "int order, float transform_eps, int stream, bool channels_last, str activation"
)
PACKED_SCHEMA = (
    "float eps, float noise_train, float alpha, float transform_eps, int size, int flags"
)


class Config(NamedTuple):
    """The settings of an op, the same in the forward and the backward pass."""

    kind: str  # "batch", "layer", "group" or "instance": what a group of elements is
    num_groups: int  # channel groups of a sample for kind "group", else 0
    normalized_ndim: int  # trailing dimensions for kind "layer", else 0
    eps: float = 1e-5  # added to the variance, and its root to the Newton step's denominator
    noise_train: float = 0.0  # weight of the noise; 0 for none, as in evaluation
    alpha: float = 1.0  # length of the Newton step; 0 turns the transform off
    order: int = 2  # 2 for a Newton step, 1 for a gradient step
    transform_eps: float = 0.0  # distance that the transform's exponent keeps from zero
    stream: int = 0  # of the noise: the rank in synchronised layers, a DTensor shard's index
    channels_last: bool = False  # the noise index follows (N, spatial..., C), not row-major order
    activation: str = ""  # "relu", applied to the output, or "" for none
    backend: str = ""  # the backend's name, an argument of the public ops only


# (kind, order, channels_last, activation) -> their bits in a compiled op's argument ``flags``
_BITS = {
    (kind, order, last, activation): i | (order == 1) << 2 | last << 3 | j << 4
    for (i, kind), order, last, (j, activation) in itertools.product(
        enumerate(KINDS), (1, 2), (False, True), enumerate(ACTIVATIONS)
    )
}


@functools.lru_cache(maxsize=1024)
def packed(config: Config, *switches: bool) -> tuple[float, float, float, float, int, int]:
    """The configuration and the op's booleans as the last six arguments of a compiled backend's
    ops, since each argument costs host time. ``Flags`` in csrc/binding/ops.h reads the bits of
    ``flags``. ValueError for a setting that cannot be packed; the op's checks then name it."""
    kind, num_groups, ndim, eps, noise, alpha, order, shift, stream, last, act, *_ = config
    bits = _BITS.get((kind, order, last, act))
    size, other = (ndim, num_groups) if kind == "layer" else (num_groups, ndim)
    if bits is None or other != 0:
        raise ValueError("the configuration does not fit the op")
    for number, switch in enumerate(switches, start=8):
        bits |= switch << number
    flags = bits | (stream & 0xFFFFFFFF) << 16
    return eps, noise, alpha, shift, size, flags


class ForwardArguments(NamedTuple):
    """The arguments of ``normal_norm_forward``; ``docs/internals/backends.md`` describes each."""

    input: Tensor
    # used instead of the input's own statistics; all three or none
    running_mean: Tensor | None
    running_var: Tensor | None
    running_lmbda: Tensor | None
    # affine map
    weight: Tensor | None
    bias: Tensor | None
    # added to the output, or to the input if `prenorm`
    residual: Tensor | None
    # noise
    seed: Tensor | None
    noise_scale: Tensor | None
    # whether the results sum and stats are wanted
    prenorm: bool
    keep_stats: bool
    config: Config

    @classmethod
    def of(cls, *arguments: Any) -> ForwardArguments:
        """From the op's argument list, with or without the backend's name."""
        return cls(*arguments[:11], Config(*arguments[11:]))  # type: ignore[call-arg]


class BackwardArguments(NamedTuple):
    """The arguments of ``normal_norm_backward``; ``docs/internals/backends.md`` describes each."""

    grad_output: Tensor
    # saved by the forward pass; `input` is its sum if `prenorm`
    input: Tensor
    stats: Tensor
    weight: Tensor | None
    bias: Tensor | None
    output: Tensor | None
    seed: Tensor | None
    # the gradient of the sum, added to that of the input
    grad_sum: Tensor | None
    # which gradients are wanted
    needs_input: bool
    needs_weight: bool
    needs_bias: bool
    # running statistics were used, through which no gradient passes
    frozen: bool
    config: Config

    @classmethod
    def of(cls, *arguments: Any) -> BackwardArguments:
        """From the op's argument list, with or without the backend's name."""
        return cls(*arguments[:12], Config(*arguments[12:]))  # type: ignore[call-arg]
