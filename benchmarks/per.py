"""What the projected error function loss costs: per_loss beside the formula as it is written down.

    python benchmarks/per.py [--threads 1 2] [--budget 10] [--output FILE]

Forward and backward passes with fresh directions in each, on this machine's CPU, interleaved; and
the most memory that one allocates. "products" are the two matrix products of every
block alone, which none can do without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import normnorm
import record
from normnorm import per
from speed import tables
from speed.timing import Timing, interleaved, peak_bytes

SHAPES = ((1024, 64), (8192, 256), (65536, 128))
SLICES = 256
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way's time for one shape, in milliseconds of a forward and backward pass.

    Attributes:
        way: "definition" (autograd of the formula in full), "plain blocks" (the reference
            backend), "compiled blocks" (the CPU backend) or "products".
        peak_bytes: the most it has allocated at a time, beyond the activations.
    """

    way: str
    vectors: int
    features: int
    slices: int
    threads: int
    timing: Timing
    peak_bytes: int


def directions(features: int) -> Tensor:
    slices = torch.randn(SLICES, features)
    return slices / slices.norm(dim=1, keepdim=True)


def definition(h: Tensor) -> Tensor:
    return per._definition(h, directions(h.size(1)))


def per_loss(backend: str, h: Tensor) -> Tensor:
    with normnorm.use_backend(backend):
        return normnorm.per_loss(h, SLICES)


def step(loss: Callable[[Tensor], Tensor], h: Tensor, _: int = 0) -> None:
    torch.autograd.grad(loss(h), h)


def products(h: Tensor, _: int = 0) -> None:
    slices, rows = directions(h.size(1)), per._BLOCK // SLICES
    with torch.no_grad():
        gradient = torch.empty_like(h)
        for start in range(0, h.size(0), rows):
            gradient[start : start + rows] = h[start : start + rows] @ slices.T @ slices


def measure(vectors: int, features: int, budget_s: float) -> list[Row]:
    h = torch.randn(vectors, features, requires_grad=True)
    losses = {"definition": definition, "plain blocks": partial(per_loss, "reference")}
    if normnorm.available_backends()["cpu"] is None:
        losses["compiled blocks"] = partial(per_loss, "cpu")
    found = {}
    for way, loss in losses.items():
        torch.manual_seed(record.SEED)
        found[way] = loss(h).item()
    assert max(found.values()) - min(found.values()) < 1e-5, found
    calls = {way: partial(step, loss, h) for way, loss in losses.items()}
    calls["products"] = partial(products, h)
    rows = []
    for way, timing in interleaved(calls, CPU, budget_s=budget_s, min_rounds=9).items():
        if isinstance(timing, Exception):
            raise timing
        peak = peak_bytes(partial(calls[way], 0), CPU)
        rows.append(
            Row(
                way=way, vectors=vectors, features=features, slices=SLICES,
                threads=torch.get_num_threads(), timing=timing, peak_bytes=peak,
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    whole = {(r.vectors, r.features, r.threads): r for r in rows if r.way == "definition"}
    lines = []
    for r in rows:
        ratio = r.timing.median_ms / whole[r.vectors, r.features, r.threads].timing.median_ms
        lines.append((
            f"{r.vectors} x {r.features}", str(r.threads), r.way, f"{r.timing.median_ms:.3g}",
            f"{ratio:.2f}", f"{r.peak_bytes / 1e6:.1f}",
        ))  # fmt: skip
    head = ("vectors x features", "threads", "way", "ms", "of the definition", "peak, MB")
    return tables.table(head, lines, 3)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a shape (default 10)")
    record.add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads[0])

    def rows() -> list[Row]:
        found = []
        for threads in options.threads:
            torch.set_num_threads(threads)
            for shape in SHAPES:
                found += measure(*shape, options.budget)
        return found

    return record.run("per", options, rows, table)


if __name__ == "__main__":
    sys.exit(main())
