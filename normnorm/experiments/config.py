"""What an experiment is: every choice that its outcome depends on."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from normnorm.experiments.datasets import DATASETS
from normnorm.experiments.libraries import ExperimentError
from normnorm.experiments.nets import MODELS
from normnorm.experiments.norms import make_norm

__all__ = ["SEEDS", "Experiment", "recipe"]

SEEDS = (2, 3, 5, 7, 11, 13)  # those of Eftekhari and Papyan


@dataclass(frozen=True)
class Experiment:
    """One training run.

    Attributes:
        dataset, model, norm: by name.
        seed: of the initialization, the order of the data, the augmentation and the noise.
        epochs: passes over the training images; an incomplete last batch is left out.
        batch_size: over all processes together.
        optimizer: "sgd" (with ``momentum``) or "adamw".
        learning_rate, momentum, weight_decay: of the optimizer.
        step_epochs: the learning rate is multiplied by ``gamma`` after every so many; 0 for never.
        augment: random shifts by an eighth of the image, and mirror images (except of digits).
        alpha, noise_train: of the normality layers; None for the layers' own defaults.
        per_weight, per_slices: of the projected error function loss on every normalization
            layer's output; 0 for none.
        amp: "none", "bfloat16" or "float16".
        compile: whether the network is compiled.
        limit: at most so many training images, and as many test images.
    """

    dataset: str = "digits"
    model: str = "convnet"
    norm: str = "batchnormal"
    seed: int = SEEDS[0]
    epochs: int = 20
    batch_size: int = 64
    optimizer: str = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    step_epochs: int = 0
    gamma: float = 0.1
    augment: bool = False
    alpha: float | None = None
    noise_train: float | None = None
    per_weight: float = 0.0
    per_slices: int = 256
    amp: str = "none"
    compile: bool = False
    limit: int | None = None

    def check(self) -> None:
        """Raises ExperimentError with a sentence for the first choice that means nothing."""
        if self.dataset != "digits" and self.dataset not in DATASETS:
            raise ExperimentError(
                f"dataset must be one of digits, {', '.join(DATASETS)}; got '{self.dataset}'"
            )
        if self.model not in MODELS:
            raise ExperimentError(f"model must be one of {', '.join(MODELS)}; got '{self.model}'")
        make_norm(
            self.norm, MODELS[self.model].tokens, alpha=self.alpha, noise_train=self.noise_train
        )
        if self.optimizer not in ("sgd", "adamw"):
            raise ExperimentError(f"optimizer must be sgd or adamw; got '{self.optimizer}'")
        if self.amp not in ("none", "bfloat16", "float16"):
            raise ExperimentError(f"amp must be none, bfloat16 or float16; got '{self.amp}'")
        for name in ("epochs", "batch_size", "per_slices", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ExperimentError(f"{name} must be positive; got {value}")
        for name in ("momentum", "weight_decay", "step_epochs", "per_weight", "gamma"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ExperimentError(f"{name} must be finite and not negative; got {value}")
        if not 0 < self.learning_rate < math.inf:
            raise ExperimentError(f"learning_rate must be positive; got {self.learning_rate}")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def recipe(dataset: str, model: str) -> dict[str, Any]:
    """The defaults for a model on a data set.

    For residual networks and the vision transformer those of Eftekhari and Papyan (ICML 2025):
    SGD with 0.1, momentum 0.9 and weight decay 5e-4, batches of 128 over 200 epochs with a step
    every 60; AdamW with 1e-3 and decay 0.05 and batches of 32. The factor of the step is ours
    (0.1). For the digits a tenth of that: 20 epochs with a step every 6, and batches of 64.
    """
    if model in ("vit", "transformer"):
        chosen: dict[str, Any] = {
            "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 0.05, "batch_size": 32,
            "epochs": 200, "augment": True,
        }  # fmt: skip
    else:
        chosen = {"batch_size": 128, "epochs": 200, "step_epochs": 60, "augment": True}
    if dataset == "digits":
        chosen |= {"epochs": 20, "augment": False}
        if chosen.get("step_epochs"):
            chosen |= {"batch_size": 64, "step_epochs": 6}
    return chosen
