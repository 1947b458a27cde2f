"""Frozen statistics, and the refusal to fold a layer into the one before it."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import fusion
from torch.testing import assert_close

import normnorm
from normnorm.sync import SyncBatchNormalNorm, revert_sync

X = torch.arange(96.0).reshape(8, 3, 2, 2).sin().exp()


def make_model():
    torch.manual_seed(0)
    model = nn.Sequential(
        normnorm.BatchNormalNormAct2d(3, drop_layer=lambda: nn.Dropout(0.5)),
        normnorm.InstanceNormalNorm2d(3, track_running_stats=True),
        normnorm.LayerNormalNorm(2),
    )
    model(X)
    return model


def buffers(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def moved(model):
    before = buffers(model)
    model(X)
    return {name for name, buffer in model.named_buffers() if not torch.equal(buffer, before[name])}


def test_frozen_statistics_are_used_and_do_not_move_whatever_train_asks():
    model = make_model()
    assert normnorm.freeze_statistics(model) == 2
    model.train()
    assert not moved(model)
    assert model[0].drop.training  # the statistics are frozen, not what else the layer has
    layer = model[1]
    assert torch.equal(layer(X), copy.deepcopy(layer).eval()(X))
    model[0](X).square().sum().backward()
    assert model[0].weight.grad.abs().min() > 0  # the parameters train on
    model.eval()
    model.train()
    assert normnorm.unfreeze_statistics(model) == 2
    assert len(moved(model)) == 8
    assert normnorm.unfreeze_statistics(model) == 0


@pytest.mark.parametrize("mode", [True, False])
def test_measuring_a_model_leaves_the_mode_that_its_frozen_layers_return_to(mode):
    model = make_model().train(mode)
    normnorm.freeze_statistics(model[0])
    normnorm.update_stats([X], model)
    normnorm.diagnostics.diagnose(model, [X])
    normnorm.unfreeze_statistics(model)
    assert {module.training for module in model.modules()} == {mode}


def test_an_unfrozen_layer_has_the_mode_that_was_asked_for_last():
    model = make_model()
    for mode in (True, False):
        normnorm.freeze_statistics(model)
        normnorm.freeze_statistics(model)
        model.train(mode)
        normnorm.unfreeze_statistics(model)
        assert model[0].training == mode
    with pytest.raises(TypeError, match=r"model must be an nn\.Module; got list"):
        normnorm.freeze_statistics([])


@pytest.mark.parametrize(
    "again",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        normnorm.convert_sync,
        lambda model: revert_sync(normnorm.convert_sync(model)),
    ],
    ids=["deepcopy", "pickle", "convert_sync", "revert_sync"],
)
def test_layers_stay_frozen_when_the_model_is(again):
    model = nn.Sequential(normnorm.BatchNormalNorm2d(3))
    normnorm.freeze_statistics(model)
    model = again(model).train()
    assert not moved(model)
    assert isinstance(model[0], SyncBatchNormalNorm) == (again is normnorm.convert_sync)
    normnorm.unfreeze_statistics(model)
    assert moved(model)


def test_a_state_dict_is_loaded_into_frozen_layers():
    source, model = make_model(), make_model()
    source(X)
    normnorm.freeze_statistics(model)
    model.load_state_dict(source.state_dict())
    assert_close(buffers(model), buffers(source), rtol=0, atol=0)
    assert not moved(model.train())


def test_recalibration_leaves_frozen_layers_alone():
    model = nn.Sequential(normnorm.BatchNormalNorm2d(3), normnorm.BatchNormalNorm2d(3))
    model(X)
    normnorm.freeze_statistics(model[0])
    before = buffers(model[0])
    normnorm.update_stats([X + 1, X + 1], model)
    assert_close(buffers(model[0]), before, rtol=0, atol=0)
    assert model[1].num_batches_tracked == 2


def test_frozen_layers_are_not_restored_to_layers_that_cannot_be():
    model = nn.Sequential(normnorm.BatchNormalNorm2d(3))
    normnorm.freeze_statistics(model)
    assert "unfreeze_statistics" in normnorm.restore_norms(model).left[0].reason
    normnorm.unfreeze_statistics(model)
    assert len(normnorm.restore_norms(model).replaced) == 1


def test_folding_into_the_layer_before_is_refused_and_names_the_layer():
    layer = normnorm.BatchNormalNorm2d(4).eval()
    for fold in (
        lambda: fusion.fuse_conv_bn_eval(nn.Conv2d(3, 4, 1).eval(), layer),
        lambda: fusion.fuse_linear_bn_eval(nn.Linear(3, 4).eval(), layer),
        lambda: layer.weight / (layer.running_var + layer.eps).sqrt(),
        lambda: torch.rsqrt(layer.eps + layer.running_var),
        lambda: layer.running_var.clone().add_(layer.eps),
    ):
        with pytest.raises(RuntimeError, match="a BatchNormalNorm2d cannot be folded"):
            fold()


def test_eps_is_a_number_everywhere_else():
    layer = normnorm.BatchNormalNorm2d(3, eps=1e-3).eval()
    again = pickle.loads(pickle.dumps(layer.eps)), copy.deepcopy(layer.eps)
    assert (*again, layer.eps, 1 + layer.eps - 1) == (1e-3, 1e-3, 1e-3, pytest.approx(1e-3))
    assert "eps=0.001" in repr(layer)
    theirs = nn.functional.batch_norm(X, layer.running_mean, layer.running_var, eps=layer.eps)
    assert_close(theirs, layer(X))
    assert_close(X * layer.eps, X * 1e-3)
    exported = torch.export.export(layer, (X,)).module()
    assert torch.equal(exported(X), layer(X))
    with_it = normnorm.BatchNormalNorm2d(3, eps=layer.eps)
    assert type(vars(with_it)["_eps"]) is float
    restored = nn.Sequential(layer)
    normnorm.restore_norms(restored)
    assert type(restored[0].eps) is float
    fusion.fuse_conv_bn_eval(nn.Conv2d(3, 3, 1).eval(), restored[0])
