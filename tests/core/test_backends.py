"""The backends: who serves, what the switch does, and that any two of them fit together."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import re
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from conftest import DEVICES, targets
from oracle import CASES, DTYPES, UNIT, Case, assert_within, bounds, draw, draw_parameters, run
from oracle import to_numpy as numpy

import normnorm
from normnorm import backends
from normnorm.backends import cpu, cuda
from normnorm.statistics import Row

NAMES = ("reference", "cpu", "cuda", "triton")
AVAILABLE = [name for name, reason in normnorm.available_backends().items() if reason is None]
UNAVAILABLE = [name for name in NAMES if name not in AVAILABLE]
SAME_DEVICE = [
    (device, first, second)
    for device in DEVICES
    for first, second in itertools.permutations(
        [target.backend for target in targets() if target.device == device], 2
    )
]
EITHER_WAY = [pair for pair in SAME_DEVICE if pair[1] < pair[2]]


def _name(value) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def _seed(value: int, device: str) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


def _forward(case: Case, backend: str, x, weight=None, bias=None, seed=5, **options):
    return torch.ops.normnorm.normal_norm_forward(
        x, None, None, None, weight, bias, None, _seed(seed, x.device), None, False, True,
        *case.config(backend, **options),
    )[:2]  # fmt: skip


def _backward(
    case: Case, backend: str, g, x, stats, weight, bias, needs=(True, True, True), seed=5, **options
):
    return torch.ops.normnorm.normal_norm_backward(
        g, x, stats, weight, bias, None, _seed(seed, x.device), None, *needs, False,
        *case.config(backend, **options),
    )  # fmt: skip


# --- who can run ---


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
def test_auto_serves_every_device_here(devices):
    for device in devices:
        chosen = backends.resolve(torch.device(device)).name
        assert chosen in AVAILABLE
        if device == "cpu" and "cpu" in AVAILABLE:
            assert chosen == "cpu"


# --- backends that are looked for late ---


@pytest.fixture
def late(monkeypatch):
    """A function that puts modules in the place of those of the GPU's backends, by name: a reason
    why the backend cannot run, or None. What they are asked is listed in its attribute."""
    for registry in ("_backends", "_automatic", "_UNAVAILABLE"):
        monkeypatch.setattr(backends, registry, dict(getattr(backends, registry)))
    for name in ("cuda", "triton"):
        backends._backends.pop(name, None)
        backends._UNAVAILABLE.pop(name, None)
    backends._automatic.pop("cuda", None)
    asked = []

    def put(**reasons):
        monkeypatch.setattr(backends, "_late", dict.fromkeys(reasons, "cuda"))
        for name, reason in reasons.items():
            module = types.ModuleType(f"normnorm.backends.{name}")

            def unavailable_reason(name=name, reason=reason):
                asked.append(name)
                return reason

            def register(name=name):
                right = backends.get("reference")
                backends.register(dataclasses.replace(right, name=name, device_type="cuda"))

            module.unavailable_reason, module.register = unavailable_reason, register
            monkeypatch.setitem(sys.modules, module.__name__, module)

    put.asked = asked
    return put


@pytest.mark.parametrize("use_first", [None, "triton", "cuda"])
def test_auto_prefers_the_cuda_kernels_to_triton_in_whatever_order_they_are_asked_for(
    use_first, late
):
    late(cuda=None, triton=None)
    if use_first is not None:
        assert backends.get(use_first).name == use_first
    assert backends.resolve(torch.device("cuda"), "auto").name == "cuda"
    assert backends.resolve(torch.device("cpu"), "auto").name in ("cpu", "reference")
    assert backends.get("triton").name == "triton"
    assert backends.resolve(torch.device("cuda"), "auto").name == "cuda"


def test_auto_takes_what_there_is_and_looks_once(late):
    late(cuda="no such GPU", triton=None)
    for _ in range(2):
        assert backends.resolve(torch.device("cuda"), "auto").name == "triton"
    with pytest.raises(RuntimeError, match="'cuda' is unavailable: no such GPU"):
        backends.get("cuda")
    assert late.asked == ["cuda", "triton"]
    late(cuda=None, triton=None)
    assert backends.resolve(torch.device("cuda"), "auto").name == "triton"


def test_auto_does_not_import_triton_where_the_cuda_kernels_serve(late):
    late(cuda=None, triton=None)
    assert backends.resolve(torch.device("cuda"), "auto").name == "cuda"
    assert late.asked == ["cuda"]


def test_auto_falls_back_on_the_reference_where_nothing_else_runs(late):
    late(cuda="not built", triton="not installed")
    assert backends.resolve(torch.device("cuda"), "auto").name == "reference"
    found = normnorm.available_backends()
    assert (found["cuda"], found["triton"]) == ("not built", "not installed")


def test_a_backend_whose_module_does_not_import_says_so(late, monkeypatch):
    late(cuda="not built", triton=None)
    monkeypatch.setitem(sys.modules, "normnorm.backends.triton", None)
    assert "does not import" in normnorm.available_backends()["triton"]
    with pytest.raises(RuntimeError, match="'triton' is unavailable: its module does not import"):
        backends.get("triton")


def test_a_compiled_graph_finds_the_backend_too(late):
    late(cuda="not built", triton=None)

    def choose(x):
        return x + len(backends.resolve(torch.device("cuda"), "auto").name)

    compiled = torch.compile(choose, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(1)).item() == len("triton")


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
        ("8.0 9.0 10.0 12.0+PTX", (9, 0), True),
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
    """A machine with a library, a torch and a GPU that suit each other; tests break one part."""

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


def test_nothing_is_in_the_way_where_all_fits(gpu):
    assert cuda.unavailable_reason() is None


@pytest.mark.parametrize(
    ("owner", "name", "value", "sentence"),
    [
        (cpu, "unavailable_reason", lambda: "no library", "no library"),
        (cpu, "text", lambda _: "no nvcc was found", "were not built at installation: no nvcc"),
        (cpu, "library", lambda: types.SimpleNamespace(), "older than this package"),
        (torch.version, "cuda", None, "was built without CUDA"),
        (torch.cuda, "device_count", lambda: 0, "torch sees no GPU"),
        (cuda, "_versions", lambda: (13000, 12080), "with CUDA 13.0, .* serves CUDA up to 12.8"),
        (torch.cuda, "get_device_capability", lambda _: (12, 1), "for 8.0 9.0, .*=12.1"),
    ],
)
def test_each_thing_in_the_way_has_its_sentence(owner, name, value, sentence, gpu):
    gpu.setattr(owner, name, value)
    assert re.search(sentence, cuda.unavailable_reason())


# --- the switch ---


def _serving(device: str = "cpu") -> str:
    """Which backend's forward a layer call reaches."""
    reached = []
    saved = dict(backends._backends)
    automatic = dict(backends._automatic)

    def spy(backend):
        def forward(*arguments):
            reached.append(backend.name)
            return backend.forward(*arguments)

        return dataclasses.replace(backend, forward=forward)

    try:
        backends._backends.update({name: spy(backend) for name, backend in saved.items()})
        backends._automatic.update({key: spy(backend) for key, backend in automatic.items()})
        normnorm.LayerNormalNorm(4, device=device).eval()(torch.randn(2, 4, device=device))
    finally:
        backends._backends.update(saved)
        backends._automatic.update(automatic)
    assert len(reached) == 1
    return reached[0]


@pytest.fixture
def auto(monkeypatch):
    """The switch as it is without an environment variable, put back afterwards."""
    monkeypatch.setattr(backends, "_selected", "auto")


CPU_SERVERS = [target.backend for target in targets() if target.device == "cpu"]


@pytest.mark.usefixtures("auto")
def test_use_backend_as_a_call_stays_until_the_next_call():
    for name in (*CPU_SERVERS, *CPU_SERVERS[::-1]):
        normnorm.use_backend(name)
        assert _serving() == name
        assert _serving() == name
    normnorm.use_backend("auto")
    assert _serving() == backends.resolve(torch.device("cpu"), "auto").name


@pytest.mark.usefixtures("auto")
def test_use_backend_as_a_context_ends_with_its_block():
    automatic = _serving()
    for name in CPU_SERVERS:
        with normnorm.use_backend(name):
            assert _serving() == name
        assert _serving() == automatic


@pytest.mark.parametrize(("variable", "name"), [(None, None), (None, "abacus"), ("cpu", None)])
@pytest.mark.usefixtures("auto")
def test_the_variable_is_blamed_only_for_what_it_is_set_to(variable, name, monkeypatch):
    monkeypatch.delenv("NORMNORM_BACKEND", raising=False)
    if variable is not None:
        monkeypatch.setenv("NORMNORM_BACKEND", variable)
    with pytest.raises(ValueError, match=f"^backend must be 'auto' or one of .*; got {name!r}$"):
        normnorm.use_backend(name)
    monkeypatch.setenv("NORMNORM_BACKEND", "abacus")
    with pytest.raises(ValueError, match=r"^NORMNORM_BACKEND must be .*; got 'abacus'$"):
        backends.resolve(torch.device("cpu"), "abacus")


@pytest.mark.usefixtures("auto")
def test_contexts_nest_and_a_call_inside_ends_with_the_block():
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


@pytest.mark.usefixtures("auto")
def test_an_exception_ends_a_context_too():
    automatic = _serving()

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


@pytest.mark.usefixtures("auto")
@pytest.mark.parametrize("order", [1, -1])
def test_overlapping_blocks_of_two_threads_do_not_see_each_other(order):
    """Each thread is in its block while the other begins and ends its own."""
    automatic, names = _serving(), ("reference", "auto")[::order]
    seen, steps = [], [threading.Event() for _ in range(3)]

    def first():
        with normnorm.use_backend(names[0]):
            steps[0].set()
            steps[1].wait(10)
            seen.append(backends._chosen(backends._selected, ""))
        steps[2].set()

    def second():
        steps[0].wait(10)
        seen.append(backends._chosen(backends._selected, ""))  # a block of another thread
        with normnorm.use_backend(names[1]):
            steps[1].set()
            steps[2].wait(10)
            seen.append(backends._chosen(backends._selected, ""))

    threads = [threading.Thread(target=target) for target in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == ["auto", *names]
    assert _serving() == automatic


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
        before = backends._chosen(backends._selected, "")
        with normnorm.use_backend(name):
            await asyncio.sleep(0)
            return before, backends._chosen(backends._selected, "")

    async def tasks():
        with normnorm.use_backend("reference"):
            return await asyncio.gather(within("auto"), within("reference"))

    assert asyncio.run(tasks()) == [("reference", "auto"), ("reference", "reference")]
    assert backends._selected == "auto"


@pytest.mark.parametrize("name", ["", "gpu", "Reference", "cpu ", "tpu"])
def test_an_unknown_backend_is_refused_with_the_names_there_are(name):
    before = backends._selected
    with pytest.raises(ValueError, match="'auto' or one of reference, cpu, cuda, triton") as caught:
        normnorm.use_backend(name)
    assert f"'{name}'" in str(caught.value)
    assert backends._selected == before


def test_an_unavailable_backend_is_refused_with_its_reason():
    for name in UNAVAILABLE:
        before = backends._selected
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable") as caught:
            normnorm.use_backend(name)
        assert normnorm.available_backends()[name] in str(caught.value)
        assert backends._selected == before
        case = CASES[0]
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable"):
            _forward(case, name, torch.randn(case.shape))


@pytest.mark.parametrize("name", ["", "gpu"])
def test_the_raw_ops_refuse_an_unknown_backend(name):
    case = CASES[0]
    x = torch.randn(case.shape)
    stats = _forward(case, "reference", x)[1]
    with pytest.raises(ValueError, match="backend must be"):
        _forward(case, name, x)
    with pytest.raises(ValueError, match="backend must be"):
        _backward(case, name, x, x, stats, None, None, (True, False, False))


def test_a_backend_refuses_tensors_of_a_device_that_it_does_not_serve(devices):
    for name in AVAILABLE:
        served = backends.get(name).device_type
        for device in devices:
            if served in (None, device):
                continue
            with normnorm.use_backend(name), pytest.raises(RuntimeError, match=f"serves {served}"):
                normnorm.LayerNormalNorm(4, device=device)(torch.randn(2, 4, device=device))


SCRIPT = """
import torch, normnorm
from normnorm import backends
layer = normnorm.LayerNormalNorm(4)
try:
    layer(torch.randn(2, 4, requires_grad=True)).sum().backward()
    print("served by", backends.resolve(torch.device("cpu")).name)
except Exception as error:
    print(type(error).__name__, error)
with normnorm.use_backend("auto"):
    layer(torch.randn(2, 4))
print("auto serves")
"""


@pytest.mark.parametrize("name", ["reference", "fastest"])
def test_the_environment_names_the_backend(name, tmp_path):
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = {
        **os.environ,
        "NORMNORM_BACKEND": name,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.strip().splitlines()
    if name == "reference":
        assert first == "served by reference"
    else:
        assert first.startswith("ValueError")
        assert "'fastest'" in first
    assert last == "auto serves"


def test_a_layer_refuses_an_unavailable_backend_that_the_environment_named(monkeypatch):
    for name in UNAVAILABLE:
        monkeypatch.setattr(backends, "_selected", name)
        layer = normnorm.BatchNormalNorm1d(4)
        with pytest.raises(RuntimeError, match=f"'{name}' is unavailable"):
            layer(torch.randn(8, 4))
        assert layer.num_batches_tracked.item() == 0
        monkeypatch.undo()


# --- forward and backward belong together ---


@pytest.mark.parametrize(("device", "first", "second"), SAME_DEVICE)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_one_backends_backward_follows_anothers_forward(device, first, second, dtype):
    """With the other's statistics and seed, to the bounds that its own would have to keep."""
    for case in CASES:
        x = draw(case, "lognormal", 1, dtype, device)
        weight, bias = draw_parameters(case, 1, dtype, device)
        g = torch.randn(case.shape, device=device).to(dtype)
        options = {"noise_train": 0.8}
        y, stats = _forward(case, first, x, weight, bias, **options)
        gradients = _backward(case, second, g, x, stats, weight, bias, **options)
        arguments = tuple(numpy(a) for a in (x, g, weight, bias))
        options["z"] = oracle.normals(case.shape, 5)
        exact = run(case, *arguments, **options)
        allowed = bounds(case, exact, *arguments, dtype=dtype, **options)
        for name, got in zip(("y", "du", "dweight", "dbias"), (y, *gradients), strict=True):
            assert_within(got, exact[name], allowed[name], f"{case} {name}")


@pytest.mark.parametrize(("device", "first", "second"), SAME_DEVICE)
def test_one_backends_backward_follows_anothers_frozen_forward(device, first, second):
    case = Case("batch", (5, 4, 3))
    x = draw(case, "exponential", 1, torch.float64, device)
    weight, bias = draw_parameters(case, 1, torch.float64, device)
    g = torch.randn(case.shape, dtype=torch.float64, device=device)
    running = [
        torch.tensor(values, dtype=torch.float64, device=device)
        for values in ([0.1, -1.0, 2.0, 0.0], [0.5, 1.0, 2.0, 3.0], [0.0, 0.4, 1.0, 2.0])
    ]
    y, stats, _ = torch.ops.normnorm.normal_norm_forward(
        x, *running, weight, bias, None, None, None, False, True, *case.config(first)
    )
    gradients = torch.ops.normnorm.normal_norm_backward(
        g, x, stats, weight, bias, None, None, None, *(True,) * 4, *case.config(second)
    )
    arguments = tuple(numpy(a) for a in (x, g, weight, bias))
    options = {"running": [numpy(s) for s in running]}
    exact = oracle.run_frozen(case, *arguments, **options)
    allowed = bounds(
        case, exact, *arguments, dtype=torch.float64, function=oracle.run_frozen, **options
    )
    for name, got in zip(("y", "du", "dweight", "dbias"), (y, *gradients), strict=True):
        assert_within(got, exact[name], allowed[name], name)


@pytest.mark.parametrize(("device", "first", "second"), SAME_DEVICE)
def test_the_backend_of_the_forward_pass_does_its_backward_pass(device, first, second, monkeypatch):
    """Whatever the switch says by then."""
    reached = []

    def spy(backend):
        def backward(*arguments):
            reached.append(backend.name)
            return backend.backward(*arguments)

        return dataclasses.replace(backend, backward=backward)

    for name in (first, second):
        monkeypatch.setitem(backends._backends, name, spy(backends.get(name)))
    layer = normnorm.BatchNormalNorm1d(4, device=device)
    x = torch.randn(8, 4, device=device, requires_grad=True)
    with normnorm.use_backend(first):
        y = layer(x)
    with normnorm.use_backend(second):
        y.sum().backward()
    assert reached == [first]


@pytest.mark.parametrize(("device", "first", "second"), EITHER_WAY)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_two_backends_give_the_same_with_the_same_seed(device, first, second, dtype):
    for case in CASES:
        x = draw(case, "student_t", 1, dtype, device)
        weight, bias = draw_parameters(case, 1, dtype, device)
        one, other = (
            _forward(case, name, x, weight, bias, noise_train=0.8)[0] for name in (first, second)
        )
        z = oracle.normals(case.shape, 5)
        arguments = (numpy(x), numpy(x), numpy(weight), numpy(bias))
        exact = run(case, *arguments, noise_train=0.8, z=z)
        allowed = bounds(case, exact, *arguments, dtype=dtype, noise_train=0.8, z=z)["y"]
        assert_within(one, numpy(other), 2 * allowed, str(case))


# --- what the ops return ---


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_the_statistics_tensor_holds_what_its_rows_say(case, dtype, backend, device):
    other = ("one_hot", "lognormal", "relu", "bimodal")[CASES.index(case) % 4]
    for law, noise_train in ((other, 0.5), ("offset", 0.0)):
        x = draw(case, law, 1, dtype, device)
        stats = _forward(case, backend, x, noise_train=noise_train)[1]
        assert stats.shape == (8, case.groups)
        assert stats.dtype == oracle.compute_dtype(dtype)
        assert stats.is_contiguous()
        z = oracle.normals(case.shape, 5)
        arguments = (numpy(x), numpy(x))
        exact = run(case, *arguments, noise_train=noise_train, z=z)
        allowed = bounds(case, exact, *arguments, dtype=stats.dtype, noise_train=noise_train, z=z)[
            "stats"
        ]
        rows = numpy(stats).copy()
        high, low = rows[Row.MEAN], rows[Row.MEAN_LOW]
        # the low part is what the high part lacks: no more than some roundings of it
        assert (np.abs(low) <= 8 * UNIT[stats.dtype] * (np.abs(high) + 1)).all()
        rows[Row.MEAN], rows[Row.MEAN_LOW] = high + low, 0
        assert_within(torch.from_numpy(rows), exact["stats"], allowed, f"{law} statistics")
        if noise_train == 0.0:
            assert (stats[Row.NOISE_SCALE] == 0).all()


def test_order_one_and_alpha_reach_the_statistics(backend, device):
    for case in CASES[::3]:
        x = draw(case, "exponential", 1, torch.float64, device)
        for options in ({"alpha": 0.3}, {"alpha": 0.3, "order": 1}, {"alpha": 0.0}, {"eps": 1e-2}):
            stats = _forward(case, backend, x, **options)[1]
            exact = run(case, numpy(x), numpy(x), **options)["stats"]
            np.testing.assert_allclose(numpy(stats[Row.LMBDA]), exact[Row.LMBDA].astype(float))
            np.testing.assert_allclose(numpy(stats[Row.RSTD]), exact[Row.RSTD].astype(float))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_not_asked_for_is_empty_and_the_others_are_the_same(case, backend, device):
    x = draw(case, "exponential", 1, torch.float32, device)
    weight, bias = draw_parameters(case, 1, torch.float32, device)
    g = torch.randn(case.shape, device=device)
    stats = _forward(case, backend, x, weight, bias, noise_train=0.5)[1]
    everything = _backward(case, backend, g, x, stats, weight, bias, noise_train=0.5)
    for needs in itertools.product((True, False), repeat=3):
        found = _backward(case, backend, g, x, stats, weight, bias, needs, noise_train=0.5)
        for needed, got, want in zip(needs, found, everything, strict=True):
            if needed:
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            else:
                assert got.numel() == 0


@pytest.mark.parametrize("instance", [False, True])
@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
def test_the_fold_moves_running_statistics_as_it_should(momentum, instance, dtype, backend, device):
    """Unbiased variance, lambda as it is, the mean of the samples' values for instances."""
    case = Case("instance", (3, 5, 20)) if instance else Case("batch", (30, 5))
    x = draw(case, "exponential", 2, dtype, device)
    stats = _forward(case, backend, x)[1]
    exact = run(case, numpy(x), numpy(x))["stats"]
    mean, rstd, lmbda = (
        exact[row].reshape(-1, 5).astype(np.float64) for row in (Row.MEAN, Row.RSTD, Row.LMBDA)
    )
    variance = (1 / rstd**2 - 1e-5) * case.size / (case.size - 1)
    running = [torch.full((5,), value, dtype=dtype, device=device) for value in (0.5, 2.0, 1.5)]
    tracked = torch.tensor(3, device=device)
    torch.ops.normnorm.fold_running_(stats, *running, tracked, momentum, case.size, 1e-5, backend)
    assert tracked.item() == 4
    factor = 1 / 4 if momentum is None else momentum
    bound = 64 * UNIT[stats.dtype] + 4 * UNIT[dtype]
    for buffer, old, new in zip(running, (0.5, 2.0, 1.5), (mean, variance, lmbda), strict=True):
        want = old + factor * (new.mean(0) - old)
        assert buffer.dtype == dtype
        assert_within(buffer, want, bound * (1 + np.abs(new).max(0)), "running statistic")
        if momentum == 0.0:
            assert (buffer == old).all()


def test_results_do_not_depend_on_the_number_of_threads(backend, device):
    cases = (
        Case("batch", (32, 12, 14, 14)),
        Case("layer", (129, 768), normalized_ndim=1),
        Case("group", (4, 32, 12, 12), num_groups=8),
        Case("instance", (8, 12, 16, 16)),
    )
    threads = torch.get_num_threads()
    try:
        for case in cases[: 1 if backend == "reference" else None]:
            found = []
            x = draw(case, "exponential", 1, torch.float32, device).requires_grad_()
            weight, bias = (
                p.requires_grad_() for p in draw_parameters(case, 1, torch.float32, device)
            )
            g = torch.randn(case.shape, device=device)
            for number in (1, 2, 3):
                torch.set_num_threads(number)
                y = case.apply(x, weight, bias, noise_train=0.5, seed=1)
                found.append((y.detach(), *torch.autograd.grad(y, (x, weight, bias), g)))
            for other in found[1:]:
                for got, want in zip(other, found[0], strict=True):
                    assert (got - want).abs().max() <= 2e-6 * want.abs().max(), case
    finally:
        torch.set_num_threads(threads)
