"""Networks by name, each built around a normalization layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from accuracy.data import torchvision
from normnorm.cli import CommandError

# A layer's class, or anything that makes a layer for a number of features.
Norm = Callable[[int], nn.Module]
_SMALL = 64  # residual networks take images up to this size without their early subsampling


class ConvNet(nn.Module):
    """Stages of convolution, normalization, ReLU and pooling, then a linear head.

    Args:
        norm: makes each stage's normalization layer.
        image: (C, H, W).
        classes: outputs.
        widths: channels of each stage; a stage halves height and width.
    """

    def __init__(
        self, norm: Norm, image: Sequence[int], classes: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        channels, height, width = image
        layers: list[nn.Module] = []
        for features in widths:
            # No bias: the normalization layer has one.
            convolution = nn.Conv2d(channels, features, 3, padding=1, bias=False)
            layers += [convolution, norm(features), nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = features, height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class Block(nn.Module):
    """A pre-normalization transformer block.

    Not torch's encoder layer, whose evaluation path computes a plain LayerNorm from the parameters
    of any layer in its place.
    """

    def __init__(self, norm: Norm, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.transpose(1, 3).unbind(2)  # (batch, heads, tokens, features)
        attended = scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.project(attended.transpose(1, 2).flatten(2))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """A small vision transformer: patches as tokens, a linear head over all of them.

    Args:
        norm: makes the normalization layers, two a block and one before the head.
        image: (C, H, W).
        classes: outputs.
        patch: height and width of a patch.
        width: features of a token.
        depth: blocks.
        heads: attention heads; must divide ``width``.
    """

    def __init__(
        self,
        norm: Norm,
        image: Sequence[int],
        classes: int,
        patch: tuple[int, int],
        width: int,
        depth: int,
        heads: int = 4,
    ) -> None:
        super().__init__()
        channels, image_height, image_width = image
        tokens = (image_height // patch[0]) * (image_width // patch[1])
        self.embed = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(norm, width, heads) for _ in range(depth)))
        self.last_norm = norm(width)
        self.head = nn.Linear(tokens * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.last_norm(self.blocks(tokens)).flatten(1))


class _WideBlock(nn.Module):
    """Norm, ReLU, convolution, twice. Where the shape changes, the shortcut is a convolution of
    the first ReLU's output."""

    def __init__(self, norm: Norm, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.norm1(x))
        residual = x if self.shortcut is None else self.shortcut(activated)
        return residual + self.conv2(self.relu(self.norm2(self.conv1(activated))))


class WideResNet(nn.Sequential):
    """WRN-depth-width of Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016): three
    stages of (depth - 4) / 6 blocks with 16, 32 and 64 times ``width`` channels."""

    def __init__(
        self, norm: Norm, image: Sequence[int], classes: int, depth: int, width: int
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(image[0], 16, 3, padding=1, bias=False)]
        inputs = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range((depth - 4) // 6):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_WideBlock(norm, inputs, outputs, stride))
                inputs = outputs
        layers += [norm(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, nn.Linear(inputs, classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(norm: Norm, image: Sequence[int], classes: int, name: str) -> nn.Module:
    network = getattr(torchvision("models"), name)(num_classes=classes, norm_layer=norm)
    if image[1] <= _SMALL:
        network.conv1 = nn.Conv2d(image[0], 64, 3, padding=1, bias=False)
        network.maxpool = nn.Identity()
    elif image[0] != 3:
        network.conv1 = nn.Conv2d(image[0], 64, 7, stride=2, padding=3, bias=False)
    return network


def _vit(
    norm: Norm, image: Sequence[int], classes: int, layers: int, width: int, heads: int
) -> nn.Module:
    channels, height, image_width = image
    if height != image_width:
        raise CommandError(f"the vision transformer takes square images; got {image}")
    patch = 4 if height <= _SMALL else 16
    network = torchvision("models").VisionTransformer(
        image_size=height, patch_size=patch, num_layers=layers, num_heads=heads,
        hidden_dim=width, mlp_dim=4 * width, num_classes=classes, norm_layer=norm,
    )  # fmt: skip
    if channels != 3:
        network.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
    return network


class Net(NamedTuple):
    """A network by name.

    Attributes:
        build: makes it from the norm, the images' shape (C, H, W) and the number of classes.
        tokens: whether its norms see tokens (N, L, C) or images (N, C, H, W).
    """

    build: Callable[[Norm, tuple[int, int, int], int], Any]
    tokens: bool = False


MODELS: dict[str, Net] = {
    "convnet": Net(partial(ConvNet, widths=(16, 32))),
    "transformer": Net(partial(Transformer, patch=(2, 2), width=48, depth=2), tokens=True),
    "resnet18": Net(partial(_resnet, name="resnet18")),
    "resnet34": Net(partial(_resnet, name="resnet34")),
    "resnet50": Net(partial(_resnet, name="resnet50")),
    "wrn28-2": Net(partial(WideResNet, depth=28, width=2)),
    "vit": Net(partial(_vit, layers=8, width=768, heads=12), tokens=True),
}
