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
from normnorm.checks import check_backward, check_fold, check_forward, group_count
from normnorm.config import Config
from normnorm.statistics import Row, statistics_dtype

__all__ = [
    "FAKES",
    "SCHEMAS",
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
_PARAMETERS = "Tensor? weight, Tensor? bias, Tensor? residual"

SCHEMAS = {
    "normal_norm_forward": (
        f"(Tensor input, {_RUNNING}, {_PARAMETERS}, Tensor? seed, Tensor? noise_scale, {_CONFIG}) "
        "-> (Tensor output, Tensor stats)"
    ),
    "normal_norm_backward": (
        f"(Tensor grad_output, Tensor input, Tensor stats, {_PARAMETERS}, Tensor? seed, "
        f"bool needs_input, bool needs_weight, bool needs_bias, bool frozen, {_CONFIG}) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    "normal_norm_infer": (
        f"(Tensor input, {_RUNNING}, {_PARAMETERS}, {_GEOMETRY}, float alpha, int order, "
        "float transform_eps, str activation, str backend) -> Tensor"
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


def _fake_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    grad_output, input, stats, weight, bias, residual, seed, *rest = arguments
    needs_input, needs_weight, needs_bias, _, *config = rest
    check_backward(
        grad_output, input, stats, weight, bias, residual, seed, needs_weight, needs_bias,
        Config(*config),
    )  # fmt: skip
    return (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else input.new_empty(0),
        bias.new_empty(bias.shape) if needs_bias else input.new_empty(0),
    )


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
    "fold_running_": _fake_fold,
}


# The public ops: the last argument names who computes.


def _require_tensors(names: str, tensors: tuple[Any, ...]) -> None:
    # The dispatcher lets None pass for a tensor that the schema does not call optional.
    for name, tensor in zip(names.split(), tensors, strict=False):
        if tensor is None:
            raise TypeError(f"{name} must be a tensor; got None")
    # An op without a forward-mode rule would give zero tangents without a word.
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "the normnorm ops have no forward-mode derivatives; normnorm.functional has"
        )


def _forward(*args: Any) -> Any:
    _require_tensors("input", args)
    return backends.resolve(args[0].device, args[-1]).forward(*args)


def _backward(*args: Any) -> Any:
    _require_tensors("grad_output input stats", args)
    with torch.no_grad():
        return backends.resolve(args[1].device, args[-1]).backward(*args)


def _infer(*args: Any) -> Any:
    _require_tensors("input", args)
    return backends.resolve(args[0].device, args[-1]).infer(*args)


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
    ctx.save_for_backward(input, output[1], weight, bias, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.frozen = running_mean is not None
    ctx.config = config


def _differentiate_forward(
    backward: Callable[..., Any], ctx: Any, grad_output: Tensor
) -> tuple[Any, ...]:
    input, stats, weight, bias, seed = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in (0, 4, 5))
    gradients = backward(
        grad_output, input, stats, weight, bias, None, seed, needs_input, needs_weight,
        needs_bias, ctx.frozen, *ctx.config,
    )  # fmt: skip
    grad_input, grad_weight, grad_bias = (
        gradient if needed else None
        for gradient, needed in zip(gradients, (needs_input, needs_weight, needs_bias), strict=True)
    )
    return (
        grad_input, None, None, None, grad_weight, grad_bias, None, None, None,
        *(None,) * len(ctx.config),
    )  # fmt: skip


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad_output, input, stats, weight, bias, _, seed, *rest = inputs
    *ctx.needs, ctx.frozen = rest[:4]
    ctx.config = Config(*rest[4:])
    ctx.save_for_backward(grad_output, input, stats, weight, bias, seed)


def _differentiate_backward(ctx: Any, *directions: Tensor | None) -> tuple[Any, ...]:
    to_output, to_input, to_weight = reference.second_gradients(
        directions, ctx.saved_tensors, ctx.needs, ctx.frozen, ctx.config
    )
    return (
        to_output, to_input, None, to_weight, None, None, None, *(None,) * (4 + len(ctx.config))
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
fold_running_ = torch.ops.normnorm.fold_running_.default
