"""Bad input raises an error that states the expected and the actual value, and changes nothing.

Three tables: layers, functions, raw ops. Each row is a mistake and the words that its error must
contain. Errors are ValueError, TypeError or RuntimeError; buffers (the batch counter included) keep
their values and their memory. Errors of the backends' selection are in ``test_backends.py``.
"""

import math

import pytest
import torch
from layer_table import KINDS, LAYERS, RUNNING
from torch import Tensor, nn

import normnorm
import normnorm.functional as F

REFUSALS = (ValueError, TypeError, RuntimeError)
X = torch.linspace(-2.0, 3.0, 24).reshape(2, 3, 4).square()
ONES = torch.ones(3)
each_kind = pytest.mark.parametrize("row", KINDS, ids=lambda row: row.kind)


def meta(tensor):
    return tensor.to("meta")


def complex64(tensor):
    return tensor.to(torch.complex64)


def twice(tensor):
    return tensor.repeat(2)


def scalar(tensor):
    return tensor.flatten()[0]


def changed(value, change):
    """What a table's entry makes of a value: a function of it, or another one."""
    return change(value) if callable(change) else change


def assert_refused(call, *words):
    """``call`` raises one of the documented errors, whose text contains every word; of the first
    word's type if that is one."""
    kinds, words = (words[:1], words[1:]) if isinstance(words[0], type) else (REFUSALS, words)
    with pytest.raises(kinds) as caught:
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
        self.tensors = [tensor for tensor in tensors if isinstance(tensor, Tensor)]

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

ALL = ("batch", "layer", "group", "instance")
TRACKED = ("batch", "instance")
TRAINING, BOTH = (True,), (True, False)

# (kinds, modes, the attribute or the input that is changed, its change, words of the error)
LAYER_MISTAKES = [
    (ALL, BOTH, "eps", 0.0, ("eps must be positive", "0.0")),
    (ALL, BOTH, "noise_train", -0.1, ("noise_train", "at least 0", "-0.1")),
    (ALL, BOTH, "order", 3, ("order must be 1 or 2", "3")),
    (ALL, BOTH, "alpha", -math.inf, ("alpha", "finite", "-inf")),
    (ALL, BOTH, "transform_eps", math.nan, ("transform_eps", "nan")),
    (ALL, BOTH, "input", Tensor.long, ("input must be", "float", "int64")),
    (ALL, BOTH, "input", lambda x: x.to(torch.float8_e4m3fn), ("input must be", "float8")),
    (ALL, BOTH, "input", meta, ("device", "meta", "cpu")),
    (ALL, BOTH, "input", torch.sum, ("input",)),
    (ALL, BOTH, "input", torch.flatten, ("input", "got")),
    (ALL, BOTH, "weight", lambda w: torch.ones(w.numel() + 1), ("weight must have shape",)),
    (ALL, BOTH, "weight", Tensor.double, ("weight", "float32", "float64")),
    (ALL, BOTH, "bias", lambda b: b[None], ("bias must have shape", "(1, ")),
    (ALL, BOTH, "bias", meta, ("bias", "meta", "cpu")),
    (TRACKED, BOTH, "input", lambda x: x[None, None], ("input",)),
    (("batch", "group"), BOTH, "input", lambda x: x[:, 1:], ("channels", "got")),
    (("instance",), BOTH, "input", lambda x: x[:, 1:], ("num_features", "got")),
    (("layer",), BOTH, "input", lambda x: x[..., 1:], ("normalized_shape", "got input of size")),
    (("group",), BOTH, "num_groups", 3, ("divisible", "3")),
    (("group",), BOTH, "num_groups", -2, ("num_groups", "-2")),
    (
        ("batch",), TRAINING, "input", lambda x: x[:1, :, :1, :1],
        ("Expected more than 1 value per channel when training", "got input size"),
    ),
    (
        ("instance",), TRAINING, "input", lambda x: x[..., :1],
        ("Expected more than 1 spatial element", "got input size"),
    ),
    (TRACKED, TRAINING, "momentum", math.nan, ("momentum", "finite", "nan")),
    (TRACKED, TRAINING, "num_batches_tracked", Tensor.float, ("int64", "float32")),
    (TRACKED, TRAINING, "num_batches_tracked", twice, ("one int64", "(2,)")),
    (TRACKED, TRAINING, "num_batches_tracked", meta, ("device", "meta")),
    *(
        (TRACKED, BOTH, name, change, (name, *words))
        for name in ("running_mean", "running_var", "running_lmbda")
        for change, words in (
            (twice, ("must have shape",)),
            (Tensor.long, ("float", "int64")),
            (meta, ("device", "meta")),
            (None, ("given together",)),
        )
        # Loaders of BatchNorm checkpoints leave lambda on meta; it becomes 1.
        if (name, change) != ("running_lmbda", meta)
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "modes", "name", "change", "words"),
    [
        pytest.param(row, modes, name, change, words, id=f"{row.kind}-{name}-{number}")
        for number, (kinds, modes, name, change, words) in enumerate(LAYER_MISTAKES)
        for row in KINDS
        if row.kind in kinds
    ],
)
def test_layer_refuses_with_a_sentence_and_changes_no_buffer(
    row, modes, name, change, words, backend
):
    layer = row.make(**({"track_running_stats": True} if row in RUNNING else {}))
    layer(row.input(torch.float32))  # a valid step, so that the buffers are not initial
    input = row.input(torch.float32, 1)
    if name == "input":
        input = changed(input, change)
    elif name in ("weight", "bias"):
        tensor = changed(getattr(layer, name).detach(), change)
        setattr(layer, name, nn.Parameter(tensor, tensor.is_floating_point()))
    else:
        setattr(layer, name, changed(getattr(layer, name), change))
    for training in modes:
        layer.train(training)
        with Unchanged(layer.buffers()):
            assert_refused(lambda: layer(input), *words)


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_each_layer_class_refuses_other_ranks(row):
    for input in (torch.ones(2), torch.ones(2, *row.shape, 1, 1)):
        assert_refused(lambda input=input: row.make()(input), "input")


# Values that are not numbers. An op would read the tensors as numbers and drop their gradients.
WRONG_NUMBERS = (
    (None, ("None",)),
    ("1e-5", ("1e-5", "str")),
    ([1.0], ("list",)),
    (1 + 0j, ("complex",)),
    (torch.tensor(1.0), ("gradient is not computed", "tensor")),
    (nn.Parameter(torch.tensor(1.0)), ("gradient is not computed",)),
)


@pytest.mark.parametrize("name", ["noise_train", "alpha", "order", "transform_eps", "eps"])
@each_kind
def test_a_setting_that_is_no_number_is_refused(row, name, backend):
    for wrong, words in WRONG_NUMBERS:
        with pytest.raises(TypeError, match=f"{name} must be"):
            row.make(**{name: wrong})
        layer = row.make()
        setattr(layer, name, wrong)
        state = torch.random.get_rng_state()
        for training in (True, False):
            layer.train(training)
            with Unchanged([state, *layer.buffers()]):
                assert_refused(lambda: layer(row.input(torch.float32)), f"{name} must be", *words)  # noqa: B023
            assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
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


def test_wrong_arguments_of_a_layers_own_are_refused_where_it_is_made():
    assert_refused(lambda: normnorm.BatchNormalNorm1d(3, momentum="a"), "momentum must be", "'a'")
    assert_refused(lambda: normnorm.GroupNormalNorm(2.0, 4), "num_groups must be an int", "2.0")
    for groups in (0, 3, 8):
        assert_refused(lambda groups=groups: normnorm.GroupNormalNorm(groups, 4), "num_groups")


def test_numbers_of_numpy_are_numbers():
    numpy = pytest.importorskip("numpy")
    layer = normnorm.LayerNormalNorm(
        4, eps=numpy.float32(1e-5), noise_train=numpy.float64(0.5), order=numpy.int64(2)
    )
    assert layer(X).shape == X.shape


@each_kind
def test_sparse_and_jagged_input_is_refused(row, backend):
    layer, input = row.make(), row.input(torch.float32)
    ragged = torch.nested.nested_tensor(list(input), layout=torch.jagged)
    for wrong in (input.to_sparse(), ragged):
        with pytest.raises(TypeError, match="input must be a dense tensor"):
            layer(wrong)


# Functions


def batch(input=X, mean=None, var=None, lmbda=None, training=True, **keywords):
    return F.batch_normal_norm(input, mean, var, lmbda, training=training, **keywords)


def tracked(mean=ONES, var=ONES, lmbda=ONES, **keywords):
    return batch(mean=mean, var=var, lmbda=lmbda, **keywords)


def layer(input=X, shape=(4,), **keywords):
    return F.layer_normal_norm(input, shape, training=True, **keywords)


def watch(model=None, **keywords):
    normnorm.monitor(LAYERS[0].make() if model is None else model, **keywords).__enter__()


def estimate(dim=None, **keywords):
    return normnorm.estimate_lmbda(X, dim, **keywords)


FUNCTION_MISTAKES = [
    (lambda: batch(training=False), ("running_mean", "training=False")),
    (lambda: batch(mean=ONES, var=ONES), ("together", "2")),
    (lambda: batch(lmbda=ONES), ("together", "1")),
    (lambda: tracked(momentum=None), ("num_batches_tracked",)),
    (lambda: tracked(momentum="a"), ("momentum must be a number", "'a'")),
    (lambda: tracked(num_batches_tracked=0), ("num_batches_tracked must be a tensor", "int")),
    (lambda: tracked([0.0] * 3), ("running_mean must be a tensor", "list")),
    (lambda: tracked(lmbda=[1.0], training=False), ("running_lmbda must be a tensor", "list")),
    (lambda: tracked(lmbda=torch.ones(2)), ("running_lmbda", "(3,)", "(2,)")),
    (lambda: batch(torch.ones(3)), ("(N, C, ...)", "(3,)")),
    (lambda: batch([[1.0, 2.0]]), ("input must be a tensor", "list")),
    (lambda: batch(weight=[1.0] * 3), ("weight must be a tensor or None", "list")),
    (lambda: batch(bias=1.0), ("bias must be a tensor or None", "float")),
    (
        lambda: batch(X.half(), weight=ONES, bias=ONES.half()),
        ("weight and bias", "float32", "float16"),
    ),
    (lambda: batch(eps=1e-60), ("eps must lie between 1", "1e-60")),
    (lambda: batch(eps=1e39), ("eps must lie between 1", "1e+39")),
    (lambda: layer(shape=()), ("normalized_shape",)),
    (lambda: layer(shape=(3,)), ("normalized_shape", "[3]", "[2, 3, 4]")),
    (lambda: layer(shape=(1, 2, 3, 4)), ("normalized_shape", "[2, 3, 4]")),
    (lambda: layer(shape=4), ("normalized_shape", "sequence", "4")),
    *(
        (lambda wrong=wrong: layer(activation=wrong), ("activation must be", f"{wrong}"))
        for wrong in (False, ["relu"])
    ),
    *(
        (lambda wrong=wrong: F.add_layer_normal_norm(X, wrong, (4,)), words)
        for wrong, words in (
            (X.to_sparse(), ("residual must be a dense tensor", "sparse")),
            (1.0, ("residual must be a tensor; got float",)),
            (X.long(), ("residual must be float64", "int64")),
            (complex64(X), ("residual must be float64", "complex64")),
            (X[:1], ("residual must have the input's shape",)),
            (meta(X), ("residual must be on the input's device",)),
        )
    ),
    (lambda: F.add_layer_normal_norm(X, X, (4,), [1.0] * 4), ("weight must be a tensor", "list")),
    (lambda: F.group_normal_norm(X, 2), ("divisible", "(3)", "(2)")),
    (lambda: F.group_normal_norm(X, 1.0), ("num_groups must be an int", "1.0", "float")),
    (lambda: F.group_normal_norm(torch.ones(4), 1), ("2 dimensions", "1")),
    (lambda: F.group_normal_norm(torch.ones(1, 3), 3), ("more than 1 value", "[1, 3]")),
    (lambda: F.instance_normal_norm(X, use_input_stats=False), ("use_input_stats=False",)),
    (lambda: F.instance_normal_norm(torch.ones(2, 3, 1)), ("more than 1 spatial", "[2, 3, 1]")),
    (lambda: layer(seed=torch.tensor(3)), ("seed", "shape (1,)", "()")),
    (lambda: layer(seed=torch.zeros(1, dtype=torch.int32)), ("seed", "int64", "int32")),
    (lambda: layer(seed=meta(torch.tensor([1]))), ("seed", "device", "meta")),
    (lambda: layer(seed=0.5), ("seed", "int", "float")),
    (lambda: layer(seed=True), ("seed", "int", "bool")),
    (lambda: layer(seed=2**63), ("seed", "64 bits", str(2**63))),
    (lambda: layer(seed=-(2**63) - 1), ("seed", "64 bits")),
    (lambda: normnorm.yeo_johnson(torch.arange(3), 0.5), ("h must be", "int64")),
    (lambda: normnorm.yeo_johnson(0.5, 0.5), ("h must be", "float")),
    (lambda: normnorm.yeo_johnson(X, 0.5, -1.0), ("transform_eps", "-1.0")),
    (lambda: normnorm.yeo_johnson(X, "1"), ("lmbda must be a number; got '1'",)),
    (lambda: normnorm.yeo_johnson(X, torch.tensor(1j)), ("lmbda must be real; got",)),
    (lambda: normnorm.estimate_lmbda(torch.arange(3)), ("h must be", "int64")),
    (lambda: normnorm.estimate_lmbda(X, 0, order=0), ("order", "0")),
    (lambda: normnorm.per_loss([1.0]), ("activations must be a tensor; got list",)),
    (lambda: normnorm.per_loss(X.long()), (TypeError, "must be floating point; got torch.int64")),
    (lambda: normnorm.per_loss(X[:0]), (ValueError, "not empty; got (0, 3, 4)")),
    (lambda: normnorm.per_loss(X.sum()), (ValueError, "(..., features)", "()")),
    (lambda: normnorm.per_loss(X, 0), (ValueError, "num_slices must be positive; got 0")),
    (lambda: normnorm.per_loss(X, "2"), ("num_slices must be a number; got '2'",)),
    (lambda: normnorm.per_loss(X, True), ("num_slices must be an int; got True",)),
    (lambda: normnorm.per_loss(X, 2, 7), ("generator must be a torch.Generator or None",)),
    (lambda: normnorm.PER(nn.Linear(2, 2), "", "1"), ("weight must be a number; got '1'",)),
    (lambda: normnorm.PER(nn.Linear(2, 2), "", 1.0, 2.5), ("num_slices must be an int; got 2.5",)),
    (lambda: normnorm.PER(nn.Linear(2, 2), [], 1.0), (ValueError, "no layer was chosen")),
    *(
        (lambda wrong=wrong: normnorm.PER(nn.Linear(2, 2), "", wrong), (ValueError, "finite"))
        for wrong in (-1.0, math.nan, math.inf)
    ),
    (lambda: watch(groups="8"), ("groups must be a number; got '8'",)),
    (lambda: watch(groups=0), (ValueError, "groups must be at least 1")),
    (lambda: watch(elements=8.5), ("elements must be an int; got 8.5",)),
    (lambda: watch(elements=3), (ValueError, "elements at least 8")),
    (lambda: watch(3), (TypeError, "nn.Module; got int")),
    (lambda: watch(nn.Linear(2, 2)), (ValueError, "no normality layer")),
    (lambda: normnorm.LayerNormalNorm2d((3, 4)), (ValueError, "channels alone; got 2 sizes")),
    (lambda: normnorm.LayerNormalNorm2d(3)(X), (ValueError, "expected 4D input")),
    (lambda: normnorm.LayerNormalNorm2d(3)([1.0]), (TypeError, "must be a tensor; got list")),
    (lambda: normnorm.LayerNormalNorm2d(3)(X[None]), (ValueError, "normalized_shape")),
    (lambda: normnorm.register_norm(dict, meta), (TypeError, "cls must be a class")),
    (lambda: normnorm.register_norm(nn.RMSNorm, 1), (TypeError, "convert must be a function")),
    (
        lambda: normnorm.register_norm(nn.RMSNorm, meta, "back"),
        (TypeError, "restore must be a function"),
    ),
    (
        lambda: normnorm.register_norm(normnorm.LayerNormalNorm, meta),
        (ValueError, "is a layer of normnorm"),
    ),
    (lambda: estimate(iterations=0), ("iterations must be positive or None; got 0",)),
    (lambda: estimate(iterations=2, alpha=0.5), ("whole Newton steps",)),
    (lambda: estimate(iterations=None, order=1), ("whole Newton steps",)),
    (lambda: estimate(iterations=2.0), ("iterations must be an int; got 2.0",)),
    (lambda: estimate(keepdim=1), ("keepdim must be True or False; got 1",)),
    (lambda: estimate("0"), ("dim must be an int, a sequence of ints or None; got '0'",)),
    (lambda: estimate((0.0,)), ("dim must be an int, a sequence of ints or None; got (0.0,)",)),
    (lambda: estimate((0, 3)), (IndexError, "name dimensions of a tensor of 3; got (0, 3)")),
    (lambda: estimate((0, -3)), ("dim must name each dimension once; got (0, -3)",)),
]


@pytest.mark.parametrize(("call", "words"), FUNCTION_MISTAKES, ids=range(len(FUNCTION_MISTAKES)))
def test_function_refuses_with_a_sentence(call, words, backend):
    assert_refused(call, *words)


# Raw ops


def configuration(row):
    return row.config("auto", noise_train=0.5)._asdict()


def forward_arguments(row):
    return {
        "input": row.input(torch.float32),
        "running_mean": None, "running_var": None, "running_lmbda": None,
        "weight": torch.ones(row.parameter_shape), "bias": torch.ones(row.parameter_shape),
        "residual": None, "seed": torch.tensor([3]), "noise_scale": None,
        "prenorm": False, "keep_stats": True,
        **configuration(row),
    }  # fmt: skip


def backward_arguments(row):
    forward = forward_arguments(row)
    stats = torch.ops.normnorm.normal_norm_forward(**forward)[1]
    return {
        "grad_output": torch.ones(row.shape), "input": forward["input"], "stats": stats,
        "weight": forward["weight"], "bias": forward["bias"], "output": None,
        "seed": forward["seed"], "grad_sum": torch.ones(row.shape), "needs_input": True,
        "needs_weight": True, "needs_bias": True,
        "frozen": False, **configuration(row),
    }  # fmt: skip


def fold_arguments(row):
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
FORWARD, BACKWARD, FOLD = (("normal_norm_forward",), ("normal_norm_backward",), ("fold_running_",))
NORMS = FORWARD + BACKWARD
BUFFERS = ("running_mean", "running_var", "running_lmbda")
SAME = torch.ones(4)

# (ops, kinds, changes of valid arguments, words of the error)
OP_MISTAKES = [
    (NORMS, "batch", {"input": Tensor.long}, ("input must be", "int64")),
    (NORMS, "batch", {"input": complex64}, ("input must be", "complex64")),
    (NORMS, "batch", {"input": torch.flatten}, ("input", "shape")),
    (NORMS, "batch", {"input": torch.sum}, ("()",)),
    (NORMS, "batch", {"input": meta}, ("device", "meta", "cpu")),
    (NORMS, "batch", {"kind": "batchnorm"}, ("kind must be one of", "batchnorm")),
    (NORMS, "batch", {"num_groups": 7}, ("num_groups", "7")),
    (NORMS, "batch", {"normalized_ndim": 9}, ("normalized_ndim", "9")),
    (NORMS, "group", {"num_groups": 3}, ("divisible", "(4)", "(3)")),
    (NORMS, "group", {"num_groups": 0}, ("num_groups", "positive", "0")),
    (NORMS, "layer", {"normalized_ndim": 9}, ("normalized_ndim", "9")),
    (NORMS, "layer", {"normalized_ndim": 0}, ("normalized_ndim", "0")),
    (NORMS, "batch", {"eps": 0.0}, ("eps must be positive", "0")),
    (NORMS, "batch", {"eps": math.nan}, ("eps", "nan")),
    (NORMS, "batch", {"eps": 1e-60}, ("eps must lie between", "1e-60")),
    (NORMS, "batch", {"alpha": math.nan}, ("alpha", "finite", "nan")),
    (NORMS, "batch", {"order": -(2**40)}, ("order must be 1 or 2", str(-(2**40)))),
    (NORMS, "batch", {"transform_eps": -0.5}, ("transform_eps", "-0.5")),
    (NORMS, "batch", {"transform_eps": math.inf}, ("transform_eps", "inf")),
    (NORMS, "batch", {"activation": "gelu"}, ("activation must be 'relu'", "gelu")),
    (NORMS, "batch", {"backend": "fastest"}, ("backend", "fastest", "reference")),
    (NORMS, "batch", {"noise_train": -0.5}, ("noise_train", "at least 0", "-0.5")),
    (NORMS, "batch", {"noise_train": math.nan}, ("noise_train", "finite", "nan")),
    (NORMS, "batch", {"seed": None}, ("seed", "noise_train", "None")),
    (NORMS, "batch", {"seed": torch.tensor([[1]])}, ("seed", "(1,)", "(1, 1)")),
    (NORMS, "batch", {"seed": torch.tensor([]).long()}, ("seed", "(1,)", "(0,)")),
    (NORMS, "batch", {"seed": torch.tensor([1.0])}, ("seed", "int64", "float32")),
    (NORMS, "batch", {"seed": meta}, ("seed", "device", "meta")),
    (NORMS, "batch", {"weight": twice}, ("weight", "shape")),
    (NORMS, "layer", {"weight": lambda w: w[None]}, ("weight", "shape", "(1, ")),
    (NORMS, "batch", {"weight": Tensor.double}, ("weight", "float32", "float64")),
    (NORMS, "batch", {"weight": meta}, ("weight", "device", "meta")),
    (NORMS, "batch", {"bias": twice}, ("bias", "shape")),
    (NORMS, "batch", {"bias": Tensor.bfloat16}, ("bias", "float32", "bfloat16")),
    (NORMS, "batch", {"bias": meta}, ("bias", "device", "meta")),
    (
        NORMS, "batch", {"input": Tensor.half, "bias": Tensor.half, "grad_output": Tensor.half,
                         "grad_sum": None},
        ("weight and bias", "float32", "float16"),
    ),
    (FORWARD, "batch", {"input": lambda x: x[:1, :, :1, :1]}, ("more than 1 value per channel",)),
    (FORWARD, "instance", {"input": lambda x: x[..., :1]}, ("more than 1 spatial element",)),
    (FORWARD, "batch", {"residual": X[:1]}, ("residual", "input's shape")),
    (FORWARD, "batch", {"input": X, "residual": X.double()}, ("residual", "dtype", "float64")),
    (FORWARD, "batch", {"residual": meta(X)}, ("residual", "device", "meta")),
    (FORWARD, "batch", {"prenorm": True}, ("prenorm needs a residual",)),
    (
        FORWARD, "batch",
        {"prenorm": True, "input": X, "residual": X, **dict.fromkeys(BUFFERS, ONES)},
        ("prenorm takes no running statistics",),
    ),
    (FORWARD, "batch", {"noise_scale": torch.ones(77)}, ("noise_scale", "shape", "(77,)")),
    (FORWARD, "batch", {"noise_scale": torch.ones(3).half()}, ("noise_scale", "float32", "16")),
    (FORWARD, "batch", {"noise_scale": meta(ONES)}, ("noise_scale", "device", "meta")),
    (FORWARD, "batch", {"running_mean": ONES}, ("together", "1")),
    (FORWARD, "batch", {"running_mean": ONES, "running_lmbda": ONES}, ("together", "2")),
    (FORWARD, "layer", dict.fromkeys(BUFFERS, ONES), ("running statistics", "batch")),
    *(
        (FORWARD, "batch", {**dict.fromkeys(BUFFERS, ONES), name: wrong}, (name, word))
        for name in BUFFERS
        for wrong, word in (
            (torch.ones(4), "(4,)"), (torch.ones(3, 1), "(3, 1)"), (torch.ones(()), "()"),
            (ONES.long(), "int64"), (complex64(ONES), "complex64"), (meta(ONES), "device"),
        )
    ),
    *(
        (BACKWARD, "batch", change, words)
        for change, words in (
            ({"activation": "relu"}, ("activation 'relu'", "output", "None")),
            ({"output": X}, ("output belongs to an activation",)),
            (
                {"activation": "relu", "output": torch.ones(2, 3, 4, 3).double()},
                ("output", "dtype", "float64"),
            ),
            ({"grad_sum": lambda g: g[:1]}, ("grad_sum", "input's shape")),
            ({"grad_sum": Tensor.double}, ("grad_sum", "dtype")),
            ({"stats": lambda s: s[:7]}, ("stats", "(8, ", "(7, ")),
            ({"stats": lambda s: s[:, 1:]}, ("stats", "(8, ")),
            ({"stats": scalar}, ("stats", "(8, ", "()")),
            ({"stats": Tensor.double}, ("stats", "float32", "float64")),
            ({"stats": meta}, ("stats", "device", "meta")),
            ({"grad_output": lambda g: g[1:]}, ("grad_output", "shape")),
            ({"grad_output": Tensor.double}, ("grad_output", "float32", "float64")),
            ({"grad_output": meta}, ("grad_output", "device", "meta")),
            ({"weight": None}, ("needs_weight", "None")),
            ({"bias": None}, ("needs_bias", "None")),
        )
    ),
    *(
        (FOLD, "batch", change, words)
        for change, words in (
            ({"stats": lambda s: s[:7]}, ("stats", "(8, ", "(7, ")),
            ({"stats": lambda s: s[:, :0]}, ("stats", "multiple", "0")),
            ({"stats": torch.ones(8, 6)}, ("stats", "multiple", "6")),
            ({"stats": torch.flatten}, ("stats", "(8, ", "(32,)")),
            ({"stats": Tensor.half}, ("stats", "float32", "float16")),
            ({"stats": meta}, ("device", "meta")),
            *(
                ({name: change}, (name, *words))
                for name in BUFFERS
                for change, words in (
                    (lambda b: b[None], ("(1, 4)",)),
                    (scalar, ("()",)),
                    (Tensor.long, ("float", "int64")),
                    (meta, ("device", "meta")),
                    (torch.ones(1).expand(4), ("memory for each channel", "expanded to 4")),
                )
            ),
            ({"running_var": ONES}, ("running_var", "(4,)", "(3,)")),
            ({"running_lmbda": twice}, ("running_lmbda", "(4,)", "(8,)")),
            ({"running_mean": SAME, "running_lmbda": SAME}, ("three buffers", "memory twice")),
            (dict.fromkeys(BUFFERS, lambda b: b[:0]), ("channels", "0")),
            ({"num_batches_tracked": Tensor.float}, ("num_batches_tracked", "float32")),
            ({"num_batches_tracked": twice}, ("num_batches_tracked", "(2,)")),
            ({"num_batches_tracked": meta}, ("num_batches_tracked", "device", "meta")),
            ({"momentum": None, "num_batches_tracked": None}, ("momentum", "num_batches_tracked")),
            ({"momentum": math.nan}, ("momentum", "finite", "nan")),
            ({"count": 1}, ("2 elements", "1")),
            ({"eps": 0.0}, ("eps must be positive", "0")),
            ({"eps": math.nan}, ("eps", "nan")),
            ({"backend": "fastest"}, ("backend", "fastest", "reference")),
        )
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "kind", "change", "words"),
    [
        pytest.param(op, kind, change, words, id=f"{op}-{'-'.join(change)}-{number}")
        for number, (ops, kind, change, words) in enumerate(OP_MISTAKES)
        for op in ops
    ],
)
def test_op_refuses_with_a_sentence_and_changes_no_tensor(op, kind, change, words, backend):
    (row,) = (row for row in KINDS if row.kind == kind)
    arguments = {**VALID[op](row), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    call(**{k: v.clone() if isinstance(v, Tensor) else v for k, v in arguments.items()})  # valid
    for name, value in change.items():
        if name in arguments:
            arguments[name] = changed(arguments[name], value)
    with Unchanged(arguments.values()):
        assert_refused(lambda: call(**arguments), *words)


@pytest.mark.parametrize("op", NORMS)
def test_op_refuses_the_same_while_shapes_are_inferred(op, backend):
    """Fake tensors and a compiler raise the same errors."""
    arguments = {**VALID[op](KINDS[0]), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    inferred = {k: meta(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
    assert all(result.is_meta for result in call(**inferred))
    for change, words in (
        ({"eps": 0.0}, ("eps must be positive",)),
        ({"order": 7}, ("order must be 1 or 2", "7")),
        ({"weight": torch.ones(77, device="meta")}, ("weight", "shape", "(77,)")),
        ({"input": inferred["input"].long()}, ("input must be", "int64")),
        ({"weight": arguments["weight"]}, ("weight", "device", "meta", "cpu")),
    ):
        assert_refused(lambda change=change: call(**{**inferred, **change}), *words)


@pytest.mark.parametrize("op", VALID)
def test_op_refuses_none_for_a_tensor(op, backend):
    """The dispatcher accepts None for a required tensor: the op must check."""
    arguments = {**VALID[op](KINDS[0]), "backend": backend}
    call = getattr(torch.ops.normnorm, op)
    for argument in call.default._schema.arguments:
        if str(argument.type) == "Tensor":
            with Unchanged(arguments.values()):
                given = {**arguments, argument.name: None}
                assert_refused(lambda given=given: call(**given), argument.name)
