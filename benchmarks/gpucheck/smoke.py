"""Stage: each layer once, small, against float64, on every backend: what is broken, in seconds."""

from __future__ import annotations

import os
import sys

import torch

from gpucheck.rig import Rig
from gpucheck.stage import Failure, Section, main
from normnorm import selfcheck

__all__ = ["run"]

_DTYPES = (torch.float32, torch.bfloat16)


def _bound(rig: Rig, dtype: torch.dtype) -> float:
    """The project's own bound, its arithmetic's part in the rig's unit of arithmetic."""
    storage = torch.finfo(dtype).eps
    return storage + (selfcheck.bound(dtype) - storage) * rig.unit / 2.0**-24


def _check(rig: Rig, case: selfcheck.Case, backend: str, dtype: torch.dtype) -> dict:
    check = {
        "layer": case.layer, "mode": case.mode, "backend": backend,
        "dtype": str(dtype).removeprefix("torch."), "bound": _bound(rig, dtype), "errors": {},
        "passed": False, "failure": None,
    }  # fmt: skip
    try:
        errors = selfcheck.worst_errors(case, backend, dtype, str(rig.device))
        rig.synchronize()
    except Exception as error:  # the finding of this stage
        check["failure"] = f"{type(error).__name__}: {error}"[:1000]
    else:
        check["errors"] = errors
        check["passed"] = all(error <= check["bound"] for error in errors.values())  # not for NaN
    return check


def _broken(rig: Rig) -> str | None:
    """Why the device serves this process no longer, where it does not."""
    try:
        rig.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def run(section: Section) -> None:
    rig = Rig.find(section.dry)
    section.data = {"backends": rig.reasons(), "checks": []}
    for name, reason in section.data["backends"].items():
        print(f"backend {name}: {reason or 'serves'}")
    checks = section.data["checks"]
    for backend in rig.serving():
        for case in selfcheck.CASES:
            for dtype in rig.pick(_DTYPES, _DTYPES[:1]):
                if section.left_s < 0:
                    raise Failure(f"its time was over after {len(checks)} checks")
                check = _check(rig, case, backend, dtype)
                checks.append(check)
                section.save()
                if not check["passed"]:
                    worst = check["failure"] or f"errors {check['errors']}"
                    print(f"MISS {backend} {case.layer} {case.mode} {check['dtype']}: {worst}")
                reason = _broken(rig)
                if reason:
                    raise Failure(f"the device failed in {backend} {case.layer}: {reason}")
    missed = [check for check in checks if not check["passed"]]
    print(f"{len(checks) - len(missed)} of {len(checks)} small checks passed")
    reason = rig.reasons()["cuda"]
    if reason:
        raise Failure(f"backend 'cuda' cannot run: {reason}")
    if missed:
        first = missed[0]
        raise Failure(
            f"{len(missed)} of {len(checks)} checks missed, first {first['backend']} "
            f"{first['layer']} {first['mode']} {first['dtype']}: "
            f"{first['failure'] or first['errors']}"
        )


if __name__ == "__main__":
    if "--dry" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # read by Triton, whose kernels then serve a CPU
    main(run)
