"""Wide residual networks: Zagoruyko and Komodakis, "Wide Residual Networks" (BMVC 2016)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["WideResNet"]

Norm = Callable[[int], nn.Module]


class _Block(nn.Module):
    """Norm, ReLU, convolution, twice; the shortcut starts behind the first ReLU where it
    changes the shape."""

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


class WideResNet(nn.Module):
    """WRN-depth-width: three stages of (depth - 4) / 6 blocks with 16, 32, 64 times ``width``
    channels.

    Args:
        norm: makes each normalization layer.
        channels: of the images.
        classes: outputs.
        depth: 6 n + 4.
        width: the widening factor.
    """

    def __init__(self, norm: Norm, channels: int, classes: int, depth: int, width: int) -> None:
        super().__init__()
        blocks = (depth - 4) // 6
        layers: list[nn.Module] = [nn.Conv2d(channels, 16, 3, padding=1, bias=False)]
        inputs = 16
        for stage, outputs in enumerate((16 * width, 32 * width, 64 * width)):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(_Block(norm, inputs, outputs, stride))
                inputs = outputs
        layers += [norm(inputs), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
