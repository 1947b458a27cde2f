"""Bad input raises an error that states the expected and the actual value, and changes nothing.

Three tables: layers, functions, raw ops. Each row is a mistake and the words that its error must
contain. Errors are ValueError, TypeError or RuntimeError; buffers (the batch counter included) keep
their values and their memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layer_table import KINDS, LAYERS, NAMES, RUNNING, few
from torch import nn

import normnorm
import normnorm.functional as F
from normnorm import backends

REFUSALS = (ValueError, TypeError, RuntimeError)


def assert_refused(call, *words):
    """``call`` raises one of the documented errors, whose text contains every word."""
    with pytest.raises(REFUSALS) as caught:
        call()
    error = caught.value
    assert not isinstance(error, (NotImplementedError, RecursionError, UnicodeError)), repr(error)
    text = str(error)
    for word in words:
        assert word.lower() in text.lower(), f"{word!r} is not in {type(error).__name__}: {text}"
    assert len(text.split()) >= 4, text  # a sentence, not a code


class Unchanged:
    """Asserts that the given tensors keep their values, memory and identity in the block."""

    def __init__(self, tensors):
        self.tensors = [tensor for tensor in tensors if tensor is not None]

    def __enter__(self):
        self.before = [tensor.detach().clone() for tensor in self.tensors]
        self.pointers = [0 if t.is_meta else t.data_ptr() for t in self.tensors]

    def __exit__(self, kind, *_):
        if kind is not None:
            return
        assert self.pointers == [0 if t.is_meta else t.data_ptr() for t in self.tensors]
        for now, then in zip(self.tensors, self.before, strict=True):
            assert now.is_meta or torch.equal(now, then)


# Layers


@dataclass(frozen=True)
class Mistake:
    """A name, the change of the layer and its input, and the words of the error."""

    name: str
    spoil: Any
    words: tuple[str, ...]
    kinds: tuple[str, ...] = ("batch", "layer", "group", "instance")

    def __str__(self):
        return self.name


def setting(name, value):
    def spoil(layer, input):
        setattr(layer, name, value)
        return input

    return spoil


def on_input(function):
    return lambda layer, input: function(input)


def parameter(name, function):
    def spoil(layer, input):
        setattr(layer, name, nn.Parameter(function(getattr(layer, name).detach())))
        return input

    return spoil


def integer_parameter(layer, input):
    layer.weight = nn.Parameter(torch.ones_like(layer.weight, dtype=torch.int64), False)
    return input


LAYER_MISTAKES = (
    Mistake("eps zero", setting("eps", 0.0), ("eps must be positive", "0.0")),
    Mistake("eps negative", setting("eps", -0.5), ("eps must be positive", "-0.5")),
    Mistake("eps nan", setting("eps", math.nan), ("eps", "nan")),
    Mistake("eps inf", setting("eps", math.inf), ("eps", "inf")),
    Mistake("noise negative", setting("noise_train", -0.1), ("noise_train", "at least 0", "-0.1")),
    Mistake("noise nan", setting("noise_train", math.nan), ("noise_train", "finite", "nan")),
    Mistake("noise inf", setting("noise_train", math.inf), ("noise_train", "finite", "inf")),
    Mistake("order zero", setting("order", 0), ("order must be 1 or 2", "0")),
    Mistake("order three", setting("order", 3), ("order must be 1 or 2", "3")),
    Mistake("alpha nan", setting("alpha", math.nan), ("alpha", "finite", "nan")),
    Mistake("alpha inf", setting("alpha", -math.inf), ("alpha", "finite", "-inf")),
    Mistake("transform_eps", setting("transform_eps", -1e-3), ("transform_eps", "-0.001")),
    Mistake("transform_eps nan", setting("transform_eps", math.nan), ("transform_eps", "nan")),
    Mistake("integer input", on_input(lambda x: x.long()), ("input must be", "float", "int64")),
    Mistake("boolean input", on_input(lambda x: x > 0), ("input must be", "float", "bool")),
    Mistake(
        "complex input", on_input(lambda x: x.to(torch.complex64)),
        ("input must be", "float", "complex64"),
    ),
    Mistake(
        "float8 input", on_input(lambda x: x.to(torch.float8_e4m3fn)),
        ("input must be", "float", "float8"),
    ),
    Mistake("input elsewhere", on_input(lambda x: x.to("meta")), ("device", "meta", "cpu")),
    Mistake(
        "weight shape", parameter("weight", lambda w: torch.ones(w.numel() + 1)),
        ("weight must have shape",),
    ),
    Mistake(
        "bias shape", parameter("bias", lambda b: b.reshape(1, *b.shape)),
        ("bias must have shape", "(1, "),
    ),
    Mistake("weight scalar", parameter("weight", lambda w: torch.ones(())), ("weight", "()")),
    Mistake(
        "weight dtype", parameter("weight", lambda w: w.double()), ("weight", "float32", "float64")
    ),
    Mistake(
        "bias dtype", parameter("bias", lambda b: b.half()), ("bias", "float32", "float16")
    ),
    Mistake("weight integer", integer_parameter, ("weight", "float32", "int64")),
    Mistake("weight elsewhere", parameter("weight", lambda w: w.to("meta")), ("weight", "meta")),
    Mistake("bias elsewhere", parameter("bias", lambda b: b.to("meta")), ("bias", "meta", "cpu")),
    Mistake("scalar input", on_input(lambda x: x.sum()), ("input",)),
    Mistake("rank too low", on_input(lambda x: x.flatten()), ("input", "got")),
    Mistake("rank too high", on_input(lambda x: x[None, None]), ("input",), ("batch", "instance")),
    Mistake(
        "one channel more", on_input(lambda x: torch.cat([x, x[:, :1]], 1)), ("channels", "got"),
        ("batch", "group"),
    ),
    Mistake(
        "one channel less", on_input(lambda x: x[:, 1:]), ("channels", "got"), ("batch", "group")
    ),
    Mistake(
        "one channel more", on_input(lambda x: torch.cat([x, x[:, :1]], 1)),
        ("num_features", "got"), ("instance",),
    ),
    Mistake(
        "other trailing sizes", on_input(lambda x: x[..., 1:]),
        ("normalized_shape", "but got input of size"), ("layer",),
    ),
    Mistake(
        "one value per channel", on_input(lambda x: x[:1].reshape(1, x.size(1), -1)[..., 0].reshape(
            1, x.size(1), *(1,) * (x.dim() - 2))),
        ("Expected more than 1 value per channel when training", "got input size"), ("batch",),
    ),
    Mistake(
        "one spatial element", on_input(lambda x: x.flatten(2)[..., :1].reshape(
            *x.shape[:2], *(1,) * (x.dim() - 2))),
        ("Expected more than 1 spatial element", "got input size"), ("instance",),
    ),
    Mistake("groups that do not divide", setting("num_groups", 3), ("divisible", "3"), ("group",)),
    Mistake("no groups", setting("num_groups", 0), ("num_groups", "positive", "0"), ("group",)),
    Mistake("negative groups", setting("num_groups", -2), ("num_groups", "-2"), ("group",)),
)  # fmt: skip


def layer_rows():
    return [
        pytest.param(
            row,
            mistake,
            id=f"{row.name}-{mistake.name.replace(' ', '-')}",
            marks=() if row in (*KINDS, LAYERS[0]) else pytest.mark.slow,
        )
        for row in LAYERS
        for mistake in LAYER_MISTAKES
        if row.kind in mistake.kinds
    ]


@pytest.mark.parametrize(("row", "mistake"), layer_rows())
def test_layer_refuses_with_a_sentence_and_changes_no_buffer(row, mistake, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(**extra)
    layer(row.input(torch.float32))  # a valid step, so that the buffers are not initial
    input = mistake.spoil(layer, row.input(torch.float32, 1))
    with Unchanged(layer.buffers()):
        assert_refused(lambda: layer(input), *mistake.words)
    if input.dtype == torch.float32 and not input.is_meta:
        with Unchanged(layer.buffers()):
            assert_refused(lambda: layer(input.requires_grad_()), *mistake.words)


SPOILED = [
    ("shape", lambda b: b.repeat(2), ("must have shape",)),
    ("rank", lambda b: b.reshape(1, -1), ("must have shape", "(1, ")),
    ("dtype", lambda b: b.long(), ("float", "int64")),
    ("complex", lambda b: b.to(torch.complex64), ("float", "complex64")),
    ("device", lambda b: b.to("meta"), ("device", "meta")),
    ("missing", lambda b: None, ("given together",)),
]


@pytest.mark.parametrize("row", few(RUNNING, KINDS))
@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        pytest.param(name, spoil, words, id=f"{how}-{name}")
        for name in ("running_mean", "running_var", "running_lmbda")
        for how, spoil, words in SPOILED
        # Loaders of BatchNorm checkpoints leave lambda on meta; it becomes 1.
        if (name, how) != ("running_lmbda", "device")
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layer_with_spoiled_running_statistics_refuses(row, name, spoil, words, training, backend):
    layer = row.make(track_running_stats=True)
    layer(row.input(torch.float32))
    setattr(layer, name, spoil(getattr(layer, name)))
    layer.train(training)
    with Unchanged(layer.buffers()):
        assert_refused(lambda: layer(row.input(torch.float32)), name, *words)


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(lambda b: b.float(), ("int64", "float32"), id="dtype"),
        pytest.param(lambda b: b.repeat(2), ("one int64", "(2,)"), id="shape"),
        pytest.param(lambda b: b.to("meta"), ("device", "meta"), id="device"),
    ],
)
def test_layer_with_spoiled_counter_refuses(row, spoil, words, backend):
    layer = row.make(track_running_stats=True)
    layer.num_batches_tracked = spoil(layer.num_batches_tracked)
    with Unchanged(layer.buffers()):
        assert_refused(lambda: layer(row.input(torch.float32)), "num_batches_tracked", *words)


@pytest.mark.parametrize("row", RUNNING, ids=lambda row: row.name)
@pytest.mark.parametrize("momentum", [math.nan, math.inf])
def test_layer_with_a_momentum_that_is_no_number_refuses(row, momentum, backend):
    layer = row.make(track_running_stats=True, momentum=momentum)
    with Unchanged(layer.buffers()):
        assert_refused(lambda: layer(row.input(torch.float32)), "momentum", "finite", str(momentum))


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_layer_on_meta_refuses_real_input(row, backend):
    extra = {"track_running_stats": True} if row in RUNNING else {}
    layer = row.make(device="meta", **extra)
    assert_refused(lambda: layer(row.input(torch.float32)), "device", "meta", "cpu")


@pytest.mark.parametrize(("groups", "channels"), [(3, 10), (0, 4), (-1, 4), (8, 4)])
def test_group_layer_with_groups_that_do_not_divide_is_refused(groups, channels):
    with pytest.raises(ValueError, match=f"{groups}"):
        normnorm.GroupNormalNorm(groups, channels)(torch.ones(2, channels, 3))


# Values that are not numbers, for every numeric setting. An op would read the tensors as numbers
# and drop their gradients.
WRONG_NUMBERS = [
    pytest.param(None, ("None",), id="none"),
    pytest.param("1e-5", ("1e-5", "str"), id="text"),
    pytest.param([1.0], ("list",), id="list"),
    pytest.param(1 + 0j, ("complex",), id="complex"),
    pytest.param(torch.tensor(1.0), ("gradient is not computed", "tensor"), id="tensor"),
    pytest.param(nn.Parameter(torch.tensor(1.0)), ("gradient is not computed",), id="parameter"),
]
SETTINGS = ("noise_train", "alpha", "order", "transform_eps", "eps")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("wrong", "words"), WRONG_NUMBERS)
@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
def test_a_setting_that_is_no_number_is_refused(row, name, wrong, words, backend):
    with pytest.raises(TypeError):
        row.make(**{name: wrong})
    assert_refused(lambda: row.make(**{name: wrong}), f"{name} must be", *words)
    layer = row.make()
    setattr(layer, name, wrong)
    for training in (True, False):
        layer.train(training)
        with Unchanged(layer.buffers()):
            assert_refused(lambda: layer(row.input(torch.float32)), f"{name} must be", *words)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("wrong", "words"), WRONG_NUMBERS)
def test_a_setting_of_a_function_that_is_no_number_is_refused(name, wrong, words, backend):
    state = torch.random.get_rng_state()
    for call in (
        lambda **keywords: F.batch_normal_norm(X, None, None, None, training=True, **keywords),
        lambda **keywords: F.layer_normal_norm(X, (4,), training=True, **keywords),
        lambda **keywords: F.group_normal_norm(X, 3, **keywords),
        lambda **keywords: F.instance_normal_norm(X, training=True, **keywords),
        lambda **keywords: F.add_layer_normal_norm(X, X, (4,), training=True, **keywords),
    ):
        assert_refused(lambda call=call: call(**{name: wrong}), f"{name} must be", *words)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"eps": 0}, ("eps must be positive", "0")),
        ({"eps": -1e-9}, ("eps must be positive", "-1e-09")),
        ({"order": 3}, ("order must be 1 or 2", "3")),
        ({"order": 2.0}, ("order must be an int", "2.0", "float")),
        ({"alpha": math.nan}, ("alpha must be finite", "nan")),
        ({"transform_eps": -1.0}, ("transform_eps", "-1.0")),
        ({"noise_train": -0.5}, ("noise_train", "at least 0", "-0.5")),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_where_a_layer_is_made(settings, words):
    for row in KINDS:
        assert_refused(lambda row=row: row.make(**settings), *words)
    if "eps" not in settings:
        model = nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3))
        assert_refused(lambda: normnorm.replace_norms(model, **settings), *words)
        assert [type(layer) for layer in model] == [nn.BatchNorm1d, nn.LayerNorm]


def test_wrong_types_of_a_layers_own_arguments_are_refused():
    assert_refused(lambda: normnorm.BatchNormalNorm1d(3, momentum="a"), "momentum must be", "'a'")
    assert_refused(lambda: normnorm.GroupNormalNorm(2.0, 4), "num_groups must be an int", "2.0")


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    layer = normnorm.LayerNormalNorm(
        4, eps=numpy.float32(1e-5), noise_train=numpy.float64(0.5), order=numpy.int64(2)
    )
    assert layer(X).shape == X.shape


@pytest.mark.parametrize("number", [-1e-9, -0.1, 0.0, -123456789.0, -1e300, math.nan, -math.inf])
def test_a_number_out_of_range_is_shown_as_it_is(number, backend):
    with pytest.raises(ValueError, match="eps must be positive and finite") as caught:
        F.layer_normal_norm(X, (4,), eps=number)
    assert float(str(caught.value).rpartition(" ")[2]) == pytest.approx(number, rel=0, nan_ok=True)
    assert "000000" not in str(caught.value) or number == -1e300


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_sparse_and_jagged_input_is_refused(row, backend):
    layer, input = row.make(), row.input(torch.float32)
    ragged = torch.nested.nested_tensor(list(input), layout=torch.jagged)
    for wrong in (input.to_sparse(), ragged):
        with pytest.raises(TypeError):
            layer(wrong)
        assert_refused(lambda wrong=wrong: layer(wrong), "input must be a dense tensor", "got")
    if isinstance(layer, normnorm.LayerNormalNorm):
        assert_refused(
            lambda: F.add_layer_normal_norm(input, input.to_sparse(), layer.normalized_shape),
            "residual must be a dense tensor",
        )


# Functions


X = torch.linspace(-2.0, 3.0, 24).reshape(2, 3, 4).square()
ONES = torch.ones(3)


def batch(input=X, mean=None, var=None, lmbda=None, training=True, **keywords):
    return F.batch_normal_norm(input, mean, var, lmbda, training=training, **keywords)


def seeds_of(function):
    """Bad seeds, for a function that draws noise."""
    return [
        (lambda: function(seed=torch.tensor(3)), ("seed", "shape (1,)", "()")),
        (lambda: function(seed=torch.zeros(2, dtype=torch.int64)), ("seed", "(1,)", "(2,)")),
        (lambda: function(seed=torch.zeros(1)), ("seed", "int64", "float32")),
        (lambda: function(seed=torch.zeros(1, dtype=torch.int32)), ("seed", "int64", "int32")),
        (
            lambda: function(seed=torch.zeros(1, dtype=torch.int64, device="meta")),
            ("seed", "device", "meta"),
        ),
        (lambda: function(seed=0.5), ("seed", "int", "float")),
        (lambda: function(seed=True), ("seed", "int", "bool")),
        (lambda: function(seed="1"), ("seed", "int", "str")),
        (lambda: function(seed=2**63), ("seed", "64 bits", str(2**63))),
        (lambda: function(seed=-(2**63) - 1), ("seed", "64 bits")),
    ]


def layer_function(**keywords):
    return F.layer_normal_norm(X, (3, 4), training=True, **keywords)


def group_function(**keywords):
    return F.group_normal_norm(X, 3, training=True, **keywords)


def instance_function(**keywords):
    return F.instance_normal_norm(X, training=True, **keywords)


FUNCTION_MISTAKES = [
    (lambda: batch(training=False), ("running_mean", "training=False")),
    (lambda: batch(mean=ONES, var=ONES), ("together", "2")),
    (lambda: batch(lmbda=ONES), ("together", "1")),
    (lambda: batch(mean=ONES, var=ONES, lmbda=ONES, momentum=None), ("num_batches_tracked",)),
    (lambda: batch(torch.ones(3)), ("(N, C, ...)", "(3,)")),
    (lambda: batch([[1.0, 2.0]]), ("input must be a tensor", "list")),
    (lambda: batch(weight=torch.ones(1)), ("weight", "(3,)", "(1,)")),
    (lambda: batch(weight=ONES, bias=ONES.bfloat16()), ("bias", "bfloat16")),
    (
        lambda: batch(X.half(), weight=ONES, bias=ONES.half()),
        ("weight and bias", "float32", "float16"),
    ),
    (lambda: batch(eps=0.0), ("eps must be positive", "0.0")),
    (lambda: batch(noise_train=-1.0), ("noise_train", "-1.0")),
    (lambda: batch(order=5), ("order", "5")),
    (lambda: F.layer_normal_norm(X, ()), ("normalized_shape",)),
    (lambda: F.layer_normal_norm(X, (3,)), ("normalized_shape", "[3]", "[2, 3, 4]")),
    (lambda: F.layer_normal_norm(X, (1, 2, 3, 4)), ("normalized_shape", "[2, 3, 4]")),
    (lambda: F.layer_normal_norm(X, (4,), ONES), ("weight", "(4,)", "(3,)")),
    (lambda: F.layer_normal_norm(X, (4,), eps=0.0), ("eps must be positive", "0.0")),
    (lambda: F.group_normal_norm(X, 2), ("divisible", "(3)", "(2)")),
    (lambda: F.group_normal_norm(X, 0), ("num_groups", "0")),
    (lambda: F.group_normal_norm(torch.ones(4), 1), ("2 dimensions", "1")),
    (lambda: F.group_normal_norm(torch.ones(1, 3), 3), ("more than 1 value", "[1, 3]")),
    (lambda: F.instance_normal_norm(X, use_input_stats=False), ("use_input_stats=False",)),
    (lambda: F.instance_normal_norm(torch.ones(2, 3, 1)), ("more than 1 spatial", "[2, 3, 1]")),
    (lambda: F.instance_normal_norm(torch.ones(4)), ("input", "(4,)")),
    (lambda: F.instance_normal_norm(X, ONES, ONES, torch.ones(2)), ("running_lmbda", "(3,)")),
    (lambda: normnorm.yeo_johnson(torch.arange(3), 0.5), ("h must be", "int64")),
    (lambda: normnorm.yeo_johnson(0.5, 0.5), ("h must be", "float")),
    (lambda: normnorm.yeo_johnson(X.to(torch.complex64), 0.5), ("h must be", "complex64")),
    (lambda: normnorm.yeo_johnson(X, 0.5, -1.0), ("transform_eps", "-1.0")),
    (lambda: normnorm.estimate_lmbda(torch.arange(3)), ("h must be", "int64")),
    (lambda: normnorm.estimate_lmbda(X, 0, eps=0.0), ("eps", "0.0")),
    (lambda: normnorm.estimate_lmbda(X, 0, order=0), ("order", "0")),
    (lambda: normnorm.estimate_lmbda(X, 0, alpha=math.inf), ("alpha", "inf")),
    (lambda: F.layer_normal_norm(X, 4), ("normalized_shape", "sequence", "4")),
    (lambda: batch(weight=[1.0] * 3), ("weight must be a tensor or None", "list")),
    (lambda: batch(bias=1.0), ("bias must be a tensor or None", "float")),
    (lambda: F.add_layer_normal_norm(X, X, (4,), [1.0] * 4), ("weight must be a tensor", "list")),
    (
        lambda: batch(mean=[0.0] * 3, var=[1.0] * 3, lmbda=[1.0] * 3),
        ("running_mean must be a tensor", "list"),
    ),
    (
        lambda: batch(mean=ONES, var=ONES, lmbda=[1.0] * 3, training=False),
        ("running_lmbda must be a tensor", "list"),
    ),
    (
        lambda: F.instance_normal_norm(X, ONES, [1.0] * 3, ONES, num_batches_tracked=0),
        ("running_var must be a tensor", "list"),
    ),
    (
        lambda: batch(mean=ONES, var=ONES, lmbda=ONES, num_batches_tracked=0),
        ("num_batches_tracked must be a tensor", "int"),
    ),
    (
        lambda: batch(mean=ONES, var=ONES, lmbda=ONES, momentum="a"),
        ("momentum must be a number", "'a'"),
    ),
    (lambda: F.group_normal_norm(X, 1.0), ("num_groups must be an int", "1.0", "float")),
    *(
        (lambda wrong=wrong: layer_function(activation=wrong), ("activation must be", f"{wrong}"))
        for wrong in (False, 0, ["relu"])
    ),
    *seeds_of(batch),
    *seeds_of(layer_function),
    *seeds_of(group_function),
    *seeds_of(instance_function),
]


@pytest.mark.parametrize(
    ("call", "words"), FUNCTION_MISTAKES, ids=[str(i) for i in range(len(FUNCTION_MISTAKES))]
)
def test_function_refuses_with_a_sentence(call, words, backend):
    assert_refused(call, *words)


def test_function_that_refuses_leaves_given_statistics_alone(backend):
    statistics = [torch.zeros(3), torch.ones(3), torch.ones(3)]
    counter = torch.tensor(4)
    bad = [
        {"input": X[:1, :, :1]},
        {"input": X.long()},
        {"noise_train": -1.0},
        {"eps": -1.0},
        {"weight": torch.ones(5)},
        {"seed": torch.zeros(1)},
        {"momentum": math.nan},
    ]
    for keywords in bad:
        arguments = {"input": X, **keywords}
        with Unchanged([*statistics, counter]):
            assert_refused(
                lambda arguments=arguments: batch(
                    arguments.pop("input"), *statistics, num_batches_tracked=counter, **arguments
                )
            )


# Raw ops


def forward_arguments(row, dtype=torch.float32):
    return {
        "input": row.input(dtype),
        "running_mean": None, "running_var": None, "running_lmbda": None,
        "weight": torch.ones(row.parameter_shape), "bias": torch.ones(row.parameter_shape),
        "residual": None, "seed": torch.tensor([3]), "noise_scale": None,
        "prenorm": False, "keep_stats": True,
        **configuration(row),
    }  # fmt: skip


def configuration(row):
    kind, num_groups, normalized_ndim = row.geometry
    return {
        "kind": kind, "num_groups": num_groups, "normalized_ndim": normalized_ndim, "eps": 1e-5,
        "noise_train": 0.5, "alpha": 1.0, "order": 2, "transform_eps": 0.0, "stream": 0,
        "channels_last": False, "activation": "", "backend": "auto",
    }  # fmt: skip


def backward_arguments(row, dtype=torch.float32):
    forward = forward_arguments(row, dtype)
    stats = torch.ops.normnorm.normal_norm_forward(**forward)[1]
    return {
        "grad_output": torch.ones(row.shape), "input": forward["input"], "stats": stats,
        "weight": forward["weight"], "bias": forward["bias"], "output": None,
        "seed": forward["seed"], "grad_sum": torch.ones(row.shape), "needs_input": True,
        "needs_weight": True, "needs_bias": True,
        "frozen": False, **configuration(row),
    }  # fmt: skip


def fold_arguments(row, dtype=torch.float32):
    return {
        "stats": torch.ones(8, 4), "running_mean": torch.zeros(4), "running_var": torch.ones(4),
        "running_lmbda": torch.ones(4), "num_batches_tracked": torch.tensor(2), "momentum": 0.1,
        "count": 8, "eps": 1e-5, "backend": "auto",
    }  # fmt: skip


VALID = {
    "normal_norm_forward": forward_arguments,
    "normal_norm_backward": backward_arguments,
    "fold_running_": fold_arguments,
}


def torch_arguments(op):
    """(name, type) of an op's arguments."""
    schema = getattr(torch.ops.normnorm, op).default._schema
    return [(argument.name, str(argument.type)) for argument in schema.arguments]


FORWARD, BACKWARD, FOLD = (("normal_norm_forward",), ("normal_norm_backward",), ("fold_running_",))
NORMS = FORWARD + BACKWARD


def like(name, function):
    """Replaces an argument by a function of it."""
    return lambda arguments: {name: function(arguments[name])}


def fixed(**values):
    return lambda arguments: values


# (ops, change of valid arguments, words of the error, kinds)
OP_MISTAKES = [
    (NORMS, like("input", lambda x: x.long()), ("input must be", "int64"), None),
    (NORMS, like("input", lambda x: x.to(torch.complex64)), ("input must be", "complex64"), None),
    (NORMS, like("input", lambda x: x.bool()), ("input must be", "bool"), None),
    (NORMS, like("input", lambda x: x.reshape(-1)), ("input", "shape"), None),
    (NORMS, like("input", lambda x: x.sum()), ("()",), None),
    (NORMS, like("input", lambda x: x.to("meta")), ("device", "meta", "cpu"), None),
    (NORMS, fixed(kind="batchnorm"), ("kind must be one of", "batchnorm"), None),
    (NORMS, fixed(kind=""), ("kind must be one of",), None),
    (NORMS, fixed(eps=0.0), ("eps must be positive", "0"), None),
    (NORMS, fixed(eps=-1.0), ("eps must be positive", "-1"), None),
    (NORMS, fixed(eps=math.nan), ("eps", "nan"), None),
    (NORMS, fixed(alpha=math.nan), ("alpha", "finite", "nan"), None),
    (NORMS, fixed(alpha=math.inf), ("alpha", "finite", "inf"), None),
    (NORMS, fixed(order=0), ("order must be 1 or 2", "0"), None),
    (NORMS, fixed(order=-(2**40)), ("order must be 1 or 2", str(-(2**40))), None),
    (NORMS, fixed(transform_eps=-0.5), ("transform_eps", "-0.5"), None),
    (NORMS, fixed(transform_eps=math.inf), ("transform_eps", "inf"), None),
    (NORMS, fixed(activation="gelu"), ("activation must be 'relu'", "gelu"), None),
    (FORWARD, lambda a: {"residual": a["input"][:1]}, ("residual", "input's shape"), None),
    (FORWARD, lambda a: {"residual": a["input"].double()}, ("residual", "dtype", "float64"), None),
    (FORWARD, lambda a: {"residual": a["input"].to("meta")}, ("residual", "device", "meta"), None),
    (BACKWARD, fixed(activation="relu"), ("activation 'relu'", "output", "None"), None),
    (BACKWARD, lambda a: {"output": a["grad_output"]}, ("output belongs to an activation",), None),
    (
        BACKWARD,
        lambda a: {"activation": "relu", "output": a["grad_output"].double()},
        ("output", "dtype", "float64"), None,
    ),
    (BACKWARD, lambda a: {"grad_sum": a["input"][:1]}, ("grad_sum", "input's shape"), None),
    (BACKWARD, lambda a: {"grad_sum": a["input"].double()}, ("grad_sum", "dtype"), None),
    (FORWARD, fixed(prenorm=True), ("prenorm needs a residual",), None),
    (
        FORWARD,
        lambda a: {
            "prenorm": True, "residual": a["input"], "running_mean": ONES, "running_var": ONES,
            "running_lmbda": ONES,
        },
        ("prenorm takes no running statistics",), ("batch",),
    ),
    (NORMS, fixed(backend="fastest"), ("backend", "fastest", "reference"), None),
    (NORMS, fixed(backend=""), ("backend", "reference"), None),
    (NORMS, like("weight", lambda w: torch.ones(w.numel() + 1)), ("weight", "shape"), None),
    (NORMS, like("weight", lambda w: w[None]), ("weight", "shape", "(1, "), None),
    (NORMS, like("weight", lambda w: torch.ones(())), ("weight", "shape", "()"), None),
    (NORMS, like("weight", lambda w: w.double()), ("weight", "float32", "float64"), None),
    (NORMS, like("weight", lambda w: w.long()), ("weight", "float32", "int64"), None),
    (NORMS, like("weight", lambda w: w.to("meta")), ("weight", "device", "meta"), None),
    (NORMS, like("bias", lambda b: torch.ones(b.numel() + 1)), ("bias", "shape"), None),
    (NORMS, like("bias", lambda b: b.bfloat16()), ("bias", "float32", "bfloat16"), None),
    (NORMS, like("bias", lambda b: b.to("meta")), ("bias", "device", "meta"), None),
    (
        NORMS, lambda a: {"input": a["input"].half(), "bias": a["bias"].half()} | (
            {"grad_output": a["grad_output"].half(), "grad_sum": None} if "grad_sum" in a else {}),
        ("weight and bias", "float32", "float16"), None,
    ),
    (NORMS, fixed(num_groups=7), ("num_groups", "7"), None),
    (NORMS, fixed(num_groups=-1), ("num_groups", "-1"), None),
    (NORMS, fixed(num_groups=3), ("divisible", "(4)", "(3)"), ("group",)),
    (NORMS, fixed(num_groups=0), ("num_groups", "positive", "0"), ("group",)),
    (NORMS, fixed(normalized_ndim=9), ("normalized_ndim", "9"), None),
    (NORMS, fixed(normalized_ndim=-1), ("normalized_ndim", "-1"), None),
    (NORMS, fixed(normalized_ndim=0), ("normalized_ndim", "0"), ("layer",)),
    (
        FORWARD,
        lambda a: {"input": a["input"][:1, :, :1].flatten(2)[..., :1]},
        ("more than 1 value per channel", "got input size"), ("batch",),
    ),
    (
        FORWARD,
        lambda a: {"input": a["input"].flatten(2)[..., :1]},
        ("more than 1 spatial element", "got input size"), ("instance",),
    ),
    # Running statistics.
    (FORWARD, fixed(running_mean=ONES), ("together", "1"), ("batch",)),
    (FORWARD, fixed(running_mean=ONES, running_lmbda=ONES), ("together", "2"), ("batch",)),
    (
        FORWARD, fixed(running_mean=ONES, running_var=ONES, running_lmbda=ONES),
        ("running statistics", "batch"), ("layer", "group", "instance"),
    ),
    *(
        (FORWARD, fixed(**{n: ONES for n in names if n != name}, **{name: bad}), (name, word),
         ("batch",))
        for names in [("running_mean", "running_var", "running_lmbda")]
        for name in names
        for bad, word in (
            (torch.ones(4), "(4,)"), (torch.ones(3, 1), "(3, 1)"), (torch.ones(()), "()"),
            (torch.ones(3, dtype=torch.int64), "int64"),
            (torch.ones(3, dtype=torch.complex64), "complex64"),
            (torch.ones(3, device="meta"), "device"),
        )
    ),
    # Noise.
    (NORMS, fixed(noise_train=-0.5), ("noise_train", "at least 0", "-0.5"), None),
    (NORMS, fixed(noise_train=math.nan), ("noise_train", "finite", "nan"), None),
    (NORMS, fixed(noise_train=math.inf), ("noise_train", "finite", "inf"), None),
    (NORMS, fixed(seed=None), ("seed", "noise_train", "None"), None),
    (NORMS, fixed(seed=torch.tensor(1)), ("seed", "shape (1,)", "()"), None),
    (NORMS, fixed(seed=torch.tensor([[1]])), ("seed", "(1,)", "(1, 1)"), None),
    (NORMS, fixed(seed=torch.tensor([], dtype=torch.int64)), ("seed", "(1,)", "(0,)"), None),
    (NORMS, fixed(seed=torch.tensor([1], dtype=torch.int32)), ("seed", "int64", "int32"), None),
    (NORMS, fixed(seed=torch.tensor([1.0])), ("seed", "int64", "float32"), None),
    (NORMS, fixed(seed=torch.tensor([1], device="meta")), ("seed", "device", "meta"), None),
    (FORWARD, fixed(noise_scale=torch.ones(77)), ("noise_scale", "shape", "(77,)"), None),
    (FORWARD, fixed(noise_scale=torch.ones(())), ("noise_scale", "shape", "()"), None),
    # The backward op alone.
    *(
        (BACKWARD, change, words, None)
        for change, words in (
            (like("stats", lambda s: s[:7]), ("stats", "(8, ", "(7, ")),
            (like("stats", lambda s: s[:, 1:]), ("stats", "(8, ")),
            (like("stats", lambda s: s.flatten()), ("stats", "(8, ")),
            (like("stats", lambda s: s.t()), ("stats", "(8, ")),
            (like("stats", lambda s: s[0, 0]), ("stats", "(8, ", "()")),
            (like("stats", lambda s: s.double()), ("stats", "float32", "float64")),
            (like("stats", lambda s: s.half()), ("stats", "float32", "float16")),
            (like("stats", lambda s: s.to("meta")), ("stats", "device", "meta")),
            (like("grad_output", lambda g: g[1:]), ("grad_output", "shape")),
            (like("grad_output", lambda g: g.sum()), ("grad_output", "shape", "()")),
            (like("grad_output", lambda g: g[None]), ("grad_output", "shape", "(1, ")),
            (like("grad_output", lambda g: g.double()), ("grad_output", "float32", "float64")),
            (like("grad_output", lambda g: g.long()), ("grad_output", "float32", "int64")),
            (like("grad_output", lambda g: g.to("meta")), ("grad_output", "device", "meta")),
            (like("input", lambda x: x[1:]), ("shape",)),
            (like("input", lambda x: x.double()), ("float64", "float32")),
            (fixed(weight=None), ("needs_weight", "None")),
            (fixed(bias=None), ("needs_bias", "None")),
        )
    ),
    # The fold alone.
    *(
        (FOLD, change, words, ("batch",))
        for change, words in (
            (like("stats", lambda s: s[:7]), ("stats", "(8, ", "(7, ")),
            (like("stats", lambda s: s[:, :0]), ("stats", "multiple", "0")),
            (like("stats", lambda s: torch.ones(8, 6)), ("stats", "multiple", "6")),
            (like("stats", lambda s: s.flatten()), ("stats", "(8, ", "(32,)")),
            (like("stats", lambda s: s.half()), ("stats", "float32", "float16")),
            (like("stats", lambda s: s.to("meta")), ("device", "meta")),
            *(
                (like(name, function), (name, *words))
                for name in ("running_mean", "running_var", "running_lmbda")
                for function, words in (
                    (lambda b: b[None], ("(1, 4)",)),
                    (lambda b: b.sum(), ("()",)),
                    (lambda b: b.long(), ("float", "int64")),
                    (lambda b: b.to("meta"), ("device", "meta")),
                )
            ),
            (fixed(running_var=torch.ones(3)), ("running_var", "(4,)", "(3,)")),
            (fixed(running_lmbda=torch.ones(8)), ("running_lmbda", "(4,)", "(8,)")),
            (
                fixed(running_mean=torch.zeros(0), running_var=torch.zeros(0),
                      running_lmbda=torch.zeros(0)),
                ("channels", "0"),
            ),
            (fixed(num_batches_tracked=torch.tensor(1.0)), ("num_batches_tracked", "float32")),
            (fixed(num_batches_tracked=torch.tensor([1, 2])), ("num_batches_tracked", "(2,)")),
            (
                fixed(num_batches_tracked=torch.tensor(1, device="meta")),
                ("num_batches_tracked", "device", "meta"),
            ),
            (fixed(momentum=None, num_batches_tracked=None), ("momentum", "num_batches_tracked")),
            (fixed(momentum=math.nan), ("momentum", "finite", "nan")),
            (fixed(momentum=math.inf), ("momentum", "finite", "inf")),
            (fixed(count=1), ("2 elements", "1")),
            (fixed(count=0), ("2 elements", "0")),
            (fixed(count=-5), ("2 elements", "-5")),
            (fixed(eps=0.0), ("eps must be positive", "0")),
            (fixed(eps=math.nan), ("eps", "nan")),
            (fixed(backend="fastest"), ("backend", "fastest", "reference")),
        )
    ),
]  # fmt: skip


def op_rows():
    rows = []
    for number, (ops, change, words, kinds) in enumerate(OP_MISTAKES):
        for op in ops:
            for row in KINDS:
                if kinds is None or row.kind in kinds:
                    # Checks common to all kinds run with two of them.
                    slow = kinds is None and row not in KINDS[:2]
                    rows.append(
                        pytest.param(
                            op,
                            row,
                            change,
                            words,
                            id=f"{op}-{row.kind}-{number}",
                            marks=pytest.mark.slow if slow else (),
                        )
                    )
    return rows


@pytest.mark.parametrize(("op", "row", "change", "words"), op_rows())
def test_op_refuses_with_a_sentence_and_changes_no_tensor(op, row, change, words, backend):
    arguments = {**VALID[op](row), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    call(**{**arguments, **clones(arguments)})  # valid unchanged
    arguments = {**arguments, **change(arguments)}
    tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    with Unchanged(tensors):
        assert_refused(lambda: call(**arguments), *words)


def clones(arguments):
    return {
        name: value.clone() for name, value in arguments.items() if isinstance(value, torch.Tensor)
    }


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
def test_op_refuses_the_same_while_shapes_are_inferred(op, row, backend):
    """Fake tensors and a compiler raise the same errors."""
    arguments = {**VALID[op](row), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    meta = {
        name: value.to("meta") if isinstance(value, torch.Tensor) else value
        for name, value in arguments.items()
    }
    call(**meta)
    for change, words in (
        ({"eps": 0.0}, ("eps must be positive",)),
        ({"order": 7}, ("order must be 1 or 2", "7")),
        ({"weight": torch.ones(77, device="meta")}, ("weight", "shape", "(77,)")),
        ({"input": meta["input"].long()}, ("input must be", "int64")),
        ({"weight": arguments["weight"]}, ("weight", "device", "meta", "cpu")),
    ):
        assert_refused(lambda change=change: call(**{**meta, **change}), *words)


TENSORS = [
    (op, name) for op in VALID for name, argument in torch_arguments(op) if argument == "Tensor"
]


@pytest.mark.parametrize(("op", "name"), TENSORS)
def test_op_refuses_none_for_a_tensor(op, name, backend):
    """The dispatcher accepts None for a required tensor: the op must check."""
    arguments = {**VALID[op](KINDS[0]), "backend": backend, name: None}
    call = getattr(torch.ops.normnorm, op)
    with Unchanged([value for value in arguments.values() if isinstance(value, torch.Tensor)]):
        assert_refused(lambda: call(**arguments), name)


@pytest.mark.parametrize("op", VALID)
def test_op_refuses_mistyped_and_missing_arguments(op, backend):
    arguments = {**VALID[op](KINDS[0]), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    first = next(iter(arguments))
    for change in ({first: 1.0}, {first: "x"}, {"eps": None}, {"eps": "x"}, {"backend": 3}):
        assert_refused(lambda change=change: call(**{**arguments, **change}), op)
    del arguments["eps"]
    assert_refused(lambda: call(**arguments), "eps")


# Backends


@pytest.mark.parametrize("name", [n for n in backends.NAMES if n not in backends._backends])
def test_unavailable_backend_is_refused_with_its_reason(name):
    row = KINDS[0]
    reason = normnorm.available_backends()[name]
    selected = backends._selected
    assert_refused(lambda: normnorm.use_backend(name), name, "unavailable", reason)
    assert backends._selected == selected
    for op, valid in VALID.items():
        arguments = {**valid(row), "backend": name}
        call = getattr(torch.ops.normnorm, op)
        tensors = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
        with Unchanged(tensors):
            assert_refused(lambda call=call, a=arguments: call(**a), name, "unavailable", reason)


@pytest.mark.parametrize("name", ["Reference", "", "gpu", "auto "])
def test_unknown_backend_is_refused_and_the_choice_kept(name):
    selected = backends._selected
    with pytest.raises(ValueError, match="backend must be 'auto' or one of reference"):
        normnorm.use_backend(name)
    assert backends._selected == selected


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_an_unknown_backend_in_the_environment_raises_at_the_forward_pass(row, monkeypatch):
    monkeypatch.setattr(backends, "_selected", "quick")
    layer = row.make()
    with Unchanged(layer.buffers()):
        assert_refused(lambda: layer(row.input(torch.float32)), "backend", "quick", "reference")


def test_failing_block_restores_the_backend():
    selected = backends._selected
    with pytest.raises(KeyError), normnorm.use_backend("reference"):
        raise KeyError
    assert backends._selected == selected


# Values: no errors of shape or type


@pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_a_nonfinite_value_affects_only_its_group(row, value, noise, backend):
    layer = row.make(noise_train=noise, dtype=torch.float64)
    input = row.input()
    spoiled = input.clone()
    spoiled[0, 0].flatten()[0] = value
    if spoiled[0, 0].dim() == 0:
        spoiled[0, 0] = value
    outputs, gradients = [], []
    for x in (input, spoiled):
        torch.manual_seed(1)
        x = x.clone().requires_grad_()
        outputs.append(layer(x))
        gradients.append(torch.autograd.grad(outputs[-1].sin().sum(), x)[0])
    member = torch.zeros(row.shape, dtype=torch.bool)
    if row.kind == "batch":
        member[:, 0] = True
    elif row.kind == "layer":
        member[0] = True
    elif row.kind == "group":
        member[0, : row.shape[1] // row.num_groups] = True
    else:
        member[0, 0] = True
    assert outputs[1][member].isnan().all()
    assert gradients[1][member].isnan().all()
    assert torch.equal(outputs[1][~member], outputs[0][~member])
    assert torch.equal(gradients[1][~member], gradients[0][~member])


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: normnorm.per_loss([1.0]), "activations must be a tensor; got list"),
        (lambda: normnorm.per_loss(X, "2"), "num_slices must be a number; got '2'"),
        (lambda: normnorm.per_loss(X, 2.0), "num_slices must be an int; got 2.0"),
        (lambda: normnorm.per_loss(X, True), "num_slices must be an int; got True"),
        (lambda: normnorm.per_loss(X, 2, 7), r"generator must be a torch\.Generator or None"),
        (lambda: normnorm.PER(nn.Linear(2, 2), "", "1"), "weight must be a number; got '1'"),
        (lambda: normnorm.PER(nn.Linear(2, 2), "", 1.0, 2.5), "num_slices must be an int; got 2.5"),
        (
            lambda: normnorm.monitor(normnorm.BatchNormalNorm1d(3), groups="8"),
            "groups must be a number; got '8'",
        ),
        (
            lambda: normnorm.monitor(normnorm.BatchNormalNorm1d(3), elements=8.5),
            "elements must be an int; got 8.5",
        ),
        (lambda: F.yeo_johnson(X, "1"), "lmbda must be a number; got '1'"),
        (lambda: F.yeo_johnson(X, torch.tensor(1j)), "lmbda must be real; got"),
        (lambda: batch(eps=1e-60), "eps must lie between 1"),
        (lambda: F.layer_normal_norm(X, X.shape[-1:], eps=1e39), "eps must lie between"),
    ],
)
def test_arguments_beside_the_tensors_are_refused_in_sentences(call, sentence):
    with pytest.raises((TypeError, ValueError), match=sentence), call():
        pass
