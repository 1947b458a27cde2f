"""Forward and backward of batch normality normalization with statistics over several ranks.

Each rank holds a shard of the batch; outputs, gradients and statistics equal those of one process
with the whole batch. Collectives:

* forward: one all-gather of the count and, per channel, (mean, its low part, sum of squares),
  merged as in Chan et al., "Algorithms for computing the sample variance" (1983); one all-reduce
  of the four sums that give lambda; with noise, two more of one number per channel for its scale;
* backward: one all-reduce of five numbers per channel. Gradients of weight and bias stay local, as
  is usual in data-parallel training.

Messages are float64, so that the merge adds no rounding error, and nothing is copied to the host
in between: the same code serves gloo and NCCL. The passes between the collectives are rounds of the
backend's kernels, or PyTorch operations from :mod:`normnorm.reference`: for the reference backend,
under torch.compile, which traces them, and for second derivatives.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import ops, reference
from ..autograd import normal_norm
from ..backends.reference import pull_back, through_activation
from ..config import PACKED_SCHEMA, Config, packed
from ..namespace import compiled_namespace
from ..statistics import Round, Row, statistics_dtype

# Elements per piece of the passes in PyTorch operations, whose intermediate results are about sixty
# times as large as the piece.
_CHUNK = 2**22


class _Shard(NamedTuple):
    """This rank's part of a call; the configuration's ``stream`` is the rank."""

    input: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    seed: Tensor | None
    config: Config


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


# Operations on a shard


def _dims(input: Tensor) -> tuple[int, ...]:
    return (0, *range(2, input.dim()))


def _count(input: Tensor) -> int:
    """The elements of a channel on this rank."""
    return input.numel() // max(input.size(1), 1)


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


def _like(
    sums: Sequence[Tensor], parameters: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> list[Tensor | None]:
    """The gradients of weight and bias, None where one is not needed."""
    return [
        total.to(parameter.dtype) if needed and parameter is not None else None
        for total, parameter, needed in zip(sums, parameters, needs, strict=True)
    ]


def _sums(tensors: tuple[Tensor, ...]) -> Tensor:
    """The sum of each tensor per channel, (tensors, channels), float64."""
    return torch.stack([t.sum(_dims(t)).double() for t in tensors])


def _op(h: Tensor, lmbda: Tensor, config: Config, *rest: Tensor | None) -> Tensor:
    """The op over standardized values: with frozen mean 0, and variance 0.5 to which eps 0.5 is
    added. ``rest``: weight, bias, residual, seed, noise_scale."""
    zero, half = torch.zeros_like(lmbda), torch.full_like(lmbda, 0.5)
    config = config._replace(eps=0.5)
    return normal_norm((h, zero, half, lmbda, *rest), config)[0]


def _transform(h: Tensor, lmbda: Tensor, config: Config) -> Tensor:
    """psi(h; lmbda)."""
    return _op(h, lmbda, config._replace(noise_train=0.0, activation=""), *(None,) * 5)


def _finish(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    seed: Tensor | None, scale: Tensor, config: Config,
) -> Tensor:  # fmt: skip
    """Noise, affine map, residual and activation of transformed values, by the op with lambda 1,
    for which psi is the identity."""
    weight, bias, residual = (
        None if t is None else t.to(x.dtype) for t in (weight, bias, residual)
    )
    identity = config._replace(alpha=0.0, order=2, transform_eps=0.0)
    noise_scale = None if seed is None else scale
    return _op(x, torch.ones_like(scale), identity, weight, bias, residual, seed, noise_scale)


# Passes over this rank's shard, by rounds of the kernels or in PyTorch operations.
# The two classes have the same methods, called in this order; sums are (k, C), float64.


_SCHEMA = (
    "round_(Tensor input, Tensor stats, Tensor(a!)? sums, Tensor(b!)? result, Tensor? weight, "
    "Tensor? bias, Tensor? residual, Tensor? seed, Tensor? grad_output, Tensor? output, "
    f"{PACKED_SCHEMA}) -> ()"
)
_libraries: list[torch.library.Library] = []
_compiled: dict[str, Any] = {}  # the op of each compiled backend
for _name in ("cpu", "cuda"):
    _libraries.append(torch.library.Library(compiled_namespace(_name), "FRAGMENT"))
    _libraries[-1].define(_SCHEMA)
    _compiled[_name] = getattr(torch.ops, compiled_namespace(_name)).round_.default

# Runs a round: the arguments of the compiled op to ``output``, the configuration, the round.
_Run = Callable[..., None]


def _run_compiled(*arguments: Any) -> None:
    *tensors, config, number = arguments
    _compiled[config.backend](*tensors, *packed(config, number))


def _kernels_of(input: Tensor, config: Config) -> _Run | None:
    """What runs the rounds of the backend's kernels; None if they do not compute the passes."""
    if torch.compiler.is_compiling() or not ops.direct(input):
        return None
    if config.backend in _compiled:
        return _run_compiled
    if config.backend == "triton":
        launch = importlib.import_module("..triton_kernels.launch", __package__)
        return launch.run_round
    return None


class _Kernels:
    """By the kernels. Those for CPUs keep intermediate values in the tensor that the last round
    writes."""

    def __init__(
        self, run: _Run, shard: _Shard, writes: bool,
        grad_output: Tensor | None = None, output: Tensor | None = None,
    ) -> None:  # fmt: skip
        self._run = run
        self._shard = shard
        self._result: Any = torch.empty_like(shard.input) if writes else None
        self._gradient = grad_output, output
        self._table: Tensor | None = None

    def _call(self, number: Round, stats: Tensor, sums: Tensor | None = None) -> None:
        input, *tensors, config = self._shard
        self._run(input, stats, sums, self._result, *tensors, *self._gradient, config, number)

    def _sums(self, number: Round, stats: Tensor, rows: int) -> Tensor:
        sums = stats.new_empty((rows, stats.size(1)), dtype=torch.float64)
        self._call(number, stats, sums)
        return sums

    def moments(self, stats: Tensor) -> Tensor:
        """Mean, what its rounding lost, and centred sum of squares."""
        return self._sums(Round.MOMENTS, stats, 3)

    def newton_sums(self, stats: Tensor, variance: Tensor) -> Tensor:
        """Sums that give A, B, D and E once they are added over the ranks."""
        sums = self._sums(Round.LMBDA, stats, 4)
        # The kernels leave h^2 out of E, whose mean over all ranks is known.
        sums[3] += _count(self._shard.input) * (variance * stats[Row.RSTD].double().square())
        return sums

    def x_sums(self, stats: Tensor) -> Tensor:
        """The sum of x = psi(h)."""
        return self._sums(Round.MEAN_X, stats, 1)

    def deviation_sums(self, stats: Tensor) -> Tensor:
        """The sum of abs(x - mean(x)); the mean is in the row of the noise's scale."""
        return self._sums(Round.DEVIATION, stats, 1)

    def output(self, stats: Tensor) -> Tensor:
        """With noise, affine map, residual and activation."""
        self._call(Round.OUTPUT, stats)
        return self._result  # type: ignore[no-any-return]

    def _gradients(self, stats: Tensor) -> Tensor:
        if self._table is None:
            self._table = self._sums(Round.SUMS, stats, 7)
        return self._table

    def gradient_sums(self, saved: _Saved) -> Tensor:
        """The sums of G psi_h, G psi_h h, G psi_lambda, w and w h."""
        return self._gradients(saved.stats)[:5]

    def input_gradient(self, saved: _Saved, means: Tensor) -> Tensor:
        self._call(Round.GRADIENT, saved.stats, means)
        return self._result  # type: ignore[no-any-return]

    def parameter_gradients(self, saved: _Saved, needs: tuple[bool, ...]) -> list[Tensor | None]:
        """The gradients of weight and bias on this rank."""
        if not any(needs):
            return [None, None]
        bias, weight = self._gradients(saved.stats)[5:]
        return _like((weight, bias), (self._shard.weight, self._shard.bias), needs)


class _Definition:
    """By the definition, in pieces of the channels."""

    def __init__(self, shard: _Shard, grad_output: Tensor | None = None) -> None:
        self._shard = shard
        self._grad_output = grad_output
        self._pieces = _pieces(shard.input)
        self._x: Tensor | None = None
        self._pulled: list[tuple[Tensor, Tensor, Tensor]] = []

    def moments(self, stats: Tensor) -> Tensor:
        share = 1.0 / max(_count(self._shard.input), 1)
        parts = []
        for piece in self._pieces:
            u = self._shard.input[:, piece].to(stats.dtype)
            dims = _dims(u)
            mean = u.sum(dims) * share
            u = u - _spread(mean, u)
            low = u.sum(dims) * share
            squares = (u - _spread(low, u)).square().sum(dims)
            parts.append(torch.stack([mean, low, squares]).double())
        return torch.cat(parts, dim=1)

    def newton_sums(self, stats: Tensor, variance: Tensor) -> Tensor:
        input = self._shard.input
        return torch.cat(
            [
                _sums(reference.newton_terms(_standardize(input, stats, piece)))
                for piece in self._pieces
            ],
            dim=1,
        )

    def _transformed(self, stats: Tensor) -> Tensor:
        if self._x is None:
            input, config = self._shard.input, self._shard.config
            self._x = torch.empty_like(input, dtype=stats.dtype)
            for piece in self._pieces:
                h = _standardize(input, stats, piece)
                self._x[:, piece] = _transform(h, stats[Row.LMBDA, piece], config)
        return self._x

    def x_sums(self, stats: Tensor) -> Tensor:
        return _sums((self._transformed(stats),))

    def deviation_sums(self, stats: Tensor) -> Tensor:
        x, centre = self._transformed(stats), stats[Row.NOISE_SCALE]
        parts = [_sums(((x[:, p] - _spread(centre[p], x)).abs(),)) for p in self._pieces]
        return torch.cat(parts, dim=1)

    def output(self, stats: Tensor) -> Tensor:
        input, weight, bias, residual, seed, config = self._shard
        scale = stats[Row.NOISE_SCALE]
        x = _finish(self._transformed(stats), weight, bias, residual, seed, scale, config)
        return x.to(input.dtype)

    def gradient_sums(self, saved: _Saved) -> Tensor:
        config = self._shard.config

        def estimate(means: Tensor) -> Tensor:
            step = reference.newton_step(means.unbind(0), config.eps, config.alpha, config.order)
            return step[0]

        # Derivatives of lambda in A, B, D and E.
        (slopes,) = torch.func.vjp(estimate, saved.means)[1](torch.ones_like(saved.means[0]))
        slopes = slopes.to(saved.stats.dtype)
        self._pulled = [self._pull_back(saved.stats, slopes, piece) for piece in self._pieces]
        return torch.cat([sums for _, _, sums in self._pulled], dim=1)

    def _pull_back(
        self, stats: Tensor, slopes: Tensor, piece: slice
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(G psi_h, w, the sums) for a slice of the shard's channels."""
        input, weight, *_, config = self._shard
        assert self._grad_output is not None
        h = _standardize(input, stats, piece)
        g = self._grad_output[:, piece].to(h.dtype)
        if weight is not None:
            g = g * _spread(weight[piece].to(h.dtype), g)

        def transform(h: Tensor, lmbda: Tensor) -> Tensor:
            return reference.yeo_johnson(h, _spread(lmbda, h), config.transform_eps)

        g_h, g_lmbda = torch.func.vjp(transform, h, stats[Row.LMBDA, piece])[1](g)
        pulled: Any = torch.func.vjp(reference.newton_terms, h)
        terms, pull_terms = pulled
        (w,) = pull_terms(tuple(_spread(slope[piece], h).expand_as(terms[0]) for slope in slopes))
        psi_h, psi_h_h, w_0, w_1 = _sums((g_h, g_h * h, w, h * w))
        return g_h, w, torch.stack([psi_h, psi_h_h, g_lmbda.double(), w_0, w_1])

    def input_gradient(self, saved: _Saved, means: Tensor) -> Tensor:
        input, stats = self._shard.input, saved.stats
        s_a, s_b, lam, w_0, w_1 = means.unbind(0)
        constant, slope, lam = (t.to(stats.dtype) for t in (s_a + lam * w_0, s_b + lam * w_1, lam))
        gradient = torch.empty_like(input)
        for piece, (g_h, w, _) in zip(self._pieces, self._pulled, strict=True):
            h = _standardize(input, stats, piece)
            inner = g_h + _spread(lam[piece], h) * w - _spread(constant[piece], h)
            inner = inner - h * _spread(slope[piece], h)
            gradient[:, piece] = inner * _spread(stats[Row.RSTD, piece], h)
        return gradient

    def parameter_gradients(self, saved: _Saved, needs: tuple[bool, ...]) -> list[Tensor | None]:
        # The statistics of all ranks are passed as frozen, since the reference backend would
        # otherwise recompute them from the shard.
        input, weight, bias, _, seed, config = self._shard
        g, stats = self._grad_output, saved.stats
        assert g is not None
        if not any(needs):
            return [None, None]
        if not torch.compiler.is_compiling():
            tensors = (g, input, stats, weight, bias, None, seed, None)
            _, *found = ops.run_backward((*tensors, False, *needs, True, *config))
            return [t if needed else None for t, needed in zip(found, needs, strict=True)]
        h = _standardize(input, stats, slice(None))
        x = _transform(h, stats[Row.LMBDA], config)
        x = _finish(x, None, None, None, seed, stats[Row.NOISE_SCALE], config)
        g = g.to(x.dtype)
        return _like([t.sum(_dims(g)) for t in (g * x, g)], (weight, bias), needs)


# The passes with their messages


def _merge(gathered: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(count, variance, statistics of shape (3, C)): over all shards; the statistics are mean, its
    low part and rstd.

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
    return count, variance, merged.to(dtype)


def _forward(passes: _Kernels | _Definition, shard: _Shard, group: Any) -> tuple[Tensor, _Saved]:
    config, input = shard.config, shard.input
    stats = input.new_zeros((len(Row), input.size(1)), dtype=statistics_dtype(input.dtype))
    own = passes.moments(stats).flatten()
    message = torch.cat([own.new_full((1,), _count(input)), own])
    count, variance, merged = _merge(_all_gather(message, group), config.eps, stats.dtype)
    stats[: Row.LMBDA] = merged
    share = count.clamp_min(1.0).reciprocal()
    means = _all_reduce(passes.newton_sums(stats, variance), group) * share
    lmbda, curvature = reference.newton_step(
        means.unbind(0), config.eps, config.alpha, config.order
    )
    stats[Row.LMBDA] = lmbda
    stats[Row.MEAN_HD :] = torch.stack([means[0], means[2], curvature])
    if config.noise_train > 0.0:
        for sums in (passes.x_sums, passes.deviation_sums):
            stats[Row.NOISE_SCALE] = _all_reduce(sums(stats), group)[0] * share
    return passes.output(stats), _Saved(count, means, stats)


def _backward(
    passes: _Kernels | _Definition, saved: _Saved, group: Any, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias; the input's is that of the sum of all ranks' losses,
    with its five means taken over the ranks (section 4 of ``docs/internals/mathematics.md``)."""
    gradient = None
    if needs[0]:
        means = _all_reduce(passes.gradient_sums(saved), group) / saved.elements.clamp_min(1.0)
        gradient = passes.input_gradient(saved, means)
    return gradient, *passes.parameter_gradients(saved, needs[1:])


def _differentiable(shard: _Shard, saved: _Saved, group: Any) -> Tensor:
    """The forward pass, sums over the ranks included, as a function that autograd can differentiate
    repeatedly; the noise and its scale are constants."""
    input, weight, bias, _, seed, config = shard
    count, _, stats = saved

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
    return _finish(x, weight, bias, None, seed, stats[Row.NOISE_SCALE], config).to(input.dtype)


class Synchronised(torch.autograd.Function):
    """Forward and backward over the ranks; (output, statistics, count)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, seed: Tensor | None, config: Config, group: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        shard = _Shard(input, weight, bias, residual, seed, config)
        run = _kernels_of(input, config)
        passes = _Definition(shard) if run is None else _Kernels(run, shard, True)
        output, saved = _forward(passes, shard, group)
        activated = output if config.activation else None
        ctx.save_for_backward(input, weight, bias, seed, activated, *saved)
        ctx.mark_non_differentiable(saved.stats, saved.elements)
        ctx.setup = config, group
        return output, saved.stats, saved.elements

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor, *_: Any
    ) -> tuple[Tensor | None, ...]:
        input, weight, bias, seed, output, *rest = ctx.saved_tensors
        saved, needs = _Saved(*rest), ctx.needs_input_grad[:4]
        config, group = ctx.setup
        # With create_graph=True this backward pass must be differentiable.
        again = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        run = None if again else _kernels_of(input, config)
        if needs[3] or run is None:
            grad_output = through_activation(grad_output, output, config)
            output, config = None, config._replace(activation="")
        grad_residual = grad_output if needs[3] else None
        shard = _Shard(input, weight, bias, None, seed, config)
        if again:
            found = _again(grad_output, shard, saved, group, needs[:3])
        else:
            if not needs[1]:  # the noise reaches no other gradient
                shard = shard._replace(config=config._replace(noise_train=0.0))
            if run is None:
                passes: _Kernels | _Definition = _Definition(shard, grad_output)
            else:
                passes = _Kernels(run, shard, needs[0], grad_output, output)
            found = _backward(passes, saved, group, needs[:3])
        return *found, grad_residual, None, None, None


def _again(
    grad_output: Tensor, shard: _Shard, saved: _Saved, group: Any, needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """The gradients of input, weight and bias with a graph of their own."""
    asked = [i for i, needed in enumerate(needs) if needed]

    def function(*points: Tensor) -> Tensor:
        given = dict(zip((_Shard._fields[i] for i in asked), points, strict=True))
        return _differentiable(shard._replace(**given), saved, group)  # type: ignore[arg-type]

    gradients: list[Tensor | None] = [None, None, None]
    primals: Any = tuple(shard[i] for i in asked)
    found = pull_back(function, primals, grad_output)
    for i, gradient in zip(asked, found, strict=True):
        gradients[i] = gradient
    return tuple(gradients)
