"""Networks by name, each built around a normalization layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from normnorm.demo.nets import ConvNet, Transformer
from normnorm.experiments.libraries import ExperimentError, torchvision_models
from normnorm.experiments.wide_resnet import WideResNet

__all__ = ["MODELS", "Net", "Norm"]

Norm = Callable[[int], nn.Module]
_SMALL = 64  # images up to this size meet a residual network without its early subsampling


@dataclass(frozen=True)
class Net:
    """A network by name.

    Attributes:
        build: makes it from the norm, the images' shape (C, H, W) and the number of classes.
        tokens: whether its norms see tokens (N, L, C) or images (N, C, H, W).
    """

    build: Callable[[Norm, tuple[int, int, int], int], nn.Module]
    tokens: bool = False


def _convnet(norm: Norm, image: tuple[int, int, int], classes: int) -> nn.Module:
    return ConvNet(norm, image, classes, widths=(16, 32))


def _transformer(norm: Norm, image: tuple[int, int, int], classes: int) -> nn.Module:
    return Transformer(norm, image, classes, patch=(2, 2), width=48, depth=2)


def _resnet(name: str) -> Callable[[Norm, tuple[int, int, int], int], nn.Module]:
    def build(norm: Norm, image: tuple[int, int, int], classes: int) -> nn.Module:
        channels, height, _ = image
        network = getattr(torchvision_models(), name)(num_classes=classes, norm_layer=norm)
        if height <= _SMALL:
            network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
            network.maxpool = nn.Identity()
        elif channels != 3:
            network.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
        return network

    return build


def _wide_resnet(norm: Norm, image: tuple[int, int, int], classes: int) -> nn.Module:
    return WideResNet(norm, image[0], classes, depth=28, width=2)


def _vit(layers: int, width: int, heads: int) -> Callable[..., nn.Module]:
    def build(norm: Norm, image: tuple[int, int, int], classes: int) -> nn.Module:
        channels, height, width_ = image
        if height != width_:
            raise ExperimentError(f"the vision transformer takes square images; got {image}")
        patch = 4 if height <= _SMALL else 16
        network = torchvision_models().VisionTransformer(
            image_size=height, patch_size=patch, num_layers=layers, num_heads=heads,
            hidden_dim=width, mlp_dim=4 * width, num_classes=classes, norm_layer=norm,
        )  # fmt: skip
        if channels != 3:
            network.conv_proj = nn.Conv2d(channels, width, patch, stride=patch)
        return network

    return build


MODELS: dict[str, Net] = {
    "convnet": Net(_convnet),
    "transformer": Net(_transformer, tokens=True),
    "resnet18": Net(_resnet("resnet18")),
    "resnet34": Net(_resnet("resnet34")),
    "resnet50": Net(_resnet("resnet50")),
    "wrn28-2": Net(_wide_resnet),
    "vit": Net(_vit(layers=8, width=768, heads=12), tokens=True),
}
