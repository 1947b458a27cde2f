"""Small works and invented results for the tests of the benchmark."""

from __future__ import annotations

import torch

from normnorm.commands import execute
from normnorm.environment import Gpu
from speed.measure import Settings
from speed.options import parser
from speed.providers import PROVIDERS, runnable
from speed.results import (
    Environment,
    Measurement,
    NetworkMeasurement,
    Results,
)  # fmt: skip
from speed.work import Work

CPU = torch.device("cpu")
ON_CPU = [name for name, reason in runnable(CPU).items() if reason is None]
EAGER = [name for name in ON_CPU if not PROVIDERS[name].compiled]
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
    """A measurement of the tiny work."""
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


def bench(*arguments):
    return execute(parser(), list(map(str, arguments)))
