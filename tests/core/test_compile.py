"""Under torch.compile and make_fx the layers do what they do eagerly.

Compiling the reference backend traces through its whole definition, which takes seconds a graph:
the fast tests keep to a few such graphs and leave the rest of the table to the slow ones.
"""

import contextlib
import copy

import pytest
import raw_ops
import torch
from conftest import targets
from layer_table import KINDS, RUNNING, few
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import normnorm
from normnorm import backends

CLOSE = {"rtol": 1e-5, "atol": 2e-6}  # float32, another order of the same operations
FORWARD = torch.ops.normnorm.normal_norm_forward


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


def assert_same_step(layer, eager, compiled, input, seed):
    """Output, gradients and buffers of a step of the compiled layer are those of the eager one."""
    torch.manual_seed(seed)
    expected = step(eager, input)
    torch.manual_seed(seed)
    found = step(compiled, input)
    assert_close(found[0], expected[0], **CLOSE)
    assert_close(found[1], expected[1], rtol=1e-4, atol=2e-5)
    for name, buffer in eager.named_buffers():
        assert_close(layer.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


def assert_compiles_to_the_same(row, compiler, training, noise, **keywords):
    if row in RUNNING:
        keywords.setdefault("track_running_stats", True)
    eager = row.make(noise_train=noise, **keywords).train(training)
    layer = copy.deepcopy(eager)
    # Inductor has a random stream of its own unless told to use eager's.
    options = {"fallback_random": True} if compiler == "inductor" else None
    compiled = torch.compile(layer, backend=compiler, fullgraph=True, options=options)
    for number in range(2):
        assert_same_step(layer, eager, compiled, row.input(torch.float32, number), number)
    if training and row in RUNNING:
        assert layer.num_batches_tracked == 2


# Batch layers without noise, one training graph with noise; every kind through the whole compiler.
GRAPHS = [
    ("aot_eager", KINDS[0], True, 0.0),
    ("aot_eager", KINDS[0], False, 0.0),
    ("aot_eager", KINDS[1], True, 0.4),
    *(("inductor", row, True, 0.4) for row in KINDS),
    ("inductor", KINDS[0], False, 0.4),
]


@pytest.mark.parametrize(
    ("compiler", "row", "training", "noise"),
    [
        pytest.param(
            *case,
            marks=() if case[0] == "aot_eager" else pytest.mark.slow,
            id=f"{case[0]}-{case[1].kind}-{'train' if case[2] else 'eval'}-{case[3]}",
        )
        for case in GRAPHS
    ],
)
def test_compiled_steps_equal_eager_ones(compiler, row, training, noise, backend):
    assert_compiles_to_the_same(row, compiler, training, noise)


def test_a_cumulative_average_folds_in_the_graph(backend):
    assert_compiles_to_the_same(KINDS[0], "eager", True, 0.0, momentum=None)


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


@pytest.mark.parametrize("momentum", [0.1, None])
def test_no_step_compiles_again(momentum, backend):
    counter = Counter()
    row = KINDS[0]
    layer = row.make(momentum=momentum)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for number in range(5):
        compiled(row.input(torch.float32, number)).sum().backward()
        layer.zero_grad()
    assert len(counter.graphs) == 1
    assert layer.num_batches_tracked == 5
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


# Noise whose weight changes between steps


@pytest.mark.parametrize("row", few(KINDS, KINDS[1:2]))
def test_annealed_noise_takes_effect_in_compiled_layers(row, backend):
    layer = row.make()
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for number, noise in enumerate((0.8, 0.4, 0.0, 0.3)):
        layer.noise_train = eager.noise_train = noise
        assert_same_step(layer, eager, compiled, row.input(torch.float32, number), number)


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (True, 1)])
def test_annealed_noise_of_two_layers_compiles_again_once_at_most(dynamic, graphs, backend):
    counter = Counter()
    row = KINDS[0]
    model = torch.nn.Sequential(row.make(), torch.nn.ReLU(), row.make())
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=dynamic)
    for number in range(6):
        model[0].noise_train = 0.5 - 0.05 * number
        model[2].noise_train = 1.0 - 0.1 * number
        compiled(row.input(torch.float32, number)).sum().backward()
    assert len(counter.graphs) == graphs


def test_annealed_ops_pass_opcheck_and_equal_the_ops(backend):
    row = KINDS[0]
    input, seed = row.input(torch.float32), torch.tensor([5])
    affine = [parameter.detach() for parameter in row.make().parameters()]
    plain = row.config(backend, noise_train=0.4)
    annealed = plain._replace(noise_train=torch.tensor(0.4, dtype=torch.float64))
    found, wanted = (
        op(*raw_ops.forward(config, input, *affine, seed=seed))
        for op, config in ((FORWARD.annealed, annealed), (FORWARD.default, plain))
    )
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    backward = raw_ops.backward(annealed, input.cos(), input, found[1], *affine, seed=seed)
    torch.library.opcheck(torch.ops.normnorm.normal_norm_backward.annealed, backward)
    leaves = [tensor.clone().requires_grad_() for tensor in (input, *affine)]
    torch.library.opcheck(FORWARD.annealed, raw_ops.forward(annealed, *leaves, seed=seed))


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


COMPILED = [t.backend for t in targets() if t.device == "cpu" and t.backend in ("cpu", "triton")]


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


@pytest.mark.parametrize("choice", ["by name", "auto", "within the graph"])
def test_a_compiled_layer_is_the_first_to_look_for_a_backend(choice, late, monkeypatch):
    late("cpu", triton=None)
    monkeypatch.setattr(backends, "_selected", "triton" if choice == "by name" else "auto")
    layer = KINDS[0].make(noise_train=0.0)

    def forward(input):
        if choice != "within the graph":
            return layer(input)
        with normnorm.use_backend("triton"):
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
    assert forward_call.args[-1] == "triton"
    assert len(counter.graphs) == 1


def test_a_compiled_layer_says_why_its_backend_cannot_run(late, monkeypatch):
    late("cpu", triton="no such device")
    monkeypatch.setattr(backends, "_selected", "triton")
    compiled = torch.compile(KINDS[0].make(), backend="eager")
    with pytest.raises(RuntimeError, match="backend 'triton' is unavailable: no such device"):
        compiled(KINDS[0].input(torch.float32))


def test_noise_of_compiled_functions_is_that_of_a_given_seed(backend):
    row = KINDS[1]
    input = row.input(torch.float32)

    def function(x, seed):
        return row.apply(x, noise_train=0.5, seed=seed)

    compiled = torch.compile(function, backend="eager", fullgraph=True)
    seed = torch.tensor([8])
    assert_close(compiled(input, seed), function(input, seed), **CLOSE)


def test_every_layer_of_a_compiled_graph_draws_a_seed_of_its_own():
    input = KINDS[1].input(torch.float32)
    layers = torch.nn.Sequential(KINDS[1].make(), KINDS[1].make())
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    outputs = []
    for function in (compiled, layers):
        torch.manual_seed(3)
        outputs.append(function(input))
    assert_close(outputs[0], outputs[1], **CLOSE)


# Derivatives of compiled functions: right, or an error; never a wrong number without a word


def norm(x):
    return KINDS[0].apply(x, noise_train=0.0)


def loss(x):
    return norm(x).sin().sum()


def second_derivative(function):
    def derive(x):
        x = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(x), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    return derive


def dual_tangent(function):
    def derive(x):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x.cos())
            return torch.autograd.forward_ad.unpack_dual(function(dual)).tangent

    return derive


def jvp(function):
    return lambda x: torch.func.jvp(function, (x,), (x.cos(),))[1]


def batched(function):
    return lambda x: torch.vmap(function)(torch.stack([x, x.cos()]))


@pytest.mark.filterwarnings("ignore:.*an autograd kernel was not registered")
@pytest.mark.parametrize(
    ("derive", "function", "inside"),
    [
        pytest.param(torch.func.grad, loss, True, id="grad"),
        pytest.param(torch.func.grad, loss, False, id="grad of compiled"),
        pytest.param(jvp, norm, True, id="jvp"),
        pytest.param(dual_tangent, norm, False, id="dual numbers"),
        pytest.param(batched, norm, True, id="vmap"),
        pytest.param(batched, torch.func.grad(loss), True, id="vmap of grad"),
        pytest.param(second_derivative, loss, False, id="second derivative"),
    ],
)
def test_derivatives_of_compiled_functions_are_right_or_refused(derive, function, inside, backend):
    """The derivative is taken ``inside`` the compiled function, or of it."""

    def compiled(function):
        return torch.compile(function, backend="eager", fullgraph=True)

    input = KINDS[0].input()
    expected = derive(function)(input)
    found = None
    with contextlib.suppress(RuntimeError, torch._dynamo.exc.Unsupported):
        derivative = compiled(derive(function)) if inside else derive(compiled(function))
        found = derivative(input)
        assert found is not None, "the derivative vanished"
    if found is not None:
        assert_close(found, expected, rtol=1e-9, atol=1e-9)


# Symbolic traces


@pytest.mark.parametrize("row", few(KINDS[:2], KINDS[1:2]))
def test_make_fx_traces_forward_and_backward(row, backend):
    def function(*tensors):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = row.apply(*leaves, noise_train=0.0)
        return torch.autograd.grad(output.sin().sum(), leaves)

    affine = [parameter.detach() for parameter in row.make().parameters()]
    graph = make_fx(function, tracing_mode="symbolic")(row.input(torch.float32), *affine)
    others = (row.input(torch.float32, 1), *affine)
    assert_close(graph(*others), function(*others), rtol=1e-4, atol=1e-5)
