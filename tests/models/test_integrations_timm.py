"""timm: constructors and factories by class and by name, models whose blocks combine norm and
activation, and replacement in timm's models."""

import copy
from functools import partial

import pytest
import timm
import timm.layers
import torch
from model_zoo import NORMS, OFF, check_replaced_and_restored, ours_in, speak
from timm.utils import distribute_bn, freeze, reparameterize_model, unfreeze
from torch import nn
from torch.testing import assert_close

import normnorm
import normnorm.integrations.timm as normnorm_timm
from normnorm.sync import revert_sync

# model -> image size; the test_* models are timm's own small ones.
MODELS = {
    "test_resnet": 64, "test_efficientnet": 64, "test_convnext": 64, "test_vit": 160,
    "regnety_002": 64,
}  # fmt: skip
SLOW = {
    "test_efficientnet_gn": 64, "test_efficientnet_ln": 64, "resnetv2_50x1_bit": 64,
    "maxvit_pico_rw_256": 256, "swin_tiny_patch4_window7_224": 224, "densenet121": 64,
}  # fmt: skip
ACTS = {
    "BatchNormAct2d": (timm.layers.BatchNormAct2d, (6,), {}),
    "GroupNormAct": (timm.layers.GroupNormAct, (6,), {"num_groups": 3}),
    "GroupNorm1Act": (timm.layers.GroupNorm1Act, (6,), {}),
    "LayerNormAct": (timm.layers.LayerNormAct, (5,), {}),
    "LayerNormActFp32": (timm.layers.LayerNormActFp32, (5,), {}),
    "LayerNormAct2d": (timm.layers.LayerNormAct2d, (6,), {}),
    "LayerNormAct2dFp32": (timm.layers.LayerNormAct2dFp32, (6,), {}),
}
PLAIN = {
    "GroupNorm": (timm.layers.GroupNorm, (6, 3), {}),
    "GroupNorm1": (timm.layers.GroupNorm1, (6,), {}),
    "LayerNorm": (timm.layers.LayerNorm, (5,), {}),
    "LayerNormFp32": (timm.layers.LayerNormFp32, (5,), {}),
    "LayerNorm2d": (timm.layers.LayerNorm2d, (6,), {}),
    "LayerNorm2dFp32": (timm.layers.LayerNorm2dFp32, (6,), {}),
    "LayerNormExp2d": (timm.layers.norm.LayerNormExp2d, (6,), {}),
}


@pytest.fixture
def registered():
    """Adds normnorm layers to timm's tables; restores the tables afterwards."""
    from timm.layers import create_norm, create_norm_act
    from timm.models import convnext

    maps = [
        value
        for module in (create_norm, create_norm_act, convnext)
        for name, value in vars(module).items()
        if name.startswith("_NORM") and isinstance(value, (dict, set))
    ]
    before = [copy.copy(one) for one in maps]
    normnorm_timm.register()
    yield
    for one, old in zip(maps, before, strict=True):
        one.clear()
        one.update(old)


def build(name):
    torch.manual_seed(0)
    size = (MODELS | SLOW)[name]
    return speak(timm.create_model(name)).eval(), torch.randn(2, 3, size, size)


def kinds(layers):
    return {type(layer) for layer in layers}


# Replacing


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    assert check_replaced_and_restored(*build(name)) > 4


@pytest.mark.parametrize("name", [*ACTS, *PLAIN])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_layer_class_is_replaced_with_its_activation_and_dropout(name, training):
    cls, arguments, keywords = (ACTS | PLAIN)[name]
    if name in ACTS:
        keywords = {**keywords, "act_layer": nn.LeakyReLU, "act_kwargs": {"negative_slope": 0.3}}
        keywords["drop_layer"] = partial(nn.Dropout, 0.5)
    theirs = speak(cls(*arguments, **keywords)).train(training)
    model = nn.Sequential(copy.deepcopy(theirs))
    summary = normnorm.replace_norms(model, **OFF)
    assert len(summary.replaced) == 1
    if name in ACTS:
        assert type(model[0].act) is nn.LeakyReLU
        assert model[0].act.negative_slope == 0.3
        assert type(model[0].drop) is nn.Dropout
    input = torch.randn(4, 6, 4, 5)
    if "LayerNorm" in name and "2d" in name:
        # timm's output has this layout anyway, and dropout draws in memory order.
        input = input.contiguous(memory_format=torch.channels_last)
    outputs = []
    for layer in (model, theirs):
        torch.manual_seed(1)  # the same dropout
        outputs.append(layer(input))
    assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-5)
    if name in ACTS:
        assert (outputs[0] < 0).any()
        assert bool((outputs[0] == 0).any()) is training
    normnorm.restore_norms(model)
    assert type(model[0]) is cls
    assert vars(model[0]).keys() == vars(theirs).keys()


# timm's ...Fp32 classes are replaced by the plain classes.
@pytest.mark.parametrize("name", [name for name in ACTS if not name.endswith("Fp32")])
def test_a_layer_built_by_our_constructor_is_restored_to_timms(name):
    cls, arguments, keywords = ACTS[name]
    ours = getattr(normnorm_timm, name.replace("Norm", "NormalNorm"))(*arguments, **keywords)
    model = nn.Sequential(ours)
    normnorm.restore_norms(model)
    assert type(model[0]) is cls
    input = torch.randn(4, 6, 4, 5)
    assert_close(model(input), cls(*arguments, **keywords)(input))


def test_layers_that_timm_has_synchronised_become_ours_synchronised():
    model, input = build("test_efficientnet")
    with torch.no_grad():
        expected = model(input)
        model = timm.layers.convert_sync_batchnorm(model)
        assert not normnorm.replace_norms(model, **OFF).left
        assert kinds(ours_in(model)) == {normnorm_timm.SyncBatchNormalNormAct}
        assert_close(model(input), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    model.train()(input).square().mean().backward()  # a group of one
    assert all(module.num_batches_tracked == 1 for module in ours_in(model))
    normnorm.restore_norms(model)
    restored = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert kinds(restored) == {timm.layers.SyncBatchNormAct}


def test_replaced_models_are_synchronised_and_reverted_or_restored():
    model, input = build("test_efficientnet")
    theirs = [type(module) for module in model.modules()]
    normnorm.replace_norms(model, **OFF)
    ours, group = ours_in(model), object()
    acts = [module.act for module in ours]
    with torch.no_grad():
        expected = model(input)
        assert normnorm.convert_sync(model, group) is model
        assert ours_in(model) == ours
        assert [module.act for module in ours] == acts
        assert kinds(ours) == {normnorm_timm.SyncBatchNormalNormAct}
        assert all(module.process_group is group for module in ours)
        assert torch.equal(model(input), expected)
        synchronised = copy.deepcopy(model)
        revert_sync(model)
        assert kinds(ours) == {normnorm_timm.BatchNormalNormAct2d}
        assert torch.equal(model(input), expected)
    normnorm.restore_norms(model)
    assert [type(module) for module in model.modules()] == theirs
    normnorm.restore_norms(synchronised)
    restored = [m for m in synchronised.modules() if isinstance(m, timm.layers.SyncBatchNormAct)]
    assert [type(module.act) for module in restored] == [type(act) for act in acts]


def test_rms_norms_of_timm_are_left_with_the_reason():
    model = nn.Sequential(
        timm.layers.RmsNorm(4), timm.layers.RmsNormAct2d(4), timm.layers.SimpleNorm2d(4),
        timm.layers.EvoNorm2dS0(32), timm.layers.FrozenBatchNormAct2d(4),
    )  # fmt: skip
    summary = normnorm.replace_norms(model)
    reasons = [swap.reason.split()[0] for swap in summary.left]
    assert reasons == ["it", "it", "it", "normnorm", "its"]
    assert not summary.replaced


# Constructors


@pytest.mark.parametrize(
    ("name", "norm_layer", "keywords"),
    [
        ("test_efficientnet", normnorm.BatchNormalNorm2d, {}),
        ("test_efficientnet", partial(normnorm.BatchNormalNorm2d, noise_train=0.1), {}),
        ("test_efficientnet", normnorm_timm.GroupNormalNorm1, {}),
        ("test_efficientnet", "layernormalnorm2d", {}),
        ("regnety_002", "batchnormalnorm", {}),
        ("convnext_tiny", "layernormalnorm2d", {"depths": (1, 1, 1, 1)}),
        ("convnext_tiny", normnorm.LayerNormalNorm, {"depths": (1, 1, 1, 1)}),
        ("test_vit", normnorm.LayerNormalNorm, {}),
        ("test_vit", "layernormalnorm", {}),
    ],
)
@pytest.mark.usefixtures("registered")
def test_create_model_takes_classes_partials_and_names(name, norm_layer, keywords):
    normnorm_timm.register()  # a repeated call has no effect
    model = timm.create_model(name, norm_layer=norm_layer, num_classes=7, **keywords)
    ours = ours_in(model)
    plain = timm.create_model(name, **keywords)
    assert len(ours) == sum(isinstance(module, NORMS) for module in plain.modules())
    wanted = 0.1 if isinstance(norm_layer, partial) else ours[0].noise_train
    assert {module.noise_train for module in ours} == {wanted}
    size = 160 if name == "test_vit" else 64
    output = model(torch.randn(2, 3, size, size))
    assert output.shape == (2, 7)
    output.square().mean().backward()
    assert all(module.weight.grad.isfinite().all() for module in ours)


@pytest.mark.usefixtures("registered")
def test_norm_act_layers_get_timms_activation():
    model = timm.create_model("test_efficientnet", norm_layer="batchnormalnorm2d")
    plain = timm.create_model("test_efficientnet")
    ours = [type(m.act) for m in ours_in(model)]
    theirs = [type(m.act) for m in plain.modules() if isinstance(m, timm.layers.BatchNormAct2d)]
    assert ours == theirs
    assert nn.SiLU in ours
    assert nn.Identity in ours
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["batchnormalnorm2d", "groupnormalnorm", "groupnormalnorm1"])
@pytest.mark.usefixtures("registered")
def test_factories_of_single_layers_know_our_names(name):
    plain = timm.layers.create_norm_layer(name, 64, eps=1e-3)
    layers = [plain]
    for apply_act, act in ((True, nn.GELU), (False, nn.Identity)):
        layers.append(
            timm.layers.create_norm_act_layer(
                name, 64, act_layer=nn.GELU, apply_act=apply_act, eps=1e-3
            )
        )
        assert type(layers[-1].act) is act
    for layer in layers:
        assert layer.eps == 1e-3
        assert layer.weight.shape == (64,)
        assert getattr(layer, "num_groups", 32) == (1 if name == "groupnormalnorm1" else 32)


def test_group_size_overrides_num_groups_and_must_divide():
    layer = normnorm_timm.GroupNormalNormAct(64, group_size=16)
    assert layer.num_groups == timm.layers.GroupNormAct(64, group_size=16).num_groups == 4
    with pytest.raises(ValueError, match="must be divisible by group_size \\(7\\)"):
        normnorm_timm.GroupNormalNormAct(64, group_size=7)


def test_timms_freeze_stops_our_statistics_and_unfreeze_lets_them_move_again():
    model = timm.create_model("test_resnet", num_classes=2)
    normnorm.replace_norms(model)
    x = torch.randn(2, 3, 64, 64)

    def moved():
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        model.train()(x)
        return [
            name for name, old in before.items() if not torch.equal(old, model.get_buffer(name))
        ]

    freeze(model, ["conv1", "bn1", "layer1"])
    frozen = moved()
    assert frozen
    assert not any(name.startswith(("bn1", "conv1", "layer1")) for name in frozen)
    freeze(model)
    assert not moved()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    unfreeze(model)
    assert len(moved()) == len(list(model.buffers()))


@pytest.mark.parametrize("reduce", [True, False])
def test_timms_distribute_bn_sends_lambda_with_the_mean_and_the_variance(reduce, monkeypatch):
    normnorm_timm.wrap()
    layer = normnorm.BatchNormalNorm2d(3)
    sent = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda buffer, op: sent.append(buffer))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda buffer, rank: sent.append(buffer))
    distribute_bn(nn.Sequential(layer), 2, reduce)
    assert [*map(id, sent)] == [
        id(layer.get_buffer(f"running_{name}")) for name in ("mean", "var", "lmbda")
    ]
    assert_close(layer.running_lmbda, torch.full((3,), 0.5 if reduce else 1.0))


# EfficientViM's fold would keep the norm and change the layers around it; the others read eps.
@pytest.mark.parametrize("name", ["repvgg_a0", "efficientvim_m1"])
def test_reparameterizing_names_the_layer_that_cannot_be_folded(name):
    model = timm.create_model(name, num_classes=2)
    normnorm.replace_norms(model)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match=r"'.+': a BatchNormalNorm\w* cannot be folded"):
        reparameterize_model(model.eval(), inplace=True)
    assert list(model.state_dict()) == before
    normnorm.restore_norms(model)
    reparameterize_model(model)
