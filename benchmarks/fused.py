"""What fusing saves: a norm with its residual and activation in one pass, beside separate steps.

    python benchmarks/fused.py [--device cpu] [--threads 2] [--dtype float32] [--budget 3]

Forward and backward passes in training, interleaved: ours fused, ours in steps, torch's layer in
steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import normnorm
import record
from speed import tables
from speed.results import input_words
from speed.timing import Timing, copies_beyond_cache, interleaved, kept_bytes

IMAGES = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14))
TOKENS = ((6304, 384), (2048, 4096))
# Tensors that cross memory for each element, forward and backward: docs/use/fused.md.
MOVED = {"relu": (10, 6), "residual + relu": (13, 9), "residual stream": (11, 8)}
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way's time, in milliseconds of a forward and backward pass.

    Attributes:
        what: "relu", "residual + relu" or "residual stream".
        way: "fused", "in steps" or "torch" (its plain norm, in steps).
        moved: tensors that a kernel with its groups on chip reads and writes; None for torch's.
        kept_bytes: what autograd keeps of the forward pass.
    """

    what: str
    way: str
    shape: tuple[int, ...]
    dtype: str
    memory_format: str
    threads: int
    timing: Timing
    moved: int | None
    kept_bytes: int


def image_steps(channels: int, with_residual: bool, device: torch.device) -> dict[str, Step]:
    fused = normnorm.BatchNormalNormAct2d(channels, device=device)
    ours = normnorm.BatchNormalNorm2d(channels, device=device)
    torchs = nn.BatchNorm2d(channels, device=device)

    def after(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y = norm(x)
        return (torch.relu_(y + residual if with_residual else y),)

    return {
        "fused": lambda x, r: (fused(x, r if with_residual else None),),
        "in steps": partial(after, ours),
        "torch": partial(after, torchs),
    }


def token_steps(width: int, device: torch.device) -> dict[str, Step]:
    fused = normnorm.AddLayerNormalNorm(width, device=device)
    ours, torchs = (
        normnorm.LayerNormalNorm(width, device=device),
        nn.LayerNorm(width, device=device),
    )

    def after(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        stream = x + residual
        return norm(stream), stream

    return {"fused": fused, "in steps": partial(after, ours), "torch": partial(after, torchs)}


def measure(
    what: str,
    shape: tuple[int, ...],
    memory_format: str,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
    rounds: int = 9,
) -> list[Row]:
    """Each way's row, by the backend that is chosen."""
    steps = (
        token_steps(shape[1], device)
        if what == "residual stream"
        else image_steps(shape[1], what.startswith("residual"), device)
    )
    if dtype != torch.float32 and what == "residual stream" and device.type == "cuda":
        del steps["torch"]  # its layer norm wants the parameters in the input's dtype there
    elements = torch.Size(shape).numel()
    copies = copies_beyond_cache(3 * elements * dtype.itemsize, device)
    dense = getattr(
        torch, f"{memory_format}_format" if memory_format == "contiguous" else memory_format
    )

    def drawn() -> Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=dense)

    inputs = [[drawn().requires_grad_() for _ in range(2)] for _ in range(copies)]
    grads = [[drawn() for _ in range(2)] for _ in range(copies)]

    def call(step: Step, copy: int) -> None:
        x, residual = inputs[copy]
        outputs = step(x, residual)
        wanted = (x,) if what == "relu" else (x, residual)
        torch.autograd.grad(outputs, wanted, grads[copy][: len(outputs)])

    timings = interleaved(
        {way: partial(call, step) for way, step in steps.items()},
        device, copies=copies, budget_s=budget_s, min_rounds=rounds,
    )  # fmt: skip
    rows = []
    for way, timing in timings.items():
        if isinstance(timing, Exception):
            raise timing
        moved = {"in steps": MOVED[what][0], "fused": MOVED[what][1]}.get(way)
        rows.append(
            Row(
                what=what, way=way, shape=shape, dtype=str(dtype).removeprefix("torch."),
                memory_format=memory_format,
                threads=torch.get_num_threads(), timing=timing, moved=moved,
                kept_bytes=kept_bytes(partial(steps[way], *inputs[0])),
            )
        )  # fmt: skip
    return rows


def table(rows: list[Row]) -> str:
    head = ("what", "input", "fused, ms", "in steps, ms", "ratio", "ratio of what is moved",
            "fused / torch in steps")  # fmt: skip
    cases: dict[object, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.what, row.shape, row.memory_format), {})[row.way] = row
    lines = []
    for ways in cases.values():
        fused, (moved_in_steps, moved) = ways["fused"], MOVED[ways["fused"].what]
        ms, in_steps = fused.timing.median_ms, ways["in steps"].timing.median_ms
        to_torch = f"{ms / ways['torch'].timing.median_ms:.2f}" if "torch" in ways else "-"
        lines.append((
            fused.what, input_words(fused.shape, 0, fused.dtype, fused.memory_format),
            f"{ms:.3g}", f"{in_steps:.3g}", f"{ms / in_steps:.2f}",
            f"{moved / moved_in_steps:.2f}", to_torch,
        ))  # fmt: skip
    return tables.table(head, lines, 2)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a case (default 3)")
    record.add_output(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def rows() -> list[Row]:
        cases = [("residual stream", shape, "contiguous") for shape in TOKENS]
        for what in ("relu", "residual + relu"):
            cases += [(what, shape, f) for f in record.FORMATS for shape in IMAGES]
        device, dtype = torch.device(options.device), getattr(torch, options.dtype)
        return [row for case in cases for row in measure(*case, dtype, device, options.budget)]

    return record.run("fused", options, rows, table)


if __name__ == "__main__":
    sys.exit(main())
