"""The layers of ``NOTES.md`` on a CPU: ``bench.py`` with a fixed selection.

    python benchmarks/cpu_layers.py [--threads 2] [any other option of bench.py]

Writes ``benchmarks/results/cpu_layers_<threads>_threads.json`` unless told another file.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from normnorm.cli import execute
from speed.options import parser

RESULTS = Path(__file__).resolve().parent / "results"
SELECTION = ["--device", "cpu", "--dtype", "float32"]
NETWORKS = ["--networks", "resnet18", "conv_net", "small_vit"]
SUITES = ["--suites", "resnet", "features", "tokens", "small", "batch sweep", "row sweep"]


def main(options: list[str]) -> int:
    """Runs the benchmark; its exit status."""
    threads = torch.get_num_threads()
    if "--threads" in options[:-1]:
        threads = options[options.index("--threads") + 1]
    name = f"cpu_layers_{threads}_threads.json"
    words = [*SELECTION, *NETWORKS, *SUITES, "--json", str(RESULTS / name), *options]
    return execute(parser(), words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
