"""``normnorm gradcheck``: the gradients of every layer, on every backend, in every dtype."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from normnorm import backends, selfcheck

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "--backend",
        choices=[n for n, reason in backends.available_backends().items() if reason is None],
        help="check only this backend",
    )


def _row(case: selfcheck.Case, backend: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row of the table: errors of the map with noise, and in float64 the comparison with finite
    differences, which is independent of the reference."""
    row: dict[str, Any] = {
        "layer": case.layer,
        "mode": case.mode,
        "backend": backend,
        "device": device,
        "dtype": str(dtype).removeprefix("torch."),
        "bound": selfcheck.bound(dtype),
        "finite_differences": None,
    }
    errors = selfcheck.worst_errors(case, backend, dtype, device)
    row["errors"] = errors
    row["passed"] = all(error <= row["bound"] for error in errors.values())
    if dtype == torch.float64:
        row["finite_differences"] = selfcheck.finite_differences(case, backend, device)
        row["passed"] = row["passed"] and row["finite_differences"]
    return row


def table(only: str | None = None) -> list[dict[str, Any]]:
    """One row for each layer, backend and dtype, with errors and bound."""
    return [
        _row(case, backend, device, dtype)
        for case, backend, device in selfcheck.cases_and_backends()
        if only in (None, backend)
        for dtype in selfcheck.DTYPES
    ]


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running")
    print("largest error against the float64 reference, in units of the bound (1 is a miss);")
    print("float64 also against finite differences, with the noise off\n")
    print(
        f"{'layer':22}{'mode':10}{'backend':11}{'device':8}{'dtype':10}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'differences':>13}"
    )
    for row in rows:
        differences = {None: "-", True: "ok", False: "MISS"}[row["finite_differences"]]
        print(
            f"{row['layer']:22}{row['mode']:10}{row['backend']:11}{row['device']:8}{row['dtype']:10}"
            + "".join(f"{row['errors'][name] / row['bound']:12.3f}" for name in names)
            + f"{differences:>13}"
            + ("" if row["passed"] else "  MISS")
        )
    missed = sum(not row["passed"] for row in rows)
    print(f"\n{len(rows) - missed} passed, {missed} missed")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; exit status 1 if a gradient missed its bound."""
    rows = table(arguments.backend)
    if arguments.json:
        json.dump(rows, sys.stdout, indent=2)
        print()
    else:
        _print_table(rows)
    return 0 if all(row["passed"] for row in rows) else 1
