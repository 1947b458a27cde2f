"""The arguments of the ops, as named tuples in the order of their schemas."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

from torch import Tensor

# In the order of the enumerations in csrc/common.
KINDS = ("batch", "layer", "group", "instance")
ACTIVATIONS = ("", "relu")


# The schema of the fields of Config but the backend, and that of what packed() returns.
CONFIG_SCHEMA = (
    "str kind, SymInt num_groups, int normalized_ndim, float eps, float noise_train, float alpha, "
    "int order, float transform_eps, int stream, bool channels_last, str activation"
)
PACKED_SCHEMA = (
    "float eps, float noise_train, float alpha, float transform_eps, int size, int flags"
)


class Config(NamedTuple):
    """The arguments that are not tensors, the same in the forward and the backward pass.

    Attributes:
        kind: "batch", "layer", "group" or "instance": what a group of elements is.
        num_groups: channel groups a sample for kind "group", else 0.
        normalized_ndim: trailing dimensions for kind "layer", else 0.
        eps: added to the variance, and its root to the Newton step's denominator.
        noise_train: weight of the noise; 0 for none (always, outside training).
        alpha: length of the Newton step; 0 turns the transform off.
        order: 2 for Newton's step, 1 for a gradient step.
        transform_eps: distance that the transform's exponent keeps from zero.
        stream: which noise of a seed: the rank in synchronised layers, else 0.
        channels_last: the noise index follows (N, spatial..., C) instead of row-major order.
        activation: "relu", applied to the output, or "" for none.
        backend: the backend's name, which the public ops take and a backend does not.
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


# (kind, order, channels_last, activation) -> the bits of them in a compiled op's argument ``flags``
_BITS = {
    (KINDS[kind], order, last, ACTIVATIONS[activation]): (
        kind | (order == 1) << 2 | last << 3 | activation << 4
    )
    for kind, order, last, activation in itertools.product(
        range(len(KINDS)), (1, 2), (False, True), range(len(ACTIVATIONS))
    )
}


@functools.lru_cache(maxsize=1024)
def packed(config: Config, switches: int) -> tuple[float, float, float, float, int, int]:
    """The last arguments of a compiled backend's ops: a configuration in fewer arguments, since
    each one costs host time. ``Flags`` in csrc/binding/ops.h has the bits of the last.

    Args:
        config: the configuration.
        switches: the op's booleans, the first in bit 0.

    Raises:
        ValueError: a setting that has no bits; the checks of the op's arguments say which.
    """
    kind, num_groups, ndim, eps, noise_train, alpha, order, transform_eps, stream, last, act, *_ = (
        config
    )
    bits = _BITS.get((kind, order, last, act))
    size, other = (ndim, num_groups) if kind == "layer" else (num_groups, ndim)
    if bits is None or other != 0:
        raise ValueError("the configuration does not fit the op")
    flags = bits | switches << 8 | (stream & 0xFFFFFFFF) << 16
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
    # added to the output, or to the input where `prenorm`
    residual: Tensor | None
    # noise
    seed: Tensor | None
    noise_scale: Tensor | None
    # which results there are beside the output
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
    # what the forward pass saved; `input` is its sum where it was prenorm
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
    # no gradient passes through running statistics
    frozen: bool
    config: Config

    @classmethod
    def of(cls, *arguments: Any) -> BackwardArguments:
        """From the op's argument list, with or without the backend's name."""
        return cls(*arguments[:12], Config(*arguments[12:]))  # type: ignore[call-arg]

    def flat(self) -> tuple[Any, ...]:
        """The public op's argument list."""
        return (*self[:-1], *self.config)
