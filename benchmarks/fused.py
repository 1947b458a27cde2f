"""What fusing saves: a norm with its residual and activation in one pass, beside separate steps.

    python benchmarks/fused.py [--device cpu] [--threads 2] [--dtype float32] [--budget 3]

Forward and backward passes in training, interleaved: ours fused, ours in steps, torch's layer in
steps. A row also has the bytes that autograd keeps of the forward pass.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import get_args

import torch
from torch import Tensor, nn

import normnorm
import record
from speed import tables
from speed.results import MemoryFormat, input_words
from speed.timing import copies_beyond_cache, kept_bytes

IMAGES = ((32, 64, 56, 56), (32, 256, 28, 28), (32, 512, 14, 14))
TOKENS = ((6304, 384), (2048, 4096))
# Tensors that cross memory for each element, in steps and fused: docs/use/fused.md.
MOVED = {"relu": (10, 6), "residual + relu": (13, 9), "residual stream": (11, 8)}
Step = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


def image_steps(channels: int, with_residual: bool, device: torch.device) -> dict[str, Step]:
    fused = normnorm.BatchNormalNormAct2d(channels, device=device)

    def steps(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        y = norm(x)
        return (torch.relu_(y + residual if with_residual else y),)

    return {
        "fused": lambda x, r: (fused(x, r if with_residual else None),),
        "in steps": partial(steps, normnorm.BatchNormalNorm2d(channels, device=device)),
        "torch": partial(steps, nn.BatchNorm2d(channels, device=device)),
    }


def token_steps(width: int, device: torch.device) -> dict[str, Step]:
    def steps(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
        stream = x + residual
        return norm(stream), stream

    return {
        "fused": normnorm.AddLayerNormalNorm(width, device=device),
        "in steps": partial(steps, normnorm.LayerNormalNorm(width, device=device)),
        "torch": partial(steps, nn.LayerNorm(width, device=device)),
    }


def measure(
    what: str,
    shape: tuple[int, ...],
    memory_format: str,
    dtype: torch.dtype,
    device: torch.device,
    budget_s: float,
) -> list[record.Row]:
    """Each way's row, by the backend that is chosen."""
    if what == "residual stream":
        steps = token_steps(shape[1], device)
        if dtype != torch.float32 and device.type == "cuda":
            del steps["torch"]  # its layer norm wants the parameters in the input's dtype there
    else:
        steps = image_steps(shape[1], what.startswith("residual"), device)
    copies = copies_beyond_cache(3 * torch.Size(shape).numel() * dtype.itemsize, device)
    layout = torch.channels_last if memory_format == "channels_last" else torch.contiguous_format

    def pairs() -> list[list[Tensor]]:
        drawn = (torch.randn(shape, device=device).to(dtype) for _ in range(2 * copies))
        tensors = [values.contiguous(memory_format=layout) for values in drawn]
        return [tensors[i : i + 2] for i in range(0, 2 * copies, 2)]

    inputs, grads = pairs(), pairs()
    for pair in inputs:
        for values in pair:
            values.requires_grad_()

    def call(step: Step, copy: int) -> None:
        outputs = step(*inputs[copy])
        wanted = inputs[copy][: 1 if what == "relu" else 2]
        torch.autograd.grad(outputs, wanted, grads[copy][: len(outputs)])

    rows = record.timed(
        {way: partial(call, step) for way, step in steps.items()}, device, budget_s, copies,
        what=what, shape=shape, dtype=str(dtype).removeprefix("torch."),
        memory_format=memory_format,
    )  # fmt: skip
    for row in rows:
        row["kept_bytes"] = kept_bytes(partial(steps[row["way"]], *inputs[0]))
    return rows


def table(rows: list[record.Row]) -> str:
    head = ("what", "input", "fused, ms", "in steps, ms", "ratio", "ratio of what is moved",
            "fused / torch in steps")  # fmt: skip
    cases: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        words = input_words(row["shape"], 0, row["dtype"], row["memory_format"])
        cases.setdefault((row["what"], words), {})[row["way"]] = row["timing"].median_ms
    lines = []
    for (what, words), ms in cases.items():
        (moved_in_steps, moved), fused = MOVED[what], ms["fused"]
        to_torch = f"{fused / ms['torch']:.2f}" if "torch" in ms else "-"
        lines.append((
            what, words, f"{fused:.3g}", f"{ms['in steps']:.3g}", f"{fused / ms['in steps']:.2f}",
            f"{moved / moved_in_steps:.2f}", to_torch,
        ))  # fmt: skip
    return tables.table(head, lines, 2)


def rows(options: argparse.Namespace) -> list[record.Row]:
    torch.set_num_threads(options.threads)
    cases = [("residual stream", shape, "contiguous") for shape in TOKENS]
    for what in ("relu", "residual + relu"):
        cases += [(what, shape, f) for f in get_args(MemoryFormat) for shape in IMAGES]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    return [row for case in cases for row in measure(*case, dtype, device, options.budget)]


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds a case (default 3)")
    return record.main("fused", parser, rows, table)


if __name__ == "__main__":
    sys.exit(main())
