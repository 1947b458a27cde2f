"""replace_norms and restore_norms: replaced layers, kept state, and layers left with reasons."""

import copy
import pickle
import types
from collections import Counter
from functools import partial

import pytest
import torch
from layer_table import LAYERS, LAZY_NAMES
from model_zoo import OFF, ours_in
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.utils import parametrize
from torch.testing import assert_close

import normnorm
from normnorm import sync


def model_of_all():
    """One of each of torch's norm layers, in a tree."""
    return nn.ModuleDict(
        {
            "batch": nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(4), nn.BatchNorm3d(5)),
            "instance": nn.Sequential(
                nn.InstanceNorm1d(3), nn.InstanceNorm2d(4, affine=True), nn.InstanceNorm3d(5)
            ),
            "others": nn.Sequential(nn.LayerNorm(6), nn.GroupNorm(2, 4), nn.Linear(2, 2)),
        }
    )


def fingerprint(model):
    """The complete state of a model, which an error must not change."""
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    tensors = [(name, id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()]
    return modules, tensors


# Replaced layers


VARIANTS = {
    "batch": (
        {},
        {"momentum": None},
        {"affine": False, "eps": 1e-3, "momentum": 0.3},
        {"track_running_stats": False},
    ),
    "layer": ({}, {"bias": False, "eps": 1e-3}, {"elementwise_affine": False}),
    "group": ({}, {"affine": False, "eps": 1e-3}),
    "instance": ({"affine": False, "eps": 1e-3}, {"track_running_stats": True, "momentum": 0.3}),
}


@pytest.mark.parametrize(
    ("row", "keywords"),
    [
        pytest.param(row, keywords, id="-".join((row.name, *keywords)))
        for row in LAYERS
        for keywords in VARIANTS[row.kind]
    ],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_layer_becomes_the_constructed_one_on_the_same_tensors_and_comes_back(
    row, keywords, training
):
    theirs = row.make_counterpart(**keywords).double()
    theirs(row.input())  # running statistics that are not the initial ones
    plain = copy.deepcopy(theirs.train(training))
    tensors = theirs.state_dict(keep_vars=True)
    model = nn.Sequential(theirs)
    (swap,) = normnorm.replace_norms(model, **OFF).replaced
    made = row.make(**keywords, **OFF).double().train(training)
    ours = model[0]
    assert swap == ("0", row.counterpart.__name__, row.name, "")
    assert type(ours) is row.cls
    assert repr(ours) == repr(made)
    assert vars(ours).keys() - {"original_class"} == vars(made).keys()
    for name, value in vars(made).items():
        if not name.startswith("_"):
            assert getattr(ours, name) == value, name
    assert list(ours.state_dict()) == list(made.state_dict())
    assert ours._buffers.keys() == made._buffers.keys()
    assert ours._parameters.keys() == made._parameters.keys()
    state = ours.state_dict(keep_vars=True)
    assert all(state[name] is tensor for name, tensor in tensors.items())
    if "running_lmbda" in state:
        assert torch.equal(ours.running_lmbda, torch.ones(row.shape[1]).double())
    assert theirs.state_dict(keep_vars=True).keys() == tensors.keys()  # the old layer is unchanged

    for _ in range(2):
        assert_close(ours(row.input()), plain(row.input()))
    model.append(made)
    normnorm.restore_norms(model)
    for layer in model:
        assert type(layer) is row.counterpart
        assert repr(layer) == repr(plain)
        assert vars(layer).keys() == vars(plain).keys()
        assert list(layer.state_dict()) == list(plain.state_dict())
    restored = model[0].state_dict(keep_vars=True)
    assert all(restored[name] is tensor for name, tensor in tensors.items())
    assert_close(model[0](row.input()), plain(row.input()))


def test_settings_reach_every_layer_and_none_keeps_the_class_default():
    model = model_of_all()
    normnorm.replace_norms(model, alpha=0.5, order=1, transform_eps=0.01)
    assert len(ours_in(model)) == 8
    for layer in ours_in(model):
        assert (layer.alpha, layer.order, layer.transform_eps) == (0.5, 1, 0.01)
        assert layer.noise_train == (1.0 if isinstance(layer, nn.LayerNorm) else 0.4)
    other = model_of_all()
    normnorm.replace_norms(other, noise_train=0.2)
    assert {layer.noise_train for layer in ours_in(other)} == {0.2}


# Kept state


def test_hooks_run_and_their_handles_still_remove_them():
    calls = Counter()
    layer = nn.BatchNorm2d(3)
    handles = [
        layer.register_forward_pre_hook(lambda m, i: calls.update(["pre"])),
        layer.register_forward_hook(lambda m, i, o: calls.update(["forward"])),
        layer.register_forward_hook(
            lambda m, i, k, o: calls.update([type(m).__name__]), with_kwargs=True
        ),
        layer.register_full_backward_hook(lambda m, i, o: calls.update(["backward"])),
        layer.register_full_backward_pre_hook(lambda m, o: calls.update(["backward_pre"])),
    ]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    normnorm.replace_norms(model)
    input = torch.randn(2, 3, 4, 4)
    model(input).sum().backward()
    assert calls == Counter(["pre", "forward", "BatchNormalNorm2d", "backward", "backward_pre"])
    normnorm.restore_norms(model)
    model(input).sum().backward()
    assert calls["pre"] == calls["backward"] == 2
    assert calls["BatchNorm2d"] == 1
    for handle in handles:
        handle.remove()
    model(input).sum().backward()
    assert calls["pre"] == calls["backward"] == 2


def test_attributes_set_on_a_layer_are_kept_both_ways():
    layer = nn.LayerNorm(4)
    layer.no_weight_decay = True
    model = nn.Sequential(layer)
    normnorm.replace_norms(model)
    assert model[0].no_weight_decay is True
    normnorm.restore_norms(model)
    assert vars(model[0]).keys() == vars(layer).keys()


def test_a_shared_module_becomes_one_new_module():
    norm = nn.BatchNorm2d(3)
    block = nn.Sequential(nn.Conv2d(3, 3, 1), norm)
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(norm, nn.ReLU()), "c": block})
    summary = normnorm.replace_norms(model)
    assert [swap.name for swap in summary.replaced] == ["a.1"]
    assert model["a"][1] is model["b"][0]
    assert model["c"] is model["a"]
    assert type(model["a"][1]) is normnorm.BatchNormalNorm2d
    # A shared layer selected by one of its names is replaced in all positions.
    normnorm.restore_norms(model, "b.*")
    assert model["a"][1] is model["b"][0]
    assert type(model["a"][1]) is nn.BatchNorm2d


def test_copies_and_pickles_of_a_replaced_model_are_restored_all_the_same():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    normnorm.replace_norms(model, **OFF)
    input = torch.randn(5, 4)
    model(input)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied.eval()(input), model.eval()(input))
        normnorm.restore_norms(copied)
        assert type(copied[1]) is nn.BatchNorm1d
        assert_close(copied(input), model(input))


# Selection


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ("batch.*", {"batch.0", "batch.1", "batch.2"}),
        ("*.1", {"batch.1", "instance.1", "others.1"}),
        (nn.LayerNorm, {"others.0"}),
        ((nn.GroupNorm, nn.BatchNorm3d), {"others.1", "batch.2"}),
        (lambda name, module: getattr(module, "num_features", 0) == 4, {"batch.1", "instance.1"}),
    ],
)
def test_where_chooses_by_name_class_or_function(where, expected):
    model = model_of_all()
    norms = {name for name, module in model.named_modules() if "Norm" in type(module).__name__}
    summary = normnorm.replace_norms(model, where)
    assert {swap.name for swap in summary.replaced} == expected
    assert {swap.name for swap in summary.left} == norms - expected
    assert {swap.reason for swap in summary.left} == {"not chosen by where"}
    assert set(ours_in(model)) == {model.get_submodule(name) for name in expected}


def test_a_second_call_changes_the_given_settings():
    model = model_of_all()
    normnorm.replace_norms(model, alpha=0.5)
    before = fingerprint(model)
    assert str(normnorm.replace_norms(model)) == "0 replaced, 0 left"
    summary = normnorm.replace_norms(model, "batch.*", noise_train=0.1, alpha=0.5)
    assert [swap.name for swap in summary.changed] == ["batch.0", "batch.1", "batch.2"]
    assert {swap.reason for swap in summary.changed} == {"noise_train=0.1"}
    assert str(summary).startswith("0 replaced, 3 changed, 0 left\n")
    assert fingerprint(model) == before
    for layer in model["batch"]:
        assert (layer.noise_train, layer.alpha, layer.order) == (0.1, 0.5, 2)
    assert model["others"][0].noise_train == 1.0
    # Layers that have the setting are not counted; a normnorm layer is changed in place.
    summary = normnorm.replace_norms(model, noise_train=0.1, order=1)
    assert [swap.reason for swap in summary.changed].count("order=1") == 3
    assert len(summary.changed) == 8
    single = normnorm.LayerNormalNorm(3)
    assert len(normnorm.replace_norms(single, transform_eps=0.01).changed) == 1
    assert single.transform_eps == 0.01


def test_a_second_call_that_fails_changes_no_setting():
    model = nn.Sequential(normnorm.BatchNormalNorm1d(3), nn.BatchNorm1d(3))
    with pytest.raises(ZeroDivisionError):
        normnorm.replace_norms(model, lambda name, module: 1 / (name != "1"), noise_train=0.1)
    assert model[0].noise_train == 0.4
    with pytest.raises(ValueError, match="alpha"):
        normnorm.replace_norms(model, noise_train=0.1, alpha=float("inf"))
    assert model[0].noise_train == 0.4
    assert type(model[1]) is nn.BatchNorm1d


# Layers left, with reasons


class OwnNorm(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) + 1


class ScaleNorm(nn.Module):
    def forward(self, input):
        return input / input.norm()


class FrozenBatchNorm(nn.Module):
    pass


# What binds a layer to the object that it is, by the reason that is given.
BOUND = [
    ("parametrized", lambda layer: parametrize.register_parametrization(layer, "weight", nn.ELU())),
    ("forward was replaced", lambda layer: setattr(layer, "forward", lambda input: input)),
    ("state_dict hooks", lambda layer: layer.register_state_dict_post_hook(lambda *_: None)),
    ("compiled by itself", lambda layer: layer.compile(backend="eager")),
    ("hooks is bound", lambda layer: layer.register_forward_hook(bound_method(layer))),
    ("hooks is bound", lambda layer: layer.register_forward_pre_hook(partial(print, layer))),
    ("'scale' is bound", lambda layer: setattr(layer, "scale", bound_method(layer))),
]


def bound_method(layer):
    return types.MethodType(lambda *arguments: None, layer)


@pytest.mark.parametrize(("reason", "bind"), BOUND)
def test_a_layer_that_is_bound_to_its_object_is_neither_replaced_nor_restored(reason, bind):
    model = nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3))
    normnorm.replace_norms(model, "1")
    for layer in model:
        bind(layer)
    before = list(model)
    for name, exchange in (("0", normnorm.replace_norms), ("1", normnorm.restore_norms)):
        (left,) = exchange(model).left
        assert left.name == name
        assert reason in left.reason
    assert list(model) == before


def lazy_with_hook():
    layer = nn.LazyBatchNorm2d()
    layer.register_forward_hook(lambda *arguments: None)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.RMSNorm(3), "root mean square"),
        (lambda: OwnNorm(3), "class of its own"),
        (ScaleNorm, "no counterpart"),
        (FrozenBatchNorm, "frozen"),
        (lambda: torch.compile(nn.LayerNorm(3), backend="eager"), "compiled by itself"),
        (lazy_with_hook, "not initialized"),
        (lambda: nn.LayerNorm(3, eps=0.0), "eps must be positive"),
        (lambda: nn.LayerNorm(3).to(torch.complex64), "weight is torch.complex64"),
    ],
)
@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_a_layer_that_cannot_be_swapped_is_left_with_its_reason(make, reason):
    model = nn.Sequential(make(), nn.BatchNorm2d(3))
    kept = model[0]
    summary = normnorm.replace_norms(model)
    assert model[0] is kept
    (left,) = summary.left
    assert left.name in ("0", "0._orig_mod")
    assert left.before == type(model.get_submodule(left.name)).__name__
    assert left.after is None
    assert reason in left.reason
    assert reason in str(summary)
    assert [swap.name for swap in summary.replaced] == ["1"]


def test_summary_prints_a_table_that_stays_short():
    model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(30)), nn.RMSNorm(3))
    text = str(normnorm.replace_norms(model))
    assert text.splitlines()[0] == "30 replaced, 1 left"
    assert "30  BatchNorm2d -> BatchNormalNorm2d" in text
    assert "0, 1, ..., 29" in text
    assert "RMSNorm: it normalizes" in text
    assert len(text.splitlines()) == 5


# Errors


def scripted():
    return nn.Sequential(torch.jit.script(nn.Linear(2, 2)), nn.BatchNorm1d(2))


def wrapped():
    return nn.Sequential(nn.DataParallel(nn.BatchNorm1d(2)))


class Sharded(FSDPModule, nn.Sequential):
    """The class that fully_shard() gives a model."""


def sharded():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.__class__ = Sharded
    return model


@pytest.mark.parametrize(
    ("model", "where", "settings", "error", "words"),
    [
        (lambda: nn.BatchNorm2d(3), None, {}, ValueError, "is itself a BatchNorm2d"),
        (model_of_all, 3, {}, TypeError, "a pattern of names.*got 3"),
        (model_of_all, (), {}, TypeError, "a pattern of names"),
        (model_of_all, None, {"noise_train": -1.0}, ValueError, "noise_train"),
        (model_of_all, None, {"alpha": float("nan")}, ValueError, "alpha"),
        (model_of_all, None, {"order": 3}, ValueError, "order"),
        (model_of_all, None, {"transform_eps": -0.1}, ValueError, "transform_eps"),
        (model_of_all, lambda name, _: 1 / (name != "others.1"), {}, ZeroDivisionError, "division"),
        (scripted, None, {}, TypeError, "before scripting"),
        (wrapped, None, {}, TypeError, "before wrapping the model in DataParallel"),
        (sharded, None, {}, TypeError, "before wrapping the model in FSDPModule"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")
def test_bad_arguments_raise_and_change_nothing(model, where, settings, error, words):
    model = model()
    before = fingerprint(model)
    with pytest.raises(error, match=words):
        normnorm.replace_norms(model, where, **settings)
    assert fingerprint(model) == before
    with pytest.raises(TypeError, match=r"nn\.Module; got str"):
        normnorm.replace_norms("model")


# Restoring


def test_a_layer_without_counterpart_in_torch_is_left_by_restoring():
    model = nn.Sequential(normnorm.LayerNormalNorm2d(3))
    summary = normnorm.restore_norms(model)
    assert type(model[0]) is normnorm.LayerNormalNorm2d
    assert "torch has no counterpart" in summary.left[0].reason
    with pytest.raises(ValueError, match="is itself a BatchNormalNorm2d"):
        normnorm.restore_norms(normnorm.BatchNormalNorm2d(3))


def test_synchronised_layers_are_swapped_both_ways():
    group = object()
    model = nn.Sequential(nn.SyncBatchNorm(3, process_group=group), nn.BatchNorm2d(3))
    plain = copy.copy(vars(model[0]))
    normnorm.replace_norms(model)
    made = sync.SyncBatchNormalNorm(3, process_group=group)
    assert type(model[0]) is sync.SyncBatchNormalNorm
    assert model[0].process_group is group
    assert vars(model[0]).keys() - {"original_class"} == vars(made).keys()
    sync.convert_sync(model, group)
    assert type(model[1]) is sync.SyncBatchNormalNorm
    normnorm.restore_norms(model)
    for layer in model:
        assert type(layer) is nn.SyncBatchNorm
        assert layer.process_group is group
        assert vars(layer).keys() == plain.keys()


# Registered classes


class ShiftedNorm(nn.Module):
    """A LayerNorm as a model library might define it."""

    def __init__(self, size, epsilon=1e-3):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, input):
        return nn.functional.layer_norm(input, self.gain.shape, self.gain, None, self.epsilon)


def to_ours(norm):
    new = normnorm.LayerNormalNorm(norm.gain.shape, norm.epsilon, bias=False, alpha=0.5)
    new.weight = norm.gain
    return new


def to_theirs(layer):
    old = ShiftedNorm(layer.normalized_shape, layer.eps)
    old.gain = layer.weight
    return old


@pytest.fixture
def shifted():
    with normnorm.register_norm(ShiftedNorm, to_ours, to_theirs) as handle:
        yield handle


@pytest.mark.usefixtures("shifted")
def test_a_registered_class_is_replaced_and_restored_by_its_functions():
    calls = []
    norm = ShiftedNorm(4).eval()
    handle = norm.register_forward_hook(lambda module, *rest: calls.append(type(module).__name__))
    gain = norm.gain
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(4, 4), norm), "b": norm})
    input = torch.randn(5, 4).exp()
    expected = model["a"](input)
    summary = normnorm.replace_norms(model, **OFF)
    assert [swap.after for swap in summary.replaced] == ["LayerNormalNorm"]
    assert model["b"] is model["a"][1]
    assert model["b"].weight is gain
    assert not model["b"].training
    assert (model["b"].alpha, model["b"].noise_train) == (0.0, 0.0)
    assert_close(model["a"](input), expected, rtol=1e-4, atol=1e-5)
    for layer in (model, nn.Sequential(copy.deepcopy(model["b"]))):
        assert [swap.after for swap in normnorm.restore_norms(layer).replaced] == ["ShiftedNorm"]
    assert type(model["b"]) is ShiftedNorm
    assert model["b"] is model["a"][1]
    assert model["b"].gain is gain
    assert torch.equal(model["a"](input), expected)
    assert calls == ["ShiftedNorm", "LayerNormalNorm", "ShiftedNorm"]
    handle.remove()
    model["a"](input)
    assert len(calls) == 3


def test_a_registration_ends_with_its_handle_and_a_later_one_comes_first(shifted):
    def make():
        return nn.Sequential(ShiftedNorm(4))

    with normnorm.register_norm(ShiftedNorm, lambda norm: normnorm.GroupNormalNorm(2, 4)):
        model = make()
        normnorm.replace_norms(model)
        assert type(model[0]) is normnorm.GroupNormalNorm
        assert "without a way back" in normnorm.restore_norms(model).left[0].reason
    model = make()
    normnorm.replace_norms(model, noise_train=0.2)
    assert type(model[0]) is normnorm.LayerNormalNorm
    assert (model[0].alpha, model[0].noise_train) == (0.5, 0.2)  # convert's, and the given one
    shifted.remove()
    (left,) = normnorm.restore_norms(model).left
    assert "was a ShiftedNorm, which is not registered" in left.reason
    assert type(model[0]) is normnorm.LayerNormalNorm
    (left,) = normnorm.replace_norms(make()).left
    assert "register_norm can name one" in left.reason


@pytest.mark.usefixtures("shifted")
def test_only_the_registered_class_itself_is_replaced():
    class Derived(ShiftedNorm):
        pass

    model = nn.Sequential(Derived(4), nn.utils.parametrizations.weight_norm(ShiftedNorm(4), "gain"))
    reasons = [swap.reason for swap in normnorm.replace_norms(model).left]
    assert reasons[0] == "a class of its own, derived from ShiftedNorm: register it as well"
    assert "parametrized" in reasons[1]
    with pytest.raises(ValueError, match="is itself a ShiftedNorm"):
        normnorm.replace_norms(ShiftedNorm(4))


@pytest.mark.parametrize(
    ("convert", "got"),
    [
        (lambda norm: None, "a NoneType"),
        (lambda norm: nn.LayerNorm(4), "a LayerNorm"),
        (lambda norm: norm, "the layer itself"),
    ],
)
def test_a_registered_function_that_returns_anything_else_is_refused(convert, got):
    model = nn.Sequential(nn.BatchNorm1d(4), ShiftedNorm(4))
    before = fingerprint(model)
    with (
        normnorm.register_norm(ShiftedNorm, convert, to_theirs),
        pytest.raises(TypeError, match=f"must return a layer of normnorm; it returned {got}"),
    ):
        normnorm.replace_norms(model)
    assert fingerprint(model) == before
    with normnorm.register_norm(ShiftedNorm, to_ours, lambda layer: nn.LayerNorm(4)):
        normnorm.replace_norms(model)
        before = fingerprint(model)
        with pytest.raises(TypeError, match="must return a ShiftedNorm; it returned a LayerNorm"):
            normnorm.restore_norms(model)
        assert fingerprint(model) == before


# Lazy layers


@pytest.mark.parametrize("name", LAZY_NAMES)
def test_uninitialized_lazy_layers_are_replaced_and_restored(name):
    theirs = getattr(nn, name.replace("Normal", ""))(momentum=0.3)
    model = nn.Sequential(theirs.double().eval())
    parameters = list(model.parameters())
    normnorm.replace_norms(model, **OFF)
    assert type(model[0]).__name__ == name
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    normnorm.restore_norms(model)
    assert type(model[0]) is type(theirs)
    normnorm.replace_norms(model, **OFF)
    same = type(theirs)(momentum=0.3).double()
    input = torch.randn(3, 4, *(5,) * int(name[-2]), dtype=torch.float64)
    output = model.train()(input)
    assert type(model[0]).__name__ == name.removeprefix("Lazy")
    assert model[0].num_features == 4
    assert model[0].momentum == 0.3
    assert output.dtype == torch.float64
    assert_close(output, same(input))
    normnorm.restore_norms(model)
    assert type(model[0]) is type(same)  # now the plain class too


def test_a_lazy_layer_keeps_what_a_checkpoint_gave_it():
    trained, x = nn.BatchNorm1d(3), torch.randn(8, 3)
    trained(x + 2)
    for restored in (False, True):
        model = nn.Sequential(nn.LazyBatchNorm1d())
        model[0].load_state_dict(trained.state_dict())
        normnorm.replace_norms(model, **OFF)
        if restored:
            normnorm.restore_norms(model)
        assert_close(model.eval()(x), trained.eval()(x))


# The fast path of nn.TransformerEncoderLayer


def encoder(activation="relu", norm_first=False):
    layer = nn.TransformerEncoderLayer(
        8, 2, 16, activation=activation, norm_first=norm_first, batch_first=True, dropout=0.0
    )
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).eval()


@pytest.mark.parametrize(
    ("activation", "norm_first", "masked"),
    [
        ("relu", False, True), ("gelu", True, False), (nn.ReLU(), True, True),
        (nn.GELU(), False, False), (torch.tanh, False, True),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
def test_the_fast_path_does_not_skip_a_replaced_norm(activation, norm_first, masked, monkeypatch):
    model = encoder(activation, norm_first)
    before = [layer.activation_relu_or_gelu for layer in model.layers], model.use_nested_tensor
    input = torch.randn(3, 5, 8)
    mask = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if masked else None
    kept = ~mask if masked else slice(None)
    called = set()  # not by a hook, which would disable the fast path
    forward = normnorm.LayerNormalNorm.forward
    monkeypatch.setattr(
        normnorm.LayerNormalNorm, "forward", lambda norm, x: called.add(norm) or forward(norm, x)
    )
    with torch.no_grad():
        expected = model(input, src_key_padding_mask=mask)
        normnorm.replace_norms(model, **OFF)
        output = model(input, src_key_padding_mask=mask)
        assert called == set(ours_in(model))
        assert len(called) == 4
        assert_close(output[kept], expected[kept], rtol=1e-4, atol=1e-5)
        normnorm.restore_norms(model)
        after = [layer.activation_relu_or_gelu for layer in model.layers], model.use_nested_tensor
        assert after == before
        assert torch.equal(model(input, src_key_padding_mask=mask), expected)


def test_only_layers_with_our_norms_lose_their_fast_path():
    model = encoder()
    normnorm.replace_norms(model, "layers.1.norm2")
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]
    model.layers[0].norm1 = normnorm.LayerNormalNorm(8)  # by hand
    normnorm.replace_norms(model, "nothing")
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [0, 0]
