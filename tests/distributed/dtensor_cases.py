"""Layers over the shards of a DTensor, on two ranks: functions of (rank, mesh), in float64."""

import copy
import functools

import pytest
import ranks
import torch
import torch.distributed as dist
from ranks import EXACT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import SequenceParallel, parallelize_module
from torch.testing import assert_close

import normnorm
from normnorm import functional as F

RANKS = 2


def case(function):
    @ranks.case(RANKS)
    @functools.wraps(function)
    def on_a_mesh(rank, ranks):
        torch.set_default_dtype(torch.float64)
        try:
            function(rank, init_device_mesh("cpu", (ranks,)))
        finally:
            torch.set_default_dtype(torch.float32)

    return on_a_mesh


def check_against_one_process(layer, mesh, shape, placement, residual=False):
    """Output, gradients and buffers of the layer over shards: those of the layer over the whole."""
    for parameter in layer.parameters():
        nn.init.uniform_(parameter)
    whole, over_shards = layer, distribute_module(copy.deepcopy(layer), mesh)
    inputs = [torch.randn(shape).exp() for _ in range(1 + residual)]
    plain = [x.clone().requires_grad_() for x in inputs]
    cut = [distribute_tensor(x, mesh, [placement]).requires_grad_() for x in inputs]
    wanted = whole(*plain)
    found = over_shards(*cut)
    wanted, found = (y if isinstance(y, tuple) else (y,) for y in (wanted, found))
    for y, of_one in zip(found, wanted, strict=True):
        assert y.placements == (placement,)
        assert y.shape == of_one.shape
        assert_close(y.full_tensor(), of_one, **EXACT)
    sum((y.sin() * (i + 1)).sum() for i, y in enumerate(wanted)).backward()
    sum((y.sin() * (i + 1)).sum() for i, y in enumerate(found)).backward()
    for x, of_one in zip(cut, plain, strict=True):
        assert_close(x.grad.full_tensor(), of_one.grad, **EXACT)
    for name, parameter in whole.named_parameters():
        grad = over_shards.get_parameter(name).grad
        assert_close(grad.full_tensor(), parameter.grad, **EXACT)
    for name, buffer in whole.named_buffers():
        assert_close(over_shards.get_buffer(name).full_tensor(), buffer, **EXACT)


@case
def sequence_parallel_equals_one_process(rank, mesh):
    for backend, compiled in (("auto", False), ("reference", False), ("auto", True)):
        layer = normnorm.LayerNormalNorm(8, noise_train=0)
        x = torch.randn(2, 5, 8)  # 3 and 2 tokens
        wanted, plain = layer(x), copy.deepcopy(layer)
        plain(x).sin().sum().backward()
        net = nn.Sequential(layer)
        parallelize_module(net, mesh, {"0": SequenceParallel()})
        function = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
        with normnorm.use_backend(backend):
            found = function(distribute_tensor(x, mesh, [Shard(1)]))
            assert_close(found.full_tensor(), wanted, **EXACT)
            found.sin().sum().backward()
        assert_close(layer.weight.grad.full_tensor(), plain.weight.grad, **EXACT)


@case
def groups_that_are_whole_on_a_rank_equal_one_process(rank, mesh):
    batch, group = normnorm.BatchNormalNorm2d, normnorm.GroupNormalNorm
    instance = normnorm.InstanceNormalNorm2d
    images = (5, 8, 3, 2)
    for layer, shape, placements in (
        (instance(8, affine=True, noise_train=0), images, (Shard(0), Shard(1))),
        (group(4, 8, noise_train=0), images, (Shard(0), Shard(1))),
        (group(2, 8, noise_train=0), (1, 8, 3), (Shard(0),)),  # one rank has nothing
        (batch(7, noise_train=0, track_running_stats=False), (5, 7, 3, 2), (Shard(1),)),
        (batch(8, noise_train=0), images, (Replicate(),)),
        (batch(8).eval(), images, (Shard(0), Shard(1), Shard(2))),
    ):
        for placement in placements:
            check_against_one_process(copy.deepcopy(layer), mesh, shape, placement)
    act = normnorm.BatchNormalNormAct2d(8, noise_train=0, track_running_stats=False)
    check_against_one_process(act, mesh, images, Shard(1), residual=True)
    stream = normnorm.AddLayerNormalNorm(8, noise_train=0)
    check_against_one_process(stream, mesh, (2, 5, 8), Shard(1), residual=True)


@case
def a_synchronised_layer_takes_statistics_over_the_shards(rank, mesh):
    # torch 2.10 cannot compile the update of any buffer that is a DTensor ("Sharding propagation
    # failed for aten.copy_").
    updates_compile = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    for compiled in (False, True) if updates_compile else (False,):
        plain = normnorm.BatchNormalNorm2d(3, noise_train=0)
        over_shards = distribute_module(normnorm.convert_sync(copy.deepcopy(plain)), mesh)
        x = torch.randn(5, 3, 2, 2)
        cut = distribute_tensor(x, mesh, [Shard(0)]).requires_grad_()
        function = over_shards
        if compiled:
            function = torch.compile(over_shards, backend="aot_eager", fullgraph=True)
        found, wanted = function(cut), plain(x.requires_grad_())
        assert_close(found.full_tensor(), wanted, **EXACT)
        found.sin().sum().backward()
        wanted.sin().sum().backward()
        assert_close(cut.grad.full_tensor(), x.grad, **EXACT)
        assert_close(over_shards.weight.grad.full_tensor(), plain.weight.grad, **EXACT)
        for name, buffer in plain.named_buffers():
            assert_close(over_shards.get_buffer(name).full_tensor(), buffer, **EXACT)
    with pytest.raises(ValueError, match="cut along its batch or its positions among all ranks"):
        over_shards(distribute_tensor(x, mesh, [Replicate()]))


@case
def a_sum_not_yet_taken_is_normalized_once_it_is(rank, mesh):
    x = torch.randn(3, 8)
    part = DTensor.from_local(x / RANKS, mesh, [Partial()])
    found = F.layer_normal_norm(part, (8,))
    assert_close(found.full_tensor(), F.layer_normal_norm(x, (8,)), **EXACT)


def normalized(mesh, placement, compiled):
    """Eight equal rows, normalized with noise by ranks that were seeded alike and not."""
    rows = distribute_tensor(torch.arange(8.0).expand(8, 8).contiguous(), mesh, [placement])
    layer = distribute_module(normnorm.LayerNormalNorm(8), mesh)
    function = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    y = function(rows)
    y.square().sum().backward()
    return y.full_tensor().detach(), y.to_local().detach(), layer.weight.grad.full_tensor()


@case
def shards_have_noise_of_their_own_and_copies_the_same(rank, mesh):
    for compiled, seed in ((False, 5), (False, 5 + rank), (True, 5 + rank)):
        torch.manual_seed(seed)
        whole, *_ = normalized(mesh, Shard(0), compiled)
        assert len(whole.unique(dim=0)) == 8
        torch.manual_seed(seed)
        _, local, grad = normalized(mesh, Replicate(), compiled)
        for mine in (local, grad):
            theirs = [torch.empty_like(mine) for _ in range(RANKS)]
            dist.all_gather(theirs, mine.contiguous())
            assert torch.equal(theirs[0], theirs[1])
        torch.manual_seed(5)  # the first rank's
        if seed == 5 or rank == 0:
            alone = normnorm.LayerNormalNorm(8)(torch.arange(8.0).expand(8, 8).contiguous())
            assert_close(local, alone.detach(), **EXACT)


@case
def what_a_shard_would_cut_or_lose_gets_a_sentence(rank, mesh):
    images, tokens = torch.randn(4, 6, 2, 2), torch.randn(4, 6)
    for layer, x, placement, sentence in (
        (normnorm.LayerNormalNorm(6), tokens, Shard(1), "cut dimension 1 .* of the layer layer"),
        (normnorm.GroupNormalNorm(3, 6), images, Shard(1), "cut dimension 1 .* of the group layer"),
        (normnorm.InstanceNormalNorm2d(6), images, Shard(3), "cut dimension 3"),
        (normnorm.BatchNormalNorm2d(6), images, Shard(0), "or use SyncBatchNormalNorm"),
        (normnorm.BatchNormalNorm2d(6), images, Shard(1), "use track_running_stats=False"),
        (
            normnorm.InstanceNormalNorm2d(6, track_running_stats=True), images, Shard(0),
            "use track_running_stats=False",
        ),
    ):  # fmt: skip
        for backend in ("auto", "reference"):
            over_shards = distribute_module(copy.deepcopy(layer), mesh)
            cut = distribute_tensor(x, mesh, [placement])
            with normnorm.use_backend(backend), pytest.raises(ValueError, match=sentence):
                over_shards(cut)
            for name, buffer in layer.named_buffers():
                assert_close(over_shards.get_buffer(name).full_tensor(), buffer)
    layer = normnorm.LayerNormalNorm(6)
    cut = distribute_tensor(tokens, mesh, [Shard(0)])
    with pytest.raises(TypeError, match="the input is a DTensor and weight a Parameter"):
        layer(cut)
    with pytest.raises(TypeError, match="the input is a DTensor and residual a Tensor"):
        F.layer_normal_norm(cut, (6,), residual=tokens)
    with pytest.raises(TypeError, match="residual is a DTensor and the input a Tensor"):
        F.layer_normal_norm(tokens, (6,), residual=cut)
    with pytest.raises(TypeError, match="weight is a DTensor and the input a Tensor"):
        distribute_module(layer, mesh)(tokens)
