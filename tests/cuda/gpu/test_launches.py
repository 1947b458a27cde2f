"""Kernels of a step, and memory kept for the backward pass."""

import pytest
import torch
from torch import nn

import normnorm

SMALL = {"BatchNormalNorm1d": (128, 64), "BatchNormalNorm2d": (32, 64, 8, 8)}


@pytest.mark.parametrize("name", SMALL)
def test_a_batch_layers_training_step_is_four_kernels(rig, backend, name):
    """The seed, forward, fold, backward."""
    layer = getattr(normnorm, name)(64, device=rig.device)
    x, g = (torch.randn(SMALL[name], device=rig.device) for _ in range(2))
    leaves = [x.requires_grad_(), *layer.parameters()]
    work = rig.work_of(lambda: torch.autograd.grad(layer(x), leaves, g))
    assert work, "the profiler recorded no work of the device"
    kernels = [name for name in work if not name.startswith(("Memset", "Memcpy"))]
    assert len(kernels) <= 4, f"{len(kernels)} of {work}"


def test_a_layers_evaluation_is_at_most_two_kernels(rig, backend):
    """Packing of the running statistics, and the forward pass."""
    layer = normnorm.BatchNormalNorm2d(64, device=rig.device).eval()
    x = torch.randn(32, 64, 8, 8, device=rig.device)
    with torch.no_grad():
        work = rig.work_of(lambda: layer(x))
    assert 1 <= len(work) <= 2, work


def _kept(layer: nn.Module, x: torch.Tensor) -> int:
    """Bytes of all distinct storages that autograd keeps, without the layer's own."""
    own = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_backward_pass_keeps_what_batchnorms_does(rig, backend, dtype):
    channels = 64
    ours = normnorm.BatchNormalNorm2d(channels, device=rig.device)
    theirs = nn.BatchNorm2d(channels, device=rig.device)
    shape = (rig.pick(64, 4), channels, 14, 14)
    x = torch.randn(shape, device=rig.device, dtype=dtype, requires_grad=True)
    kept, peer = _kept(ours, x), _kept(theirs, x)
    assert kept <= peer + 8 * 4 * channels + 64, f"{kept} bytes, BatchNorm {peer}"


def test_allocated_memory_after_the_forward_pass(rig, backend):
    """By the allocator's count: the output, and a few numbers a channel."""
    layer = normnorm.BatchNormalNorm2d(64, device=rig.device)
    x = torch.randn(rig.pick(64, 4), 64, 28, 28, device=rig.device, requires_grad=True)
    layer(x)
    before = rig.allocated()
    y = layer(x)
    assert rig.allocated() - before <= y.numel() * y.element_size() + 16384
