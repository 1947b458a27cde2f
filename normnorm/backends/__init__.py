"""Which backend serves: the registry, the user's switch, and the reasons why not.

A backend is three callables with the arguments of the op schemas in ``normnorm/ops.py``, without
the backend's name. It is resolved once at each forward pass; its backward pass follows by name.

Backends of GPUs are looked for when they are first asked for: importing normnorm neither wakes a
GPU's driver nor imports Triton. Each is a module here, with

* ``unavailable_reason()``: None where it can run, else one sentence that says why not;
* ``register()``: calls :func:`register` with its :class:`Backend`; only called where it can run.
"""

from __future__ import annotations

import importlib
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch

from normnorm.backends import cpu, reference

__all__ = ["Backend", "available_backends", "get", "register", "resolve", "use_backend"]


@dataclass(frozen=True)
class Backend:
    """One implementation of the ops.

    Attributes:
        name: what :func:`use_backend` and the ops' ``backend`` argument call it.
        device_type: the kind of device it serves; None for every device.
        forward, backward, fold: the ops, positional arguments in schema order.
    """

    name: str
    device_type: str | None
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    fold: Callable[..., Any]


# Of two that serve the same device, ``auto`` takes the one that stands first.
NAMES = ("reference", "cpu", "cuda", "triton")
# Those not looked for yet, and the device that they serve.
_late: dict[str, str] = {"cuda": "cuda", "triton": "cuda"}
_UNAVAILABLE: dict[str, str] = {}
_backends: dict[str, Backend] = {
    "reference": Backend(
        "reference",
        None,
        reference.normal_norm_forward,
        reference.normal_norm_backward,
        reference.fold_running_,
    )
}
# Which of them serves a kind of device when the user leaves the choice to us.
_automatic: dict[str, Backend] = {}

# The process's choice, and the last use_backend() that made it.
_selected = os.environ.get("NORMNORM_BACKEND", "auto")
_latest: Callable[[], Any] = lambda: None  # noqa: E731
_lock = threading.Lock()
# The choice of the innermost block that this thread or task is in, with what holds around it.
_Block = tuple[str, Any] | None
_block: ContextVar[_Block] = ContextVar("normnorm.use_backend", default=None)
# What a block last set anywhere: compiled code is guarded by it, and cannot be by _block itself.
_last_block = ""
# The choice of a block that is being traced; "" outside. No context variable: where a compiler
# starts anew, it undoes what it has done to globals alone.
_traced = ""


def _rank(name: str) -> int:
    """A backend's place in ``auto``'s choice; one that is not ours was registered to be chosen."""
    return NAMES.index(name) if name in NAMES else -1


def register(backend: Backend) -> None:
    """Makes a backend available under its name, and the automatic choice for its device unless
    a better one (:data:`NAMES`) serves that."""
    _backends[backend.name] = backend
    if backend.device_type is None:
        return
    chosen = _automatic.get(backend.device_type)
    if chosen is None or _rank(backend.name) <= _rank(chosen.name):
        _automatic[backend.device_type] = backend


def register_compiled(name: str, device_type: str) -> None:
    """Takes in a backend whose ops a loaded library implements in ``normnorm_<name>``."""
    ops = getattr(torch.ops, f"normnorm_{name}")
    register(
        Backend(
            name,
            device_type,
            ops.normal_norm_forward.default,
            ops.normal_norm_backward.default,
            ops.fold_running_.default,
        )
    )


def register_compiled_backends() -> None:
    """Called by ``normnorm.ops`` once it has defined the schemas that compiled code fills in."""
    reason = cpu.unavailable_reason()
    if reason is None:
        register_compiled(cpu.NAME, cpu.DEVICE_TYPE)
    else:
        _UNAVAILABLE[cpu.NAME] = reason


def _look_for(name: str) -> None:
    """Registers a backend, or notes why it cannot run; before it those that are to be preferred."""
    device_type = _late.get(name)
    for each in [other for other, served in _late.items() if served == device_type]:
        try:
            module = importlib.import_module(f"normnorm.backends.{each}")
        except ImportError as error:
            _UNAVAILABLE[each] = f"its module does not import: {error}"
        else:
            reason = module.unavailable_reason()
            if reason is None:
                module.register()
            else:
                _UNAVAILABLE[each] = reason
        _late.pop(each, None)
        if each == name:
            return


def _automatic_choice(device_type: str) -> Backend:
    """The best that serves a device; looks for its backends where that was not done yet."""
    chosen = _automatic.get(device_type)
    if chosen is not None:
        return chosen
    for name in [name for name, served in _late.items() if served == device_type]:
        _look_for(name)
        if device_type in _automatic:
            break
    return _automatic.get(device_type, _backends["reference"])


def _find(name: str) -> Backend | None:
    """The backend of that name, None where it cannot run; looks for it where that was not done
    yet."""
    if name not in _backends:
        _look_for(name)
    return _backends.get(name)


def _chosen(selected: str, last_block: str) -> str:
    """The name that holds here; the arguments are the globals, for a compiler's guards."""
    block = _block.get()
    return selected if block is None else block[0]


def _set_block(block: _Block) -> _Block:
    global _last_block
    _block.set(block)
    _last_block = "" if block is None else block[0]
    return block


# A compiler runs these functions instead of tracing into the search, which imports modules and
# changes what it reads. (torch.compiler.assume_constant_result does the same, but imports the
# compiler to do it.) Traced callers read the name and the device type of what they return, and
# call none of its ops: functions would need guards, and a constant can have none.
_automatic_choice._dynamo_marked_constant = True  # type: ignore[attr-defined]
_find._dynamo_marked_constant = True  # type: ignore[attr-defined]
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _unavailable(name: str) -> Exception:
    if name not in NAMES:
        # An unset variable is no name at all, not the name None.
        set_to_it = os.environ.get("NORMNORM_BACKEND", "auto") == name
        source = "NORMNORM_BACKEND" if set_to_it else "backend"
        return ValueError(f"{source} must be 'auto' or one of {', '.join(NAMES)}; got {name!r}")
    return RuntimeError(f"backend '{name}' is unavailable: {_UNAVAILABLE[name]}")


def get(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: no backend has that name.
        RuntimeError: it cannot run here; the sentence says why.
    """
    backend = _backends.get(name)
    if backend is None:
        backend = _find(name)
    if backend is None:
        raise _unavailable(name)
    return backend


def resolve(device: torch.device, name: str | None = None) -> Backend:
    """The backend for tensors on ``device``: the user's choice, or the fastest that serves.

    Raises:
        ValueError: the chosen name (or NORMNORM_BACKEND) names no backend.
        RuntimeError: the chosen backend cannot run here or does not serve this device.
    """
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
    """Chooses the backend for every layer from here on; as a context manager, for its block.

    ``use_backend("reference")`` or ``with use_backend("cpu"): ...``. The environment variable
    ``NORMNORM_BACKEND`` sets the choice at import. The choice is read at each forward pass; a
    backward pass follows its forward.

    A call chooses for the whole process. A block chooses for its own thread or asyncio task, and
    for tasks that are started in it: it is a context variable. A thread that is started in a block
    has the process's choice, and so has a recomputation of checkpointed activations where autograd
    runs it in a thread of its own, as it does on GPUs. A call within a block ends with the block.

    Args:
        name: "auto" (the fastest that serves the tensor's device), "reference", "cpu", "cuda"
            or "triton".

    Raises:
        ValueError: no backend has that name.
        RuntimeError: that backend cannot run here; the sentence says why.
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
        if torch.compiler.is_compiling():
            self._trace()
            return self
        outer = _block.get()
        if not self._entered:
            self._entered = True
            # Of ``with use_backend(...)`` the block alone is to have the choice: it is taken back.
            if self._in_block is None:
                self._take_back()
            elif outer is self._replaced:
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

    def _trace(self) -> None:
        global _selected, _traced
        around = _traced
        if not self._entered:
            self._entered = True
            if around:
                around = self._before
            else:
                _selected = self._before
        self._around_traced.append(around)
        _traced = self._name

    def _take_back(self) -> None:
        """Unless another call came after, the process has its choice of before again."""
        global _selected, _latest
        with _lock:
            if _latest() is self:
                _selected, _latest = self._chosen_before(), self._previous

    def _chosen_before(self) -> str:
        # A call before this one that has become a block since, in another thread, chose nothing
        # for the process.
        previous = self._previous()
        if previous is not None and previous._entered:
            return str(previous._chosen_before())
        return self._before


def available_backends() -> dict[str, str | None]:
    """Every backend's name, with None where it can run and the reason where it cannot."""
    for name in list(_late):
        _look_for(name)
    return {name: None if name in _backends else _UNAVAILABLE[name] for name in NAMES}
