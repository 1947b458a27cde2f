"""The Triton kernel of the projected error function: interpreted, and compiled ahead of time."""

import math
import re
from pathlib import Path

import pytest
import test_per
import torch
from cuda_static import sass
from test_triton_static import absent, cubin_of
from triton_tools.interpreter import interpreted, missing

import normnorm
from normnorm import per

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.mark.parametrize("shape", [(0, 3), (1,), (50, 211), (64, 256)])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 3e-7), (torch.float64, 1e-15)])
@interpreted
def test_a_block_is_added_up_and_replaced_by_its_slopes(shape, dtype, bound):
    t = torch.randn(shape, dtype=dtype)
    before = t.clone()
    with normnorm.use_backend("triton"):
        test_per.test_a_block_is_added_up_and_replaced_by_its_slopes(shape, dtype, bound, "triton")
        per.projected_error_of(t.device)(t, torch.zeros(64, dtype=torch.float64), False)
    assert torch.equal(t, before)


@interpreted
def test_the_loss_and_its_gradients_run_through_it():
    with normnorm.use_backend("triton"):
        activations = torch.randn(700, 33, dtype=torch.float64, requires_grad=True)
        found = normnorm.per_loss(activations, 100, test_per._generator())
        (gradient,) = torch.autograd.grad(found, activations)
        expected = per._definition(activations, test_per._directions(100, 33))
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)
        (wanted,) = torch.autograd.grad(expected, activations)
        torch.testing.assert_close(gradient, wanted, rtol=1e-11, atol=1e-16)
        test_per.test_first_and_second_gradients_are_right("triton")
        activations.data[5, 5] = math.nan
        assert normnorm.per_loss(activations, 100).isnan()


@pytest.mark.parametrize("mistake", test_per.REFUSED)
@interpreted
def test_bad_blocks_are_refused(mistake):
    from normnorm.triton_kernels.projected import projected_error_

    test_per.test_bad_blocks_are_refused(mistake, projected_error_)


def compiled(target: str, dtype: torch.dtype, slopes: bool):
    """The binary of the launch for a block of 2^22 projections or nearly as many."""
    from triton_tools import ahead

    from normnorm.triton_kernels.projected import projected_error_

    t, sums = torch.empty(2**22 - 256, dtype=dtype), torch.empty(1024, dtype=torch.float64)
    (found,) = ahead.compiled(target, lambda: projected_error_(t, sums, slopes))
    assert found.grid == (1024,)
    return found


@pytest.mark.skipif(absent() is not None, reason=str(absent()))
@pytest.mark.parametrize("slopes", [True, False], ids=["slopes", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100"))]
)
def test_the_binary_has_no_stack_and_moves_whole_vectors(
    target: str, dtype: torch.dtype, slopes: bool, tmp_path: Path
):
    path = cubin_of(compiled(target, dtype, slopes), tmp_path)
    (usage,) = sass.resources(path).values()
    (code,) = sass.instructions(path).values()
    assert usage["STACK"] == usage["LOCAL"] == 0
    assert not [i for i in code if re.match(r"(LDL|STL)\b", i)]
    assert any(re.match(r"LDG\.E\S*\.128\b", i) for i in code)
    assert any(re.match(r"STG\.E\S*\.128\b", i) for i in code) == slopes
    assert not [i for i in code if re.match(r"(ATOM|RED)\b", i)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_binary_of_an_amd_gpu_has_no_scratch_memory(dtype: torch.dtype):
    code = compiled("gfx942", dtype, True).asm["amdgcn"]
    assert set(re.findall(r"; ScratchSize: (\d+)", code)) == {"0"}
