"""torch's own operator samples (its OpInfo tables), through our functions on every backend.

Without transform and noise each function must equal torch's in double precision; with both, each
backend must equal the definition there. ``test_modules.py`` does the same with torch's module
inputs.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.nn import functional as torch_functional
from torch.testing import assert_close

import normnorm
from normnorm import functional

# Importing torch's test tables forbids plain assignments to torch.backends.*, for the whole
# process: other tests are not to notice.
_FLAG = "__allow_nonbracketed_mutation_flag"
_allowed = getattr(torch.backends, _FLAG, True)
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

setattr(torch.backends, _FLAG, _allowed)

OFF = {"alpha": 0.0, "noise_train": 0.0}
OURS = {
    "batch_norm": functional.batch_normal_norm,
    "layer_norm": functional.layer_normal_norm,
    "group_norm": functional.group_normal_norm,
    "instance_norm": functional.instance_normal_norm,
}
INFOS = {
    name: next(i for i in op_db if i.name == f"nn.functional.{name}" and i.dtypes) for name in OURS
}


@functools.cache
def samples(name, dtype, device):
    """Each sample's arguments by the names of torch's function."""
    torch.manual_seed(0)
    signature = inspect.signature(getattr(torch_functional, name))
    return [
        signature.bind(sample.input, *sample.args, **sample.kwargs).arguments
        for sample in INFOS[name].sample_inputs(device, dtype, requires_grad=False)
    ]


def arguments_of(name, index, dtype, device, exact=False):
    """A sample's arguments, in double precision where they are to be ``exact``, with leaves
    that require grad."""

    def leaf(key, value):
        if not isinstance(value, Tensor):
            return value
        value = value.to(torch.float64 if exact else dtype, copy=True)
        return value if key.startswith("running") else value.requires_grad_()

    return {key: leaf(key, value) for key, value in samples(name, dtype, device)[index].items()}


def for_ours(name, arguments, **settings):
    """The same arguments for our function: a lambda of 1 beside running statistics."""
    ours = {**arguments, **settings}
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
    """(output, gradients of the leaves, running statistics)."""
    output = function(**arguments)
    leaves = [a for a in arguments.values() if isinstance(a, Tensor) and a.requires_grad]
    upstream = torch.linspace(-1.0, 2.0, max(output.numel(), 1)).to(output)
    upstream = upstream[: output.numel()].reshape(output.shape)
    gradients = torch.autograd.grad(output, leaves, upstream, allow_unused=True)
    running = [arguments.get(key) for key in ("running_mean", "running_var")]
    return output.detach(), gradients, [r for r in running if r is not None]


def refusal(name, arguments):
    """The words with which ours refuses what torch's function takes; None where it does not."""
    if arguments.get("eps", 1e-5) <= 0:
        return "eps must be positive"
    if name == "batch_norm" and arguments["input"].dim() < 2:
        return "wants an input of shape"
    return None


CASES = [
    pytest.param(name, index, id=f"{name}-{index}")
    for name in OURS
    for index, _ in enumerate(samples(name, torch.float64, "cpu"))
]


def is_refused(case):
    name, index = case.values
    return refusal(name, samples(name, torch.float64, "cpu")[index]) is not None


TAKEN = [case for case in CASES if not is_refused(case)]
each_taken = pytest.mark.parametrize(("name", "index"), TAKEN)
each_dtype = pytest.mark.parametrize(
    "dtype",
    [
        torch.float64,
        torch.float32,
        torch.bfloat16,
        pytest.param(torch.float16, marks=pytest.mark.slow),
    ],
    ids=str,
)


def assert_agree(found, expected, unit):
    """Outputs, gradients and running statistics, to ``unit`` of the largest value of each."""
    for one, other in zip(
        (found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2]), strict=True
    ):
        assert (one is None) == (other is None)
        if other is not None:
            scale = max([1.0, *other.abs().flatten().tolist()])
            assert_close(one.double(), other, rtol=0, atol=unit * scale, equal_nan=True)


def test_torch_has_samples_for_each_function():
    counts = Counter(case.values[0] for case in TAKEN)
    assert counts.keys() == OURS.keys()
    assert all(count >= 5 for count in counts.values())
    refused = Counter(case.values[0] for case in CASES if is_refused(case))
    # Negative eps, and inputs without a channel dimension.
    assert refused == {"group_norm": 4, "layer_norm": 1, "batch_norm": 2}


@each_dtype
@each_taken
def test_equals_torchs_function_without_transform_and_noise(name, index, dtype, backend, device):
    exact = arguments_of(name, index, dtype, device, exact=True)
    expected = run(getattr(torch_functional, name), exact)
    ours = for_ours(name, arguments_of(name, index, dtype, device), **OFF)
    found = run(OURS[name], ours)
    assert found[0].dtype == dtype
    assert found[0].shape == expected[0].shape
    # An input's gradient is a difference of terms up to rstd times larger, in torch's as in ours.
    assert_agree(found, expected, 64 * torch.finfo(dtype).eps)


@each_dtype
@each_taken
def test_every_backend_is_the_definition_with_transform_and_noise(
    name, index, dtype, backend, device
):
    settings = {"noise_train": 0.5, "seed": 11}
    found = run(OURS[name], for_ours(name, arguments_of(name, index, dtype, device), **settings))
    exact = for_ours(name, arguments_of(name, index, dtype, device, exact=True), **settings)
    with normnorm.use_backend("reference"):
        expected = run(OURS[name], exact)
    assert found[0].dtype == dtype
    # Lambda amplifies the rounding of the arithmetic's own dtype by up to eps ** -1/2, about 300.
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    unit = torch.finfo(dtype).eps + 300 * torch.finfo(arithmetic).eps
    assert_agree(found, expected, 8 * unit)


@pytest.mark.parametrize(("name", "index"), [case for case in CASES if is_refused(case)])
def test_what_we_refuse_of_torchs_samples_is_refused_in_a_sentence(name, index, backend, device):
    arguments = arguments_of(name, index, torch.float32, device)
    with pytest.raises(ValueError, match=refusal(name, arguments)):
        OURS[name](**for_ours(name, arguments))


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
