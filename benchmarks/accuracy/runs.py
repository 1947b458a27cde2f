"""Runs in folders of their own, and the script train.py: one experiment, or a sweep of them."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import normnorm
from accuracy.data import load
from accuracy.experiment import Experiment, recipe
from accuracy.norms import has_transform
from accuracy.trainer import Epoch, Trainer, World, process_group, read_checkpoint
from normnorm.commands import CommandError, check_folder, check_output, execute

__all__ = ["CHECKPOINT", "METRICS", "Options", "check", "folder_name", "main", "run"]

METRICS, CHECKPOINT = "metrics.jsonl", "checkpoint.pt"
_SWEPT = ("norm", "seed", "alpha", "noise_train", "per_weight")


@dataclass(frozen=True)
class Options:
    """How a run is carried out; its outcome does not depend on any of it.

    Attributes:
        data_dir: the data's directory.
        out: the folder that holds the runs' folders.
        workers: processes that load images.
        resume: whether a folder that exists is continued; else it is refused.
        checkpoint_steps: a checkpoint after every so many steps, besides one an epoch; 0 for none.
        tensorboard: whether the metrics also go to TensorBoard.
    """

    data_dir: Path = Path("data")
    out: Path = Path("runs/train")
    workers: int = 0
    resume: bool = False
    checkpoint_steps: int = 0
    tensorboard: bool = False


def folder_name(experiment: Experiment) -> str:
    """The choices that tell the runs of a sweep apart."""
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
        CommandError: folders hold runs already and ``resume`` was not asked for, or a checkpoint
            of another experiment; two runs would share a folder; a path cannot be written; or
            TensorBoard is missing.
    """
    problem = ""
    if world.first:  # the first process, which makes the folders, decides for all
        try:
            _check(experiments, options, world)
        except CommandError as error:
            problem = str(error)
    if any(world.total(bool(problem))):
        raise CommandError(problem or "the first process says what cannot be done")


def _check(experiments: Sequence[Experiment], options: Options, world: World) -> None:
    folders = [options.out / folder_name(experiment) for experiment in experiments]
    shared = [str(folder) for folder, times in Counter(folders).items() if times > 1]
    if shared:
        raise CommandError(
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
        raise CommandError(
            f"{len(there)} of {len(folders)} runs are there already; --resume goes on with them, "
            f"another --out keeps them: {', '.join(there)}"
        )
    for folder, experiment in zip(folders, experiments, strict=True):
        if (folder / CHECKPOINT).exists():
            read_checkpoint(folder / CHECKPOINT, experiment, world)


def run(experiment: Experiment, options: Options, world: World) -> Epoch | None:
    """Trains one experiment in its folder, whose ``metrics.jsonl`` has a line that describes the
    run and one for each epoch; its last epoch, None where the checkpoint was at the end already.

    Raises:
        CommandError: data are missing, or the checkpoint is of another experiment.
    """
    data = load(experiment.dataset, options.data_dir, experiment.seed, experiment.limit)
    trainer = Trainer(experiment, data, world, options.workers)
    folder = options.out / folder_name(experiment)
    checkpoint = folder / CHECKPOINT
    if options.resume and checkpoint.exists():
        trainer.resume(checkpoint)
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        _keep_epochs(folder / METRICS, experiment, trainer.step // trainer.steps)
    writer = _summary_writer()(str(folder)) if options.tensorboard and world.first else None
    bar = tqdm(
        total=experiment.epochs * trainer.steps,
        initial=trainer.step,
        desc=folder.name,
        unit="step",
        disable=None if world.first else True,
    )

    def on_step() -> None:
        bar.update()
        every = options.checkpoint_steps
        in_epoch = trainer.step % trainer.steps
        if world.first and (in_epoch == 0 or (every and in_epoch % every == 0)):
            trainer.save(checkpoint)

    def on_epoch(epoch: Epoch) -> None:
        bar.set_postfix(loss=f"{epoch.train_loss:.3f}", accuracy=f"{epoch.test_accuracy:.2f}")
        if world.first:
            with (folder / METRICS).open("a") as file:
                file.write(json.dumps({"event": "epoch", **asdict(epoch)}) + "\n")
        if writer is not None:
            for name in ("train_loss", "test_accuracy", "step_ms"):
                writer.add_scalar(name, getattr(epoch, name), epoch.epoch)

    with bar:
        epochs = trainer.train(on_step, on_epoch)
    if writer is not None:
        writer.close()
    return epochs[-1] if epochs else None


def _keep_epochs(path: Path, experiment: Experiment, epochs: int) -> None:
    """Begins the metrics with a line on the run, or removes epochs newer than the checkpoint."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if _is_kept(line, epochs)]
    if not kept:
        start = {
            "event": "start",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "experiment": experiment.to_dict(),
            "normnorm": normnorm.__version__,
            "torch": torch.__version__,
            "machine": platform.platform(),
        }
        kept = [json.dumps(start)]
    half = path.with_name(path.name + ".part")
    half.write_text("\n".join(kept) + "\n")
    half.replace(path)


def _is_kept(line: str, epochs: int) -> bool:
    try:
        read = json.loads(line)
        return bool(read["event"] == "start" or read["epoch"] <= epochs)
    except (ValueError, KeyError, TypeError):  # half a line, of a process that was killed
        return False


def _summary_writer() -> Callable[[str], Any]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise CommandError(
            "--tensorboard needs TensorBoard, which is not installed: pip install tensorboard"
        ) from None
    writer: Callable[[str], Any] = SummaryWriter
    return writer


# The script train.py.


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the arguments name; the exit status."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a network with a choice of normalization layer. Options marked with * "
        "take several values: every combination is trained, each in a folder of its own.",
    )
    what = parser.add_argument_group("what")
    what.add_argument("--dataset", default="digits", help="digits, mnist, cifar10, ... (digits)")
    what.add_argument("--model", default="convnet", help="convnet, resnet18, vit, ... (convnet)")
    what.add_argument("--norm", nargs="+", default=["batchnormal"], help="* (batchnormal)")
    what.add_argument("--seed", nargs="+", type=int, default=[2], help="* (2)")
    what.add_argument("--alpha", nargs="+", type=float, help="* of the normality layers")
    what.add_argument("--noise-train", nargs="+", type=float, help="* of the normality layers")
    what.add_argument(
        "--per-weight", nargs="+", type=float, default=[0.0],
        help="* weight of the projected error function loss (0)",
    )  # fmt: skip
    how = parser.add_argument_group(
        "how", "The defaults are the paper's for the model; smaller for the digits."
    )
    for name, kind in (
        ("--epochs", int), ("--batch-size", int), ("--optimizer", str), ("--learning-rate", float),
        ("--momentum", float), ("--weight-decay", float), ("--schedule", str),
        ("--step-epochs", int), ("--gamma", float), ("--per-slices", int), ("--limit", int),
    ):  # fmt: skip
        how.add_argument(name, type=kind)
    how.add_argument("--augment", action=argparse.BooleanOptionalAction)
    how.add_argument("--amp", help="none, bfloat16 or float16 (none)")
    how.add_argument("--compile", action="store_true")
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, default=Path("data"))
    where.add_argument("--out", type=Path, default=Path("runs/train"))
    where.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    where.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
    where.add_argument("--resume", action="store_true", help="go on with runs that are there")
    where.add_argument("--checkpoint-steps", type=int, default=0, help="besides one an epoch")
    where.add_argument("--tensorboard", action="store_true")
    parser.set_defaults(run=_train, extra="accuracy")
    return execute(parser, arguments)


def _train(arguments: argparse.Namespace) -> int:
    experiments = list(dict.fromkeys(_experiments(arguments)))
    for experiment in experiments:
        experiment.check()
    options = Options(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Options)})
    with process_group(arguments.device) as world:
        check(experiments, options, world)
        try:
            for experiment in experiments:
                last = run(experiment, options, world)
                if world.first:
                    print(_line(options.out / folder_name(experiment), last))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command with --resume goes on from the checkpoints in {options.out}"
            ) from None
    return 0


def _experiments(arguments: argparse.Namespace) -> Iterator[Experiment]:
    given = vars(arguments)
    choices = recipe(arguments.dataset, arguments.model)
    for field in dataclasses.fields(Experiment):
        if field.name not in _SWEPT and given.get(field.name) is not None:
            choices[field.name] = given[field.name]
    for values in itertools.product(*(given[name] or [None] for name in _SWEPT)):
        swept = dict(zip(_SWEPT, values, strict=True))
        # In a sweep with normality layers a plain one is trained once, without alpha and noise.
        if not has_transform(swept["norm"]) and len(arguments.norm) > 1:
            swept["alpha"] = swept["noise_train"] = None
        yield Experiment(**{**choices, **swept})


def _line(folder: Path, last: Epoch | None) -> str:
    if last is None:
        return f"{folder}: trained to its end already"
    return (
        f"{folder}: {last.test_accuracy:.2f} % of the test images after epoch {last.epoch}, "
        f"{last.step_ms:.2f} ms a step"
    )
