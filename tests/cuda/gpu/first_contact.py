"""The CUDA kernels' first launches on a device: each tier, forward and backward, against the
reference in float64.

    python tests/cuda/gpu/first_contact.py [NAME ...]

Prints a JSON line with the names, one as each begins, and one with its error, or null, as it ends.
A kernel that has not ended within ten seconds ends the process with status 70: the rest wants a new
process.
"""

import json
import os
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.path[1:1] = [str(Path(__file__).resolve().parents[n]) for n in (2, 3)]

import torch
from raw_ops import both_passes, compare
from tiers import case_and_plan

from gpu.cases import make
from gpu.rig import Hang, Rig, wait

# Case, tier, whether the layout is columns; tiers that can hang come last.
PATHS = {
    "one block": ("layer", "block", False),
    "one block, shared memory": ("layer", "shared", False),
    "streaming": ("layer", "streaming", False),
    "streaming, columns": ("batch", "streaming", True),
    "cluster": ("layer", "cluster", False),
    "cooperative grid": ("layer", "grid", False),
    "cooperative grid, columns": ("batch", "grid", True),
}
NOISE = {"noise_train": 0.7}


def check(rig: Rig, name: str) -> str | None:
    """The error of a path, or None."""
    case, plan = case_and_plan(*PATHS[name])
    last = PATHS[name][2]
    for dtype in (torch.float32, torch.bfloat16):
        t = make(rig, case, dtype, last)
        with rig.forced(**plan):
            got = both_passes("cuda", case, t, (), last, **NOISE)
        if not rig.dry:
            wait(rig.device)
        try:
            compare(case, t, (), last, got, unit=rig.unit, **NOISE)
        except AssertionError as error:
            return f"{str(dtype)[6:]}: {error}"
    return None


def main(names: list[str]) -> int:
    names = names or list(PATHS)
    print(json.dumps({"paths": names}), flush=True)
    rig = Rig.find()
    failed = False
    for name in names:
        print(json.dumps({"path": name}), flush=True)
        began = time.monotonic()
        try:
            error = check(rig, name)
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
