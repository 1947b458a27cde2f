"""The channel dimension of a layer's output, selection of layers, and hooks."""

import copy
import pickle
from collections.abc import Callable

import pytest
import timm.layers
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torchvision.models import convnext

import normnorm
from normnorm import layer_outputs


class EitherLayout(nn.LayerNorm):
    """As in transformers: the layout is an attribute."""

    def __init__(self, channels, data_format):
        super().__init__(channels)
        self.data_format = data_format


class Tokens2d(nn.Module):
    """Named for images, with an output (batch, length, features)."""


class TwoDense(nn.Module):
    """A "2d" inside another word of the name has no meaning."""


# A layer, the shape of its output, and the channels' dimension.
LAYERS = {
    "BatchNormalNorm1d": (normnorm.BatchNormalNorm1d(4), (3, 4, 5), 1),
    "GroupNormalNorm": (normnorm.GroupNormalNorm(2, 4), (3, 4, 5), 1),
    "Conv1d": (nn.Conv1d(4, 4, 1), (3, 4, 5), 1),
    "Conv2d": (nn.Conv2d(4, 4, 1), (3, 4, 5, 6), 1),
    "LayerNormalNorm": (normnorm.LayerNormalNorm(4), (3, 5, 4), -1),
    "RMSNorm": (nn.RMSNorm(4), (3, 5, 6, 4), -1),
    "Linear": (nn.Linear(4, 4), (3, 5, 6, 4), -1),
    "LayerNormalNorm2d": (normnorm.LayerNormalNorm2d(4), (3, 4, 5, 6), 1),
    "torchvision's LayerNorm2d": (convnext.LayerNorm2d(4), (3, 4, 5, 6), 1),
    "timm's LayerNormAct2dFp32": (timm.layers.LayerNormAct2dFp32(4), (3, 4, 5, 6), 1),
    "channels_first": (EitherLayout(4, "channels_first"), (3, 4, 5, 6), 1),
    "channels_last": (EitherLayout(4, "channels_last"), (3, 5, 6, 4), -1),
    "ReLU of a sequence": (nn.ReLU(), (3, 5, 4), -1),
    "ReLU of images": (nn.ReLU(), (3, 4, 5, 6), 1),
    "tokens of images": (Tokens2d(), (3, 5, 4), -1),
    "a word": (TwoDense(), (3, 5, 4), -1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_channel_dimension_by_class(name):
    layer, shape, channels = LAYERS[name]
    output = torch.randn(shape)
    assert shape[channels] == 4
    assert torch.equal(layer_outputs.channels_last(layer, output), output.movedim(channels, -1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 4), (4,)), (nn.Conv1d(4, 4, 1), (4, 5)), (nn.Conv2d(4, 4, 1), (4, 5, 6)),
        (nn.InstanceNorm2d(4), (4, 5, 6)),
    ],
    ids=str,
)  # fmt: skip
def test_a_sample_without_a_batch_is_refused(layer, shape):
    with pytest.raises(ValueError, match=r"shape \(batch, \.\.\.\) are wanted; \w+ gave \("):
        layer_outputs.channels_last(layer, torch.randn(shape))


def test_the_normalized_output_is_taken_and_not_the_sum():
    layer = normnorm.AddLayerNormalNorm(4, noise_train=0.0)
    normed, total = layer(torch.randn(3, 4), torch.randn(3, 4))
    assert layer_outputs.tensor_of("norm", layer, (normed, total)) is normed
    with pytest.raises(TypeError, match=r"'act' \(ReLU\) gave tuple; wanted is a layer that gives"):
        layer_outputs.tensor_of("act", nn.ReLU(), (normed, total))


def test_layers_are_found_by_all_their_names_and_by_a_predicate():
    layer, other = nn.ReLU(), nn.ReLU()
    model = nn.ModuleDict({"layer1": layer, "b": other, "c": layer})
    assert layer_outputs.named_layers(model, "layer1") == {"layer1": layer}
    assert list(layer_outputs.named_layers(model, iter(["c", "b"])).items()) == [
        ("c", layer), ("b", other),
    ]  # fmt: skip
    found = layer_outputs.named_layers(model, lambda _, module: isinstance(module, nn.ReLU))
    assert found == {"layer1": layer, "b": other}
    with pytest.raises(ValueError, match=r"no layer named 'layer2'$"):
        layer_outputs.named_layers(model, "layer2")


def test_names_are_those_without_the_compiler():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    compiled = torch.compile(nn.Sequential(torch.compile(model)))
    for name in ("0.1", "_orig_mod.0._orig_mod.1"):
        assert list(layer_outputs.named_layers(compiled, name).values()) == [model[1]]
    found = layer_outputs.named_layers(compiled, lambda _, module: isinstance(module, nn.Linear))
    assert found == {"0.0": model[0]}


def _watching(model):
    """A watch of layer "1", and its recorded outputs."""
    seen: list[str] = []
    layers = layer_outputs.named_layers(model, "1")
    return layer_outputs.Watch(model, layers, lambda name, *_: seen.append(name), "the test"), seen


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "copy": lambda model: nn.Sequential(*map(copy.copy, model)),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": AveragedModel,
    "DataParallel's replica": lambda model: nn.Sequential(
        *(layer._replicate_for_data_parallel() for layer in model)
    ),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_a_watched_model_is_not_watched(kind):
    model = nn.Sequential(nn.Tanh(), nn.ReLU())
    watch, seen = _watching(model)
    COPIES[kind](model)(torch.randn(2, 3))
    assert seen == []
    with pytest.raises(RuntimeError, match=r"no layer was seen: .* a copy of the model"):
        watch.require_ran()
    model(torch.randn(2, 3))
    assert seen == ["1"]
    watch.require_ran()


def test_a_part_compiled_before_is_named():
    torch.compiler.reset()
    model = nn.Sequential(nn.Linear(3, 3), torch.compile(nn.ReLU(), backend="eager"))
    model(torch.randn(2, 3))
    layers = layer_outputs.named_layers(model, ["0", "1"])
    watch = layer_outputs.Watch(model, layers, lambda *_: None, "the test")
    model(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match="'1' was not seen: code compiled before the test began"):
        watch.require_ran()
    torch.compiler.reset()
    model(torch.randn(2, 3))
    watch.require_ran()


def test_layers_of_torchscript_are_refused():
    model = torch.jit.trace(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(2, 3))
    with pytest.raises(TypeError, match="the test cannot watch '1': it is a module of TorchScript"):
        _watching(model)
