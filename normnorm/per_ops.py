"""The op of the projected error function: its schema, who computes it, and the plain way.

For projections t it adds up ``t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2)`` and puts the slope,
``erf(t / sqrt 2)``, in t's place. The products with the directions before and after it stay
torch's: the libraries behind them are tuned for every processor and GPU, and ours would not be.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import torch
from torch import Tensor

from normnorm import backends

__all__ = ["ROOT_HALF", "ROOT_TWO_OVER_PI", "ProjectedError", "projected_error_of"]

ROOT_HALF = math.sqrt(0.5)
ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)

# (projections, sums, slopes): projections are float32 or float64, contiguous, and become their
# slopes where `slopes` says so (else what they hold afterwards is left open). Their sum is added to
# sums, a vector of float64 on their device, spread over its elements as suits who computes.
ProjectedError = Callable[[Tensor, Tensor, bool], None]

_SCHEMA = "projected_error_(Tensor(a!) projections, Tensor(b!) sums, bool slopes) -> ()"
_library = torch.library.Library("normnorm_cpu", "FRAGMENT")
_library.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))


def _fake(projections: Tensor, sums: Tensor, slopes: bool) -> None:
    """Nothing has another shape afterwards."""


torch.library.register_fake("normnorm_cpu::projected_error_", _fake, lib=_library)


def projected_error_of(device: torch.device) -> ProjectedError:
    """Who computes for tensors on ``device``, following the choice of a backend.

    The CUDA library has no kernel for it: Triton's serves beside that one where Triton is there.

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
    """The same in PyTorch's own operations, on every device."""
    slope = torch.erf(projections * ROOT_HALF)
    sums[0] += torch.linalg.vecdot(projections.flatten(), slope.flatten())
    sums[0] += ROOT_TWO_OVER_PI * projections.square_().mul_(-0.5).exp_().sum()
    if slopes:
        projections.copy_(slope)
