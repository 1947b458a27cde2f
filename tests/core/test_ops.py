"""The registered ops keep their promises to the dispatcher and to compilers.

Schemas and tags; torch's own opcheck; results in the strides that shape inference announces, for
inputs of any strides; functional ops that neither change nor alias their arguments.
"""

import itertools

import pytest
import raw_ops
import test_numerics
import torch
from layer_table import KINDS
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.testing import assert_close
from torch.utils._pytree import tree_map_only

from normnorm import functional
from normnorm.ops import SCHEMAS
from normnorm.statistics import statistics_dtype

each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
OPS = torch.ops.normnorm


LAYOUTS = {
    **test_numerics.LAYOUTS,
    "expanded positions": lambda x: x[..., :1].expand(x.shape),
    "one sample": lambda x: x[:1],
}


def forward_arguments(
    row, backend, *, dtype=torch.float32, layout=lambda x: x, noise=0.0, alpha=1.0,
    frozen=False, affine=True, requires_grad=False, keep_stats=True, residual=False,
    prenorm=False, activation="",
):  # fmt: skip
    input = layout(row.input(dtype)).requires_grad_(requires_grad)
    weight = bias = None
    if affine:
        weight = torch.linspace(0.3, 1.2, torch.Size(row.parameter_shape).numel(), dtype=dtype)
        weight = weight.reshape(row.parameter_shape).requires_grad_(requires_grad)
        bias = (weight.detach() - 1.0).requires_grad_(requires_grad)
    running = raw_ops.NONE
    if frozen:
        ramp = torch.linspace(0.5, 1.4, row.shape[1], dtype=statistics_dtype(dtype))
        running = (ramp - 0.8, ramp, 2.0 - ramp)
    seed = torch.tensor([12345]) if noise else None
    added = input.detach().cos().requires_grad_(requires_grad) if residual or prenorm else None
    config = row.config(backend, noise_train=noise, alpha=alpha, stream=3, activation=activation)
    return raw_ops.forward(
        config, input, weight, bias, running=running, seed=seed, keep_stats=keep_stats,
        residual=added, prenorm=prenorm,
    )  # fmt: skip


def backward_arguments(row, backend, **keywords):
    arguments = forward_arguments(row, backend, **keywords)
    input, running_mean, _, _, weight, bias, _, seed, _, prenorm, _, *config = arguments
    output, stats, total = OPS.normal_norm_forward(*arguments)
    upstream = torch.linspace(-1.0, 2.0, input.numel()).reshape(input.shape).to(input.dtype)
    needs = (True, weight is not None, bias is not None)
    frozen = running_mean is not None
    return raw_ops.backward(
        config, upstream, total.detach() if prenorm else input, stats, weight, bias, seed=seed,
        needs=needs, frozen=frozen, output=output.detach() if keywords.get("activation") else None,
        grad_sum=upstream.cos() if prenorm else None,
    )  # fmt: skip


def fold_arguments(backend, momentum=0.1, dtype=torch.float32, counter=True):
    stats = torch.linspace(0.5, 1.5, 8 * 6).reshape(8, -1)
    running = [torch.linspace(0.2, 0.9, 3, dtype=dtype) + i for i in range(3)]
    return (stats, *running, torch.tensor(3) if counter else None, momentum, 10, 1e-5, backend)


# Schemas


def test_ops_have_the_tag_of_compilable_ops_and_the_fold_alone_changes_its_arguments():
    for name in SCHEMAS:
        op = getattr(OPS, name).default
        assert torch.Tag.pt2_compliant_tag in op.tags
        written = [a.name for a in op._schema.arguments if a.alias_info and a.alias_info.is_write]
        running = ["running_mean", "running_var", "running_lmbda", "num_batches_tracked"]
        assert written == (running if name == "fold_running_" else [])


# torch's opcheck

NOISY = {"dtype": torch.float64, "noise": 0.4, "requires_grad": True}
PLAIN = {"noise": 0.4, "affine": False, "requires_grad": True}
HALF = {"dtype": torch.bfloat16, "requires_grad": True}
WITHOUT_STATISTICS = {"dtype": torch.float16, "noise": 0.4, "keep_stats": False}
FROZEN = {"frozen": True, "requires_grad": True}
FUSED = (
    {"residual": True, "activation": "relu", "requires_grad": True},
    {"prenorm": True, "activation": "relu", "noise": 0.4, "requires_grad": True},
)


@pytest.mark.parametrize(
    ("row", "options"),
    [
        *itertools.product(KINDS, (NOISY, WITHOUT_STATISTICS)),
        *((KINDS[0], options) for options in (PLAIN, HALF, FROZEN, HALF | PLAIN | FROZEN)),
        *((KINDS[1], options) for options in FUSED),
    ],
)
def test_forward_op_passes_opcheck(row, options, backend):
    opcheck(OPS.normal_norm_forward.default, forward_arguments(row, backend, **options))


@pytest.mark.parametrize(
    ("row", "options"),
    [
        *((row, NOISY) for row in KINDS),
        *((KINDS[0], options) for options in (PLAIN, HALF)),
        *((KINDS[1], options) for options in FUSED),
    ],
)
def test_backward_op_passes_opcheck_and_is_differentiable(row, options, backend):
    op = OPS.normal_norm_backward.default
    opcheck(op, backward_arguments(row, backend, **{**options, "requires_grad": False}))
    differentiated = backward_arguments(row, backend, **options)
    opcheck(op, differentiated, test_utils="test_autograd_registration")


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16, "momentum": None}, {"counter": False}],
    ids=["default", "cumulative", "no counter"],
)
def test_fold_op_passes_opcheck(options, backend):
    opcheck(OPS.fold_running_.default, fold_arguments(backend, **options))


# Results


def assert_as_announced(op, arguments, results):
    """Shape, stride, dtype and device are those of the fake kernel's results."""
    with FakeTensorMode() as mode:
        fakes = op(*tree_map_only(torch.Tensor, mode.from_tensor, arguments))
    for result, fake in zip(results, fakes, strict=True):
        for attribute in ("shape", "dtype", "device"):
            assert getattr(result, attribute) == getattr(fake, attribute)
        assert result.stride() == fake.stride()


@each_kind
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_results_have_the_strides_announced_and_memory_of_their_own(row, layout, backend):
    noisy = {"layout": layout, "dtype": torch.bfloat16, "noise": 0.4}
    identity = {"layout": layout, "alpha": 0.0, "affine": False}  # the output is a new tensor too
    for op, arguments, input in (
        (OPS.normal_norm_forward, forward_arguments(row, backend, **noisy), 0),
        (OPS.normal_norm_forward, forward_arguments(row, backend, **identity), 0),
        (OPS.normal_norm_backward, backward_arguments(row, backend, **noisy), 1),
    ):
        tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
        before = [tensor.clone() for tensor in tensors]
        results = op(*arguments)
        assert_as_announced(op, arguments, results)
        assert results[0].stride() == torch.empty_like(arguments[input]).stride()
        for tensor, then in zip(tensors, before, strict=True):
            assert torch.equal(tensor, then)
        owned = [result.untyped_storage().data_ptr() for result in results if result.numel()]
        assert len(set(owned)) == len(owned)
        assert {tensor.untyped_storage().data_ptr() for tensor in tensors}.isdisjoint(owned)


@pytest.mark.parametrize("frozen", [False, True], ids=["own", "frozen"])
def test_backward_op_gives_what_is_asked_for_and_empty_tensors_elsewhere(frozen, backend):
    noise = 0.0 if frozen else 0.4
    arguments = list(backward_arguments(KINDS[0], backend, frozen=frozen, noise=noise))
    everything = OPS.normal_norm_backward(*arguments)
    for needs in itertools.product((True, False), repeat=3):
        arguments[8:11] = needs
        results = OPS.normal_norm_backward(*arguments)
        assert_as_announced(OPS.normal_norm_backward, tuple(arguments), results)
        for result, needed, wanted in zip(results, needs, everything, strict=True):
            if needed:
                assert_close(result, wanted, rtol=1e-6, atol=1e-6)
            else:
                assert result.shape == (0,)


@each_kind
def test_statistics_are_kept_only_where_asked(row, backend):
    for frozen in (False, True) if row.kind == "batch" else (False,):
        keywords = {"dtype": torch.float64, "frozen": frozen, "noise": 0.0 if frozen else 0.4}
        output = OPS.normal_norm_forward(*forward_arguments(row, backend, **keywords))[0]
        alone = OPS.normal_norm_forward(
            *forward_arguments(row, backend, keep_stats=False, **keywords)
        )
        assert torch.equal(alone[0], output)
        assert [result.numel() for result in alone[1:]] == [0, 0]


# One step of eager mode


def step(input, buffers, momentum=0.1, **keywords):
    return functional.batch_normal_norm(
        input, *buffers[:3], training=True, momentum=momentum, num_batches_tracked=buffers[3],
        noise_train=0.4, **keywords,
    )  # fmt: skip


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_step_has_the_seed_of_randint_and_updates_the_statistics_as_the_fold_does(
    momentum, backend
):
    row = KINDS[0]
    config = row.config(backend, noise_train=0.4)
    input, channels = row.input(torch.float32), row.shape[1]
    torch.manual_seed(11)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))
    after = torch.get_rng_state()
    buffers = [torch.full((channels,), 0.5 + i) for i in range(3)] + [torch.tensor(2)]
    separate = [buffer.clone() for buffer in buffers]
    wanted, stats, _ = OPS.normal_norm_forward(*raw_ops.forward(config, input, seed=seed))
    count = input.numel() // channels
    OPS.fold_running_(stats, *separate, momentum, count, 1e-5, backend)
    versions = [buffer._version for buffer in buffers]
    torch.manual_seed(11)
    output = step(input, buffers, momentum)
    assert torch.equal(torch.get_rng_state(), after)
    assert torch.equal(output, wanted)
    for found, other in zip(buffers, separate, strict=True):
        assert torch.equal(found, other)
    assert all(b._version > v for b, v in zip(buffers, versions, strict=True))


@pytest.mark.parametrize("wrong", ["weight", "buffer"])
def test_a_refused_step_changes_no_buffer_and_a_compiled_one_draws_no_seed(wrong, backend):
    row = KINDS[0]
    channels = row.shape[1]
    buffers = [torch.full((channels,), 0.5) for _ in range(3)] + [torch.tensor(2)]
    weight = torch.ones(channels + 1) if wrong == "weight" else None
    if wrong == "buffer":
        buffers[2] = buffers[2].to(torch.int64)
    before = [buffer.clone() for buffer in buffers]
    state = torch.get_rng_state()
    with pytest.raises((TypeError, ValueError), match=r"weight|running_lmbda"):
        step(row.input(torch.float32), buffers, weight=weight)
    for found, other in zip(buffers, before, strict=True):
        assert torch.equal(found, other)
    assert backend != "cpu" or torch.equal(torch.get_rng_state(), state)
