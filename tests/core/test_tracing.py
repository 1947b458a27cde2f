"""The tracers of torch that are not its compiler: torch.jit.trace, and torch.fx by symbols."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import Tensor, fx, nn

import normnorm
from normnorm import functional as F


class Residual(nn.Module):
    """Every kind of layer, the fused ones with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.batch = normnorm.BatchNormalNorm2d(4)
        self.act = normnorm.BatchNormalNormAct2d(4)
        self.group = normnorm.GroupNormalNorm(2, 4)
        self.instance = normnorm.InstanceNormalNorm2d(4, affine=True)
        self.channels = normnorm.LayerNormalNorm2d(4)
        self.layer = normnorm.LayerNormalNorm(6)
        self.add = normnorm.AddLayerNormalNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.batch(self.conv(x)), x)
        y = self.channels(self.instance(self.group(y)))
        output, stream = self.add(self.layer(y), x)
        return output + self.act(stream)


@pytest.fixture
def model() -> Residual:
    model = Residual()
    model(torch.randn(3, 4, 5, 6).exp())  # running statistics, lambda among them, of their own
    return model.eval()


def traced(model: nn.Module, x: Tensor, check: bool) -> torch.jit.ScriptModule:
    """The traced module, saved and loaded."""
    with warnings.catch_warnings():
        # Tracing and saving are deprecated; a size compared in Python is a constant of the trace.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        file = io.BytesIO()
        torch.jit.save(torch.jit.trace(model, x, check_trace=check), file)
        file.seek(0)
        return torch.jit.load(file)


def test_a_traced_model_in_evaluation_gives_the_same_saved_and_loaded(cpu_backend, model):
    assert all(p.requires_grad for p in model.parameters())
    x = torch.randn(2, 4, 5, 6)
    loaded = traced(model, x, check=True)
    for input in (x, torch.randn(7, 4, 5, 6)):
        assert torch.equal(loaded(input), model(input))
    gradients = []
    for module in (model, loaded):
        input = x.clone().requires_grad_()
        gradients.append(torch.autograd.grad(module(input).square().sum(), input)[0])
    torch.testing.assert_close(*gradients)


def test_tracing_without_gradients_records_the_public_op(cpu_backend, model):
    """Which runs on any machine with normnorm, whatever kernels it has."""
    with torch.no_grad():
        loaded = traced(model, torch.randn(2, 4, 5, 6), check=True)
    found = {node.kind() for node in loaded.inlined_graph.nodes() if "norm" in node.kind()}
    assert found == {"normnorm::normal_norm_forward"}


def test_tracing_in_training_does_not_fail_and_folds(cpu_backend, model):
    x = torch.randn(2, 4, 5, 6)
    loaded = traced(model.train(), x, check=False)
    before = {name: buffer.clone() for name, buffer in loaded.named_buffers()}
    assert loaded(x).requires_grad
    after = dict(loaded.named_buffers())
    for name in ("running_mean", "running_var", "running_lmbda", "num_batches_tracked"):
        assert not torch.equal(after[f"batch.{name}"], before[f"batch.{name}"])


# torch.fx


class Doubled(normnorm.BatchNormalNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def assert_trains_the_same(graph: nn.Module, model: nn.Module, x: Tensor) -> None:
    """A training step, and evaluation by the statistics that it has moved."""
    outputs = []
    for module in (copy.deepcopy(graph), copy.deepcopy(model)):
        torch.manual_seed(1)
        outputs.append((module.train()(x), module.eval()(x)))
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_fx_sees_each_layer_as_one_module(model):
    graph = fx.symbolic_trace(model)
    graph.graph.lint()
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert called == [
        "conv", "batch", "act", "group", "instance", "channels", "layer", "add", "act",
    ]  # fmt: skip
    x = torch.randn(2, 4, 5, 6)
    assert_trains_the_same(graph, model, x)


def test_fx_sees_what_a_derived_class_adds():
    model = nn.Sequential(Doubled(4), nn.ReLU())
    graph = fx.symbolic_trace(model)
    x = torch.randn(2, 4, 5, 6)
    assert_trains_the_same(graph, model, x)
    assert_trains_the_same(pickle.loads(pickle.dumps(graph)), model, x)


def test_fx_sees_each_function_as_one_call():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(6))

        def forward(self, x: Tensor) -> Tensor:
            x, total = F.add_layer_normal_norm(x, x.exp(), (6,), self.weight)
            return F.group_normal_norm(x, 2) + F.instance_normal_norm(total)

    net, x = Net(), torch.randn(2, 4, 6)
    graph = fx.symbolic_trace(net)
    called = {node.target for node in graph.graph.nodes if node.op == "call_function"}
    assert {F.add_layer_normal_norm, F.group_normal_norm, F.instance_normal_norm} <= called
    assert torch.equal(graph(x), net(x))


def test_fx_refuses_a_layer_alone_and_a_lazy_one():
    for layer in (normnorm.BatchNormalNorm2d(4), normnorm.LayerNormalNorm(4)):
        with pytest.raises(TypeError, match=r"wrap it in nn.Sequential"):
            fx.symbolic_trace(layer)
    model = nn.Sequential(normnorm.LazyBatchNormalNorm2d())
    with pytest.raises(TypeError, match="input must be a tensor; got Proxy"):
        fx.symbolic_trace(model)
    assert model(torch.randn(2, 3, 4, 5)).shape == (2, 3, 4, 5)
