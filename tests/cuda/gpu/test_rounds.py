"""Synchronised layers over the shards of a batch, whose kernels run a round at a time, against the
reference in float64."""

import pytest
import torch
from oracle import Case
from shards import sharded_passes
from tiers import DTYPES, FUSIONS

from .cases import CASES, assert_same, compare, make

# One shape in every dtype, the others each in one.
FORMATS = [
    pytest.param(name, last, dtype, id=f"{name}{'-last' if last else ''}-{str(dtype)[6:]}")
    for i, (name, (case, _)) in enumerate(CASES.items())
    for last in ((False, True) if len(case.shape) > 2 else (False,))
    for dtype in (DTYPES if name == "batch-2d" else DTYPES[(i + 2 * last) % 4 :][:1])
    if case.kind == "batch"
]
LARGE = Case("batch", (64, 16, 112, 112)), Case("batch", (5, 3, 9, 9))
NOISE = {"noise_train": 0.7}


def check(rig, backend, case, t, sizes, fused=(), last=False, **options):
    got = sharded_passes(backend, case, t, sizes, fused, last, **options)
    compare(rig, case, t, fused, last, got, **options)
    return got


@pytest.mark.parametrize(("name", "last", "dtype"), FORMATS)
def test_rounds(rig, backend, name, last, dtype):
    case = rig.pick(*CASES[name])
    t, size = make(rig, case, dtype, last), case.shape[0]
    for fused in ((), FUSIONS[0]):
        check(rig, backend, case, t, [size], fused, last, **NOISE)
        check(rig, backend, case, t, [size // 3, 0, size - size // 3], fused, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("last", [False, True], ids=["rows", "columns"])
def test_rounds_repeat_bitwise(rig, backend, last, dtype):
    case = rig.pick(*LARGE)
    t = make(rig, case, dtype, last)
    first = check(rig, backend, case, t, [case.shape[0]], FUSIONS[0], last, **NOISE)
    again = sharded_passes(backend, case, t, [case.shape[0]], FUSIONS[0], last, **NOISE)
    assert_same(first, again, "the same again")


def test_rounds_copy_nothing_to_the_host(rig, backend):
    """They are captured in one graph with the operations between the messages."""
    case = rig.pick(*CASES["batch-2d"])
    t = make(rig, case)

    def step():
        return sharded_passes(backend, case, t, [case.shape[0]], **NOISE)

    replay = rig.capture(step)
    for turn in range(2):
        t["x"].mul_(1 + turn)
        graph = tuple(result.clone() for result in replay())
        assert_same(graph, step(), f"replay {turn + 1} and eager mode")
