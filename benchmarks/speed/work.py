"""What is measured: layers, shapes, dtypes and modes, and the presets that list them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

import normnorm
from speed.results import MemoryFormat, Method, Mode, Operation, input_words

Preset = Literal["quick", "default", "full"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5


class WorkError(ValueError):
    """Work that does not exist, as a sentence for the user."""


@dataclass(frozen=True)
class Layer:
    """A normality layer and what stands beside it.

    Attributes:
        ours, torchs: the class, and its counterpart in torch.nn.
        kind: the definition's word for what a group of elements is.
        ranks: how many dimensions an input may have.
        keywords: what both constructors get beside the sizes.
    """

    ours: type[nn.Module]
    torchs: type[nn.Module]
    kind: Literal["batch", "layer", "group", "instance"]
    ranks: tuple[int, ...]
    keywords: tuple[tuple[str, Any], ...] = ()


_AFFINE = (("affine", True),)
LAYERS = {
    layer.ours.__name__: layer
    for layer in (
        Layer(normnorm.BatchNormalNorm1d, nn.BatchNorm1d, "batch", (2, 3)),
        Layer(normnorm.BatchNormalNorm2d, nn.BatchNorm2d, "batch", (4,)),
        Layer(normnorm.BatchNormalNorm3d, nn.BatchNorm3d, "batch", (5,)),
        Layer(normnorm.LayerNormalNorm, nn.LayerNorm, "layer", (2, 3, 4)),
        Layer(normnorm.GroupNormalNorm, nn.GroupNorm, "group", (3, 4, 5)),
        Layer(normnorm.InstanceNormalNorm1d, nn.InstanceNorm1d, "instance", (3,), _AFFINE),
        Layer(normnorm.InstanceNormalNorm2d, nn.InstanceNorm2d, "instance", (4,), _AFFINE),
        Layer(normnorm.InstanceNormalNorm3d, nn.InstanceNorm3d, "instance", (5,), _AFFINE),
    )
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One layer on one kind of input in one mode; the fields are those of a result row.

    Of the operations evaluation has the forward pass alone.

    Raises:
        WorkError: the shape does not fit the layer, or the memory format the shape.
    """

    layer: str
    shape: tuple[int, ...]
    groups: int = 0
    dtype: str = "float32"
    memory_format: MemoryFormat = "contiguous"
    mode: Mode = "noise"
    operations: tuple[Operation, ...] = ("forward", "backward", "full")
    method: Method = "wall"
    suite: str
    x_name: str = "elements"

    def __post_init__(self) -> None:
        if self.mode == "eval":
            forward = tuple(o for o in self.operations if o == "forward")
            object.__setattr__(self, "operations", forward)
        layer, text = LAYERS[self.layer], self.shape_text
        if len(self.shape) not in layer.ranks:
            wanted = " or ".join(map(str, layer.ranks))
            raise WorkError(
                f"{self.layer} takes inputs of {wanted} dimensions; got shape {text} "
                f"of {len(self.shape)}"
            )
        if any(size < 1 for size in self.shape):
            raise WorkError(f"every size must be at least 1; got shape {text}")
        if layer.kind == "group" and (self.groups < 1 or self.shape[1] % self.groups):
            raise WorkError(
                f"{self.layer}: {self.groups} groups do not divide {self.shape[1]} channels "
                f"(shape {text})"
            )
        if self.group_size < 2:
            raise WorkError(f"{self.layer} needs more than one value in a group; got shape {text}")
        if self.memory_format == "channels_last" and len(self.shape) not in (4, 5):
            raise WorkError(f"channels_last needs 4 or 5 dimensions; got shape {text}")

    @property
    def kind(self) -> str:
        return LAYERS[self.layer].kind

    @property
    def shape_text(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def group_size(self) -> int:
        """Elements that are normalized together."""
        if self.kind == "layer":
            return self.shape[-1]
        if self.kind == "batch":
            return self.elements // self.shape[1]
        return self.elements // (self.shape[0] * (self.groups or self.shape[1]))

    @property
    def parameters(self) -> int:
        """Elements of the weight."""
        return self.shape[-1] if self.kind == "layer" else self.shape[1]

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def torch_memory_format(self) -> torch.memory_format:
        if self.memory_format == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    @property
    def x_value(self) -> float:
        """The value of what its sweep varies."""
        return {
            "elements": self.elements,
            "batch size": self.shape[0],
            "channels": self.shape[1],
            "row length": self.shape[-1],
        }[self.x_name]

    def model_bytes(self, operation: Operation) -> int:
        """Bytes that a kernel of one read and one write a pass moves: x and y in the forward
        pass, x, the gradient of y and that of x in the backward pass."""
        passes = {"forward": 2, "backward": 3, "full": 5}[operation]
        return passes * self.elements * self.torch_dtype.itemsize

    def constructor(self) -> tuple[tuple[int, ...], dict[str, Any]]:
        """Arguments that make the layer, ours or torch's."""
        keywords = dict(LAYERS[self.layer].keywords)
        sizes = (self.groups, self.shape[1]) if self.kind == "group" else (self.parameters,)
        return sizes, {**keywords, "eps": EPS}

    def __str__(self) -> str:
        words = input_words(self.shape, self.groups, self.dtype, self.memory_format)
        launches = " with launches" if self.method == "stream" else ""
        return f"{self.layer} {words}{launches} {self.mode}"


# Inputs of ResNet's batch layers on 224 x 224 images, (channels, height, width), each shape once.
RESNET18 = ((64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7))
RESNET50 = (
    (64, 112, 112), (64, 56, 56), (256, 56, 56), (128, 56, 56), (128, 28, 28), (512, 28, 28),
    (256, 28, 28), (256, 14, 14), (1024, 14, 14), (512, 14, 14), (512, 7, 7), (2048, 7, 7),
)  # fmt: skip
ROW_LENGTHS = (192, 384, 768, 1024, 2048, 4096, 8192, 16384)
_GROUPS = 32


def _resnet(batches: Sequence[int], shapes: Sequence[tuple[int, ...]]) -> Iterator[Work]:
    for batch in batches:
        for shape in shapes:
            yield Work(layer="BatchNormalNorm2d", shape=(batch, *shape), suite="resnet")


def _features(shapes: Sequence[tuple[int, int]]) -> Iterator[Work]:
    for shape in shapes:
        yield Work(layer="BatchNormalNorm1d", shape=shape, suite="features")


def _tokens(shapes: Sequence[tuple[int, int]]) -> Iterator[Work]:
    for shape in shapes:
        yield Work(layer="LayerNormalNorm", shape=shape, suite="tokens")


def _others(scale: int) -> Iterator[Work]:
    """Every layer kind that the other suites leave out."""
    group: dict[str, Any] = {"layer": "GroupNormalNorm", "groups": _GROUPS, "suite": "group"}
    yield Work(**group, shape=(scale, 256, 56, 56))
    yield Work(**group, shape=(scale, 320, 64, 64))
    instance: dict[str, Any] = {"suite": "instance"}
    yield Work(layer="InstanceNormalNorm1d", shape=(scale, 64, 1024), **instance)
    yield Work(layer="InstanceNormalNorm2d", shape=(scale, 64, 128, 128), **instance)
    yield Work(layer="InstanceNormalNorm3d", shape=(max(1, scale // 4), 32, 32, 32, 32), **instance)
    volume = (max(1, scale // 4), 32, 16, 56, 56)
    yield Work(layer="BatchNormalNorm3d", shape=volume, suite="volumes")


def _small() -> Iterator[Work]:
    for method in ("wall", "stream"):
        common: dict[str, Any] = {"suite": "small", "method": method}
        yield Work(layer="BatchNormalNorm2d", shape=(2, 4, 2, 2), **common)
        yield Work(layer="BatchNormalNorm2d", shape=(32, 16, 8, 8), **common)
        yield Work(layer="BatchNormalNorm1d", shape=(32, 64), **common)
        yield Work(layer="LayerNormalNorm", shape=(1, 768), **common)
        yield Work(layer="LayerNormalNorm", shape=(32, 256), **common)


def _sweeps(largest_batch: int, most_channels: int, rows: int, longest: int) -> Iterator[Work]:
    batch = 1
    while batch <= largest_batch:
        shape = (batch, 64, 56, 56)
        yield Work(layer="BatchNormalNorm2d", shape=shape, suite="batch sweep", x_name="batch size")
        batch *= 4 if largest_batch <= 32 else 2
    channels = 16
    while channels <= most_channels:
        yield Work(
            layer="BatchNormalNorm2d", shape=(32, channels, 28, 28), suite="channel sweep",
            x_name="channels",
        )  # fmt: skip
        channels *= 4 if most_channels <= 256 else 2
    for length in ROW_LENGTHS:
        if length <= longest:
            yield Work(
                layer="LayerNormalNorm", shape=(rows, length), suite="row sweep",
                x_name="row length",
            )  # fmt: skip


_QUICK = (
    Work(layer="BatchNormalNorm2d", shape=(8, 64, 28, 28), suite="resnet"),
    Work(layer="BatchNormalNorm1d", shape=(8192, 64), suite="features"),
    Work(layer="LayerNormalNorm", shape=(1024, 384), suite="tokens"),
)


def _default(device: str) -> Iterator[Work]:
    """On a CPU smaller batches and shorter sweeps: the same run is to end within half an hour."""
    if device == "cpu":
        yield from _resnet((32,), RESNET50[1:2] + RESNET18[2:])
        yield from _features(((3136, 256), (65536, 64)))
        yield from _tokens(((6304, 384), (2048, 768), (512, 4096)))
        yield from _others(4)
        yield from _small()
        yield from _sweeps(16, 256, 1024, 4096)
    else:
        yield from _resnet((256,), RESNET50)
        yield from _features(((3136, 256), (65536, 64), (1_000_000, 64)))
        yield from _tokens(((6304, 384), (12608, 768), (8192, 4096), (4096, 16384)))
        yield from _others(32)
        yield from _small()
        yield from _sweeps(256, 2048, 8192, 16384)


def _full(device: str) -> Iterator[Work]:
    batches = (32, 64) if device == "cpu" else (32, 64, 128, 256)
    yield from _resnet(batches, tuple(dict.fromkeys(RESNET50 + RESNET18)))
    yield from _features(((3136, 256), (65536, 64), (1_000_000, 64)))
    yield from _tokens(tuple((6304, length) for length in ROW_LENGTHS[:4]))
    yield from _tokens(((8192, 4096), (4096, 8192), (4096, 16384)))
    yield from _others(8 if device == "cpu" else 32)
    yield from _small()
    yield from _sweeps(*((64, 1024, 4096, 16384) if device == "cpu" else (256, 2048, 8192, 16384)))


def _dtypes(name: Preset, device: str) -> tuple[str, ...]:
    if name == "full":
        return tuple(DTYPES)
    return ("float32",) if device == "cpu" else ("float32", "bfloat16")


def _variants(work: Work, name: Preset, device: str) -> Iterator[Work]:
    """The work in every dtype, memory format and mode of a preset."""
    formats: tuple[MemoryFormat, ...] = ("contiguous",)
    if len(work.shape) == 4 and work.kind in ("batch", "group") and name != "quick":
        formats = ("contiguous", "channels_last")
    if "sweep" in work.suite or work.suite == "small":
        formats = ("contiguous",)
    modes: tuple[Mode, ...] = ("noise", "eval") if name == "quick" else ("noise", "quiet", "eval")
    if "sweep" in work.suite and name != "full":
        modes = ("noise",)
    for dtype in _dtypes(name, device):
        for memory_format in formats:
            for mode in modes:
                yield replace(work, dtype=dtype, memory_format=memory_format, mode=mode)


def _for_device(work: Work, device: str) -> Work:
    if device == "cpu":
        return replace(work, method="wall")
    return replace(work, method="graph") if work.method == "wall" else work


def preset(name: Preset, device: str) -> list[Work]:
    """The works of a preset, each once.

    Args:
        name: "quick" (three shapes), "default" or "full" (hours).
        device: "cpu" or "cuda".
    """
    base: Iterable[Work] = _QUICK
    if name == "default":
        base = _default(device)
    elif name == "full":
        base = _full(device)
    works = [_for_device(w, device) for one in base for w in _variants(one, name, device)]
    # Shapes that several suites share are measured once for each question, but not twice for one.
    return list(dict.fromkeys(works))


def named_shapes(
    layers: Sequence[str], shapes: Sequence[tuple[int, ...]], name: Preset, device: str
) -> list[Work]:
    """Works for shapes that the user gives, in the dtypes, formats and modes of a preset.

    Args:
        layers: class names; empty for the batch layer of a shape's rank, and for LayerNormalNorm
            where it has two dimensions.

    Raises:
        WorkError: a shape does not fit a layer that was named.
    """
    works = []
    for shape in shapes:
        fitting = layers or [
            layer for layer, about in LAYERS.items()
            if (about.kind == "batch" and len(shape) in about.ranks)
            or (about.kind == "layer" and len(shape) == 2)
        ]  # fmt: skip
        if not fitting:
            raise WorkError(
                f"no layer takes an input of {len(shape)} dimensions; got shape "
                f"{'x'.join(map(str, shape))}"
            )
        for layer in fitting:
            grouped = LAYERS[layer].kind == "group" and len(shape) > 1
            groups = math.gcd(_GROUPS, shape[1]) if grouped else 0
            work = Work(layer=layer, shape=shape, groups=groups, suite="named")
            works += [_for_device(w, device) for w in _variants(work, name, device)]
    return list(dict.fromkeys(works))
