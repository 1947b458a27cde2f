"""The layers behave like torch's: construction, state, dtypes, modes and running statistics.

The first part runs the module inputs of torch's test suite for BatchNorm, LayerNorm, GroupNorm and
InstanceNorm through normnorm's classes without transform and noise, where each must equal its
counterpart.
"""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from layer_table import LAYERS, NAMES, RUNNING, set_parameters
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

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
each_layer = pytest.mark.parametrize("row", LAYERS, ids=NAMES)
each_running = pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)


# torch's test inputs


def module_inputs(info, dtype=torch.float64, training=True):
    torch.manual_seed(0)
    return info.module_inputs_func(info, "cpu", dtype, True, training)


def torch_cases():
    """(row, info, index) of every torch test input for a class with a counterpart here."""
    cases = []
    for info in common_modules.module_db:
        row = BY_COUNTERPART.get(info.module_cls)
        if row is not None:
            count = len(module_inputs(info))
            cases += [
                pytest.param(row, info, index, id=f"{row.name}-{index}") for index in range(count)
            ]
    return cases


TORCH_CASES = torch_cases()
each_torch_case = pytest.mark.parametrize(("row", "info", "index"), TORCH_CASES)
each_mode = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def build_pair(row, info, index, training, dtype=torch.float64):
    """(torch's layer, normnorm's with its state loaded strictly, the forward call's input)."""
    sample = module_inputs(info, dtype, training)[index]
    arguments = sample.constructor_input
    theirs = set_parameters(row.counterpart(*arguments.args, **arguments.kwargs).to(dtype))
    if getattr(theirs, "running_mean", None) is not None:
        theirs.running_mean.fill_(0.25)
        theirs.running_var.fill_(1.5)
    ours = row.cls(*arguments.args, **arguments.kwargs, **OFF).to(dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.train(training)
    ours.train(training)
    (input,) = sample.forward_input.args
    assert not sample.forward_input.kwargs
    return theirs, ours, input


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


def test_torch_has_inputs_for_every_class_and_none_is_left_out(capsys):
    counts = Counter(case.values[0].name for case in TORCH_CASES)
    assert set(counts) == set(NAMES)
    assert min(counts.values()) >= 4  # torch 2.10: 46 in total, four for each instance layer
    with capsys.disabled():
        print(f"\n{2 * sum(counts.values())} torch module inputs (train and eval): {dict(counts)}")


@pytest.mark.parametrize(
    ("training", "dtype"),
    [
        pytest.param(True, torch.float64, id="train-float64"),
        pytest.param(False, torch.float64, id="eval-float64"),
        pytest.param(True, torch.float32, id="train-float32"),
        pytest.param(False, torch.float32, id="eval-float32", marks=pytest.mark.slow),
    ],
)
@each_torch_case
def test_equals_torch_without_transform_and_noise(row, info, index, training, dtype, backend):
    theirs, ours, input = build_pair(row, info, index, training, dtype)
    # Sums of up to a few hundred terms of order one, in a different order from torch's.
    unit = torch.finfo(dtype).eps
    bound = {"rtol": 8.0 * unit, "atol": 400.0 * unit}
    for step in range(2):
        shifted = input + 0.5 * step
        expected, expected_gradients = run(theirs, shifted)
        output, gradients = run(ours, shifted)
        assert_close(output, expected, **bound)
        assert_close(gradients, expected_gradients, **bound)
        assert_close(compared_buffers(ours), compared_buffers(theirs), **bound)

    # Conversely: torch's layer loads this state without lambda and gives the same evaluation
    # output.
    state = ours.state_dict()
    if state.pop("running_lmbda", None) is not None:
        state["num_batches_tracked"] = theirs.num_batches_tracked
    arguments = module_inputs(info)[index].constructor_input
    fresh = row.counterpart(*arguments.args, **arguments.kwargs).to(dtype)
    fresh.load_state_dict(state, strict=True)
    assert_close(fresh.eval()(input), ours.eval()(input), **bound)


def as_function(layer):
    """(the layer as a function of input and parameters, the parameters)."""
    names = [name for name, _ in layer.named_parameters()]

    def function(input, *parameters):
        # A copy each time, because the running statistics would change between calls.
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(layer), state, (input,))

    return function, tuple(layer.parameters())


@each_mode
@each_torch_case
def test_first_derivatives_at_torch_inputs_pass_gradcheck(row, info, index, training, backend):
    _, layer, input = build_pair(row, info, index, training)
    function, parameters = as_function(layer)
    arguments = (input.detach().requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(function, arguments, fast_mode=True)


@pytest.mark.parametrize(
    "training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"]
)
@each_torch_case
def test_second_derivatives_at_torch_inputs_pass_gradgradcheck(row, info, index, training, backend):
    _, layer, input = build_pair(row, info, index, training)
    function, parameters = as_function(layer)
    arguments = (input.detach().requires_grad_(), *parameters)
    assert torch.autograd.gradgradcheck(function, arguments, fast_mode=True)


@each_torch_case
def test_memory_format_and_strides_follow_torch(row, info, index, backend):
    theirs, ours, input = build_pair(row, info, index, True)
    arranged = [input.detach()]
    if input.dim() in (4, 5):
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        arranged.append(input.detach().to(memory_format=layout))
    wide = torch.stack([input.detach(), torch.full_like(input, 7.0)], dim=-1)
    arranged.append(wide[..., 0])
    for arrangement in arranged:
        expected = copy.deepcopy(theirs)(arrangement)
        output = copy.deepcopy(ours)(arrangement)
        assert_close(output, expected, rtol=0.0, atol=1e-11)
        assert output.stride() == torch.empty_like(arrangement).stride()


def error_cases():
    cases = []
    for info in common_modules.module_db:
        row = BY_COUNTERPART.get(info.module_cls)
        if row is None or info.module_error_inputs_func is None:
            continue
        named = SimpleNamespace(module_cls=info.module_cls)
        found = info.module_error_inputs_func(named, "cpu", torch.float32, False, True)
        cases += [pytest.param(row, case, id=f"{row.name}-{i}") for i, case in enumerate(found)]
    return cases


@pytest.mark.parametrize(("row", "case"), error_cases())
def test_torch_error_inputs_raise_as_torch_says(row, case, backend):
    arguments = case.module_error_input.constructor_input
    if case.error_on == common_modules.ModuleErrorEnum.CONSTRUCTION_ERROR:
        with pytest.raises(case.error_type, match=case.error_regex):
            row.cls(*arguments.args, **arguments.kwargs)
        return

    def call() -> None:  # the constructor rejects some of it, such as an eps
        layer = row.cls(*arguments.args, **arguments.kwargs)
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
    assert set(OURS) <= keyword(ours)
    assert keyword(theirs) <= keyword(ours)
    assert "bias" in ours
    assert keyword(ours) - set(OURS) <= {"bias"}


@each_layer
def test_defaults_are_the_published_ones(row):
    layer = row.cls(*row.args)
    assert layer.noise_train == (1.0 if row.kind == "layer" else 0.4)
    assert (layer.alpha, layer.order, layer.transform_eps, layer.eps) == (1.0, 2, 0.0, 1e-5)


@each_layer
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
def test_bias_false_keeps_the_weight_alone(row, backend):
    layer = row.make(bias=False, **OFF)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    assert "bias" in layer._parameters  # registered as None, for parameter listings
    with_zero = row.make(**OFF)
    nn.init.zeros_(with_zero.bias)
    input = row.input(torch.float32)
    assert_close(layer(input), with_zero(input), rtol=0.0, atol=0.0)


@each_layer
def test_without_affine_there_are_no_parameters(row, backend):
    name = "elementwise_affine" if row.kind == "layer" else "affine"
    layer = row.cls(*row.args, **{name: False}, noise_train=0.0)
    assert layer.weight is None
    assert layer.bias is None
    assert not list(layer.parameters())
    plain = row.cls(*row.args, **{name: True}, noise_train=0.0)
    input = row.input(torch.float32)
    assert_close(layer(input), plain(input), rtol=0.0, atol=1e-6)
    layer.reset_parameters()


def test_bias_without_affine_is_no_bias():
    layer = normnorm.BatchNormalNorm2d(3, affine=False, bias=True)
    assert layer.bias is None
    assert normnorm.GroupNormalNorm(1, 3, affine=False, bias=True).bias is None


@each_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_device_and_dtype_reach_parameters_and_buffers(row, dtype):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(device="cpu", dtype=dtype, **extra)
    for name, tensor in layer.state_dict().items():
        wanted = torch.int64 if name == "num_batches_tracked" else dtype
        assert tensor.dtype == wanted, name
        assert tensor.device.type == "cpu"


# Copies and checkpoints


def trained(row, **keywords):
    """A layer after two training steps, in float32."""
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(**extra, **keywords)
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


def through_pickle(layer):
    return pickle.loads(pickle.dumps(layer))


def through_file(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@each_layer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_file])
def test_copies_are_equal_and_share_nothing(row, duplicate, backend):
    layer = trained(row, noise_train=0.3, alpha=0.9, order=1, transform_eps=0.001)
    copied = duplicate(layer)
    assert type(copied) is type(layer)
    assert_same_layer(copied, layer, row.input(torch.float32))
    pointers = {tensor.data_ptr() for tensor in layer.state_dict().values()}
    assert pointers.isdisjoint(tensor.data_ptr() for tensor in copied.state_dict().values())


@each_layer
def test_checkpoint_loads_with_weights_only(row, backend):
    layer = trained(row)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    extra = {"track_running_stats": True} if row in RUNNING else {}
    other = row.make(**extra)
    other.load_state_dict(state, strict=True)
    assert_same_layer(other, layer, row.input(torch.float32))


@each_running
def test_torch_checkpoint_loads_strictly_with_lambda_one(row, backend):
    theirs = row.make_counterpart(track_running_stats=True)
    theirs(row.input(torch.float32))
    ours = nn.Sequential(row.make(track_running_stats=True))
    ours[0].running_lmbda.fill_(5.0)
    keys = ours.load_state_dict(nn.Sequential(theirs).state_dict(), strict=True)
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert torch.equal(ours[0].running_lmbda, torch.ones(row.shape[1]))
    # Lambda 1 is the identity: evaluation equals torch's.
    input = row.input(torch.float32, 1)
    assert_close(ours.eval()(input), theirs.eval()(input), rtol=0.0, atol=2e-6)


@each_running
def test_torch_checkpoint_without_metadata_or_counter_loads_strictly(row):
    state = dict(row.make_counterpart(track_running_stats=True).state_dict())
    ours = row.make(track_running_stats=True)
    ours.load_state_dict(state, strict=True)  # a plain dict has no versions
    del state["num_batches_tracked"]
    ours.load_state_dict(state, strict=True)  # as in files from before torch counted batches
    assert "running_lmbda" not in state  # the caller's dict is unchanged


@each_running
def test_own_checkpoint_must_have_lambda(row):
    layer = trained(row)
    state = layer.state_dict()
    del state["running_lmbda"]
    assert state._metadata[""]["version"] == 3
    with pytest.raises(RuntimeError, match="running_lmbda"):
        row.make(track_running_stats=True).load_state_dict(state, strict=True)


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
        return row.cls(*row.args, **dict(row.affine), track_running_stats=True, device="meta")

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
def test_checkpoint_with_unknown_keys_or_wrong_sizes_is_refused(row):
    layer = row.make(track_running_stats=True)
    state = layer.state_dict()
    state["running_median"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="running_median"):
        layer.load_state_dict(state, strict=True)
    state = layer.state_dict()
    state["running_lmbda"] = torch.zeros(row.shape[1] + 1)
    with pytest.raises(RuntimeError, match="running_lmbda"):
        layer.load_state_dict(state, strict=True)


@each_running
def test_checkpoint_of_untracked_layers_has_parameters_alone(row):
    layer = row.make(track_running_stats=False)
    assert set(layer.state_dict()) == {"weight", "bias"}
    theirs = row.make_counterpart(track_running_stats=False)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(layer.state_dict(), strict=True)


@each_running
def test_state_keys_are_torch_keys_and_lambda(row):
    ours = list(row.make(track_running_stats=True).state_dict())
    theirs = list(row.make_counterpart(track_running_stats=True).state_dict())
    assert set(ours) == {*theirs, "running_lmbda"}


@each_running
def test_checkpoint_of_authors_loads_strictly(row, backend):
    layer = trained(row)
    state = layer.state_dict()
    del state["num_batches_tracked"]
    state["running_norm"] = torch.ones(row.shape[1])
    del state._metadata
    other = row.make(track_running_stats=True)
    keys = other.load_state_dict(state, strict=True)
    assert not keys.unexpected_keys
    assert torch.equal(other.running_lmbda, layer.running_lmbda)
    assert other.num_batches_tracked == 0


@each_running
def test_checkpoint_loads_by_assignment_onto_meta(row, backend):
    layer = trained(row)
    other = row.cls(*row.args, **dict(row.affine), track_running_stats=True, device="meta")
    other.load_state_dict(layer.state_dict(), strict=True, assign=True)
    assert_same_layer(other, layer, row.input(torch.float32))


# Uninitialized construction


@each_layer
@pytest.mark.parametrize("bias", [True, False])
def test_meta_layer_becomes_real_by_to_empty_and_reset(row, bias, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    keywords = {**dict(row.affine), **extra, "bias": bias}
    layer = row.cls(*row.args, **keywords, device="meta")
    assert all(tensor.is_meta for tensor in layer.state_dict().values())
    output = layer(row.input(torch.float32).to("meta"))
    assert output.is_meta
    assert output.shape == row.shape

    real = layer.to_empty(device="cpu")
    for tensor in real.state_dict().values():
        tensor.fill_(77)  # arbitrary content
    real.reset_parameters()
    fresh = row.cls(*row.args, **keywords)
    assert real.state_dict().keys() == fresh.state_dict().keys()
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(real.state_dict()[name], tensor), name


@each_layer
def test_skip_init_leaves_nothing_but_memory_to_fill(row):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = nn.utils.skip_init(row.cls, *row.args, **dict(row.affine), **extra)
    layer.reset_parameters()
    fresh = row.cls(*row.args, **dict(row.affine), **extra)
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor), name


@each_running
def test_reset_running_stats_gives_zero_one_one_and_no_batches(row, backend):
    layer = trained(row)
    layer.reset_running_stats()
    assert (layer.running_mean == 0).all()
    assert (layer.running_var == 1).all()
    assert (layer.running_lmbda == 1).all()
    assert layer.num_batches_tracked == 0


# Running statistics


def batch_statistics(row, input, alpha=1.0, order=2):
    """(mean, unbiased variance, lambda) per channel, averaged over samples for instance kinds."""
    per_channel = input.double().movedim(1, 0).flatten(1) if row.kind == "batch" else None
    if per_channel is None:
        groups = input.double().flatten(2)
    else:
        groups = per_channel[None]
    mean = groups.mean(-1)
    h = (groups - mean[..., None]) / (groups.var(-1, unbiased=False) + 1e-5).sqrt()[..., None]
    lmbda = normnorm.estimate_lmbda(h, -1, alpha=alpha, order=order)
    return mean.mean(0), groups.var(-1, unbiased=True).mean(0), lmbda.mean(0)


@each_running
@pytest.mark.parametrize("order", [1, 2])
def test_running_statistics_are_the_exponential_average_of_the_batches(row, order, backend):
    layer = row.make(track_running_stats=True, momentum=0.3, order=order, dtype=torch.float64)
    buffers = [layer.running_mean, layer.running_var, layer.running_lmbda]
    counter = layer.num_batches_tracked
    pointers = [buffer.data_ptr() for buffer in (*buffers, counter)]
    channels = row.shape[1]
    expected = [torch.full((channels,), value, dtype=torch.float64) for value in (0.0, 1.0, 1.0)]
    for step in range(4):
        input = row.input(seed=step)
        layer(input)
        found = batch_statistics(row, input, order=order)
        expected = [0.7 * old + 0.3 * new for old, new in zip(expected, found, strict=True)]
        assert_close(buffers, expected, rtol=1e-10, atol=1e-10)
        assert counter == step + 1
    assert (layer.running_lmbda - 1.0).abs().min() > 1e-4  # the data are not symmetric
    # Updated in place: the same objects in the same memory.
    assert layer.running_mean is buffers[0]
    assert layer.running_var is buffers[1]
    assert layer.running_lmbda is buffers[2]
    assert layer.num_batches_tracked is counter
    assert pointers == [buffer.data_ptr() for buffer in (*buffers, counter)]


class Recorder(TorchDispatchMode):
    """Records every operation that reaches the kernels."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


@each_running
def test_momentum_none_averages_all_batches_without_a_host_sync(row, backend):
    layer = row.make(track_running_stats=True, momentum=None, dtype=torch.float64)
    found = []
    for step in range(3):
        input = row.input(seed=step)
        with Recorder() as recorder:
            layer(input)
        assert recorder.names
        assert "aten::_local_scalar_dense" not in recorder.names
        found.append(batch_statistics(row, input))
        expected = [torch.stack(values).mean(0) for values in zip(*found, strict=True)]
        buffers = [layer.running_mean, layer.running_var, layer.running_lmbda]
        assert_close(buffers, expected, rtol=1e-10, atol=1e-10)


@each_layer
@each_mode
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_no_step_reads_a_value_back_to_the_host(row, training, noise, backend):
    layer = row.make(noise_train=noise).train(training)
    input = row.input(torch.float32).requires_grad_()
    with Recorder() as recorder:
        layer(input).square().sum().backward()
    assert "aten::_local_scalar_dense" not in recorder.names


@pytest.mark.parametrize("row", LAYERS[:3], ids=NAMES[:3])
def test_cumulative_average_equals_torch(row, backend):
    ours = row.make(momentum=None, **OFF)
    theirs = row.make_counterpart(momentum=None)
    for step in range(4):
        input = row.input(torch.float32, step)
        assert_close(ours(input), theirs(input), rtol=0.0, atol=1e-5)
        assert_close(compared_buffers(ours), compared_buffers(theirs), rtol=1e-5, atol=1e-6)


@each_running
def test_untracked_layers_use_the_batch_in_evaluation_too(row, backend):
    layer = row.make(track_running_stats=False, noise_train=0.0)
    assert layer.running_mean is layer.running_var is layer.running_lmbda is None
    assert layer.num_batches_tracked is None
    input = row.input(torch.float32)
    assert torch.equal(layer.train()(input), layer.eval()(input))


@pytest.mark.parametrize("row", LAYERS[:3], ids=NAMES[:3])
def test_clearing_the_flag_keeps_the_buffers_still_as_in_torch(row, backend):
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
    layer = row.make(track_running_stats=True, dtype=torch.float64)
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
    x = normnorm.yeo_johnson(h, per_channel(layer.running_lmbda))
    expected = per_channel(layer.weight) * x + per_channel(layer.bias)
    assert_close(output, expected, rtol=1e-11, atol=1e-11)
    # Single samples give the same: no statistics are shared over the batch.
    single = torch.cat([layer(sample[None]) for sample in input])
    assert_close(single, output, rtol=1e-12, atol=1e-12)


@each_layer
def test_train_and_eval_differ_by_noise_and_switch_back(row, backend):
    layer = row.make()
    input = row.input(torch.float32)
    quiet = layer.eval()(input)
    assert torch.equal(layer(input), quiet)
    noisy = layer.train()(input)
    assert not torch.equal(noisy, layer(input))  # new noise in each call
    assert not torch.equal(noisy, quiet)
    torch.manual_seed(5)
    first = layer(input)
    torch.manual_seed(5)
    assert torch.equal(layer(input), first)


@each_layer
def test_noise_can_be_annealed_between_steps(row, backend):
    layer = row.make(noise_train=0.8)
    input = row.input(torch.float32)
    deviations = []
    for noise in (0.8, 0.4, 0.0):
        layer.noise_train = noise
        torch.manual_seed(3)
        noisy = layer(input)
        layer.noise_train = 0.0
        deviations.append((noisy - layer(input)).detach())
    # The same noise with another weight: linear in noise_train.
    assert_close(deviations[0], 2.0 * deviations[1], rtol=1e-4, atol=1e-5)
    assert deviations[0].abs().max() > 0.01
    assert (deviations[2] == 0).all()


@each_layer
def test_no_noise_draws_no_random_numbers(row, backend):
    input = row.input(torch.float32)
    for layer in (row.make(noise_train=0.0), row.make().eval()):
        before = torch.get_rng_state()
        layer(input)
        assert torch.equal(torch.get_rng_state(), before)


# Shapes and dtypes


@pytest.mark.parametrize("row", LAYERS[5:], ids=NAMES[5:])
@each_mode
@pytest.mark.parametrize("tracked", [False, True], ids=["untracked", "tracked"])
def test_unbatched_instance_input_is_a_batch_of_one(row, training, tracked, backend):
    keywords = {"track_running_stats": tracked, "noise_train": 0.0}
    layers = [row.make(**keywords).train(training) for _ in range(2)]
    input = row.input(torch.float32)[0]
    output = layers[0](input)
    assert output.shape == input.shape
    assert torch.equal(output, layers[1](input[None])[0])
    for first, second in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@each_layer
def test_conversion_of_the_layer_converts_output_and_state_as_in_torch(row, dtype, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    ours, theirs = row.make(**OFF, **extra).to(dtype), row.make_counterpart(**extra).to(dtype)
    input = row.input(dtype)
    # A few units in the last place of outputs of size up to 4.
    bound = {"rtol": 0.0, "atol": 8.0 * torch.finfo(dtype).eps + 1e-12}
    output, expected = ours(input), theirs(input)
    assert output.dtype == expected.dtype == dtype
    assert_close(output, expected, **bound)
    for name, buffer in compared_buffers(theirs).items():
        assert getattr(ours, name).dtype == buffer.dtype
        assert_close(getattr(ours, name), buffer, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
    assert_close(ours.eval()(input), theirs.eval()(input), **bound)


@each_layer
@each_mode
@pytest.mark.parametrize("method", ["half", "bfloat16", "double", "float"])
def test_conversion_methods_give_that_dtype_forward_and_backward(row, training, method, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = getattr(row.make(**extra), method)().train(training)
    dtype = layer.weight.dtype
    input = row.input(dtype).requires_grad_()
    output = layer(input)
    output.sum().backward()
    assert output.dtype == input.grad.dtype == layer.weight.grad.dtype == dtype
    assert output.isfinite().all()
    assert input.grad.isfinite().all()


@each_layer
@each_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_full_precision_parameters_take_half_precision_input(row, training, dtype, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(noise_train=0.0, **extra).train(training)
    input = row.input(dtype).requires_grad_()
    output = layer(input)
    output.float().square().sum().backward()
    assert output.dtype == dtype
    assert input.grad.dtype == dtype
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32
    exact = copy.deepcopy(layer).double()(input.detach().double())
    scale = 4 * torch.finfo(dtype).eps * exact.abs().max().item()
    if not row.keeps_running or training:
        assert_close(output.double(), exact, rtol=0.0, atol=scale)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == (torch.int64 if name == "num_batches_tracked" else torch.float32)


@pytest.mark.parametrize("row", LAYERS[:3], ids=NAMES[:3])
def test_half_precision_parameters_keep_full_precision_statistics(row, backend):
    layer = row.make(noise_train=0.0)
    layer.weight.data = layer.weight.data.bfloat16()
    layer.bias.data = layer.bias.data.bfloat16()
    exact = row.make(noise_train=0.0, dtype=torch.float64)
    for step in range(3):
        input = row.input(torch.bfloat16, step)
        output = layer(input)
        expected = exact(input.double())
        assert output.dtype == torch.bfloat16
        assert_close(output.double(), expected, rtol=0.02, atol=0.05)
    output.float().sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    for name in ("running_mean", "running_var", "running_lmbda"):
        buffer = getattr(layer, name)
        assert buffer.dtype == torch.float32
        # Far below bfloat16's 4e-3: statistics are not rounded to it.
        assert_close(buffer.double(), getattr(exact, name), rtol=1e-5, atol=1e-5)


@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "amp", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_autocast_on_the_processor_keeps_the_input_dtype_as_in_torch(row, dtype, amp, backend):
    ours, theirs = row.make(), row.make_counterpart()
    input = row.input(dtype)
    with torch.autocast("cpu", amp):
        output, expected = ours(input), theirs(input)
        quiet = row.make(**OFF)(input)
    assert output.dtype == expected.dtype == dtype
    assert_close(quiet, expected, rtol=0.0, atol=16 * torch.finfo(dtype).eps)


@each_layer
def test_gradients_under_autocast_have_the_parameters_dtypes(row, backend):
    layer = row.make()
    input = row.input(torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = layer(input).square().sum()
    loss.backward()
    assert input.grad.dtype == layer.weight.grad.dtype == layer.bias.grad.dtype == torch.float32


# Use inside models


@each_layer
def test_sync_conversion_leaves_our_layers_alone(row):
    model = nn.Sequential(row.make(), nn.BatchNorm2d(2))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert type(converted[0]) is row.cls
    assert converted[0] is model[0]
    assert isinstance(converted[1], nn.SyncBatchNorm)


@each_layer
def test_base_classes_are_those_that_nothing_replaces(row):
    assert not issubclass(row.cls, nn.modules.batchnorm._BatchNorm)
    assert not issubclass(row.cls, nn.modules.instancenorm._InstanceNorm)
    if row.kind in ("layer", "group"):
        assert issubclass(row.cls, row.counterpart)
    else:
        assert issubclass(row.cls, nn.modules.batchnorm._NormBase)


@each_layer
@each_mode
def test_two_layers_in_a_row_train_and_evaluate(row, training, backend):
    torch.manual_seed(0)
    model = nn.Sequential(row.make(), nn.Tanh(), row.make()).train(training)
    input = row.input(torch.float32).requires_grad_()
    model(input).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert input.grad.isfinite().all()


@pytest.mark.parametrize("row", LAYERS[:3], ids=NAMES[:3])
def test_empty_batch_counts_and_changes_no_statistic(row, backend):
    ours, theirs = row.make(), row.make_counterpart()
    input = torch.zeros(0, *row.shape[1:], requires_grad=True)
    output = ours(input)
    theirs(input.detach())
    assert output.shape == input.shape
    output.sum().backward()
    assert input.grad.shape == input.shape
    assert (ours.weight.grad == 0).all()
    assert (ours.running_lmbda == 1).all()
    assert_close(compared_buffers(ours), compared_buffers(theirs), equal_nan=True)
