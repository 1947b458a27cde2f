"""The backends: which of them serves a device, what the switch does, what their ops return, and
that one's backward pass follows another's forward pass."""

import asyncio
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracle
import pytest
import raw_ops
import torch
from conftest import DEVICES, targets
from oracle import CASES, UNIT, Case, assert_within, bounds, draw, run
from oracle import to_numpy as numpy

import normnorm
from normnorm import backends
from normnorm.backends import cpu, cuda
from normnorm.statistics import Row

NAMES = ("reference", "cpu", "cuda", "triton")
AVAILABLE = [name for name, reason in normnorm.available_backends().items() if reason is None]
UNAVAILABLE = [name for name in NAMES if name not in AVAILABLE]
CPU_SERVERS = [target.backend for target in targets() if target.device == "cpu"]
PAIRS = itertools.permutations(targets(), 2)
each_pair = pytest.mark.parametrize(
    ("device", "first", "second"),
    [(a.device, a.backend, b.backend) for a, b in PAIRS if a.device == b.device],
)
OPS = torch.ops.normnorm


def _statistics(case: Case, backend: str, x, **options):
    """The statistics tensor of the raw op, with seed 5."""
    seed = torch.tensor([5], device=x.device)
    arguments = raw_ops.forward(case.config(backend, **options), x, seed=seed)
    return OPS.normal_norm_forward(*arguments)[1]


@pytest.fixture
def auto(monkeypatch):
    """The switch as it is without an environment variable, put back afterwards."""
    monkeypatch.setattr(backends, "_selected", "auto")


# --- which can run ---


@pytest.mark.parametrize("name", NAMES)
def test_the_backend_can_run_here(name):
    reason = normnorm.available_backends()[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    device = backends.get(name).device_type or "cpu"
    with normnorm.use_backend(name):
        y = normnorm.LayerNormalNorm(8, noise_train=0.0, device=device)(
            torch.randn(3, 8, device=device)
        )
    assert y.isfinite().all()


def test_available_backends_names_all_of_them_with_a_reason_for_each_that_cannot():
    found = normnorm.available_backends()
    assert tuple(found) == NAMES
    assert found["reference"] is None
    for reason in found.values():
        assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    found["reference"] = "changed by the caller"
    assert normnorm.available_backends()["reference"] is None


@pytest.mark.usefixtures("auto")
def test_auto_serves_every_device_here():
    for device in DEVICES:
        chosen = backends.resolve(torch.device(device)).name
        assert chosen in AVAILABLE
        if device == "cpu" and "cpu" in AVAILABLE:
            assert chosen == "cpu"


# --- backends that are looked for late ---


@pytest.mark.parametrize("use_first", [None, "triton", "cuda"])
def test_auto_prefers_the_cuda_kernels_to_triton_in_whatever_order_they_are_asked_for(
    use_first, late
):
    asked = late("cuda", cuda=None, triton=None)
    if use_first is not None:
        assert backends.get(use_first).name == use_first
    assert backends.resolve(torch.device("cuda"), "auto").name == "cuda"
    if use_first is None:
        assert asked == ["cuda"]  # Triton is not imported where the CUDA kernels serve
    assert backends.get("triton").name == "triton"
    assert backends.resolve(torch.device("cuda"), "auto").name == "cuda"


def test_auto_takes_what_there_is_and_looks_once(late):
    asked = late("cuda", cuda="no such GPU", triton=None)
    for _ in range(2):
        assert backends.resolve(torch.device("cuda"), "auto").name == "triton"
    with pytest.raises(RuntimeError, match="'cuda' is unavailable: no such GPU"):
        backends.get("cuda")
    assert asked == ["cuda", "triton"]
    late("cuda", cuda=None, triton=None)
    assert backends.resolve(torch.device("cuda"), "auto").name == "triton"


def test_auto_falls_back_on_the_reference_where_nothing_else_runs(late, caplog):
    caplog.set_level("INFO", "normnorm")
    late("cuda", cuda="not built", triton="not installed")
    assert backends.resolve(torch.device("cuda"), "auto").name == "reference"
    found = normnorm.available_backends()
    assert (found["cuda"], found["triton"]) == ("not built", "not installed")
    assert caplog.messages == [
        "backend 'cuda' is unavailable: not built", "backend 'triton' is unavailable: not installed"
    ]  # fmt: skip


def test_a_backend_whose_module_does_not_import_says_so(late, monkeypatch):
    late("cuda", cuda="not built", triton=None)
    monkeypatch.setitem(sys.modules, "normnorm.backends.triton", None)
    assert "does not import" in normnorm.available_backends()["triton"]
    with pytest.raises(RuntimeError, match="'triton' is unavailable: its module does not import"):
        backends.get("triton")


def test_import_looks_for_no_gpu():
    program = """
import sys, torch
torch.cuda.device_count = torch.cuda.is_available = lambda: 1 / 0
import normnorm
normnorm.LayerNormalNorm(4)(torch.randn(2, 4))
print("triton" in sys.modules, "normnorm.backends.triton" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False"]


# --- why the CUDA kernels cannot run ---


@pytest.mark.parametrize(
    ("compiled", "capability", "runs"),
    [
        ("8.0 9.0 10.0 12.0+PTX", (8, 0), True),
        ("8.0 9.0 10.0 12.0+PTX", (8, 9), True),  # machine code serves its major version
        ("8.0 9.0 10.0 12.0+PTX", (12, 1), True),
        ("8.0 9.0 10.0 12.0+PTX", (13, 0), True),  # by PTX
        ("8.0 9.0 10.0 12.0+PTX", (7, 5), False),
        ("8.6", (8, 0), False),
        ("9.0", (10, 0), False),
        ("9.0a", (9, 0), True),
        ("9.0a+PTX", (10, 0), False),
        ("10.0f", (10, 3), True),
        ("10.0f", (12, 0), False),
        ("8.0+PTX 9.0", (10, 0), True),
    ],
)
def test_which_gpus_the_compiled_architectures_serve(compiled, capability, runs):
    assert cuda.serves(compiled.split(), capability) is runs


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose library, torch and GPU suit each other; a test replaces one of them."""

    def says(function):
        return {"normnorm_without_cuda": "", "normnorm_cuda_architectures": "8.0 9.0"}[function]

    library = types.SimpleNamespace(normnorm_without_cuda=None)
    monkeypatch.setattr(cpu, "unavailable_reason", lambda: None)
    monkeypatch.setattr(cpu, "library", lambda: library)
    monkeypatch.setattr(cpu, "text", says)
    monkeypatch.setattr(cuda, "_versions", lambda: (13000, 13010))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return monkeypatch


@pytest.mark.parametrize(
    ("owner", "name", "value", "sentence"),
    [
        (cpu, "unavailable_reason", lambda: "no library", "no library"),
        (cpu, "text", lambda _: "NORMNORM_CUDA=1 was not set", "at installation: NORMNORM_CUDA=1"),
        (cpu, "library", lambda: types.SimpleNamespace(), "older than this package"),
        (torch.version, "cuda", None, "was built without CUDA"),
        (torch.cuda, "device_count", lambda: 0, "torch sees no GPU"),
        (cuda, "_versions", lambda: (13000, 12080), "CUDA 13.0.* up to 12.8.* R580 .*Triton"),
        (torch.cuda, "get_device_capability", lambda _: (12, 1), "for 8.0 9.0, .*=12.1"),
    ],
)
def test_each_reason_against_the_cuda_kernels_has_its_sentence(owner, name, value, sentence, gpu):
    assert cuda.unavailable_reason() is None
    gpu.setattr(owner, name, value)
    assert re.search(sentence, cuda.unavailable_reason())


# --- the switch ---


def _serving() -> str:
    """Which backend a layer on the CPU takes."""
    return backends.resolve(torch.device("cpu")).name


@pytest.mark.usefixtures("auto")
def test_use_backend_as_a_call_stays_until_the_next_call():
    for name in (*CPU_SERVERS, *CPU_SERVERS[::-1]):
        normnorm.use_backend(name)
        assert _serving() == name
    normnorm.use_backend("auto")
    assert _serving() == backends.resolve(torch.device("cpu"), "auto").name


@pytest.mark.parametrize(("variable", "name"), [(None, None), (None, "abacus"), ("cpu", None)])
@pytest.mark.usefixtures("auto")
def test_the_error_names_the_variable_only_if_it_is_set_to_the_name(variable, name, monkeypatch):
    monkeypatch.delenv("NORMNORM_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("NORMNORM_BACKEND", variable)
    with pytest.raises(ValueError, match=f"^backend must be 'auto' or one of .*; got {name!r}$"):
        normnorm.use_backend(name)
    monkeypatch.setenv("NORMNORM_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"^NORMNORM_BACKEND must be .*; got 'abacus'$"):
        backends.resolve(torch.device("cpu"), "abacus")


@pytest.mark.usefixtures("auto")
def test_contexts_nest_and_end_a_call_inside_with_their_block_or_an_exception():
    first, second = CPU_SERVERS[0], CPU_SERVERS[-1]
    automatic = _serving()
    with normnorm.use_backend(first):
        with normnorm.use_backend(second):
            with normnorm.use_backend("auto"):
                assert _serving() == automatic
            assert _serving() == second
        assert _serving() == first
        normnorm.use_backend(second)
        assert _serving() == second
    assert _serving() == automatic

    def fail():
        with normnorm.use_backend("reference"):
            raise KeyError("anything")

    with pytest.raises(KeyError, match="anything"):
        fail()
    assert _serving() == automatic


@pytest.mark.usefixtures("auto")
def test_one_context_object_serves_each_time_it_is_entered():
    for name in CPU_SERVERS:
        context = normnorm.use_backend(name)
        with context:
            assert _serving() == name
        normnorm.use_backend("reference" if name != "reference" else "auto")
        with context:
            assert _serving() == name
        normnorm.use_backend("auto")


def _chosen() -> str:
    """What the switch says in this thread and task."""
    return backends._chosen(backends._selected, "")


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize(("first", "second"), [("reference", "auto"), ("auto", "reference")])
def test_overlapping_blocks_of_two_threads_do_not_see_each_other(first, second):
    """Each thread is in its block while the other begins and ends its own."""
    with ThreadPoolExecutor(1) as other:
        with normnorm.use_backend(first):
            assert other.submit(_chosen).result() == "auto"
            block = other.submit(lambda: normnorm.use_backend(second).__enter__()).result()
            assert _chosen() == first
        assert _chosen() == "auto"
        assert other.submit(_chosen).result() == second
        other.submit(block.__exit__, None, None, None).result()
        assert other.submit(_chosen).result() == "auto"


@pytest.mark.usefixtures("auto")
def test_a_block_that_was_begun_between_anothers_call_and_its_entry_takes_nothing_over():
    ours = normnorm.use_backend("reference")
    theirs = normnorm.use_backend("cpu" if "cpu" in CPU_SERVERS else "reference")
    with ours, theirs:
        pass
    assert backends._selected == "auto"


@pytest.mark.usefixtures("auto")
def test_tasks_have_blocks_of_their_own_and_start_with_their_makers():
    async def within(name):
        before = _chosen()
        with normnorm.use_backend(name):
            await asyncio.sleep(0)
            return before, _chosen()

    async def tasks():
        with normnorm.use_backend("reference"):
            return await asyncio.gather(within("auto"), within("reference"))

    assert asyncio.run(tasks()) == [("reference", "auto"), ("reference", "reference")]
    assert backends._selected == "auto"


def test_an_unavailable_backend_is_refused_with_its_reason(monkeypatch):
    for name in UNAVAILABLE:
        before = backends._selected
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable") as caught:
            normnorm.use_backend(name)
        assert normnorm.available_backends()[name] in str(caught.value)
        assert backends._selected == before
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable"):
            _statistics(CASES[0], name, torch.randn(CASES[0].shape))
        monkeypatch.setattr(backends, "_selected", name)  # as the environment variable does
        layer = normnorm.BatchNormalNorm1d(4)
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable"):
            layer(torch.randn(8, 4))
        assert layer.num_batches_tracked.item() == 0
        monkeypatch.undo()


def test_a_backend_refuses_tensors_of_a_device_that_it_does_not_serve():
    for name in AVAILABLE:
        served = backends.get(name).device_type
        for device in DEVICES:
            if served in (None, device):
                continue
            with normnorm.use_backend(name), pytest.raises(RuntimeError, match=f"serves {served}"):
                normnorm.LayerNormalNorm(4, device=device)(torch.randn(2, 4, device=device))


@pytest.mark.parametrize(
    ("name", "said"), [("reference", "reference"), ("fastest", "NORMNORM_BACKEND must be 'auto'")]
)
def test_the_environment_names_the_backend(name, said):
    program = """
import torch, normnorm
try:
    normnorm.LayerNormalNorm(4)(torch.randn(2, 4))
    print(normnorm.backends.resolve(torch.device("cpu")).name)
except ValueError as error:
    print(error)
with normnorm.use_backend("auto"):
    normnorm.LayerNormalNorm(4)(torch.randn(2, 4))
"""
    environment = {**os.environ, "NORMNORM_BACKEND": name}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)


# --- forward and backward belong together ---


@each_pair
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_one_backends_backward_follows_anothers_forward(device, first, second, case, dtype):
    """With the statistics of the other backend, or running ones, within the same bounds."""
    t = raw_ops.operands(case, dtype, device=device)
    unit = raw_ops.GPU_UNIT if device == "cuda" else raw_ops.CPU_UNIT
    raw_ops.check(first, case, t, unit=unit, backward=second, noise_train=0.8)
    if case.kind == "batch":
        running = raw_ops.running_statistics(t)
        raw_ops.check(first, case, t, unit=unit, backward=second, running=running)


@each_pair
def test_the_chosen_backend_does_the_forward_pass_and_its_backward_pass(
    device, first, second, monkeypatch
):
    """Whatever the switch says by then."""
    reached = []

    def spy(backend):
        def forward(*arguments):
            reached.append(backend.name)
            return backend.forward(*arguments)

        def backward(*arguments):
            reached.append(backend.name)
            return backend.backward(*arguments)

        return dataclasses.replace(
            backend, forward=forward, backward=backward, step=None, gradient=None
        )

    for name in (first, second):
        monkeypatch.setitem(backends._backends, name, spy(backends.get(name)))
    layer = normnorm.BatchNormalNorm1d(4, device=device)
    x = torch.randn(8, 4, device=device, requires_grad=True)
    with normnorm.use_backend(first):
        y = layer(x)
    with normnorm.use_backend(second):
        y.sum().backward()
    assert reached == [first, first]


# --- what the ops return ---


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_statistics_tensor_holds_what_its_rows_say(case, dtype, backend, device):
    other = ("one_hot", "lognormal", "relu", "bimodal")[CASES.index(case) % 4]
    for law, options in (
        (other, {"noise_train": 0.5}),
        ("offset", {}),
        ("exponential", {"alpha": 0.3, "eps": 1e-2}),
        ("exponential", {"alpha": 0.3, "order": 1}),
    ):
        x = draw(case, law, 1, dtype, device)
        stats = _statistics(case, backend, x, **options)
        assert stats.shape == (8, case.groups)
        assert stats.dtype == oracle.compute_dtype(dtype)
        assert stats.is_contiguous()
        options["z"] = oracle.normals(case.shape, 5)
        exact = run(case, numpy(x), numpy(x), **options)
        allowed = bounds(case, exact, numpy(x), numpy(x), dtype=stats.dtype, **options)["stats"]
        rows = numpy(stats).copy()
        high, low = rows[Row.MEAN], rows[Row.MEAN_LOW]
        # The low part is what the high part lacks: no more than some roundings of it.
        assert (np.abs(low) <= 8 * UNIT[stats.dtype] * (np.abs(high) + 1)).all()
        rows[Row.MEAN], rows[Row.MEAN_LOW] = high + low, 0
        assert_within(torch.from_numpy(rows), exact["stats"], allowed, f"{law} statistics")
        if "noise_train" not in options:
            assert (stats[Row.NOISE_SCALE] == 0).all()


@pytest.mark.parametrize("case", [Case("batch", (30, 5)), Case("instance", (3, 5, 20))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_the_fold_moves_running_statistics(case, dtype, backend, device):
    """Unbiased variance, lambda as it is, the mean of the samples' values for instances."""
    x = draw(case, "exponential", 2, dtype, device)
    stats = _statistics(case, backend, x)
    exact = run(case, numpy(x), numpy(x))["stats"]
    mean, rstd, lmbda = (
        exact[row].reshape(-1, 5).astype(np.float64) for row in (Row.MEAN, Row.RSTD, Row.LMBDA)
    )
    variance = (1 / rstd**2 - 1e-5) * case.size / (case.size - 1)
    bound = 64 * UNIT[stats.dtype] + 4 * UNIT[dtype]
    for momentum, factor in ((0.1, 0.1), (1.0, 1.0), (0.0, 0.0), (None, 1 / 4)):
        running = [torch.full((5,), value, dtype=dtype, device=device) for value in (0.5, 2.0, 1.5)]
        tracked = torch.tensor(3, device=device)
        OPS.fold_running_(stats, *running, tracked, momentum, case.size, 1e-5, backend)
        assert tracked.item() == 4
        for buffer, old, new in zip(running, (0.5, 2.0, 1.5), (mean, variance, lmbda), strict=True):
            want = old + factor * (new.mean(0) - old)
            assert buffer.dtype == dtype
            assert_within(buffer, want, bound * (1 + np.abs(new).max(0)), "running statistic")
            if momentum == 0.0:
                assert (buffer == old).all()
