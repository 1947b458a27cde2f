"""What a record may hold: the shape of ``gpu_check.json``, and whether some data has it.

A shape is a type (``float`` takes whole numbers too, and only finite ones), None, a tuple of
alternatives, a set of allowed words, a list with the shape of its elements, a dict of required keys
(``"key?"`` for one that may be absent), or :class:`Each` for a dict of any keys.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["DATA", "RECORD", "VERSION", "Each", "problems"]

VERSION = 1


@dataclass(frozen=True)
class Each:
    """A dict with any text as keys and values of one shape."""

    values: Any


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _matches(value: Any, shape: Any) -> bool:
    return next(problems(value, shape), None) is None


def _scalar(value: Any, shape: type | None) -> bool:
    if shape is None:
        return value is None
    if shape is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if shape is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, shape)


def problems(value: Any, shape: Any, at: str = "record") -> Iterator[str]:
    """A sentence for everything in ``value`` that is not as ``shape`` says."""
    if isinstance(shape, tuple):
        if not any(_matches(value, alternative) for alternative in shape):
            # The alternative of the same kind says what is wrong, the others only that they differ.
            alike = [s for s in shape if isinstance(s, dict | list) and isinstance(value, type(s))]
            if alike:
                yield from problems(value, alike[0], at)
            else:
                yield f"{at} is {_kind(value)} {value!r}, which none of its {len(shape)} forms is"
    elif isinstance(shape, set):
        if value not in shape:
            yield f"{at} is {value!r}, not one of {', '.join(sorted(shape))}"
    elif isinstance(shape, list):
        if not isinstance(value, list):
            yield f"{at} is {_kind(value)}, not a list"
            return
        for i, element in enumerate(value):
            yield from problems(element, shape[0], f"{at}[{i}]")
    elif isinstance(shape, Each):
        if not isinstance(value, dict):
            yield f"{at} is {_kind(value)}, not a dict"
            return
        for key, element in value.items():
            yield from problems(element, shape.values, f"{at}.{key}")
    elif isinstance(shape, dict):
        yield from _dict_problems(value, shape, at)
    elif not _scalar(value, shape):
        wanted = "null" if shape is None else shape.__name__
        yield f"{at} is {_kind(value)} {value!r}, not a (finite) {wanted}"


def _dict_problems(value: Any, shape: dict[str, Any], at: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{at} is {_kind(value)}, not a dict"
        return
    known = {key.removesuffix("?"): key for key in shape}
    for key, named in known.items():
        if key in value:
            yield from problems(value[key], shape[named], f"{at}.{key}")
        elif named == key:
            yield f"{at} has no '{key}'"
    for key in value.keys() - known.keys():
        yield f"{at} has an unknown '{key}'"


_TEXT = (str, None)
_NUMBER = (float, None)

# A row of the engine in normnorm/bench, where the fields are explained.
_ROW = {
    "suite": str,
    "layer": str,
    "shape": [int],
    "dtype": str,
    "memory_format": {"contiguous", "channels_last"},
    "mode": {"noise", "quiet", "eval"},
    "operation": {"forward", "backward", "full"},
    "method": {"graph", "stream", "wall"},
    "provider": str,
    "status": {"ok", "wrong", "failed", "unavailable"},
    "message": _TEXT,
    "median_ms": _NUMBER,
    "p20_ms": _NUMBER,
    "p80_ms": _NUMBER,
    "rounds": (int, None),
    "calls": (int, None),
    "model_bytes": int,
    "gb_per_s": _NUMBER,
    "share_of_copy": _NUMBER,
    "ratio": _NUMBER,
    "peer": _TEXT,
    "kept_bytes": (int, None),
    "peak_bytes": (int, None),
    "error": _NUMBER,
    "bound": _NUMBER,
}
_NETWORK = {
    "network": str,
    "source": str,
    "norm": str,
    "provider": str,
    "norm_layers": int,
    "batch": int,
    "dtype": str,
    "memory_format": {"contiguous", "channels_last"},
    "unit": {"images", "tokens"},
    "units": int,
    "status": {"ok", "wrong", "failed", "unavailable"},
    "message": _TEXT,
    "median_ms": _NUMBER,
    "p20_ms": _NUMBER,
    "p80_ms": _NUMBER,
    "rate": _NUMBER,
    "ratio": _NUMBER,
    "peak_bytes": (int, None),
}
_TARGET = {
    "target": str,
    "goal": float,
    "at_most": bool,
    "value": _NUMBER,
    "met": (bool, None),
    "rows": int,
    "of": int,
    "remark": _TEXT,
}

_JOINED = {
    "what": str,
    "way": {"joined", "in steps", "torch"},
    "backend": str,
    "shape": [int],
    "dtype": str,
    "memory_format": str,
    "moved": (int, None),
    "kept_bytes": int,
    "median_ms": float,
    "p20_ms": float,
    "p80_ms": float,
}

# The data of each stage, complete or as far as it came.
DATA: dict[str, Any] = {
    "environment": {
        "dry": bool,
        "command": [str],
        "source": {"commit": _TEXT, "uncommitted": (bool, None), "digest": str},
        "gpu": (
            {
                "name": str,
                "capability": [int],
                "multiprocessors": int,
                "memory_bytes": int,
                "l2_bytes": int,
                "shared_bytes": (int, None),
            },
            None,
        ),
        "nvidia_smi": (Each(str), None),
        "versions": Each(_TEXT),
        "platform": str,
        "cpu": str,
        "cores": int,
    },
    "build": {
        "command": [str],
        "architecture": _TEXT,
        "nvcc": _TEXT,
        "seconds": float,
        "libraries": Each(int),
        "kernels": ({"count": int, "largest_registers": int, "spilling": [str]}, None),
        "said": [str],
    },
    "smoke": {
        "backends": Each(_TEXT),
        "checks": [
            {
                "layer": str,
                "mode": str,
                "backend": str,
                "dtype": str,
                "bound": float,
                "errors": Each(_NUMBER),
                "passed": bool,
                "failure": _TEXT,
            }
        ],
    },
    "tests": {
        "limit_a_test_s": float,
        "counts": Each(int),
        "restarts": int,
        "tests": [{"test": str, "outcome": str, "seconds": float, "message": _TEXT}],
        "not_run": [str],
    },
    "benchmark": {
        "copy_gb_per_s": _NUMBER,
        "rows": [_ROW],
        "networks": [_NETWORK],
        "joined": [_JOINED],
        "left_out": [{"what": str, "why": str}],
        "targets": [_TARGET],
        "clocks_after": (Each(str), None),
    },
    "sanitizers": {
        "program": _TEXT,
        "version": _TEXT,
        "plain_run": {"passed": bool, "seconds": float, "said": str},
        "tools": Each(
            {
                "status": {"passed", "failed", "unavailable"},
                "seconds": float,
                "errors": (int, None),
                "said": str,
            }
        ),
    },
}

STATUS = {"passed", "failed", "unavailable"}

RECORD: dict[str, Any] = {
    "format": {"normnorm-gpu-check"},
    "version": int,
    "dry": bool,
    "started": str,
    "finished": _TEXT,
    "seconds": float,
    "ok": (bool, None),
    "stages": Each(
        {"status": STATUS, "seconds": float, "message": _TEXT, "data": (dict, None)},
    ),
}
