"""Training one network from one seed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normnorm.demo.data import Split
from normnorm.demo.nets import Norm
from normnorm.demo.normality import normalized_groups
from normnorm.quantiles import qq_r_squared

__all__ = ["Build", "Recipe", "Run", "accuracy", "step_seconds", "train"]

# The network for a norm, an image shape and a number of classes.
Build = Callable[[Norm, tuple[int, ...], int], nn.Module]

_WEIGHT_DECAY = 0.01
_EVALUATION_BATCH = 1000
_NORMALITY_IMAGES = 1000  # enough for the Q-Q plots, little enough for the memory


@dataclass(frozen=True)
class Recipe:
    """What both networks of a pair are trained with: AdamW and one cycle of the learning rate."""

    build: Build
    epochs: int
    batch_size: int
    learning_rate: float

    def batch(self, split: Split) -> int:
        """The batch size, or as many images as there are."""
        return min(self.batch_size, len(split.train_images))

    def steps(self, split: Split) -> int:
        """Training steps of a whole run. An epoch's incomplete last batch is left out."""
        return self.epochs * (len(split.train_images) // self.batch(split))


@dataclass
class Run:
    """What one training run leaves behind.

    Attributes:
        seed: of the initialization, the order of the data, and the noise.
        train_loss: mean over each epoch, noise included.
        test_accuracy: after each epoch, percent. The last one counts: none is picked.
        step_ms: every training step: forward, backward, optimizer.
        qq_r2: of the last normalization layer's groups (:func:`normalized_groups`), their mean.
        groups: those groups.
    """

    seed: int
    train_loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    qq_r2: float = float("nan")
    groups: Tensor = field(default_factory=lambda: torch.empty(0))


class _Trainer:
    """A network with its optimizer and schedule, from a seed."""

    def __init__(self, recipe: Recipe, norm: Norm, split: Split, seed: int) -> None:
        # The initialization; afterwards the noise's seeds come from the same generator. The
        # normalization layers draw nothing while they are built, so a pair starts out equal.
        torch.manual_seed(seed)
        shape = tuple(split.train_images.shape[1:])
        self.network = recipe.build(norm, shape, split.classes)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=recipe.learning_rate, weight_decay=_WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, recipe.learning_rate, total_steps=recipe.steps(split)
        )

    def step(self, images: Tensor, labels: Tensor) -> float:
        loss = cross_entropy(self.network(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


@torch.no_grad()
def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent of the images classified rightly, in evaluation mode."""
    network.eval()
    batches = zip(images.split(_EVALUATION_BATCH), labels.split(_EVALUATION_BATCH), strict=True)
    right = sum(int((network(x).argmax(1) == y).sum()) for x, y in batches)
    return 100.0 * right / len(labels)


def train(
    recipe: Recipe, norm: Norm, split: Split, seed: int, on_step: Callable[[], object]
) -> Run:
    """Trains a fresh network and measures it.

    Args:
        recipe: how.
        norm: the normalization layer's class.
        split: on what.
        seed: fixes everything random. Equal seeds give pairs that differ in the layer alone.
        on_step: called after every training step.
    """
    run = Run(seed)
    trainer = _Trainer(recipe, norm, split, seed)
    order = torch.Generator().manual_seed(seed)
    count, size = len(split.train_images), recipe.batch(split)
    for _ in range(recipe.epochs):
        trainer.network.train()
        losses = []
        for batch in torch.randperm(count, generator=order)[: count - count % size].split(size):
            images, labels = split.train_images[batch], split.train_labels[batch]
            began = time.perf_counter()
            losses.append(trainer.step(images, labels))
            run.step_ms.append(1e3 * (time.perf_counter() - began))
            on_step()
        run.train_loss.append(sum(losses) / len(losses))
        run.test_accuracy.append(accuracy(trainer.network, split.test_images, split.test_labels))
    last_norm = trainer.network.last_norm
    assert isinstance(last_norm, nn.Module)  # torch types every attribute as Tensor | Module
    images = split.test_images[:_NORMALITY_IMAGES]
    run.groups = normalized_groups(trainer.network, last_norm, images)
    run.qq_r2 = float(qq_r_squared(run.groups).nanmean())
    return run


def step_seconds(recipe: Recipe, norm: Norm, split: Split, repeats: int = 3) -> float:
    """About how long a training step takes: what the progress bar weighs the runs with."""
    trainer = _Trainer(recipe, norm, split, seed=0)
    images, labels = (x[: recipe.batch(split)] for x in (split.train_images, split.train_labels))
    seconds = []
    for _ in range(min(repeats + 1, recipe.steps(split))):
        began = time.perf_counter()
        trainer.step(images, labels)
        seconds.append(time.perf_counter() - began)
    return median(seconds[1:] or seconds)
