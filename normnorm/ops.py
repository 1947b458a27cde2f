"""The ops: schemas for every backend, shape inference, and gradients for compiled graphs.

``torch.ops.normnorm.*`` are the public ops; they hand their arguments to the backend that
their last argument names. The same schemas are defined in a namespace a compiled backend
(``normnorm_cpu``, ...), which its library implements; eager code calls those directly, because
one more trip through the dispatcher would cost as much as a small kernel.

The layout of an op's arguments: tensors first, then the configuration in the order of
:class:`Config`, the backend's name last.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from normnorm import backends
from normnorm.checks import check_backward, check_fold, check_forward, group_count
from normnorm.statistics import Row, statistics_dtype

__all__ = ["SCHEMAS", "Config"]


class Config(NamedTuple):
    """The arguments of an op that are not tensors, in schema order.

    Attributes:
        kind: "batch", "layer", "group" or "instance": what a group of elements is.
        num_groups: channel groups a sample for kind "group", else 0.
        normalized_ndim: trailing dimensions for kind "layer", else 0.
        eps: added to the variance, and its root to the Newton step's denominator.
        noise_train: weight of the noise; 0 for none (always, outside training).
        alpha: length of the Newton step; 0 turns the transform off.
        order: 2 for Newton's step, 1 for a gradient step.
        transform_eps: distance that the transform's exponent keeps from zero.
        stream: which noise of a seed: the rank in synchronised layers, else 0.
        channels_last: the noise index follows (N, spatial..., C) instead of row-major order.
        activation: reserved, "".
        backend: who computes.
    """

    kind: str
    num_groups: int
    normalized_ndim: int
    eps: float
    noise_train: float
    alpha: float
    order: int
    transform_eps: float
    stream: int
    channels_last: bool
    activation: str
    backend: str

    def for_infer(self) -> tuple[Any, ...]:
        """The part of it that ``normal_norm_infer`` takes."""
        return (
            *self[:4], self.alpha, self.order, self.transform_eps, self.activation, self.backend
        )  # fmt: skip


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


def _fake_forward(
    input, running_mean, running_var, running_lmbda, weight, bias, residual, seed, noise_scale,
    kind, num_groups, normalized_ndim, eps, noise_train, alpha, order, transform_eps, stream,
    channels_last, activation, backend,
):  # fmt: skip
    check_forward(
        input, (running_mean, running_var, running_lmbda), weight, bias, residual, seed,
        noise_scale, kind, num_groups, normalized_ndim, eps, noise_train, alpha, order,
        transform_eps, activation,
    )  # fmt: skip
    groups = group_count(input, kind, num_groups, normalized_ndim)
    stats = input.new_empty((len(Row), groups), dtype=statistics_dtype(input.dtype))
    return torch.empty_like(input), stats


def _fake_backward(
    grad_output, input, stats, weight, bias, residual, seed, needs_input, needs_weight,
    needs_bias, frozen, kind, num_groups, normalized_ndim, eps, noise_train, alpha, order,
    transform_eps, stream, channels_last, activation, backend,
):  # fmt: skip
    check_backward(
        grad_output, input, stats, weight, bias, residual, seed, needs_weight, needs_bias, kind,
        num_groups, normalized_ndim, eps, noise_train, alpha, order, transform_eps, activation,
    )  # fmt: skip
    return (
        torch.empty_like(input) if needs_input else input.new_empty(0),
        weight.new_empty(weight.shape) if needs_weight else input.new_empty(0),
        bias.new_empty(bias.shape) if needs_bias else input.new_empty(0),
    )


def _fake_infer(
    input, running_mean, running_var, running_lmbda, weight, bias, residual, kind, num_groups,
    normalized_ndim, eps, alpha, order, transform_eps, activation, backend,
):  # fmt: skip
    check_forward(
        input, (running_mean, running_var, running_lmbda), weight, bias, residual, None, None,
        kind, num_groups, normalized_ndim, eps, 0.0, alpha, order, transform_eps, activation,
    )  # fmt: skip
    return torch.empty_like(input)


def _fake_fold(
    stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps,
    backend,
):  # fmt: skip
    check_fold(
        stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps
    )


_FAKES = {
    "normal_norm_forward": _fake_forward,
    "normal_norm_backward": _fake_backward,
    "normal_norm_infer": _fake_infer,
    "fold_running_": _fake_fold,
}


# The public ops: the last argument names who computes.


def _forward(*args: Any) -> Any:
    return backends.resolve(args[0].device, args[-1]).forward(*args)


def _backward(*args: Any) -> Any:
    return backends.resolve(args[1].device, args[-1]).backward(*args)


def _infer(*args: Any) -> Any:
    return backends.resolve(args[0].device, args[-1]).infer(*args)


def _fold(*args: Any) -> None:
    backends.resolve(args[0].device, args[-1]).fold(*args)


def _define(namespace: str) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in SCHEMAS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", _FAKES[name], lib=library)
    return library


_public = _define("normnorm")
for _name, _function in (
    ("normal_norm_forward", _forward),
    ("normal_norm_backward", _backward),
    ("normal_norm_infer", _infer),
    ("fold_running_", _fold),
):
    _public.impl(_name, _function, "CompositeExplicitAutograd")

_compiled = [_define("normnorm_cpu")]
backends.register_compiled_backends()


# Gradients of the registered ops, which compiled graphs follow.


def _save_forward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    input, running_mean, _, _, weight, bias, _, seed, _, *config = inputs
    ctx.save_for_backward(input, output[1], weight, bias, seed)
    ctx.mark_non_differentiable(output[1])
    ctx.frozen = running_mean is not None
    ctx.config = config


def _differentiate_forward(ctx: Any, grad_output: Tensor, _: Any) -> tuple[Any, ...]:
    input, stats, weight, bias, seed = ctx.saved_tensors
    needs_input, needs_weight, needs_bias = (ctx.needs_input_grad[i] for i in (0, 4, 5))
    gradients = torch.ops.normnorm.normal_norm_backward(
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


torch.library.register_autograd(
    "normnorm::normal_norm_forward",
    _differentiate_forward,
    setup_context=_save_forward,
    lib=_public,
)
