"""Two streams at the same time give the results of one."""

from __future__ import annotations

import pytest
import torch

from .cases import SEED, assert_same, case_named, make


@pytest.mark.parametrize("names", [("batch-2d", "layer-long"), ("layer", "batch-2d"),
                                   ("batch-nc", "batch-nc")])  # fmt: skip
def test_two_streams_give_what_one_gives(rig, backend, names):
    shapes = {"batch-2d": (64, 16, 56, 56), "layer-long": (2, 4_000_000)}
    calls = [
        make(
            rig, case_named(name), torch.float32, noise_train=0.7,
            shape=rig.pick(shapes.get(name), None),
        )
        for name in names
    ]  # fmt: skip
    for call in calls:
        call.options["seed"] = torch.tensor([SEED], device=rig.device)  # so that no call waits
    alone = [call.results() for call in calls]
    rig.synchronize()
    streams = [rig.stream() for _ in calls]
    found: list[list[dict[str, torch.Tensor]]] = [[] for _ in calls]
    for _ in range(rig.pick(20, 1)):
        for call, stream, results in zip(calls, streams, found, strict=True):
            with stream:
                results.append(call.results())
    rig.synchronize()
    for want, results in zip(alone, found, strict=True):
        for turn, got in enumerate(results):
            assert_same(want, got, f"turn {turn + 1} beside another stream")
