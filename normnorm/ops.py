"""The ops: their schemas, shape inference and implementations.

``torch.ops.normnorm.*`` are the public ops. Their last argument names the backend that they call.
Each compiled backend has a namespace (``normnorm_cpu``, ...) with the same schemas without that
argument; its library implements these ops. Eager code calls them directly, because dispatching the
public op as well costs as much as a small kernel. They return None for a result that was not
requested; the public ops return an empty tensor instead, because torch.jit.trace does not support
optional results.

The arguments of an op are, in this order: tensors, switches, the fields of
:class:`normnorm.config.Config`.
Gradients are registered by :mod:`normnorm.autograd`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from normnorm import backends
from normnorm.checks import check_backward, check_fold, check_forward, group_count
from normnorm.config import BackwardArguments, ForwardArguments
from normnorm.statistics import Row, statistics_dtype

__all__ = [
    "FAKES",
    "SCHEMAS",
    "fold_running_",
    "library",
    "normal_norm_backward",
    "normal_norm_forward",
    "run_backward",
    "run_fold",
    "run_forward",
]

_CONFIG = (
    "str kind, SymInt num_groups, int normalized_ndim, float eps, float noise_train, float alpha, "
    "int order, float transform_eps, int stream, bool channels_last, str activation"
)

# op -> (arguments without the backend's name, results)
_SCHEMAS = {
    "normal_norm_forward": (
        "Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? running_lmbda, "
        "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, Tensor? noise_scale, "
        f"bool prenorm, bool keep_stats, {_CONFIG}",
        "(Tensor output, Tensor{0} stats, Tensor{0} sum)",
    ),
    "normal_norm_backward": (
        "Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
        "Tensor? output, Tensor? seed, Tensor? grad_sum, "
        f"bool needs_input, bool needs_weight, bool needs_bias, bool frozen, {_CONFIG}",
        "(Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    ),
    "fold_running_": (
        "Tensor stats, Tensor(a!) running_mean, Tensor(b!) running_var, "
        "Tensor(c!) running_lmbda, Tensor(d!)? num_batches_tracked, float? momentum, "
        "SymInt count, float eps",
        "()",
    ),
}
# Schemas of the public ops.
SCHEMAS = {
    name: f"({arguments}, str backend) -> {results.format('')}"
    for name, (arguments, results) in _SCHEMAS.items()
}


Results = tuple[Tensor, Tensor | None, Tensor | None]


def _filled(results: Results) -> tuple[Tensor, ...]:
    """The results of the public forward op: a backend's, with empty tensors in place of None."""
    return tuple(results[0].new_empty(0) if result is None else result for result in results)


# Shape inference.


def _fake_forward(*arguments: Any) -> Results:
    call = ForwardArguments.of(*arguments)
    check_forward(call)
    input, stats, sum = call.input, None, None
    if call.keep_stats:
        shape = (len(Row), group_count(input, call.config))
        stats = input.new_empty(shape, dtype=statistics_dtype(input.dtype))
    if call.prenorm:
        sum = torch.empty_like(input)
    return torch.empty_like(input), stats, sum


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    call = BackwardArguments.of(*arguments)
    check_backward(call)
    input = call.input
    return (
        torch.empty_like(input) if call.needs_input else input.new_empty(0),
        *(
            like.new_empty(like.shape) if needed and like is not None else input.new_empty(0)
            for like, needed in ((call.weight, call.needs_weight), (call.bias, call.needs_bias))
        ),
    )


def _fake_fold(*arguments: Any) -> None:
    check_fold(*arguments[:8])


FAKES: dict[str, Callable[..., Any]] = {
    "normal_norm_forward": lambda *arguments: _filled(_fake_forward(*arguments)),
    "normal_norm_backward": _fake_backward,
    "fold_running_": _fake_fold,
}


# A compiled backend raises ValueError without naming the wrong argument; the Python checks below
# then raise the error with its message. A backend written in Python has already called them.


def run_forward(arguments: tuple[Any, ...]) -> Results:
    """The forward pass by the backend that the last of the op's arguments names."""
    name = arguments[-1]
    backend = backends._backends.get(name) or backends.get(name)
    try:
        return backend.forward(*arguments[:-1])  # type: ignore[no-any-return]
    except ValueError as error:
        refusal = error
    check_forward(ForwardArguments.of(*arguments))
    raise refusal


def run_backward(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """The backward pass by the backend that the last of the op's arguments names."""
    name = arguments[-1]
    backend = backends._backends.get(name) or backends.get(name)
    try:
        return backend.backward(*arguments[:-1])  # type: ignore[no-any-return]
    except ValueError as error:
        refusal = error
    check_backward(BackwardArguments.of(*arguments))
    raise refusal


def run_fold(arguments: tuple[Any, ...]) -> None:
    """The update of running statistics by the backend that the last argument names."""
    backend = backends.get(arguments[-1])
    try:
        backend.fold(*arguments[:-1])
    except ValueError as error:
        refusal = error
    else:
        return
    check_fold(*arguments[:-1])
    raise refusal


# The public ops.


def _resolved(arguments: tuple[Any, ...], device_of: int, tensors: str) -> tuple[Any, ...]:
    """The arguments with the backend's name resolved by the device of argument ``device_of``.

    ``tensors``: names of the leading arguments, which must not be None.
    """
    # The dispatcher accepts None for a tensor that is not optional in the schema.
    for name, tensor in zip(tensors.split(), arguments, strict=False):
        if tensor is None:
            raise TypeError(f"{name} must be a tensor; got None")
    device = arguments[device_of].device
    return (*arguments[:-1], backends.resolve(device, arguments[-1]).name)


def _refuse_forward_mode() -> None:
    # An op without a forward-mode rule would return zero tangents without an error.
    if forward_ad._current_level >= 0:
        raise RuntimeError(
            "the normnorm ops have no forward-mode derivatives; normnorm.functional has"
        )


def _forward(*arguments: Any) -> Any:
    _refuse_forward_mode()
    return _filled(run_forward(_resolved(arguments, 0, "input")))


def _backward(*arguments: Any) -> Any:
    _refuse_forward_mode()
    arguments = _resolved(arguments, 1, "grad_output input stats")
    with torch.no_grad():
        return run_backward(arguments)


def _fold(*arguments: Any) -> None:
    run_fold(_resolved(arguments, 0, "stats running_mean running_var running_lmbda"))


def _define(
    namespace: str, schemas: dict[str, str], fakes: dict[str, Callable[..., Any]]
) -> torch.library.Library:
    library = torch.library.Library(namespace, "DEF")
    for name, schema in schemas.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"{namespace}::{name}", fakes[name], lib=library)
    return library


library = _define("normnorm", SCHEMAS, FAKES)
for _name, _function in (
    ("normal_norm_forward", _forward),
    ("normal_norm_backward", _backward),
    ("fold_running_", _fold),
):
    library.impl(_name, _function, "CompositeExplicitAutograd")

_compiled = [
    _define(
        f"normnorm_{name}",
        {op: f"({given}) -> {results.format('?')}" for op, (given, results) in _SCHEMAS.items()},
        {**FAKES, "normal_norm_forward": _fake_forward},
    )
    for name in ("cpu", "cuda")
]
backends.register_compiled_backends()


def _refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "running statistics cannot be updated under torch.vmap: each sample would have its own. "
        "Use evaluation mode, or a layer with track_running_stats=False"
    )


torch.library.register_vmap("normnorm::fold_running_", _refuse_vmap, lib=library)

normal_norm_forward = torch.ops.normnorm.normal_norm_forward.default
normal_norm_backward = torch.ops.normnorm.normal_norm_backward.default
fold_running_ = torch.ops.normnorm.fold_running_.default
