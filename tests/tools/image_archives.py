"""Miniature data sets, ``count`` images a part, in the on-disk format of torchvision's classes."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

_random = np.random.default_rng(0)


def _pixels(*shape):
    return _random.integers(0, 256, shape, dtype=np.uint8)


def _picture(path, size, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = _pixels(size[1], size[0], 3) if mode == "RGB" else _pixels(size[1], size[0])
    Image.fromarray(image).save(path)


def _cifar10(root, count):
    base = root / "cifar-10-batches-py"
    base.mkdir()
    for part in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        content = {"data": _pixels(count, 3072), "labels": list(range(count))}
        (base / part).write_bytes(pickle.dumps(content))
    names = {"label_names": [str(i) for i in range(10)]}
    (base / "batches.meta").write_bytes(pickle.dumps(names))


def _tiny_imagenet(root, count):
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


def _caltech101(root, count):
    base = root / "caltech101"
    (base / "Annotations").mkdir(parents=True)
    for name in ("BACKGROUND_Google", "anchor", "brain"):
        for i in range(count):
            _picture(base / f"101_ObjectCategories/{name}/image_{i + 1:04d}.jpg", (40, 30))


WRITERS = {"cifar10": _cifar10, "tinyimagenet": _tiny_imagenet, "caltech101": _caltech101}


def write(monkeypatch, name, root, count=6):
    """Writes the miniature of a data set where torchvision looks for it, and has torchvision take
    CIFAR-10's files without their checksums."""
    root.mkdir(parents=True, exist_ok=True)
    WRITERS[name](root, count)
    check = "torchvision.datasets.cifar.check_integrity"
    monkeypatch.setattr(check, lambda path, md5=None: Path(path).is_file())
