"""What ``tests/cuda/gpu`` is made of, as far as it can be told without a GPU."""

from __future__ import annotations

import ast
import ctypes
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu import build, forced

ROOT = Path(__file__).resolve().parents[2]


def test_a_build_is_used_where_sources_and_architecture_are_the_same(tmp_path, monkeypatch):
    built: list[str] = []

    def make(arch: str) -> dict:
        built.append(arch)
        for name in build.MADE:
            (tmp_path / name).touch()
        return {**build.made_of(arch), "nvcc": "release 13.0"}

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "write_problems", lambda path: None)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    kernel = tmp_path / "csrc/kernel.cu"
    kernel.parent.mkdir()
    for arch, source in (("9.0", "a"), ("9.0", "a"), ("8.0", "a"), ("8.0", "b")):
        kernel.write_text(source)
        monkeypatch.setattr(sys, "argv", ["build.py", "--arch", arch])
        build.main()
    assert built == ["9.0", "8.0", "8.0"]


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_forced_problem_arrives_as_it_was_meant(tmp_path):
    """Every field of the launchers' problem through ``forced.cpp``, against stand-ins for them."""
    source = ROOT / "tests/cuda/gpu/forced.cpp"
    library = tmp_path / "forced.so"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", str(source),
         str(source.with_name("forced_stub.cpp")), "-o", str(library)], check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    numbers = iter(range(1001, 1100))

    def operand():
        return next(numbers), (next(numbers), next(numbers), next(numbers))

    names = ("input", "output", "grad_output")
    names += ("residual", "activated", "addend", "sum", "grad_sum")
    problem = {
        "storage": 2, "geometry": [1, 3, 4, 5, 6], "affine": 3, "noise": True,
        "given_scale": True, "seed": 7, "noise_train": 0.25, "stream": 9,
        "position": (10, 11, 12), "eps": 1e-3, "alpha": 0.5, "transform_eps": 0.125, "order": 1,
        "frozen": True, "stats": 13, "workspace": 14, "tier": 3, "threads": 64, "blocks": 15,
        "thread_groups": 16, "relu": True, **{name: operand() for name in names},
        "weight": (17, True), "bias": (18, False), "grad_weight": (19, False),
        "grad_bias": (20, True),
    }  # fmt: skip
    arrays = forced.arrays(problem)
    types = (ctypes.c_int64, ctypes.c_double, ctypes.c_void_p)
    size = ctypes.c_size_t()
    made = [(t * len(a))(*a) for t, a in zip(types, arrays, strict=True)]
    assert loaded.forced_workspace(*made, 1, ctypes.byref(size)) == 0
    seen = list((ctypes.c_double * size.value).in_dll(loaded, "seen"))
    operands = [n for name in names for n in (problem[name][0], *problem[name][1])]
    assert seen == [
        1, 2, 1, 3, 4, 5, 6, 3, 1, 1, 9, 0.25, 10, 11, 12, 1, 1, 1e-3, 0.5, 0.125,
        17, 1, 18, 0, 19, 0, 20, 1, *operands, 1, 3, 64, 15, 16, 7, 13, 14,
    ]  # fmt: skip
    assert loaded.forced_run(*made, 0, None) == size.value
    assert ctypes.c_double.in_dll(loaded, "seen").value == 0


def test_what_is_asked_of_torch_cuda_exists():
    """Names, and the keywords that are passed, in code that only a GPU reaches."""
    found: dict[str, set[str]] = {}
    for file in [*(ROOT / "benchmarks").glob("gpu_*.py"), *(ROOT / "tests/cuda/gpu").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else node
            if isinstance(called, ast.Attribute):
                name = ast.unparse(called)
                if re.fullmatch(r"torch\.(cuda|profiler)(\.\w+)+", name):
                    keywords = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else ()
                    found.setdefault(name, set()).update(keywords)
    assert {"torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.Event"} <= set(found)
    for name, keywords in found.items():
        value = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part)  # raises where there is no such name
        if keywords:
            assert keywords <= set(inspect.signature(value).parameters), name
