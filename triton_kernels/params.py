"""The parameters of the kernels: what each launch passes (named tuples, which Triton flattens), and
what a kernel is compiled for (``Spec``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..config import Config

# How the groups lie in a tile (layout.py).
ROWS = tl.constexpr(0)
GROUP = tl.constexpr(1)
COLUMNS = tl.constexpr(2)

# The index of an element's weight and bias, in this order: inner; inner * runs + run; its place in
# the run; inner * length + its place in the run.
PER_GROUP = tl.constexpr(0)
PER_RUN = tl.constexpr(1)
PER_ELEMENT = tl.constexpr(2)
PER_GROUP_ELEMENT = tl.constexpr(3)

# How a tile's elements share the counters of the noise: eight neighbours each; four, which are half
# of a counter's; or none.
NO_NOISE = tl.constexpr(0)
OCTETS = tl.constexpr(1)
QUADS = tl.constexpr(2)
SCATTERED = tl.constexpr(3)


class Operand(NamedTuple):
    """A tensor of the input's shape. Both fields are None where a pass has no such tensor."""

    data: Tensor | None
    strides: tuple[int, ...] | None  # in elements, of the axes outer, inner and run


ABSENT = Operand(None, None)


class ForwardTensors(NamedTuple):
    input: Operand
    output: Operand = ABSENT
    residual: Operand = ABSENT  # added to the output; to the input instead where there is a sum
    sum: Operand = ABSENT  # written: input plus residual, which is normalized


class BackwardTensors(NamedTuple):
    grad: Operand  # of the output
    input: Operand
    output: Operand = ABSENT  # written: the gradient of the input
    result: Operand = ABSENT  # with an activation, the output of the forward pass
    grad_sum: Operand = ABSENT  # added to the gradient of the input


class Affine(NamedTuple):
    weight: Tensor | None
    bias: Tensor | None


class Running(NamedTuple):
    """The running statistics (tensors or None), or their strides."""

    mean: Any
    var: Any
    lmbda: Any


class Noise(NamedTuple):
    seed: Tensor | None
    scale: Tensor | None  # given standard deviations of the groups' noise
    stream: int  # counter word 2


class Geometry(NamedTuple):
    """The extents of a layout: outer x inner groups of runs x length elements each."""

    groups: int
    inner: int
    runs: int
    length: int
    # of a run in the GROUP layout, and their divisor: n // chunks = mulhi(4 n, factor) >> bits
    chunks: int
    factor: int
    bits: int
    # Strides of the canonical order of the noise. Not a tuple: within loops Triton 3.6 loses a
    # constant (a stride of 1) of a tuple in a tuple.
    noise_outer: int
    noise_inner: int
    noise_run: int


class Splits(NamedTuple):
    """How many programs share a group, and how many partial sums of a group the previous kernel
    left: as many, or one where reduce.py has added them up."""

    programs: int
    left: int


class Numbers(NamedTuple):
    """The scalars. Kernels take them one by one, because Triton passes a float in a tuple as
    float32, and convert them at once to the compute type."""

    inverse_count: Any
    eps: Any
    root_eps: Any
    alpha: Any
    transform_eps: Any
    noise_train: Any


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for."""

    # the tile: its layout, R rows of L elements; a resident kernel holds K tiles of a group
    LAYOUT: int
    R: int
    L: int
    K: int = 1
    EVEN: bool = False  # no tile has an element outside of its group
    SHIFTED: bool = False  # chunks begin up to three elements before their run
    LANES: int = 1  # neighbouring elements of a row that one thread holds, if alignment permits
    SPLITS: int = 1  # a power of two, at least the number of partial sums of a group
    # addresses
    ALIGN: int = 1  # divides all offsets of groups and runs
    WIDE: bool = False  # offsets or noise positions within a group need 64 bits
    # arithmetic
    DOUBLE: bool = False  # in float64
    FAST: bool = False  # with the special-function instructions of NVIDIA GPUs
    SERIES: bool = True  # the series path is compiled; lambda is not 1 by configuration
    # the layer
    ORDER: int = 2  # of the Newton step
    FROZEN: bool = False  # the statistics are given
    AFFINE: int = 0
    NOISE: int = 0
    ACTIVATION: int = 0  # its index in ACTIVATIONS: of the output; of its gradient backward

    @property
    def SINGLE(self) -> bool:
        """A program has one group, whose numbers are scalars."""
        return GROUP.value == self.LAYOUT or (ROWS.value == self.LAYOUT and self.R == 1)


def make_numbers(config: Config, group_size: int) -> Numbers:
    return Numbers(
        1.0 / group_size, config.eps, math.sqrt(config.eps), config.alpha, config.transform_eps,
        config.noise_train,
    )  # fmt: skip


@triton.jit
def number(x, S: tl.constexpr):
    """A float64 argument in the compute type."""
    if S.DOUBLE:
        return tl.full([], x, tl.float64)
    else:
        return tl.full([], x, tl.float32)


@triton.jit
def numbers(
    inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S: tl.constexpr
):  # fmt: skip
    return Numbers(
        number(inverse_count, S), number(eps, S), number(root_eps, S), number(alpha, S),
        number(transform_eps, S), number(noise_train, S),
    )  # fmt: skip
