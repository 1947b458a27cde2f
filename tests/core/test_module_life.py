"""Operations on existing modules: checkpointing, parametrization, losses scaled for half
precision; layers over moved channels; lazy initialization. Copies, checkpoints and the meta device
are in ``test_modules.py``."""

import copy
import io

import pytest
import torch
from layer_table import KINDS, LAZY_NAMES, set_parameters
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normnorm

BATCH = KINDS[0]
each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)


def input_of(row, seed=0):
    return row.input(torch.float32, seed)


def test_checkpointing_counts_a_batch_twice_as_in_torch(cpu_backend):
    layers = BATCH.make(alpha=0.0, noise_train=0.0), BATCH.make_counterpart()
    for layer in layers:
        input = input_of(BATCH).requires_grad_()
        checkpoint(nn.Sequential(layer, nn.Tanh()), input, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked == 2
        # torch may stop recomputing in the last layer of a region, after its update
        checkpoint(layer, input, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked == 4
    assert_close(layers[0].running_var, layers[1].running_var, rtol=1e-5, atol=1e-6)


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


@each_kind
def test_a_parametrized_weight_trains_its_original(row, cpu_backend):
    layer = row.make(noise_train=0.0)
    with torch.no_grad():
        layer.weight.abs_().add_(0.1)
    plain = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", Exponential())
    outputs = []
    for one in (layer, plain):
        output = one(input_of(row))
        output.pow(3).sum().backward()
        outputs.append(output.detach())
    assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)
    original = layer.parametrizations.weight.original
    assert_close(original.grad, plain.weight.grad * plain.weight.detach(), rtol=1e-4, atol=1e-4)
    copied = copy.deepcopy(layer).eval()
    assert_close(copied(input_of(row)), layer.eval()(input_of(row)))
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is row.cls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_loss_trains_under_autocast_and_skips_overflows(dtype, cpu_backend):
    model = nn.Sequential(nn.Linear(BATCH.shape[-1], BATCH.shape[-1]), BATCH.make())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for factor in (1.0, 1.0, float("inf")):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            output = model(input_of(BATCH))
            loss = output.float().square().mean() * factor
        assert output.dtype == dtype  # Linear's output dtype, which the layers keep
        scaler.scale(loss).backward()
        before, scale = model[1].weight.detach().clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert model[1].weight.grad.dtype == torch.float32
        skipped = factor != 1.0
        assert torch.equal(model[1].weight, before) == skipped
        assert (scaler.get_scale() < scale) == skipped


# The layer over the channels of images


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_channels_first_layer_is_the_layer_over_moved_channels(dtype, memory_format, cpu_backend):
    layer, moved = (
        set_parameters(cls(4, noise_train=0.0, dtype=dtype))
        for cls in (normnorm.LayerNormalNorm2d, normnorm.LayerNormalNorm)
    )
    input = torch.randn(2, 4, 3, 5).square().to(dtype).contiguous(memory_format=memory_format)
    results = []
    for function in (layer, lambda x: moved(x.movedim(1, -1).contiguous()).movedim(-1, 1)):
        leaf = input.clone().requires_grad_()
        output = function(leaf)
        output.sin().sum().backward()
        results.append((output.detach(), leaf.grad))
    output, gradient = results[0]
    assert output.stride() == gradient.stride() == input.stride()
    unit = torch.finfo(dtype).eps
    assert_close(results[0], results[1], rtol=8 * unit, atol=64 * unit)


# Lazy layers


def lazy_input(name, channels=4):
    return torch.randn(3, channels, *(5,) * int(name[-2]))


LAZY = ("LazyBatchNormalNorm2d", "LazyInstanceNormalNorm1d")
each_lazy = pytest.mark.parametrize("name", LAZY)
LAZY_SETTINGS = (
    {"affine": False}, {"track_running_stats": False},
    {"affine": False, "track_running_stats": False}, {"bias": False},
    {"dtype": torch.float64, "eps": 1e-3, "momentum": None, "alpha": 0.5, "order": 1},
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "settings"),
    [*((name, {}) for name in LAZY_NAMES), *((LAZY[0], settings) for settings in LAZY_SETTINGS)],
)
def test_lazy_layers_become_what_the_constructor_would_have_made(name, settings):
    layer = getattr(normnorm, name)(noise_train=0.0, **settings)
    assert type(layer).__name__ == name
    plain_class = getattr(normnorm, name.removeprefix("Lazy"))
    input = lazy_input(name).to(settings.get("dtype", torch.float32))
    output = layer(input)
    assert type(layer) is plain_class
    defaults = {"affine": True, "track_running_stats": True}
    made = plain_class(4, noise_train=0.0, **{**defaults, **settings})
    assert repr(layer) == repr(made)
    assert vars(layer).keys() == vars(made).keys()
    assert_close(output, made(input))
    assert_close(layer.state_dict(), made.state_dict())
    assert not layer._forward_pre_hooks
    with pytest.raises(ValueError, match=r"num_features|channels"):
        layer(lazy_input(name, channels=7).to(input.dtype))


def test_lazy_instance_layers_take_the_channels_of_an_unbatched_input():
    layer = normnorm.LazyInstanceNormalNorm2d()
    assert layer(torch.randn(4, 5, 5)).dim() == 3
    assert layer.num_features == 4


@each_lazy
def test_lazy_layers_load_checkpoints_before_their_first_input(name):
    trained = getattr(normnorm, name)()
    trained(lazy_input(name))
    with torch.no_grad():
        trained.weight.mul_(2.0)
    layer = getattr(normnorm, name)()
    layer.load_state_dict(trained.state_dict(), strict=True)
    input = lazy_input(name)
    assert_close(layer.eval()(input), trained.eval()(input))
    assert type(layer) is type(trained)
    # torch's checkpoint, without lambda.
    plain = getattr(nn, name.removeprefix("Lazy").replace("Normal", ""))(
        4, affine=True, track_running_stats=True
    )
    other = getattr(normnorm, name)()
    other.load_state_dict(plain.state_dict(), strict=True)
    assert (other.running_lmbda == 1).all()
    # A checkpoint of an uninitialized lazy layer.
    file = io.BytesIO()
    torch.save(getattr(normnorm, name)().state_dict(), file)
    file.seek(0)
    third = getattr(normnorm, name)()
    third.load_state_dict(torch.load(file, weights_only=False), strict=True)
    assert third.has_uninitialized_params()
    third(input)


@each_lazy
def test_a_refused_first_input_leaves_a_lazy_layer_as_it_was(name):
    layer = getattr(normnorm, name)()
    parameters = list(layer.parameters())
    rank = lazy_input(name).dim()
    refused = [
        torch.randn(3), torch.randn((2,) * (rank + 2)),
        torch.ones(2, 3, *(4,) * (rank - 2), dtype=torch.long),
        torch.randn(1, 3, *(1,) * (rank - 2)), lazy_input(name).double(),
        lazy_input(name).to("meta"), lazy_input(name).to_sparse(), [1.0],
    ]  # fmt: skip
    for input in refused:
        with pytest.raises((TypeError, ValueError)):
            layer(input)
        assert type(layer).__name__ == name
        assert all(map(nn.parameter.is_lazy, (*parameters, layer.running_lmbda)))
    layer.noise_train = -1.0
    with pytest.raises(ValueError, match="noise_train"):
        layer(lazy_input(name))
    layer.noise_train = 0.4
    torch.manual_seed(1)
    output = layer(lazy_input(name))
    assert layer.num_features == 4
    assert all(a is b for a, b in zip(layer.parameters(), parameters, strict=True))
    # The trial pass consumed no random numbers and updated no running statistics.
    torch.manual_seed(1)
    made = type(layer)(4, affine=True, track_running_stats=True)
    assert torch.equal(output, made(lazy_input(name)))
    assert_close(layer.state_dict(), made.state_dict())


@each_lazy
def test_a_lazy_layer_keeps_what_a_partial_checkpoint_had_and_fills_in_the_rest(name):
    layer = getattr(normnorm, name)()
    keys = layer.load_state_dict({}, strict=False)
    assert "running_lmbda" in keys.missing_keys
    # The state of torch's lazy layer, without sizes and without lambda.
    theirs = getattr(nn, name.replace("Normal", ""))()
    layer.load_state_dict(theirs.state_dict(), strict=True)
    assert layer.has_uninitialized_params()
    layer.load_state_dict({"weight": torch.full((4,), 3.0)}, strict=False)
    with pytest.raises(ValueError, match=r"shape \(7,\)"):
        layer(lazy_input(name, channels=7))
    layer.eval()(lazy_input(name))
    assert torch.equal(layer.weight, torch.full((4,), 3.0))
    for tensor, value in ((layer.bias, 0), (layer.running_var, 1), (layer.running_lmbda, 1)):
        assert torch.equal(tensor, torch.full((4,), float(value)))
