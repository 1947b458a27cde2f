"""Data sets by name, read by torchvision's own classes (the digits by scikit-learn's)."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from normnorm.demo.data import load_digits
from normnorm.experiments.libraries import ExperimentError, torchvision_datasets

__all__ = ["DATASETS", "Images", "Spec", "load"]


@dataclass(frozen=True)
class Spec:
    """A data set by name.

    Attributes:
        open: (directory, train) to a map-style data set of (image, label).
        fetch: Python that downloads it into ``{root}``, or None with ``page`` to say where it is.
        size: height and width that every image is brought to.
        channels: of the images.
        classes: of the labels.
        mean, std: of a channel's values in 0 to 1; those commonly used.
        page: where the data set is found, if no command fetches it.
    """

    open: Callable[[Path, bool], Any]
    fetch: str | None
    size: int
    channels: int
    classes: int
    mean: Sequence[float]
    std: Sequence[float]
    page: str = ""


def _class(name: str, **split: tuple[Any, Any]) -> Callable[[Path, bool], Any]:
    """torchvision's class of that name; ``split`` has an argument's value for training and for
    testing."""

    def open_(directory: Path, train: bool) -> Any:
        arguments = {key: values[0 if train else 1] for key, values in split.items()}
        return getattr(torchvision_datasets(), name)(str(directory), **arguments)

    return open_


def _tiny_imagenet(directory: Path, train: bool) -> Any:
    """Stanford's archive: train/<class>/images/*.JPEG, and val/images with val_annotations.txt."""
    root = directory / "tiny-imagenet-200"
    datasets = torchvision_datasets()
    training = datasets.ImageFolder(str(root / "train"))
    if train:
        return training
    pairs = [
        line.split("\t")[:2] for line in (root / "val/val_annotations.txt").read_text().splitlines()
    ]
    paths = [(str(root / "val/images" / name), training.class_to_idx[word]) for name, word in pairs]
    held_out = datasets.ImageFolder(str(root / "train"))
    held_out.samples = held_out.imgs = paths
    held_out.targets = [label for _, label in paths]
    return held_out


def _caltech101(directory: Path, train: bool) -> Any:
    """It has no test images of its own: a fifth of them, drawn once and for all, is held out."""
    whole = _class("Caltech101")(directory, train)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(whole) // 5
    return Subset(whole, order[cut:] if train else order[:cut])


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _download(call: str) -> str:
    return f"from torchvision.datasets import *; {call}"


DATASETS: dict[str, Spec] = {
    "mnist": Spec(
        _class("MNIST", train=(True, False)), _download("MNIST({root}, download=True)"),
        28, 1, 10, (0.1307,), (0.3081,),
    ),
    "svhn": Spec(
        _class("SVHN", split=("train", "test")),
        _download("[SVHN({root}, s, download=True) for s in ('train', 'test')]"),
        32, 3, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970),
    ),
    "cifar10": Spec(
        _class("CIFAR10", train=(True, False)), _download("CIFAR10({root}, download=True)"),
        32, 3, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Spec(
        _class("CIFAR100", train=(True, False)), _download("CIFAR100({root}, download=True)"),
        32, 3, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
    "stl10": Spec(
        _class("STL10", split=("train", "test")), _download("STL10({root}, download=True)"),
        96, 3, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713),
    ),
    "tinyimagenet": Spec(
        _tiny_imagenet, None, 64, 3, 200, *_IMAGENET,
        page="http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked in that directory",
    ),
    "caltech101": Spec(
        _caltech101, _download("Caltech101({root}, download=True)"), 224, 3, 101, *_IMAGENET
    ),
    "food101": Spec(
        _class("Food101", split=("train", "test")), _download("Food101({root}, download=True)"),
        224, 3, 101, *_IMAGENET,
    ),
    "imagenet": Spec(
        _class("ImageNet", split=("train", "val")), None, 224, 3, 1000, *_IMAGENET,
        page="https://image-net.org/download.php: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
        "and ILSVRC2012_devkit_t12.tar.gz in that directory",
    ),
}  # fmt: skip


class Images(Dataset[tuple[Tensor, int]]):
    """A data set's images as standardized float32 tensors (C, size, size).

    An image is resized so that its shorter side has the size, and its middle is taken.
    """

    def __init__(self, source: Any, spec: Spec) -> None:
        self._source, self._spec = source, spec
        self._mean = torch.tensor(spec.mean).view(-1, 1, 1)
        self._std = torch.tensor(spec.std).view(-1, 1, 1)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._source[index]
        values = torch.from_numpy(np.array(self._square(image), dtype=np.float32)) / 255
        values = values.unsqueeze(0) if values.dim() == 2 else values.movedim(-1, 0)
        return (values - self._mean) / self._std, int(label)

    def _square(self, image: Any) -> Any:
        size = self._spec.size
        image = image.convert("L" if self._spec.channels == 1 else "RGB")
        if image.size == (size, size):
            return image
        shorter = min(image.size)
        width, height = (round(side * size / shorter) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        return image.resize((width, height), resample=2).crop((left, top, left + size, top + size))


def load(
    name: str, directory: Path, seed: int, limit: int | None = None
) -> tuple[Dataset[tuple[Tensor, int]], Dataset[tuple[Tensor, int]], tuple[int, int, int], int]:
    """Training and test images, an image's shape and the number of classes.

    Args:
        name: "digits" or one of :data:`DATASETS`.
        directory: where torchvision's classes find their files. Nothing is downloaded.
        seed: of the digits' split into training and test images.
        limit: at most so many training images, and as many test images; the first of a fixed
            random order.

    Raises:
        ValueError: no data set has that name.
        ExperimentError: the data are not there; the sentence holds the command that fetches them.
    """
    train: Any
    test: Any
    if name == "digits":
        split = load_digits(seed)
        train = torch.utils.data.TensorDataset(split.train_images, split.train_labels)
        test = torch.utils.data.TensorDataset(split.test_images, split.test_labels)
        shape, classes = (1, 8, 8), 10
    elif name in DATASETS:
        spec = DATASETS[name]
        train, test = (Images(_open(name, spec, directory, t), spec) for t in (True, False))
        shape, classes = (spec.channels, spec.size, spec.size), spec.classes
    else:
        raise ValueError(f"dataset must be one of digits, {', '.join(DATASETS)}; got '{name}'")
    if limit is not None:
        train, test = _first(train, limit), _first(test, limit)
    return train, test, shape, classes


def _open(name: str, spec: Spec, directory: Path, train: bool) -> Any:
    try:
        return spec.open(directory, train)
    except (OSError, RuntimeError) as error:
        if spec.fetch is None:
            how = f"It is at {spec.page}."
        else:
            code = spec.fetch.format(root=repr(str(directory)))
            how = f"This command fetches it: python -c {shlex.quote(code)}"
        raise ExperimentError(
            f"'{name}' is not in {directory} ({str(error).splitlines()[0]}). {how}"
        ) from None


def _first(data: Any, limit: int) -> Any:
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return Subset(data, order[:limit].tolist())
