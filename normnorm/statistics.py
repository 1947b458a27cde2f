"""The saved statistics: one tensor of shape (8, groups) and what its rows hold.

Every backend writes the same rows, so that the backward pass of one can follow the forward
pass of another. ``csrc/common/stats.h`` holds the same numbers for the compiled kernels.
"""

from __future__ import annotations

from enum import IntEnum

import torch

__all__ = ["ROWS", "Row", "statistics_dtype"]


class Row(IntEnum):
    """Rows of the statistics tensor, by the names of ``docs/internals/mathematics.md``."""

    MEAN = 0
    """mu, rounded to the statistics' dtype."""
    MEAN_LOW = 1
    """mean(u - MEAN): what the rounding of mu lost."""
    RSTD = 2
    """r = (v + eps) ** -0.5 with the biased variance v."""
    LMBDA = 3
    """The Yeo-Johnson exponent lambda."""
    NOISE_SCALE = 4
    """s = mean(abs(x - mean(x))), or 0 where no noise was asked for."""
    MEAN_HD = 5
    """A = mean(h d), d being the derivative of the transform by lambda at lambda 1."""
    MEAN_D = 6
    """D = mean(d)."""
    CURVATURE = 7
    """Q, the denominator of the Newton step (0 where lambda was given, not estimated)."""


ROWS = tuple(Row)
"""The rows in order; torch.compile of torch 2.10 and 2.11 cannot trace a loop over the enum."""


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which statistics are kept and arithmetic is done for an input dtype.

    float64 stays float64; float32, bfloat16 and float16 give float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32
