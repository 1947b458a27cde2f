"""Which dimension of a layer's output its channels are, and which layers a caller means."""

from __future__ import annotations

import pytest
import timm.layers
import torch
import torchvision
from torch import nn

import normnorm
from normnorm import watched


class MyNorm2d(nn.LayerNorm):
    """A channels-first layer normalization as users write it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Named(MyNorm2d):
    pass


class EitherLayout(nn.LayerNorm):
    """As transformers has them: the layout is an attribute."""

    def __init__(self, channels: int, data_format: str) -> None:
        super().__init__(channels)
        self.data_format = data_format


class Tokens2d(nn.Module):
    """Its name tells of images, its output is (batch, length, features)."""


class TwoDense(nn.Module):
    """Nothing is read into the "2d" of a word."""


# A layer, the shape of its output, and which dimension the channels are.
LAYERS = {
    "BatchNormalNorm1d": (normnorm.BatchNormalNorm1d(4), (3, 4, 5), 1),
    "BatchNormalNorm1d of vectors": (normnorm.BatchNormalNorm1d(4), (3, 4), 1),
    "BatchNorm1d": (nn.BatchNorm1d(4), (3, 4, 5), 1),
    "SyncBatchNormalNorm": (normnorm.SyncBatchNormalNorm(4), (3, 4, 5), 1),
    "InstanceNormalNorm1d": (normnorm.InstanceNormalNorm1d(4), (3, 4, 5), 1),
    "GroupNormalNorm": (normnorm.GroupNormalNorm(2, 4), (3, 4, 5), 1),
    "BatchNormalNorm3d": (normnorm.BatchNormalNorm3d(4), (3, 4, 5, 6, 7), 1),
    "Conv1d": (nn.Conv1d(4, 4, 1), (3, 4, 5), 1),
    "ConvTranspose1d": (nn.ConvTranspose1d(4, 4, 1), (3, 4, 5), 1),
    "MaxPool1d": (nn.MaxPool1d(2), (3, 4, 5), 1),
    "Conv2d": (nn.Conv2d(4, 4, 1), (3, 4, 5, 6), 1),
    "LayerNormalNorm": (normnorm.LayerNormalNorm(4), (3, 5, 4), -1),
    "LayerNormalNorm of images": (normnorm.LayerNormalNorm(4), (3, 5, 6, 4), -1),
    "LayerNorm": (nn.LayerNorm(4), (3, 5, 6, 4), -1),
    "RMSNorm": (nn.RMSNorm(4), (3, 5, 6, 4), -1),
    "timm's RmsNorm": (timm.layers.RmsNorm(4), (3, 5, 6, 4), -1),
    "Linear": (nn.Linear(4, 4), (3, 5, 6, 4), -1),
    "LayerNormalNorm2d": (normnorm.LayerNormalNorm2d(4), (3, 4, 5, 6), 1),
    "torchvision's LayerNorm2d": (
        torchvision.models.convnext.LayerNorm2d(4), (3, 4, 5, 6), 1
    ),
    "timm's LayerNorm2d": (timm.layers.LayerNorm2d(4), (3, 4, 5, 6), 1),
    "timm's LayerNormAct2dFp32": (timm.layers.LayerNormAct2dFp32(4), (3, 4, 5, 6), 1),
    "a user's": (MyNorm2d(4), (3, 4, 5, 6), 1),
    "derived from a user's": (Named(4), (3, 4, 5, 6), 1),
    "channels_first": (EitherLayout(4, "channels_first"), (3, 4, 5, 6), 1),
    "channels_last": (EitherLayout(4, "channels_last"), (3, 5, 6, 4), -1),
    "ReLU of a sequence": (nn.ReLU(), (3, 5, 4), -1),
    "ReLU of images": (nn.ReLU(), (3, 4, 5, 6), 1),
    "tokens of images": (Tokens2d(), (3, 5, 4), -1),
    "a word": (TwoDense(), (3, 5, 4), -1),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_where_the_channels_are(name: str) -> None:
    layer, shape, channels = LAYERS[name]
    output = torch.randn(shape)
    assert shape[channels] == 4
    assert torch.equal(watched.channels_last(layer, output), output.movedim(channels, -1))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(4, 4), (4,)),
        (nn.ReLU(), ()),
        (nn.Conv1d(4, 4, 1), (4, 5)),
        (nn.Conv2d(4, 4, 1), (4, 5, 6)),
        (nn.InstanceNorm2d(4), (4, 5, 6)),
        (normnorm.InstanceNormalNorm1d(4), (4, 5)),
    ],
    ids=str,
)
def test_a_sample_without_a_batch_is_refused(layer: nn.Module, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"shape \(batch, \.\.\.\) are wanted; \w+ gave \("):
        watched.channels_last(layer, torch.randn(shape))


def test_a_name_is_one_layer() -> None:
    model = nn.ModuleDict({"layer1": nn.ReLU(), "b": nn.ReLU()})
    assert watched.named_layers(model, "layer1") == {"layer1": model["layer1"]}
    assert list(watched.named_layers(model, iter(["b", "layer1"]))) == ["b", "layer1"]
    with pytest.raises(ValueError, match=r"no layer named 'layer2'$"):
        watched.named_layers(model, "layer2")


def test_the_normalized_output_is_taken_and_not_the_sum() -> None:
    layer = normnorm.AddLayerNormalNorm(4, noise_train=0.0)
    normed, total = layer(torch.randn(3, 4), torch.randn(3, 4))
    assert watched.tensor_of("norm", layer, (normed, total)) is normed
    with pytest.raises(TypeError, match=r"'act' \(ReLU\) gave tuple; wanted is a layer that gives"):
        watched.tensor_of("act", nn.ReLU(), (normed, total))
