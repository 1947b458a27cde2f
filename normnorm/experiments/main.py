"""``normnorm train``: one experiment, or a sweep of them."""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]

_SWEPT = ("norm", "seed", "alpha", "noise_train", "per_weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``normnorm train`` takes. Everything torchvision needs is imported later."""
    parser.description = (
        "Trains a network with a choice of normalization layer. Options marked with * take several "
        "values: every combination is trained, each in a folder of its own."
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
        ("--epochs", int), ("--batch-size", int), ("--learning-rate", float),
        ("--momentum", float), ("--weight-decay", float), ("--step-epochs", int),
        ("--gamma", float), ("--per-slices", int), ("--limit", int),
    ):  # fmt: skip
        how.add_argument(name, type=kind)
    how.add_argument("--optimizer", choices=("sgd", "adamw"))
    how.add_argument("--augment", action=argparse.BooleanOptionalAction)
    how.add_argument("--amp", choices=("none", "bfloat16", "float16"), default="none")
    how.add_argument("--compile", action="store_true")
    where = parser.add_argument_group("where")
    where.add_argument("--data-dir", type=Path, default=Path("data"))
    where.add_argument("--out", type=Path, default=Path("runs/train"))
    where.add_argument("--device", help="cpu, cuda, ... (a GPU where there is one)")
    where.add_argument("--workers", type=int, default=0, help="processes that load images (0)")
    where.add_argument("--resume", action="store_true", help="go on with runs that are there")
    where.add_argument("--checkpoint-steps", type=int, default=0, help="besides one an epoch")
    where.add_argument("--tensorboard", action="store_true")


def run(arguments: argparse.Namespace) -> int:
    """Trains; 0.

    Raises:
        CommandError: something cannot be done, which is said before anything is trained.
        KeyboardInterrupt: with what goes on from there.
    """
    from normnorm.experiments.folder import Options, check, run
    from normnorm.experiments.world import joined

    experiments = list(_experiments(arguments))
    for experiment in experiments:
        experiment.check()
    options = Options(
        data=arguments.data_dir,
        out=arguments.out,
        workers=arguments.workers,
        resume=arguments.resume,
        checkpoint_steps=arguments.checkpoint_steps,
        tensorboard=arguments.tensorboard,
    )
    with joined(arguments.device) as world:
        check(experiments, options, world)
        try:
            for experiment in experiments:
                run(experiment, options, world)
                if world.first:
                    print(_line(experiment, options))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command with --resume goes on from the checkpoints in {options.out}"
            ) from None
    return 0


def _experiments(arguments: argparse.Namespace) -> Any:
    from normnorm.experiments.config import Experiment, recipe
    from normnorm.experiments.norms import noise_and_alpha_apply

    given = vars(arguments)
    choices = recipe(arguments.dataset, arguments.model)
    for name in Experiment.__dataclass_fields__:
        if name not in _SWEPT and given.get(name) is not None:
            choices[name] = given[name]
    axes = [given[name] or [None] for name in _SWEPT]
    seen = set()
    for values in itertools.product(*axes):
        swept = dict(zip(_SWEPT, values, strict=True))
        # In a sweep beside normality layers a plain one is trained once, without what it has not.
        if not noise_and_alpha_apply(swept["norm"]) and len(arguments.norm) > 1:
            swept["alpha"] = swept["noise_train"] = None
        experiment = Experiment(**{**choices, **swept})
        if experiment not in seen:
            seen.add(experiment)
            yield experiment


def _line(experiment: Any, options: Any) -> str:
    from normnorm.experiments.folder import folder_name, read_epochs

    folder = options.out / folder_name(experiment)
    last = read_epochs(folder)[-1]
    return (
        f"{folder}: {last.test_accuracy:.2f} % of the test images after epoch {last.epoch}, "
        f"{last.step_ms:.2f} ms a step"
    )
