"""The CUDA kernels of the compiled library: whether they can run here, why not, and which of them
would serve a tensor."""

import ctypes
import re
from typing import Any, NamedTuple

import torch

from .. import backends
from ..checks import check_forward
from ..config import KINDS, Config, ForwardArguments
from . import cpu

NAME = "cuda"
DEVICE_TYPE = "cuda"


def missing() -> str | None:
    """None where the library holds CUDA kernels; else one sentence that says why it does not."""
    reason = cpu.unavailable_reason()
    if reason is not None:
        return reason
    library = cpu.library()
    if not hasattr(library, "normnorm_without_cuda"):
        return "the compiled library is older than this package: it has to be built again"
    reason = cpu.text("normnorm_without_cuda")
    if reason:
        return f"the CUDA kernels were not built at installation: {reason}"
    return None


def architectures() -> list[str]:
    """What the kernels were compiled for, as in TORCH_CUDA_ARCH_LIST: "9.0", "10.0+PTX"."""
    return cpu.text("normnorm_cuda_architectures").split()


def serves(compiled: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for the architectures ``compiled`` runs on a GPU of a compute capability:
    machine code within its major version, PTX on everything newer."""
    for word in compiled:
        number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
        assert number is not None, word
        major, minor, variant, ptx = int(number[1]), int(number[2]), number[3], number[4]
        if variant == "a":  # of one architecture alone, as PTX too
            if (major, minor) == capability:
                return True
            continue
        if major == capability[0] and minor <= capability[1]:
            return True
        if ptx and not variant and (major, minor) <= capability:
            return True
    return False


def _versions() -> tuple[int, int]:
    """(CUDA runtime that is linked in, newest one that the driver serves), 13000 for 13.0; a
    missing driver is 0."""
    versions = (ctypes.c_int * 2)()
    cpu.library().normnorm_cuda_versions(versions)
    return versions[0], versions[1]


def _version_text(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def unavailable_reason() -> str | None:
    """None where the kernels can run; else one sentence that says why not."""
    reason = missing()
    if reason is not None:
        return reason
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if torch.cuda.device_count() == 0:
        return "torch sees no GPU (there is none, its driver is missing, or it is hidden from us)"
    runtime, driver = _versions()
    # A driver serves every runtime of its own major version.
    if driver // 1000 < runtime // 1000:
        return (
            f"the kernels were built with CUDA {_version_text(runtime)} and the driver serves CUDA "
            f"up to {_version_text(driver)}: update it (CUDA 13 needs R580 or newer); until then "
            "Triton serves the GPU"
        )
    found = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    if not any(serves(architectures(), capability) for capability in found):
        wanted = ", ".join(f"{major}.{minor}" for major, minor in sorted(set(found)))
        return (
            f"the kernels were compiled for {' '.join(architectures())}, and the GPU here is "
            f"{wanted}: build them with TORCH_CUDA_ARCH_LIST={wanted.split(', ')[0]}"
        )
    return None


def register() -> None:
    """Takes the kernels into the registry."""
    backends.register_compiled(NAME, DEVICE_TYPE)


def info() -> dict[str, str]:
    """How the kernels were built: architectures, compiler, runtime; and what the driver serves."""
    reason = missing()
    if reason is not None:
        return {"unavailable": reason}
    runtime, driver = _versions()
    return {
        "architectures": " ".join(architectures()),
        "compiler": cpu.text("normnorm_cuda_compiler"),
        "runtime": _version_text(runtime),
        "driver": _version_text(driver) if driver else "none",
    }


# --- which kernels would serve a tensor ---


class Device(NamedTuple):
    """The limits of a GPU that plans depend on."""

    name: str
    multiprocessors: int
    shared_bytes: int  # shared memory that one block may ask for
    clusters: bool  # whether blocks can share their memory (compute capability 9.0 on)


# From NVIDIA's data sheets and the CUDA programming guide's table of compute capabilities.
DEVICE_MODELS = {
    device.name: device
    for device in (
        Device("A100", 108, 166912, False),
        Device("L40S", 142, 101376, False),
        Device("RTX4090", 128, 101376, False),
        Device("H100", 132, 232448, True),
        Device("H200", 132, 232448, True),
        Device("B200", 148, 232448, True),
    )
}


def current_device() -> Device | None:
    """The GPU that torch uses now; None where there is none."""
    if missing() is not None or torch.version.cuda is None or torch.cuda.device_count() == 0:
        return None
    index = torch.cuda.current_device()
    facts = (ctypes.c_int * 3)()
    if cpu.library().normnorm_cuda_device(index, facts) != 0:
        return None
    return Device(torch.cuda.get_device_name(index), facts[0], facts[1], bool(facts[2]))


def _fields(names: str, kind: Any) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


class _Request(ctypes.Structure):
    """PlanRequest of csrc/binding/plan_query.cpp."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        *_fields("num_groups normalized_ndim dim", ctypes.c_int64),
        *_fields("sizes strides", ctypes.POINTER(ctypes.c_int64)),
        *_fields("storage channels_last noise affine backward", ctypes.c_int32),
        *_fields("multiprocessors shared_bytes clusters", ctypes.c_int32),
    ]


class _Answer(ctypes.Structure):
    """PlanAnswer of csrc/binding/plan_query.cpp."""

    _fields_ = [
        *_fields("groups group_size items workspace", ctypes.c_int64),
        *_fields("columns tier threads blocks thread_groups shared_chunks", ctypes.c_int32),
    ]


class Plan(NamedTuple):
    """How the kernels would serve one pass over a tensor."""

    layout: str  # "rows" or "columns": what a chunk of neighbouring elements belongs to
    groups: int
    group_size: int
    tier: str  # where a group is kept between the rounds
    threads: int  # of a block
    blocks: int  # of a thread group, which processes one group (columns: one tile) at a time
    thread_groups: int  # running at the same time
    waves: int  # groups or tiles that a thread group processes one after the other
    workspace: int  # bytes


# Of the C++ enum, in its order.
_STORAGES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TIERS = ("", "block", "cluster", "co-operating blocks", "streaming")


def _tier(answer: _Answer) -> str:
    tier = _TIERS[answer.tier]
    if tier == "streaming":
        return tier
    if tier == "block" and answer.threads == 32 and answer.shared_chunks == 0:
        return "warp, registers"
    return tier + (", registers" if answer.shared_chunks == 0 else ", registers and shared memory")


def plan(
    input: torch.Tensor,
    kind: str,
    device: Device,
    *,
    num_groups: int = 0,
    normalized_ndim: int = 0,
    noise: bool = True,
    affine: bool = True,
    backward: bool = False,
) -> Plan:
    """How one pass over a tensor of dense strides, which may be on the meta device, is served on a
    GPU that need not exist.

    ``kind`` and the numbers are as in the ops. ``affine``: with weight and bias, whose gradients
    are wanted. RuntimeError if the library holds no CUDA kernels, ValueError if no such layer takes
    that tensor.
    """
    reason = missing()
    if reason is not None:
        raise RuntimeError(reason)
    if input.dtype not in _STORAGES:
        raise ValueError(f"dtype must be one of {_STORAGES}; got {input.dtype}")
    dim = input.dim()
    last = dim > 2 and input.stride(1) == 1 and input.size(1) > 1
    config = Config(kind, num_groups, normalized_ndim, channels_last=last)
    check_forward(ForwardArguments(input, *(None,) * 8, False, True, config))
    request = _Request(
        KINDS.index(kind), num_groups, normalized_ndim, dim, (ctypes.c_int64 * dim)(*input.shape),
        (ctypes.c_int64 * dim)(*input.stride()), _STORAGES.index(input.dtype), last, noise, affine,
        backward, device.multiprocessors, device.shared_bytes, device.clusters,
    )  # fmt: skip
    answer = _Answer()
    ask = cpu.library().normnorm_cuda_plan_shape
    ask.restype = ctypes.c_char_p
    problem = ask(ctypes.byref(request), ctypes.byref(answer))
    if problem is not None:
        raise ValueError(problem.decode())
    return Plan(
        "columns" if answer.columns else "rows", answer.groups, answer.group_size, _tier(answer),
        answer.threads, answer.blocks, answer.thread_groups,
        -(-answer.items // max(answer.thread_groups, 1)), answer.workspace,
    )  # fmt: skip
