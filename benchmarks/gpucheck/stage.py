"""What a stage's program has in common: its orders, its deadline, and where its findings go."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["COMMAND", "Failure", "Section", "die_with_parent", "main", "write_json"]

ROOT = Path(__file__).resolve().parents[2]
# The variable that holds the command line of the whole run.
COMMAND = "NORMNORM_GPU_CHECK_COMMAND"
# Seconds that a stage keeps back to write what it has.
MARGIN_S = 2.0


class Failure(Exception):
    """A stage that cannot do its work; the text is the sentence that says why."""


def finite(value: Any) -> Any:
    """The same data with None where a number is not finite: JSON has no name for it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def write_json(path: Path, data: Any) -> None:
    """Replaces a file in one step, so that a kill leaves the old text or the new one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        text = json.dumps(finite(data), indent=1, allow_nan=False) + "\n"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


class Section:
    """A stage's part of the record, on disk as it grows.

    Attributes:
        data: what was found; the stage's own shape in ``schema.DATA``.
        dry: whether this is the run without a GPU.
        until: when the stage has to have ended, seconds since the epoch.
    """

    def __init__(self, path: Path, until: float, dry: bool) -> None:
        self._path = path
        self.until = until
        self.dry = dry
        self.data: dict[str, Any] = {}
        self.status: str | None = None
        self.message: str | None = None

    @property
    def folder(self) -> Path:
        """Where results go."""
        return self._path.parent

    @property
    def left_s(self) -> float:
        """Seconds until the stage should end."""
        return self.until - MARGIN_S - time.time()

    def save(self) -> None:
        write_json(
            self._path, {"status": self.status, "message": self.message, "data": self.data or None}
        )

    def finish(self, status: str, message: str | None = None) -> None:
        self.status, self.message = status, message
        self.save()


def die_with_parent() -> None:
    """Ends this process when the one that started it is gone: a hung kernel outlives nobody."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(run: Callable[[Section], None]) -> None:
    """A stage's program: its orders from the command line, its failures as sentences."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--section", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True)
    parser.add_argument("--dry", action="store_true")
    arguments = parser.parse_args()
    die_with_parent()
    section = Section(arguments.section, arguments.until, arguments.dry)
    try:
        run(section)
        if section.status is None:
            section.finish("passed")
    except Failure as failure:
        section.finish("failed", str(failure))
    except Exception as error:  # whatever a stage meets is a finding, to be kept with the rest
        traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(where.filename).name}:{where.lineno}"
        section.finish("failed", f"{type(error).__name__} at {place}: {error}"[:2000])
    sys.stdout.flush()
    # No clean-up of a device that may hang: everything is on disk.
    os._exit(0 if section.status != "failed" else 1)
