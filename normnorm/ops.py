"""The ops: schemas for every backend, shape inference, and gradients for compiled graphs.

``torch.ops.normnorm.*`` are the public ops; they hand their arguments to the backend that
their last argument names. The same schemas are defined in a namespace a compiled backend
(``normnorm_cpu``, ...), which its library implements; eager code calls those directly, because
one more trip through the dispatcher would cost as much as a small kernel.

The layout of an op's arguments: tensors first, then the configuration in the order of
:class:`normnorm.config.Config`, the backend's name last.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normnorm import backends
from normnorm.backends import reference
from normnorm.checks import (
    check_backward,
    check_fold,
    check_forward,
    check_residual,
    group_count,
)
from normnorm.config import Config
from normnorm.statistics import Row, statistics_dtype

__all__ = [
    "FAKES",
    "SCHEMAS",
    "add_normal_norm_backward",
    "add_normal_norm_forward",
    "fold_running_",
    "normal_norm_backward",
    "normal_norm_forward",
    "normal_norm_infer",
    "register_gradients",
]


_GEOMETRY = "str kind, SymInt num_groups, int normalized_ndim, float eps"
_CONFIG = (
    f"{_GEOMETRY}, float noise_train, float alpha, int order, float transform_eps, "
    "int stream, bool channels_last, str activation, str backend"
)
_RUNNING = "Tensor? running_mean, Tensor? running_var, Tensor? running_lmbda"
_PARAMETERS = "Tensor? weight, Tensor? bias"
_NOISE = "Tensor? seed, Tensor? noise_scale"
_NEEDS = "bool needs_input, bool needs_weight, bool needs_bias"
_GRADIENTS = "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"

SCHEMAS = {
    "normal_norm_forward": (
        f"(Tensor input, {_RUNNING}, {_PARAMETERS}, Tensor? residual, {_NOISE}, {_CONFIG}) "
        "-> (Tensor output, Tensor stats)"
    ),
    "normal_norm_backward": (
        f"(Tensor grad_output, Tensor input, Tensor stats, {_PARAMETERS}, Tensor? output, "
        f"Tensor? seed, {_NEEDS}, bool frozen, {_CONFIG}) -> {_GRADIENTS}"
    ),
    "normal_norm_infer": (
        f"(Tensor input, {_RUNNING}, {_PARAMETERS}, Tensor? residual, {_GEOMETRY}, float alpha, "
        "int order, float transform_eps, str activation, str backend) -> Tensor"
    ),
    "add_normal_norm_forward": (
        f"(Tensor input, Tensor residual, {_PARAMETERS}, {_NOISE}, {_CONFIG}) "
        "-> (Tensor output, Tensor sum, Tensor stats)"
    ),
    "add_normal_norm_backward": (
        f"(Tensor grad_output, Tensor grad_sum, Tensor sum, Tensor stats, {_PARAMETERS}, "
        f"Tensor? output, Tensor? seed, {_NEEDS}, {_CONFIG}) -> {_GRADIENTS}"
    ),
    "fold_running_": (
        "(Tensor stats, Tensor(a!) running_mean, Tensor(b!) running_var, "
        "Tensor(c!) running_lmbda, Tensor(d!)? num_batches_tracked, float? momentum, "
        "SymInt count, float eps, str backend) -> ()"
    ),
}


# Shape inference, shared by the public ops and every compiled backend's.


def _fake_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    input, mean, var, lmbda, weight, bias, residual, seed, noise_scale, *rest = arguments
    config = Config(*rest)
    check_forward(
        input, (mean, var, lmbda), weight, bias, residual, seed, noise_scale, config
    )  # fmt: skip
    shape = (len(Row), group_count(input, config))
    stats = input.new_empty(shape, dtype=statistics_dtype(input.dtype))
    return torch.empty_like(input), stats


def _empty_gradients(
    like: tuple[Tensor, Tensor, Tensor], needs: tuple[bool, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    input, weight, bias = like
    return (
        torch.empty_like(input) if needs[0] else input.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else input.new_empty(0),
        bias.new_empty(bias.shape) if needs[2] else input.new_empty(0),
    )


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, input, stats, weight, bias, output, seed = arguments[:7]
    needs_input, needs_weight, needs_bias = arguments[7:10]
    check_backward(
        grad_output, input, stats, weight, bias, output, seed, needs_weight, needs_bias,
        Config(*arguments[11:]),
    )  # fmt: skip
    return _empty_gradients((input, weight, bias), (needs_input, needs_weight, needs_bias))


def _fake_add_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    input, residual, weight, bias, seed, noise_scale, *config = arguments
    check_residual(input, residual)
    output, stats = _fake_forward(
        input, None, None, None, weight, bias, residual, seed, noise_scale, *config
    )
    return output, torch.empty_like(input), stats


def _fake_add_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, grad_sum, sum, stats, weight, bias, output, seed = arguments[:8]
    needs_input, needs_weight, needs_bias = arguments[8:11]
    check_backward(
        grad_output, sum, stats, weight, bias, output, seed, needs_weight, needs_bias,
        Config(*arguments[11:]), grad_sum,
    )  # fmt: skip
    return _empty_gradients((sum, weight, bias), (needs_input, needs_weight, needs_bias))


def _fake_infer(*arguments: Any) -> Tensor:
    input, mean, var, lmbda, weight, bias, residual, *rest = arguments
    config = Config.from_infer(*rest)
    check_forward(input, (mean, var, lmbda), weight, bias, residual, None, None, config)
    return torch.empty_like(input)


def _fake_fold(*arguments: Any) -> None:
    check_fold(*arguments[:-1])


FAKES: dict[str, Callable[..., Any]] = {
    "normal_norm_forward": _fake_forward,
    "normal_norm_backward": _fake_backward,
    "normal_norm_infer": _fake_infer,
    "add_normal_norm_forward": _fake_add_forward,
    "add_normal_norm_backward": _fake_add_backward,
    "fold_running_": _fake_fold,
}


# The public ops: the last argument names who computes.


def _require_tensors(names: str, tensors: tuple[Any, ...]) -> None:
    # The dispatcher lets None pass for a tensor that the schema does not call optional.
    for name, tensor in zip(names.split(), tensors, strict=False):
        if tensor is None:
            raise TypeError(f"{name} must be a tensor; got None")


def _refuse_forward_mode() -> None:
    # An op without a forward-mode rule would give zero tangents without a word.
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "the normnorm ops have no forward-mode derivatives; normnorm.functional has"
        )


def _forward(*args: Any) -> Any:
    _require_tensors("input", args)
    _refuse_forward_mode()
    return backends.resolve(args[0].device, args[-1]).forward(*args)


def _backward(*args: Any) -> Any:
    _require_tensors("grad_output input stats", args)
    _refuse_forward_mode()
    with torch.no_grad():
        return backends.resolve(args[1].device, args[-1]).backward(*args)


def _infer(*args: Any) -> Any:
    _require_tensors("input", args)
    _refuse_forward_mode()
    return backends.resolve(args[0].device, args[-1]).infer(*args)


def _add_forward(*args: Any) -> Any:
    _require_tensors("input residual", args)
    _refuse_forward_mode()
    return backends.resolve(args[0].device, args[-1]).add_forward(*args)


def _add_backward(*args: Any) -> Any:
    _require_tensors("grad_output grad_sum sum stats", args)
    _refuse_forward_mode()
    with torch.no_grad():
        return backends.resolve(args[2].device, args[-1]).add_backward(*args)


def _fold(*args: Any) -> None:
    _require_tensors("stats running_mean running_var running_lmbda", args)
    backends.resolve(args[0].device, args[-1]).fold(*args)


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", FAKES[name], lib=library)
    return library


_public = _define("normnorm")
for _name, _function in (
    ("normal_norm_forward", _forward),
    ("normal_norm_backward", _backward),
    ("normal_norm_infer", _infer),
    ("add_normal_norm_forward", _add_forward),
    ("add_normal_norm_backward", _add_backward),
    ("fold_running_", _fold),
):
    _public.impl(_name, _function, "CompositeExplicitAutograd")

_compiled = [_define("normnorm_cpu"), _define("normnorm_cuda")]
backends.register_compiled_backends()


def _refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "running statistics cannot be updated under torch.vmap: each sample would have its own. "
        "Use evaluation mode, or a layer with track_running_stats=False"
    )


torch.library.register_vmap("normnorm::fold_running_", _refuse_vmap, lib=_public)


# Gradients of the registered ops, which compiled graphs follow.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, running_mean, _, _, weight, bias, _, seed, _, *config = inputs
    ctx.config = Config(*config)
    activated = output[0] if ctx.config.activation else None
    ctx.save_for_backward(input, output[1], weight, bias, activated, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.frozen = running_mean is not None


def _differentiate_forward(
    backward: Callable[..., Any], ctx: Any, grad_output: Tensor
) -> tuple[Any, ...]:
    input, stats, weight, bias, activated, seed = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[i] for i in (0, 4, 5))
    config = ctx.config
    grad_residual = None
    if ctx.needs_input_grad[6]:  # and then nothing is left of the activation for the kernel
        grad_output = reference.through_activation(grad_output, activated, config)
        grad_residual, activated, config = grad_output, None, config._replace(activation="")
    gradients = backward(
        grad_output, input, stats, weight, bias, activated, seed, *needs, ctx.frozen, *config
    )
    grad_input, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return (
        grad_input, None, None, None, grad_weight, grad_bias, grad_residual, None, None,
        *(None,) * len(config),
    )  # fmt: skip


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, needs_input, needs_weight, needs_bias, ctx.frozen = inputs[:11]
    ctx.needs = (needs_input, needs_weight, needs_bias)
    ctx.config = Config(*inputs[11:])
    ctx.save_for_backward(*tensors)


def _differentiate_backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
    to_output, to_input, to_weight = reference.second_gradients(
        directions, ctx.saved_tensors, ctx.needs, ctx.frozen, ctx.config
    )
    return (
        to_output, to_input, None, to_weight, None, None, None, *(None,) * (4 + len(ctx.config))
    )  # fmt: skip


def _save_add_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, bias, seed, _, *config = inputs
    ctx.config = Config(*config)
    activated = output[0] if ctx.config.activation else None
    ctx.save_for_backward(*output[1:], weight, bias, activated, seed)
    ctx.mark_non_differentiable(output[2])


def _differentiate_add_forward(
    ctx: Any, grad_output: Tensor, grad_sum: Tensor, _: Any
) -> tuple[Any, ...]:
    needs_sum = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
    needs = (needs_sum, *ctx.needs_input_grad[2:4])
    gradients = torch.ops.normnorm.add_normal_norm_backward(
        grad_output, grad_sum, *ctx.saved_tensors, *needs, *ctx.config
    )
    grad, grad_weight, grad_bias = (
        gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True)
    )
    return (
        grad if ctx.needs_input_grad[0] else None,
        grad if ctx.needs_input_grad[1] else None,
        grad_weight, grad_bias, None, None, *(None,) * len(ctx.config),
    )  # fmt: skip


def _save_add_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, _, *tensors = inputs[:8]
    ctx.needs, ctx.config = inputs[8:11], Config(*inputs[11:])
    ctx.save_for_backward(grad_output, *tensors)


def _differentiate_add_backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
    to_output, to_sum, to_weight = reference.second_gradients(
        directions, ctx.saved_tensors, ctx.needs, False, ctx.config
    )
    to_grad_sum = directions[0] if ctx.needs[0] else None
    return (
        to_output, to_grad_sum, to_sum, None, to_weight, None, None, None,
        *(None,) * (3 + len(ctx.config)),
    )  # fmt: skip


def register_gradients(library: torch.library.Library, overload: str = "") -> None:
    """Registers the gradients of ``normal_norm_forward`` and ``normal_norm_backward``, or of
    overloads of these with the same arguments in the same order."""
    backward = getattr(torch.ops.normnorm.normal_norm_backward, overload or "default")

    def differentiate(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Any, ...]:
        return _differentiate_forward(backward, ctx, grad_output)

    for name, gradient, setup_context in (
        ("normal_norm_forward", differentiate, _save_forward),
        ("normal_norm_backward", _differentiate_backward, _save_backward),
    ):
        torch.library.register_autograd(
            f"normnorm::{name}" + (f".{overload}" if overload else ""),
            gradient,
            setup_context=setup_context,
            lib=library,
        )


register_gradients(_public)
for _name, _gradient, _setup_context in (
    ("add_normal_norm_forward", _differentiate_add_forward, _save_add_forward),
    ("add_normal_norm_backward", _differentiate_add_backward, _save_add_backward),
):
    torch.library.register_autograd(
        f"normnorm::{_name}", _gradient, setup_context=_setup_context, lib=_public
    )


def _refuse_to_differentiate(ctx: Any, _: Any) -> None:
    raise RuntimeError(
        "normal_norm_infer keeps nothing for a backward pass; normal_norm_forward does"
    )


torch.library.register_autograd(
    "normnorm::normal_norm_infer", _refuse_to_differentiate, lib=_public
)


# The public ops, for those above this floor.

normal_norm_forward = torch.ops.normnorm.normal_norm_forward.default
normal_norm_backward = torch.ops.normnorm.normal_norm_backward.default
normal_norm_infer = torch.ops.normnorm.normal_norm_infer.default
add_normal_norm_forward = torch.ops.normnorm.add_normal_norm_forward.default
add_normal_norm_backward = torch.ops.normnorm.add_normal_norm_backward.default
fold_running_ = torch.ops.normnorm.fold_running_.default
