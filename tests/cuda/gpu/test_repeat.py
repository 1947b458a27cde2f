"""Repeated calls give the same bits."""

import pytest
import torch
from raw_ops import both_passes

from .cases import CASES, assert_same, make

FORMATS = [
    *((name, last, dtype) for name in ("batch-2d", "group") for last in (False, True)
      for dtype in (torch.float32, torch.bfloat16)),
    *((name, False, dtype) for name in ("batch-nc", "layer", "layer-long")
      for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "last", "dtype"), FORMATS, ids=str)
def test_results_repeat_bitwise(rig, backend, name, last, dtype):
    case = rig.pick(*CASES[name])
    t = make(rig, case, dtype, last)
    first = both_passes(backend, case, t, (), last, noise_train=1.0)
    for repeat in range(rig.pick(20, 2)):
        again = both_passes(backend, case, t, (), last, noise_train=1.0)
        assert_same(first, again, f"repeat {repeat + 2}")
