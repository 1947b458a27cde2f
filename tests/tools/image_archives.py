"""Miniature data sets, ``count`` images a part, in the on-disk format of torchvision's classes."""

from __future__ import annotations

import itertools
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import scipy.io
import torch
from PIL import Image

# Seeded anew for each archive, so that none depends on those before it.
_random = np.random.default_rng(0)


def _pixels(*shape: int) -> np.ndarray:
    return _random.integers(0, 256, shape, dtype=np.uint8)


def _labels(count: int, classes: int) -> np.ndarray:
    return np.arange(count) % classes


def _picture(path: Path, size: tuple[int, int] = (40, 30), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = _pixels(size[1], size[0], 3) if mode == "RGB" else _pixels(size[1], size[0])
    Image.fromarray(image).save(path)


def _mnist(root: Path, count: int) -> None:
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        images = struct.pack(">IIII", 0x803, count, 28, 28) + _pixels(count, 28, 28).tobytes()
        labels = struct.pack(">II", 0x801, count) + _labels(count, 10).astype(np.uint8).tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(images)
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(labels)


def _svhn(root: Path, count: int) -> None:
    for part in ("train", "test"):
        labels = _labels(count, 10)
        labels[labels == 0] = 10  # the archive's word for the digit 0
        content = {"X": _pixels(32, 32, 3, count), "y": labels[:, None].astype(np.uint8)}
        scipy.io.savemat(root / f"{part}_32x32.mat", content)


def _cifar(folder: str, parts: list[str], key: str, meta: tuple[str, str], classes: int) -> Any:
    def write(root: Path, count: int) -> None:
        base = root / folder
        base.mkdir()
        for part in parts:
            content = {"data": _pixels(count, 3072), key: _labels(count, classes).tolist()}
            (base / part).write_bytes(pickle.dumps(content))
        names = {meta[1]: [str(i) for i in range(classes)]}
        (base / meta[0]).write_bytes(pickle.dumps(names))

    return write


def _stl10(root: Path, count: int) -> None:
    base = root / "stl10_binary"
    base.mkdir()
    for part in ("train", "test"):
        (base / f"{part}_X.bin").write_bytes(_pixels(count, 3, 96, 96).tobytes())
        (base / f"{part}_y.bin").write_bytes((_labels(count, 10) + 1).astype(np.uint8).tobytes())
    (base / "unlabeled_X.bin").write_bytes(b"")
    (base / "class_names.txt").write_text("\n".join(str(i) for i in range(10)))


def _tiny_imagenet(root: Path, count: int) -> None:
    base = root / "tiny-imagenet-200"
    words = [f"n{i:08d}" for i in range(3)]
    lines = []
    for i in range(count):
        word = words[i % len(words)]
        _picture(base / f"train/{word}/images/{word}_{i}.JPEG", (64, 64))
        # Some of the archive's images are grey.
        _picture(base / f"val/images/val_{i}.JPEG", (64, 64), "L" if i == 0 else "RGB")
        lines.append(f"val_{i}.JPEG\t{word}\t0\t0\t63\t63")
    (base / "val/val_annotations.txt").write_text("\n".join(lines) + "\n")


def _caltech101(root: Path, count: int) -> None:
    base = root / "caltech101"
    (base / "Annotations").mkdir(parents=True)
    for name in ("BACKGROUND_Google", "anchor", "brain"):
        for i in range(count):
            _picture(base / f"101_ObjectCategories/{name}/image_{i + 1:04d}.jpg")


def _food101(root: Path, count: int) -> None:
    base = root / "food-101"
    for part in ("train", "test"):
        names = {c: [f"{c}/{part}{i}" for i in range(count)] for c in ("apple_pie", "waffles")}
        for name in itertools.chain(*names.values()):
            _picture(base / f"images/{name}.jpg")
        (base / "meta").mkdir(exist_ok=True)
        (base / f"meta/{part}.json").write_text(json.dumps(names))


def _imagenet(root: Path, count: int) -> None:
    words = {"n00000001": ("tench",), "n00000002": ("goldfish",)}
    for part in ("train", "val"):
        for word in words:
            for i in range(count):
                _picture(root / part / word / f"{part}_{i}.JPEG")
    torch.save((words, list(words) * count), root / "meta.bin")


_WRITERS: dict[str, Callable[[Path, int], None]] = {
    "mnist": _mnist,
    "svhn": _svhn,
    "cifar10": _cifar(
        "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"],
        "labels", ("batches.meta", "label_names"), 10,
    ),
    "cifar100": _cifar(
        "cifar-100-python", ["train", "test"], "fine_labels", ("meta", "fine_label_names"), 100
    ),
    "stl10": _stl10,
    "tinyimagenet": _tiny_imagenet,
    "caltech101": _caltech101,
    "food101": _food101,
    "imagenet": _imagenet,
}  # fmt: skip


def write(monkeypatch: Any, name: str, root: Path, count: int = 6) -> None:
    """Writes the miniature of a data set where torchvision looks for it, and has torchvision take
    files without their checksums."""
    global _random
    _random = np.random.default_rng(0)
    root.mkdir(parents=True, exist_ok=True)
    _WRITERS[name](root, count)
    for module in ("cifar", "stl10", "svhn"):
        check = f"torchvision.datasets.{module}.check_integrity"
        monkeypatch.setattr(check, lambda path, md5=None: Path(path).is_file())
