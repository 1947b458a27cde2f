"""The noise stream: standard normals as a pure function of (seed, stream, element index).

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) and the
Box-Muller transform in plain PyTorch integer and float64 operations. Eight elements share a
counter. The compiled kernels produce the same words bit for bit and the same normals up to
rounding, so a backward pass regenerates the noise of its forward pass instead of storing it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._functorch import config

from .namespace import NAMESPACE, OPS

# Changes with the numbers that a seed gives. A compiled library has its own (csrc/math/philox.h).
STREAM_VERSION = 2

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 7
_TURN = 0x9E3779B9  # 2^32 divided by the golden ratio


def draw_seed(device: torch.device) -> Tensor:
    """A fresh seed, shape (1,), int64, from the device's default generator.

    In eager mode this is ``torch.randint``, which CUDA graphs and activation checkpointing
    support. In a graph of torch.compile the op ``normnorm::draw_seed`` draws the same number.

    Raises:
        RuntimeError: compiling with an activation memory budget of 0 (torch.func: less than 1).
    """
    # An exported program contains torch.randint, since nothing splits it into two passes. (The
    # function is_exporting() is true under any torch.compile of torch 2.10 to 2.12.)
    if torch.compiler.is_compiling() and not torch.compiler._is_exporting_flag:
        if not torch._C._are_functorch_transforms_active():
            return _draw_seed(device=device)
        _check_budget(config.activation_memory_budget, 1.0)  # torch.vmap supports only randint
    return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)


# A compiler that splits a graph into forward and backward may recompute values in the backward
# pass instead of saving them. A recomputed seed would differ. So ``draw_seed``, the op in dynamo's
# graph, becomes ``fresh_seed`` in the joint graph of forward and backward, and the node of
# ``fresh_seed`` is marked as one that must be saved. Its ``index`` counts the layers of a graph:
# AOTAutograd merges equal calls of an op as common subexpressions, also of one that is tagged as
# random, so that without it all layers would have the seed of the first.
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _schema in ("draw_seed(*, Device device)", "fresh_seed(*, Device device, int index)"):
    _library.define(
        f"{_schema} -> Tensor",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
    )
_draw_seed, _fresh_seed = OPS.draw_seed.default, OPS.fresh_seed.default


def _draw_and_save(*, device: torch.device) -> Tensor:
    """``normnorm::draw_seed``."""
    from torch.fx import traceback
    from torch.fx.experimental.proxy_tensor import get_proxy_mode
    from torch.utils.checkpoint import CheckpointPolicy

    mode = get_proxy_mode()
    before = () if mode is None else mode.tracer.graph.nodes
    index = sum(node.target is _fresh_seed for node in before)
    seed: Tensor = _fresh_seed(device=device, index=index)
    if mode is not None:
        node = next(iter(reversed(mode.tracer.graph.nodes)))
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE
        _check_budget(node.meta.get("memory_budget"))
        if hasattr(traceback, "_get_memory_budget_annotation"):
            _check_budget(traceback._get_memory_budget_annotation(node))
    return seed


def _fake_seed(*, device: torch.device, index: int) -> Tensor:
    _check_budget(config.activation_memory_budget)
    return torch.empty(1, dtype=torch.int64, device=device)


def _check_budget(budget: float | None, least: float = 0.0) -> None:
    """Raises an error for an activation memory budget of 0, at which a partitioner saves only the
    graph's inputs and ignores the mark, or of less than ``least``: 1 under a transform of
    torch.func, whose seed is not marked."""
    if budget is not None and (budget == 0 or budget < least):
        raise RuntimeError(
            f"with an activation memory budget of {budget} torch.compile would draw another noise "
            f"in the backward pass; give a larger budget{' (1 under torch.func)' if least else ''},"
            " the argument seed, or noise_train=0"
        )


_library.impl("draw_seed", _draw_and_save, "CompositeImplicitAutograd")
_library.impl("fresh_seed", lambda *, device, index: draw_seed(device), "BackendSelect")
torch.library.register_fake(f"{NAMESPACE}::fresh_seed", _fake_seed, lib=_library)


def as_seed(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed tensor for a user's ``seed`` argument: None draws one, an int is converted."""
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
    """Philox4x32-7: four tensors of 32-bit words (held in int64) for each 64-bit counter (words 0
    and 1; ``stream`` is word 2, word 3 is 0) and the key ``seed``, int64 of one element."""
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


def turn_words(words: Tensor, following: Tensor) -> Tensor:
    """2^32 times the angle, in turns, of the pair of normals whose radius has the uniform of
    ``words``. A pair takes its word and the next of its counter; after the last, the first."""
    return (_multiply(words, _TURN)[1] + following) & _MASK


def standard_normals(
    shape: Sequence[int],
    seed: Tensor,
    stream: int = 0,
    channels_last: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The noise z ~ N(0, 1) of a tensor of the given logical shape.

    Element i gets normal i of the stream. Elements are numbered in row-major order, or in
    (N, spatial..., C) order if ``channels_last`` is set.

    Args:
        shape: logical shape; (N, C, ...) if ``channels_last`` is set.
        seed: int64 tensor of one element; its device is the device of the result.
        stream: selects different noise for the same seed (the rank in synchronised layers).
        channels_last: whether the element index counts in (N, spatial..., C) order.
        dtype: dtype of the result; the arithmetic is float64.
    """
    order = (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)
    numel = math.prod(order)
    counter = torch.arange((numel + 7) // 8, dtype=torch.int64, device=seed.device)
    words = philox_words(counter, seed, stream)
    normals = []
    for word, following in zip(words, (*words[1:], words[0]), strict=True):
        radius = torch.sqrt(-2.0 * torch.log(uniforms(word)))
        angle = turn_words(word, following).to(torch.float64) * (2.0 * math.pi * 2.0**-32)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    z = torch.stack(normals, dim=-1).flatten()[:numel].reshape(order).to(dtype)
    return z.movedim(-1, 1) if channels_last else z
