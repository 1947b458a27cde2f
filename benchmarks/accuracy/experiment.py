"""An experiment: every choice that the outcome of a training run depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from accuracy.data import DATASETS
from accuracy.nets import MODELS
from accuracy.norms import make_norm
from normnorm.cli import CommandError

_CHOICES = {
    "dataset": tuple(DATASETS),
    "model": tuple(MODELS),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine", "cycle"),
    "amp": ("none", "bfloat16", "float16"),
}


@dataclass(frozen=True)
class Experiment:
    """One training run, or several that differ in nothing but the seed and are trained as one."""

    dataset: str = "digits"  # this and the next two by name
    model: str = "convnet"
    norm: str = "batchnormal"
    width: int | None = None  # of the small networks; None for the model's own
    depth: int | None = None
    # Of the data (where they are drawn or split), the initialization, the order of the data, the
    # augmentation and the noise.
    seed: int = 2
    # Runs that are trained as one network of so many copies, with the seeds from ``seed`` on.
    # Copies share the generators of augmentation and noise, nothing else.
    copies: int = 1
    # Whether the network is evaluated on the validation set in place of the test set; where a data
    # set has none, a tenth of the training set is held out for it.
    validation: bool = False
    epochs: int = 20  # passes over the training images; an incomplete last batch is left out
    evaluate_every: int = 1  # epochs between evaluations; the last epoch has one in any case
    batch_size: int = 64  # over all processes together
    optimizer: str = "sgd"  # with ``momentum``; or "adamw"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    # Of the learning rate: "step", times ``gamma`` after every ``step_epochs`` (0 for never),
    # "cosine" to zero over the whole run, or "cycle", torch's OneCycleLR.
    schedule: str = "step"
    step_epochs: int = 0
    gamma: float = 0.1
    augment: bool = False  # random shifts by an eighth of the image; mirror images but of digits
    alpha: float | None = None  # of the normality layers; None for the layers' own defaults
    noise_train: float | None = None
    # Of the projected error function loss on every normalization layer's output; 0 for none.
    per_weight: float = 0.0
    per_slices: int = 256
    amp: str = "none"  # or "bfloat16", "float16"
    compile: bool = False  # the network
    limit: int | None = None  # at most so many training images

    def check(self) -> None:
        """Raises CommandError with a sentence for the first choice that means nothing."""
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise CommandError(
                    f"{name} must be one of {', '.join(allowed)}; got '{getattr(self, name)}'"
                )
        make_norm(
            self.norm, MODELS[self.model].tokens, alpha=self.alpha, noise_train=self.noise_train
        )
        for name in (
            "width", "depth", "copies", "epochs", "evaluate_every", "batch_size", "per_slices",
            "limit",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise CommandError(f"{name} must be positive; got {value}")
        for name in ("momentum", "weight_decay", "step_epochs", "per_weight", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise CommandError(f"{name} must be finite and not negative; got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise CommandError(f"learning_rate must be positive; got {self.learning_rate}")
        if not MODELS[self.model].small and (self.width or self.depth or self.copies > 1):
            raise CommandError(f"model '{self.model}' has no width, no depth and no copies")
        if self.copies > 1 and self.per_weight:
            raise CommandError("per_weight needs copies 1: its directions would mix the copies")

    def to_dict(self) -> dict[str, Any]:
        """For a file; ``Experiment(**...)`` reads it."""
        return dataclasses.asdict(self)


def recipe(dataset: str, model: str) -> dict[str, Any]:
    """The defaults for a model on a data set.

    For residual networks and the vision transformer those of Eftekhari and Papyan (ICML 2025):
    SGD with 0.1, momentum 0.9 and weight decay 5e-4, batches of 128 over 200 epochs with a step
    every 60; AdamW with 1e-3 and decay 0.05 and batches of 32. The factor of the step, 0.1, is
    ours. For the digits 20 epochs with a step every 6, and batches of 64. For the other small data
    sets 40 epochs with a cosine schedule, and batches of 64.
    """
    if model in ("transformer", "vit"):
        chosen: dict[str, Any] = {
            "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 32,
        }  # fmt: skip
    else:
        chosen = {"batch_size": 128, "step_epochs": 60}
    chosen |= {"model": model, "dataset": dataset, "epochs": 200, "augment": True}
    if dataset == "digits":
        chosen |= {"epochs": 20, "augment": False}
        if "step_epochs" in chosen:
            chosen |= {"batch_size": 64, "step_epochs": 6}
    elif dataset in ("mnist1d", "mnist5000"):
        chosen |= {
            "epochs": 40, "batch_size": 64, "step_epochs": 0, "schedule": "cosine",
            "augment": False,
        }  # fmt: skip
    return chosen
