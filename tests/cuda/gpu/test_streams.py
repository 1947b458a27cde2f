"""Two streams at the same time give the results of one."""

import pytest
import torch
from oracle import Case
from raw_ops import both_passes

from .cases import CASES, assert_same, make

LARGE = {
    "batch-2d": Case("batch", (64, 16, 56, 56)),
    "layer-long": Case("layer", (2, 4_000_000), normalized_ndim=1),
}


@pytest.mark.parametrize("names", [("batch-2d", "layer-long"), ("layer", "batch-2d"),
                                   ("batch-nc", "batch-nc")])  # fmt: skip
def test_two_streams_give_what_one_gives(rig, backend, names):
    cases = [rig.pick(LARGE.get(name, CASES[name][0]), CASES[name][1]) for name in names]
    given = [(case, make(rig, case)) for case in cases]
    alone = [both_passes(backend, *each, noise_train=0.7) for each in given]
    rig.synchronize()
    streams = [rig.stream() for _ in given]
    found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in given]
    for _ in range(rig.pick(20, 1)):
        for each, stream, results in zip(given, streams, found, strict=True):
            with stream:
                results.append(both_passes(backend, *each, noise_train=0.7))
    rig.synchronize()
    for want, results in zip(alone, found, strict=True):
        for turn, got in enumerate(results):
            assert_same(want, got, f"turn {turn + 1} beside another stream")
