"""Under torch.compile, torch.export, make_fx and fake tensors the layers do what they do eagerly.

Compiling the reference backend traces through its whole definition, which takes seconds a graph:
the fast tests keep to a few such graphs and leave the rest of the table to the slow ones.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import sys
import types

import pytest
import torch
from layer_table import KINDS, LAYERS, RUNNING, few
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import normnorm
import normnorm.functional as F
from normnorm import backends

CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # float32, another order of the same operations


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(layer, input):
    """(output, gradients of input and parameters) of one training step."""
    input = input.clone().requires_grad_()
    output = layer(input)
    gradients = torch.autograd.grad(output.sin().sum(), (input, *layer.parameters()))
    return output.detach(), gradients


def assert_compiles_to_the_same(row, compiler, training, noise, options=None, steps=2, **keywords):
    if row in RUNNING:
        keywords.setdefault("track_running_stats", True)
    eager = row.make(noise_train=noise, **keywords).train(training)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, backend=compiler, fullgraph=True, options=options)
    for number in range(steps):
        input = row.input(torch.float32, number)
        torch.manual_seed(number)
        expected = step(eager, input)
        torch.manual_seed(number)
        found = step(compiled, input)
        assert_close(found[0], expected[0], **CLOSE)
        assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5)
        for name, buffer in eager.named_buffers():
            assert_close(layer.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)
    if training and row in RUNNING:
        assert layer.num_batches_tracked == steps


def rows(fast):
    """Every (layer, training, noise); those for which ``fast`` is false are marked slow."""
    return [
        pytest.param(
            row,
            training,
            noise,
            marks=() if fast(row, training, noise) else pytest.mark.slow,
            id=f"{row.name}-{'train' if training else 'eval'}-{noise}",
        )
        for row in LAYERS
        for training in (True, False)
        for noise in (0.0, 0.4)
    ]


@pytest.mark.parametrize(
    ("row", "training", "noise"),
    rows(lambda row, training, noise: row in KINDS[:2] and training == bool(noise)),
)
def test_every_layer_traces_to_one_graph_with_the_same_results(row, training, noise, backend):
    assert_compiles_to_the_same(row, "eager", training, noise, steps=1)


def few_graphs(row, training, noise):
    """One training graph, and the evaluation of frozen statistics."""
    return row is KINDS[0] and noise == 0


@pytest.mark.parametrize(("row", "training", "noise"), rows(few_graphs))
def test_compiled_forward_and_backward_graphs_equal_eager(row, training, noise, backend):
    assert_compiles_to_the_same(row, "aot_eager", training, noise)


@pytest.mark.parametrize(("row", "training", "noise"), rows(lambda *_: False))
def test_generated_code_equals_eager(row, training, noise, backend):
    # Inductor has a random stream of its own unless told to use eager's.
    options = {"fallback_random": True}
    assert_compiles_to_the_same(row, "inductor", training, noise, options)


@pytest.mark.parametrize("momentum", [0.3, None])
def test_running_statistics_fold_in_the_graph(momentum, backend):
    row = KINDS[0]
    assert_compiles_to_the_same(row, "eager", True, 0.0, steps=3, momentum=momentum)


class Counter:
    """A compiler that counts graphs and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    def targets(self, number=-1):
        nodes = self.graphs[number].graph.nodes
        return [str(node.target) for node in nodes if node.op == "call_function"]


@pytest.mark.parametrize("row", few(KINDS, KINDS[:1]))
def test_no_step_compiles_again(row, backend):
    counter = Counter()
    layer = row.make()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for number in range(5):
        compiled(row.input(torch.float32, number)).sum().backward()
        layer.zero_grad()
    assert len(counter.graphs) == 1
    layer.eval()
    for number in range(3):
        compiled(row.input(torch.float32, number))
    assert len(counter.graphs) == 2


@pytest.mark.parametrize("row", few(KINDS, KINDS[:2]))
def test_batch_sizes_share_a_graph(row, backend):
    counter = Counter()
    layer = row.make(noise_train=0.0)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    eager = copy.deepcopy(layer)
    for size in (6, 7, 8):  # no other dimension has these sizes
        input = torch.cat([row.input(torch.float32, seed) for seed in range(4)])[:size]
        assert_close(compiled(input), eager(input), **CLOSE)
    assert len(counter.graphs) == 1


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_training_step_folds_into_another_graph(momentum, backend):
    counter = Counter()
    layer = KINDS[0].make(momentum=momentum)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for number in range(5):
        compiled(KINDS[0].input(torch.float32, number))
    assert len(counter.graphs) == 1
    assert layer.num_batches_tracked == 5


# Noise whose weight changes between steps


@pytest.mark.parametrize("row", few(KINDS, KINDS[1:2]))
def test_annealed_noise_takes_effect_in_compiled_layers(row, backend):
    layer = row.make(noise_train=0.8)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    for noise in (0.8, 0.4, 0.0, 0.3):
        layer.noise_train = eager.noise_train = noise
        torch.manual_seed(1)
        expected = eager(row.input(torch.float32))
        torch.manual_seed(1)
        assert_close(compiled(row.input(torch.float32)), expected, **CLOSE)


@pytest.mark.parametrize("row", few(KINDS, KINDS[:1]))
@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_annealed_noise_compiles_again_once_at_most(row, dynamic, graphs, backend):
    counter = Counter()
    layer = row.make()
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=dynamic)
    for number in range(12):
        layer.noise_train = 0.8 - 0.05 * number
        compiled(row.input(torch.float32, number)).sum().backward()
    assert len(counter.graphs) == graphs


@pytest.mark.parametrize("row", few(KINDS, ()))
def test_annealed_noise_has_the_gradients_of_eager(row, backend):
    layer = row.make()
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for number, noise in enumerate((0.8, 0.4, 0.2)):
        layer.noise_train = eager.noise_train = noise
        input = row.input(torch.float32, number)
        torch.manual_seed(number)
        expected = step(eager, input)
        torch.manual_seed(number)
        found = step(compiled, input)
        assert_close(found[0], expected[0], **CLOSE)
        assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5)


def test_two_layers_anneal_in_one_graph(backend):
    counter = Counter()
    row = KINDS[0]
    model = torch.nn.Sequential(row.make(), torch.nn.ReLU(), row.make())
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for number in range(6):
        model[0].noise_train = 0.5 - 0.05 * number
        model[2].noise_train = 1.0 - 0.1 * number
        compiled(row.input(torch.float32, number))
    assert len(counter.graphs) == 2


def annealed_arguments(row):
    input = row.input(torch.float32)
    config = (
        row.kind, row.num_groups, row.normalized_ndim, 1e-5, torch.tensor(0.4, dtype=torch.float64),
        1.0, 2, 0.0, 0, False, "", "auto",
    )  # fmt: skip
    layer = row.make()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    return input, weight, bias, torch.tensor([5]), config


@pytest.mark.parametrize("row", few(KINDS, KINDS[:1]))
def test_annealed_ops_are_sound(row):
    input, weight, bias, seed, config = annealed_arguments(row)
    ops = torch.ops.normnorm
    tracked = [t.requires_grad_() for t in (input, weight, bias)]
    forward = (tracked[0], None, None, None, *tracked[1:], None, seed, None, False, True, *config)
    torch.library.opcheck(ops.normal_norm_forward.annealed, forward)
    stats = ops.normal_norm_forward.annealed(*forward)[1]
    backward = (
        input.detach().cos(), input.detach(), stats, weight.detach(), bias.detach(), None, seed,
        None, True, True, True, False, *config,
    )  # fmt: skip
    torch.library.opcheck(ops.normal_norm_backward.annealed, backward)


def test_annealed_ops_equal_the_ops(backend):
    row = KINDS[0]
    input, weight, bias, seed, config = annealed_arguments(row)
    plain = (*config[:4], 0.4, *config[5:])
    tensors = (input, None, None, None, weight, bias, None, seed, None, False, True)
    ops = torch.ops.normnorm
    found = ops.normal_norm_forward.annealed(*tensors, *config)
    for one, other in zip(found, ops.normal_norm_forward(*tensors, *plain), strict=True):
        assert torch.equal(one, other)


# What a compiler sees


def test_reference_backend_is_traced_through():
    row = KINDS[0]
    counter = Counter()
    with normnorm.use_backend("reference"):
        compiled = torch.compile(row.make(), backend=counter, fullgraph=True)
        compiled(row.input(torch.float32))
    (graph,) = counter.graphs
    targets = {str(node.target) for node in graph.graph.nodes if node.op != "placeholder"}
    # The seed's draw alone is an op: the backward pass must not draw it again.
    assert {target for target in targets if "normnorm" in target} == {"normnorm.draw_seed.default"}


def test_generated_code_of_the_reference_backend_is_fused():
    """Of some hundred elementwise operations only the last result is written to memory."""
    row = KINDS[0]
    layer = row.make().eval()
    model = torch.nn.Sequential(torch.nn.ReLU(), layer, torch.nn.Sigmoid())
    input = row.input(torch.float32)
    with normnorm.use_backend("reference"), torch.no_grad():
        compiled = torch.compile(model, fullgraph=True)
        found, (code,) = run_and_get_code(compiled, input)
        assert_close(found, model(input), **CLOSE)
    assert "normnorm" not in code
    assert code.count(f"empty_strided_cpu({row.shape}") == 1


COMPILED = [
    name
    for name, reason in normnorm.available_backends().items()
    if reason is None and name not in ("reference", "cuda")
]


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_backend_is_a_draw_an_op_and_a_fold_in_the_graph(name):
    row = KINDS[0]
    counter = Counter()
    with normnorm.use_backend(name):
        compiled = torch.compile(row.make(), backend=counter, fullgraph=True)
        compiled(row.input(torch.float32))
    ours = [target for target in counter.targets() if "normnorm" in target]
    assert len(ours) == 3
    assert "draw_seed" in ours[0]
    assert "normal_norm_forward" in ours[1]
    assert "fold_running_" in ours[2]


@pytest.mark.parametrize("name", COMPILED)
def test_generated_code_calls_the_op_forward_and_backward(name):
    row = KINDS[1]
    layer = row.make(noise_train=0.0)
    input = row.input(torch.float32).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    with normnorm.use_backend(name):
        found, codes = run_and_get_code(lambda x: step(compiled, x), input)
        assert_close(found, step(layer, input), rtol=1e-4, atol=1e-5)
    assert any("normnorm.normal_norm_forward" in code for code in codes)
    assert any("normnorm.normal_norm_backward" in code for code in codes)


@pytest.mark.parametrize("name", COMPILED)
def test_choosing_another_backend_reaches_compiled_layers(name):
    row = KINDS[0]
    counter = Counter()
    compiled = torch.compile(row.make(noise_train=0.0), backend=counter, fullgraph=True)
    input = row.input(torch.float32)
    with normnorm.use_backend(name):
        first = compiled(input)
    with normnorm.use_backend("reference"):
        second = compiled(input)
    assert len(counter.graphs) == 2
    assert_close(first, second, **CLOSE)
    assert any("normal_norm" in target for target in counter.targets(0))
    assert not any("normal_norm_" in target for target in counter.targets(1))


@pytest.mark.parametrize("row", few(RUNNING, KINDS[:1]))
def test_without_compiled_kernels_the_automatic_choice_traces(row, monkeypatch):
    monkeypatch.setattr(backends, "_automatic", {})
    with normnorm.use_backend("auto"):
        assert backends.resolve(torch.device("cpu")).name == "reference"
        assert_compiles_to_the_same(row, "eager", True, 0.0)


@pytest.fixture
def late(monkeypatch):
    """A backend for the CPU that nobody has looked for yet, and the choice of it that
    NORMNORM_BACKEND would make; a function of the reason why it cannot run."""
    name = "late"

    def register():
        backends.register(
            dataclasses.replace(backends.get("reference"), name=name, device_type="cpu")
        )

    def add(reason):
        module = types.ModuleType(f"normnorm.backends.{name}")
        module.unavailable_reason, module.register = lambda: reason, register
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(backends, "NAMES", (*backends.NAMES, name))
        monkeypatch.setattr(backends, "_late", {name: "cpu"})
        monkeypatch.setattr(backends, "_automatic", {})
        monkeypatch.setattr(backends, "_backends", dict(backends._backends))
        monkeypatch.setattr(backends, "_UNAVAILABLE", dict(backends._UNAVAILABLE))
        monkeypatch.setattr(backends, "_selected", name)
        return name

    return add


@pytest.mark.parametrize("choice", ["by name", "auto", "within the graph"])
def test_a_compiled_layer_is_the_first_to_look_for_a_backend(choice, late, monkeypatch):
    name = late(None)
    if choice != "by name":
        monkeypatch.setattr(backends, "_selected", "auto")
    layer = KINDS[0].make(noise_train=0.0)

    def forward(input):
        if choice != "within the graph":
            return layer(input)
        with normnorm.use_backend(name):
            return layer(input)

    counter = Counter()
    compiled = torch.compile(forward, backend=counter, fullgraph=True)
    for number in range(2):
        input = KINDS[0].input(torch.float32, number)
        found = compiled(input)
        with normnorm.use_backend("reference"):
            assert_close(found, layer(input), **CLOSE)
    (forward_call,) = [
        node for node in counter.graphs[0].graph.nodes if "normal_norm_forward" in str(node.target)
    ]
    assert forward_call.args[-1] == name
    assert len(counter.graphs) == 1


def test_a_compiled_layer_says_why_its_backend_cannot_run(late):
    late("no such device")
    compiled = torch.compile(KINDS[0].make(), backend="eager")
    with pytest.raises(RuntimeError, match="backend 'late' is unavailable: no such device"):
        compiled(KINDS[0].input(torch.float32))


def test_given_seed_gives_the_same_noise_compiled_or_not(backend):
    input = KINDS[0].input(torch.float32)

    def function(x, seed):
        return F.group_normal_norm(x, 3, training=True, noise_train=0.5, seed=seed)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    seed = torch.tensor([8])
    assert_close(compiled(input, seed), function(input, seed), **CLOSE)


def test_fresh_noise_each_call_of_a_compiled_layer(backend):
    row = KINDS[1]
    compiled = torch.compile(row.make(), backend="eager", fullgraph=True)
    input = row.input(torch.float32)
    assert not torch.equal(compiled(input), compiled(input))


@pytest.mark.parametrize("row", few(RUNNING, KINDS[:1]))
def test_bad_input_raises_while_compiling_and_changes_no_buffer(row, backend):
    layer = row.make(track_running_stats=True)
    compiled = torch.compile(layer, backend="eager")
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    wrong = row.input(torch.float32).long()
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        compiled(wrong)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name])


# Derivatives of compiled functions: right, or an error; never a wrong number without a word


ROW = KINDS[0]


def norm(x):
    return F.batch_normal_norm(x, None, None, None, training=True, noise_train=0.0)


def loss(x):
    return norm(x).sin().sum()


def second_derivative(function):
    def derive(x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    return derive


def compile_eager(function):
    return torch.compile(function, backend="eager", fullgraph=True)


def dual_tangent(function):
    def derive(x):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    return derive


def stacked(x):
    return torch.stack([x, x.cos()])


DERIVATIVES = {
    "grad": (lambda: torch.func.grad(loss), lambda: compile_eager(torch.func.grad(loss))),
    "grad of compiled": (
        lambda: torch.func.grad(loss), lambda: torch.func.grad(compile_eager(loss))
    ),
    "jvp": (
        lambda: lambda x: torch.func.jvp(norm, (x,), (x.cos(),))[1],
        lambda: compile_eager(lambda x: torch.func.jvp(norm, (x,), (x.cos(),))[1]),
    ),
    "dual numbers": (lambda: dual_tangent(norm), lambda: dual_tangent(compile_eager(norm))),
    "vmap": (
        lambda: lambda x: torch.vmap(norm)(stacked(x)),
        lambda: compile_eager(lambda x: torch.vmap(norm)(stacked(x))),
    ),
    "vmap of grad": (
        lambda: lambda x: torch.vmap(torch.func.grad(loss))(stacked(x)),
        lambda: compile_eager(lambda x: torch.vmap(torch.func.grad(loss))(stacked(x))),
    ),
    "second derivative": (
        lambda: second_derivative(loss), lambda: second_derivative(compile_eager(loss))
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize("name", DERIVATIVES)
def test_derivatives_of_compiled_functions_are_right_or_refused(name, backend):
    eager, compiled = DERIVATIVES[name]
    input = ROW.input()
    expected = eager()(input)
    found = None
    with contextlib.suppress(RuntimeError, torch._dynamo.exc.Unsupported):
        found = compiled()(input)
        assert found is not None, "the derivative vanished"
    if found is not None:
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Export


@pytest.mark.parametrize("row", few(LAYERS, KINDS[:2]))
def test_exported_evaluation_agrees(row, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(**extra)
    layer(row.input(torch.float32))
    layer.eval()
    program = torch.export.export(layer, (row.input(torch.float32),))
    for seed in range(2):
        input = row.input(torch.float32, seed)
        assert_close(program.module()(input), layer(input), **CLOSE)


@pytest.mark.parametrize("row", few(KINDS, KINDS[:1]))
def test_exported_evaluation_takes_any_batch_size(row, backend):
    layer = row.make().eval()
    sizes = ({0: torch.export.Dim("batch", min=2, max=64)},)
    input = torch.cat([row.input(torch.float32, seed) for seed in range(3)])
    program = torch.export.export(layer, (input[:4],), dynamic_shapes=sizes)
    for size in (2, 3, 5):
        assert_close(program.module()(input[:size]), layer(input[:size]), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
def test_exported_training_folds_the_running_statistics(row, backend):
    layer = row.make(noise_train=0.0, track_running_stats=True)
    eager = copy.deepcopy(layer)
    module = torch.export.export(layer, (row.input(torch.float32),)).module()
    for seed in range(2):
        input = row.input(torch.float32, seed)
        assert_close(module(input), eager(input), **CLOSE)
    found = dict(module.named_buffers())
    for name, buffer in eager.named_buffers():
        assert_close(found[name], buffer, rtol=1e-5, atol=1e-6)


def test_exported_program_is_saved_and_loaded(backend, tmp_path):
    layer = KINDS[0].make().eval()
    input = KINDS[0].input(torch.float32)
    path = tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (input,)), path)
    assert_close(torch.export.load(path).module()(input), layer(input), **CLOSE)


# Fake tensors and symbolic traces


@pytest.mark.parametrize("row", few(LAYERS, KINDS))
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fake_tensors_go_forward_and_backward(row, training, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    with FakeTensorMode():
        layer = row.make(**extra).train(training)
        input = torch.empty(row.shape, requires_grad=True)
        output = layer(input)
        output.sum().backward()
    assert output.shape == input.grad.shape == row.shape
    assert output.stride() == input.stride()
    assert layer.weight.grad.shape == layer.bias.grad.shape == row.parameter_shape


def traced_step(row):
    kind = row.kind

    def function(input, weight, bias):
        input, weight, bias = (t.detach().requires_grad_() for t in (input, weight, bias))
        if kind == "batch":
            output = F.batch_normal_norm(
                input, None, None, None, weight, bias, True, noise_train=0.0
            )
        else:
            shape = row.parameter_shape
            output = F.layer_normal_norm(input, shape, weight, bias, training=True, noise_train=0.0)
        return torch.autograd.grad(output.sin().sum(), (input, weight, bias))

    return function


@pytest.mark.parametrize("row", few(KINDS[:2], KINDS[1:2]))
@pytest.mark.parametrize("mode", [pytest.param("real", marks=pytest.mark.slow), "symbolic"])
def test_make_fx_traces_forward_and_backward(row, mode, backend):
    layer = row.make()
    arguments = (row.input(torch.float32), layer.weight.detach(), layer.bias.detach())
    graph = make_fx(traced_step(row), tracing_mode=mode)(*arguments)
    others = (row.input(torch.float32, 1), *arguments[1:])
    assert_close(graph(*others), traced_step(row)(*others), rtol=1e-4, atol=1e-5)
