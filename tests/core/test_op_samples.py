"""torch's own operator samples (its OpInfo tables), through our functions on every backend: without
transform and noise each function equals torch's. ``test_modules.py`` does the same with torch's
module inputs."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.testing import assert_close

from normnorm import functional

# Importing torch's test tables forbids plain assignments to torch.backends.* in the whole process;
# this is undone for other tests.
_FLAG = "__allow_nonbracketed_mutation_flag"
_allowed = getattr(torch.backends, _FLAG, True)
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

setattr(torch.backends, _FLAG, _allowed)

OURS = {
    "batch_norm": functional.batch_normal_norm,
    "layer_norm": functional.layer_normal_norm,
    "group_norm": functional.group_normal_norm,
    "instance_norm": functional.instance_normal_norm,
}
INFOS = {
    name: next(i for i in op_db if i.name == f"nn.functional.{name}" and i.dtypes) for name in OURS
}


def samples(name):
    """Each sample's arguments in double precision, by the names of torch's function."""
    torch.manual_seed(0)
    signature = inspect.signature(getattr(torch_functional, name))
    return [
        signature.bind(sample.input, *sample.args, **sample.kwargs).arguments
        for sample in INFOS[name].sample_inputs("cpu", torch.float64, requires_grad=False)
    ]


def refusal(name, arguments):
    """The words with which ours refuses what torch's function accepts; None if it accepts it."""
    if arguments.get("eps", 1e-5) <= 0:
        return "eps must be positive"
    if name == "batch_norm" and arguments["input"].dim() < 2:
        return "wants an input of shape"
    return None


CASES = [
    pytest.param(name, arguments, id=f"{name}-{index}")
    for name in OURS
    for index, arguments in enumerate(samples(name))
]
REFUSED = [case for case in CASES if refusal(*case.values) is not None]
TAKEN = [case for case in CASES if refusal(*case.values) is None]


def placed(arguments, device):
    """Copies on the device; all but the running statistics are leaves that require grad."""
    return {
        key: value.to(device, copy=True).requires_grad_(not key.startswith("running"))
        if isinstance(value, Tensor)
        else value
        for key, value in arguments.items()
    }


def for_ours(name, arguments):
    """The same arguments for our function, with a lambda of 1 beside running statistics."""
    ours = {**arguments, "alpha": 0.0, "noise_train": 0.0}
    if name in ("layer_norm", "group_norm"):
        ours["training"] = True
    if name == "instance_norm":
        ours["training"] = ours.get("use_input_stats", True)
    if ours.get("running_mean") is not None:
        ours["running_lmbda"] = torch.ones_like(ours["running_mean"])
    elif name == "batch_norm":
        ours["running_lmbda"] = None
    return ours


def run(function, arguments):
    """[output, gradients of the leaves, running statistics]."""
    output = function(**arguments)
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    upstream = torch.linspace(-1.0, 2.0, max(output.numel(), 1)).to(output)
    upstream = upstream[: output.numel()].reshape(output.shape)
    gradients = torch.autograd.grad(output, leaves, upstream)
    running = [arguments.get(key) for key in ("running_mean", "running_var")]
    return [output.detach(), *gradients, *(r for r in running if r is not None)]


def test_torch_has_samples_for_each_function():
    counts = Counter(case.values[0] for case in TAKEN)
    assert counts.keys() == OURS.keys()
    assert all(count >= 5 for count in counts.values())
    # eps that is not positive, and inputs without a channel dimension
    refused = Counter(case.values[0] for case in REFUSED)
    assert refused == {"group_norm": 4, "layer_norm": 1, "batch_norm": 2}


@pytest.mark.parametrize(("name", "arguments"), TAKEN)
def test_equals_torchs_function_without_transform_and_noise(name, arguments, backend, device):
    expected = run(getattr(torch_functional, name), placed(arguments, device))
    found = run(OURS[name], for_ours(name, placed(arguments, device)))
    for mine, theirs in zip(found, expected, strict=True):
        # The gradient of the input is a difference of terms up to rstd times larger.
        scale = max([1.0, *theirs.abs().flatten().tolist()])
        bound = 64 * torch.finfo(torch.float64).eps * scale
        assert_close(mine, theirs, rtol=0, atol=bound, equal_nan=True)


@pytest.mark.parametrize(("name", "arguments"), REFUSED)
def test_what_only_torch_accepts_is_refused_in_a_sentence(name, arguments, backend, device):
    with pytest.raises(ValueError, match=refusal(name, arguments)):
        OURS[name](**for_ours(name, placed(arguments, device)))


@pytest.mark.parametrize("name", [name for name in OURS if INFOS[name].error_inputs_func])
def test_torchs_error_samples_raise_ours_too(name, backend, device):
    errors = list(INFOS[name].error_inputs(device))
    assert errors
    for error in errors:
        sample = error.sample_input
        with pytest.raises((RuntimeError, ValueError)):
            getattr(torch_functional, name)(sample.input, *sample.args, **sample.kwargs)
        with pytest.raises(ValueError):
            OURS[name](sample.input, *sample.args, **sample.kwargs)
