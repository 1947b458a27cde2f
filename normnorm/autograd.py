"""Gradients: one rule for each pass, in the form with the least overhead for each mode.

* plain eager: :class:`_Eager`, an old-style ``autograd.Function``, which takes a third less host
  time than a new-style one, and calls the backend's own ops (:func:`normnorm.ops.run_step`);
* torch.func transforms: :class:`_Functional` and :class:`_Gradient`, new-style with ``vmap``;
* compiling and torch.jit.trace: the registered op, one node of the graph, with its gradient; once
  ``noise_train`` has changed, the overload in ``normnorm/annealing.py``;
* forward mode (torch.func.jvp, dual numbers), and compiling under a transform: the definition in
  ``normnorm/reference.py``, whose derivatives nest in any order. With the reference backend a
  compiler traces the definition too, and can fuse it.

Derivatives beyond the first come from the definition on every backend.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import annealing, ops
from .backends import reference
from .backends.reference import transforms_active
from .config import BackwardArguments, Config, ForwardArguments
from .namespace import NAMESPACE, OPS
from .noise import draw_seed
from .ops import Results, Update

Running = tuple[Tensor | None, Tensor | None, Tensor | None]

# torch.jit.is_tracing() without its Python frame, to save host time.
is_tracing = torch._C._is_tracing


def forward_mode() -> bool:
    """Whether forward-mode derivatives are being taken."""
    return forward_ad._current_level >= 0


def decomposes(config: Config) -> bool:
    """Whether the definition (PyTorch's own operations) is traced instead of the op: by a compiler
    with the reference backend, and in an export to ONNX, which has no such op."""
    compiled = torch.compiler.is_compiling() and config.backend == "reference"
    return compiled or torch.onnx.is_in_onnx_export()


def normal_norm(
    tensors: tuple[Any, ...], config: Config, prenorm: bool = False, update: Update | None = None
) -> tuple[Tensor, Tensor | None]:
    """The forward pass by ``config.backend``, differentiable in input, weight, bias and residual.

    Args:
        tensors: fields ``input`` to ``noise_scale`` of :class:`normnorm.config.ForwardArguments`.
            If noise needs a seed, None draws one.
        config, prenorm: the fields of the same names.
        update: the running statistics to update, or None.

    Returns:
        (output, sum); the sum is None or an empty tensor without ``prenorm``.
    """
    input, _, _, _, weight, bias, residual, seed, _ = tensors
    compiling = torch.compiler.is_compiling()
    if not (compiling or forward_ad._current_level >= 0 or transforms_active() or is_tracing()):
        if torch.is_grad_enabled() and (
            input.requires_grad
            or (weight is not None and weight.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (residual is not None and residual.requires_grad)
        ):
            return _apply_eager(input, weight, bias, residual, (tensors, update, prenorm, config))
        output, _, sum, _ = ops.run_step(tensors, update, prenorm, False, config)
        return output, sum
    if seed is None and config.noise_train > 0.0:
        tensors = (*tensors[:7], draw_seed(input.device), tensors[8])
    results = _other_mode((*tensors, prenorm, True, *config), config)
    if update is not None:
        arguments = ops.fold_arguments(results[1], update, input, config)
        transformed = transforms_active()
        if compiling and not transformed and decomposes(config):
            reference.fold_running_(*arguments)
        elif compiling or transformed or is_tracing():
            ops.fold_running_(*arguments)
        else:
            ops.run_fold(arguments)
    return results[0], results[2]


def _other_mode(arguments: tuple[Any, ...], config: Config) -> Results:
    """The op, or the definition, for compilers, transforms, forward mode and tracers."""
    compiling, transformed = torch.compiler.is_compiling(), transforms_active()
    if decomposes(config) or forward_mode() or (compiling and transformed):
        return reference.normal_norm_forward(*arguments)
    if transformed:
        return _Functional.apply(*arguments)
    if compiling and annealing.is_symbolic(config.noise_train):
        return annealing.normal_norm_forward(*annealing.with_tensor(arguments))
    # Also under torch.jit.trace, which has no node for an old-style Function.
    return ops.normal_norm_forward(*arguments)  # type: ignore[no-any-return]


# The gradient of the forward pass.


def _save(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
    """Saves the tensors and settings of a forward pass for :func:`_gradients`."""
    call = ForwardArguments.of(*inputs)
    result, stats, sum = output
    # With an activation the output is saved, for its sign: with noise, recomputing the sign means
    # recomputing the output. The next layer usually saves the same tensor.
    activated = result if call.config.activation else None
    normalized, kept = sum if call.prenorm else call.input, stats if call.keep_stats else None
    ctx.save_for_backward(normalized, kept, call.weight, call.bias, activated, call.seed)
    ctx.mark_non_differentiable(stats, *([] if call.prenorm else [sum]))
    ctx.set_materialize_grads(False)
    ctx.frozen, ctx.prenorm, ctx.config = call.running_mean is not None, call.prenorm, call.config


def _gradients(
    ctx: Any, saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...],
    backward: Callable[..., Any],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients of input, weight, bias and residual; None if ``needs`` is False for one.

    ``saved``: the saved tensors of ``ctx``, which :func:`_save` filled. ``grads``: those of output,
    statistics and sum. ``backward(tensors, switches, config)`` runs ``normal_norm_backward``.
    """
    grad_output, _, grad_sum = grads
    if grad_output is None:
        return grad_sum, None, None, grad_sum
    input, stats, weight, bias, output, seed = saved
    if stats is None:
        raise RuntimeError(
            "normal_norm_forward keeps nothing for a backward pass with keep_stats=False"
        )
    needs_input, needs_weight, needs_bias, needs_residual = needs
    config: Config = ctx.config
    grad_residual = None
    if ctx.prenorm:
        needs_input = needs_input or needs_residual
    elif needs_residual:  # its gradient is that of the activation's input
        grad_output = grad_residual = reference.through_activation(grad_output, output, config)
        output, config = None, config._replace(activation="")
    grad_input, grad_weight, grad_bias = backward(
        (grad_output, input, stats, weight, bias, output, seed, grad_sum),
        (needs_input, needs_weight, needs_bias, ctx.frozen), config,
    )  # fmt: skip
    grad_input = grad_input if needs_input else None
    return (
        grad_input,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
        grad_input if ctx.prenorm else grad_residual,
    )


def _flat_gradients(
    ctx: Any, grads: tuple[Tensor | None, ...], backward: Callable[..., Any]
) -> tuple[Tensor | None, ...]:
    """The gradients of all arguments of ``normal_norm_forward``."""
    n = ctx.needs_input_grad
    found = _gradients(ctx, ctx.saved_tensors, grads, (n[0], n[4], n[5], n[6]), backward)
    return (found[0], None, None, None, *found[1:], *(None,) * (len(n) - 7))


# The gradient of the backward pass.


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, grad_sum = inputs[:8]
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)
    ctx.adds = grad_sum is not None
    ctx.rest = inputs[8:]


def _differentiate_backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
    call = BackwardArguments.of(*ctx.saved_tensors, None, *ctx.rest)
    to_output, to_input, to_weight = reference.second_gradients(directions, call)
    to_sum = directions[0] if ctx.adds else None
    return to_output, to_input, None, to_weight, None, None, None, to_sum, *(None,) * len(ctx.rest)


# The autograd Functions and rules: eager mode, torch.func, compiled graphs.


def _backward(
    tensors: tuple[Any, ...], switches: tuple[bool, ...], config: Config
) -> tuple[Tensor, ...]:
    """``normal_norm_backward`` outside of compiled graphs."""
    if forward_mode():
        return reference.normal_norm_backward(*tensors, *switches, *config)
    if torch.is_grad_enabled() or transforms_active():
        # This backward pass may be differentiated, or vmapped.
        return _Gradient.apply(*tensors, *switches, *config)
    return ops.run_gradient(tensors, switches, config)


class _Eager(torch.autograd.Function):
    """The forward and backward pass in plain eager mode, by the backend's own ops."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, input: Tensor, weight: Tensor | None, bias: Tensor | None,
        residual: Tensor | None, call: tuple[Any, ...],
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        # ``call`` has all arguments. Only the four tensors that may need gradients are also
        # arguments of the Function, because each one costs host time.
        tensors, update, prenorm, config = call
        for saved in (None if prenorm else input, weight, bias, tensors[7]):
            # save_for_backward() raises too, but after the running statistics have been updated.
            if saved is not None and saved.is_inference():
                raise RuntimeError(
                    "an inference tensor cannot be saved for the backward pass; clone it, or make "
                    "it under torch.no_grad() instead of torch.inference_mode()"
                )
        output, stats, sum, seed = ops.run_step(tensors, update, prenorm, True, config)
        activated = output if config.activation else None
        normalized = sum if prenorm else input
        ctx.save_for_backward(normalized, stats, weight, bias, activated, seed)
        ctx.set_materialize_grads(False)
        ctx.frozen, ctx.prenorm, ctx.config = tensors[1] is not None, prenorm, config
        ctx.seed = seed
        return output, sum if prenorm else None

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_output: Tensor | None, grad_sum: Tensor | None
    ) -> Any:
        saved = ctx.saved_tensors
        seed = saved[5]
        if seed is not ctx.seed:
            # Activation checkpointing returns the tensors saved by its second forward pass.
            torch._assert_async(  # does not synchronize with the device
                seed == ctx.seed,
                "activation checkpointing ran a normality layer again with other noise: leave "
                "preserve_rng_state True, or set the layer's noise_train to 0",
            )
        grads = (grad_output, None, grad_sum)
        return *_gradients(ctx, saved, grads, ctx.needs_input_grad[:4], _backward), None


def _vmap(definition: Callable[..., Any]) -> Any:
    """The vmap rule of a pass: vmaps the definition in PyTorch."""

    def rule(info: Any, in_dims: Any, *arguments: Any) -> tuple[Any, tuple[int, ...]]:
        results = torch.vmap(definition, in_dims, 0, randomness=info.randomness)(*arguments)
        return results, (0,) * len(results)

    return staticmethod(rule)


# The C++ base class's ``apply`` takes half the host time: it skips the checks for torch.func
# transforms, which normal_norm() has already made. It is private to torch, hence the default.
_apply_eager = getattr(super(torch.autograd.Function, _Eager), "apply", _Eager.apply)


class _Functional(torch.autograd.Function):
    """``normal_norm_forward`` for torch.func transforms."""

    @staticmethod
    def forward(*arguments: Any) -> Results:  # type: ignore[override]
        return ops.normal_norm_forward(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)
    vmap = _vmap(reference.normal_norm_forward)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:  # type: ignore[override]
        return _flat_gradients(ctx, grads, _backward)


class _Gradient(torch.autograd.Function):
    """``normal_norm_backward`` as a function that can itself be differentiated."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:  # type: ignore[override]
        return ops.normal_norm_backward(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save_backward)
    backward = staticmethod(_differentiate_backward)
    vmap = _vmap(reference.normal_norm_backward)


def _register(library: torch.library.Library, overload: str) -> None:
    """Registers the gradients of one overload of the forward and the backward op."""
    suffix = "" if overload == "default" else f".{overload}"
    op = getattr(OPS.normal_norm_backward, overload)

    def backward(tensors: tuple[Any, ...], switches: tuple[bool, ...], config: Config) -> Any:
        return op(*tensors, *switches, *config)

    def differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _flat_gradients(ctx, grads, backward)

    for name, gradient, setup_context in (
        ("normal_norm_forward", differentiate, _save),
        ("normal_norm_backward", _differentiate_backward, _save_backward),
    ):
        torch.library.register_autograd(
            f"{NAMESPACE}::{name}{suffix}", gradient, setup_context=setup_context, lib=library
        )


_register(ops.library, "default")
_register(annealing.library, "annealed")
