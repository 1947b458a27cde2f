"""``normnorm doctor``: what is installed, which backends can run and why not, and whether they
give the right numbers here."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from typing import Any

import torch

import normnorm
from normnorm import backends, selfcheck

__all__ = ["add_arguments", "run"]

# One dtype that stores what it computes and one that does not.
_CHECKED = (torch.float32, torch.bfloat16)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """Versions and machine, the part of a report that lets others repeat it."""
    return {
        "normnorm": normnorm.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": _version("triton"),
        "gpu": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "NORMNORM_BACKEND": os.environ.get("NORMNORM_BACKEND"),
    }


def _check_backends() -> list[dict[str, Any]]:
    """Every layer on every available backend: its worst error beside the bound."""
    checks = []
    for case, backend, device in selfcheck.cases_and_backends():
        for dtype in _CHECKED:
            check: dict[str, Any] = {
                "layer": case.layer,
                "mode": case.mode,
                "backend": backend,
                "device": device,
                "dtype": str(dtype).removeprefix("torch."),
                "bound": selfcheck.bound(dtype),
            }
            try:
                errors = selfcheck.worst_errors(case, backend, dtype, device)
            except Exception as failure:  # whatever a broken installation raises is the finding
                check.update(passed=False, failure=f"{type(failure).__name__}: {failure}")
            else:
                passed = all(error <= check["bound"] for error in errors.values())
                check.update(passed=passed, errors=errors)
            checks.append(check)
    return checks


def report() -> dict[str, Any]:
    """The whole diagnosis as plain data; ``ok`` says whether every check passed."""
    available = backends.available_backends()
    checks = _check_backends()
    details = {"cpu": backends.cpu.info()} if available["cpu"] is None else {}
    return {
        "environment": environment(),
        "backends": available,
        "details": details,
        "checks": checks,
        "ok": all(check["passed"] for check in checks),
    }


def _print_report(found: dict[str, Any]) -> None:
    for name, value in found["environment"].items():
        print(f"{name:18} {'-' if value in (None, []) else value}")
    print()
    for name, reason in found["backends"].items():
        print(f"{name:18} {'available' if reason is None else f'unavailable: {reason}'}")
        for key, value in found["details"].get(name, {}).items():
            print(f"{'':18}   {key}: {value}")
    print("\nforward and backward against the float64 reference (error relative to the largest")
    print("value, worst of output, gradients and running statistics):\n")
    print(f"{'layer':22}{'mode':10}{'backend':11}{'device':8}{'dtype':10}{'error':>9}{'bound':>9}")
    for check in found["checks"]:
        worst = max(check["errors"].values()) if "errors" in check else float("nan")
        print(
            f"{check['layer']:22}{check['mode']:10}{check['backend']:11}{check['device']:8}"
            f"{check['dtype']:10}{worst:9.1e}{check['bound']:9.1e}"
            f"{'' if check['passed'] else '  MISS'}"
        )
        if "failure" in check:
            print(f"  {check['failure']}")
    missed = sum(not check["passed"] for check in found["checks"])
    print(f"\n{len(found['checks']) - missed} checks passed, {missed} missed")


def run(arguments: argparse.Namespace) -> int:
    """Prints the report; 1 where a check missed its bound."""
    found = report()
    if arguments.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        _print_report(found)
    return 0 if found["ok"] else 1
