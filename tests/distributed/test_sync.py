"""Synchronised layers over several processes equal one process that holds the whole batch: the
cases of sync_cases.py. Without a process group they are the plain layers."""

import copy
import pickle

import pytest
import ranks
import sync_cases
import torch
from torch import nn

import normnorm
from normnorm.sync import SyncBatchNormalNormAct2d, revert_sync


@pytest.mark.parametrize("name", ranks.names(sync_cases.__name__))
def test_on_every_rank(name, request):
    ranks.check(name, request)


# Without a process group


@pytest.mark.parametrize(
    ("plain", "built", "options"),
    [
        (normnorm.BatchNormalNorm2d, normnorm.SyncBatchNormalNorm, {}),
        (normnorm.BatchNormalNormAct2d, SyncBatchNormalNormAct2d, {}),
        (normnorm.BatchNormalNormAct2d, SyncBatchNormalNormAct2d, {"act_layer": nn.SiLU}),
        (normnorm.BatchNormalNormAct2d, SyncBatchNormalNormAct2d, {"drop_layer": nn.Dropout}),
    ],
)
def test_alone_it_is_the_plain_layer(plain, built, options):
    alone = plain(4, **options)
    input, residual = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    with_residual = built is SyncBatchNormalNormAct2d and "drop_layer" not in options
    given = (input, residual) if with_residual else (input,)
    for layer in (built(4, **options), normnorm.convert_sync(copy.deepcopy(alone))):
        expected = copy.deepcopy(alone)
        for training in (True, False):
            outputs = []
            for one in (layer, expected):
                torch.manual_seed(1)
                outputs.append(one.train(training)(*given))
            assert torch.equal(*outputs)
        for name, buffer in expected.named_buffers():
            assert torch.equal(layer.get_buffer(name), buffer)
    if "drop_layer" in options:
        with pytest.raises(ValueError, match="residual behind a dropout"):
            layer(input, residual)


def test_constructors_have_the_order_of_torch_and_of_the_plain_layer():
    group = object()
    layer = normnorm.SyncBatchNormalNorm(
        3, 1e-3, 0.2, True, True, group, "cpu", torch.float64, bias=False, noise_train=0.1,
        alpha=0.5, order=1, transform_eps=1e-3,
    )  # fmt: skip
    fused = SyncBatchNormalNormAct2d(
        3, 1e-3, 0.2, True, True, True, nn.LeakyReLU, {"negative_slope": 0.3}, False, None, "cpu",
        torch.float64, bias=False, noise_train=0.1, process_group=group,
    )  # fmt: skip
    theirs = nn.SyncBatchNorm(3, 1e-3, 0.2, True, True, group, "cpu", torch.float64)
    for ours in (layer, fused):
        assert ours.process_group is theirs.process_group
        assert (ours.eps, ours.momentum, ours.weight.dtype) == (1e-3, 0.2, torch.float64)
        assert ours.noise_train == 0.1
        assert ours.bias is None
    assert "noise_train=0.1, alpha=0.5, order=1, transform_eps=0.001" in repr(layer)
    assert fused.act.negative_slope == 0.3
    assert type(revert_sync(fused)) is SyncBatchNormalNormAct2d  # it was never anything else


def test_takes_inputs_of_any_rank_from_two_on():
    layer = normnorm.SyncBatchNormalNorm(3)
    for shape in ((5, 3), (5, 3, 4), (5, 3, 2, 2, 2)):
        assert layer(torch.randn(shape)).shape == shape
    with pytest.raises(ValueError, match="at least 2D"):
        layer(torch.randn(3))
    with pytest.raises(ValueError, match="3 channels"):
        layer(torch.randn(5, 4))


# Conversion


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        normnorm.BatchNormalNorm2d(4, noise_train=0.3),
        nn.Sequential(nn.BatchNorm2d(4), normnorm.BatchNormalNorm2d(4, affine=False)),
        normnorm.InstanceNormalNorm2d(4),
    )


def test_conversion_leaves_other_layers_alone_and_is_undone():
    model = normnorm.convert_sync(network())
    kinds = nn.BatchNorm2d, normnorm.SyncBatchNormalNorm, normnorm.InstanceNormalNorm2d
    assert tuple(map(type, (*model[2], model[3]))) == kinds
    assert normnorm.convert_sync(model[1]) is model[1]  # nothing left to do
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert tuple(map(type, model[2])) == (nn.SyncBatchNorm, normnorm.SyncBatchNormalNorm)
    built = normnorm.SyncBatchNormalNorm(4)
    model.append(built)
    assert revert_sync(model) is model
    assert type(model[1]) is type(model[2][1]) is normnorm.BatchNormalNorm2d
    assert not hasattr(model[1], "process_group")
    assert type(built) is normnorm.SyncBatchNormalNorm
    model[1](torch.randn(2, 4, 5, 5))


def test_norm_and_activation_are_converted_in_place_and_back():
    layer = normnorm.BatchNormalNormAct2d(
        4, act_layer=nn.SiLU, drop_layer=nn.Dropout, noise_train=0.3
    )
    called = []
    layer.register_forward_hook(lambda *_: called.append("layer"))
    layer.act.register_forward_hook(lambda *_: called.append("act"))
    kept = dict(vars(layer))
    objects = {name: id(t) for name, t in (*layer.named_parameters(), *layer.named_buffers())}
    group = object()
    assert normnorm.convert_sync(layer, group) is layer
    assert type(layer) is SyncBatchNormalNormAct2d
    assert isinstance(layer, normnorm.SyncBatchNormalNorm)
    assert layer.process_group is group
    assert vars(layer).keys() - kept.keys() == {"process_group", "_before_sync"}
    assert all(vars(layer)[name] is value for name, value in kept.items())
    assert objects == {
        name: id(t) for name, t in (*layer.named_parameters(), *layer.named_buffers())
    }
    layer.eval()(torch.randn(2, 4, 5, 5))
    assert called == ["act", "layer"]
    pickled = pickle.loads(pickle.dumps(normnorm.convert_sync(normnorm.BatchNormalNormAct2d(4))))
    assert type(revert_sync(pickled)) is normnorm.BatchNormalNormAct2d
    assert revert_sync(layer) is layer
    assert type(layer) is normnorm.BatchNormalNormAct2d
    assert vars(layer).keys() == kept.keys()


class Mine(normnorm.BatchNormalNorm2d):
    pass


def test_conversion_refuses_what_it_would_lose_and_converts_nothing():
    model = nn.Sequential(normnorm.BatchNormalNorm2d(4), nn.Sequential(Mine(4)))
    with pytest.raises(TypeError, match=r"'1\.0' is a Mine"):
        normnorm.convert_sync(model)
    assert type(model[0]) is normnorm.BatchNormalNorm2d
    with pytest.raises(TypeError, match=r"'' is a Mine"):
        normnorm.convert_sync(Mine(4))
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module; got int"):
        normnorm.convert_sync(3)
