"""The two networks, each built around whichever normalization layer it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

__all__ = ["ConvNet", "Norm", "Transformer"]

# A layer's class, or anything that makes a layer for a number of features.
Norm = Callable[[int], nn.Module]


class ConvNet(nn.Module):
    """Stages of convolution, normalization, ReLU and pooling, then a linear head.

    Args:
        norm: makes each stage's normalization layer.
        image: (C, H, W).
        classes: outputs.
        widths: channels of each stage; a stage halves height and width.

    Attributes:
        last_norm: the last stage's normalization layer.
    """

    def __init__(
        self, norm: Norm, image: Sequence[int], classes: int, widths: Sequence[int]
    ) -> None:
        super().__init__()
        channels, height, width = image
        layers: list[nn.Module] = []
        for features in widths:
            self.last_norm = norm(features)
            # No bias: the normalization layer's takes its place.
            convolution = nn.Conv2d(channels, features, 3, padding=1, bias=False)
            layers += [convolution, self.last_norm, nn.ReLU(), nn.MaxPool2d(2)]
            channels, height, width = features, height // 2, width // 2
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


class Block(nn.Module):
    """A pre-normalization transformer block.

    Written out, since the evaluation path of torch's own encoder layer computes a plain
    LayerNorm from the parameters of whatever layer stands in its place.
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
        norm: makes the normalization layers, two a block and a last one.
        image: (C, H, W).
        classes: outputs.
        patch: height and width of a patch.
        width: features of a token.
        depth: blocks.
        heads: attention heads; must divide ``width``.

    Attributes:
        last_norm: the normalization layer before the head.
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
