"""Gradients in eager mode, in the shape that costs least for what is asked.

* plain eager: :class:`_Eager`, an old-style ``autograd.Function`` over the backend's own ops;
* under torch.func transforms: :class:`_Functional`, one with ``setup_context`` and ``vmap``;
* in forward mode (torch.func.jvp, dual numbers): the definition in ``normnorm/reference.py``
  itself, whose forward derivatives nest in any order;
* while compiling: the registered op, whose gradient ``normnorm/ops.py`` registers; its form in
  ``normnorm/annealing.py`` once the weight of the noise has changed; or the definition where the
  reference backend is chosen, through which a compiler can fuse;
* under torch.jit.trace: the registered op too, one node of the graph.

Derivatives beyond the first come from the definition too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import relu

from normnorm import annealing, backends, ops
from normnorm.backends import reference
from normnorm.backends.reference import transforms_active
from normnorm.checks import check_residual
from normnorm.config import Config

__all__ = [
    "Running",
    "add_normal_norm",
    "decomposes",
    "forward_mode",
    "is_tracing",
    "normal_norm",
]

Running = tuple[Tensor | None, Tensor | None, Tensor | None]

# torch.jit.is_tracing() without its frame, for the host's time.
is_tracing = torch._C._is_tracing


def forward_mode() -> bool:
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
    residual: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    config: Config,
    keep_statistics: bool,
) -> tuple[Tensor, Tensor | None]:
    """The forward pass by ``config.backend``, differentiable in input, weight, bias and residual.

    Returns:
        (output, statistics); the statistics, never differentiable, may be None unless
        ``keep_statistics`` asks for them.
    """
    arguments = (input, *running, weight, bias, residual, seed, noise_scale, config)
    if torch.compiler.is_compiling():
        if decomposes(config) or transforms_active() or forward_mode():
            return reference.normal_norm_forward(*_flat(arguments))
        if annealing.is_symbolic(config.noise_train):
            return annealing.normal_norm_forward(*_flat(_annealed(arguments)))
        return ops.normal_norm_forward(*_flat(arguments))
    if forward_mode():
        return reference.normal_norm_forward(*_flat(arguments))
    if transforms_active():
        return _under_transforms(arguments)
    if is_tracing():  # which has no node for what an old-style Function holds
        if torch.onnx.is_in_onnx_export():
            return reference.normal_norm_forward(*_flat(arguments))
        return ops.normal_norm_forward(*_flat(arguments))
    if torch.is_grad_enabled() and (
        input.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        if residual is None and config.activation == "":
            return _Eager.apply(input, weight, bias, arguments)
        return _EagerActivated.apply(input, weight, bias, residual, arguments)
    backend = backends.get(config.backend)
    if keep_statistics or config.noise_train > 0.0:
        return backend.forward(*_flat(arguments))
    return backend.infer(input, *running, weight, bias, residual, *config.for_infer()), None


def add_normal_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    config: Config,
) -> tuple[Tensor, Tensor]:
    """Adds the residual, then normalizes: (output, sum), both differentiable."""
    arguments = (input, residual, weight, bias, seed, None, config)
    if not torch.compiler.is_compiling():
        if not (forward_mode() or transforms_active() or is_tracing()):
            if torch.is_grad_enabled() and any(
                t is not None and t.requires_grad for t in arguments[:4]
            ):
                return _EagerAdd.apply(*arguments[:4], arguments)
            return backends.get(config.backend).add_forward(*_flat(arguments))[:2]
    elif not (
        decomposes(config)
        or transforms_active()
        or forward_mode()
        or annealing.is_symbolic(config.noise_train)
    ):
        return ops.add_normal_norm_forward(*_flat(arguments))[:2]
    total = input + residual
    running: Running = (None, None, None)
    output, _ = normal_norm(total, running, weight, bias, None, seed, None, config, False)
    return output, total


def _flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The op's argument list: the configuration flat."""
    return (*arguments[:-1], *arguments[-1])


def _annealed(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with the weight of the noise as a tensor."""
    config = arguments[-1]
    noise_train: Any = annealing.as_tensor(config.noise_train)
    return (*arguments[:-1], config._replace(noise_train=noise_train))


def _under_transforms(arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """The op, then what it would have joined to itself, each differentiated on its own."""
    *before, residual, seed, noise_scale, config = arguments
    plain = config._replace(activation="")
    output, stats = _Functional.apply(*before, seed, noise_scale, plain)
    if residual is not None:
        check_residual(before[0], residual)
        output = output + residual
    return relu(output) if config.activation else output, stats


def _gradients(
    ctx: Any, tensors: tuple[Any, ...], needs: tuple[bool, ...], config: Config
) -> tuple[Any, ...]:
    """(grad_input, grad_weight, grad_bias) of a forward Function, None where not needed.

    ``tensors`` are grad_output, input, stats, weight, bias, output and seed.
    """
    gradients: tuple[Any, ...]
    if forward_mode():
        grad_output, input, stats, weight, bias, output, seed = tensors
        grad_output = reference.through_activation(grad_output, output, config)
        gradients = reference.gradients(
            grad_output, input, stats, weight, bias, seed, ctx.frozen, config
        )
    elif torch.is_grad_enabled() or transforms_active():
        # Somebody may differentiate this backward pass, or vmap it.
        gradients = _Gradient.apply(*tensors, needs, ctx.frozen, config)
    else:
        gradients = backends.get(config.backend).backward(*tensors, *needs, ctx.frozen, *config)
    return (
        gradients[0] if needs[0] else None,
        gradients[1] if needs[1] else None,
        gradients[2] if needs[2] else None,
    )


def _save(ctx: Any, arguments: tuple[Any, ...], stats: Tensor, activated: Tensor | None) -> None:
    input, running_mean, _, _, weight, bias, _, seed, _, config = arguments
    ctx.save_for_backward(input, stats, weight, bias, activated, seed)
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.frozen = running_mean is not None
    ctx.config = config
    ctx.seed = seed


def _check_same_seed(saved: Tensor, drawn: Tensor) -> None:
    """That activation checkpointing, which gives back what its second run of the forward pass has
    saved, drew in it the seed of the first; without waiting for a device."""
    torch._assert_async(
        saved == drawn,
        "activation checkpointing ran a normality layer again with other noise: leave "
        "preserve_rng_state True, or set the layer's noise_train to 0",
    )


class _Eager(torch.autograd.Function):
    """The backend's forward and backward, one Python frame each."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None, arguments: Any
    ) -> tuple[Tensor, Tensor]:
        # ``arguments`` is the whole list; the three that may carry gradients stand apart, since
        # every argument of a Function costs host time.
        output, stats = backends.get(arguments[-1].backend).forward(*_flat(arguments))
        _save(ctx, arguments, stats, None)
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        if grad_output is None:
            return None, None, None, None
        tensors = (grad_output, *ctx.saved_tensors)
        if tensors[-1] is not ctx.seed:
            _check_same_seed(tensors[-1], ctx.seed)
        return *_gradients(ctx, tensors, ctx.needs_input_grad[:3], ctx.config), None


class _EagerActivated(torch.autograd.Function):
    """The same with a residual or an activation. The output is kept for the sign that an
    activation's gradient needs: whatever reads the output next mostly keeps it as well, and with
    noise the sign could only be had by computing the whole output again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, arguments: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        config = arguments[-1]
        output, stats = backends.get(config.backend).forward(*_flat(arguments))
        _save(ctx, arguments, stats, output if config.activation else None)
        return output, stats

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        if grad_output is None:
            return None, None, None, None, None
        *saved, activated, seed = ctx.saved_tensors
        if seed is not ctx.seed:
            _check_same_seed(seed, ctx.seed)
        config, grad_residual = ctx.config, None
        if ctx.needs_input_grad[3]:  # and then nothing is left of the activation for the kernel
            grad_output = reference.through_activation(grad_output, activated, config)
            grad_residual, activated, config = grad_output, None, config._replace(activation="")
        tensors = (grad_output, *saved, activated, seed)
        return (
            *_gradients(ctx, tensors, ctx.needs_input_grad[:3], config), grad_residual, None
        )  # fmt: skip


class _EagerAdd(torch.autograd.Function):
    """The sum of input and residual, normalized; its gradient joins that of the output."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None,
        arguments: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        config = arguments[-1]
        output, total, stats = backends.get(config.backend).add_forward(*_flat(arguments))
        activated = output if config.activation else None
        ctx.save_for_backward(total, stats, weight, bias, activated, arguments[4])
        ctx.set_materialize_grads(False)
        ctx.frozen = False
        ctx.config = config
        ctx.seed = arguments[4]
        return output, total

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None
    ) -> Any:
        of_input, of_residual, *of_parameters, _ = ctx.needs_input_grad
        if grad_output is None:
            return grad_sum, grad_sum, None, None, None
        needs = (of_input or of_residual, *of_parameters)
        config, tensors = ctx.config, (grad_output, *ctx.saved_tensors)
        if tensors[-1] is not ctx.seed:
            _check_same_seed(tensors[-1], ctx.seed)
        nested = torch.is_grad_enabled() or transforms_active() or forward_mode()
        if grad_sum is None or nested or not needs[0]:
            grad, grad_weight, grad_bias = _gradients(ctx, tensors, needs, config)
            if grad is not None and grad_sum is not None:
                grad = grad + grad_sum
        else:
            grad, *found = backends.get(config.backend).add_backward(
                grad_output, grad_sum, *ctx.saved_tensors, *needs, *config
            )
            grad_weight, grad_bias = (
                gradient if needed else None
                for gradient, needed in zip(found, of_parameters, strict=True)
            )
        return (
            grad if of_input else None, grad if of_residual else None, grad_weight, grad_bias, None
        )  # fmt: skip


class _Functional(torch.autograd.Function):
    """The registered op, for torch.func transforms."""

    # Where input, weight and bias stand among the arguments.
    _differentiable = (0, 4, 5)

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        *tensors, seed, noise_scale, config = arguments
        return ops.normal_norm_forward(*tensors, None, seed, noise_scale, *config)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *before, seed, noise_scale, config = inputs
        _save(ctx, (*before, None, seed, noise_scale, config), output[1], None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: Any) -> Any:  # type: ignore[override]
        results: list[Any] = [None] * len(ctx.needs_input_grad)
        if grad_output is not None:
            needs = tuple(ctx.needs_input_grad[i] for i in _Functional._differentiable)
            found = _gradients(ctx, (grad_output, *ctx.saved_tensors), needs, ctx.config)
            for i, gradient in zip(_Functional._differentiable, found, strict=True):
                results[i] = gradient
        return tuple(results)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, config = arguments

        def definition(*one: Any) -> Any:
            *before, seed, noise_scale = one
            return reference.normal_norm_forward(*before, None, seed, noise_scale, *config)

        return _vmap_definition(definition, info, in_dims[:-1], tuple(tensors))


class _Gradient(torch.autograd.Function):
    """The backward pass as a function that can itself be differentiated."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        *tensors, needs, frozen, config = arguments
        return ops.normal_norm_backward(*tensors, *needs, frozen, *config)

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
        return to_output, to_input, None, to_weight, None, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:  # type: ignore[override]
        *tensors, needs, frozen, config = arguments

        def definition(*one: Any) -> Any:
            return reference.normal_norm_backward(*one, *needs, frozen, *config)

        return _vmap_definition(definition, info, in_dims[:7], tuple(tensors))


def _vmap_definition(
    definition: Callable[..., Any], info: Any, in_dims: Any, tensors: tuple[Any, ...]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A vmap rule: the definition, vmapped, exact whichever arguments are batched."""
    results = torch.vmap(definition, in_dims, 0, randomness=info.randomness)(*tensors)
    return results, (0,) * len(results)
