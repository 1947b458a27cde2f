"""The benchmark of ``gpu_check.py``: the works of ``gpu_targets.py``, most important first.

    python benchmarks/gpu_bench.py --part cuda|triton|networks --seconds 60 --json FILE [--dry]

The engine and the file are those of ``bench.py``: each provider is checked against float64 before
it is timed, and rows are on disk after each work. Works for which no time is left are named under
"problems". Status 1 where a provider of ours failed or was wrong.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

from speed.measure import Run
from speed.networks import Network, networks
from speed.providers import PROVIDERS
from speed.results import MemoryFormat, Row
from speed.timing import Settings
from speed.work import RESNET50, Work

DTYPES = ("bfloat16", "float32")
ALL = ("forward", "backward", "full")
# One early, one middle and one late layer of the network come before the other shapes.
KEY_SHAPES = ((64, 56, 56), (256, 28, 28), (2048, 7, 7))
NETWORKS = ("resnet50", "encoder", "vit_small_patch16_224")


def images(shape: tuple[int, ...], dtype: str, layout: str, *operations: str) -> Work:
    return Work(
        layer="BatchNormalNorm2d", shape=(256, *shape), dtype=dtype, memory_format=layout,
        operations=operations, method="graph", suite="resnet",
    )  # fmt: skip


def rows(length: int, dtype: str, *operations: str) -> Work:
    return Work(
        layer="LayerNormalNorm", shape=(16384, length), dtype=dtype, operations=operations,
        method="graph", suite="tokens",
    )  # fmt: skip


def headline() -> Iterator[Work]:
    for dtype in DTYPES:
        yield images(KEY_SHAPES[0], dtype, "contiguous", *ALL)
        yield rows(4096, dtype, *ALL)
    yield images(KEY_SHAPES[0], "bfloat16", "channels_last", "full")
    for length in (768, 1024, 2048, 8192):
        yield rows(length, "bfloat16", "full")
    for shape in ((1_000_000, 64), (65536, 64), (3136, 256)):
        yield Work(
            layer="BatchNormalNorm1d", shape=shape, operations=("full",), method="graph",
            suite="features",
        )  # fmt: skip
    # With launches: what Python, torch and the driver take.
    for layer, small in (
        ("BatchNormalNorm2d", (2, 4, 2, 2)), ("BatchNormalNorm2d", (32, 64, 8, 8)),
        ("BatchNormalNorm1d", (32, 64)), ("LayerNormalNorm", (32, 256)),
    ):  # fmt: skip
        yield Work(
            layer=layer, shape=small, operations=("forward", "full"), method="stream",
            suite="small",
        )  # fmt: skip
    for work in (
        images((256, 56, 56), "bfloat16", "contiguous", "forward"),
        rows(4096, "bfloat16", "forward"),
    ):
        yield replace(work, mode="eval")
    yield Work(
        layer="BatchNormalNorm2d", shape=(64, 128, 256, 256), dtype="float16",
        operations=("forward",), method="graph", suite="largest",
    )  # fmt: skip


def works(part: str) -> Iterator[tuple[Work, tuple[str, ...]]]:
    """Works and the providers to time: the CUDA kernels without those of Triton, whose compilation
    would take their time; the compiled definition comes after the other works of interest."""
    if part == "networks":
        return
    ours = f"normnorm-{part}"
    for work in headline():
        cudnn = ("cudnn",) if work.layer == "BatchNormalNorm2d" else ()
        yield work, (ours, "torch", *cudnn, "copy")
    if part == "triton":
        beside = ("normnorm-cuda", ours, "torch", "compiled-reference", "reference")
        for work in (images(KEY_SHAPES[0], "bfloat16", "contiguous", "full"),
                     rows(4096, "bfloat16", "full")):  # fmt: skip
            yield replace(work, suite="definition"), beside
    done = set(headline())
    for shape in dict.fromkeys((*KEY_SHAPES, *RESNET50)):
        for dtype in DTYPES:
            for layout in get_args(MemoryFormat):
                work = images(shape, dtype, layout, "full")
                if work not in done and replace(work, operations=ALL) not in done:
                    yield work, (ours, "torch", "cudnn", "copy")


def tiny(part: str) -> list[tuple[Work, tuple[str, ...]]]:
    """One work of each kind, as small as it can be, for a CPU; nothing is compiled."""
    shapes = {
        "BatchNormalNorm2d": (2, 3, 4, 4), "BatchNormalNorm1d": (6, 3), "LayerNormalNorm": (4, 8),
    }  # fmt: skip
    found: dict[object, tuple[Work, tuple[str, ...]]] = {}
    for work, names in works(part):
        small = replace(work, shape=shapes[work.layer], method="wall", dtype="float32")
        can = tuple(n for n in names if not PROVIDERS[n].compiled and n != "normnorm-triton")
        found.setdefault((work.suite, work.layer, work.mode), (small, can))
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("cuda", "triton", "networks"), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="nothing begins later")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dry", action="store_true", help="tiny works on a CPU")
    options = parser.parse_args()
    began = time.monotonic()
    device = torch.device("cpu" if options.dry else "cuda")
    # A training step takes longer than a layer.
    budget = 3.0 if options.part == "networks" else 0.3
    settings = Settings(budget_s=budget, min_rounds=5, max_rounds=60)
    items = works(options.part)
    nets: list[Network] = []
    if options.part == "networks":
        known = {net.name: net for net in networks("default", "cuda")}
        nets = [known[name] for name in NETWORKS]
    if options.dry:
        from host_cuda import torch_library

        torch_library.register()
        settings = Settings(budget_s=0.004, min_rounds=2, max_rounds=3)
        items = iter(tiny(options.part))
        nets = [replace(net, batch=1) for net in networks("quick", "cpu")] if nets else []
    run = Run(device, settings, options.json, print)

    def left(seconds: float, what: object) -> bool:
        if options.seconds - (time.monotonic() - began) > seconds:
            return True
        run.problem(f"{what}: not measured: no time was left")
        return False

    def show(rows: Sequence[Row], what: object) -> None:
        for row in rows:
            if row.ratio is not None and row.provider.startswith("normnorm-"):
                ratio = f"{row.ratio:.2f} x {row.peer}"
                print(f"{row.provider} {what}: {row.median_ms:.4f} ms, {ratio}")

    for work, names in items:
        # Beside the samples: inputs, the reference in float64, and compilation.
        if left(1.0 + work.elements * 2e-8 + 20 * any(PROVIDERS[n].compiled for n in names), work):
            show(run.layer(work, names), work)
    names = [n for n in ("torch", "normnorm-cuda") if PROVIDERS[n].missing(device) is None]
    for network in nets:
        if left(25.0 if not options.dry else 0.0, network):
            show(run.network(network, names), network)
    run.finish(complete=True)
    bad = [row for row in run.results.rows if row.status in ("wrong", "failed")]
    return int(any(row.provider.startswith("normnorm-") for row in bad))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # without a clean-up of the device, which might hang
