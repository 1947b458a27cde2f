"""One run of a study: train, then measure what came out."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch

from normnorm import diagnostics
from normnorm.experiments.config import Experiment
from normnorm.experiments.study.design import TUNING_RATES, TUNING_SEEDS
from normnorm.experiments.trainer import Trainer
from normnorm.experiments.world import World

__all__ = ["Measured", "measure", "tune"]

_INPUT_NOISE = 1.0  # standard deviations of the images
_LAYER_NOISE = 0.5  # standard deviations of a layer's output


@dataclass(frozen=True)
class Measured:
    """What one seed of one arm gave.

    Attributes:
        seed: the experiment's.
        accuracy: of the test images after the last epoch, percent.
        noisy_accuracy: the same with Gaussian noise of one standard deviation on the images.
        change: relative change of the outputs under noise of half a standard deviation on a
            normalization layer's output, the mean over layers; None without such layers.
        qq_r2, joint_distance, correlation, mutual_information: of the normalization layers'
            outputs on test images (:mod:`normnorm.diagnostics`), the mean over layers.
        step_ms: the median training step.
    """

    seed: int
    accuracy: float
    noisy_accuracy: float
    change: float | None
    qq_r2: float | None
    joint_distance: float | None
    correlation: float | None
    mutual_information: float | None
    step_ms: float

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def measure(experiment: Experiment, world: World, layers: bool = True) -> Measured:
    """Trains an experiment and measures it.

    Args:
        experiment: what to train.
        world: this process alone.
        layers: whether the normalization layers are looked at.
    """
    trainer = Trainer(experiment, Path("data"), world)
    epochs = trainer.train()
    of_layers: dict[str, float | None] = dict.fromkeys(
        ("change", "qq_r2", "joint_distance", "correlation", "mutual_information")
    )
    if layers and experiment.norm != "none":
        of_layers |= _layers(trainer, experiment)
    return Measured(
        seed=experiment.seed,
        accuracy=epochs[-1].test_accuracy,
        noisy_accuracy=_noisy_accuracy(trainer),
        step_ms=median(epoch.step_ms for epoch in epochs),
        **of_layers,
    )


def _watched(experiment: Experiment) -> type:
    # A decorrelated layer is one norm, whatever it is made of.
    from normnorm.experiments.decorrelated import DecorrelatedBatchNorm2d

    return DecorrelatedBatchNorm2d if experiment.norm.startswith("decorrelated") else object


def _layers(trainer: Trainer, experiment: Experiment) -> dict[str, float | None]:
    cls = _watched(experiment)
    chosen = None if cls is object else (lambda _, module: isinstance(module, cls))
    found = diagnostics.diagnose(
        trainer.network, trainer.test_batches(), chosen, sample_size=1024, channels=32,
        projections=32,
    ).layers.values()  # fmt: skip
    changes = diagnostics.noise_robustness(
        trainer.network, trainer.test_batches(), chosen, scales=(_LAYER_NOISE,)
    )
    return {
        "change": _mean([by_scale[_LAYER_NOISE] for by_scale in changes.values()]),
        **{
            name: _mean([getattr(layer, name) for layer in found])
            for name in ("qq_r2", "joint_distance", "correlation", "mutual_information")
        },
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@torch.no_grad()
def _noisy_accuracy(trainer: Trainer) -> float:
    generator = torch.Generator().manual_seed(trainer.experiment.seed)
    trainer.network.eval()
    right = total = 0
    for images, labels in trainer.test_batches():
        noise = torch.randn(images.shape, generator=generator)
        images = (images + _INPUT_NOISE * noise).to(trainer.world.device)
        right += int((trainer.network(images).argmax(1).cpu() == labels).sum())
        total += len(labels)
    return 100.0 * right / total


def tune(experiment: Experiment, world: World) -> dict[float, float]:
    """The mean accuracy of every learning rate on seeds, and so on test images, of its own."""
    found = {}
    for rate in TUNING_RATES:
        runs = [
            measure(replace(experiment, learning_rate=rate, seed=seed), world, layers=False)
            for seed in TUNING_SEEDS
        ]
        found[rate] = _mean([run.accuracy for run in runs])
    return found
