"""normnorm.monitor: correct statistics, bounded memory, no synchronization, no remaining hooks."""

import contextlib
import math

import pytest
import scipy.stats
import torch
from layer_table import Recorder
from model_zoo import ours_in
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normnorm

MEASURES = {
    "lmbda", "lmbda_min", "lmbda_max", "noise_scale", "skewness", "excess_kurtosis", "qq_r2",
}  # fmt: skip


def network(**keywords):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), normnorm.BatchNormalNorm2d(8), nn.ReLU(), normnorm.LayerNormalNorm2d(8),
        normnorm.GroupNormalNorm(2, 8), normnorm.InstanceNormalNorm2d(8), nn.Flatten(),
        normnorm.LayerNormalNorm(8 * 36),
    )  # fmt: skip
    for layer in ours_in(network):
        vars(layer).update(keywords)
    return network


def small():
    """Two layers without noise, which eager and compiled code would draw differently."""
    torch.manual_seed(0)
    return nn.Sequential(
        normnorm.BatchNormalNorm2d(3, noise_train=0.0), nn.Flatten(),
        normnorm.LayerNormalNorm(192, noise_train=0.0),
    )  # fmt: skip


def images():
    generator = torch.Generator().manual_seed(2)
    return torch.empty(16, 3, 8, 8).exponential_(generator=generator)


def by_scipy(groups):
    """SciPy's (skewness, excess kurtosis, Q-Q R^2), averaged over rows."""
    rows = groups.detach().double().numpy()
    skewness = abs(scipy.stats.skew(rows, axis=1)).mean()
    kurtosis = scipy.stats.kurtosis(rows, axis=1).mean()
    r = [scipy.stats.probplot(row)[1][2] for row in rows]
    return skewness, kurtosis, (torch.tensor(r) ** 2).mean().item()


@pytest.mark.parametrize(
    ("layer", "shape", "rows"),
    [
        (normnorm.BatchNormalNorm1d(5), (40, 5), lambda x: x.T),
        (normnorm.BatchNormalNorm2d(3), (4, 3, 5, 6), lambda x: x.transpose(0, 1).flatten(1)),
        (normnorm.LayerNormalNorm((5, 6)), (7, 5, 6), lambda x: x.flatten(1)),
        (normnorm.LayerNormalNorm2d(12), (2, 12, 2, 2), lambda x: x.movedim(1, -1).flatten(0, 2)),
        (normnorm.GroupNormalNorm(2, 6), (4, 6, 7), lambda x: x.reshape(8, 21)),
        (normnorm.InstanceNormalNorm1d(3), (2, 3, 25), lambda x: x.flatten(0, 1)),
        (normnorm.InstanceNormalNorm1d(3), (3, 25), lambda x: x),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_scalars_equal_the_layers_statistics(layer, shape, rows, training):
    generator = torch.Generator().manual_seed(7)
    input = torch.empty(shape).exponential_(generator=generator)
    layer.train(training).noise_train = 0.5
    running = [getattr(layer, name, None) for name in ("running_mean", "running_var")]
    frozen = running[0] is not None and not training
    if frozen:
        running[0].fill_(0.8)
        running[1].fill_(1.3)
        layer.running_lmbda.copy_(torch.linspace(0.2, 0.9, shape[1]))
    with normnorm.monitor(layer, groups=64) as watch:
        layer(input)
        found = watch.scalars()
    assert found.keys() == MEASURES
    groups = rows(input).double()
    if frozen:
        h = (groups - 0.8) / math.sqrt(1.3 + 1e-5)
        lmbda = layer.running_lmbda.double()[:, None]
    else:
        h = groups - groups.mean(1, keepdim=True)
        h = h / (h.square().mean(1, keepdim=True) + 1e-5).sqrt()
        lmbda = normnorm.estimate_lmbda(h, 1, keepdim=True)
    x = normnorm.yeo_johnson(h, lmbda)
    assert found["lmbda"] == pytest.approx(lmbda.mean().item(), abs=1e-5)
    assert found["lmbda_min"] == pytest.approx(lmbda.min().item(), abs=1e-5)
    assert found["lmbda_max"] == pytest.approx(lmbda.max().item(), abs=1e-5)
    scale = (x - x.mean(1, keepdim=True)).abs().mean() if training else 0.0
    assert found["noise_scale"] == pytest.approx(float(scale), abs=1e-5)
    shape_of_it = [found[name] for name in ("skewness", "excess_kurtosis", "qq_r2")]
    assert shape_of_it == pytest.approx(by_scipy(x), abs=1e-4)


def test_the_dictionary_is_flat_floats_of_every_layer_of_the_last_step():
    model = network()
    with normnorm.monitor(model) as watch:
        with pytest.raises(RuntimeError, match="no layer was seen"):
            watch.scalars()
        model(images())
        first = watch.scalars("train/")
        assert watch.scalars("train/") == first
        model(2.0 + images().square())
        second = watch.scalars("train/")
        watch.clear()
        assert watch.scalars() == {}
    names = ("1", "3", "4", "5", "7")
    assert first.keys() == {f"train/{name}/{measure}" for name in names for measure in MEASURES}
    assert all(type(value) is float for value in first.values())
    assert second.keys() == first.keys()
    assert second["train/1/lmbda"] != first["train/1/lmbda"]
    assert watch.scalars() == {}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_hook_neither_synchronizes_nor_draws_random_numbers(training):
    outputs = []
    for watched in (False, True):
        model = network().train(training)
        torch.manual_seed(4)
        input = images().requires_grad_()
        if watched:
            with normnorm.monitor(model), Recorder() as recorder:
                output = model(input)
            assert "aten::_local_scalar_dense" not in recorder.names
        else:
            output = model(input)
        (gradient,) = torch.autograd.grad(output.square().sum(), input)
        outputs.append((output, gradient, torch.get_rng_state()))
    assert_close(outputs[1], outputs[0], rtol=0, atol=0)


def test_memory_is_bounded_whatever_the_input_and_the_number_of_steps():
    model = nn.Sequential(
        normnorm.BatchNormalNorm2d(64), normnorm.LayerNormalNorm2d(64),
        normnorm.GroupNormalNorm(8, 64), normnorm.InstanceNormalNorm2d(64),
        nn.Flatten(), normnorm.LayerNormalNorm(64 * 256),
    )  # fmt: skip
    with normnorm.monitor(model, groups=3, elements=50) as watch:
        for _ in range(3):
            model(torch.randn(8, 64, 16, 16))
        kept = [seen.values for seen in watch._seen.values()]
        assert len(kept) == 5
        for values in kept:
            assert values.size(0) <= 3
            assert values.size(1) <= 50
            # Independent copies, which keep no activation and no graph alive.
            assert values.untyped_storage().nbytes() == 4 * values.numel()
            assert not values.requires_grad
        assert all(math.isfinite(value) for value in watch.scalars().values())


def test_the_kept_part_is_not_one_image_column_or_the_first_tokens():
    model = normnorm.BatchNormalNorm2d(1, noise_train=0.0)
    for size in (16, 56):
        with normnorm.monitor(model, elements=size) as watch:
            model(torch.linspace(-2.0, 2.0, size).expand(4, 1, size, size).contiguous())
            (kept,) = watch._seen[""].values
        assert len(kept) <= size
        assert len(kept.unique()) > 0.8 * len(kept)
    model = normnorm.LayerNormalNorm(16)
    with normnorm.monitor(model) as watch:
        model(torch.randn(8, 24, 16) + 10.0 * torch.arange(24.0)[:, None])
        kept = watch._seen[""].values.mean(1) / 10.0
    assert len(kept.round().unique()) > 4


def test_hooks_are_gone_after_an_exception_and_the_values_stay_readable():
    model = network()
    with contextlib.suppress(ZeroDivisionError), normnorm.monitor(model) as watch:
        assert sum(len(module._forward_hooks) for module in model.modules()) == 5
        model(images())
        raise ZeroDivisionError
    assert not any(module._forward_hooks for module in model.modules())
    before = watch.scalars()
    assert before
    model(images() + 1)
    assert watch.scalars() == before


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_recomputed_step_is_not_the_last_one(use_reentrant):
    model = network(noise_train=0.0)
    with normnorm.monitor(model) as watch:
        first = checkpoint(model, images().requires_grad_(), use_reentrant=use_reentrant)
        assert watch.scalars()["1/lmbda"] != 1.0
        model(2.0 + images().square())
        before = watch.scalars()
        first.sum().backward()
        assert watch.scalars() == before


def test_a_constant_group_has_no_shape_and_does_not_spoil_the_mean():
    layer = normnorm.LayerNormalNorm(16)
    input = torch.randn(4, 16)
    with normnorm.monitor(layer) as watch:
        layer(input)
        whole = watch.scalars()
        input = torch.cat([input, torch.full((1, 16), 3.0)])
        layer(input)
        with_constant = watch.scalars()
        layer(torch.zeros(2, 16))
        nothing = watch.scalars()
    for name in ("skewness", "excess_kurtosis", "qq_r2"):
        assert with_constant[name] == pytest.approx(whole[name])
        assert math.isnan(nothing[name])
    assert nothing["lmbda"] == 1.0


@pytest.mark.parametrize("shape", [(64,), (16, 6)])
def test_an_input_without_leading_dimensions_is_one_group(shape):
    layer = normnorm.LayerNormalNorm(shape)
    with normnorm.monitor(layer) as watch:
        layer(torch.randn(shape))
        assert all(map(math.isfinite, watch.scalars().values()))


def test_empty_and_meta_inputs_are_passed_over():
    layer = normnorm.LayerNormalNorm(16)
    with normnorm.monitor(layer) as watch:
        layer(torch.zeros(0, 16))
        layer.to("meta")(torch.zeros(2, 16, device="meta"))
        assert watch.scalars() == {}


def test_function_transforms_leak_no_tensors():
    layer = normnorm.LayerNormalNorm(16, noise_train=0.0)
    with normnorm.monitor(layer) as watch:
        torch.vmap(layer)(torch.randn(3, 2, 16))
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(2, 16))
        assert watch.scalars() == {}
        layer(torch.randn(2, 16))
        assert len(watch.scalars()) == len(MEASURES)


@pytest.mark.parametrize("how", ["compiled", "in place", "any size"])
def test_a_compiled_model_is_watched_without_graph_break_or_recompilation(how):
    torch.compiler.reset()
    compiled, eager = small(), small()
    options = {"fullgraph": True, "backend": "aot_eager"}
    if how == "in place":
        compiled.compile(**options)
    else:
        compiled = torch.compile(compiled, dynamic=how == "any size" or None, **options)
    # More groups than exist: with symbolic sizes the selected part differs.
    several = normnorm.monitor(compiled, groups=64), normnorm.monitor(eager, groups=64)
    with several[0] as watch, several[1] as expected:
        for step, size in enumerate((16, 8, 5) if how == "any size" else (16, 16, 16)):
            batch = images()[:size] + step
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                compiled(batch)
            eager(batch)
            assert watch.scalars() == pytest.approx(expected.scalars(), abs=1e-4)
    torch.compiler.reset()
