"""The ops by the definition in ``normnorm/reference.py``: any floating dtype, and any
device that has float64.

The backward pass is the definition's own derivative, taken by automatic differentiation, so
that it shares no formula with the compiled backends it is the oracle of.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..checks import check_backward, check_fold, check_forward
from ..config import BackwardArguments, Config, ForwardArguments
from ..reference import normal_norm, pack_running
from ..statistics import Row, statistics_dtype


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
        # Adding zeros that require a gradient makes a copy that requires one even if the primal
        # does not, runs none of the primal's hooks, and keeps its forward-mode tangent.
        points = [primal + torch.zeros_like(primal).requires_grad_() for primal in primals]
        return torch.autograd.grad(
            function(*points), points, cotangents, create_graph=differentiable,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip


def normal_norm_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::normal_norm_forward``; differentiable, since the definition is."""
    call = ForwardArguments.of(*arguments)
    check_forward(call)
    input, residual, config = call.input, call.residual, call.config
    sum = input.new_empty(0)
    if call.prenorm:
        assert residual is not None  # the checks saw to it
        input = sum = _like_input(input + residual, input)
        residual = None
    frozen, running = None, call[1:4]
    if call.running_mean is not None:
        dtype = statistics_dtype(input.dtype)
        frozen = pack_running(*running, config.eps, dtype)  # type: ignore[arg-type]
    output, stats = normal_norm(
        input, call.weight, call.bias, seed=call.seed, noise_scale=call.noise_scale, frozen=frozen,
        residual=residual, **_keywords(config),
    )  # fmt: skip
    return _like_input(output, input), stats if call.keep_stats else input.new_empty(0), sum


def through_activation(grad_output: Tensor, output: Tensor | None, config: Config) -> Tensor:
    """The gradient in front of the activation, which passes where the output is positive (or not
    a number, as torch has it); linear in ``grad_output`` and constant in ``output``."""
    if config.activation == "":
        return grad_output
    assert output is not None  # the checks saw to it
    return torch.ops.aten.threshold_backward(grad_output, output, 0)


def _gradients(call: BackwardArguments) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of input, weight and bias, None for absent parameters; differentiable again
    in grad_output, input and weight, which is the double backward of every backend."""
    present = [name for name in ("weight", "bias") if getattr(call, name) is not None]

    def function(input: Tensor, *parameters: Tensor) -> Tensor:
        # The forward pass up to its activation. The noise scale is the saved one, a constant by
        # definition, and so is every statistic of a frozen layer.
        keywords = _keywords(call.config._replace(activation=""))
        keywords.update(zip(present, parameters, strict=True))
        return normal_norm(
            input, seed=call.seed, noise_scale=call.stats.select(0, Row.NOISE_SCALE),
            frozen=call.stats if call.frozen else None, **keywords,
        )[0]  # fmt: skip

    primals = (call.input, *(getattr(call, name) for name in present))
    grad_output = through_activation(call.grad_output, call.output, call.config)
    grad_input, *rest = pull_back(function, primals, grad_output)
    found = dict(zip(present, rest, strict=True))
    return grad_input, found.get("weight"), found.get("bias")


def second_gradients(
    directions: tuple[Tensor | None, ...], call: BackwardArguments
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of ``normal_norm_backward`` in (grad_output, input, weight), pulled back
    along ``directions``, one for each of its results (None for zero)."""
    needs = (call.needs_input, call.needs_weight, call.needs_bias)
    asked = [i for i, needed in enumerate(needs) if needed]
    results = (call.input, call.weight, call.bias)
    cotangents = []
    for i in asked:
        like, direction = results[i], directions[i]
        assert like is not None  # a gradient was asked for, so the parameter was there
        cotangents.append(torch.zeros_like(like) if direction is None else direction)

    def function(grad_output: Tensor, input: Tensor, *weight: Tensor) -> tuple[Any, ...]:
        point = call._replace(grad_output=grad_output, input=input)
        found = _gradients(point._replace(weight=weight[0]) if weight else point)
        return tuple(found[i] for i in asked)

    weight = () if call.weight is None else (call.weight,)
    primals = (call.grad_output, call.input, *weight)
    to_output, to_input, *rest = pull_back(function, primals, tuple(cotangents))
    return to_output, to_input, rest[0] if rest else None


def normal_norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``normnorm::normal_norm_backward``; empty tensors for gradients that are not wanted."""
    call = BackwardArguments.of(*arguments)
    check_backward(call)
    if not call.needs_weight:  # the noise reaches no other gradient
        call = call._replace(config=call.config._replace(noise_train=0.0))
    input, grad_sum = call.input, call.grad_sum
    if grad_sum is not None:  # the sum of the gradients is rounded, not each of them
        dtype = statistics_dtype(input.dtype)
        call = call._replace(
            input=input.to(dtype), grad_output=call.grad_output.to(dtype),
            output=None if call.output is None else call.output.to(dtype),
        )  # fmt: skip
    grad_input, grad_weight, grad_bias = _gradients(call)
    if call.needs_input:
        if grad_sum is not None:
            grad_input = (grad_input + grad_sum).to(input.dtype)
        grad_input = _like_input(grad_input, input)
    return (
        grad_input if call.needs_input else input.new_empty(0),
        grad_weight if call.needs_weight and grad_weight is not None else input.new_empty(0),
        grad_bias if call.needs_bias and grad_bias is not None else input.new_empty(0),
    )


def fold_running_(*arguments: Any) -> None:
    """``normnorm::fold_running_``: moves the running statistics towards a batch's, in place."""
    stats, mean, var, lmbda, num_batches_tracked, momentum, count, eps = arguments[:8]
    check_fold(*arguments[:8])
    factor = count_batch(num_batches_tracked, momentum)
    move_running(stats, (mean, var, lmbda), factor, count, eps)


def count_batch(num_batches_tracked: Tensor | None, momentum: float | None) -> float | Tensor:
    """Counts a batch. Returns its weight in the running statistics."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if momentum is not None:
        return momentum
    assert num_batches_tracked is not None  # check_momentum saw to it
    return num_batches_tracked.double().reciprocal()


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
