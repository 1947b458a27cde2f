"""The saved statistics: one tensor of shape (8, groups), by rows.

Every backend writes the same rows, so one backend's backward pass can follow another's forward
pass. ``csrc/common/stats.h`` has the same indices for the compiled kernels.
"""

from enum import IntEnum

import torch


class Row(IntEnum):
    """Rows of the statistics tensor; symbols as in ``docs/internals/mathematics.md``."""

    MEAN = 0
    """mu, rounded to the statistics' dtype."""
    MEAN_LOW = 1
    """mean(u - MEAN): the rounding error of MEAN."""
    RSTD = 2
    """r = (v + eps) ** -0.5 with the biased variance v."""
    LMBDA = 3
    """The Yeo-Johnson exponent lambda."""
    NOISE_SCALE = 4
    """s = mean(abs(x - mean(x))), or 0 without noise."""
    MEAN_HD = 5
    """A = mean(h d), with d the derivative of the transform by lambda at lambda = 1."""
    MEAN_D = 6
    """D = mean(d)."""
    CURVATURE = 7
    """Q, the denominator of the Newton step (0 if lambda was given, not estimated)."""


class Round(IntEnum):
    """The rounds of a pass: ``Round`` in ``csrc/common/params.h``, which lists what each needs and
    sums."""

    MOMENTS = 1
    LMBDA = 2
    MEAN_X = 3
    DEVIATION = 4
    OUTPUT = 5
    SUMS = 6
    GRADIENT = 7


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and arithmetic for an input dtype: float64 for float64; float32 for
    float32, bfloat16 and float16."""
    return torch.float64 if dtype == torch.float64 else torch.float32
