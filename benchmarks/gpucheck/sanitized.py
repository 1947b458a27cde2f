"""The program that compute-sanitizer watches: every layer kind and rung, small, and its numbers.

Prints one line at the end, by which the watcher knows that it got there.
"""

from __future__ import annotations

import itertools
import sys

import torch

import normnorm
from gpucheck.rig import Rig
from gpucheck.stage import Failure

FINISHED = "every layer ran to its end"

# How to make a layer, an input for a GPU, and how long that input's first size is on a CPU.
_WORKS = {
    "batch": (lambda d: normnorm.BatchNormalNorm2d(12, device=d), (6, 12, 9, 10), 1),
    "batch-nc": (lambda d: normnorm.BatchNormalNorm1d(70, device=d), (300, 70), 6),
    "layer": (lambda d: normnorm.LayerNormalNorm(1000, device=d), (9, 1000), 1),
    "layer-long": (lambda d: normnorm.LayerNormalNorm(70001, device=d), (2, 70001), 1),
    "group": (lambda d: normnorm.GroupNormalNorm(4, 12, device=d), (5, 12, 9, 9), 1),
    "instance": (
        lambda d: normnorm.InstanceNormalNorm2d(6, affine=True, device=d), (3, 6, 20, 20), 1,
    ),
}  # fmt: skip


def _step(rig: Rig, name: str, dtype: torch.dtype, last: bool) -> None:
    make, shape, first = _WORKS[name]
    layer = make(rig.device)
    x = torch.randn(rig.pick(shape[0], first), *shape[1:], device=rig.device).to(dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], torch.ones_like(y))
    with torch.no_grad():
        evaluated = layer.eval()(x)
    rig.synchronize()
    if not all(bool(t.isfinite().all()) for t in (y, evaluated, *gradients)):
        raise Failure(f"{name} in {dtype} gave numbers that are not finite")


def main(dry: bool) -> None:
    rig = Rig.find(dry)
    if "cuda" not in rig.serving():
        raise Failure(f"backend 'cuda' cannot run: {rig.reasons()['cuda']}")
    torch.manual_seed(0)
    dtypes = rig.pick((torch.float32, torch.bfloat16), (torch.float32,))
    with rig.backend("cuda"):
        for name, dtype, last in itertools.product(_WORKS, dtypes, (False, True)):
            if not last or len(_WORKS[name][1]) == 4:
                _step(rig, name, dtype, last)
    print(FINISHED, flush=True)


if __name__ == "__main__":
    try:
        main("--dry" in sys.argv[1:])
    except Failure as sentence:
        sys.exit(str(sentence))
