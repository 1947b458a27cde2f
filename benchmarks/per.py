"""What the projected error function loss costs: per_loss beside the formula as it is written down.

    python benchmarks/per.py [--threads 1 2] [--budget 10] [--output FILE]

Forward and backward passes with fresh directions in each, on this machine's CPU, interleaved; and
the most memory that one allocates beyond the activations. "definition" is autograd of the formula
in full, "plain blocks" the reference backend, "compiled blocks" the CPU backend, and "products" the
two matrix products of every block alone, which none can do without.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import normnorm
import record
from normnorm import per
from speed import tables
from speed.timing import peak_bytes

SHAPES = ((1024, 64), (8192, 256), (65536, 128))
SLICES = 256
CPU = torch.device("cpu")


def directions(features: int) -> Tensor:
    slices = torch.randn(SLICES, features)
    return slices / slices.norm(dim=1, keepdim=True)


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


def measure(vectors: int, features: int, budget_s: float) -> list[record.Row]:
    h = torch.randn(vectors, features, requires_grad=True)
    losses = {
        "definition": lambda h: per._definition(h, directions(features)),
        "plain blocks": partial(per_loss, "reference"),
    }
    if normnorm.available_backends()["cpu"] is None:
        losses["compiled blocks"] = partial(per_loss, "cpu")
    found = {}
    for way, loss in losses.items():
        torch.manual_seed(record.SEED)
        found[way] = loss(h).item()
    assert max(found.values()) - min(found.values()) < 1e-5, found
    calls = {way: partial(step, loss, h) for way, loss in losses.items()}
    calls["products"] = partial(products, h)
    rows = record.timed(calls, CPU, budget_s, vectors=vectors, features=features, slices=SLICES)
    for row in rows:
        row["peak_bytes"] = peak_bytes(partial(calls[row["way"]], 0), CPU)
    return rows


def table(rows: list[record.Row]) -> str:
    lines = []
    for row in rows:
        if row["way"] == "definition":  # the first of each shape
            whole = row["timing"].median_ms
        ms = row["timing"].median_ms
        lines.append((
            f"{row['vectors']} x {row['features']}", str(row["threads"]), row["way"], f"{ms:.3g}",
            f"{ms / whole:.2f}", f"{row['peak_bytes'] / 1e6:.1f}",
        ))  # fmt: skip
    head = ("vectors x features", "threads", "way", "ms", "of the definition", "peak, MB")
    return tables.table(head, lines, 3)


def rows(options: argparse.Namespace) -> list[record.Row]:
    found = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        for shape in SHAPES:
            found += measure(*shape, options.budget)
    return found


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[torch.get_num_threads()])
    parser.add_argument("--budget", type=float, default=10.0, help="seconds a shape (default 10)")
    return record.main("per", parser, rows, table)


if __name__ == "__main__":
    sys.exit(main())
