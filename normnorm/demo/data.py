"""The data: scikit-learn's handwritten digits, or CIFAR-10 through torchvision."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normnorm.commands import CommandError

__all__ = ["DemoError", "Split", "load_cifar10", "load_digits"]

_TEST_SHARE = 0.25


class DemoError(CommandError):
    """A sentence for the user: why the demonstration cannot run."""


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), float32, standardized; labels (N,), int64."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def classes(self) -> int:
        return int(self.train_labels.max()) + 1


def _split(train: Tensor, train_labels: Any, test: Tensor, test_labels: Any) -> Split:
    """Standardizes the channels by the training images' mean and deviation, in place."""
    dims = (0, 2, 3)
    mean, std = train.mean(dims, keepdim=True), train.std(dims, keepdim=True)
    return Split(
        train.sub_(mean).div_(std),
        torch.as_tensor(train_labels, dtype=torch.int64),
        test.sub_(mean).div_(std),
        torch.as_tensor(test_labels, dtype=torch.int64),
    )


def load_digits(seed: int) -> Split:
    """The 1797 handwritten digits, (1, 8, 8) each, that scikit-learn carries with it.

    A quarter of every class is held out for testing, drawn anew for each seed, so that an
    average over seeds rests on most of the images.
    """
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    images = images.astype("float32").reshape(-1, 1, 8, 8)
    train, test, train_labels, test_labels = train_test_split(
        images, labels, test_size=_TEST_SHARE, stratify=labels, random_state=seed
    )
    return _split(torch.from_numpy(train), train_labels, torch.from_numpy(test), test_labels)


def load_cifar10(directory: Path) -> Split:
    """CIFAR-10's 50,000 training and 10,000 test images, (3, 32, 32), as torchvision reads them.

    Raises:
        DemoError: torchvision is missing or broken, or the images are not in ``directory``. The
            sentence holds the command that fetches what is missing; nothing is fetched here.
    """
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise DemoError(
            "CIFAR-10 is read through torchvision, which is not installed: pip install torchvision"
        ) from None
    except RuntimeError as error:  # built for another torch
        reason = str(error).splitlines()[0]
        raise DemoError(
            f"the installed torchvision does not work with torch {torch.__version__} ({reason}); "
            "pip install --upgrade torchvision fetches one that may"
        ) from None
    parts = []
    for train in (True, False):
        try:
            part = CIFAR10(str(directory), train=train, download=False)
        except (OSError, RuntimeError) as error:
            code = f"from torchvision.datasets import CIFAR10; CIFAR10({str(directory)!r}, "
            command = f"python -c {shlex.quote(code + 'download=True)')}"
            raise DemoError(
                f"CIFAR-10 is not in {directory} ({error}). This command fetches it: {command}"
            ) from None
        parts += [torch.from_numpy(part.data).movedim(-1, 1).float().contiguous(), part.targets]
    return _split(*parts)
