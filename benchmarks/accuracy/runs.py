"""Runs in folders of their own, and the script train.py: one experiment, or a sweep of them."""

import argparse
import dataclasses
import itertools
import json
import platform
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import normnorm
from accuracy.experiment import Experiment, recipe
from accuracy.norms import has_transform
from accuracy.trainer import Epoch, Trainer, World, load_data, process_group, read_checkpoint
from commands import check_folder, check_output
from normnorm.cli import CommandError, execute
from speed.results import write_atomically

_METRICS, _CHECKPOINT = "metrics.jsonl", "checkpoint.pt"
_SWEPT = (
    "norm", "seed", "width", "depth", "batch_size", "learning_rate", "weight_decay", "alpha",
    "noise_train", "per_weight",
)  # fmt: skip


def folder_name(experiment: Experiment) -> str:
    """Data set, model and norm, every setting that is not the recipe's, and the seeds."""
    usual = Experiment(**recipe(experiment.dataset, experiment.model)).to_dict()
    words = [experiment.dataset, experiment.model, experiment.norm]
    for name, value in experiment.to_dict().items():
        if name not in ("norm", "seed", "copies") and value != usual[name]:
            words.append(name + (f"{value:g}" if isinstance(value, float) else str(value)))
    last = experiment.seed + experiment.copies - 1
    words.append(f"seed{experiment.seed}" + (f"to{last}" if experiment.copies > 1 else ""))
    return "-".join(words)


def run(experiment: Experiment, options: argparse.Namespace, world: World) -> Epoch:
    """Trains one experiment in its folder; its last epoch.

    ``metrics.jsonl`` there has a line that describes the run and one for each epoch,
    ``checkpoint.pt`` is what ``--resume`` goes on from.
    """
    trainer = Trainer(experiment, load_data(experiment, options.data_dir), world, options.workers)
    folder = options.out / folder_name(experiment)
    checkpoint = folder / _CHECKPOINT
    if options.resume and checkpoint.exists():
        trainer.resume(checkpoint)
    if world.first:
        folder.mkdir(parents=True, exist_ok=True)
        _write_metrics(folder / _METRICS, trainer)
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
        every, in_epoch = options.checkpoint_steps, trainer.step % trainer.steps
        if in_epoch == 0:
            epoch = trainer.epochs[-1]
            numbers = {
                name: mean(value) if isinstance(value, list) else value
                for name, value in epoch._asdict().items()
                if value is not None and name != "epoch"
            }
            bar.set_postfix({name: f"{value:.4g}" for name, value in numbers.items()})
            if writer is not None:
                for name, value in numbers.items():
                    writer.add_scalar(name, value, epoch.epoch)
            if world.first:
                _write_metrics(folder / _METRICS, trainer)
        if world.first and (in_epoch == 0 or (every and in_epoch % every == 0)):
            trainer.save(checkpoint)

    with bar:
        trainer.train(on_step)
    if writer is not None:
        writer.close()
    return trainer.epochs[-1]


def _write_metrics(path: Path, trainer: Trainer) -> None:
    """Writes the epochs so far; keeps an earlier process's first line."""
    lines = path.read_text().splitlines()[:1] if path.exists() else []
    if not lines:
        start = {
            "event": "start",
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "experiment": trainer.experiment.to_dict(),
            "normnorm": normnorm.__version__,
            "torch": torch.__version__,
            "machine": platform.platform(),
        }
        lines = [json.dumps(start)]
    lines += [json.dumps({"event": "epoch", **epoch._asdict()}) for epoch in trainer.epochs]
    write_atomically(path, "\n".join(lines) + "\n")


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise CommandError(
            "--tensorboard needs TensorBoard, which is not installed: pip install tensorboard"
        ) from None
    return SummaryWriter


def _check(experiments: Sequence[Experiment], options: argparse.Namespace, world: World) -> None:
    """Refuses a sweep that could not be carried out to its end, before any of it is.

    Raises:
        CommandError: folders hold runs already and ``resume`` was not asked for, or a checkpoint
            of another experiment; two runs would share a folder; a path cannot be written; or
            TensorBoard is missing.
    """
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
        for name in (_METRICS, _CHECKPOINT):
            if folder.exists():
                check_output("--out", folder / name)
    there = [str(folder) for folder in folders if (folder / _METRICS).exists()]
    if there and not options.resume:
        raise CommandError(
            f"{len(there)} of {len(folders)} runs are there already; --resume goes on with them, "
            f"another --out keeps them: {', '.join(there)}"
        )
    for folder, experiment in zip(folders, experiments, strict=True):
        if (folder / _CHECKPOINT).exists():
            read_checkpoint(folder / _CHECKPOINT, experiment, world)


# The script train.py.


def _experiments(options: argparse.Namespace) -> Iterator[Experiment]:
    choices = recipe(options.dataset, options.model)
    given = {name: value for name, value in vars(options).items() if value is not None}
    fields = [field.name for field in dataclasses.fields(Experiment) if field.name in given]
    choices |= {name: given[name] for name in fields if name not in _SWEPT}
    names = [name for name in fields if name in _SWEPT]
    for values in itertools.product(*(given[name] for name in names)):
        chosen = choices | dict(zip(names, values, strict=True))
        # In a sweep with normality layers a plain one is trained once, without alpha and noise.
        if len(given.get("norm", ())) > 1 and not has_transform(chosen["norm"]):
            chosen |= {"alpha": None, "noise_train": None}
        yield Experiment(**chosen)


def _run(options: argparse.Namespace) -> int:
    experiments = list(dict.fromkeys(_experiments(options)))
    for experiment in experiments:
        experiment.check()
    with process_group(options.device) as world:
        problem = ""
        if world.first:  # the first process, which makes the folders, decides for all
            try:
                _check(experiments, options, world)
            except CommandError as error:
                problem = str(error)
        if any(world.total(bool(problem))):
            raise CommandError(problem or "the first process says what cannot be done")
        try:
            for experiment in experiments:
                last = run(experiment, options, world)
                if world.first:
                    assert last.test_accuracy is not None  # the last epoch has an evaluation
                    accuracies = ", ".join(f"{value:.2f}" for value in last.test_accuracy)
                    print(
                        f"{options.out / folder_name(experiment)}: {accuracies} % of the test "
                        f"images after epoch {last.epoch}, {last.step_ms:.2f} ms a step"
                    )
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command with --resume goes on from the checkpoints in {options.out}"
            ) from None
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains what the arguments name; the exit status."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        description="Trains a network with a choice of normalization layer: docs/measured/"
        "experiments.md. Options marked with * take several values: every combination is trained, "
        "each in a folder of its own. Defaults are the paper's for the model; smaller for digits.",
    )
    what = parser.add_argument_group("what")
    kinds: dict[str, Any] = {"int": int, "float": float, "str": str}
    for field in dataclasses.fields(Experiment):
        flag, kind = "--" + field.name.replace("_", "-"), str(field.type).partition(" ")[0]
        if kind == "bool":
            what.add_argument(flag, action=argparse.BooleanOptionalAction)
        elif field.name in _SWEPT:
            what.add_argument(flag, nargs="+", type=kinds[kind], help="*")
        else:
            what.add_argument(flag, type=kinds[kind])
    what.set_defaults(dataset="digits", model="convnet")
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, default=Path("data"))
    where.add_argument("--out", type=Path, default=Path("runs/train"), help="folder of the runs")
    where.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    where.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
    where.add_argument("--resume", action="store_true", help="go on with runs that are there")
    where.add_argument("--checkpoint-steps", type=int, default=0, help="besides one an epoch")
    where.add_argument("--tensorboard", action="store_true", help="metrics there too")
    parser.set_defaults(run=_run, extra="accuracy")
    return execute(parser, arguments)
