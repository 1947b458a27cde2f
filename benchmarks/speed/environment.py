"""Where and how the numbers of a run come about."""

import os
from dataclasses import replace
from datetime import datetime, timezone

import torch

from normnorm import backends, environment
from speed.results import Environment

_PACKAGES = ("triton", "liger-kernel", "quack-kernels", "torchvision", "timm", "numpy")


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def before(device: torch.device, seed: int) -> Environment:
    """The environment at the start of a run on ``device``."""
    found = environment.facts()
    same = ("normnorm", "torch", "python", "cuda", "platform", "cores", "threads")
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    isa = backends.cpu.info().get("isa")
    at, uncommitted = environment.commit()
    return Environment(
        **{name: found[name] for name in same},
        cpu=found["processor"],
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command_line=environment.command_line(),
        packages=environment.packages(_PACKAGES),
        cudnn=None if cudnn is None else str(cudnn),
        commit=at,
        uncommitted=uncommitted,
        backends=backends.available_backends(),
        isa=None if isa is None else str(isa),
        load_before=_load(),
        device="cuda" if device.type == "cuda" else "cpu",
        seed=seed,
        gpu=environment.gpu(device),
    )


def after(start: Environment, device: torch.device, seconds: float) -> Environment:
    """The same at the end of the run: load, duration, and the clocks while the GPU is warm."""
    gpu = environment.gpu(device)
    return replace(start, load_after=_load(), seconds=round(seconds, 1), gpu=gpu)
