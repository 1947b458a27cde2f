"""The CUDA backend from layer to kernel, without a GPU: its ops on CPU tensors.

``csrc/binding/cuda.cpp`` and the kernels are built by g++ (``host_cuda/torch_library.py``), so what
is tested here is the code that serves a GPU: argument checks, the choice of a walk, copies,
workspaces, statistics, running statistics, gradients. What the kernels compute is tested rung by
rung in ``test_cuda_host.py``; here the ladder chooses.
"""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from host_cuda import torch_library
from layer_table import LAYERS, NAMES
from oracle import CASES, DTYPES, draw, draw_parameters

import normnorm
from normnorm import selfcheck

pytestmark = pytest.mark.skipif(
    torch_library.missing() is not None, reason=str(torch_library.missing())
)
OPS = torch.ops.normnorm
NONE = (None, None, None)
DEEP = tuple(case for case in CASES if len(case.shape) > 3)
LAYER_LAST = tuple(case for case in DEEP if case.kind != "layer")


@pytest.fixture(autouse=True)
def host_run() -> Iterator[None]:
    with torch_library.served_by_host_run():
        yield


@pytest.fixture
def cuda() -> Iterator[None]:
    with normnorm.use_backend("cuda"):
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_name)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# --- layers ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda c: f"{c.layer}-{c.mode}")
def test_layers_in_training_and_evaluation_agree_with_the_definition(case, dtype):
    errors = selfcheck.worst_errors(case, "cuda", dtype, "cpu")
    assert max(errors.values()) <= selfcheck.bound(dtype), errors


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_modules_give_what_they_give_on_the_reference(row):
    results = {}
    for name in ("reference", "cuda"):
        with normnorm.use_backend(name):
            torch.manual_seed(3)
            layer = row.make(dtype=torch.float64)
            x = row.input().requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            state = [t.clone() for t in layer.state_dict().values()]
            gradients = [p.grad for p in (x, *layer.parameters())]
            results[name] = (y, layer.eval()(x), *gradients, *state)
    torch.testing.assert_close(results["cuda"], results["reference"], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_in_both_memory_formats_is_within_the_oracles_bounds(case, dtype):
    weight, bias = draw_parameters(case, 1, dtype)
    for last in (False, True)[: 1 + (len(case.shape) > 3)]:
        x = draw(case, "lognormal", 1, dtype)
        x = channels_last(x) if last else x
        y, du = oracle.check(case, x, weight, bias, seed=5, noise_train=0.7, channels_last=last)
        assert y.stride() == du.stride() == torch.empty_like(x).stride()
        oracle.check(case, x, weight, bias, seed=5)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_parameter_without_the_other(case):
    weight, bias = draw_parameters(case, 1, torch.float32)
    x = draw(case, "exponential", 1, torch.float32)
    for parameters in ((weight, None), (None, bias), (None, None)):
        oracle.check(case, x, *parameters, seed=5, noise_train=0.7)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_half_inputs_with_parameters_in_float32(case, dtype):
    weight, bias = draw_parameters(case, 1, torch.float32)
    oracle.check(case, draw(case, "relu", 1, dtype), weight, bias, seed=5, noise_train=0.7)
