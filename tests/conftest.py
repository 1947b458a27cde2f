"""What every test file shares: the backends to test, one thread, fixed seeds.

* ``backend`` runs a test once for every (backend, device) pair that can run here and has that
  backend chosen while the test runs; ``device`` is the device of that pair. A backend that cannot
  run is left out of the list: its one skipped test, with the reason, is in ``test_backends.py``.
* ``DEVICES`` are the kinds of device of this machine.

With ``NORMNORM_HOST_RUN=1`` in the environment the CUDA backend is one of them without a GPU, its
kernels run on the CPU (``host_cuda/torch_library.py``).
"""

import dataclasses
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hypothesis
import pytest

# Before anything imports distutils: setuptools, which inductor uses, refuses to come second.
import setuptools  # noqa: F401
import torch

import normnorm
from normnorm import backends

_libraries: list[torch.library.Library] = []

if os.environ.get("NORMNORM_HOST_RUN") == "1":
    from host_cuda import torch_library

    torch_library.register()

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)

_Health = hypothesis.HealthCheck
hypothesis.settings.register_profile(
    "normnorm", derandomize=True, deadline=None, database=None, max_examples=40,
    suppress_health_check=[
        _Health.function_scoped_fixture, _Health.too_slow, _Health.differing_executors
    ],
)  # fmt: skip
hypothesis.settings.load_profile("normnorm")


class Target(NamedTuple):
    backend: str
    device: str


def targets() -> list[Target]:
    """Every backend that can run, on every device that it serves."""
    return [
        Target(name, device)
        for name, reason in normnorm.available_backends().items()
        if reason is None
        for device in DEVICES
        if backends.get(name).device_type in (None, device)
    ]


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    _stand_in_for_torchvision_ops()


def _stand_in_for_torchvision_ops() -> None:
    """Lets torchvision be imported where its compiled part cannot be loaded.

    PyPI's torchvision for Linux is linked against CUDA's torch. Beside a torch without CUDA its
    import stops at two operators that it expects to exist; its models do not use them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    try:
        for library in Path(found.origin).parent.glob("_C*.so"):
            torch.ops.load_library(library)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")  # kept: it lives as long as this
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _libraries.append(library)


@pytest.fixture(autouse=True)
def _fixed_start() -> Iterator[None]:
    """The same random numbers for each test, and no backend choice left behind by one."""
    torch.manual_seed(20250705)
    before = backends._selected
    yield
    after, backends._selected = backends._selected, before
    assert after == before, f"the test left the backend switched from {before!r} to {after!r}"


def _target_id(target: Target) -> str:
    return target.backend if target.device in ("cpu", target.backend) else "-".join(target)


@pytest.fixture(params=targets(), ids=_target_id)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


@pytest.fixture
def backend(target: Target) -> Iterator[str]:
    """The name of a backend, chosen for the length of the test."""
    with normnorm.use_backend(target.backend):
        yield target.backend


@pytest.fixture(params=[t.backend for t in targets() if t.device == "cpu"])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that serves the processor, chosen for the length of the test: for
    what is asked of modules and not of kernels, and is asked with tensors on the processor."""
    with normnorm.use_backend(request.param):
        yield request.param


@pytest.fixture
def device(target: Target) -> str:
    """The device on which ``backend`` is to be tested."""
    return target.device


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone after the test."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function that puts "cuda" and "triton", as given, in the place of those two: each with the
    reason why it cannot run on the device, or None, and with the functions of the reference. It
    returns a list to which each backend is added when it is looked for."""
    monkeypatch.setattr(backends, "_automatic", {})
    for registry in ("_backends", "_UNAVAILABLE"):
        known = getattr(backends, registry).items()
        without = {name: value for name, value in known if name not in ("cuda", "triton")}
        monkeypatch.setattr(backends, registry, without)

    def put(device: str, **reasons: str | None) -> list[str]:
        asked: list[str] = []
        monkeypatch.setattr(backends, "_late", dict.fromkeys(reasons, device))
        for name, reason in reasons.items():

            def unavailable_reason(name: str = name, reason: str | None = reason) -> str | None:
                asked.append(name)
                return reason

            def register(name: str = name) -> None:
                reference = backends.get("reference")
                backends.register(dataclasses.replace(reference, name=name, device_type=device))

            module = types.SimpleNamespace(unavailable_reason=unavailable_reason, register=register)
            monkeypatch.setitem(sys.modules, f"normnorm.backends.{name}", module)
        return asked

    return put
