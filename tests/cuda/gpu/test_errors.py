"""Bad calls raise a sentence, change no tensor, and leave the device usable. The tests of bad input
in tests/core have every argument, on the CPU."""

import re

import pytest
import torch

import normnorm
from normnorm import backends
from normnorm import functional as F

from .conftest import DRY


def _batch(rig, **changed):
    d = rig.device
    arguments = {
        "input": torch.randn(4, 6, 5, 5, device=d), "running_mean": torch.zeros(6, device=d),
        "running_var": torch.ones(6, device=d), "running_lmbda": torch.ones(6, device=d),
        "weight": torch.ones(6, device=d), "bias": torch.zeros(6, device=d), "training": True,
        "num_batches_tracked": torch.tensor(0, device=d),
    }  # fmt: skip
    arguments.update(changed)
    return arguments


# In a dry run the other device is meta, whose tensors have no values to compare.
ELSEWHERE = ("weight", "bias", "seed", *(() if DRY else ("running_mean", "num_batches_tracked")))


def _assert_refused_and_unchanged(arguments) -> None:
    buffers = ("running_mean", "running_var", "running_lmbda", "num_batches_tracked")
    before = {name: arguments[name].clone() for name in buffers}
    with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
        F.batch_normal_norm(**arguments)
    text = str(raised.value)
    assert re.search(r"[a-z]{3}.* ", text), f"not a sentence: {text!r}"
    assert "CUDA error" not in text
    for name, value in before.items():
        assert torch.equal(arguments[name], value), f"{name} was changed"


@pytest.mark.parametrize("shape", [(5,), (6, 1)])
def test_a_weight_of_another_shape_is_refused(rig, backend, shape):
    _assert_refused_and_unchanged(_batch(rig, weight=torch.ones(shape, device=rig.device)))


@pytest.mark.parametrize("what", ELSEWHERE)
def test_a_tensor_on_another_device_is_refused(rig, backend, what):
    other = rig.pick("cpu", "meta")
    arguments = _batch(rig, seed=torch.tensor([1], device=rig.device))
    arguments[what] = arguments[what].to(other)
    _assert_refused_and_unchanged(arguments)


def test_a_backend_refuses_tensors_of_another_device(rig, backend):
    other = rig.pick("cpu", "cuda")
    with pytest.raises(RuntimeError, match=f"serves {rig.device.type} tensors"):
        backends.resolve(torch.device(other), backend)
    if not rig.dry:
        with pytest.raises(RuntimeError, match="serves cuda tensors"):
            normnorm.LayerNormalNorm(8)(torch.randn(3, 8))
        with pytest.raises(RuntimeError, match="serves cpu tensors"), normnorm.use_backend("cpu"):
            normnorm.LayerNormalNorm(8, device=rig.device)(torch.randn(3, 8, device=rig.device))


def test_the_device_is_usable_afterwards(rig, backend):
    y = F.batch_normal_norm(**_batch(rig))
    rig.synchronize()
    assert y.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 6, 5, 5), (4, 6, 0, 5)])
def test_empty_inputs(rig, backend, shape):
    x = torch.empty(shape, device=rig.device, requires_grad=True)
    y = F.batch_normal_norm(**_batch(rig, input=x))
    y.sum().backward()
    assert y.shape == x.shape == x.grad.shape
