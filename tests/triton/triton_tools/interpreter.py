"""Tests that run where Triton interprets its kernels.

``TRITON_INTERPRET`` must be set before Triton is imported, and other tests of the session need the
compiler. So a test under :func:`interpreted` runs in a child process, which is kept for the next
one; its exception is the test's failure. Parameters are pickled; fixtures are not supported.
"""

import atexit
import functools
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

INSIDE = "NORMNORM_TESTS_INTERPRETED"


def missing() -> str | None:
    """Why Triton is not available, or None."""
    spec = importlib.util.find_spec("triton")
    return "Triton is not installed" if spec is None or spec.origin is None else None


def interpreted(test: Callable[..., None]) -> Callable[..., None]:
    """Runs a test in the child process."""
    if os.environ.get(INSIDE):
        return test

    @functools.wraps(test)
    def there(**parameters: Any) -> None:
        failure = _child().run(test.__module__, test.__name__, parameters)
        if failure is not None:
            raise AssertionError(f"in the interpreting process:\n{failure}")

    return there


class Child:
    """A process with the interpreter enabled that imports test modules and runs their tests."""

    def __init__(self) -> None:
        environment = {
            **os.environ, INSIDE: "1", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )

    def run(self, module: str, name: str, parameters: dict[str, Any]) -> str | None:
        """None, or the traceback of what the test raised."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            pickle.dump((module, name, parameters), self.process.stdin)
            self.process.stdin.flush()
            return pickle.load(self.process.stdout)
        except (EOFError, OSError) as error:
            _child.cache_clear()
            return f"the process ended with {self.process.wait()} ({error!r})"

    def end(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


@functools.cache
def _child() -> Child:
    child = Child()
    atexit.register(child.end)
    return child


def _round_to_bfloat16() -> None:
    """Makes the interpreter round a float32 to the nearest even bfloat16, as every GPU does; it
    truncates."""
    import numpy as np
    import torch
    import triton.language as tl
    from triton.runtime import interpreter as triton_interpreter

    builder, handle = triton_interpreter.InterpreterBuilder, triton_interpreter.TensorHandle
    cut_off = builder.cast_impl

    def cast(self: Any, src: Any, to: Any) -> Any:
        if src.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cut_off(self, src, to)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16)
        return handle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    builder.cast_impl = cast


def _serve(orders: BinaryIO, answers: BinaryIO) -> None:
    import torch

    from normnorm import backends

    torch.set_num_threads(1)
    _round_to_bfloat16()
    while True:
        try:
            module, name, parameters = pickle.load(orders)
        except EOFError:
            return
        failure = None
        torch.manual_seed(20250705)
        try:
            getattr(importlib.import_module(module), name)(**parameters)
        except BaseException:
            failure = traceback.format_exc()
        backends._selected = "auto"
        pickle.dump(failure, answers)
        answers.flush()


if __name__ == "__main__":
    private = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # printed text goes to stderr, not into the pickled answers
    sys.path.remove(str(Path(__file__).parent))
    _serve(sys.stdin.buffer, private)
