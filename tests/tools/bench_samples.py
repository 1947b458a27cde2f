"""Small works and invented results for the tests of the benchmark."""

import math
from dataclasses import replace

import torch

from normnorm.cli import execute
from normnorm.environment import Gpu
from speed.measure import Settings
from speed.options import parser
from speed.providers import PROVIDERS, runnable
from speed.results import Count, Environment, Measurement, NetworkMeasurement, Results
from speed.work import Work

CPU = torch.device("cpu")
EAGER = [n for n, why in runnable(CPU).items() if why is None and not PROVIDERS[n].compiled]
DTYPES = ("float32", "bfloat16", "float16")
BRIEF = Settings(budget_s=0.02, min_rounds=2, max_rounds=5)

TINY = Work(layer="LayerNormalNorm", shape=(8, 32), suite="test")

ENVIRONMENT = Environment(
    timestamp="2025-07-05T12:00:00+00:00", command_line="bench.py", normnorm="0.1.0",
    torch="2.13.0", python="3.11.7", packages={"triton": "3.7.1"}, cuda=None, cudnn=None,
    commit="abc", uncommitted=False, backends={"cpu": None}, platform="Linux", cpu="a processor",
    cores=2, threads=2, isa="avx2", load_before=0.1, device="cpu", seed=1,
)  # fmt: skip
GPU = Gpu(
    name="a GPU", capability=(9, 0), multiprocessors=100, memory_bytes=1, l2_bytes=1,
    max_clock_mhz=2000.0,
)  # fmt: skip


def row(provider="torch", median=1.0, spread=0.01, **fields):
    """A measurement of the tiny work, or of other fields."""
    times = {} if median is None else {
        "median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread),
        "rounds": 10, "calls": 1,
    }  # fmt: skip
    given = {
        "layer": "LayerNormalNorm", "shape": (8, 32), "dtype": "float32", "status": "ok",
        "memory_format": "contiguous", "mode": "noise", "operation": "full", "method": "wall",
        "suite": "test", "x_name": "elements", "x_value": 256, "model_bytes": 5120,
    }  # fmt: skip
    return Measurement(provider=provider, **{**given, **times, **fields})


def network_row(provider="torch", median=10.0, **fields):
    given = {
        "network": "conv_net", "source": "normnorm", "norm": "BatchNorm2d", "norm_layers": 3,
        "batch": 4, "sample_shape": (3, 32, 32), "unit": "images", "units": 4, "dtype": "float32",
        "memory_format": "contiguous", "status": "ok", "median_ms": median, "p20_ms": median,
        "p80_ms": median, "rounds": 3,
    }  # fmt: skip
    return NetworkMeasurement(provider=provider, **{**given, **fields})


def some_results(*rows, **fields):
    return Results(environment=ENVIRONMENT, measurements=list(rows), complete=True, **fields)


_SLOWNESS = {
    "normnorm-cpu": 1.3, "normnorm-cuda": 0.8, "normnorm-triton": 0.95, "torch": 1.0, "cudnn": 1.1,
    "compiled-torch": 0.9, "reference": 30.0, "copy": 0.2,
}  # fmt: skip


def whole_run(gpu=False):
    """A complete run: works of two layers, a sweep, networks, a provider that was wrong."""
    providers = ("normnorm-cpu", "torch", "compiled-torch", "reference", "copy")
    if gpu:
        providers = ("normnorm-cuda", "normnorm-triton", "torch", "cudnn", "copy")
    works = [
        {"shape": shape, "mode": mode, "operation": operation, "suite": "images"}
        for shape in ((8, 64, 28, 28), (8, 128, 14, 14), (512, 384))
        for mode, operation in (("noise", "full"), ("quiet", "full"), ("eval", "forward"))
    ] + [
        {"shape": (batch, 64, 14, 14), "suite": "batch sweep", "x_name": "batch size"}
        for batch in (1, 4, 16)
    ]
    rows = []
    for work in works:
        size = math.prod(work["shape"])
        for provider in providers:
            slow, copy = _SLOWNESS[provider], provider == "copy"
            rows.append(row(
                provider, slow * size * 1e-6, 0.1, error=1e-6, kept_bytes=4 * size,
                model_bytes=20 * size, ratio=None if copy else slow, peer=None if copy else "torch",
                method="graph" if gpu else "wall",
                **{"x_value": work["shape"][0] if "x_name" in work else size, **work},
                **({"layer": "BatchNormalNorm2d"} if len(work["shape"]) == 4 else {}),
            ))  # fmt: skip
    rows.append(row("broken", None, status="wrong", message="it was off", suite="images"))
    networks = [
        network_row(provider, ms, norm=norm, ratio=ms / 100, peer="torch")
        for norm, provider, ms in (
            ("BatchNorm2d", "torch", 100.0), ("BatchNormalNorm2d", "normnorm-cpu", 112.0)
        )
    ]  # fmt: skip
    counts = [Count(work="batch", mode="noise", operation="forward", isa="avx2", instructions=21.5)]
    found = some_results(*rows, networks=networks, counts=counts, problems=["broken: it was off"])
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda") if gpu else ENVIRONMENT
    return found


def bench(*arguments):
    return execute(parser(), list(map(str, arguments)))
