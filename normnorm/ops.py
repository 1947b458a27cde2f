"""The ops: their schemas, shape inference and implementations.

``torch.ops.normnorm.*`` are the public ops; their last argument names the backend to call. The two
passes take, in this order, tensors, switches and the fields of :class:`normnorm.config.Config`;
:mod:`normnorm.autograd` registers their gradients.

Each compiled backend has a namespace (``normnorm_cpu``, ...) of ops that its library implements.
Eager code calls these directly: dispatching the public op too, or passing its many arguments, would
take as long as a small kernel. Their switches and settings are packed
(:func:`normnorm.config.packed`); the forward op can also draw the seed and update the running
statistics. They return None for a result that was not requested; the public ops return an empty
tensor instead, because torch.jit.trace does not support optional results.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backends
from .checks import check_backward, check_fold, check_forward, group_count, group_size
from .config import (
    CONFIG_SCHEMA,
    PACKED_SCHEMA,
    BackwardArguments,
    Config,
    ForwardArguments,
    packed,
)
from .namespace import NAMESPACE, OPS, compiled_namespace
from .noise import draw_seed
from .statistics import Row, statistics_dtype

# Schemas of the public ops.
SCHEMAS = {
    "normal_norm_forward": (
        "(Tensor input, Tensor? running_mean, Tensor? running_var, Tensor? running_lmbda, "
        "Tensor? weight, Tensor? bias, Tensor? residual, Tensor? seed, Tensor? noise_scale, "
        f"bool prenorm, bool keep_stats, {CONFIG_SCHEMA}, str backend) "
        "-> (Tensor output, Tensor stats, Tensor sum)"
    ),
    "normal_norm_backward": (
        "(Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
        "Tensor? output, Tensor? seed, Tensor? grad_sum, "
        f"bool needs_input, bool needs_weight, bool needs_bias, bool frozen, {CONFIG_SCHEMA}, "
        "str backend) -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    "fold_running_": (
        "(Tensor stats, Tensor(a!) running_mean, Tensor(b!) running_var, "
        "Tensor(c!) running_lmbda, Tensor(d!)? num_batches_tracked, float? momentum, "
        "SymInt count, float eps, str backend) -> ()"
    ),
}
# Schemas of a compiled backend's ops.
_COMPILED = {
    "forward": (
        "(Tensor input, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
        "Tensor(c!)? running_lmbda, Tensor(d!)? num_batches_tracked, Tensor? weight, "
        "Tensor? bias, Tensor? residual, Tensor? seed, Tensor? noise_scale, float? momentum, "
        f"{PACKED_SCHEMA}) -> (Tensor output, Tensor? stats, Tensor? sum, Tensor? seed)"
    ),
    "backward": (
        "(Tensor grad_output, Tensor input, Tensor stats, Tensor? weight, Tensor? bias, "
        f"Tensor? output, Tensor? seed, Tensor? grad_sum, {PACKED_SCHEMA}) "
        "-> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)"
    ),
    "fold_running_": SCHEMAS["fold_running_"].replace(", str backend", ""),
}

Results = tuple[Tensor, Tensor | None, Tensor | None]


def _filled(results: Results) -> tuple[Tensor, ...]:
    """A backend's forward results as the public op returns them: empty tensors instead of None."""
    return tuple(results[0].new_empty(0) if result is None else result for result in results)


# Shape inference.


def empty_statistics(input: Tensor, config: Config) -> Tensor:
    shape = (len(Row), group_count(input, config))
    return input.new_empty(shape, dtype=statistics_dtype(input.dtype))


def _fake_forward(*arguments: Any) -> tuple[Tensor, ...]:
    call = ForwardArguments.of(*arguments)
    check_forward(call)
    input, stats, sum = call.input, None, None
    if call.keep_stats:
        stats = empty_statistics(input, call.config)
    if call.prenorm:
        sum = torch.empty_like(input)
    return _filled((torch.empty_like(input), stats, sum))


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


FAKES: dict[str, Callable[..., Any]] = {
    "normal_norm_forward": _fake_forward,
    "normal_norm_backward": _fake_backward,
    "fold_running_": lambda *arguments: check_fold(*arguments[:8]),
}


# Errors of a compiled backend's op, which do not name the wrong argument; NotImplementedError for a
# tensor on another backend's device. The Python checks then raise the error with its message. A
# backend written in Python has already called them.
_REFUSALS = (ValueError, NotImplementedError)


def _run(op: Callable[..., Any], arguments: tuple[Any, ...], check: Callable[[], None]) -> Any:
    """The op's result; where the op refuses its arguments, the error of ``check``."""
    try:
        return op(*arguments)
    except _REFUSALS as error:
        refusal = error
    check()
    raise refusal


# The passes by the backend that the last of the op's arguments names.


def run_forward(arguments: tuple[Any, ...]) -> Results:
    forward, given = backends.get(arguments[-1]).forward, arguments[:-1]
    return _run(forward, given, lambda: check_forward(ForwardArguments.of(*given)))


def run_backward(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    backward, given = backends.get(arguments[-1]).backward, arguments[:-1]
    return _run(backward, given, lambda: check_backward(BackwardArguments.of(*given)))


def run_fold(arguments: tuple[Any, ...]) -> None:
    fold, given = backends.get(arguments[-1]).fold, arguments[:-1]
    _run(fold, given, lambda: check_fold(*given))


class Update(NamedTuple):
    """The running statistics that a step updates from its batch's, and the momentum."""

    running_mean: Tensor
    running_var: Tensor
    running_lmbda: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None


def direct(tensor: Tensor) -> bool:
    """Whether an eager call may bypass the public ops: not for tensor subclasses or under dispatch
    modes (fake tensors, tracers), which intercept those, nor on meta, which only those support."""
    plain = type(tensor) is Tensor and not tensor.is_meta
    return plain and torch._C._len_torch_dispatch_stack() == 0


def run_step(
    tensors: tuple[Any, ...], update: Update | None, prenorm: bool, keep_stats: bool, config: Config
) -> tuple[Any, ...]:
    """The forward pass in eager mode, where possible by one op of a compiled backend.

    Args:
        tensors: as for :func:`normnorm.autograd.normal_norm`, and without running statistics if
            there is an ``update``.
        update: the running statistics to update, or None.
        prenorm, keep_stats, config: as in the op.

    Returns:
        (output, statistics, sum, seed); an absent one is None or an empty tensor.
    """
    backend = backends.get(config.backend)
    input, mean, var, lmbda, weight, bias, residual, seed, noise_scale = tensors
    if backend.step is not None and direct(input):
        tracked = momentum = None
        step = mean is None
        if update is not None:
            mean, var, lmbda, tracked, momentum = update
        try:
            return backend.step(  # type: ignore[no-any-return]
                input, mean, var, lmbda, tracked, weight, bias, residual, seed, noise_scale,
                momentum, *packed(config, prenorm, keep_stats, step),
            )  # fmt: skip
        except _REFUSALS as error:
            refusal = error
        if seed is None:
            config = config._replace(noise_train=0.0)
        check_forward(ForwardArguments.of(*tensors, prenorm, keep_stats, *config))
        if update is not None:
            check_fold(*fold_arguments(empty_statistics(input, config), update, input, config)[:8])
        raise refusal
    if seed is None and config.noise_train > 0.0:
        seed = draw_seed(input.device)
    keeps = keep_stats or update is not None
    arguments = (*tensors[:7], seed, noise_scale, prenorm, keeps, *config)
    results = run_forward(arguments) if backend.step is None else normal_norm_forward(*arguments)
    if update is not None:
        folded = fold_arguments(results[1], update, input, config)
        if backend.step is None:
            run_fold(folded)
        else:
            fold_running_(*folded)
    return *results, seed


def run_gradient(
    tensors: tuple[Any, ...], switches: tuple[bool, ...], config: Config
) -> tuple[Tensor, ...]:
    """The backward pass in eager mode, where possible by a compiled backend's own op; the arguments
    are parts of :class:`normnorm.config.BackwardArguments`."""
    backend = backends.get(config.backend)
    if backend.gradient is None:
        return run_backward((*tensors, *switches, *config))
    if not direct(tensors[0]):
        return normal_norm_backward(*tensors, *switches, *config)  # type: ignore[no-any-return]
    try:
        return backend.gradient(*tensors, *packed(config, *switches))  # type: ignore[no-any-return]
    except _REFUSALS as error:
        refusal = error
    check_backward(BackwardArguments.of(*tensors, *switches, *config))
    raise refusal


def fold_arguments(stats: Any, update: Update, input: Tensor, config: Config) -> tuple[Any, ...]:
    return (stats, *update, group_size(input, config), config.eps, config.backend)


# The public ops.


def _resolved(arguments: tuple[Any, ...], device_of: int, tensors: str) -> tuple[Any, ...]:
    """The arguments with the backend's name resolved by the device of argument ``device_of``.

    ``tensors``: the names of the leading arguments, all required.
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


library = torch.library.Library(NAMESPACE, "DEF")
for _name, _function in (
    ("normal_norm_forward", _forward),
    ("normal_norm_backward", _backward),
    ("fold_running_", _fold),
):
    library.define(_name + SCHEMAS[_name], tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{_name}", FAKES[_name], lib=library)
    library.impl(_name, _function, "CompositeExplicitAutograd")

_compiled = [torch.library.Library(compiled_namespace(name), "DEF") for name in ("cpu", "cuda")]
for _library in _compiled:
    for _name, _schema in _COMPILED.items():
        _library.define(_name + _schema)
backends.register_compiled_backends()


def _refuse_vmap(*_: Any) -> None:
    raise RuntimeError(
        "running statistics cannot be updated under torch.vmap: each sample would have its own. "
        "Use evaluation mode, or a layer with track_running_stats=False"
    )


torch.library.register_vmap(f"{NAMESPACE}::fold_running_", _refuse_vmap, lib=library)

normal_norm_forward = OPS.normal_norm_forward.default
normal_norm_backward = OPS.normal_norm_backward.default
fold_running_ = OPS.fold_running_.default
