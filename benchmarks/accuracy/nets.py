"""Networks by name, each built around a normalization layer."""

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


# A network of several copies holds that many networks side by side, which share nothing. It takes
# (N, copies * C, H, W) and returns (N, copies * classes). Each of its parameters and buffers is the
# concatenation of the single networks' along the first dimension.


class Linear(nn.Linear):
    """``copies`` linear layers in one: (copies, ..., inputs) to (copies, ..., outputs)."""

    def __init__(self, inputs: int, outputs: int, copies: int) -> None:
        super().__init__(inputs, copies * outputs)
        self.copies = copies

    def forward(self, input: Tensor) -> Tensor:
        if self.copies == 1:
            return super().forward(input)
        weight = self.weight.unflatten(0, (self.copies, -1))
        bias = self.bias.view(self.copies, 1, -1)
        output = torch.baddbmm(bias, input.flatten(1, -2), weight.mT)
        return output.unflatten(1, input.shape[1:-1])


def _split(images: Tensor, copies: int) -> Tensor:
    """(N, copies * C, ...) as (copies, N, C, ...)."""
    return images.unflatten(1, (copies, -1)).transpose(0, 1)


def _merge(logits: Tensor) -> Tensor:
    """(copies, N, classes) as (N, copies * classes)."""
    return logits.transpose(0, 1).flatten(1)


class ConvNet(nn.Module):
    """Stages of convolution, normalization and ReLU, then a linear head.

    A stage halves an image by pooling. Signals, images of height 1, are halved by the strides of
    the first three convolutions.

    Args:
        norm: makes each stage's normalization layer, for all copies.
        image: (C, H, W).
        classes: outputs.
        widths: channels of each stage.
        copies: networks side by side.
    """

    def __init__(
        self, norm: Norm, image: Sequence[int], classes: int, widths: Sequence[int], copies: int = 1
    ) -> None:
        super().__init__()
        channels, height, width = image
        layers: list[nn.Module] = []
        for stage, features in enumerate(widths):
            # No bias: the normalization layer has one.
            convolution = partial(
                nn.Conv2d, copies * channels, copies * features, groups=copies, bias=False
            )
            after = [norm(copies * features), nn.ReLU()]
            if height == 1:
                stride = 2 if stage < 3 else 1
                layers += [convolution((1, 5), (1, stride), padding=(0, 2)), *after]
                width = -(-width // stride)
            else:
                layers += [convolution(3, padding=1), *after, nn.MaxPool2d(2)]
                height, width = height // 2, width // 2
            channels = features
        self.copies = copies
        self.features = nn.Sequential(*layers)
        self.head = Linear(channels * height * width, classes, copies)

    def forward(self, images: Tensor) -> Tensor:
        return _merge(self.head(_split(self.features(images), self.copies).flatten(2)))


class MLP(nn.Module):
    """Linear layers, each with normalization and ReLU, then a linear head.

    Args:
        norm: makes the normalization layers, of ``width`` features.
        image, classes, copies: see :class:`ConvNet`.
        width: features of a hidden layer.
        depth: hidden layers.
    """

    def __init__(
        self,
        norm: Norm,
        image: Sequence[int],
        classes: int,
        width: int,
        depth: int,
        copies: int = 1,
    ) -> None:
        super().__init__()
        channels, image_height, image_width = image
        inputs = channels * image_height * image_width
        layers: list[nn.Module] = []
        for _ in range(depth):
            layers += [Linear(inputs, width, copies), norm(width), nn.ReLU()]
            inputs = width
        self.copies = copies
        self.layers = nn.Sequential(*layers)
        self.head = Linear(inputs, classes, copies)

    def forward(self, images: Tensor) -> Tensor:
        return _merge(self.head(self.layers(_split(images, self.copies).flatten(2))))


class Block(nn.Module):
    """A pre-normalization transformer block.

    Not torch's encoder layer, whose evaluation path computes a plain LayerNorm from the parameters
    of any layer in its place.
    """

    def __init__(self, norm: Norm, width: int, heads: int, copies: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = norm(width)
        self.qkv = Linear(width, 3 * width, copies)
        self.project = Linear(width, width, copies)
        self.norm2 = norm(width)
        self.mlp = nn.Sequential(
            Linear(width, 2 * width, copies), nn.GELU(), Linear(2 * width, width, copies)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        qkv = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.transpose(-2, -4).unbind(-3)  # (..., heads, tokens, features)
        attended = scaled_dot_product_attention(query, key, value)
        tokens = tokens + self.project(attended.transpose(-2, -3).flatten(-2))
        return tokens + self.mlp(self.norm2(tokens))


class Transformer(nn.Module):
    """A small vision transformer: patches as tokens, a linear head over all of them.

    Args:
        norm: makes the normalization layers, two a block and one before the head.
        image, classes, copies: see :class:`ConvNet`.
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
        copies: int = 1,
    ) -> None:
        super().__init__()
        channels, image_height, image_width = image
        tokens = (image_height // patch[0]) * (image_width // patch[1])
        self.copies = copies
        self.embed = nn.Conv2d(
            copies * channels, copies * width, patch, stride=patch, groups=copies
        )
        self.position = nn.Parameter(0.02 * torch.randn(copies, tokens, width))
        self.blocks = nn.Sequential(*(Block(norm, width, heads, copies) for _ in range(depth)))
        self.last_norm = norm(width)
        self.head = Linear(tokens * width, classes, copies)

    def forward(self, images: Tensor) -> Tensor:
        patches = _split(self.embed(images), self.copies).flatten(3).mT
        tokens = self.blocks(patches + self.position.unsqueeze(1))
        return _merge(self.head(self.last_norm(tokens).flatten(2)))


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


def _convnet(norm: Norm, image: Any, classes: int, width: int, depth: int, copies: int) -> Any:
    width = width or (24 if image[1] == 1 else 16)
    wider = width if image[1] == 1 else 2 * width
    depth = depth or (3 if image[1] == 1 else 2)
    return ConvNet(norm, image, classes, (width, *[wider] * (depth - 1)), copies)


def _mlp(norm: Norm, image: Any, classes: int, width: int, depth: int, copies: int) -> Any:
    return MLP(norm, image, classes, width or 128, depth or 3, copies)


def _transformer(norm: Norm, image: Any, classes: int, width: int, depth: int, copies: int) -> Any:
    patch = (1, 4) if image[1] == 1 else (2, 2)
    return Transformer(norm, image, classes, patch, width or 48, depth or 2, copies=copies)


class Net(NamedTuple):
    """A network by name."""

    build: Callable[..., Any]  # from the norm, the images' shape (C, H, W), the number of classes
    tokens: bool = False  # whether its norms see tokens (..., C) or images (N, C, H, W)
    small: bool = False  # whether ``build`` takes width, depth (None: its own) and copies, too


MODELS: dict[str, Net] = {
    "convnet": Net(_convnet, small=True),
    "mlp": Net(_mlp, tokens=True, small=True),
    "transformer": Net(_transformer, tokens=True, small=True),
    "resnet18": Net(partial(_resnet, name="resnet18")),
    "resnet34": Net(partial(_resnet, name="resnet34")),
    "resnet50": Net(partial(_resnet, name="resnet50")),
    "wrn28-2": Net(partial(WideResNet, depth=28, width=2)),
    "vit": Net(partial(_vit, layers=8, width=768, heads=12), tokens=True),
}


def concatenated(networks: Sequence[nn.Module]) -> dict[str, Tensor]:
    """The state of a network of several copies from single networks; of counters, which have no
    dimension, the first one's."""
    states = [network.state_dict() for network in networks]
    return {
        name: torch.cat([state[name] for state in states]) if value.dim() else value
        for name, value in states[0].items()
    }
