"""Forward and backward of batch normality normalization with statistics over several ranks.

Each rank holds a shard of the batch; outputs, gradients and statistics equal those of one process
with the whole batch. Collectives:

* forward: one all-gather of the count and, per channel, (mean, its low part, sum of squares),
  merged as in Chan et al., "Algorithms for computing the sample variance" (1983); one all-reduce
  of the four sums that give lambda; with noise, two more of one number per channel for its scale;
* backward: one all-reduce of five numbers per channel. Gradients of weight and bias stay local, as
  is usual in data-parallel training.

Messages are float64, so that the merge adds no rounding error, and nothing is copied to the host
in between: the same code serves gloo and NCCL. The passes between the collectives are PyTorch
operations from :mod:`normnorm.reference`; the transform, noise with affine map, and the gradients
of the affine map are one call of the op each. Under torch.compile everything is traced.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, reference
from ..autograd import normal_norm
from ..backends.reference import pull_back
from ..config import Config
from ..statistics import Row, statistics_dtype

# Elements per piece of the passes in PyTorch operations, whose intermediate results are about sixty
# times as large as the piece.
_CHUNK = 2**22


class _Setup(NamedTuple):
    """The op's configuration, whose ``stream`` is the rank, and the process group."""

    config: Config
    group: Any


class _Saved(NamedTuple):
    """Saved for the backward pass beside the input tensors: the elements of a channel over all
    ranks; the means A, B, D and E, (4, C), float64; the statistics tensor, (8, C)."""

    elements: Tensor
    means: Tensor
    stats: Tensor


# Collectives


def _all_gather(message: Tensor, group: Any) -> Tensor:
    """Every rank's message, (ranks, length)."""
    gathered = message.new_empty(dist.get_world_size(group), message.numel())
    dist.all_gather(list(gathered.unbind(0)), message, group=group)
    return gathered


def _all_reduce(message: Tensor, group: Any) -> Tensor:
    """The sum over the ranks, in place."""
    dist.all_reduce(message, group=group)
    return message


class _SumOverRanks(torch.autograd.Function):
    """A sum over the ranks, differentiable to any order; its gradient is that of the sum of all
    ranks' losses."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _all_reduce(tensor.clone(), group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        return _SumOverRanks.apply(gradient, ctx.group), None


# Passes over the shard of this rank


def _dims(input: Tensor) -> tuple[int, ...]:
    return (0, *range(2, input.dim()))


def _spread(values: Tensor, input: Tensor) -> Tensor:
    """One value per channel, (C,), in a shape that broadcasts over the input."""
    return values.reshape(1, -1, *(1,) * (input.dim() - 2))


def _pieces(input: Tensor) -> list[slice]:
    """Slices of the channels, about ``_CHUNK`` elements each; a single one under torch.compile."""
    channels = input.size(1)
    if torch.compiler.is_compiling() or input.numel() <= _CHUNK:
        return [slice(0, channels)]
    width = max(_CHUNK * channels // input.numel(), 1)
    return [slice(first, first + width) for first in range(0, channels, width)]


def _standardize(input: Tensor, stats: Tensor, piece: slice) -> Tensor:
    u = input[:, piece].to(stats.dtype)
    mean, low, rstd = (_spread(stats[row, piece], u) for row in (Row.MEAN, Row.MEAN_LOW, Row.RSTD))
    return ((u - mean) - low) * rstd


def _sums(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of each tensor per channel, (tensors, channels), float64."""
    return torch.stack([t.sum(_dims(t)).double() for t in tensors])


def _moments(input: Tensor, dtype: torch.dtype) -> Tensor:
    """The shard's message for the all-gather: count, then mean, low part and sum of squares."""
    count = input.numel() // max(input.size(1), 1)
    share = 1.0 / max(count, 1)
    parts = []
    for piece in _pieces(input):
        u = input[:, piece].to(dtype)
        dims = _dims(u)
        mean = u.sum(dims) * share
        u = u - _spread(mean, u)
        low = u.sum(dims) * share
        squares = (u - _spread(low, u)).square().sum(dims)
        parts.append(torch.stack([mean, low, squares]).double())
    own = torch.cat(parts, dim=1).flatten()
    return torch.cat([torch.full_like(own[:1], count), own])


def _merge(gathered: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(count, statistics of shape (3, C)): mean, its low part and rstd over all shards.

    Means are merged as differences from the mean of the largest shard, so that equal constant
    shards give the constant exactly.
    """
    counts = gathered[:, :1]
    mean, low, squares = gathered[:, 1:].unflatten(1, (3, -1)).unbind(1)
    count = counts.sum()
    share = count.clamp_min(1.0).reciprocal()
    pilot = counts.argmax(0)
    pilot_mean, pilot_low = mean.index_select(0, pilot)[0], low.index_select(0, pilot)[0]
    distance = (mean - pilot_mean) + (low - pilot_low)
    # An empty shard has mean 0 and must not contribute.
    distance = torch.where(counts > 0, distance, 0.0)
    shift = (counts * distance).sum(0) * share
    variance = (squares + counts * (distance - shift).square()).sum(0) * share
    rest = pilot_low + shift
    rounded = (pilot_mean + rest).to(dtype).double()
    rstd = reference.rstd_of(variance, eps, dtype)
    merged = torch.stack([rounded, (pilot_mean - rounded) + rest, rstd])
    return count, merged.to(dtype)


def _rounds(input: Tensor, setup: _Setup) -> tuple[_Saved, Tensor]:
    """The collectives of the forward pass: (statistics, transformed values)."""
    config, group = setup
    dtype = statistics_dtype(input.dtype)
    count, merged = _merge(_all_gather(_moments(input, dtype), group), config.eps, dtype)
    share = count.clamp_min(1.0).reciprocal()
    pieces = _pieces(input)
    terms = [_sums(reference.newton_terms(_standardize(input, merged, piece))) for piece in pieces]
    means = _all_reduce(torch.cat(terms, dim=1), group) * share
    lmbda, curvature = reference.newton_step(
        means.unbind(0), config.eps, config.alpha, config.order
    )
    lmbda = lmbda.to(dtype)

    x = torch.empty_like(input, dtype=dtype)
    for piece in pieces:
        x[:, piece] = _transform(_standardize(input, merged, piece), lmbda[piece], config)
    scale = torch.zeros_like(lmbda)
    if config.noise_train > 0.0:
        centre = (_all_reduce(_sums((x,)), group)[0] * share).to(dtype)
        deviations = [_sums(((x[:, p] - _spread(centre[p], x)).abs(),)) for p in pieces]
        scale = (_all_reduce(torch.cat(deviations, dim=1), group)[0] * share).to(dtype)
    # In the order of Row.
    rest = torch.stack([lmbda, scale, *(t.to(dtype) for t in (means[0], means[2], curvature))])
    return _Saved(count, means, torch.cat([merged, rest])), x


def _op(h: Tensor, lmbda: Tensor, config: Config, *rest: Tensor | None) -> Tensor:
    """The op over standardized values: with frozen mean 0, and variance 0.5 to which eps 0.5 is
    added. ``rest``: weight, bias, residual, seed, noise_scale."""
    zero, half = torch.zeros_like(lmbda), torch.full_like(lmbda, 0.5)
    config = config._replace(eps=0.5)
    return normal_norm((h, zero, half, lmbda, *rest), config)[0]


def _transform(h: Tensor, lmbda: Tensor, config: Config) -> Tensor:
    """psi(h; lmbda)."""
    return _op(h, lmbda, config._replace(noise_train=0.0), *(None,) * 5)


def _finish(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None, scale: Tensor,
    config: Config,
) -> Tensor:  # fmt: skip
    """Noise and affine map of transformed values, by the op with lambda 1, for which psi is the
    identity."""
    weight, bias = (None if p is None else p.to(x.dtype) for p in (weight, bias))
    identity = config._replace(alpha=0.0, order=2, transform_eps=0.0)
    noise_scale = None if seed is None else scale
    return _op(x, torch.ones_like(scale), identity, weight, bias, None, seed, noise_scale)


# Gradients


def _pull_back_piece(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, stats: Tensor, slopes: Tensor,
    piece: slice, config: Config,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(G psi_h, w, the sums of five products) for a slice of the shard's channels."""
    h = _standardize(input, stats, piece)
    g = grad_output[:, piece].to(h.dtype)
    if weight is not None:
        g = g * _spread(weight[piece].to(h.dtype), g)

    def transform(h: Tensor, lmbda: Tensor) -> Tensor:
        return reference.yeo_johnson(h, _spread(lmbda, h), config.transform_eps)

    g_h, g_lmbda = torch.func.vjp(transform, h, stats[Row.LMBDA, piece])[1](g)
    pulled: Any = torch.func.vjp(reference.newton_terms, h)
    terms, pull_terms = pulled
    (w,) = pull_terms(tuple(_spread(slope[piece], h).expand_as(terms[0]) for slope in slopes))
    sums = torch.cat([_sums((g_h, g_h * h, w, h * w)), g_lmbda.double().unsqueeze(0)])
    return g_h, w, sums


def _input_gradient(
    grad_output: Tensor, input: Tensor, weight: Tensor | None, saved: _Saved, setup: _Setup
) -> Tensor:
    """The input's gradient of the sum of all ranks' losses, with its five means taken over the
    ranks (section 4 of ``docs/internals/mathematics.md``)."""
    count, means, stats = saved
    config, group = setup

    def estimate(values: Tensor) -> Tensor:
        return reference.newton_step(values.unbind(0), config.eps, config.alpha, config.order)[0]

    # Derivatives of lambda in A, B, D and E.
    (slopes,) = torch.func.vjp(estimate, means)[1](torch.ones_like(means[0]))
    slopes = slopes.to(stats.dtype)
    pieces = _pieces(input)
    local = [
        _pull_back_piece(grad_output, input, weight, stats, slopes, piece, config)
        for piece in pieces
    ]
    total = _all_reduce(torch.cat([sums for _, _, sums in local], dim=1), group)
    s_a, s_b, w_0, w_1, lam = (total / count.clamp_min(1.0)).unbind(0)
    constant, slope, lam = (t.to(stats.dtype) for t in (s_a + lam * w_0, s_b + lam * w_1, lam))
    gradient = torch.empty_like(input)
    for piece, (g_h, w, _) in zip(pieces, local, strict=True):
        h = _standardize(input, stats, piece)
        inner = g_h + _spread(lam[piece], h) * w - _spread(constant[piece], h)
        inner = inner - h * _spread(slope[piece], h)
        gradient[:, piece] = inner * _spread(stats[Row.RSTD, piece], h)
    return gradient


def _parameter_gradients(
    grad_output: Tensor, tensors: tuple[Any, ...], stats: Tensor, needs: tuple[bool, bool],
    config: Config,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The gradients of weight and bias on this rank; the statistics of all ranks are passed as
    frozen, since the reference backend would otherwise recompute them from the shard."""
    input, weight, bias, seed = tensors
    if not torch.compiler.is_compiling():
        saved = (input, stats, weight, bias, None, seed, None)
        _, *found = ops.run_backward((grad_output, *saved, False, *needs, True, *config))
        return found[0] if needs[0] else None, found[1] if needs[1] else None
    h = _standardize(input, stats, slice(None))
    x = _transform(h, stats[Row.LMBDA], config)
    x = _finish(x, None, None, seed, stats[Row.NOISE_SCALE], config)
    g = grad_output.to(x.dtype)
    return (
        (g * x).sum(_dims(g)).to(weight.dtype) if needs[0] else None,
        g.sum(_dims(g)).to(bias.dtype) if needs[1] else None,
    )


def _differentiable(tensors: tuple[Any, ...], saved: _Saved, setup: _Setup) -> Tensor:
    """The forward pass, sums over the ranks included, as a function that autograd can differentiate
    repeatedly; the noise and its scale are constants."""
    input, weight, bias, seed = tensors
    count, _, stats = saved
    config, group = setup

    def mean(*values: Tensor) -> list[Tensor]:
        sums = _SumOverRanks.apply(_sums(values), group) / count.clamp_min(1.0)
        return [_spread(total.to(stats.dtype), input) for total in sums.unbind(0)]

    u = input.to(stats.dtype)
    u = u - _spread(stats[Row.MEAN], u)
    u = u - mean(u)[0]
    h = u * reference.rstd_of(mean(u.square())[0], config.eps, u.dtype)
    lmbda, _ = reference.newton_step(
        mean(*reference.newton_terms(h)), config.eps, config.alpha, config.order
    )
    x = reference.yeo_johnson(h, lmbda, config.transform_eps)
    return _finish(x, weight, bias, seed, stats[Row.NOISE_SCALE], config).to(input.dtype)


class Synchronised(torch.autograd.Function):
    """Forward and backward over the ranks; (output, statistics, count)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
        config: Config, group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        setup = _Setup(config, group)
        saved, x = _rounds(input, setup)
        scale = saved.stats[Row.NOISE_SCALE]
        output = _finish(x, weight, bias, seed, scale, config).to(input.dtype)
        ctx.save_for_backward(input, weight, bias, seed, *saved)
        ctx.mark_non_differentiable(saved.stats, saved.elements)
        ctx.setup = setup
        return output, saved.stats, saved.elements

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        tensors, saved = ctx.saved_tensors[:4], _Saved(*ctx.saved_tensors[4:])
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # With create_graph=True this backward pass must be differentiable.
            return *_again(grad_output, tensors, saved, ctx.setup, needs), None, None, None
        grad_input = grad_weight = grad_bias = None
        if needs[0]:
            input, weight = tensors[:2]
            grad_input = _input_gradient(grad_output, input, weight, saved, ctx.setup)
        if needs[1] or needs[2]:
            grad_weight, grad_bias = _parameter_gradients(
                grad_output, tensors, saved.stats, needs[1:], ctx.setup.config
            )
        return grad_input, grad_weight, grad_bias, None, None, None


def _again(
    grad_output: Tensor, tensors: tuple[Any, ...], saved: _Saved, setup: _Setup,
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of input, weight and bias with a graph of their own."""
    asked = [i for i, needed in enumerate(needs) if needed]

    def function(*points: Tensor) -> Tensor:
        given = list(tensors)
        for i, point in zip(asked, points, strict=True):
            given[i] = point
        return _differentiable(tuple(given), saved, setup)

    gradients: list[Tensor | None] = [None, None, None]
    found = pull_back(function, tuple(tensors[i] for i in asked), grad_output)
    for i, gradient in zip(asked, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
