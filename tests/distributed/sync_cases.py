"""Synchronised layers on four ranks, and what is compiled on two."""

import copy
import itertools
import math
import time
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_compiler, min_cut_rematerialization_partition
from ranks import EXACT, SEED, case
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normnorm
from normnorm import backends, reference, sync
from normnorm.noise import draw_seed, standard_normals
from normnorm.sync import sync_batch_normal_norm

# Shards of the batch: unequal, an empty one, one of a single sample.
SIZES = {2: (5, 3), 4: (3, 5, 0, 1)}


def shard(rank, ranks, whole):
    return whole.split(SIZES[ranks])[rank].detach().clone()


def skewed(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=torch.float64).exp().to(dtype)


def whole_noise(ranks, shape, seed=SEED, channels_last=False, dtype=torch.float64):
    """The ranks' noise, each of its own stream, as that of one batch."""
    if isinstance(seed, int):
        seed = torch.tensor([seed])
    return torch.cat(
        [
            standard_normals((size, *shape[1:]), seed, rank, channels_last and size > 0, dtype)
            for rank, size in enumerate(SIZES[ranks])
        ]
    )


def served_backends():
    """The backends that can run here on CPU tensors."""
    found = [name for name, reason in normnorm.available_backends().items() if reason is None]
    return [name for name in found if backends.get(name).device_type in (None, "cpu")]


# Equal to one process


def agree(rank, ranks, shape, affine, noise, channels_last=False, **keywords):
    size = sum(SIZES[ranks])
    whole = skewed(size, *shape).requires_grad_()
    upstream = torch.randn(size, *shape, dtype=torch.float64)
    parameters = [torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(2)]
    weight, bias = (p.requires_grad_() if affine else None for p in parameters)
    given = [p for p in (weight, bias) if p is not None]
    z = whole_noise(ranks, (size, *shape), channels_last=channels_last)
    expected, _ = reference.normal_norm(
        whole, weight, bias, kind="batch", noise_train=noise, z=z, **keywords
    )
    gradients = torch.autograd.grad(expected, [whole, *given], upstream)

    local = shard(rank, ranks, whole)
    if channels_last:
        local = local.to(memory_format=torch.channels_last)
    local.requires_grad_()
    output = sync_batch_normal_norm(
        local, None, None, None, weight, bias, noise_train=noise, seed=SEED, **keywords
    )
    found = torch.autograd.grad(output, [local, *given], shard(rank, ranks, upstream))
    for gradient in found[1:]:
        dist.all_reduce(gradient)
    assert_close(output, shard(rank, ranks, expected), **EXACT)
    assert_close(found[0], shard(rank, ranks, gradients[0]), **EXACT)
    for one, other in zip(found[1:], gradients[1:], strict=True):
        assert_close(one, other, **EXACT)
    if local.numel() > 0:
        assert output.stride() == found[0].stride() == local.stride()


@case(4)
def outputs_and_gradients_equal_one_process(rank, ranks):
    agree(rank, ranks, (3, 4, 2), False, 0.4)
    agree(rank, ranks, (3, 4, 2), True, 0.4, channels_last=True)
    agree(rank, ranks, (4,), True, 0.4)
    agree(rank, ranks, (2, 3), True, 0.4, order=1)
    agree(rank, ranks, (2, 3, 2, 2), True, 0.0, transform_eps=math.sqrt(1e-5))
    agree(rank, ranks, (3, 2, 2), True, 0.4, alpha=0.0)
    agree(rank, ranks, (3, 2, 2), True, 0.4, eps=0.1, alpha=0.7)
    for name in served_backends():
        with normnorm.use_backend(name):
            agree(rank, ranks, (3, 4, 2), True, 0.4)
    with (
        mock.patch("normnorm.distributed.statistics._CHUNK", 40),  # pieces of the channels
        normnorm.use_backend("reference"),
    ):
        agree(rank, ranks, (7, 4, 2), True, 0.4)


# Shapes (channels, positions...) and whether they are channels_last: runs that the kernels gather,
# runs in pieces, columns, a matrix, and strides that no layout has.
LAYOUTS = {
    "short runs": ((5, 3, 7), False),
    "long runs": ((3, 45, 60), False),
    "columns": ((37, 23, 11), True),
    "matrix": ((19,), False),
    "transposed": ((3, 4, 30), False),
}
# residual, activation, noise_train
FUSED = ((False, None, 0.4), (True, "relu", 0.4), (True, None, 0.0))


def results_on(backend, tensors, upstream, activation, noise):
    """Output and gradients of ``tensors``: input, weight, bias and perhaps a residual."""
    input, weight, bias, residual = (*tensors, None)[:4]
    with normnorm.use_backend(backend):
        output = sync_batch_normal_norm(
            input, None, None, None, weight, bias, noise_train=noise, seed=SEED,
            residual=residual, activation=activation,
        )  # fmt: skip
    return output, *torch.autograd.grad(output, tensors, upstream.to(output.dtype))


@case(4)
def every_backend_equals_the_definition_in_float64(rank, ranks):
    dtypes = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
    for layout, dtype, fused in itertools.product(LAYOUTS, dtypes, FUSED):
        shape, last = LAYOUTS[layout]
        size = (SIZES[ranks][rank], *shape)
        local, residual, upstream = (skewed(*size, dtype=dtype) - 1 for _ in range(3))
        if layout == "transposed":
            local = local.mT.contiguous().mT
        elif last:
            local = local.to(memory_format=torch.channels_last)
        parameters = [torch.rand(shape[0]) + 0.5 for _ in range(2)]
        given = [local, *parameters, residual][: 3 + fused[0]]
        exact = [t.double().requires_grad_() for t in given]
        expected = results_on("reference", exact, upstream, *fused[1:])
        for name in served_backends():
            found = results_on(name, [t.requires_grad_() for t in given], upstream, *fused[1:])
            for one, other in zip(found, expected, strict=True):
                assert one.stride() == torch.empty_like(other).stride()
                rounding = dtypes[one.dtype]
                largest = other.abs().max().item() if other.numel() else 0.0
                assert_close(
                    one.double(), other, rtol=1.01 * rounding, atol=2.0**-16 * largest,
                    msg=lambda text, what=(name, layout, dtype, fused): f"{what}: {text}",
                )  # fmt: skip


@case(4)
def norm_residual_and_activation_equal_one_process(rank, ranks):
    for options in ({}, {"act_layer": nn.SiLU}, {"apply_act": False}):
        for with_residual in (True, False):
            alone = normnorm.BatchNormalNormAct2d(
                3, noise_train=0.0, dtype=torch.float64, **options
            )
            layer = normnorm.convert_sync(copy.deepcopy(alone))
            whole, residual, upstream = (skewed(sum(SIZES[ranks]), 3, 4, 2) - 1 for _ in range(3))
            given = [t.requires_grad_() for t in (whole, residual)[: 1 + with_residual]]
            expected = alone(*given)
            gradients = torch.autograd.grad(expected, given, upstream)
            local = [shard(rank, ranks, t).requires_grad_() for t in given]
            output = layer(*local)
            found = torch.autograd.grad(output, local, shard(rank, ranks, upstream))
            assert_close(output, shard(rank, ranks, expected), **EXACT)
            for one, other in zip(found, gradients, strict=True):
                assert_close(one, shard(rank, ranks, other), **EXACT)
            for name, buffer in alone.named_buffers():
                assert_close(layer.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


@case(4)
def second_derivatives_equal_one_process(rank, ranks):
    size, shape = sum(SIZES[ranks]), (2, 3)
    whole = skewed(size, *shape).requires_grad_()
    weight = torch.rand(2, dtype=torch.float64).requires_grad_()
    z = whole_noise(ranks, (size, *shape))

    def first(output, input):
        return torch.autograd.grad(output.sin().sum(), input, create_graph=True)[0]

    def second(gradient, input):
        return torch.autograd.grad(gradient.square().sum(), (input, weight))

    expected, _ = reference.normal_norm(whole, weight, kind="batch", noise_train=0.4, z=z)
    wanted = second(first(expected, whole), whole)
    local = shard(rank, ranks, whole).requires_grad_()
    output = sync_batch_normal_norm(local, None, None, None, weight, noise_train=0.4, seed=SEED)
    found = second(first(output, local), local)
    dist.all_reduce(found[1])
    assert_close(found[0], shard(rank, ranks, wanted[0]), **EXACT)
    assert_close(found[1], wanted[1], **EXACT)


# Numerics


@case(4)
def large_offsets_and_shards_far_apart_keep_their_digits(rank, ranks):
    values = skewed(sum(SIZES[ranks]), 3, 50)
    far = torch.repeat_interleave(torch.arange(ranks) * 1e4, torch.tensor(SIZES[ranks]))
    for offset, bound in ((1e4, None), (far.reshape(-1, 1, 1), 1e-5)):
        whole = (values + offset).float()
        truth, _ = reference.normal_norm(whole.double(), kind="batch")
        if bound is None:
            alone, _ = reference.normal_norm(whole, kind="batch")
            bound = 4 * (alone.double() - truth).abs().max().item() + 1e-6
        local = shard(rank, ranks, whole)
        output = sync_batch_normal_norm(local, None, None, None, noise_train=0.0)
        assert_close(output.double(), shard(rank, ranks, truth), rtol=0.0, atol=bound)


@case(4)
def constant_channels_give_exact_zeros(rank, ranks):
    for dtype in (torch.float32, torch.float64):
        local = torch.full((SIZES[ranks][rank], 2, 5), 0.1, dtype=dtype)
        lmbda = torch.full((2,), 3.0, dtype=dtype)
        running = (torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), lmbda)
        output = sync_batch_normal_norm(local, *running, momentum=1.0)
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(lmbda, torch.ones_like(lmbda))


@case(4)
def a_nan_stays_in_its_channel_on_every_rank(rank, ranks):
    local = skewed(SIZES[ranks][rank], 3, 4)
    if rank == 0:
        local[0, 1, 0] = math.nan
    output = sync_batch_normal_norm(local, None, None, None, seed=SEED)
    assert output[:, 1].isnan().all()
    assert output[:, ::2].isfinite().all()


# Running statistics


@case(4)
def running_statistics_are_those_of_the_whole_batch(rank, ranks):
    for momentum in (0.3, None):
        alone = normnorm.BatchNormalNorm2d(3, momentum=momentum, dtype=torch.float64)
        layer = normnorm.SyncBatchNormalNorm(3, momentum=momentum, dtype=torch.float64)
        for _ in range(3):
            whole = skewed(sum(SIZES[ranks]), 3, 4, 2)
            alone(whole)
            layer(shard(rank, ranks, whole))
        for name, buffer in alone.named_buffers():
            assert_close(layer.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)
        assert_the_same_on_every_rank(layer.buffers())


def assert_the_same_on_every_rank(tensors):
    for tensor in tensors:
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(tensor, first)


@case(4)
def a_batch_without_elements_moves_nothing(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    output = layer(torch.randn(0, 3, 4, requires_grad=True))
    output.sum().backward()
    assert output.shape == (0, 3, 4)
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert torch.equal(layer.running_lmbda, torch.ones(3))


# Messages


@contextmanager
def counted():
    """The sizes of the messages sent meanwhile."""
    sent: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def counting(name):
        def send(*arguments, **keywords):
            sent.append((name, arguments[-1].numel()))
            return originals[name](*arguments, **keywords)

        return send

    with mock.patch.multiple(dist, **{name: counting(name) for name in originals}):
        yield sent


@case(4)
def messages_are_few_and_small(rank, ranks):
    local = skewed(4, 3, 5).requires_grad_()
    for noise, rounds in ((0.4, [3, 3]), (0.0, [])):
        layer = normnorm.SyncBatchNormalNorm(3, noise_train=noise, dtype=torch.float64)
        with counted() as sent:
            output = layer(local)
        gather, *reduces = sent
        assert gather == ("all_gather", 1 + 3 * 3)
        assert reduces == [("all_reduce", size) for size in (4 * 3, *rounds)]
        with counted() as sent:
            output.sum().backward()
        assert sent == [("all_reduce", 5 * 3)]


@case(4)
def nothing_is_sent_without_need(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    output = layer(torch.randn(4, 3, 5))
    groups = [dist.new_group([one]) for one in range(ranks)]
    alone = normnorm.SyncBatchNormalNorm(3, process_group=groups[rank])
    with counted() as sent:
        output.sum().backward()  # no gradient of the input
        alone(torch.randn(4, 3, 5))
    assert sent == []
    assert layer.weight.grad is not None
    for track in (True, False):
        layer = normnorm.SyncBatchNormalNorm(3, track_running_stats=track)
        alone = normnorm.BatchNormalNorm2d(3, track_running_stats=track).eval()
        layer(torch.randn(4, 3, 5, 5))
        alone.load_state_dict(layer.state_dict())
        layer.eval()
        local = torch.randn(4 + rank, 3, 5, 5)
        with counted() as sent:
            output = layer(local)
        assert sent == []
        assert torch.equal(output, alone(local))


@case(4)
def a_process_group_keeps_to_itself(rank, ranks):
    half = ranks // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, ranks)))]
    mine = int(rank >= half)
    whole = skewed(2, half, 4, 3, 5)  # (groups, ranks of a group, batch, channels, positions)
    layer = normnorm.SyncBatchNormalNorm(3, process_group=groups[mine], dtype=torch.float64)
    torch.manual_seed(SEED)
    output = layer(whole[mine, rank % half])
    torch.manual_seed(SEED)
    seed = draw_seed(whole.device)
    # The noise's stream is the rank among all, not within the group.
    z = [standard_normals((4, 3, 5), seed, mine * half + one) for one in range(half)]
    expected, _ = reference.normal_norm(
        whole[mine].flatten(0, 1), kind="batch", noise_train=0.4, z=torch.cat(z)
    )
    assert_close(output, expected.unflatten(0, (half, 4))[rank % half], **EXACT)


# Errors


@case(4)
def one_value_per_channel_over_all_ranks_is_refused_by_all(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(int(rank == 0), 3))
    for name, buffer in layer.state_dict().items():
        assert torch.equal(buffer, before[name])


@case(4)
def bad_arguments_are_refused_before_anything_is_sent(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    with counted() as sent:
        for input in (torch.randn(3), torch.randn(4, 2, 5), torch.ones(4, 3, 5).long(), "x"):
            with pytest.raises((ValueError, TypeError)):
                layer(input)
        layer.noise_train = -1.0
        with pytest.raises(ValueError, match="noise_train"):
            layer(torch.randn(4, 3, 5))
        layer.noise_train, tracked = 0.4, layer.num_batches_tracked
        layer.num_batches_tracked = tracked.float()
        with pytest.raises(TypeError, match="num_batches_tracked must be one int64"):
            layer(torch.randn(4, 3, 5))
        layer.num_batches_tracked = tracked
        fused = normnorm.sync.SyncBatchNormalNormAct2d(3)
        residuals = (torch.randn(4, 3, 1, 5), torch.ones(4, 3, 5, 5).long(), "x")
        for residual in residuals:
            with pytest.raises((ValueError, TypeError), match="residual"):
                fused(torch.randn(4, 3, 5, 5), residual)
    assert sent == []
    assert layer.num_batches_tracked == fused.num_batches_tracked == 0


@case(4)
def function_transforms_are_refused(rank, ranks):
    def loss(x):
        return sync_batch_normal_norm(x, None, None, None).sum()

    for transformed in (torch.func.grad(loss), torch.vmap(loss, randomness="same")):
        with pytest.raises(RuntimeError, match="BatchNormalNorm"):
            transformed(torch.randn(2, 4, 3))


# Training


class Net(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False, dtype=dtype),
            normnorm.BatchNormalNorm2d(4, dtype=dtype),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, dtype=dtype),
            normnorm.BatchNormalNorm2d(3, dtype=dtype),
        )
        self.head = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def train(model, batches, weight):
    torch.manual_seed(SEED)  # of the noise
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for input, target in batches:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target, reduction="sum") * weight
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def made_batches(ranks, dtype=torch.float64):
    size = sum(SIZES[ranks])
    return [(skewed(size, 2, 7, 7, dtype=dtype), torch.randint(2, (size,))) for _ in range(3)]


def train_shards(model, batches, rank, ranks):
    """DDP and FSDP divide the sum of gradients by the number of ranks."""
    shards = [tuple(shard(rank, ranks, tensor) for tensor in batch) for batch in batches]
    return train(model, shards, ranks / sum(SIZES[ranks]))


def fresh(dtype=torch.float64):
    torch.manual_seed(3)
    return normnorm.convert_sync(Net(dtype))


def trained_alone(ranks, batches):
    """The state of one process that trained on the whole batches with the noise of the ranks."""

    def by_rank(shape, seed, stream, channels_last, dtype):
        return whole_noise(ranks, shape, seed, channels_last, dtype)

    torch.manual_seed(3)
    net = Net()
    with (
        normnorm.use_backend("reference"),
        mock.patch("normnorm.reference.standard_normals", by_rank),
    ):
        train(net, batches, 1.0 / sum(SIZES[ranks]))
    return net.state_dict()


def assert_state(found, expected):
    for name, tensor in expected.items():
        assert_close(
            found[name], tensor, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )


@case(4)
def ddp_training_with_noise_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    model = DistributedDataParallel(fresh())
    train_shards(model, batches, rank, ranks)
    assert_state(model.module.state_dict(), trained_alone(ranks, batches))
    assert_the_same_on_every_rank(model.module.state_dict().values())


@case(2)
def training_compiled_around_ddp_with_noise_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    model = fresh()
    compiled = torch.compile(DistributedDataParallel(model), backend="aot_eager")
    train_shards(compiled, batches, rank, ranks)
    assert_state(model.state_dict(), trained_alone(ranks, batches))


@case(4)
def fsdp2_training_with_noise_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    model = fresh()
    for layer in model.body:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    train_shards(model, batches, rank, ranks)
    found = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    assert_state({**found, **dict(model.named_buffers())}, trained_alone(ranks, batches))


@case(4)
def fsdp2_with_bfloat16_parameters_keeps_float32_statistics(rank, ranks):
    model = fresh(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mp_policy=policy)
    losses = train_shards(model, made_batches(ranks, torch.float32), rank, ranks)
    assert all(loss.isfinite() for loss in losses)
    norms = [m for m in model.modules() if isinstance(m, normnorm.SyncBatchNormalNorm)]
    assert len(norms) == 2
    for norm in norms:
        assert norm.running_var.dtype == torch.float32
        assert norm.num_batches_tracked == 3
        assert norm.running_lmbda.isfinite().all()


# Compiled


@case(2)
def compiled_layers_send_the_same_messages_from_one_graph(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3, dtype=torch.float64)
    if not sync.COMPILES:
        with pytest.raises(Exception, match=r"needs torch 2\.13"):
            torch.compile(layer, backend="aot_eager", fullgraph=True)(skewed(4, 3, 5))
        return
    targets: list[list[str]] = []

    def keep(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        targets.append([name for name in names if "all_reduce" in name or "all_gather" in name])
        return graph.forward

    eager = copy.deepcopy(layer)
    compiler = aot_autograd(
        fw_compiler=make_boxed_compiler(keep),
        partition_fn=min_cut_rematerialization_partition,  # inductor's
    )
    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for number in range(3):
        local = skewed(4 + rank, 3, 5)
        both = [local.clone().requires_grad_() for _ in range(2)]
        outputs = []
        for function, input in zip((compiled, eager), both, strict=True):
            torch.manual_seed(number)
            outputs.append(function(input))
            outputs[-1].sin().sum().backward()
        assert_close(outputs[0], outputs[1], **EXACT)
        assert_close(both[0].grad, both[1].grad, **EXACT)
        assert_close(layer.weight.grad, eager.weight.grad, **EXACT)
        for name, buffer in eager.named_buffers():
            assert_close(layer.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)
    assert [len(names) for names in targets] == [4, 1], targets
    assert "all_gather" in targets[0][0]


# A rank that fails, and those that wait for it


@case(2)
def a_failing_rank_hangs_nobody_beyond_the_time_out(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    layer.process_group = dist.new_group(timeout=timedelta(seconds=2))
    began = time.monotonic()
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out|closed"):
            layer(torch.randn(4, 3, 5))
    else:  # it raises before it sends anything
        with pytest.raises(ValueError, match="expected an input of 3 channels"):
            layer(torch.randn(4, 4, 5))
    assert time.monotonic() - began < 60
