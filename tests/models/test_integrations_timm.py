"""timm: constructors and factories by class and by name, models whose blocks combine norm and
activation, and replacement in timm's models."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import timm.layers
import timm.optim
import torch
from model_zoo import speak
from timm.utils import ModelEmaV3, distribute_bn, freeze, reparameterize_model, unfreeze
from torch import nn
from torch.testing import assert_close

import normnorm
import normnorm.integrations.timm as normnorm_timm
from normnorm.sync import revert_sync

OFF = {"alpha": 0.0, "noise_train": 0.0}
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)

# model -> (image size, layers replaced); the test_* models are timm's own small ones.
MODELS = {
    "test_resnet": (64, 15),
    "test_efficientnet": (64, 13),
    "test_efficientnet_gn": (64, 13),
    "test_efficientnet_ln": (64, 13),
    "test_convnext": (64, 14),
    "test_vit": (160, 13),
    "regnety_002": (64, 44),
}
SLOW = {
    "resnetv2_50": (64, 49),
    "resnetv2_50x1_bit": (64, None),
    "efficientnet_b0": (64, 49),
    "convnext_atto": (64, 17),
    "test_nfnet": (96, None),
    "test_byobnet": (64, None),
    "maxvit_pico_rw_256": (256, None),
    "swin_tiny_patch4_window7_224": (224, None),
    "mobilenetv3_small_050": (64, None),
    "densenet121": (64, None),
}
each_model = pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
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

    places = [
        (create_norm, ("_NORM_MAP", "_NORM_TYPES")),
        (
            create_norm_act,
            (
                "_NORM_ACT_MAP",
                "_NORM_ACT_TYPES",
                "_NORM_TO_NORM_ACT_MAP",
                "_NORM_ACT_REQUIRES_ARG",
            ),
        ),
        (convnext, ("_NORM_MAP",)),
    ]
    maps = [getattr(module, name) for module, names in places for name in names]
    before = [copy.copy(one) for one in maps]
    normnorm_timm.register()
    yield
    for one, old in zip(maps, before, strict=True):
        one.clear()
        one.update(old)


def build(name):
    torch.manual_seed(0)
    size, count = (MODELS | SLOW)[name]
    return speak(timm.create_model(name)).eval(), torch.randn(2, 3, size, size), count


def ours_in(model):
    return [module for module in model.modules() if hasattr(module, "noise_train")]


# Replacing


@each_model
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    model, input, count = build(name)
    with torch.no_grad():
        expected = model(input)
        classes = [type(module) for module in model.modules()]
        norms = sum(issubclass(cls, NORMS) for cls in classes)
        summary = normnorm.replace_norms(model, **OFF)
        assert not summary.left, summary
        assert len(summary.replaced) == norms
        assert count in (None, norms)
        scale = expected.std().item()
        assert scale > 1e-3
        assert_close(model(input), expected, rtol=1e-4, atol=1e-4 * scale)
        normnorm.restore_norms(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(input), expected)


@pytest.mark.parametrize("name", [*ACTS, *PLAIN])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_each_layer_class_is_replaced_with_its_activation_and_dropout(name, training, cpu_backend):
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
    model, input, count = build("test_efficientnet")
    with torch.no_grad():
        expected = model(input)
        model = timm.layers.convert_sync_batchnorm(model)
        summary = normnorm.replace_norms(model, **OFF)
        assert not summary.left
        kinds = {type(module) for module in ours_in(model)}
        assert kinds == {normnorm_timm.SyncBatchNormalNormAct}
        assert len(ours_in(model)) == count
        assert_close(model(input), expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    model.train()(input).square().mean().backward()  # a group of one
    assert all(module.num_batches_tracked == 1 for module in ours_in(model))
    normnorm.restore_norms(model)
    restored = {type(m) for m in model.modules() if isinstance(m, nn.SyncBatchNorm)}
    assert restored == {timm.layers.SyncBatchNormAct}


def test_replaced_models_are_synchronised_and_reverted():
    model, input, count = build("test_efficientnet")
    theirs = [type(module) for module in model.modules()]
    normnorm.replace_norms(model, **OFF)
    ours, group = ours_in(model), object()
    acts = [module.act for module in ours]
    with torch.no_grad():
        expected = model(input)
        assert normnorm.convert_sync(model, group) is model
        assert [module.act for module in ours_in(model)] == acts
        assert ours_in(model) == ours
        assert {type(module) for module in ours} == {normnorm_timm.SyncBatchNormalNormAct}
        assert len(ours) == count
        assert all(module.process_group is group for module in ours)
        assert torch.equal(model(input), expected)
        revert_sync(model)
        assert {type(module) for module in ours} == {normnorm_timm.BatchNormalNormAct2d}
        assert torch.equal(model(input), expected)
    normnorm.restore_norms(model)
    assert [type(module) for module in model.modules()] == theirs


def test_synchronised_layers_are_restored_to_timms_synchronised():
    model, _, count = build("test_efficientnet")
    classes = [type(module.act) for module in model.modules() if hasattr(module, "drop")]
    normnorm.replace_norms(model, **OFF)
    group = object()
    normnorm.convert_sync(model, group)
    normnorm.restore_norms(model)
    restored = [m for m in model.modules() if isinstance(m, timm.layers.SyncBatchNormAct)]
    assert len(restored) == count
    assert all(module.process_group is group for module in restored)
    assert [type(module.act) for module in restored] == classes[: len(restored)]


@pytest.mark.parametrize("ours_first", [True, False])
def test_timms_converter_and_ours_leave_each_others_layers_alone(ours_first):
    model = nn.Sequential(
        timm.layers.BatchNormAct2d(4), normnorm_timm.BatchNormalNormAct2d(4, act_layer="silu")
    )
    first, second = normnorm.convert_sync, timm.layers.convert_sync_batchnorm
    for convert in (first, second) if ours_first else (second, first):
        model = convert(model)
    assert type(model[0]) is timm.layers.SyncBatchNormAct
    assert type(model[1]) is normnorm_timm.SyncBatchNormalNormAct
    assert type(model[1].act) is nn.SiLU


def test_a_synchronised_layer_knows_timms_names_of_activations():
    layer = normnorm_timm.SyncBatchNormalNormAct(4, act_layer="silu", process_group=None)
    assert type(layer.act) is nn.SiLU
    assert layer(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_rms_norms_of_timm_are_left_with_the_reason():
    model = nn.Sequential(
        timm.layers.RmsNorm(4), timm.layers.RmsNormAct2d(4), timm.layers.SimpleNorm2d(4),
        timm.layers.EvoNorm2dS0(32), timm.layers.FrozenBatchNormAct2d(4),
    )  # fmt: skip
    summary = normnorm.replace_norms(model)
    assert [swap.reason.split()[0] for swap in summary.left] == [
        "it", "it", "it", "normnorm", "its",
    ]  # fmt: skip
    assert not summary.replaced


def test_training_in_timms_way_goes_on_after_replacement():
    model, input, _ = build("test_efficientnet")
    ema = ModelEmaV3(model, decay=0.5)
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.1)
    normnorm.replace_norms(model)
    normnorm.replace_norms(ema.module)
    model.train()
    keys = [key for key in model.state_dict() if key.endswith(("running_lmbda", "running_var"))]
    assert len(keys) == 2 * 13
    expected = {key: ema.module.state_dict()[key].clone() for key in keys}
    for _ in range(3):
        optimizer.zero_grad()
        model(input.repeat(4, 1, 1, 1)).square().mean().backward()
        optimizer.step()
        ema.update(model)
        for key in keys:
            expected[key].lerp_(model.state_dict()[key], 0.5)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    for key in keys:
        assert (expected[key] != 1).any()
        assert_close(ema.module.state_dict()[key], expected[key])


def test_weight_decay_passes_our_layers_by_as_timm_does_theirs():
    model = timm.create_model("test_vit")
    plain = timm.optim.param_groups_weight_decay(model, 0.1)
    normnorm.replace_norms(model)
    ours = timm.optim.param_groups_weight_decay(model, 0.1)
    assert [len(group["params"]) for group in ours] == [len(group["params"]) for group in plain]


# Constructors


def test_norm_layer_of_a_plain_resnet_needs_no_registration():
    for layer in (normnorm.BatchNormalNorm2d, partial(normnorm.BatchNormalNorm2d, alpha=0.5)):
        model = timm.create_model("resnet18", norm_layer=layer)
        assert len(ours_in(model)) == 20


def test_without_registration_timm_rejects_norm_act_layers(monkeypatch):
    # Undoes register(), which an earlier test may have called.
    known = timm.layers.create_norm_act._NORM_TO_NORM_ACT_MAP
    monkeypatch.delitem(known, "batchnormalnorm2d", raising=False)
    with pytest.raises(AssertionError, match="No equivalent norm_act layer"):
        timm.create_model("efficientnet_b0", norm_layer=normnorm.BatchNormalNorm2d)


@pytest.mark.parametrize(
    ("name", "norm_layer", "keywords", "count"),
    [
        ("efficientnet_b0", normnorm.BatchNormalNorm2d, {}, 49),
        ("efficientnet_b0", "batchnormalnorm2d", {}, 49),
        ("efficientnet_b0", partial(normnorm.BatchNormalNorm2d, noise_train=0.1), {}, 49),
        ("regnety_002", "batchnormalnorm", {}, 44),
        ("test_efficientnet", normnorm_timm.GroupNormalNorm1, {}, 13),
        ("test_efficientnet", "layernormalnorm2d", {}, 13),
        ("convnext_atto", "layernormalnorm2d", {}, 17),
        ("convnext_atto", normnorm.LayerNormalNorm2d, {}, 17),
        ("convnext_tiny", "layernormalnorm", {"depths": (1, 1, 1, 1)}, 9),
        ("test_vit", normnorm.LayerNormalNorm, {}, 13),
        ("test_vit", "layernormalnorm", {}, 13),
    ],
)
def test_create_model_takes_classes_partials_and_names(
    name, norm_layer, keywords, count, registered
):
    normnorm_timm.register()  # a repeated call has no effect
    model = timm.create_model(name, norm_layer=norm_layer, num_classes=7, **keywords)
    ours = ours_in(model)
    assert len(ours) == count
    wanted = 0.1 if isinstance(norm_layer, partial) else ours[0].noise_train
    assert {module.noise_train for module in ours} == {wanted}
    size = 160 if name == "test_vit" else 64
    output = model(torch.randn(2, 3, size, size))
    assert output.shape == (2, 7)
    output.square().mean().backward()
    assert all(module.weight.grad.isfinite().all() for module in ours)


def test_norm_act_layers_get_timms_activation(registered):
    model = timm.create_model("efficientnet_b0", norm_layer="batchnormalnorm2d")
    plain = timm.create_model("efficientnet_b0")
    ours = [type(m.act) for m in ours_in(model)]
    theirs = [type(m.act) for m in plain.modules() if isinstance(m, timm.layers.BatchNormAct2d)]
    assert ours == theirs
    assert nn.SiLU in ours
    assert nn.Identity in ours
    model.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize("name", ["batchnormalnorm2d", "groupnormalnorm", "groupnormalnorm1"])
@pytest.mark.parametrize("apply_act", [True, False])
def test_factories_of_single_layers_know_our_names(name, apply_act, registered):
    plain = timm.layers.create_norm_layer(name, 64, eps=1e-3)
    assert plain.eps == 1e-3
    with_act = timm.layers.create_norm_act_layer(
        name, 64, act_layer=nn.GELU, apply_act=apply_act, eps=1e-3
    )
    assert type(with_act.act) is (nn.GELU if apply_act else nn.Identity)
    assert with_act.eps == 1e-3
    assert plain.weight.shape == with_act.weight.shape == (64,)
    if name == "groupnormalnorm":
        assert plain.num_groups == with_act.num_groups == 32
    assert with_act(torch.randn(2, 64, 3, 3)).isfinite().all()


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
@pytest.mark.parametrize("name", ["repvgg_a0", "repvit_m0_9", "repghostnet_050", "efficientvim_m1"])
def test_reparameterizing_names_the_layer_that_cannot_be_folded(name):
    model = timm.create_model(name, num_classes=2)
    normnorm.replace_norms(model)
    before = list(model.state_dict())
    with pytest.raises(RuntimeError, match=r"'.+': a BatchNormalNorm\w* cannot be folded"):
        reparameterize_model(model.eval(), inplace=True)
    assert list(model.state_dict()) == before
    normnorm.restore_norms(model)
    reparameterize_model(model)
