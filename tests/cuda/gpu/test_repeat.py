"""Repeated calls give the same bits."""

from __future__ import annotations

import pytest
import torch

from .cases import assert_same, case_named, make

REPEATS = 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("name", ["batch-2d", "batch-nc", "layer", "layer-long", "group"])
def test_results_repeat_bitwise(rig, backend, name, last, dtype):
    case = case_named(name)
    if last and len(case.gpu) != 4:
        last = False
        dtype = torch.float16 if dtype == torch.bfloat16 else torch.float64  # another pair
    call = make(rig, case, dtype, channels_last=last, noise_train=1.0)
    first = call.results()
    for repeat in range(rig.pick(REPEATS, 2)):
        assert_same(first, call.results(), f"repeat {repeat + 2}")
