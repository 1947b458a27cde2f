"""The noise stream: standard normals as a pure function of (seed, stream, element index).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and the
Box-Muller transform in plain PyTorch integer and float64 operations. The compiled kernels
produce the same words bit for bit and the same normals to rounding, which is how a backward
pass regenerates the noise of its forward pass instead of storing it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["as_seed", "draw_seed", "philox_words", "standard_normals", "uniforms"]

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, shape (1,), int64, from the device's default generator.

    An ordinary random operation, so CUDA graphs, torch.compile and activation checkpointing
    treat it as they treat any other.
    """
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed tensor for a user's ``seed`` argument: drawn for None, made for an int."""
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(
            f"seed must be None, an int or an int64 tensor of one element; "
            f"got {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"an int seed must fit into 64 bits with sign; got {seed}")
    return torch.full((1,), seed, dtype=torch.int64, device=device)


def _multiply(word: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product, without leaving int64's positive range."""
    low, high = constant & 0xFFFF, constant >> 16
    by_low, by_high = word * low, word * high
    product_high = (by_high + (by_low >> 16)) >> 16
    product_low = (by_low + ((by_high & 0xFFFF) << 16)) & _MASK
    return product_high, product_low


def philox_words(counter: Tensor, seed: Tensor, stream: int) -> tuple[Tensor, ...]:
    """Philox4x32-10: four tensors of 32-bit words (held in int64) for each 64-bit counter.

    Args:
        counter: int64, counter words 0 and 1; any shape.
        seed: int64 tensor of one element, the key (low word, high word).
        stream: counter word 2. Word 3 is 0.
    """
    c0, c1 = counter & _MASK, (counter >> 32) & _MASK
    c2 = torch.full_like(counter, stream & _MASK)
    c3 = torch.zeros_like(counter)
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniforms(words: Tensor) -> Tensor:
    """(w + 1/2) 2^-32 in float64: never 0, never 1."""
    return (words.to(torch.float64) + 0.5) * 2.0**-32


def standard_normals(
    shape: Sequence[int],
    seed: Tensor,
    stream: int = 0,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The noise z ~ N(0, 1) of a tensor of the given logical shape.

    Element i of the canonical dense order takes normal i of the stream: the order is
    row-major, or (N, spatial..., C) where ``channels_last`` is set.

    Args:
        shape: logical shape, (N, C, ...) where ``channels_last`` is set.
        seed: int64 tensor of one element; its device is the device of the result.
        stream: separates noise that shares a seed (the rank in synchronised layers).
        channels_last: whose order the element index follows.
        dtype: dtype of the result; the arithmetic is float64.
    """
    order = (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)
    numel = math.prod(order)
    counter = torch.arange((numel + 3) // 4, dtype=torch.int64, device=seed.device)
    w0, w1, w2, w3 = philox_words(counter, seed, stream)
    normals = []
    for radius_word, angle_word in ((w0, w1), (w2, w3)):
        radius = torch.sqrt(-2.0 * torch.log(uniforms(radius_word)))
        angle = (2.0 * math.pi) * uniforms(angle_word)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    z = torch.stack(normals, dim=-1).flatten()[:numel].reshape(order).to(dtype)
    return z.movedim(-1, 1) if channels_last else z
