"""The selection of backends: the registry, the user's choice, and reasons for unavailability.

A backend is three callables with the arguments of the public ops' schemas in ``normnorm/ops.py``,
without the backend's name. Each forward pass resolves it once; the backward pass gets its name.

The module of a GPU backend is imported at its first use: importing normnorm neither initializes a
GPU's driver nor imports Triton. Each is a module of this package, with

* ``unavailable_reason()``: None if it can run, else one sentence with the reason;
* ``register()``: calls :func:`register` with its :class:`Backend`; only called if it can run.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from ..config import Config, ForwardArguments, packed
from ..namespace import compiled_namespace
from . import cpu, reference


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops."""

    name: str
    device_type: str | None  # None serves every device
    # The public ops, by position, and a compiled backend's own (normnorm.ops.run_step).
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    fold: Callable[..., Any]
    step: Callable[..., Any] | None = None
    gradient: Callable[..., Any] | None = None


# In the order in which ``auto`` prefers them; ``reference``, for every device, is the fallback.
NAMES = ("reference", "cpu", "cuda", "triton")
# Backends whose modules have not been imported yet, and the device type that each serves.
_late: dict[str, str] = {"cuda": "cuda", "triton": "cuda"}
_UNAVAILABLE: dict[str, str] = {}
_log = logging.getLogger(__name__)
_backends: dict[str, Backend] = {
    "reference": Backend(
        "reference",
        None,
        reference.normal_norm_forward,
        reference.normal_norm_backward,
        reference.fold_running_,
    )
}
# The backend that ``auto`` selects for each device type.
_automatic: dict[str, Backend] = {}

# The process's choice, and a reference to the last use_backend() call that set it.
_selected = os.environ.get("NORMNORM_BACKEND", "auto")
_latest: Callable[[], Any] = lambda: None  # noqa: E731
_lock = threading.Lock()
# The innermost ``with`` block of this thread or task: (its choice, the enclosing block).
_Block = tuple[str, Any] | None
_block: ContextVar[_Block] = ContextVar("normnorm.use_backend", default=None)
# The last choice that a block of any thread set. Compiled code is guarded by this global, because
# it cannot be guarded by the context variable _block.
_last_block = ""
# The choice of a block that is being traced; "" outside. This is not a context variable, because a
# compiler that restarts its trace undoes only changes of globals.
_traced = ""


def register(backend: Backend) -> None:
    """Makes a backend available under its name, and the automatic choice for its device type unless
    one that precedes it in :data:`NAMES` is registered."""
    _backends[backend.name] = backend
    if backend.device_type is None:
        return
    chosen = _automatic.get(backend.device_type)
    if chosen is None or NAMES.index(backend.name) <= NAMES.index(chosen.name):
        _automatic[backend.device_type] = backend


def register_compiled(name: str, device_type: str) -> None:
    """Registers a backend whose ops a loaded library implements (:mod:`normnorm.namespace`)."""
    ops = getattr(torch.ops, compiled_namespace(name))
    # ``_op`` is the overload without its Python frame.
    step, gradient = (getattr(op.default, "_op", op.default) for op in (ops.forward, ops.backward))

    def forward(*arguments: Any) -> tuple[Any, ...]:
        call = ForwardArguments.of(*arguments)
        settings = packed(call.config, call.prenorm, call.keep_stats)
        return step(*call[:4], None, *call[4:9], None, *settings)[:3]  # type: ignore[no-any-return]

    def backward(*arguments: Any) -> tuple[Any, ...]:
        settings = packed(Config(*arguments[12:]), *arguments[8:12])
        return gradient(*arguments[:8], *settings)  # type: ignore[no-any-return]

    fold = ops.fold_running_.default
    register(Backend(name, device_type, forward, backward, fold, step, gradient))


def register_compiled_backends() -> None:
    """Registers the CPU kernels. ``normnorm.ops`` calls this after it has defined the schemas."""
    reason = cpu.unavailable_reason()
    if reason is None:
        register_compiled(cpu.NAME, cpu.DEVICE_TYPE)
    else:
        # Without them layers still run, many times slower, which nothing else would say.
        _without(cpu.NAME, reason, logging.INFO if cpu.left_out() else logging.WARNING)


def _without(name: str, reason: str, level: int = logging.INFO) -> None:
    _UNAVAILABLE[name] = reason
    _log.log(level, "backend '%s' is unavailable: %s", name, reason)


def _look_for(name: str) -> None:
    """Registers a backend, or records why it cannot run; first those that precede it in NAMES."""
    device_type = _late.get(name)
    for each in [other for other, served in _late.items() if served == device_type]:
        try:
            module = importlib.import_module(f".{each}", __name__)
        except ImportError as error:
            _without(each, f"its module does not import: {error}")
        else:
            reason = module.unavailable_reason()
            if reason is None:
                module.register()
            else:
                _without(each, reason)
        _late.pop(each, None)
        if each == name:
            return


def _automatic_choice(device_type: str) -> Backend:
    """The preferred backend for a device type; imports its backends' modules at the first call."""
    if device_type not in _automatic:
        for name in [name for name, served in _late.items() if served == device_type]:
            if device_type not in _automatic:
                _look_for(name)
    return _automatic.get(device_type, _backends["reference"])


def _find(name: str) -> Backend | None:
    """The backend of that name, or None if it cannot run; imports its module at the first call."""
    if name not in _backends:
        _look_for(name)
    return _backends.get(name)


def _chosen(selected: str, last_block: str) -> str:
    """The choice for this thread or task. Compilers guard on the globals that a caller passes."""
    block = _block.get()
    return selected if block is None else block[0]


def _set_block(block: _Block) -> _Block:
    global _last_block
    _block.set(block)
    _last_block = "" if block is None else block[0]
    return block


# A compiler runs these functions instead of tracing them, because they import modules and change
# the globals that they read. (torch.compiler.assume_constant_result does the same, but imports the
# compiler.) Traced callers read only the name and device type of the returned Backend and do not
# call its ops: functions would need guards, which a constant cannot have.
_automatic_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
_find._dynamo_marked_constant = True  # type: ignore[attr-defined]
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unavailable(name: str) -> Exception:
    if name not in NAMES:
        # The default "auto" keeps a name None from matching an unset variable.
        set_to_it = os.environ.get("NORMNORM_BACKEND", "auto") == name
        source = "NORMNORM_BACKEND" if set_to_it else "backend"
        return ValueError(f"{source} must be 'auto' or one of {', '.join(NAMES)}; got {name!r}")
    return RuntimeError(f"backend '{name}' is unavailable: {_UNAVAILABLE[name]}")


def get(name: str) -> Backend:
    """The backend of that name; the errors are those of :class:`use_backend`."""
    backend = _backends.get(name) or _find(name)
    if backend is None:
        raise _unavailable(name)
    return backend


def resolve(device: torch.device, name: str | None = None) -> Backend:
    """The backend for tensors on ``device``: the user's choice, or the preferred available one.
    ValueError if the choice names no backend, RuntimeError if it cannot run or serve the device."""
    if name is None:
        name = _traced or _chosen(_selected, _last_block)
    if name == "auto":
        return _automatic_choice(device.type)
    backend = _find(name)
    if backend is None:
        raise _unavailable(name)
    if backend.device_type is not None and device.type not in (backend.device_type, "meta"):
        raise RuntimeError(
            f"backend '{name}' serves {backend.device_type} tensors; got one on {device}"
        )
    return backend


class use_backend:
    """Chooses the backend for all later calls; as a context manager, for the block.

    ``use_backend("reference")`` or ``with use_backend("cpu"): ...``. The environment variable
    ``NORMNORM_BACKEND`` sets the choice at import. The choice is read at each forward pass; a
    backward pass follows its forward.

    A plain call sets the choice for the whole process. A block sets it for its own thread or
    asyncio task and for tasks started in the block (it is a context variable). A thread started in
    a block uses the process's choice, and so does the recomputation of checkpointed activations if
    autograd runs it in another thread, as it does on GPUs. A plain call within a block is in effect
    until the block ends.

    Args:
        name: "auto" (the preferred available one for the tensor's device), "reference", "cpu",
            "cuda" or "triton".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: that backend cannot run on this machine; the message has the reason.
    """

    def __init__(self, name: str) -> None:
        if name != "auto" and _find(name) is None:
            raise _unavailable(name)
        global _selected, _latest, _traced
        self._name = name
        self._entered = False
        self._around_traced: list[str] = []
        self._in_block: _Block = None
        if torch.compiler.is_compiling():
            self._before = _traced or _selected
            if _traced:
                _traced = name
            else:
                _selected = name
            return
        self._in_block = _block.get()
        if self._in_block is not None:
            self._replaced = _set_block((name, self._in_block[1]))
            return
        with _lock:
            self._before, self._previous = _selected, _latest
            _selected, _latest = name, weakref.ref(self)

    def __enter__(self) -> use_backend:
        global _selected, _latest, _traced
        first, self._entered = not self._entered, True
        # ``with use_backend(...)`` applies to the block only: undo what __init__ set.
        if torch.compiler.is_compiling():
            around = _traced
            if first and around:
                around = self._before
            elif first:
                _selected = self._before
            self._around_traced.append(around)
            _traced = self._name
            return self
        outer = _block.get()
        if first and self._in_block is None:
            with _lock:
                if _latest() is self:  # else a later call has changed the process's choice
                    _selected, _latest = self._chosen_before(), self._previous
        elif first and outer is self._replaced:
            outer = self._in_block
        _set_block((self._name, outer))
        return self

    def __exit__(self, *exception: object) -> None:
        global _traced
        if self._around_traced:
            _traced = self._around_traced.pop()
            return
        block = _block.get()
        assert block is not None
        _set_block(block[1])

    def _chosen_before(self) -> str:
        # Skip a previous call that a thread has since entered as a block: not the process's choice.
        previous = self._previous()
        if previous is not None and previous._entered:
            return str(previous._chosen_before())
        return self._before


def available_backends() -> dict[str, str | None]:
    """For each backend's name, None if it can run, else the reason."""
    for name in list(_late):
        _look_for(name)
    return {name: None if name in _backends else _UNAVAILABLE[name] for name in NAMES}
