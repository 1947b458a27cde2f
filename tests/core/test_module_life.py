"""Operations on existing modules: averaging, checkpointing, reparametrization, hooks, lazy
initialization, half precision with scaled losses. Copies, checkpoints and the meta device are in
``test_modules.py`` for the layers listed there."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from layer_table import LAYERS, NAMES, set_parameters
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import normnorm
from normnorm import lazy

OFF = {"alpha": 0.0, "noise_train": 0.0}
each_layer = pytest.mark.parametrize("row", LAYERS, ids=NAMES)
RUNNING = [row for row in LAYERS if row.kind == "batch"]
each_batch_layer = pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)


def input_of(row, seed=0):
    return row.input(torch.float32, seed)


# Weight averaging


@each_batch_layer
@pytest.mark.parametrize("use_buffers", [True, False])
def test_exponential_averages_follow_parameters_and_buffers(row, use_buffers, cpu_backend):
    layer = row.make()
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    expected = {name: t.detach().clone() for name, t in layer.state_dict().items()}
    for step in range(3):
        optimizer.zero_grad()
        layer(input_of(row, step)).pow(4).mean().backward()
        optimizer.step()
        average.update_parameters(layer)
        for name, tensor in layer.state_dict().items():
            parameter = name in dict(layer.named_parameters())
            if step == 0 or (not parameter and not use_buffers):
                expected[name] = tensor.clone()
            elif tensor.is_floating_point():
                expected[name].lerp_(tensor, 0.5)
    for name in ("weight", "bias", "running_mean", "running_var", "running_lmbda"):
        assert_close(average.module.state_dict()[name], expected[name])
    assert (average.module.running_lmbda != 1).any()
    assert average.module.eval()(input_of(row)).isfinite().all()


# Activation checkpointing


@each_layer
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_repeats_the_noise_and_gives_the_same_gradients(row, reentrant, cpu_backend):
    results = []
    for checkpointed in (False, True):
        layer = row.make()
        input = input_of(row).requires_grad_()
        torch.manual_seed(9)
        if checkpointed:
            output = checkpoint(layer, input, use_reentrant=reentrant)
        else:
            output = layer(input)
        output.pow(3).sum().backward()
        results.append((output.detach(), input.grad, layer.weight.grad, layer.bias.grad))
    assert_close(results[1], results[0], rtol=0, atol=0)


@each_batch_layer
def test_checkpointing_counts_a_batch_twice_as_in_torch(row, cpu_backend):
    # With a recomputed operation after it: torch may stop recomputing before the last layer of a
    # region ends, which then updates once.
    layers = row.make(**OFF), row.make_counterpart()
    for layer in layers:
        input = input_of(row).requires_grad_()
        checkpoint(nn.Sequential(layer, nn.Tanh()), input, use_reentrant=False).sum().backward()
        assert layer.num_batches_tracked == 2
    assert_close(layers[0].running_var, layers[1].running_var, rtol=1e-5, atol=1e-6)
    input = input_of(row).requires_grad_()
    checkpoint(layers[0], input, use_reentrant=False).sum().backward()
    assert layers[0].num_batches_tracked == 3


# Parametrized weights


class Exponential(nn.Module):
    def forward(self, weight):
        return weight.exp()

    def right_inverse(self, weight):
        return weight.log()


@each_layer
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


def test_orthogonal_layers_and_pruned_weights_work():
    model = nn.Sequential(
        parametrizations.orthogonal(nn.Linear(6, 6)), normnorm.BatchNormalNorm1d(6)
    )
    prune.random_unstructured(model[1], "weight", 2)
    model(torch.randn(8, 6)).pow(3).sum().backward()
    assert (model[1].weight_orig.grad == 0).sum() == 2
    prune.remove(model[1], "weight")
    assert type(model[1].weight) is nn.Parameter


@each_layer
def test_functional_call_uses_and_leaves_what_it_should(row, cpu_backend):
    layer = row.make(noise_train=0.0)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    other = {name: tensor.detach() * 0.5 + 0.25 for name, tensor in layer.named_parameters()}
    buffers = {name: tensor.clone() for name, tensor in layer.named_buffers()}
    output = torch.func.functional_call(layer, {**other, **buffers}, (input_of(row),))
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name  # writes go to the given buffers
    layer.load_state_dict({**before, **other})
    assert_close(output, layer(input_of(row)))
    for name, buffer in layer.named_buffers():
        assert_close(buffers[name], buffer)


@each_layer
def test_per_sample_gradients_by_vmap_of_grad(row, cpu_backend):
    layer = row.make(noise_train=0.0).eval()
    if row.keeps_running:
        layer.running_lmbda.fill_(0.8)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}
    buffers = dict(layer.named_buffers())

    def loss(parameters, sample):
        output = torch.func.functional_call(layer, (parameters, buffers), (sample[None],))
        return output.square().sum()

    batch = input_of(row)
    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for index, sample in enumerate(batch):
        layer.zero_grad()
        layer(sample[None]).square().sum().backward()
        for name, parameter in layer.named_parameters():
            assert_close(found[name][index], parameter.grad, rtol=1e-4, atol=1e-4)


# Mixed precision


@each_layer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_scaled_loss_trains_under_autocast_and_skips_overflows(row, dtype, cpu_backend):
    torch.manual_seed(0)
    head = nn.Linear(row.shape[-1], row.shape[-1])
    model = nn.Sequential(head, row.make())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    statistics = dict(model[1].named_buffers())
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            output = model(input_of(row, step))
            loss = output.float().square().mean()
        assert output.dtype == dtype  # Linear's output dtype, which the layers keep
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        for parameter in model.parameters():
            assert parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
        before = model[1].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        assert not torch.equal(model[1].weight, before)
    for name, buffer in statistics.items():
        assert buffer.dtype == (torch.int64 if "num" in name else torch.float32)

    # An infinite gradient is detected, and the step skipped.
    optimizer.zero_grad()
    loss = model(input_of(row)).square().mean() * float("inf")
    scaler.scale(loss).backward()
    before = model[1].weight.detach().clone()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    assert torch.equal(model[1].weight, before)
    assert scaler.get_scale() < scale


@each_batch_layer
def test_a_model_in_half_precision_with_statistics_in_full_trains(row, cpu_backend):
    layer = row.make(noise_train=0.0)
    exact = copy.deepcopy(layer).double()
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.bfloat16()
        getattr(exact, name).data.copy_(parameter.data)  # with the same rounding
    for step in range(3):
        input = row.input(torch.bfloat16, step)
        for one, x in ((layer, input), (exact, input.double())):
            one.zero_grad()
            one(x).float().square().sum().backward()
        assert layer.weight.grad.dtype == torch.bfloat16
        bound = 0.02 * exact.weight.grad.abs().max().item()
        assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=0, atol=bound)
    for name in ("running_mean", "running_var", "running_lmbda"):
        assert getattr(layer, name).dtype == torch.float32
        assert_close(getattr(layer, name).double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


# Hooks


@each_layer
def test_hooks_of_every_kind_see_and_change_what_torchs_do(row, cpu_backend):
    seen = {}
    for name, layer in (("ours", row.make(**OFF)), ("torch", row.make_counterpart())):
        calls = []
        layer.register_forward_pre_hook(lambda m, args: (2.0 * args[0],))
        layer.register_forward_hook(lambda m, args, out, c=calls: c.append(out.detach()) or out + 1)
        layer.register_full_backward_pre_hook(lambda m, grad: (3.0 * grad[0],))
        layer.register_full_backward_hook(lambda m, gi, go, c=calls: c.extend((*gi, *go)))
        input = input_of(row).requires_grad_()
        output = layer(input)
        output.pow(3).sum().backward()
        seen[name] = [output.detach(), input.grad, layer.weight.grad, *calls]
    assert_close(seen["ours"], seen["torch"], rtol=1e-4, atol=1e-3)


# Layers not listed in test_modules.py


def channels_first(**keywords):
    return set_parameters(normnorm.LayerNormalNorm2d(4, **keywords))


def channels_first_input(dtype=torch.float32):
    return torch.randn(2, 4, 3, 5, dtype=torch.float64).square().to(dtype)


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_file]
)
def test_channels_first_layer_is_copied_with_all_its_settings(duplicate):
    layer = channels_first(noise_train=0.3, alpha=0.9, order=1, transform_eps=0.001).eval()
    copied = duplicate(layer)
    assert repr(copied) == repr(layer)
    assert repr(layer).startswith("LayerNormalNorm2d((4,), eps=1e-05")
    input = channels_first_input()
    assert torch.equal(copied(input), layer(input))
    assert copied.weight.data_ptr() != layer.weight.data_ptr()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_channels_first_layer_is_the_layer_over_moved_channels(dtype, memory_format, cpu_backend):
    layer = channels_first(noise_train=0.0)
    input = channels_first_input(dtype).contiguous(memory_format=memory_format).requires_grad_()
    if dtype == torch.float64:
        layer.double()
    moved = set_parameters(normnorm.LayerNormalNorm(4, noise_train=0.0)).to(layer.weight.dtype)
    output = layer(input)
    expected = moved(input.detach().movedim(1, -1).contiguous()).movedim(-1, 1)
    assert output.dtype == dtype
    assert output.stride() == input.stride()
    unit = torch.finfo(dtype).eps
    assert_close(output, expected, rtol=8 * unit, atol=64 * unit)
    output.float().sum().backward()
    assert input.grad.stride() == input.stride()


def test_channels_first_layer_repeats_the_noise_of_a_seed(cpu_backend):
    layer = channels_first()
    outputs = []
    for _ in range(2):
        torch.manual_seed(1)
        outputs.append(layer(channels_first_input()))
    assert torch.isfinite(outputs[0]).all()
    assert not torch.equal(layer(outputs[0]), layer(outputs[0]))


def test_channels_first_gradients_pass_gradcheck(cpu_backend):
    layer = channels_first(noise_train=0.0).double()
    input = channels_first_input(torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(layer, input, fast_mode=True)
    assert torch.autograd.gradgradcheck(layer, input, fast_mode=True)


def test_channels_first_layer_on_meta_becomes_real():
    layer = normnorm.LayerNormalNorm2d(4, device="meta")
    assert layer(channels_first_input().to("meta")).shape == (2, 4, 3, 5)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert (real.weight == 1).all()
    skipped = nn.utils.skip_init(normnorm.LayerNormalNorm2d, 4)
    assert skipped.weight.shape == (4,)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: normnorm.LayerNormalNorm2d((3, 4)), ValueError, "channels alone; got 2 sizes"),
        (lambda: channels_first()(torch.randn(2, 4, 3)), ValueError, "expected 4D input"),
        (lambda: channels_first()([1.0]), TypeError, "must be a tensor; got list"),
        (lambda: channels_first()(torch.randn(2, 3, 4, 4)), ValueError, "normalized_shape"),
    ],
)
def test_channels_first_layer_rejects_other_inputs(call, error, words):
    with pytest.raises(error, match=words):
        call()


# Lazy layers


def lazy_input(name, channels=4, batched=True):
    shape = (3, channels, *(5,) * int(name[-2]))
    if name == "LazyBatchNormalNorm1d":
        shape = shape[:2]
    return torch.randn(shape if batched else shape[1:])


@pytest.mark.parametrize("name", lazy.__all__)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"bias": False},
        {"dtype": torch.float64, "eps": 1e-3, "momentum": None, "alpha": 0.5, "order": 1},
    ],
    ids=lambda settings: ",".join(settings) or "defaults",
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


@pytest.mark.parametrize("name", [name for name in lazy.__all__ if "Instance" in name])
def test_lazy_instance_layers_take_the_channels_of_an_unbatched_input(name):
    layer = getattr(normnorm, name)()
    output = layer(lazy_input(name, batched=False))
    assert layer.num_features == 4
    assert output.dim() == int(name[-2]) + 1


@pytest.mark.parametrize("name", lazy.__all__)
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


@pytest.mark.parametrize("name", lazy.__all__)
def test_a_refused_first_input_leaves_a_lazy_layer_as_it_was(name):
    layer = getattr(normnorm, name)()
    parameters = list(layer.parameters())
    rank = lazy_input(name).dim()
    refused = [
        torch.randn(3),
        torch.randn((2,) * (rank + 2)),
        torch.ones(2, 3, *(4,) * (rank - 2), dtype=torch.long),
        torch.randn(1, 3, *(1,) * (rank - 2)),
        lazy_input(name).double(),
        lazy_input(name).to("meta"),
        lazy_input(name).to_sparse(),
        [1.0],
    ]
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


@pytest.mark.parametrize("name", lazy.__all__)
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


def test_a_lazy_model_is_initialized_by_its_first_batch_and_trained():
    model = nn.Sequential(
        nn.LazyConv2d(6, 3), normnorm.LazyBatchNormalNorm2d(), nn.Flatten(), nn.LazyLinear(2)
    )
    with pytest.raises(ValueError, match="uninitialized"):
        model[1].weight.sum()
    model(torch.randn(4, 3, 8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    assert model[1].num_features == 6
