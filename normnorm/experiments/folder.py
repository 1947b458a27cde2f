"""A run's folder: its metrics line by line, its checkpoint, its progress."""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import normnorm
from normnorm.commands import CommandError, check_folder, check_output
from normnorm.experiments.config import Experiment
from normnorm.experiments.libraries import ExperimentError
from normnorm.experiments.trainer import Epoch, Trainer, read_checkpoint
from normnorm.experiments.world import World

__all__ = ["Options", "check", "folder_name", "read_epochs", "run"]

METRICS, CHECKPOINT = "metrics.jsonl", "checkpoint.pt"


@dataclass(frozen=True)
class Options:
    """How a run is carried out; its outcome does not depend on any of it.

    Attributes:
        data: the data's directory.
        out: the folder that holds the runs' folders.
        workers: processes that load images.
        resume: whether a folder that is there is gone on with; else it is refused.
        checkpoint_steps: a checkpoint after every so many steps, besides one an epoch; 0 for none.
        tensorboard: whether the metrics also go to TensorBoard.
    """

    data: Path = Path("data")
    out: Path = Path("runs/train")
    workers: int = 0
    resume: bool = False
    checkpoint_steps: int = 0
    tensorboard: bool = False


def folder_name(experiment: Experiment) -> str:
    """Tells apart the runs of a sweep: what was chosen beside the data set's defaults."""
    words = [experiment.dataset, experiment.model, experiment.norm]
    for name in ("alpha", "noise_train"):
        if getattr(experiment, name) is not None:
            words.append(f"{name}{getattr(experiment, name):g}")
    if experiment.per_weight:
        words.append(f"per{experiment.per_weight:g}")
    if experiment.augment:
        words.append("augmented")
    words.append(f"lr{experiment.learning_rate:g}")
    return "-".join([*words, f"seed{experiment.seed}"])


def check(experiments: Sequence[Experiment], options: Options, world: World) -> None:
    """Refuses a sweep that could not be carried out to its end, before any of it is.

    Raises:
        ExperimentError: folders hold runs already and ``resume`` was not asked for, or a checkpoint
            of another experiment; two runs would share a folder; something else is in the way; or
            TensorBoard is missing.
    """
    problem = ""
    if world.first:  # which decides for all: it is about to make the folders
        try:
            _check(experiments, options, world)
        except CommandError as error:
            problem = str(error)
    if any(world.total(bool(problem))):
        raise ExperimentError(problem or "the first process says what cannot be done")


def _check(experiments: Sequence[Experiment], options: Options, world: World) -> None:
    folders = [options.out / folder_name(experiment) for experiment in experiments]
    shared = [str(folder) for folder, times in Counter(folders).items() if times > 1]
    if shared:
        raise ExperimentError(
            f"several of these runs would share the folder {', '.join(shared)}, whose name has six "
            "digits of each number"
        )
    if options.tensorboard:
        _summary_writer()
    for folder in folders:
        check_folder(folder)
        for name in (METRICS, CHECKPOINT):
            if folder.exists():
                check_output("--out", folder / name)
    there = [str(folder) for folder in folders if (folder / METRICS).exists()]
    if there and not options.resume:
        raise ExperimentError(
            f"{len(there)} of {len(folders)} runs are there already; --resume goes on with them, "
            f"another --out keeps them: {', '.join(there)}"
        )
    for folder, experiment in zip(folders, experiments, strict=True):
        if (folder / CHECKPOINT).exists():
            read_checkpoint(folder / CHECKPOINT, experiment, world)


def run(experiment: Experiment, options: Options, world: World, hidden: bool = False) -> Trainer:
    """Trains one experiment in its folder.

    The folder holds ``metrics.jsonl``, a line that describes the run and one for each epoch, and
    ``checkpoint.pt``. A run that was killed goes on where its checkpoint stands.

    Args:
        experiment, options, world: what, how and where.
        hidden: whether the progress bar is left out.

    Returns:
        the trainer, at the end of its run.

    Raises:
        ExperimentError: the folder is there and ``resume`` was not asked for, or its checkpoint is
            of another experiment, or data are missing.
        ValueError: the experiment means nothing.
    """
    check([experiment], options, world)
    trainer = Trainer(experiment, options.data, world, options.workers)
    folder = options.out / folder_name(experiment)
    checkpoint = folder / CHECKPOINT
    if options.resume and checkpoint.exists():
        trainer.resume(checkpoint)
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        _keep_epochs(folder / METRICS, experiment, trainer.epoch)
    writer = _summary_writer()(str(folder)) if options.tensorboard and world.first else None
    bar = tqdm(
        total=experiment.epochs * trainer.steps,
        initial=trainer.epoch * trainer.steps + trainer.step,
        desc=folder.name,
        unit="step",
        disable=True if hidden or not world.first else None,
    )

    def on_step() -> None:
        bar.update()
        every = options.checkpoint_steps
        if world.first and (trainer.step == 0 or (every and trainer.step % every == 0)):
            trainer.save(checkpoint)

    def on_epoch(epoch: Epoch) -> None:
        bar.set_postfix(loss=f"{epoch.train_loss:.3f}", accuracy=f"{epoch.test_accuracy:.2f}")
        if world.first:
            _append(folder / METRICS, {"event": "epoch", **asdict(epoch)})
        if writer is not None:
            for name in ("train_loss", "test_accuracy", "step_ms"):
                writer.add_scalar(name, getattr(epoch, name), epoch.epoch)

    with bar:
        trainer.train(on_step, on_epoch)
    if writer is not None:
        writer.close()
    return trainer


def read_epochs(folder: Path) -> list[Epoch]:
    """The epochs that a run's metrics hold.

    Raises:
        ExperimentError: there are no metrics, or they are damaged.
    """
    try:
        lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
        return [
            Epoch(**{key: line[key] for key in Epoch.__dataclass_fields__})
            for line in lines
            if line["event"] == "epoch"
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ExperimentError(f"{folder} holds no run's metrics: {error}") from None


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def _keep_epochs(path: Path, experiment: Experiment, epochs: int) -> None:
    """Begins the metrics with a line on the run, or cuts off what the checkpoint has not seen."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _is_kept(line, epochs)]
    if not kept:
        kept = [
            json.dumps(
                {
                    "event": "start",
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "experiment": experiment.to_dict(),
                    "normnorm": normnorm.__version__,
                    "torch": torch.__version__,
                    "machine": platform.platform(),
                }
            )
        ]
    half = path.with_name(path.name + ".part")
    half.write_text("\n".join(kept) + "\n")
    half.replace(path)


def _is_kept(line: str, epochs: int) -> bool:
    try:
        read = json.loads(line)
        return bool(read["event"] == "start" or read["epoch"] <= epochs)
    except (ValueError, KeyError, TypeError):  # half a line: the kill came while it was written
        return False


def _summary_writer() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ExperimentError(
            "--tensorboard needs TensorBoard, which is not installed: pip install tensorboard"
        ) from None
    writer: Callable[[str], Any] = SummaryWriter
    return writer
