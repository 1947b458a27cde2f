"""The layers behave like torch's: construction, state, dtypes, modes and running statistics.

The first part runs the module inputs of torch's test suite for BatchNorm, LayerNorm, GroupNorm and
InstanceNorm through normnorm's classes without transform and noise, where each must equal its
counterpart.
"""

import copy
import inspect
import io
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from layer_table import KINDS, LAYERS, NAMES, RUNNING, Layer, Recorder, set_parameters
from torch import nn
from torch.testing import assert_close

import normnorm

# Importing torch's test tables forbids plain assignments to torch.backends.* in the whole process;
# this is undone for other tests.
_FLAG = "__allow_nonbracketed_mutation_flag"
_allowed = getattr(torch.backends, _FLAG, True)
from torch.testing._internal import common_modules  # noqa: E402

setattr(torch.backends, _FLAG, _allowed)

OFF = {"alpha": 0.0, "noise_train": 0.0}
OURS = ("noise_train", "alpha", "order", "transform_eps")
BY_COUNTERPART = {row.counterpart: row for row in LAYERS}
# As many columns as channels: the table takes the parameters' shape from the last size.
CHANNELS_FIRST = Layer("layer", (2, 4, 3, 4), 0, 1, normnorm.LayerNormalNorm2d, nn.LayerNorm)
each_layer = pytest.mark.parametrize("row", LAYERS, ids=NAMES)
each_class = pytest.mark.parametrize("row", [*LAYERS, CHANNELS_FIRST], ids=lambda row: row.name)
each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
each_running = pytest.mark.parametrize(
    "row", [row for row in KINDS if row in RUNNING], ids=lambda row: row.kind
)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def tracking(row):
    """The constructor's keyword for running statistics, if the layer can keep them."""
    return {"track_running_stats": True} if row in RUNNING else {}


# torch's test inputs


def module_inputs(info, training=True):
    torch.manual_seed(0)
    return info.module_inputs_func(info, "cpu", torch.float64, True, training)


TORCH_CASES = [
    pytest.param(BY_COUNTERPART[info.module_cls], info, index, id=f"{info.name}-{index}")
    for info in common_modules.module_db
    if info.module_cls in BY_COUNTERPART
    for index in range(len(module_inputs(info)))
]


def run(layer, input):
    """(output, [gradients]) for a fixed, non-uniform upstream gradient."""
    input = input.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(input)
    upstream = torch.linspace(-1.0, 2.0, max(output.numel(), 1), dtype=output.dtype)
    upstream = upstream[: output.numel()].reshape(output.shape)
    gradients = torch.autograd.grad(output, (input, *layer.parameters()), upstream)
    return output.detach(), gradients


def compared_buffers(layer):
    """Buffers of both. torch's instance layers have a counter that they never increment."""
    names = ["running_mean", "running_var"]
    if isinstance(layer, (nn.modules.batchnorm._BatchNorm, normnorm.modules._BatchNormalNorm)):
        names.append("num_batches_tracked")
    return {name: getattr(layer, name) for name in names if getattr(layer, name, None) is not None}


def test_torch_has_inputs_for_every_class():
    counts = Counter(case.values[0].name for case in TORCH_CASES)
    assert set(counts) == set(NAMES)
    assert min(counts.values()) >= 4  # torch 2.10: 46 in total, four for each instance layer


@each_mode
@pytest.mark.parametrize(("row", "info", "index"), TORCH_CASES)
def test_equals_torch_without_transform_and_noise(row, info, index, training, backend):
    sample = module_inputs(info, training)[index]
    (input,) = sample.forward_input.args
    arguments = sample.constructor_input

    def build(cls, **keywords):
        return cls(*arguments.args, **arguments.kwargs, **keywords).double().train(training)

    theirs, ours = set_parameters(build(row.counterpart)), build(row.cls, **OFF)
    if getattr(theirs, "running_mean", None) is not None:
        theirs.running_mean.fill_(0.25)
        theirs.running_var.fill_(1.5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    # Sums of up to a few hundred terms of order one, in a different order from torch's.
    unit = torch.finfo(torch.float64).eps
    bound = {"rtol": 8.0 * unit, "atol": 400.0 * unit}
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(input.dim())
    for arranged in (input, 0.5 + (input.contiguous(memory_format=last) if last else input)):
        expected, expected_gradients = run(theirs, arranged)
        output, gradients = run(ours, arranged)
        assert_close(output, expected, **bound)
        assert_close(gradients, expected_gradients, **bound)
        assert_close(compared_buffers(ours), compared_buffers(theirs), **bound)
        assert output.stride() == torch.empty_like(arranged).stride()

    # Conversely: torch's layer loads this state without lambda and evaluates to the same output.
    state = ours.state_dict()
    if state.pop("running_lmbda", None) is not None:
        state["num_batches_tracked"] = theirs.num_batches_tracked
    fresh = build(row.counterpart)
    fresh.load_state_dict(state, strict=True)
    assert_close(fresh.eval()(input), ours.eval()(input), **bound)


ERROR_CASES = [
    pytest.param(BY_COUNTERPART[info.module_cls], case, id=f"{info.name}-{index}")
    for info in common_modules.module_db
    if info.module_cls in BY_COUNTERPART and info.module_error_inputs_func is not None
    for index, case in enumerate(
        info.module_error_inputs_func(
            SimpleNamespace(module_cls=info.module_cls), "cpu", torch.float32, False, True
        )
    )
]


@pytest.mark.parametrize(("row", "case"), ERROR_CASES)
def test_torch_error_inputs_raise_as_torch_says(row, case, backend):
    arguments = case.module_error_input.constructor_input

    def call():  # the constructor rejects some of what torch rejects later, such as an eps
        layer = row.cls(*arguments.args, **arguments.kwargs)
        if case.error_on != common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
            layer(*case.module_error_input.forward_input.args)

    with pytest.raises(case.error_type, match=case.error_regex):
        call()


# Construction


@each_layer
def test_constructor_takes_torch_arguments_in_torch_order_and_ours_by_keyword(row):
    ours = inspect.signature(row.cls).parameters
    theirs = inspect.signature(row.counterpart).parameters

    def positional(parameters):
        return [
            (p.name, p.default) for p in parameters.values() if p.kind == p.POSITIONAL_OR_KEYWORD
        ]

    def keyword(parameters):
        return {p.name for p in parameters.values() if p.kind == p.KEYWORD_ONLY}

    assert positional(ours) == positional(theirs)
    assert set(OURS) | keyword(theirs) <= keyword(ours)
    assert "bias" in ours
    assert keyword(ours) - set(OURS) <= {"bias"}


@each_layer
def test_defaults_are_the_published_ones(row):
    layer = row.cls(*row.args)
    assert layer.noise_train == (1.0 if row.kind == "layer" else 0.4)
    assert (layer.alpha, layer.order, layer.transform_eps, layer.eps) == (1.0, 2, 0.0, 1e-5)


@each_class
def test_repr_tells_every_setting(row):
    layer = row.make(noise_train=0.25, alpha=0.75, order=1, transform_eps=0.125, bias=False)
    text = repr(layer)
    assert text.startswith(row.name + "(")
    assert ", ".join(map(str, row.args)) in text
    for setting in ("noise_train=0.25", "alpha=0.75", "order=1", "transform_eps=0.125"):
        assert setting in text
    for setting in ("eps=1e-05", "affine=True", "bias=False"):
        assert setting in text
    if row in RUNNING:
        assert "momentum=0.1" in text
        assert "track_running_stats=" in text


@each_layer
def test_weight_and_bias_may_be_left_out(row, backend):
    input = row.input(torch.float32)
    affine = "elementwise_affine" if row.kind == "layer" else "affine"
    whole = row.cls(*row.args, **{affine: True}, noise_train=0.0)
    scaled = row.cls(*row.args, **{affine: True}, bias=False, noise_train=0.0)
    bare = row.cls(*row.args, **{affine: False}, bias=True, noise_train=0.0)
    assert set(scaled._parameters) == {"weight", "bias"}  # registered as None, for listings
    assert [name for name, _ in scaled.named_parameters()] == ["weight"]
    assert scaled.bias is bare.weight is bare.bias is None
    for layer in (scaled, bare):
        layer.reset_parameters()
        assert_close(layer(input), whole(input), rtol=0.0, atol=1e-6)


# Copies and checkpoints


def trained(row, **keywords):
    """A layer after two training steps, in float32."""
    layer = row.make(**tracking(row), **keywords)
    for seed in range(2):
        layer(row.input(torch.float32, seed))
    return layer


def assert_same_layer(copied, layer, input):
    assert copied.state_dict().keys() == layer.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(copied.state_dict()[name], tensor), name
    for name in (*OURS, "eps"):
        assert getattr(copied, name) == getattr(layer, name)
    assert torch.equal(copied.eval()(input), layer.eval()(input))


def through_file(object, weights_only=False):
    file = io.BytesIO()
    torch.save(object, file)
    file.seek(0)
    return torch.load(file, weights_only=weights_only)


@each_class
def test_copies_are_equal_and_share_nothing(row, backend):
    layer = trained(row, noise_train=0.3, alpha=0.9, order=1, transform_eps=0.001)
    pointers = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), through_file(layer)):
        assert type(copied) is type(layer)
        assert_same_layer(copied, layer, row.input(torch.float32))
        assert pointers.isdisjoint(tensor.data_ptr() for tensor in copied.state_dict().values())


@each_kind
def test_checkpoint_loads_with_weights_only_by_copy_or_assignment_onto_meta(row, backend):
    layer = trained(row)
    state = through_file(layer.state_dict(), weights_only=True)
    empty = row.cls(*row.args, **row.affine, **tracking(row), device="meta")
    for other, assign in ((row.make(**tracking(row)), False), (empty, True)):
        other.load_state_dict(state, strict=True, assign=assign)
        assert_same_layer(other, layer, row.input(torch.float32))


@each_running
def test_torch_checkpoint_loads_strictly_with_lambda_one(row, backend):
    theirs = row.make_counterpart(track_running_stats=True)
    theirs(row.input(torch.float32))
    state = nn.Sequential(theirs).state_dict()
    ours = nn.Sequential(row.make(track_running_stats=True))
    ours[0].running_lmbda.fill_(5.0)
    assert {*ours.state_dict()} == {*state, "0.running_lmbda"}
    keys = ours.load_state_dict(state, strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert torch.equal(ours[0].running_lmbda, torch.ones(row.shape[1]))
    # Lambda 1 is the identity: evaluation equals torch's.
    input = row.input(torch.float32, 1)
    assert_close(ours.eval()(input), theirs.eval()(input), rtol=0.0, atol=2e-6)

    plain = dict(state)  # without versions
    ours.load_state_dict(plain, strict=True)
    del plain["0.num_batches_tracked"]  # as in files from before torch counted batches
    ours.load_state_dict(plain, strict=True)
    assert "0.running_lmbda" not in plain  # the caller's dict is unchanged


@each_running
@pytest.mark.parametrize("kept", [(), ("weight", "bias"), ("running_mean",), ("running_var",)])
@pytest.mark.parametrize("metadata", [True, False], ids=["metadata", "plain dict"])
def test_layers_missing_from_a_checkpoint_keep_state_and_are_reported(row, kept, metadata):
    state = nn.Sequential(row.make_counterpart(track_running_stats=True), nn.Linear(2, 2))
    state = state.state_dict()
    for name in list(state):
        if name.startswith("0.") and name[2:] not in kept:
            del state[name]
    model = nn.Sequential(trained(row), nn.Linear(2, 2))
    before = copy.deepcopy(model[0].state_dict())
    keys = model.load_state_dict(state if metadata else dict(state), strict=False)
    missing = before.keys() - {*kept}
    # Without a version torch assumes a checkpoint from before it counted batches.
    unnamed = set() if metadata and kept else {"num_batches_tracked"}
    assert {f"0.{name}" for name in missing - unnamed} <= {*keys.missing_keys}
    assert not keys.unexpected_keys
    for name in missing:
        assert torch.equal(model[0].state_dict()[name], before[name]), name


@each_running
def test_a_checkpoint_that_comes_tensor_by_tensor_in_any_order_is_loaded_whole(row):
    state = trained(row).state_dict()
    layer = row.make(track_running_stats=True)
    for name in sorted(state):
        layer.load_state_dict({name: state[name]}, strict=False)
    assert_close(dict(layer.state_dict()), dict(state), rtol=0.0, atol=0.0)


@each_running
def test_lambda_left_on_meta_is_one_with_loaded_statistics(row):
    theirs = row.make_counterpart(track_running_stats=True).state_dict()

    def on_meta():
        return row.cls(*row.args, **row.affine, track_running_stats=True, device="meta")

    by_state = on_meta()  # torch.distributed.checkpoint returns the model's own tensors
    by_state.load_state_dict(
        {**theirs, "running_lmbda": by_state.running_lmbda}, strict=True, assign=True
    )
    by_tensor, moved = on_meta(), on_meta()  # accelerate
    for layer in (by_tensor, moved):
        for name, tensor in theirs.items():
            held = layer._parameters if name in layer._parameters else layer._buffers
            held[name] = nn.Parameter(tensor) if name in layer._parameters else tensor
    moved.to(torch.float64)
    assert moved.state_dict()["running_lmbda"].dtype == torch.float64
    for layer in (by_state, by_tensor, moved):
        assert torch.equal(layer.running_lmbda, torch.ones_like(layer.running_mean))
        layer.eval()(row.input(layer.weight.dtype))
    assert on_meta().running_lmbda.is_meta


@each_running
@pytest.mark.parametrize(
    ("name", "value"),
    [
        pytest.param("running_median", torch.zeros(1), id="unknown key"),
        pytest.param("running_lmbda", torch.zeros(9), id="wrong size"),
        pytest.param("running_lmbda", None, id="own checkpoint without lambda"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(row, name, value):
    layer = row.make(track_running_stats=True)
    state = layer.state_dict()
    state[name] = value
    if value is None:
        del state[name]
    with pytest.raises(RuntimeError, match=name):
        layer.load_state_dict(state, strict=True)


@each_class
@pytest.mark.parametrize("bias", [True, False])
def test_meta_layer_becomes_real_by_to_empty_and_reset(row, bias, backend):
    keywords = {**row.affine, **tracking(row), "bias": bias}
    layer = row.cls(*row.args, **keywords, device="meta", dtype=torch.bfloat16)
    for name, tensor in layer.state_dict().items():
        assert tensor.is_meta
        assert tensor.dtype == (torch.int64 if name == "num_batches_tracked" else torch.bfloat16)
    output = layer(row.input(torch.bfloat16).to("meta"))
    assert output.is_meta
    assert output.shape == row.shape

    real = layer.to_empty(device="cpu")
    for tensor in real.state_dict().values():
        tensor.fill_(77)  # arbitrary content
    real.reset_parameters()
    fresh = row.cls(*row.args, **keywords, dtype=torch.bfloat16)
    assert real.state_dict().keys() == fresh.state_dict().keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(real.state_dict()[name], tensor), name


# Running statistics


def batch_statistics(row, input, order):
    """(mean, unbiased variance, lambda) per channel, averaged over samples for instance kinds."""
    groups = input.movedim(1, 0).flatten(1)[None] if row.kind == "batch" else input.flatten(2)
    mean = groups.mean(-1)
    h = (groups - mean[..., None]) / (groups.var(-1, unbiased=False) + 1e-5).sqrt()[..., None]
    lmbda = normnorm.estimate_lmbda(h, -1, order=order)
    return mean.mean(0), groups.var(-1, unbiased=True).mean(0), lmbda.mean(0)


@each_running
@pytest.mark.parametrize(("momentum", "order"), [(0.3, 1), (None, 2)])
def test_running_statistics_are_an_average_of_the_batches(row, momentum, order, backend):
    """Exponential, or of all batches where the momentum is None."""
    layer = row.make(track_running_stats=True, momentum=momentum, order=order, dtype=torch.float64)
    buffers = [layer.running_mean, layer.running_var, layer.running_lmbda]
    counter = layer.num_batches_tracked
    expected = [torch.full((row.shape[1],), value).double() for value in (0.0, 1.0, 1.0)]
    for step in range(4):
        input = row.input(seed=step)
        layer(input)
        weight = 1.0 / (step + 1) if momentum is None else momentum
        found = batch_statistics(row, input, order)
        expected = [old.lerp(new, weight) for old, new in zip(expected, found, strict=True)]
        assert_close(buffers, expected, rtol=1e-10, atol=1e-10)
        assert counter == step + 1
    assert (layer.running_lmbda - 1.0).abs().min() > 1e-4  # the data are not symmetric
    # Updated in place: the same objects.
    assert layer.running_mean is buffers[0]
    assert layer.running_var is buffers[1]
    assert layer.running_lmbda is buffers[2]
    assert layer.num_batches_tracked is counter


@each_kind
@each_mode
def test_no_step_reads_a_value_back_to_the_host(row, training, backend):
    cumulative = {"track_running_stats": True, "momentum": None} if row in RUNNING else {}
    layer = row.make(**cumulative).train(training)
    input = row.input(torch.float32).requires_grad_()
    with Recorder() as recorder:
        layer(input).square().sum().backward()
    assert recorder.names
    assert "aten::_local_scalar_dense" not in recorder.names


def test_clearing_the_flag_keeps_the_buffers_still_as_in_torch(backend):
    row = KINDS[0]
    ours, theirs = row.make(**OFF), row.make_counterpart()
    for layer in (ours, theirs):
        layer.track_running_stats = False
    input = row.input(torch.float32)
    assert_close(ours(input), theirs(input), rtol=0.0, atol=1e-5)
    assert ours.num_batches_tracked == 0
    assert (ours.running_mean == 0).all()
    assert (ours.running_lmbda == 1).all()
    assert_close(ours.eval()(input), theirs.eval()(input), rtol=0.0, atol=1e-5)


@each_running
def test_evaluation_uses_the_running_statistics_and_leaves_them(row, backend):
    shift = 0.003  # of the transform's exponent
    layer = row.make(track_running_stats=True, transform_eps=shift, dtype=torch.float64)
    layer(row.input())
    layer.eval()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    input = row.input(seed=1)
    output = layer(input)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name

    def per_channel(values):
        return values.reshape(1, -1, *(1,) * (input.dim() - 2))

    h = (input - per_channel(layer.running_mean)) / per_channel(layer.running_var + 1e-5).sqrt()
    x = normnorm.yeo_johnson(h, per_channel(layer.running_lmbda), shift)
    expected = per_channel(layer.weight) * x + per_channel(layer.bias)
    assert_close(output, expected, rtol=1e-11, atol=1e-11)
    # Single samples give the same: no statistics are shared over the batch.
    single = torch.cat([layer(sample[None]) for sample in input])
    assert_close(single, output, rtol=1e-12, atol=1e-12)


# Shapes and dtypes


@pytest.mark.parametrize("method", ["double", "float", "bfloat16", "half"])
@each_kind
def test_conversion_of_the_layer_converts_results_and_state_as_in_torch(row, method, backend):
    ours, theirs = row.make(**OFF, **tracking(row)), row.make_counterpart(**tracking(row))
    for layer in (ours, theirs):
        getattr(layer, method)()
    dtype = theirs.weight.dtype
    input = row.input(dtype).requires_grad_()
    # A few units in the last place of outputs of size up to 4.
    bound = {"rtol": 0.0, "atol": 8.0 * torch.finfo(dtype).eps + 1e-12}
    output, expected = ours(input), theirs(input)
    assert output.dtype == expected.dtype == dtype
    assert_close(output, expected, **bound)
    for name, buffer in compared_buffers(theirs).items():
        assert_close(getattr(ours, name), buffer, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    for training in (False, True):
        output = ours.train(training)(input)
        assert_close(output, theirs.train(training)(input), **bound)
        output.sum().backward()
        assert input.grad.dtype == ours.weight.grad.dtype == ours.bias.grad.dtype == dtype


def test_half_precision_parameters_keep_full_precision_statistics(backend):
    row = KINDS[0]
    layer = row.make(noise_train=0.0)
    exact = row.make(noise_train=0.0, dtype=torch.float64)
    for name in ("weight", "bias"):
        parameter = getattr(layer, name)
        parameter.data = parameter.data.bfloat16()
        getattr(exact, name).data.copy_(parameter.data)  # with the same rounding
    for step in range(3):
        input = row.input(torch.bfloat16, step)
        for each, x in ((layer, input), (exact, input.double())):
            each.zero_grad()
            output = each(x)
            output.float().square().sum().backward()
            assert output.dtype == each.weight.grad.dtype == x.dtype
        bound = 0.02 * exact.weight.grad.abs().max().item()
        assert_close(layer.weight.grad.double(), exact.weight.grad, rtol=0.0, atol=bound)
    for name in ("running_mean", "running_var", "running_lmbda"):
        buffer = getattr(layer, name)
        assert buffer.dtype == torch.float32
        # Far below bfloat16's 4e-3: statistics are not rounded to it.
        assert_close(buffer.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@each_kind
@pytest.mark.parametrize("amp", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_on_the_processor_keeps_the_input_dtype_as_in_torch(row, amp, backend):
    ours, theirs = row.make(**OFF), row.make_counterpart()
    for dtype in (torch.float32, amp):
        input = row.input(dtype).requires_grad_()
        with torch.autocast("cpu", amp):
            output, expected = ours(input), theirs(input)
        assert output.dtype == expected.dtype == dtype
        assert_close(output, expected, rtol=0.0, atol=16 * torch.finfo(dtype).eps)
        output.float().sum().backward()
        assert input.grad.dtype == dtype
        assert ours.weight.grad.dtype == ours.bias.grad.dtype == torch.float32


# Use inside models


@each_layer
def test_sync_conversion_leaves_our_layers_alone(row):
    model = nn.Sequential(row.make(), nn.BatchNorm2d(2))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0] is model[0]
    assert isinstance(converted[1], nn.SyncBatchNorm)
    # Code that looks for torch's layers finds those that nothing replaces by a plain one.
    theirs = row.counterpart if row.kind in ("layer", "group") else nn.modules.batchnorm._NormBase
    assert isinstance(model[0], theirs)
