"""Training of one experiment, which can be interrupted and resumed at any step."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from accuracy.data import Data, load, shift_and_mirror
from accuracy.experiment import Experiment
from accuracy.nets import MODELS, concatenated
from accuracy.norms import make_norm
from commands import usable_device
from normnorm.cli import CommandError
from normnorm.diagnostics.capture import NORM_LAYERS
from normnorm.per import PER

_EVALUATION_BATCH = 500
_NO_MIRROR = ("digits", "mnist", "mnist1d", "mnist5000", "svhn")
_AMP = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class World(NamedTuple):
    """This process's rank and device, and the number of processes that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        if self.size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums)
        return sums.tolist()


@contextmanager
def process_group(device: str | None) -> Iterator[World]:
    """Initializes torch.distributed under torchrun, where each process uses the GPU of its local
    rank; otherwise gives a world of one process.

    Args:
        device: see :func:`commands.usable_device`, which checks it.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, usable_device(device))
        return
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    found = usable_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), found)
    finally:
        dist.destroy_process_group()


class Evaluation(NamedTuple):
    """On the test images, for each copy: mean cross entropy, and percent classified correctly."""

    loss: list[float]
    accuracy: list[float]


class Epoch(NamedTuple):
    """The results of one epoch. Lists have one number for each copy."""

    epoch: int  # counted from 1
    train_loss: list[float]  # mean over its steps, noise and regularization included
    train_accuracy: list[float]  # percent correct in its steps, noise included
    test_loss: list[float] | None  # after the epoch; None if not evaluated
    test_accuracy: list[float] | None
    # The mean running lambda of all copies' norm layers that have one; None without such layers.
    lmbda: float | None
    step_ms: float  # the median time of a training step: forward, backward, optimizer


class Trainer:
    """A network with its data, its optimizer and the number of steps done.

    The random numbers of a step (augmentation, noise, PER's directions) depend only on the
    experiment's seed, the step and the rank; the order of the data on the seed and the epoch. A
    resumed run therefore equals an uninterrupted one bit for bit without saved generator states.

    Args:
        experiment: what to train.
        data: what :func:`accuracy.data.load` gives for the seed of each copy.
        world: the processes that train together; each takes its share of every batch.
        workers: processes that load images.
        network: trained in place of the experiment's model and norm.

    Raises:
        CommandError: the experiment is invalid, its batch does not divide among the processes or
            is larger than the training set, or torchvision is missing.
    """

    def __init__(
        self,
        experiment: Experiment,
        data: Sequence[Data],
        world: World,
        workers: int = 0,
        network: nn.Module | None = None,
    ) -> None:
        experiment.check()
        size = experiment.batch_size
        if size % world.size:
            raise CommandError(f"batch_size {size} does not divide among {world.size} processes")
        self.experiment, self.data, self.world, self._workers = experiment, data, world, workers
        self.steps = len(data[0].train) // size  # in an epoch
        if self.steps == 0:
            raise CommandError(
                f"batch_size {size} is more than the {len(data[0].train)} training images"
            )
        if network is None:
            network = self._build()
        self.network = network.to(world.device)
        self._optimizer = self._make_optimizer()
        self._schedule = self._make_schedule()
        self._scaler = GradScaler(
            world.device.type, enabled=experiment.amp == "float16" and world.device.type == "cuda"
        )
        self._per = None
        if experiment.per_weight:
            self._per = PER(
                self.network, lambda _, module: isinstance(module, NORM_LAYERS),
                experiment.per_weight, experiment.per_slices,
            )  # fmt: skip
        self._forward: Any = self.network
        if world.size > 1:
            self._forward = nn.parallel.DistributedDataParallel(self._forward)
        if experiment.compile:
            self._forward = torch.compile(self._forward)
        self.step = 0  # number of steps done, of ``steps * experiment.epochs``
        self.epochs: list[Epoch] = []  # the epochs done
        # Sums over the epoch's steps so far: each copy's loss and number of correct images.
        self._sums = torch.zeros(2, experiment.copies, dtype=torch.float64)

    def _build(self) -> nn.Module:
        choice, net, data = self.experiment, MODELS[self.experiment.model], self.data[0]

        def build(seed: int, copies: int = 1) -> nn.Module:
            torch.manual_seed(seed)
            norm = make_norm(
                choice.norm, net.tokens, alpha=choice.alpha, noise_train=choice.noise_train,
                copies=copies,
            )  # fmt: skip
            more = (choice.width, choice.depth, copies) if net.small else ()
            network: nn.Module = net.build(norm, data.shape, data.classes, *more)
            return network

        network = build(choice.seed, choice.copies)
        if choice.copies > 1:
            network.load_state_dict(concatenated([build(seed) for seed in self._seeds]))
        return network

    @property
    def _seeds(self) -> range:
        return range(self.experiment.seed, self.experiment.seed + self.experiment.copies)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        choice, parameters = self.experiment, self.network.parameters()
        rates: dict[str, Any] = {"lr": choice.learning_rate, "weight_decay": choice.weight_decay}
        if choice.optimizer == "adamw":
            return torch.optim.AdamW(parameters, **rates)
        return torch.optim.SGD(parameters, momentum=choice.momentum, **rates)

    def _make_schedule(self) -> LRScheduler:
        choice = self.experiment
        if choice.schedule == "cycle":
            total = choice.epochs * self.steps
            return OneCycleLR(self._optimizer, choice.learning_rate, total_steps=total)
        if choice.schedule == "cosine":
            return CosineAnnealingLR(self._optimizer, choice.epochs * self.steps)
        every = choice.step_epochs * self.steps
        return LambdaLR(self._optimizer, lambda n: choice.gamma ** (n // every) if every else 1.0)

    def train(self, on_step: Callable[[], object] = lambda: None) -> list[Epoch]:
        """Trains from the current step to the end; returns all epochs.

        Args:
            on_step: called after every step, for an epoch's last step after the evaluation; may
                call :meth:`save`.
        """
        while self.step < self.experiment.epochs * self.steps:
            self.network.train()
            times = []
            for images, labels in self._batches():
                began = time.perf_counter()
                self._sums += self._train_step(images, labels)
                times.append(1e3 * (time.perf_counter() - began))
                self.step += 1
                if self.step % self.steps:
                    on_step()
            self.epochs.append(self._end_of_epoch(median(times)))
            on_step()
        return self.epochs

    def _end_of_epoch(self, step_ms: float) -> Epoch:
        number, choice = len(self.epochs) + 1, self.experiment
        sums = torch.tensor(self.world.total(*self._sums.flatten().tolist())).view(2, -1)
        self._sums.zero_()
        evaluation = Evaluation(None, None)  # type: ignore[arg-type]
        if number % choice.evaluate_every == 0 or number == choice.epochs:
            evaluation = self.evaluate()
        lmbdas = [
            buffer.mean().item()
            for name, buffer in self.network.named_buffers()
            if name.endswith("running_lmbda")
        ]
        return Epoch(
            number,
            (sums[0] / (self.steps * self.world.size)).tolist(),
            (100.0 * sums[1] / (self.steps * choice.batch_size)).tolist(),
            *evaluation,
            mean(lmbdas) if lmbdas else None,
            step_ms,
        )

    def _train_step(self, images: Tensor, labels: Tensor) -> Tensor:
        # torch.manual_seed would take 0.2 ms: it formats a traceback for each device type.
        seed = self._seed(self.experiment.seed, self.step, self.world.rank)
        torch.default_generator.manual_seed(seed)
        if self.world.device.type == "cuda":
            torch.cuda.manual_seed(seed)
        images, labels = self._to_device(images), self._to_device(labels)
        if self.experiment.augment:
            images = shift_and_mirror(
                images.unflatten(1, (self.experiment.copies, -1)).flatten(0, 1),
                self.experiment.dataset not in _NO_MIRROR,
            ).view_as(images)
        with self._autocast():
            losses, right = self._losses(self._forward(images).float(), labels)
        # Each copy's parameters get the gradient of its own loss.
        loss = losses.sum()
        if self._per is not None:
            loss = loss + self._per.loss()
        self._optimizer.zero_grad()
        self._scaler.scale(loss).backward()
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        sums = torch.stack([losses.detach().double(), right.double()]).cpu()
        if self._per is not None:
            sums[0] += (loss - losses.sum()).item()
        return sums

    def _losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """For each copy the mean cross entropy and the number of correctly classified images, from
        logits (N, copies * classes) and labels (N, copies)."""
        logits, labels = logits.view(labels.numel(), -1), labels.flatten()
        losses = cross_entropy(logits, labels, reduction="none")
        right = logits.argmax(1) == labels
        copies = self.experiment.copies
        return losses.view(-1, copies).mean(0), right.view(-1, copies).sum(0)

    @staticmethod
    def _seed(seed: int, *place: int) -> int:
        """A seed of 63 bits from the experiment's seed and a place: step and rank, or epoch."""
        for part in place:
            seed = (seed * 6364136223846793005 + part + 1442695040888963407) % (1 << 63)
        return seed

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.world.device, non_blocking=True)

    def _autocast(self) -> Any:
        dtype = _AMP.get(self.experiment.amp)  # None for "none"
        return torch.autocast(self.world.device.type, dtype, enabled=dtype is not None)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the epoch's remaining batches."""
        epoch, done = divmod(self.step, self.steps)
        size, orders = self.experiment.batch_size, []
        for seed in self._seeds:
            generator = torch.Generator().manual_seed(self._seed(seed, epoch))
            order = torch.randperm(len(self.data[0].train), generator=generator)
            orders.append(order[: self.steps * size].view(self.steps, size))
        mine = torch.stack(orders)[:, done:, self.world.rank :: self.world.size]
        return self._load([data.train for data in self.data], mine)

    def _load(self, data: Sequence[Any], batches: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (N, copies * C, H, W) and labels (N, copies) of every batch, from each copy's data
        set and the indices of its batches, (copies, batches, N)."""
        if isinstance(data[0], TensorDataset):
            for numbers in zip(*batches, strict=True):
                parts = [one[indices] for one, indices in zip(data, numbers, strict=True)]
                images, labels = zip(*parts, strict=True)
                yield torch.cat(images, dim=1), torch.stack(labels, dim=1)
            return
        for images, labels in DataLoader(
            data[0],
            batch_sampler=[batch.tolist() for batch in batches[0]],
            num_workers=self._workers,
            pin_memory=self.world.device.type == "cuda",
        ):
            yield images, labels.unsqueeze(1)

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's share of the test images and labels."""
        mine = torch.arange(len(self.data[0].test))[self.world.rank :: self.world.size]
        batches = [mine.split(_EVALUATION_BATCH)] * self.experiment.copies
        return self._load([data.test for data in self.data], batches)

    @torch.no_grad()
    def evaluate(self, change: Callable[[Tensor], Tensor] = lambda images: images) -> Evaluation:
        """Evaluates on the test images, after ``change``; leaves the network in evaluation mode."""
        self.network.eval()
        sums = torch.zeros(2, self.experiment.copies, dtype=torch.float64)
        count = 0
        with self._autocast():
            for images, labels in self.test_batches():
                logits = self.network(self._to_device(change(images))).float()
                losses, right = self._losses(logits, self._to_device(labels))
                sums += torch.stack([len(labels) * losses.double(), right.double()]).cpu()
                count += len(labels)
        *flat, total = self.world.total(*sums.flatten().tolist(), count)
        losses, rights = torch.tensor(flat, dtype=torch.float64).view(2, -1) / total
        return Evaluation(losses.tolist(), (100.0 * rights).tolist())

    def _stateful(self) -> dict[str, Any]:
        return {
            "network": self.network, "optimizer": self._optimizer, "schedule": self._schedule,
            "scaler": self._scaler,
        }  # fmt: skip

    def save(self, path: Path) -> None:
        """Writes a checkpoint and renames it, so that a killed run keeps the previous one."""
        half = path.with_name(path.name + ".part")
        torch.save(
            {
                "experiment": self.experiment.to_dict(),
                "processes": self.world.size,
                "step": self.step,
                "sums": self._sums,
                "epochs": [tuple(epoch) for epoch in self.epochs],
                **{name: part.state_dict() for name, part in self._stateful().items()},
            },
            half,
        )
        half.replace(path)

    def resume(self, path: Path) -> None:
        """Restores the state that :func:`read_checkpoint` finds."""
        saved = read_checkpoint(path, self.experiment, self.world)
        for name, part in self._stateful().items():
            part.load_state_dict(saved[name])
        self.step, self._sums = saved["step"], saved["sums"].cpu()
        self.epochs = [Epoch(*epoch) for epoch in saved["epochs"]]


def load_data(experiment: Experiment, directory: Path = Path("data")) -> list[Data]:
    """The data set of each copy."""
    return [
        load(experiment.dataset, directory, seed, experiment.limit, experiment.validation)
        for seed in range(experiment.seed, experiment.seed + experiment.copies)
    ]


def read_checkpoint(path: Path, wanted: Experiment, world: World) -> dict[str, Any]:
    """The checkpoint that :meth:`Trainer.save` wrote.

    Raises:
        CommandError: it cannot be read, or is of another experiment.
    """
    try:
        saved: dict[str, Any] = torch.load(path, map_location=world.device, weights_only=True)
        found, processes, _ = saved["experiment"], saved["processes"], saved["schedule"]
    except Exception as error:
        raise CommandError(f"{path} is not a checkpoint: {error}") from None
    changes = [
        f"{key} {found.get(key)} (now {mine})"
        for key, mine in wanted.to_dict().items()
        if found.get(key) != mine
    ]
    if processes != world.size:
        changes.append(f"{processes} processes (now {world.size})")
    if changes:
        raise CommandError(f"{path} is of another experiment: {', '.join(changes)}")
    return saved
