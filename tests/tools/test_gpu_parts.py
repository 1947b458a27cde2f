"""What ``tests/cuda/gpu`` is made of, as far as it can be told without a GPU."""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import torch
from gpu import build

ROOT = Path(__file__).resolve().parents[2]


def test_a_build_is_used_where_sources_and_architecture_are_the_same(tmp_path, monkeypatch):
    built: list[str] = []

    def make(arch):
        built.append(arch)
        for name in build.MADE:
            (tmp_path / name).touch()
        return {**build.made_of(arch), "nvcc": "release 13.0"}

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    kernel = tmp_path / "csrc/kernel.cu"
    kernel.parent.mkdir()
    for arch, source in (("9.0", "a"), ("9.0", "a"), ("8.0", "a"), ("8.0", "b")):
        kernel.write_text(source)
        monkeypatch.setattr(sys, "argv", ["build.py", "--arch", arch])
        build.main()
    assert built == ["9.0", "8.0", "8.0"]


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
