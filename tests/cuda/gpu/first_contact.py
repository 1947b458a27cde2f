"""The CUDA kernels' first launches on a device: each tier, forward and backward, against the
reference in float64.

    python tests/cuda/gpu/first_contact.py [NAME ...]

Prints a JSON line with the names, one as each begins, and one with its error, or null, as it ends.
A kernel that has not ended within ten seconds ends the process with status 70: the rest wants a new
process.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path[1:1] = [str(Path(__file__).resolve().parents[n]) for n in (2, 3)]

import torch
from host_cuda import cases as small

from gpu import cases, forced
from gpu.rig import Hang, Rig

# Case, forced plan, whether the layout is columns; tiers that can hang come last.
PATHS = {
    "one block": ("layer", small.ROW_TIERS["block"], False),
    "one block, shared memory": ("layer", small.ROW_TIERS["shared"], False),
    "streaming": ("layer", small.ROW_TIERS["streaming"], False),
    "streaming, columns": ("batch", small.COLUMN_TIERS["streaming"], True),
    "cluster": ("layer", small.ROW_TIERS["cluster"], False),
    "cooperative grid": ("layer", small.ROW_TIERS["grid"], False),
    "cooperative grid, columns": ("batch", small.COLUMN_TIERS["grid"], True),
}


def check(rig: Rig, kernels: object, name: str) -> str | None:
    """The error of a path, or None."""
    case, plan, columns = PATHS[name]
    row = (small.COLUMNS if columns else small.ROWS)[case]
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(20260105)
        call, (results,) = forced.run(rig, kernels, row, columns, plan, dtype)
        try:
            cases.compare(call, results)
        except AssertionError as error:
            return f"{str(dtype)[6:]}: {error}"
    return None


def main(names: list[str]) -> int:
    names = names or list(PATHS)
    print(json.dumps({"paths": names}), flush=True)
    rig = Rig.find()
    kernels = forced.kernels(rig)
    failed = False
    for name in names:
        print(json.dumps({"path": name}), flush=True)
        began = time.monotonic()
        try:
            error = check(rig, kernels, name)
        except Hang as hang:
            print(json.dumps({"path": name, "error": f"hangs: {hang}"}), flush=True)
            os._exit(70)
        except RuntimeError as failure:
            error = f"{type(failure).__name__}: {failure}"
        seconds = round(time.monotonic() - began, 2)
        print(json.dumps({"path": name, "error": error, "seconds": seconds}), flush=True)
        if error and not rig.serves():
            os._exit(70)
        failed = failed or error is not None
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
