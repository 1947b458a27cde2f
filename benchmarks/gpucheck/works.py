"""What the benchmark measures, in the order of its worth: a run that is cut off has the best of it.

The shapes are those of the targets in ``targets.py``; the engine is ``normnorm/bench``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from normnorm.bench.networks import Network
from normnorm.bench.networks import networks as of_preset
from normnorm.bench.work import RESNET50, Work

__all__ = ["Item", "Joined", "definitions", "first", "joined", "last", "networks"]

OURS = ("normnorm-cuda", "normnorm-triton")
_LAYERS = (*OURS, "torch", "cudnn", "copy")
_ROWS = (*OURS, "torch", "copy")
# The method written down in PyTorch operations: compiled, and as it stands.
_DEFINITIONS = (*OURS, "torch", "compiled-reference", "reference", "compiled-torch")
_BATCH = 256
# One early, one middle and one late layer of the network.
_KEY_SHAPES = ((64, 56, 56), (256, 28, 28), (2048, 7, 7))
_FORMATS = ("contiguous", "channels_last")
_DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True)
class Item:
    """One work and who does it.

    Attributes:
        work: of the engine.
        providers: by the engine's names.
        seconds: an estimate of what it takes on a GPU; it is left out where less is left.
    """

    work: Work
    providers: tuple[str, ...]
    seconds: float = 2.0


def _resnet(shape: tuple[int, ...], dtype: str, memory_format: str, *operations: str) -> Item:
    work = Work(
        layer="BatchNormalNorm2d", shape=(_BATCH, *shape), dtype=dtype,
        memory_format=memory_format, operations=operations, method="graph", suite="resnet",
    )  # fmt: skip
    return Item(work, _LAYERS, 2.0 + work.elements * 2e-8)


def _rows(length: int, dtype: str, *operations: str, rows: int = 16384) -> Item:
    work = Work(
        layer="LayerNormalNorm", shape=(rows, length), dtype=dtype, operations=operations,
        method="graph", suite="tokens",
    )  # fmt: skip
    return Item(work, _ROWS, 2.0 + work.elements * 2e-8)


def _small() -> Iterator[Item]:
    """With launches: what Python, torch and the driver take."""
    for layer, shape in (
        ("BatchNormalNorm2d", (2, 4, 2, 2)),
        ("BatchNormalNorm2d", (32, 64, 8, 8)),
        ("BatchNormalNorm1d", (32, 64)),
        ("LayerNormalNorm", (32, 256)),
    ):
        work = Work(
            layer=layer, shape=shape, operations=("forward", "full"), method="stream",
            suite="small",
        )  # fmt: skip
        yield Item(work, (*OURS, "torch"))


def _most_telling() -> Iterator[Item]:
    everything = ("forward", "backward", "full")
    for dtype in _DTYPES:
        yield _resnet(_KEY_SHAPES[0], dtype, "contiguous", *everything)
        yield _rows(4096, dtype, *everything)
    yield _resnet(_KEY_SHAPES[0], "bfloat16", "channels_last", "full")
    for length in (768, 1024, 2048, 8192):
        yield _rows(length, "bfloat16", "full")
    for shape in ((3136, 256), (65536, 64), (1_000_000, 64)):
        work = Work(
            layer="BatchNormalNorm1d", shape=shape, operations=("full",), method="graph",
            suite="features",
        )  # fmt: skip
        yield Item(work, _LAYERS, 3.0)
    yield from _small()
    for item in (
        _resnet((256, 56, 56), "bfloat16", "contiguous", "forward"),
        _rows(4096, "bfloat16", "forward"),
    ):
        yield replace(item, work=replace(item.work, mode="eval"))
    largest = Work(
        layer="BatchNormalNorm2d", shape=(64, 128, 256, 256), dtype="float16",
        operations=("forward",), method="graph", suite="largest",
    )  # fmt: skip
    yield Item(largest, (*OURS, "torch", "copy"), 12.0)


def _other_shapes() -> Iterator[Item]:
    """The rest of the network's shapes, dtypes and formats."""
    done = {(_KEY_SHAPES[0], "bfloat16", f) for f in _FORMATS}
    done.add((_KEY_SHAPES[0], "float32", "contiguous"))
    shapes = [*_KEY_SHAPES, *(shape for shape in RESNET50 if shape not in _KEY_SHAPES)]
    for shape in shapes:
        for dtype in _DTYPES:
            for memory_format in _FORMATS:
                if (shape, dtype, memory_format) not in done:
                    yield _resnet(shape, dtype, memory_format, "full")


def definitions(dry: bool) -> Iterator[Item]:
    """Beside the method in PyTorch operations: seconds of compilation each, so they come last."""
    for item in (
        _resnet(_KEY_SHAPES[0], "bfloat16", "contiguous", "full"),
        _rows(4096, "bfloat16", "full"),
    ):
        work = replace(item.work, suite="definition")
        if dry:
            work = replace(work, shape=(4, 8) if "Layer" in work.layer else (2, 3, 4, 4))
            work = replace(work, method="wall", dtype="float32")
        # Compiling is tried on a GPU alone: it takes as long for tiny shapes.
        names = _DEFINITIONS if not dry else tuple(n for n in _DEFINITIONS if "comp" not in n)
        yield Item(work, names, 45.0)


def _tiny(items: Iterator[Item]) -> list[Item]:
    """One work of each kind, as small as it can be, for a CPU."""
    shapes = {
        "BatchNormalNorm2d": (2, 3, 4, 4), "BatchNormalNorm1d": (6, 3), "LayerNormalNorm": (4, 8),
    }  # fmt: skip
    found: dict[object, Item] = {}
    for item in items:
        work = replace(item.work, shape=shapes[item.work.layer], method="wall", dtype="float32")
        found.setdefault((work.suite, work.layer, work.mode), replace(item, work=work))
    return list(found.values())


def first(dry: bool) -> list[Item]:
    """What is measured before anything else."""
    return _tiny(_most_telling()) if dry else list(_most_telling())


def last(dry: bool) -> list[Item]:
    """What is measured while there is time."""
    return _tiny(_other_shapes()) if dry else list(_other_shapes())


@dataclass(frozen=True)
class Joined:
    """A norm with a neighbour's work, by the words of ``benchmarks/fused.py``."""

    what: str
    shape: tuple[int, ...]
    memory_format: str = "contiguous"
    dtype: str = "bfloat16"


def joined(dry: bool) -> list[Joined]:
    """What the norm's own pass takes over from its neighbours."""
    if dry:
        return [
            Joined("residual stream", (4, 8), dtype="float32"),
            Joined("residual + relu", (2, 3, 4, 4), dtype="float32"),
        ]
    image = (_BATCH, 256, 28, 28)
    return [
        Joined("residual stream", (16384, 4096)),
        *(
            Joined(what, image, layout)
            for what in ("relu", "residual + relu")
            for layout in _FORMATS
        ),
    ]


def networks(dry: bool) -> list[Network]:
    """Whole training steps, the most telling first: a ResNet-50, a language model, a ViT."""
    if dry:
        return [replace(network, batch=1) for network in of_preset("quick", "cpu")]
    known = {network.name: network for network in of_preset("default", "cuda")}
    names = ("resnet50", "encoder", "vit_small_patch16_224")
    return [known[name] for name in names]
