"""What is measured, and the check against the float64 reference that comes before."""

import math
from dataclasses import replace

import pytest
import torch
from bench_samples import BRIEF, CPU, DTYPES, EAGER, TINY, row
from layer_table import LAYERS as LAYER_ROWS
from torch import nn

from normnorm.cli import CommandError
from speed import case as case_module
from speed import measure
from speed.case import Case, bound, sums_in_storage, worst_error
from speed.networks import _Training, measure_network, networks
from speed.results import with_ratios
from speed.work import LAYERS, RESNET18, RESNET50, Work, named_shapes, preset

# One small work a layer class.
SMALL = tuple(
    Work(layer=row.name, shape=row.shape, groups=row.num_groups, suite="test")
    for row in LAYER_ROWS
    if row.kind != "layer"
) + (Work(layer="LayerNormalNorm", shape=(6, 10), suite="test"),)
each_work = pytest.mark.parametrize("work", SMALL, ids=lambda work: work.layer)


# Work


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_cover_every_layer_dtype_mode_and_format(device):
    for name in ("default", "full"):
        works = preset(name, device)
        assert {work.layer for work in works} == set(LAYERS)
        assert {work.mode for work in works} == {"noise", "quiet", "eval"}
        assert {work.memory_format for work in works} == {"contiguous", "channels_last"}
        assert {work.method for work in works} == (
            {"wall"} if device == "cpu" else {"graph", "stream"}
        )
        assert len(works) == len(set(works))
    assert {work.dtype for work in works} == set(DTYPES)
    assert {work.operations for work in works if work.mode == "eval"} == {("forward",)}
    assert len(preset("quick", device)) == 6 * (1 if device == "cpu" else 2)


@pytest.mark.parametrize(("name", "shapes"), [("resnet18", RESNET18), ("resnet50", RESNET50)])
def test_resnet_shapes_are_those_of_the_network(name, shapes):
    from torchvision import models

    seen = []
    with torch.device("meta"):
        net = getattr(models, name)()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1:]))
        net(torch.empty(2, 3, 224, 224))
    assert set(shapes) == set(map(tuple, seen))
    assert len(shapes) == len(set(shapes))


def test_shapes_choose_their_layers():
    for shape, layers in (
        ((8, 16), {"BatchNormalNorm1d", "LayerNormalNorm"}), ((8, 16, 4, 4), {"BatchNormalNorm2d"})
    ):  # fmt: skip
        assert {work.layer for work in named_shapes([], [shape], "quick", "cpu")} == layers
    group = named_shapes(["GroupNormalNorm"], [(4, 48, 5)], "quick", "cpu")
    assert {work.groups for work in group} == {16}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layer": "GroupNormalNorm", "shape": (2, 6, 4), "groups": 4}, "4 groups do not divide 6"),
        ({"layer": "BatchNormalNorm1d", "shape": (4, 3), "memory_format": "channels_last"},
         "channels_last needs 4 or 5 dimensions; got shape 4x3"),
        ({"layer": "InstanceNormalNorm2d", "shape": (2, 3, 1, 1)}, "more than one value"),
    ],
)  # fmt: skip
def test_impossible_work_is_refused(fields, sentence):
    with pytest.raises(CommandError, match=sentence):
        Work(suite="test", **fields)


def test_model_bytes_count_each_tensor_of_a_pass_once():
    work = Work(layer="LayerNormalNorm", shape=(10, 100), dtype="bfloat16", suite="test")
    found = [work.model_bytes(operation) for operation in ("forward", "backward", "full")]
    assert found == [2 * 2000, 3 * 2000, 5 * 2000]


# The check against the reference


@each_work
@pytest.mark.parametrize("mode", ["noise", "eval"])
def test_the_reference_in_chunks_is_the_reference(work, mode, monkeypatch):
    case = Case(replace(work, mode=mode), CPU, 1, 7)
    whole = case.expected(True, 7)
    monkeypatch.setattr(case_module, "_CHUNK", work.elements // 3)
    torch.testing.assert_close(case.expected(True, 7), whole, rtol=1e-12, atol=1e-12)


@each_work
@pytest.mark.parametrize("mode", ["noise", "eval"])
def test_for_torchs_layer_the_reference_is_torchs_in_float64(work, mode):
    case = Case(replace(work, mode=mode), CPU, 1, 3)
    module = case.module(ours=False).double()
    x = case.inputs[0].detach().double().requires_grad_()
    output = module(x)
    wanted = {"output": output.detach()}
    if mode == "noise":
        leaves = {"grad_input": x, "grad_weight": module.weight, "grad_bias": module.bias}
        found = torch.autograd.grad(output, tuple(leaves.values()), case.grads[0].double())
        wanted |= dict(zip(leaves, found, strict=True))
    torch.testing.assert_close(case.expected(False, 3), wanted, rtol=1e-9, atol=1e-9)


@each_work
@pytest.mark.parametrize(
    ("dtype", "mode"), [("float32", "noise"), ("float32", "eval"), ("bfloat16", "quiet")]
)
def test_every_eager_provider_does_every_layer(work, dtype, mode):
    rows = measure.measure(replace(work, dtype=dtype, mode=mode), EAGER, CPU, BRIEF)
    assert {(m.provider, m.status, m.message) for m in rows} == {(n, "ok", None) for n in EAGER}
    for m in rows:
        assert m.rounds >= 2
        assert m.error <= m.bound
        assert m.ratio is None if m.provider == "copy" else m.ratio > 0
        assert (m.kept_bytes is None) == (mode == "eval" or m.provider == "copy")


def test_torchs_running_sums_in_bfloat16_are_allowed_for_and_no_others():
    work = Work(layer="LayerNormalNorm", shape=(4096, 16), dtype="bfloat16", suite="test")
    rows = measure.measure(work, ["torch", "normnorm-cpu"], CPU, BRIEF)
    assert {m.status for m in rows} == {"ok"}
    bounds = {m.provider: m.bound for m in rows}
    assert bounds["normnorm-cpu"] == bound(work) < 0.02
    assert bounds["torch"] == bound(work) + sums_in_storage(work) > 0.4


def test_channels_last_inputs_stay_so_and_are_checked():
    work = Work(
        layer="BatchNormalNorm2d", shape=(4, 6, 5, 3), memory_format="channels_last", suite="test"
    )
    case = Case(work, CPU, 2, 1)
    for x in (*case.inputs, *case.grads):
        assert x.is_contiguous(memory_format=torch.channels_last)
    assert not case.inputs[0].equal(case.inputs[1])
    assert {m.status for m in measure.measure(work, EAGER, CPU, BRIEF)} == {"ok"}


@pytest.mark.parametrize(
    ("work", "name"),
    [
        (TINY, "compiled-torch"),
        pytest.param(SMALL[1], "compiled-reference", marks=pytest.mark.slow),
    ],
    ids=["torch", "reference"],
)
def test_compiled_providers_match_the_reference_too(work, name):
    rows = measure.measure(work, [name], CPU, BRIEF)
    assert {(m.provider, m.status, m.message) for m in rows} == {(name, "ok", None)}


def test_a_backend_provider_runs_that_backend(monkeypatch):
    from normnorm import backends

    served = []

    def recorded(name, function):
        return function and (lambda *a: (served.append(name), function(*a))[1])

    for name in ("cpu", "reference"):
        it = backends.get(name)
        spy = replace(it, forward=recorded(name, it.forward), step=recorded(name, it.step))
        monkeypatch.setitem(backends._backends, name, spy)
    for name in ("cpu", "reference"):
        served.clear()
        measure.measure(TINY, [f"normnorm-{name}"], CPU, BRIEF)
        assert set(served) == {name}


def test_the_worst_error_is_relative_and_nan_is_worst():
    value = {"output": torch.tensor([4.0, 1.0]), "grad_input": torch.tensor([10.0])}
    off = {"output": torch.tensor([4.0, 1.4]), "grad_input": torch.tensor([10.5])}
    assert worst_error(off, value) == ("output", pytest.approx(0.1))
    off["grad_input"] = torch.tensor([math.nan])
    assert worst_error(off, value) == ("grad_input", math.inf)
    assert bound(TINY) < 1e-5 < bound(replace(TINY, dtype="bfloat16")) < 0.02


def test_the_ratio_is_to_the_faster_of_torchs():
    rows = [row("torch", 2.0), row("cudnn", 1.0), row("normnorm-cuda", 1.5), row("copy", 0.1)]
    found = [(r.ratio, r.peer) for r in with_ratios(rows)]
    assert found == [(2.0, "cudnn"), (1.0, "cudnn"), (1.5, "cudnn"), (None, None)]
    assert with_ratios([rows[2], row("torch", None)])[0].ratio is None


# Networks


def test_networks_get_the_norm_layers_they_are_told_to():
    conv, encoder = networks("quick", "cpu")
    for network, layers in ((replace(conv, batch=2), 3), (replace(encoder, batch=1), 9)):
        rows = measure_network(network, ["torch", "normnorm-cpu"], CPU, BRIEF)
        assert [(r.status, r.norm_layers) for r in rows] == [("ok", layers)] * 2
        assert rows[1].norm == network.layer
        assert rows[0].ratio == 1
        assert rows[0].rate == pytest.approx(rows[0].units / rows[0].median_ms * 1e3)
        assert all(r.peak_bytes > 0 for r in rows)


def test_a_network_step_trains():
    training = _Training(networks("quick", "cpu")[0], "normnorm-cpu", CPU, 1)
    training.optimizer.param_groups[0]["lr"] = 0.01
    losses = []
    for _ in range(15):
        training()
        losses.append(training.loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_network_that_diverges_is_wrong_and_a_missing_library_is_said():
    network = networks("quick", "cpu")[0]

    def diverging(norm):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
        nn.init.constant_(net[1].weight, math.inf)
        return net

    (wrong,) = measure_network(replace(network, build=diverging), ["torch"], CPU, BRIEF)
    assert wrong.status == "wrong"
    assert "the loss is nan" in wrong.message
    absent = replace(network, source="no_such_library")
    (missing,) = measure_network(absent, ["torch"], CPU, BRIEF)
    assert missing.status == "unavailable"
    assert "no_such_library does not import" in missing.message
