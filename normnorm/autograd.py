"""Gradients in eager mode, in the shape that costs least for what is asked.

* plain eager: :class:`_Eager`, an old-style ``autograd.Function`` over the backend's own ops;
* under torch.func transforms: :class:`_Functional`, one with ``setup_context`` and ``vmap``;
* in forward mode (torch.func.jvp, dual numbers): the definition in ``normnorm/reference.py``
  itself, whose forward derivatives nest in any order;
* while compiling: the registered op, whose gradient ``normnorm/ops.py`` registers; its form in
  ``normnorm/annealing.py`` once the weight of the noise has changed; or the definition where the
  reference backend is chosen, through which a compiler can fuse.

Derivatives beyond the first come from the definition too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normnorm import annealing, backends, ops
from normnorm.backends import reference
from normnorm.backends.reference import transforms_active
from normnorm.config import Config

__all__ = ["Running", "decomposes", "normal_norm"]

Running = tuple[Tensor | None, Tensor | None, Tensor | None]


def _forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return forward_ad._current_level >= 0


def decomposes(config: Config) -> bool:
    """Whether a compiler is to see the definition, PyTorch's own operations, in place of the op:
    where the reference backend is chosen, and in an export to ONNX, which has no such op."""
    return config.backend == "reference" or torch.onnx.is_in_onnx_export()


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
        if decomposes(config) or transforms_active() or _forward_mode():
            return reference.normal_norm_forward(*_with_residual(*arguments))
        if annealing.is_symbolic(config.noise_train):
            noise_train: Any = annealing.as_tensor(config.noise_train)
            arguments = (*arguments[:-1], config._replace(noise_train=noise_train))
            return annealing.normal_norm_forward(*_with_residual(*arguments))
        return ops.normal_norm_forward(*_with_residual(*arguments))
    if _forward_mode():
        return reference.normal_norm_forward(*_with_residual(*arguments))
    if transforms_active():
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


def _save(ctx: Any, arguments: tuple[Any, ...], stats: Tensor) -> None:
    input, running_mean, _, _, weight, bias, seed, _, config = arguments
    ctx.save_for_backward(input, stats, weight, bias, seed)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.frozen = running_mean is not None
    ctx.config = config


def _gradients(ctx: Any, grad_output: Tensor, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """(grad_input, grad_weight, grad_bias) of a forward Function, None where not needed."""
    input, stats, weight, bias, seed = ctx.saved_tensors
    arguments = (grad_output, input, stats, weight, bias, seed)
    gradients: tuple[Any, ...]
    if _forward_mode():
        gradients = reference.gradients(*arguments, ctx.frozen, ctx.config)
    elif torch.is_grad_enabled() or transforms_active():
        # Somebody may differentiate this backward pass, or vmap it.
        gradients = _Gradient.apply(*arguments, needs, ctx.frozen, ctx.config)
    else:
        gradients = backends.get(ctx.config.backend).backward(
            grad_output, input, stats, weight, bias, None, seed, *needs, ctx.frozen, *ctx.config
        )
    return (
        gradients[0] if needs[0] else None,
        gradients[1] if needs[1] else None,
        gradients[2] if needs[2] else None,
    )


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
        return *_gradients(ctx, grad_output, ctx.needs_input_grad[:3]), None


class _Functional(torch.autograd.Function):
    """The registered op, for torch.func transforms."""

    # Where input, weight and bias stand among the arguments.
    _differentiable = (0, 4, 5)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return ops.normal_norm_forward(*_with_residual(*arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        _save(ctx, inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        results: list[Any] = [None] * len(ctx.needs_input_grad)
        if grad_output is not None:
            needs = tuple(ctx.needs_input_grad[i] for i in _Functional._differentiable)
            found = _gradients(ctx, grad_output, needs)
            for i, gradient in zip(_Functional._differentiable, found, strict=True):
                results[i] = gradient
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, config = arguments

        def definition(*one: Any) -> Any:
            return reference.normal_norm_forward(*_with_residual(*one, config))

        return _vmap_definition(definition, info, in_dims[:-1], tuple(tensors))


class _Gradient(torch.autograd.Function):
    """The backward pass as a function that can itself be differentiated."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        *tensors, seed, needs, frozen, config = arguments
        return ops.normal_norm_backward(*tensors, None, seed, *needs, frozen, *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.needs, ctx.frozen, ctx.config = inputs
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *directions: Tensor | None) -> Any:  # type: ignore[override]
        to_output, to_input, to_weight = reference.second_gradients(
            directions, ctx.saved_tensors, ctx.needs, ctx.frozen, ctx.config
        )
        return to_output, to_input, None, to_weight, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, needs, frozen, config = arguments

        def definition(*one: Any) -> Any:
            *primals, seed = one
            return reference.normal_norm_backward(*primals, None, seed, *needs, frozen, *config)

        return _vmap_definition(definition, info, in_dims[:6], tuple(tensors))


def _vmap_definition(
    definition: Callable[..., Any], info: Any, in_dims: Any, tensors: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule: the definition, vmapped, exact whichever arguments are batched."""
    results = torch.vmap(definition, in_dims, 0, randomness=info.randomness)(*tensors)
    return results, (0,) * len(results)
