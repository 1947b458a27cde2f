"""The Triton backend: whether it can run here, and its registration.

It serves torch's CUDA (or ROCm) tensors. With ``TRITON_INTERPRET=1`` in the environment Triton
interprets kernels on the host, slowly, and the backend serves CPU tensors instead: for tests and
debugging without a GPU.
"""

import importlib
import importlib.metadata
import importlib.util
import os

import torch

from .. import backends

NAME = "triton"
_OLDEST = (3, 6)


def _interpreted() -> bool:
    """Whether Triton's environment variable selects the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def device_type() -> str:
    """The device type of the tensors that the kernels take in this process."""
    return "cpu" if _interpreted() else "cuda"


def _version() -> str | None:
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def unavailable_reason() -> str | None:
    """None if the kernels can run, else a sentence that says why not."""
    version = _version()
    if version is None:
        return "Triton is not installed: pip install 'normnorm[triton]', or a torch built for GPUs"
    if (release := _release(version)) and release < _OLDEST:
        return f"the kernels need Triton 3.6 or newer; got {version}"
    if not _interpreted() and not torch.cuda.is_available():
        return (
            "torch sees no GPU (TRITON_INTERPRET=1 in the environment runs the kernels on CPU "
            "tensors, slowly)"
        )
    try:
        importlib.import_module("..triton_kernels.launch", __package__)
    except Exception as error:  # another version of Triton may raise anything
        return f"the kernels do not import with Triton {version}: {error}"
    return None


def register() -> None:
    """Registers the backend."""
    launch = importlib.import_module("..triton_kernels.launch", __package__)
    backends.register(
        backends.Backend(
            NAME,
            device_type(),
            launch.normal_norm_forward,
            launch.normal_norm_backward,
            launch.fold_running_,
        )
    )


def info() -> dict[str, str]:
    """Triton's version, and whether kernels are compiled or interpreted."""
    where = "interpreted on the host" if _interpreted() else "compiled at the first call"
    return {"triton": _version() or "not installed", "kernels": where}
