"""How long the CPU layers take beside torch's own and beside the definition in eager mode.

    python benchmarks/cpu_layers.py [--threads 2] [--rounds 15] [--quick] [--no-save]

Everything runs in one process, provider after provider in every round, so that a machine that
changes its mind changes it for all; medians and 20/80 percentiles of the rounds are kept. Writes
``benchmarks/results/cpu_layers.json`` (and prints a table): milliseconds, the ratio to torch's
layer, bytes kept for the backward pass.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normnorm
from normnorm.backends import cpu

RESULTS = Path(__file__).resolve().parent / "results"


def environment() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8").splitlines()
        model = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), model)
    here = Path(__file__).resolve().parent
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "normnorm": normnorm.__version__,
        "commit": commit or None,
        **{name: str(value) for name, value in cpu.info().items() if name != "threads"},
    }


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each call: the median and the 20th and 80th percentiles."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn > 1:
                times[name].append((time.perf_counter() - start) * 1e3)
    found = {}
    for name, values in times.items():
        cuts = statistics.quantiles(values, n=5) if len(values) > 1 else values * 4
        found[name] = {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}
    return found


def kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """What autograd keeps of one training step, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(storages.values())


Case = tuple[str, nn.Module, nn.Module, Tensor]


def cases(quick: bool) -> list[Case]:
    n = 4 if quick else 1
    image = torch.randn(32 // n, 64, 56, 56)
    last = image.to(memory_format=torch.channels_last)
    return [
        (
            "BatchNormalNorm2d 32x64x56x56",
            normnorm.BatchNormalNorm2d(64),
            nn.BatchNorm2d(64),
            image,
        ),
        ("the same, channels_last", normnorm.BatchNormalNorm2d(64), nn.BatchNorm2d(64), last),
        (
            "BatchNormalNorm1d 65536x64",
            normnorm.BatchNormalNorm1d(64),
            nn.BatchNorm1d(64),
            torch.randn(65536 // n, 64),
        ),
        (
            "LayerNormalNorm 6304x384",
            normnorm.LayerNormalNorm(384),
            nn.LayerNorm(384),
            torch.randn(6304 // n, 384),
        ),
        (
            "BatchNormalNorm2d 2x4x2x2",
            normnorm.BatchNormalNorm2d(4),
            nn.BatchNorm2d(4),
            torch.randn(2, 4, 2, 2),
        ),
    ]


def measure(name: str, ours: nn.Module, peer: nn.Module, x: Tensor, rounds: int) -> dict[str, Any]:
    g = torch.randn_like(x)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()

    def training(layer: nn.Module, backend: str = "auto") -> Callable[[], None]:
        def step() -> None:
            leaf.grad = None
            with normnorm.use_backend(backend):
                layer(leaf).backward(g)

        return step

    def forward(layer: nn.Module) -> Callable[[], None]:
        def step() -> None:
            with torch.no_grad():
                layer(x)

        return step

    definition = x.numel() > 1000
    small = x.numel() < 1000
    repeat = 200 if small else 1

    def repeated(call: Callable[[], None]) -> Callable[[], None]:
        return call if repeat == 1 else lambda: [call() for _ in range(repeat)] and None

    steps = {"torch": repeated(training(peer)), "normnorm": repeated(training(ours))}
    found: dict[str, Any] = {"name": name, "shape": list(x.shape), "repeat": repeat}
    found["forward+backward, noise"] = interleaved(steps, rounds)
    if definition:
        slow = interleaved({"definition": training(ours, "reference")}, 2)
        found["forward+backward, noise"].update(slow)
    calls = {"torch": repeated(forward(peer)), "normnorm": repeated(forward(ours))}
    found["forward, noise"] = interleaved(calls, rounds)
    noise, ours.noise_train = ours.noise_train, 0.0
    found["forward+backward, no noise"] = interleaved(steps, rounds)
    ours.noise_train = noise
    found["kept bytes"] = {"torch": kept_bytes(peer, leaf), "normnorm": kept_bytes(ours, leaf)}
    ours.eval(), peer.eval()
    found["eval forward"] = interleaved(calls, rounds)
    for row in found.values():
        if isinstance(row, dict) and isinstance(row.get("torch"), dict):
            row["ratio"] = row["normnorm"]["median"] / row["torch"]["median"]
            if "definition" in row:
                row["definition ratio"] = row["definition"]["median"] / row["torch"]["median"]
    return found


def scaling(rounds: int, quick: bool) -> list[dict[str, float]]:
    """Nanoseconds per element against elements: flat where the cost is linear."""
    found = []
    for power in (4, 5, 6) if quick else (4, 5, 6, 7, 8):
        x = torch.randn(10**power // 100, 100)
        layer = normnorm.BatchNormalNorm1d(100)
        with torch.no_grad():
            row = interleaved({"normnorm": lambda x=x, m=layer: m(x)}, rounds if power < 8 else 3)
        found.append({"elements": 10**power, "ns": row["normnorm"]["median"] * 1e6 / 10**power})
    return found


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| work | torch ms | normnorm ms | ratio | definition ratio |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        for what, cell in row.items():
            if isinstance(cell, dict) and "ratio" in cell:
                n = row["repeat"]
                slow = f"{cell['definition ratio']:.0f}" if "definition ratio" in cell else ""
                lines.append(
                    f"| {row['name']}, {what} | {cell['torch']['median'] / n:.4g} | "
                    f"{cell['normnorm']['median'] / n:.4g} | {cell['ratio']:.2f} | {slow} |"
                )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="a quarter of the elements")
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    rows = [measure(*case, arguments.rounds) for case in cases(arguments.quick)]
    record = {
        "environment": environment(),
        "rows": rows,
        "scaling": scaling(arguments.rounds, arguments.quick),
    }
    print(json.dumps(record["environment"], indent=1))
    print(table(rows))
    for row in record["scaling"]:
        print(f"{row['elements']:>10} elements: {row['ns']:.3f} ns an element")
    if not arguments.no_save and not arguments.quick:
        RESULTS.mkdir(exist_ok=True)
        name = f"cpu_layers_{arguments.threads}_threads.json"
        (RESULTS / name).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
