"""What tests/distributed/test_sync.py lets every rank of a process group do.

Each case is a function of (rank, ranks); all ranks call the cases in the same order. What a case
finds wrong it raises, after its last message, so that no rank waits for another.
"""

from __future__ import annotations

import copy
import itertools
import math
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_compiler, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import normnorm
from normnorm import backends, reference, sync
from normnorm.noise import standard_normals
from normnorm.sync import sync_batch_normal_norm

CASES: dict[str, Callable[[int, int], None]] = {}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
# Shards of the batch: unequal, an empty one, one of a single sample.
SIZES = {2: (5, 3), 4: (3, 5, 0, 1)}
SEED = 11


def case(function):
    CASES[function.__name__] = function
    return function


def run(rank: int, ranks: int, folder: str, names: tuple[str, ...], timeout: int = 120) -> None:
    """A spawned process: every case, and what came of it in ``folder``."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=timeout),
    )  # fmt: skip
    found: dict[str, str | None] = {}
    for name in names:
        torch.manual_seed(SEED)
        torch._dynamo.reset()
        try:
            globals()[name](rank, ranks)
            found[name] = None
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def shard(rank: int, ranks: int, whole: torch.Tensor, sizes: tuple[int, ...] | None = None):
    sizes = sizes or SIZES[ranks]
    return whole.split(sizes)[rank].detach().clone()


def skewed(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).exp().to(dtype)


def whole_noise(ranks: int, shape: tuple[int, ...], channels_last: bool = False) -> torch.Tensor:
    """The ranks' noise, each of its own stream, as that of one batch."""
    seed = torch.tensor([SEED])
    return torch.cat(
        [
            standard_normals((size, *shape[1:]), seed, rank, channels_last and size > 0)
            for rank, size in enumerate(SIZES[ranks])
        ]
    )


# Equal to one process


def agree(rank, ranks, shape, affine, noise, channels_last=False, **keywords):
    size = sum(SIZES[ranks])
    whole = skewed(size, *shape).requires_grad_()
    upstream = torch.randn(size, *shape, dtype=torch.float64)
    parameters = [torch.rand(shape[0], dtype=torch.float64) + 0.5 for _ in range(2)]
    weight, bias = (p.requires_grad_() if affine else None for p in parameters)
    given = [p for p in (weight, bias) if p is not None]
    z = whole_noise(ranks, (size, *shape), channels_last)
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


@case
def outputs_and_gradients_equal_one_process(rank, ranks):
    for affine, noise in itertools.product((True, False), (0.0, 0.4)):
        agree(rank, ranks, (3, 4, 2), affine, noise)


@case
def every_rank_of_input_and_option_equals_one_process(rank, ranks):
    agree(rank, ranks, (4,), True, 0.4)
    agree(rank, ranks, (2, 3), True, 0.4, order=1)
    agree(rank, ranks, (2, 3, 2, 2), True, 0.0, transform_eps=math.sqrt(1e-5))
    agree(rank, ranks, (3, 2, 2), True, 0.4, alpha=0.0)
    agree(rank, ranks, (3, 2, 2), True, 0.4, eps=0.1, alpha=0.7)


@case
def channels_last_equals_one_process(rank, ranks):
    agree(rank, ranks, (3, 4, 2), True, 0.4, channels_last=True)


@case
def every_backend_gives_the_gradients_of_one_process(rank, ranks):
    for name, reason in normnorm.available_backends().items():
        if reason is None and backends.get(name).device_type in (None, "cpu"):
            with normnorm.use_backend(name):
                agree(rank, ranks, (3, 4, 2), True, 0.4)


@case
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


@case
def an_activation_with_a_hook_is_called_behind_the_messages(rank, ranks):
    alone = normnorm.BatchNormalNormAct2d(3, noise_train=0.0, dtype=torch.float64)
    layer = copy.deepcopy(alone)
    seen = []
    layer.act.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    whole = skewed(sum(SIZES[ranks]), 3, 4, 2)
    output = normnorm.convert_sync(layer)(shard(rank, ranks, whole))
    assert_close(output, shard(rank, ranks, alone(whole)), **EXACT)
    assert seen[0] is output


@case
def passes_over_pieces_of_the_channels_give_the_same(rank, ranks):
    with mock.patch("normnorm.distributed.statistics._CHUNK", 40):
        agree(rank, ranks, (7, 4, 2), True, 0.4)


@case
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


@case
def half_precision_input_gives_what_one_process_gives(rank, ranks):
    for dtype in (torch.bfloat16, torch.float16):
        size = sum(SIZES[ranks])
        whole = skewed(size, 3, 4, dtype=dtype).requires_grad_()
        weight = (torch.rand(3) + 0.5).requires_grad_()
        layer = normnorm.BatchNormalNorm1d(3, noise_train=0)
        layer.weight = nn.Parameter(weight.detach().clone())
        expected = layer(whole)
        (gradient,) = torch.autograd.grad(expected.float().sin().sum(), whole)
        local = shard(rank, ranks, whole).requires_grad_()
        output = sync_batch_normal_norm(
            local, None, None, None, weight, layer.bias.detach(), noise_train=0.0
        )
        (found,) = torch.autograd.grad(output.float().sin().sum(), local)
        assert output.dtype == found.dtype == dtype
        ulp = torch.finfo(dtype).eps
        assert_close(output, shard(rank, ranks, expected), rtol=ulp, atol=ulp / 8)
        assert_close(found, shard(rank, ranks, gradient), rtol=2 * ulp, atol=ulp)


# Numerics


@case
def large_offsets_cost_no_more_digits_than_in_one_process(rank, ranks):
    size = sum(SIZES[ranks])
    whole = (skewed(size, 3, 50) + 1e4).float()
    truth, _ = reference.normal_norm(whole.double(), kind="batch")
    alone, _ = reference.normal_norm(whole, kind="batch")
    output = sync_batch_normal_norm(shard(rank, ranks, whole), None, None, None, noise_train=0.0)
    bound = 4 * (alone.double() - truth).abs().max() + 1e-6
    error = (output.double() - shard(rank, ranks, truth)).abs()
    assert error.numel() == 0 or error.max() < bound, (error.max(), bound)


@case
def shards_far_apart_keep_their_digits(rank, ranks):
    size = sum(SIZES[ranks])
    far = torch.repeat_interleave(torch.arange(ranks) * 1e4, torch.tensor(SIZES[ranks]))
    whole = (skewed(size, 3, 50) + far.reshape(-1, 1, 1)).float()
    truth, _ = reference.normal_norm(whole.double(), kind="batch")
    output = sync_batch_normal_norm(shard(rank, ranks, whole), None, None, None, noise_train=0.0)
    assert_close(output.double(), shard(rank, ranks, truth), rtol=1e-5, atol=1e-5)


@case
def constant_channels_give_exact_zeros(rank, ranks):
    for dtype in (torch.float32, torch.float64):
        local = torch.full((SIZES[ranks][rank], 2, 5), 0.1, dtype=dtype)
        lmbda = torch.full((2,), 3.0, dtype=dtype)
        running = (torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype), lmbda)
        output = sync_batch_normal_norm(local, *running, momentum=1.0)
        assert torch.equal(output, torch.zeros_like(output))
        assert torch.equal(lmbda, torch.ones_like(lmbda))


@case
def a_nan_stays_in_its_channel_on_every_rank(rank, ranks):
    local = skewed(SIZES[ranks][rank], 3, 4)
    if rank == 0:
        local[0, 1, 0] = math.nan
    output = sync_batch_normal_norm(local, None, None, None, seed=SEED)
    assert output[:, 1].isnan().all()
    assert output[:, ::2].isfinite().all()


# Running statistics


@case
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


@case
def running_statistics_are_the_same_bits_on_every_rank(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    for _ in range(3):
        layer(torch.randn(SIZES[ranks][rank], 3, 4) + rank)
    for buffer in layer.buffers():
        first = buffer.clone()
        dist.broadcast(first, 0)
        assert torch.equal(buffer, first)


@case
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


@case
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


@case
def an_input_without_gradient_needs_no_message_in_the_backward_pass(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    output = layer(torch.randn(4, 3, 5))
    with counted() as sent:
        output.sum().backward()
    assert sent == []
    assert layer.weight.grad is not None


@case
def evaluation_sends_nothing(rank, ranks):
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


@case
def a_group_of_one_sends_nothing(rank, ranks):
    groups = [dist.new_group([one]) for one in range(ranks)]
    layer = normnorm.SyncBatchNormalNorm(3, process_group=groups[rank])
    with counted() as sent:
        layer(torch.randn(4, 3, 5))
    assert sent == []


@case
def a_process_group_keeps_to_itself(rank, ranks):
    half = ranks // 2
    groups = [dist.new_group(list(range(half))), dist.new_group(list(range(half, ranks)))]
    mine = int(rank >= half)
    whole = skewed(2, half, 4, 3, 5)  # (groups, ranks of a group, batch, channels, positions)
    layer = normnorm.SyncBatchNormalNorm(
        3, process_group=groups[mine], noise_train=0.0, dtype=torch.float64
    )
    output = layer(whole[mine, rank % half])
    expected, _ = reference.normal_norm(whole[mine].flatten(0, 1), kind="batch")
    assert_close(output, expected.unflatten(0, (half, 4))[rank % half], **EXACT)


# Noise


@case
def ranks_with_one_seed_have_noise_of_their_own(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    torch.manual_seed(1)
    local = torch.randn(4, 3, 50)  # the same on all ranks
    outputs = [torch.empty_like(local) for _ in range(ranks)]
    dist.all_gather(outputs, layer(local).detach())
    for one, other in itertools.combinations(outputs, 2):
        noise = torch.stack([(one - one.mean()).flatten(), (one - other).flatten()])
        assert noise[1].abs().mean() > 0.1


@case
def the_seed_repeats_the_noise(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    local = torch.randn(4, 3, 5)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(layer(local))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


# Errors


@case
def one_value_per_channel_over_all_ranks_is_refused_by_all(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(torch.randn(int(rank == 0), 3))
    for name, buffer in layer.state_dict().items():
        assert torch.equal(buffer, before[name])


@case
def bad_arguments_are_refused_before_anything_is_sent(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    with counted() as sent:
        for input in (torch.randn(3), torch.randn(4, 2, 5), torch.ones(4, 3, 5).long(), "x"):
            with pytest.raises((ValueError, TypeError)):
                layer(input)
        layer.noise_train = -1.0
        with pytest.raises(ValueError, match="noise_train"):
            layer(torch.randn(4, 3, 5))
        fused = normnorm.sync.SyncBatchNormalNormAct2d(3)
        residuals = (torch.randn(4, 3, 1, 5), torch.ones(4, 3, 5, 5).long(), "x")
        for residual in residuals:
            with pytest.raises((ValueError, TypeError), match="residual"):
                fused(torch.randn(4, 3, 5, 5), residual)
    assert sent == []
    assert layer.num_batches_tracked == fused.num_batches_tracked == 0


@case
def function_transforms_are_refused(rank, ranks):
    def loss(x):
        return sync_batch_normal_norm(x, None, None, None).sum()

    for transformed in (torch.func.grad(loss), torch.vmap(loss, randomness="same")):
        with pytest.raises(RuntimeError, match="BatchNormalNorm"):
            transformed(torch.randn(2, 4, 3))


# Training


class Net(nn.Module):
    def __init__(self, noise: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False, dtype=dtype),
            normnorm.BatchNormalNorm2d(4, noise_train=noise, dtype=dtype),
            nn.ReLU(),
            nn.Conv2d(4, 3, 3, dtype=dtype),
            normnorm.BatchNormalNorm2d(3, noise_train=noise, dtype=dtype),
        )
        self.head = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def train(model, batches, weight=1.0, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for input, target in batches[:steps]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(input), target, reduction="sum") * weight
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def made_batches(ranks, dtype=torch.float64, steps=3):
    size = sum(SIZES[ranks])
    return [(skewed(size, 2, 7, 7, dtype=dtype), torch.randint(2, (size,))) for _ in range(steps)]


def shards_of(batches, rank, ranks):
    return [tuple(shard(rank, ranks, t) for t in batch) for batch in batches]


def trained_alone(ranks, batches):
    torch.manual_seed(3)
    net = Net()
    train(net, batches, 1.0 / sum(SIZES[ranks]))
    return net


def fresh(noise=0.0, dtype=torch.float64):
    torch.manual_seed(3)
    return normnorm.convert_sync(Net(noise, dtype))


@case
def ddp_training_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    alone = trained_alone(ranks, batches)
    model = DistributedDataParallel(fresh())
    # DDP divides the sum of gradients by the number of ranks.
    train(model, shards_of(batches, rank, ranks), ranks / sum(SIZES[ranks]))
    for (name, one), other in zip(
        model.module.state_dict().items(), alone.state_dict().values(), strict=True
    ):
        assert_close(one, other, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@case
def compiled_training_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    alone = trained_alone(ranks, batches)

    def compiled_within(model):
        return DistributedDataParallel(torch.compile(model, backend="aot_eager", fullgraph=True))

    def compiled_around(model):
        return torch.compile(DistributedDataParallel(model), backend="aot_eager")

    for wrap in (compiled_within, compiled_around):
        model = fresh()
        if wrap is compiled_within and not sync.COMPILES:
            local = shards_of(batches, rank, ranks)[0][0]
            with pytest.raises(Exception, match=r"needs torch 2\.13"):
                torch.compile(model, backend="aot_eager", fullgraph=True)(local)
            continue
        train(wrap(model), shards_of(batches, rank, ranks), ranks / sum(SIZES[ranks]))
        for one, other in zip(
            model.state_dict().values(), alone.state_dict().values(), strict=True
        ):
            assert_close(one, other, rtol=1e-9, atol=1e-10)


@case
def ddp_training_with_noise_keeps_the_ranks_together(rank, ranks):
    model = DistributedDataParallel(fresh(0.4))
    losses = train(model, shards_of(made_batches(ranks, steps=4), rank, ranks), steps=4)
    assert all(loss.isfinite() for loss in losses)
    for tensor in (*model.parameters(), *model.buffers()):
        first = tensor.detach().clone()
        dist.broadcast(first, 0)
        assert torch.equal(tensor, first)


@case
def fsdp2_training_equals_one_process(rank, ranks):
    batches = made_batches(ranks)
    alone = trained_alone(ranks, batches)
    model = fresh()
    for layer in model.body:
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)
    train(model, shards_of(batches, rank, ranks), ranks / sum(SIZES[ranks]))
    state = alone.state_dict()
    for name, parameter in model.named_parameters():
        assert_close(parameter.full_tensor(), state[name], rtol=1e-9, atol=1e-10)
    for name, buffer in model.named_buffers():
        assert_close(buffer, state[name], rtol=1e-9, atol=1e-10)


@case
def fsdp2_with_bfloat16_parameters_keeps_float32_statistics(rank, ranks):
    for noise in (0.0, 0.4):
        model = fresh(noise, torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fully_shard(model, mp_policy=policy)
        losses = train(model, shards_of(made_batches(ranks, torch.float32), rank, ranks))
        assert all(loss.isfinite() for loss in losses)
        norms = [m for m in model.modules() if isinstance(m, normnorm.SyncBatchNormalNorm)]
        assert len(norms) == 2
        for norm in norms:
            assert norm.running_var.dtype == torch.float32
            assert norm.num_batches_tracked == 3
            assert norm.running_lmbda.isfinite().all()


# Compiled


@case
def compiled_layers_send_the_same_messages_from_one_graph(rank, ranks):
    targets: list[list[str]] = []

    def keep(graph, _):
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        targets.append([name for name in names if "all_reduce" in name or "all_gather" in name])
        return graph.forward

    if not sync.COMPILES:
        return  # refused, as compiled_training_equals_one_process sees
    layer = normnorm.SyncBatchNormalNorm(3, dtype=torch.float64)
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


# Not a case: a rank that fails and ranks that wait for it


def one_rank_fails(rank, ranks):
    layer = normnorm.SyncBatchNormalNorm(3)
    # One channel too many on the last rank: it raises before it sends anything.
    layer(torch.randn(4, 3 + (rank == ranks - 1), 5))
