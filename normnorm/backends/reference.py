"""The ops by the definition in ``normnorm/reference.py``: any floating dtype, and any
device that has float64.

The backward pass is the definition's own derivative, taken by automatic differentiation, so
that it shares no formula with the compiled backends it is the oracle of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from normnorm.checks import check_backward, check_fold, check_forward
from normnorm.config import Config
from normnorm.reference import normal_norm, pack_running
from normnorm.statistics import Row, statistics_dtype

__all__ = [
    "add_normal_norm_backward",
    "add_normal_norm_forward",
    "fold_running_",
    "gradients",
    "move_running",
    "normal_norm_backward",
    "normal_norm_forward",
    "normal_norm_infer",
    "second_gradients",
    "through_activation",
    "transforms_active",
]


_NONE = (None, None, None)  # no running statistics


def _keywords(config: Config) -> dict[str, Any]:
    """The configuration as arguments of the definition."""
    keywords = config._asdict()
    del keywords["backend"]
    return keywords


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def _like_input(result: Tensor, input: Tensor) -> Tensor:
    """The result with the strides that the ops promise: those of ``empty_like(input)``."""
    if transforms_active():  # strides are not seen there
        return result
    wanted = torch.empty_like(input)
    if result.stride() == wanted.stride():
        return result
    # Batched gradients cannot be copied into a tensor without their dimension: permute if that
    # is enough, as it is for every dense layout.
    outer_first = sorted(range(input.dim()), key=wanted.stride, reverse=True)
    inverse = sorted(range(input.dim()), key=outer_first.__getitem__)
    permuted = result.permute(outer_first).contiguous().permute(inverse)
    return permuted if permuted.stride() == wanted.stride() else wanted.copy_(result)


@contextmanager
def _recording() -> Iterator[None]:
    """Records gradients even inside an op's kernel, where the dispatcher leaves autograd out."""
    included = torch._C._dispatch_tls_local_include_set()
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.ADInplaceOrView):
        excluded = excluded.remove(key)
    with torch._C._ForceDispatchKeyGuard(included, excluded), torch.enable_grad():
        yield


def pull_back(
    function: Callable[..., Any], primals: tuple[Tensor, ...], cotangents: Any
) -> tuple[Tensor, ...]:
    """The product of cotangents with the Jacobian of ``function`` at ``primals``, itself
    differentiable where gradients are being recorded."""
    if transforms_active():
        result: tuple[Tensor, ...] = torch.func.vjp(function, *primals)[1](cotangents)
        return result
    differentiable = torch.is_grad_enabled()
    with _recording():
        # A sum with zeros is a point of its own: it needs a gradient whether or not the primal
        # does, fires none of the primal's hooks, and keeps its forward-mode tangent.
        points = [primal + torch.zeros_like(primal).requires_grad_() for primal in primals]
        return torch.autograd.grad(
            function(*points),
            points,
            cotangents,
            create_graph=differentiable,
            allow_unused=True,
            materialize_grads=True,
        )


def normal_norm_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """``normnorm::normal_norm_forward``; differentiable, since the definition is."""
    config = Config(*arguments)
    running = (running_mean, running_var, running_lmbda)
    check_forward(input, running, weight, bias, residual, seed, noise_scale, config)
    frozen = None
    if running_mean is not None and running_var is not None and running_lmbda is not None:
        dtype = statistics_dtype(input.dtype)
        frozen = pack_running(running_mean, running_var, running_lmbda, config.eps, dtype)
    output, stats = normal_norm(
        input, weight, bias, seed=seed, noise_scale=noise_scale, frozen=frozen,
        residual=residual, **_keywords(config),
    )  # fmt: skip
    return _like_input(output, input), stats


def normal_norm_infer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """``normnorm::normal_norm_infer``: the forward without noise, its statistics not kept."""
    return normal_norm_forward(
        input, running_mean, running_var, running_lmbda, weight, bias, residual, None, None,
        *Config.from_infer(*arguments),
    )[0]  # fmt: skip


def definition(
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    frozen: bool,
    config: Config,
) -> Tensor:
    """The forward pass that gave ``stats``, up to its activation, as a function to differentiate:
    the noise scale is the saved one, a constant by definition, and so is every statistic of a
    frozen layer."""
    config = config._replace(activation="")
    return normal_norm(
        input, weight, bias, seed=seed, noise_scale=stats.select(0, Row.NOISE_SCALE),
        frozen=stats if frozen else None, **_keywords(config),
    )[0]  # fmt: skip


def through_activation(grad_output: Tensor, output: Tensor | None, config: Config) -> Tensor:
    """The gradient in front of the activation, which passes where the output is positive (or not
    a number, as torch has it); linear in ``grad_output`` and constant in ``output``."""
    if config.activation == "":
        return grad_output
    assert output is not None  # the checks saw to it
    return torch.ops.aten.threshold_backward(grad_output, output, 0)


def gradients(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    frozen: bool,
    config: Config,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(grad_input, grad_weight, grad_bias), None for absent parameters; differentiable again
    in grad_output, input and weight, which is the double backward of every backend."""
    given = [parameter for parameter in (weight, bias) if parameter is not None]

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        rest = iter(parameters)
        w = None if weight is None else next(rest)
        b = None if bias is None else next(rest)
        return definition(x, stats, w, b, seed, frozen, config)

    grad_input, *rest = pull_back(function, (input, *given), grad_output)
    grad_weight = None if weight is None else rest.pop(0)
    return grad_input, grad_weight, rest.pop(0) if rest else None


def second_gradients(
    directions: tuple[Tensor | None, ...],
    tensors: tuple[Any, ...],
    needs: tuple[bool, ...],
    frozen: bool,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of ``normal_norm_backward`` in (grad_output, input, weight), pulled back
    along ``directions``, one for each of its results (None for zero).

    ``tensors`` are grad_output, input, stats, weight, bias, output and seed.
    """
    grad_output, input, stats, weight, bias, output, seed = tensors
    asked = [i for i, needed in enumerate(needs) if needed]
    results = (input, weight, bias)
    cotangents = []
    for i in asked:
        like, direction = results[i], directions[i]
        assert like is not None  # a gradient was asked for, so the parameter was there
        cotangents.append(torch.zeros_like(like) if direction is None else direction)

    def function(g: Tensor, x: Tensor, w: Tensor | None = None) -> tuple[Any, ...]:
        g = through_activation(g, output, config)
        found = gradients(g, x, stats, w, bias, seed, frozen, config)
        return tuple(found[i] for i in asked)

    primals = (grad_output, input) if weight is None else (grad_output, input, weight)
    to_output, to_input, *rest = pull_back(function, primals, tuple(cotangents))
    return to_output, to_input, rest[0] if rest else None


def normal_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    frozen: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::normal_norm_backward``; a gradient not asked for is an empty tensor."""
    config = Config(*arguments)
    check_backward(
        grad_output, input, stats, weight, bias, output, seed, needs_weight, needs_bias, config
    )
    if not needs_weight:  # the noise reaches no other gradient
        config = config._replace(noise_train=0.0)
    grad_output = through_activation(grad_output, output, config)
    found = gradients(grad_output, input, stats, weight, bias, seed, frozen, config)
    grad_input, grad_weight, grad_bias = (
        gradient if gradient is not None and needed else input.new_empty(0)
        for gradient, needed in zip(found, (needs_input, needs_weight, needs_bias), strict=True)
    )
    return _like_input(grad_input, input) if needs_input else grad_input, grad_weight, grad_bias


def add_normal_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::add_normal_norm_forward``; differentiable, since the definition is."""
    check_forward(input, _NONE, weight, bias, residual, seed, noise_scale, Config(*arguments))
    total = _like_input(input + residual, input)
    output, stats = normal_norm_forward(
        total, *_NONE, weight, bias, None, seed, noise_scale, *arguments
    )
    return output, total, stats


def add_normal_norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor,
    sum: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::add_normal_norm_backward``; a gradient not asked for is an empty tensor."""
    check_backward(
        grad_output, sum, stats, weight, bias, output, seed, needs_weight, needs_bias,
        Config(*arguments), grad_sum,
    )  # fmt: skip
    grad_input, *rest = normal_norm_backward(
        grad_output, sum, stats, weight, bias, output, seed, needs_input, needs_weight,
        needs_bias, False, *arguments,
    )  # fmt: skip
    if needs_input:
        dtype = statistics_dtype(sum.dtype)
        grad_input = _like_input((grad_input.to(dtype) + grad_sum.to(dtype)).to(sum.dtype), sum)
    return grad_input, *rest  # type: ignore[return-value]


def fold_running_(
    stats: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_lmbda: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    eps: float,
    backend: str,
) -> None:
    """``normnorm::fold_running_``: moves the running statistics towards a batch's, in place."""
    check_fold(
        stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps
    )
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    factor: float | Tensor
    if momentum is None:
        assert num_batches_tracked is not None  # check_fold saw to it
        factor = num_batches_tracked.double().reciprocal()
    else:
        factor = momentum
    move_running(stats, (running_mean, running_var, running_lmbda), factor, count, eps)


def move_running(
    stats: Tensor,
    running: tuple[Tensor, Tensor, Tensor],
    factor: float | Tensor,
    count: int | Tensor,
    eps: float,
) -> None:
    """Moves running mean, variance and lambda by ``factor`` of the way to the statistics of
    groups of ``count`` elements."""
    channels = running[0].size(0)
    mean, low, rstd, lmbda = (
        stats[row].double().reshape(-1, channels)
        for row in (Row.MEAN, Row.MEAN_LOW, Row.RSTD, Row.LMBDA)
    )
    biased = (rstd.reciprocal().square() - eps).clamp_min(0.0)
    batch = (mean + low, biased * (count / (count - 1)), lmbda)
    for buffer, value in zip(running, batch, strict=True):
        old = buffer.double()
        buffer.copy_(old + factor * (value.mean(0) - old))
