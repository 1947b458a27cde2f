"""Results made up for tests of the report: every kind of row, on two machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from normnorm.environment import Gpu
from speed.results import (
    Count,
    Environment,
    Measurement,
    NetworkMeasurement,
    Results,
)

CPU = Environment(
    timestamp="2026-01-02T03:04:05+00:00",
    command_line="bench.py --json cpu.json",
    normnorm="0.1.0",
    torch="2.13.0+cpu",
    python="3.11.2",
    packages={"torchvision": "0.28.0"},
    cuda=None,
    cudnn=None,
    commit="0123456789abcdef",
    uncommitted=False,
    backends={"reference": None, "cpu": None, "cuda": "no GPU"},
    platform="Linux-6.1-x86_64",
    cpu="A processor",
    cores=4,
    threads=2,
    isa="avx2",
    load_before=0.1,
    load_after=1.9,
    seconds=120.0,
    device="cpu",
    seed=1,
)
GPU = replace(
    CPU,
    device="cuda",
    cuda="13.0",
    command_line="bench.py --json gpu.json",
    gpu=Gpu(
        name="An accelerator", capability=(9, 0), multiprocessors=132, memory_bytes=150 << 30,
        l2_bytes=60 << 20, driver="580.1", clock_mhz=1700.0, max_clock_mhz=1980.0,
    ),
)  # fmt: skip

_SLOWNESS = {
    "normnorm-cpu": 1.3, "normnorm-cuda": 0.8, "normnorm-triton": 0.95, "torch": 1.0, "cudnn": 1.1,
    "compiled-torch": 0.9, "compiled-reference": 2.5, "reference": 30.0, "copy": 0.2,
}  # fmt: skip
_NS = {"forward": 0.4, "backward": 0.6, "full": 1.0}
_PASSES = {"forward": 2, "backward": 3, "full": 5}


def row(provider: str, shape: tuple[int, ...], **fields: Any) -> Measurement:
    """A plausible measurement; fields may be set."""
    layer = "BatchNormalNorm2d" if len(shape) == 4 else "LayerNormalNorm"
    given = {
        "layer": layer, "dtype": "float32", "memory_format": "contiguous", "mode": "noise",
        "operation": "full", "method": "wall", "suite": "resnet", "x_name": "elements", **fields,
    }  # fmt: skip
    elements = 1
    for size in shape:
        elements *= size
    ms = _SLOWNESS[provider] * _NS[given["operation"]] * elements * 1e-6
    size = 4 if given["dtype"] == "float32" else 2
    given.setdefault("x_value", float(elements))
    return Measurement(**{
        "shape": shape, "provider": provider, "status": "ok", "median_ms": ms, "p20_ms": 0.9 * ms,
        "p80_ms": 1.2 * ms, "rounds": 9, "calls": 1, "kept_bytes": 4 * elements,
        "model_bytes": _PASSES[given["operation"]] * size * elements, "error": 1e-6, "bound": 1e-5,
        "ratio": None if provider == "copy" else _SLOWNESS[provider],
        "peer": None if provider == "copy" else "torch", **given,
    })  # fmt: skip


def _works(providers: tuple[str, ...], **common: Any) -> Iterator[Measurement]:
    shapes = ((8, 64, 28, 28), (8, 128, 14, 14), (512, 384))
    for shape in shapes:
        suite = "resnet" if len(shape) == 4 else "tokens"
        for mode in ("noise", "quiet", "eval"):
            for operation in ("forward",) if mode == "eval" else ("forward", "backward", "full"):
                for provider in providers:
                    if provider != "copy" or (mode, operation) == ("noise", "forward"):
                        yield row(
                            provider, shape, mode=mode, operation=operation, suite=suite, **common
                        )
    for batch in (1, 4, 16):
        for provider in providers:
            yield row(
                provider, (batch, 64, 14, 14), suite="batch sweep", x_name="batch size",
                x_value=float(batch), operation="forward" if provider == "copy" else "full",
                **common,
            )  # fmt: skip


def cpu_results() -> Results:
    """A complete run on a CPU, with a provider that was wrong and one that is not there."""
    rows = list(_works(("normnorm-cpu", "torch", "compiled-torch", "reference", "copy")))
    # Not every input has the same ratio.
    rows = [
        replace(each, median_ms=1.2 * each.median_ms, p80_ms=1.3 * each.p80_ms, ratio=1.56)
        if each.shape == (8, 128, 14, 14) and each.provider == "normnorm-cpu"
        else each
        for each in rows
    ]
    bad = {"median_ms": None, "p20_ms": None, "p80_ms": None, "ratio": None}
    rows.append(
        replace(
            row("compiled-reference", (8, 64, 28, 28)), **bad, status="wrong",
            message="output is off by <b>0.5</b> & more",
        )
    )  # fmt: skip
    networks = [
        NetworkMeasurement(
            network="resnet18", source="torchvision", norm=norm, provider=provider, norm_layers=20,
            batch=8, sample_shape=(3, 64, 64), unit="images", units=8, dtype="float32",
            memory_format="contiguous", status="ok", median_ms=ms, p20_ms=ms - 2, p80_ms=ms + 3,
            rounds=5, ratio=ms / 100, peer="torch",
        )
        for norm, provider, ms in (
            ("BatchNorm2d", "torch", 100.0), ("BatchNormalNorm2d", "normnorm-cpu", 112.0)
        )
    ]  # fmt: skip
    problems = ["compiled-reference is <script>alert(1)</script> wrong"]
    counts = [Count(work="batch", mode="noise", operation="forward", isa="avx2", instructions=21.5)]
    return Results(
        environment=CPU, measurements=rows, networks=networks, counts=counts, problems=problems,
        complete=True,
    )  # fmt: skip


def small_results() -> Results:
    """One work by two providers."""
    rows = [row(provider, (8, 64, 28, 28)) for provider in ("normnorm-cpu", "torch")]
    return Results(environment=CPU, measurements=rows, complete=True)


def gpu_results() -> Results:
    """A complete run on a GPU, with counted instructions and two of our backends."""
    providers = ("normnorm-cuda", "normnorm-triton", "torch", "cudnn", "copy")
    rows = [
        each
        for dtype in ("float32", "bfloat16")
        for each in _works(providers, dtype=dtype, method="graph")
    ]
    counts = [
        Count(
            work="a kernel", mode=mode, operation=operation, isa="sm_90", dtype=dtype,
            instructions=instructions,
        )
        for dtype in ("float32", "bfloat16")
        for mode, operation, instructions in (
            ("noise", "forward", 50.0), ("quiet", "forward", 30.0), ("noise", "backward", 60.0)
        )
    ]  # fmt: skip
    return Results(environment=GPU, measurements=rows, counts=counts, complete=True)
