"""Training one experiment, interruptible at any step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset

from normnorm.diagnostics.capture import NORM_LAYERS
from normnorm.experiments import datasets
from normnorm.experiments.augment import shift_and_mirror
from normnorm.experiments.config import Experiment
from normnorm.experiments.libraries import ExperimentError
from normnorm.experiments.nets import MODELS
from normnorm.experiments.norms import make_norm
from normnorm.experiments.world import World
from normnorm.per import PER

__all__ = ["Epoch", "Trainer", "read_checkpoint"]

_EVALUATION_BATCH = 500
_NO_MIRROR = ("digits", "mnist", "svhn")
_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Epoch:
    """What one epoch gave.

    Attributes:
        epoch: counted from 1.
        train_loss: the mean over its steps, noise and regularization included.
        test_accuracy: afterwards, percent.
        step_ms: the median time of a training step.
    """

    epoch: int
    train_loss: float
    test_accuracy: float
    step_ms: float


class Trainer:
    """A network with its data, optimizer and place in the run.

    All that is random in a step (augmentation, noise, directions) is drawn from a seed made of
    the experiment's seed, the step and the rank, and the order of the data from the seed and the
    epoch. So a run that resumes from a checkpoint does what it would have done, bit for bit, with
    no generator's state to restore.

    Args:
        experiment: what to train.
        directory: of the data.
        world: the processes that train together; each takes its share of every batch.
        workers: processes that load images.

    Raises:
        ExperimentError: the experiment means nothing, or its batch does not divide among the
            processes.
        ExperimentError: data or torchvision are missing.
    """

    def __init__(
        self, experiment: Experiment, directory: Path, world: World, workers: int = 0
    ) -> None:
        experiment.check()
        if experiment.batch_size % world.size:
            raise ExperimentError(
                f"batch_size {experiment.batch_size} does not divide among {world.size} processes"
            )
        self.experiment, self.world = experiment, world
        self._workers = workers
        self._train, self._test, shape, classes = datasets.load(
            experiment.dataset, directory, experiment.seed, experiment.limit
        )
        self.steps = len(self._train) // experiment.batch_size  # type: ignore[arg-type]
        if self.steps == 0:
            raise ExperimentError(
                f"batch_size {experiment.batch_size} is more than the "
                f"{len(self._train)} training images"  # type: ignore[arg-type]
            )
        net = MODELS[experiment.model]
        torch.manual_seed(experiment.seed)
        norm = make_norm(
            experiment.norm, net.tokens, alpha=experiment.alpha, noise_train=experiment.noise_train
        )
        self.network = net.build(norm, shape, classes).to(world.device)
        self.optimizer = self._optimizer()
        self._scaler = GradScaler(
            world.device.type,
            enabled=experiment.amp == "float16" and world.device.type == "cuda",
        )
        self._per = None
        if experiment.per_weight:
            self._per = PER(
                self.network, lambda _, module: isinstance(module, NORM_LAYERS),
                experiment.per_weight, experiment.per_slices,
            )  # fmt: skip
        self._runs = self._wrapped()
        self.epoch = 0  # of the next step
        self.step = 0  # within its epoch
        self._losses: list[float] = []

    def _optimizer(self) -> torch.optim.Optimizer:
        choice, parameters = self.experiment, self.network.parameters()
        if choice.optimizer == "adamw":
            return torch.optim.AdamW(
                parameters, choice.learning_rate, weight_decay=choice.weight_decay
            )
        return torch.optim.SGD(
            parameters, choice.learning_rate, choice.momentum, weight_decay=choice.weight_decay
        )

    def _wrapped(self) -> Callable[[Tensor], Tensor]:
        runs: Any = self.network
        if self.world.size > 1:
            runs = nn.parallel.DistributedDataParallel(runs)
        return torch.compile(runs) if self.experiment.compile else runs

    # A run.

    def train(
        self,
        on_step: Callable[[], object] = lambda: None,
        on_epoch: Callable[[Epoch], object] = lambda _: None,
    ) -> list[Epoch]:
        """Trains from where the run stands to its end.

        Args:
            on_step: called after every step, and then also a place to save.
            on_epoch: called with what an epoch gave, before the ``on_step`` of its last step.

        Returns:
            what the remaining epochs gave.
        """
        epochs = []
        while self.epoch < self.experiment.epochs:
            epochs.append(self._train_epoch(on_step))
            on_epoch(epochs[-1])
            on_step()
        return epochs

    def _train_epoch(self, on_step: Callable[[], object]) -> Epoch:
        self.network.train()
        choice = self.experiment
        decay = choice.gamma ** (self.epoch // choice.step_epochs) if choice.step_epochs else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = choice.learning_rate * decay
        times = []
        for images, labels in self._batches():
            began = time.perf_counter()
            self._losses.append(self._train_step(images, labels))
            times.append(1e3 * (time.perf_counter() - began))
            self.step += 1
            if self.step < self.steps:  # the epoch's end is the next one's beginning, below
                on_step()
        losses, count = self.world.total(sum(self._losses), len(self._losses))
        done = Epoch(self.epoch + 1, losses / count, self.accuracy(), median(times or [0.0]))
        self.epoch, self.step, self._losses = self.epoch + 1, 0, []
        return done

    def _train_step(self, images: Tensor, labels: Tensor) -> float:
        torch.manual_seed(self._seed(self.epoch * self.steps + self.step, self.world.rank))
        images, labels = self._to_device(images), self._to_device(labels)
        if self.experiment.augment:
            images = shift_and_mirror(images, self.experiment.dataset not in _NO_MIRROR)
        with self._autocast():
            loss = cross_entropy(self._runs(images).float(), labels)
        if self._per is not None:
            loss = loss + self._per.loss()
        self.optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self.optimizer)
        self._scaler.update()
        return loss.item()

    def _seed(self, *place: int) -> int:
        """A seed for a place in the run: 63 bits of its own for each."""
        seed = self.experiment.seed
        for part in place:
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
        return seed

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)

    def _autocast(self) -> Any:
        if self.experiment.amp == "none":
            return nullcontext()
        return torch.autocast(self.world.device.type, dtype=_AMP[self.experiment.amp])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the epoch's remaining batches."""
        generator = torch.Generator().manual_seed(self._seed(self.epoch))
        order = torch.randperm(len(self._train), generator=generator)  # type: ignore[arg-type]
        size = self.experiment.batch_size
        whole = order[: self.steps * size].view(self.steps, size)
        mine = whole[self.step :, self.world.rank :: self.world.size]
        return self._load(self._train, list(mine))

    def _load(self, data: Dataset[Any], batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(data, TensorDataset):
            images, labels = data.tensors
            return ((images[batch], labels[batch]) for batch in batches)
        return iter(
            DataLoader(
                data,
                batch_sampler=[batch.tolist() for batch in batches],
                num_workers=self._workers,
                pin_memory=self.world.device.type == "cuda",
            )
        )

    @torch.no_grad()
    def accuracy(self) -> float:
        """Percent of the test images classified rightly, in evaluation mode."""
        training = self.network.training
        self.network.eval()
        mine = torch.arange(len(self._test))[self.world.rank :: self.world.size]  # type: ignore[arg-type]
        right = 0
        with self._autocast():
            for images, labels in self._load(self._test, list(mine.split(_EVALUATION_BATCH))):
                found = self.network(self._to_device(images)).argmax(1)
                right += int((found == self._to_device(labels)).sum())
        self.network.train(training)
        total, count = self.world.total(right, len(mine))
        return 100.0 * total / count

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, for the diagnostics."""
        everything = torch.arange(len(self._test))  # type: ignore[arg-type]
        return self._load(self._test, list(everything.split(_EVALUATION_BATCH)))

    # Checkpoints.

    def save(self, path: Path) -> None:
        """Writes a checkpoint in one step: a kill leaves the one before it."""
        half = path.with_name(path.name + ".part")
        torch.save(
            {
                "experiment": self.experiment.to_dict(),
                "processes": self.world.size,
                "epoch": self.epoch,
                "step": self.step,
                "losses": self._losses,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self._scaler.state_dict(),
            },
            half,
        )
        half.replace(path)

    def resume(self, path: Path) -> None:
        """Goes on from a checkpoint.

        Raises:
            ExperimentError: it cannot be read, or is of another experiment.
        """
        saved = read_checkpoint(path, self.experiment, self.world)
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self._scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self._losses = saved["epoch"], saved["step"], saved["losses"]


def read_checkpoint(path: Path, wanted: Experiment, world: World) -> dict[str, Any]:
    """What :meth:`Trainer.save` wrote.

    Raises:
        ExperimentError: it cannot be read, or is of another experiment.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location=world.device, weights_only=True)
        experiment, processes = saved["experiment"], saved["processes"]
    except Exception as error:
        raise ExperimentError(f"{path} is not a checkpoint: {error}") from None
    mine = wanted.to_dict()
    differing = [key for key in mine if experiment.get(key) != mine[key]]
    if differing or processes != world.size:
        changes = ", ".join(f"{key} {experiment.get(key)} (now {mine[key]})" for key in differing)
        raise ExperimentError(
            f"{path} is of another experiment: "
            f"{changes or f'{processes} processes (now {world.size})'}"
        )
    return saved
