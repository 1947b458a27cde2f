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
    """The settings of an op, the same in the forward and the backward pass.

    Attributes:
        kind: "batch", "layer", "group" or "instance": what a group of elements is.
        num_groups: number of channel groups of a sample for kind "group", else 0.
        normalized_ndim: number of trailing dimensions for kind "layer", else 0.
        eps: added to the variance, and its root to the Newton step's denominator.
        noise_train: weight of the noise; 0 for none, as in evaluation.
        alpha: length of the Newton step; 0 turns the transform off.
        order: 2 for a Newton step, 1 for a gradient step.
        transform_eps: distance that the transform's exponent keeps from zero.
        stream: the noise's; the rank in synchronised layers, a DTensor shard's index, else 0.
        channels_last: the noise index follows (N, spatial..., C) instead of row-major order.
        activation: "relu", applied to the output, or "" for none.
        backend: the backend's name, an argument of the public ops only.
    """

    # groups of elements
    kind: str
    num_groups: int
    normalized_ndim: int
    # standardization, noise and transform
    eps: float = 1e-5
    noise_train: float = 0.0
    alpha: float = 1.0
    order: int = 2
    transform_eps: float = 0.0
    # position in the noise
    stream: int = 0
    channels_last: bool = False
    # epilogue
    activation: str = ""
    backend: str = ""


# (kind, order, channels_last, activation) -> their bits in a compiled op's argument ``flags``
_BITS = {
    (KINDS[kind], order, last, ACTIVATIONS[activation]): (
        kind | (order == 1) << 2 | last << 3 | activation << 4
    )
    for kind, order, last, activation in itertools.product(
        range(len(KINDS)), (1, 2), (False, True), range(len(ACTIVATIONS))
    )
}


@functools.lru_cache(maxsize=1024)
def packed(config: Config, *switches: bool) -> tuple[float, float, float, float, int, int]:
    """The configuration and switches as the last six arguments of a compiled backend's ops, since
    each argument costs host time. ``Flags`` in csrc/binding/ops.h reads the bits of ``flags``.

    Args:
        config: the configuration.
        switches: the op's booleans.

    Raises:
        ValueError: a setting that cannot be packed; the op's checks then name it.
    """
    kind, num_groups, ndim, eps, noise_train, alpha, order, transform_eps, stream, last, act, *_ = (
        config
    )
    bits = _BITS.get((kind, order, last, act))
    size, other = (ndim, num_groups) if kind == "layer" else (num_groups, ndim)
    if bits is None or other != 0:
        raise ValueError("the configuration does not fit the op")
    for number, switch in enumerate(switches, start=8):
        bits |= switch << number
    flags = bits | (stream & 0xFFFFFFFF) << 16
    return eps, noise_train, alpha, transform_eps, size, flags


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

    def flat(self) -> tuple[Any, ...]:
        """The public op's argument list."""
        return (*self[:-1], *self.config)


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

    def flat(self) -> tuple[Any, ...]:
        """The public op's argument list."""
        return (*self[:-1], *self.config)
