"""What is measured: layers, shapes, dtypes and modes, and the presets that list them."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

import normnorm
from normnorm.cli import CommandError
from speed.results import MemoryFormat, Method, Mode, Operation, input_words

Preset = Literal["quick", "default", "full"]
Shapes = Sequence[tuple[int, ...]]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPS = 1e-5


@dataclass(frozen=True)
class Layer:
    """A normality layer and what stands beside it."""

    ours: type[nn.Module]
    torchs: type[nn.Module]  # its counterpart in torch.nn
    kind: Literal["batch", "layer", "group", "instance"]  # what a group of elements is
    ranks: tuple[int, ...]  # how many dimensions an input may have
    keywords: tuple[tuple[str, Any], ...] = ()  # that both constructors get beside the sizes


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
        CommandError: the shape does not fit the layer, or the memory format the shape.
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
        layer, text = LAYERS[self.layer], "x".join(map(str, self.shape))
        if len(self.shape) not in layer.ranks:
            wanted = " or ".join(map(str, layer.ranks))
            raise CommandError(
                f"{self.layer} takes inputs of {wanted} dimensions; got shape {text} "
                f"of {len(self.shape)}"
            )
        if any(size < 1 for size in self.shape):
            raise CommandError(f"every size must be at least 1; got shape {text}")
        if layer.kind == "group" and (self.groups < 1 or self.shape[1] % self.groups):
            raise CommandError(
                f"{self.layer}: {self.groups} groups do not divide {self.shape[1]} channels "
                f"(shape {text})"
            )
        if self.group_size < 2:
            raise CommandError(
                f"{self.layer} needs more than one value in a group; got shape {text}"
            )
        if self.memory_format == "channels_last" and len(self.shape) not in (4, 5):
            raise CommandError(f"channels_last needs 4 or 5 dimensions; got shape {text}")

    @property
    def kind(self) -> str:
        return LAYERS[self.layer].kind

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


def _others(scale: int) -> Iterator[Work]:
    """Every layer kind that the other suites leave out."""
    volumes = max(1, scale // 4)
    for image in ((256, 56, 56), (320, 64, 64)):
        yield Work(layer="GroupNormalNorm", groups=_GROUPS, shape=(scale, *image), suite="group")
    inputs: Shapes = (scale, 64, 1024), (scale, 64, 128, 128), (volumes, 32, 32, 32, 32)
    for rank, shape in enumerate(inputs, start=1):
        yield Work(layer=f"InstanceNormalNorm{rank}d", shape=shape, suite="instance")
    yield Work(layer="BatchNormalNorm3d", shape=(volumes, 32, 16, 56, 56), suite="volumes")


def _small() -> Iterator[Work]:
    methods: tuple[Method, ...] = ("wall", "stream")
    for method in methods:
        for layer, shape in (
            ("BatchNormalNorm2d", (2, 4, 2, 2)),
            ("BatchNormalNorm2d", (32, 16, 8, 8)),
            ("BatchNormalNorm1d", (32, 64)),
            ("LayerNormalNorm", (1, 768)),
            ("LayerNormalNorm", (32, 256)),
        ):
            yield Work(layer=layer, shape=shape, suite="small", method=method)


def _growing(first: int, last: int, factor: int) -> Iterator[int]:
    while first <= last:
        yield first
        first *= factor


def _sweeps(largest_batch: int, most_channels: int, rows: int, longest: int) -> Iterator[Work]:
    layer = "BatchNormalNorm2d"
    for batch in _growing(1, largest_batch, 4 if largest_batch <= 32 else 2):
        shape = (batch, 64, 56, 56)
        yield Work(layer=layer, shape=shape, suite="batch sweep", x_name="batch size")
    for channels in _growing(16, most_channels, 4 if most_channels <= 256 else 2):
        shape = (32, channels, 28, 28)
        yield Work(layer=layer, shape=shape, suite="channel sweep", x_name="channels")
    for length in ROW_LENGTHS:
        if length <= longest:
            yield Work(
                layer="LayerNormalNorm", shape=(rows, length), suite="row sweep",
                x_name="row length",
            )  # fmt: skip


def _base(name: Preset, device: str) -> Iterator[Work]:
    """The works of a preset, each once. On a CPU smaller batches and shorter sweeps: the default
    preset is to end within half an hour."""
    cpu = device == "cpu"
    batches: Sequence[int] = (256,)
    images: Shapes = RESNET50
    features: Shapes = ((3136, 256), (65536, 64), (1_000_000, 64))
    tokens: Shapes = ((6304, 384), (12608, 768), (8192, 4096), (4096, 16384))
    others, sweeps = 32, (256, 2048, 8192, 16384)
    if name == "quick":
        batches, images = (8,), ((64, 28, 28),)
        features, tokens = ((8192, 64),), ((1024, 384),)
    elif name == "full":
        batches = (32, 64) if cpu else (32, 64, 128, 256)
        images = tuple(dict.fromkeys(RESNET50 + RESNET18))
        tokens = [(6304, length) for length in ROW_LENGTHS[:4]]
        tokens += [(8192, 4096), (4096, 8192), (4096, 16384)]
        if cpu:
            others, sweeps = 8, (64, 1024, 4096, 16384)
    elif cpu:
        batches, images = (32,), RESNET50[1:2] + RESNET18[2:]
        features, tokens = features[:2], ((6304, 384), (2048, 768), (512, 4096))
        others, sweeps = 4, (16, 256, 1024, 4096)
    for layer, suite, shapes in (
        ("BatchNormalNorm2d", "resnet", [(batch, *i) for batch in batches for i in images]),
        ("BatchNormalNorm1d", "features", features),
        ("LayerNormalNorm", "tokens", tokens),
    ):
        for shape in shapes:
            yield Work(layer=layer, shape=shape, suite=suite)
    if name != "quick":
        yield from _others(others)
        yield from _small()
        yield from _sweeps(*sweeps)


def _variants(work: Work, name: Preset, device: str) -> Iterator[Work]:
    """The work in every dtype, memory format and mode of a preset, by the device's method."""
    sweep, small = "sweep" in work.suite, work.suite == "small"
    formats: tuple[MemoryFormat, ...] = ("contiguous",)
    if len(work.shape) == 4 and work.kind in ("batch", "group") and name != "quick":
        formats = ("contiguous",) if sweep or small else ("contiguous", "channels_last")
    modes: tuple[Mode, ...] = ("noise", "eval") if name == "quick" else ("noise", "quiet", "eval")
    if sweep and name != "full":
        modes = ("noise",)
    dtypes = ("float32",) if device == "cpu" else ("float32", "bfloat16")
    on_gpu: Method = "stream" if work.method == "stream" else "graph"
    method: Method = "wall" if device == "cpu" else on_gpu
    for dtype in tuple(DTYPES) if name == "full" else dtypes:
        for memory_format in formats:
            for mode in modes:
                yield replace(
                    work, dtype=dtype, memory_format=memory_format, mode=mode, method=method
                )


def preset(name: Preset, device: str) -> list[Work]:
    """The works of a preset, each once.

    Args:
        name: "quick" (three shapes), "default" or "full" (hours).
        device: "cpu" or "cuda".
    """
    works = [w for one in _base(name, device) for w in _variants(one, name, device)]
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
        CommandError: a shape does not fit a layer that was named.
    """
    works: list[Work] = []
    for shape in shapes:
        fitting = layers or [
            layer for layer, about in LAYERS.items()
            if (about.kind == "batch" and len(shape) in about.ranks)
            or (about.kind == "layer" and len(shape) == 2)
        ]  # fmt: skip
        if not fitting:
            raise CommandError(
                f"no layer takes an input of {len(shape)} dimensions; got shape "
                f"{'x'.join(map(str, shape))}"
            )
        for layer in fitting:
            grouped = LAYERS[layer].kind == "group" and len(shape) > 1
            groups = math.gcd(_GROUPS, shape[1]) if grouped else 0
            work = Work(layer=layer, shape=shape, groups=groups, suite="named")
            works += _variants(work, name, device)
    return list(dict.fromkeys(works))
