"""The op of the projected error function: its schema, its implementations, and their selection.

For projections t it adds ``t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2)`` to a sum and replaces t
by the slope, ``erf(t / sqrt 2)``. The products with the directions before and after it are torch's.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from normnorm import backends

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)

# (projections, sums, slopes). projections: float32 or float64, contiguous; replaced by the slopes
# if `slopes`, else undefined afterwards. sums: a float64 vector on the same device; the sum over
# the projections is added to it, distributed over its elements as the implementation chooses.
ProjectedError = Callable[[Tensor, Tensor, bool], None]

_library = torch.library.Library("normnorm_cpu", "FRAGMENT")
_library.define(
    "projected_error_(Tensor(a!) projections, Tensor(b!) sums, bool slopes) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake("normnorm_cpu::projected_error_", lambda *_: None, lib=_library)


def projected_error_of(device: torch.device) -> ProjectedError:
    """The implementation for tensors on ``device``, by the backend in use.

    The CUDA library has no kernel for it; backend ``cuda`` takes Triton's if Triton is installed.

    Raises:
        ValueError, RuntimeError: the chosen backend does not exist, cannot run here, or does not
            serve this device.
    """
    name = backends.resolve(device).name
    if name == "cpu":
        return torch.ops.normnorm_cpu.projected_error_.default
    if name in ("cuda", "triton") and backends.available_backends()["triton"] is None:
        return importlib.import_module("normnorm.triton_kernels.projected").projected_error_
    return _plain


def _plain(projections: Tensor, sums: Tensor, slopes: bool) -> None:
    """In PyTorch operations, for every device."""
    slope = torch.erf(projections * ROOT_HALF)
    sums[0] += torch.linalg.vecdot(projections.flatten(), slope.flatten())
    sums[0] += ROOT_TWO_OVER_PI * projections.square_().mul_(-0.5).exp_().sum()
    if slopes:
        projections.copy_(slope)
