"""More than 2^31 elements: offsets in elements need 64 bits."""

import numpy as np
import oracle
import pytest
import torch
from raw_ops import assert_close, normal_error

from normnorm import functional as F
from normnorm import reference

from .cases import SEED


def _noise(first: int, count: int, device: torch.device) -> torch.Tensor:
    """Normals ``first`` to ``first + count`` of the stream, both multiples of 8, in float64."""
    assert first % 8 == count % 8 == 0
    z = oracle.normals_of(oracle.noise_words(count // 8, SEED, first=first // 8))
    return torch.from_numpy(z.astype(np.float64).reshape(-1)).to(device)


def _enough_memory(rig, tensors_of_bytes: int) -> None:
    if not rig.dry:
        free, _ = torch.cuda.mem_get_info(rig.device)
        if free < tensors_of_bytes:
            pytest.skip(f"needs {tensors_of_bytes >> 30} GiB of GPU memory; {free >> 30} are free")


def test_rows_beyond_2_to_the_31(rig, backend):
    length = 4096
    rows = rig.pick(2**31 // length + 8, 8)
    _enough_memory(rig, 6 * rows * length * 2)
    x = torch.randn(rows, length, device=rig.device, dtype=torch.bfloat16, requires_grad=True)
    seed = torch.tensor([SEED], device=rig.device)
    y = F.layer_normal_norm(x, (length,), training=True, noise_train=1.0, seed=seed)
    g = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, g)
    for first in (0, rows - 4):  # the last rows lie beyond 2^31
        here = slice(first, first + 4)
        z = _noise(first * length, 4 * length, rig.device).reshape(4, length)
        leaf = x[here].detach().double().requires_grad_()
        want, stats = reference.normal_norm(
            leaf, kind="layer", normalized_ndim=1, noise_train=1.0, z=z
        )
        (dwant,) = torch.autograd.grad(want, leaf, g[here].double())
        noise = stats[4].max() * normal_error(z, rig.unit, False)
        assert_close(y[here].detach(), want.detach(), rig.unit, f"rows from {first}", extra=noise)
        size = float(stats[2].max() * g[here].double().abs().max())
        what = f"gradient of rows from {first}"
        assert_close(dx[here], dwant, rig.unit, what, times=4, least=size)


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_channels_beyond_2_to_the_31(rig, backend, last):
    """The last sample lies beyond; compares the first and last channel."""
    channels, side = 64, rig.pick(512, 4)
    samples = rig.pick(2**31 // (channels * side * side) + 2, 3)
    _enough_memory(rig, 8 * samples * channels * side * side * 2)
    memory = torch.channels_last if last else torch.contiguous_format
    x = torch.empty(
        samples, channels, side, side, device=rig.device, dtype=torch.bfloat16,
        memory_format=memory,
    ).normal_().requires_grad_()  # fmt: skip
    y = F.batch_normal_norm(x, None, None, None, training=True, noise_train=0.0)
    g = torch.empty_like(y).normal_()
    (dx,) = torch.autograd.grad(y, x, g)
    for channel in (0, channels - 1):
        here = (slice(None), slice(channel, channel + 1))
        leaf = x[here].detach().double().contiguous().requires_grad_()
        want, stats = reference.normal_norm(leaf, kind="batch")
        (dwant,) = torch.autograd.grad(want, leaf, g[here].double())
        assert_close(y[here].detach(), want.detach(), rig.unit, f"channel {channel}")
        size = float(stats[2].max() * g[here].double().abs().max())
        assert_close(dx[here], dwant, rig.unit, f"channel {channel}, gradient", times=4, least=size)
