"""Builds normnorm for the GPU of this machine, tests it there and measures it.

    make gpu-check [RESULTS=DIR]      python benchmarks/gpu_check.py --results DIR
    make gpu-check DRY=1              ... the same without a GPU, on tiny inputs

Needs no network: torch with CUDA, nvcc, setuptools, ninja, numpy and pytest have to be there. What
each stage does, and what the results say, is in ``docs/gpu.md``; the stages are in ``gpucheck/``.
"""

from __future__ import annotations

import sys

from gpucheck.main import main

if __name__ == "__main__":
    sys.exit(main())
