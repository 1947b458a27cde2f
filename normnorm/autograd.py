"""Gradients in eager mode, in the shape that costs least for what is asked.

* plain eager: :class:`_Eager`, an old-style ``autograd.Function`` over the backend's own ops;
* under torch.func transforms or forward-mode AD: :class:`_Functional`, one with
  ``setup_context``, ``vmap`` and ``jvp``;
* while compiling: the registered op, whose gradient ``normnorm/ops.py`` registers, or the
  definition itself where the reference backend is chosen, through which a compiler can fuse.

Derivatives beyond the first, and forward-mode ones, come from the definition in
``normnorm/reference.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normnorm import backends, ops
from normnorm.backends import reference
from normnorm.config import Config

__all__ = ["normal_norm", "transforms_active"]

Running = tuple[Tensor | None, Tensor | None, Tensor | None]

# Where input, weight and bias stand among the arguments of _Functional.
_INPUT, _WEIGHT, _BIAS, _ARGUMENTS = 0, 4, 5, 9


def transforms_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._are_functorch_transforms_active()


def normal_norm(
    input: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    config: Config,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass by ``config.backend``, differentiable in input, weight and bias.

    Returns:
        (output, statistics); the statistics, never differentiable, may be None unless
        ``keep_statistics`` asks for them.
    """
    arguments = (input, *running, weight, bias, seed, noise_scale, config)
    if torch.compiler.is_compiling():
        if config.backend == "reference":
            return reference.normal_norm_forward(*_with_residual(*arguments))
        return ops.normal_norm_forward(*_with_residual(*arguments))
    if transforms_active() or forward_ad._current_level >= 0:
        return _Functional.apply(*arguments)
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        return _Eager.apply(input, weight, bias, arguments)
    backend = backends.get(config.backend)
    if keep_statistics or config.noise_train > 0.0:
        return backend.forward(*_with_residual(*arguments))
    return backend.infer(input, *running, weight, bias, None, *config.for_infer()), None


def _with_residual(*arguments: Any) -> tuple[Any, ...]:
    """The op's argument list from the Functions': the reserved residual in its place, the
    configuration flat."""
    *tensors, seed, noise_scale, config = arguments
    return (*tensors, None, seed, noise_scale, *config)


def _with_gradients(grad_input: Any, grad_weight: Any, grad_bias: Any) -> tuple[Any, ...]:
    """What a forward Function's backward returns: a gradient or None for every argument."""
    gradients = [None] * _ARGUMENTS
    gradients[_INPUT], gradients[_WEIGHT], gradients[_BIAS] = grad_input, grad_weight, grad_bias
    return tuple(gradients)


def _save(ctx: Any, arguments: tuple[Any, ...], stats: Tensor) -> None:
    input, running_mean, _, _, weight, bias, seed, _, config = arguments
    ctx.save_for_backward(input, stats, weight, bias, seed)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.frozen = running_mean is not None
    ctx.config = config


class _Eager(torch.autograd.Function):
    """The backend's forward and backward, one Python frame each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, arguments: Any
    ) -> tuple[Tensor, Tensor]:
        # ``arguments`` is the whole list; the three that may carry gradients stand apart, since
        # every argument of a Function costs host time.
        output, stats = backends.get(arguments[-1].backend).forward(*_with_residual(*arguments))
        _save(ctx, arguments, stats)
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        if grad_output is None:
            return None, None, None, None
        input, stats, weight, bias, seed = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # somebody will differentiate this backward pass
            gradients = _Gradient.apply(
                grad_output, input, stats, weight, bias, seed, needs, ctx.frozen, ctx.config
            )
        else:
            gradients = backends.get(ctx.config.backend).backward(
                grad_output, input, stats, weight, bias, None, seed, *needs, ctx.frozen,
                *ctx.config,
            )  # fmt: skip
        return (
            gradients[0] if needs[0] else None,
            gradients[1] if needs[1] else None,
            gradients[2] if needs[2] else None,
            None,
        )


class _Functional(torch.autograd.Function):
    """The registered op, for torch.func transforms and forward-mode AD."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return ops.normal_norm_forward(*_with_residual(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output[1])
        input, _, _, _, weight, bias, seed, _, _ = inputs
        ctx.save_for_forward(input, output[1], weight, bias, seed)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        if grad_output is None:
            return (None,) * _ARGUMENTS
        input, stats, weight, bias, seed = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[i] for i in (_INPUT, _WEIGHT, _BIAS))
        gradients = _Gradient.apply(
            grad_output, input, stats, weight, bias, seed, needs, ctx.frozen, ctx.config
        )
        return _with_gradients(
            *(g if needed else None for g, needed in zip(gradients, needs, strict=True))
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, None]:  # type: ignore[override]
        input, stats, weight, bias, seed = ctx.saved_tensors
        parameters = {"weight": weight, "bias": bias}
        given = [name for name, parameter in parameters.items() if parameter is not None]

        def function(x: Tensor, *moving: Tensor) -> Tensor:
            moved = {**parameters, **dict(zip(given, moving, strict=True))}
            return reference.definition(
                x, stats, moved["weight"], moved["bias"], seed, ctx.frozen, ctx.config
            )

        primals = (input, *(parameters[name] for name in given))
        moving = {"weight": tangents[_WEIGHT], "bias": tangents[_BIAS]}
        directions = (tangents[_INPUT], *(moving[name] for name in given))
        return _push_forward(function, primals, directions, input), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, config = arguments

        def definition(*one: Any) -> Any:
            return reference.normal_norm_forward(*_with_residual(*one, config))

        return _vmap_definition(definition, info, in_dims[:-1], tuple(tensors))


def _vmap_definition(
    definition: Callable[..., Any], info: Any, in_dims: Any, tensors: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule: the definition, vmapped, exact whichever arguments are batched."""
    results = torch.vmap(definition, in_dims, 0, randomness=info.randomness)(*tensors)
    return results, (0,) * len(results)


def _push_forward(
    function: Callable[..., Any], primals: tuple[Tensor, ...], tangents: Any, output_like: Any
) -> Any:
    """J t by two reverse passes (the pull-back is linear in its cotangent), since forward-mode
    levels do not nest outside torch.func."""

    def pull_back(cotangent: Any) -> Any:
        return torch.func.vjp(function, *primals)[1](cotangent)

    start = torch.utils._pytree.tree_map(torch.zeros_like, output_like)
    _, push = torch.func.vjp(pull_back, start)
    return push(
        tuple(
            torch.zeros_like(primal) if tangent is None else tangent
            for primal, tangent in zip(primals, tangents, strict=True)
        )
    )[0]


class _Gradient(torch.autograd.Function):
    """The backward pass as a function that can itself be differentiated."""

    @staticmethod
    def forward(  # type: ignore[override]
        grad_output: Tensor,
        input: Tensor,
        stats: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        seed: Tensor | None,
        needs: tuple[bool, bool, bool],
        frozen: bool,
        config: Config,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return ops.normal_norm_backward(
            grad_output, input, stats, weight, bias, None, seed, *needs, frozen, *config
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, needs, frozen, config = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.needs, ctx.frozen, ctx.config = needs, frozen, config

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:  # type: ignore[override]
        function, primals, likes = _Gradient._definition(ctx)
        asked = [d for d, needed in zip(directions, ctx.needs, strict=True) if needed]
        cotangents = tuple(
            torch.zeros_like(like) if direction is None else direction
            for direction, like in zip(asked, likes, strict=True)
        )
        grad_output, grad_input, *rest = torch.func.vjp(function, *primals)[1](cotangents)
        return grad_output, grad_input, None, rest[0] if rest else None, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:  # type: ignore[override]
        function, primals, likes = _Gradient._definition(ctx)
        directions = (tangents[0], tangents[1], tangents[3])[: len(primals)]
        results = iter(_push_forward(function, primals, directions, likes))
        return tuple(next(results) if needed else None for needed in ctx.needs)

    @staticmethod
    def _definition(ctx: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The gradients asked for as a function of (grad_output, input[, weight]), the point
        at which to take it, and tensors of its results' shapes."""
        grad_output, input, stats, weight, bias, seed = ctx.saved_tensors
        asked = [i for i, needed in enumerate(ctx.needs) if needed]

        def function(g: Tensor, x: Tensor, w: Tensor | None = None) -> tuple[Any, ...]:
            gradients = reference.gradients(g, x, stats, w, bias, seed, ctx.frozen, ctx.config)
            return tuple(gradients[i] for i in asked)

        primals = (grad_output, input) if weight is None else (grad_output, input, weight)
        return function, primals, tuple((input, weight, bias)[i] for i in asked)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, needs, frozen, config = arguments

        def definition(*one: Any) -> Any:
            *primals, seed = one
            return reference.normal_norm_backward(*primals, None, seed, *needs, frozen, *config)

        return _vmap_definition(definition, info, in_dims[:6], tuple(tensors))
