"""The demonstration itself: recipes, all runs under one progress bar, the report."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

import normnorm
from normnorm.commands import check_folder, check_output, usable_device
from normnorm.demo.data import DemoError, Split, load_cifar10, load_digits
from normnorm.demo.environment import environment
from normnorm.demo.nets import ConvNet, Norm, Transformer
from normnorm.demo.plot import draw
from normnorm.demo.results import Comparison, Results, judge, table, to_json
from normnorm.demo.train import Build, Recipe, step_seconds, train

__all__ = ["compare"]

_NUMBERS, _PLOT = "results.json", "results.png"


def _conv_net(*widths: int) -> Build:
    return lambda norm, image, classes: ConvNet(norm, image, classes, widths)


def _transformer(patch: tuple[int, int], width: int, depth: int) -> Build:
    return lambda norm, image, classes: Transformer(norm, image, classes, patch, width, depth)


@dataclass(frozen=True)
class _Dataset:
    """What is trained on a dataset, and what is expected of it.

    Attributes:
        batch_norm_bar: percent that BatchNorm must reach.
        threads: torch's; None for as many as torch likes. Networks this small gain nothing from
            a second one, and wait for it on a busy machine.
    """

    title: str
    convolutional: Recipe
    transformer: Recipe
    seeds: int
    batch_norm_bar: float | None
    threads: int | None


_DATASETS = {
    "digits": _Dataset(
        "Handwritten digits (scikit-learn, 8 x 8)",
        Recipe(_conv_net(16, 32), 15, 64, 0.01),
        Recipe(_transformer((1, 8), width=48, depth=2), 20, 64, 0.003),
        seeds=5,
        batch_norm_bar=97.0,
        threads=1,
    ),
    "cifar10": _Dataset(
        "CIFAR-10 (torchvision, 32 x 32)",
        Recipe(_conv_net(32, 64, 128), 5, 128, 0.01),
        Recipe(_transformer((4, 4), width=64, depth=4), 5, 128, 0.001),
        seeds=1,
        batch_norm_bar=None,
        threads=None,
    ),
}


def _results(norm: Norm) -> Results:
    layer = norm(1)
    noise = getattr(layer, "noise_train", None)
    return Results(type(layer).__name__, noise)


@dataclass(frozen=True)
class _Pair:
    """A comparison in the making: its recipe and its two layers, by default as published."""

    recipe: Recipe
    norms: tuple[Norm, Norm]
    comparison: Comparison


def _pairs(dataset: _Dataset, epochs: int | None) -> list[_Pair]:
    pairs = []
    for network, recipe, norms, bar in (
        (
            "convolutional net",
            dataset.convolutional,
            (nn.BatchNorm2d, normnorm.BatchNormalNorm2d),
            dataset.batch_norm_bar,
        ),
        ("transformer", dataset.transformer, (nn.LayerNorm, normnorm.LayerNormalNorm), None),
    ):
        recipe = replace(recipe, epochs=epochs or recipe.epochs)
        plain, normality = map(_results, norms)
        pairs.append(
            _Pair(recipe, norms, Comparison(network, recipe.epochs, plain, normality, bar))
        )
    return pairs


def _load(args: argparse.Namespace, seed: int) -> Split:
    if args.dataset == "cifar10":
        return load_cifar10(args.data_dir or Path("data"))
    if args.data_dir is not None:
        raise DemoError("--data-dir is for --dataset cifar10; the digits come with scikit-learn")
    return load_digits(seed)


def _run_all(pairs: list[_Pair], splits: list[Split]) -> None:
    """Every seed's four runs. The bar counts seconds expected from a few trial steps, since a
    step of one network takes many times one of another."""
    seconds = {
        (i, j): step_seconds(pair.recipe, norm, splits[0])
        for i, pair in enumerate(pairs)
        for j, norm in enumerate(pair.norms)
    }
    total = sum(
        seconds[i, j] * pairs[i].recipe.steps(split) for i, j in seconds for split in splits
    )
    runs = len(seconds) * len(splits)
    with tqdm(
        total=total,
        bar_format="{percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left{postfix}",
        smoothing=0,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    ) as bar:
        done = 0
        for seed, split in enumerate(splits):
            for i, pair in enumerate(pairs):
                for j, (norm, side) in enumerate(
                    zip(pair.norms, pair.comparison.sides, strict=True)
                ):
                    done += 1
                    postfix = f"run {done}/{runs}: {side.layer}, seed {seed}"
                    bar.set_postfix_str(postfix, refresh=False)
                    on_step = partial(bar.update, seconds[i, j])
                    side.runs.append(train(pair.recipe, norm, split, seed, on_step))


@contextmanager
def _torch_settings(threads: int) -> Iterator[None]:
    """That many threads inside; afterwards those of before, and the random state too."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        torch.set_num_threads(before)


def _make_folder(wanted: Path | None) -> Path:
    folder = wanted or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (_NUMBERS, _PLOT):
        check_output("--out", folder / name)
    return folder


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def _report(
    args: argparse.Namespace, pairs: list[_Pair], splits: list[Split], folder: Path, seconds: float
) -> int:
    """Prints the table and writes the files; the exit status."""
    comparisons = [pair.comparison for pair in pairs]
    failures = [] if args.quick else judge(comparisons)
    around: dict[str, Any] = environment()
    dataset = _DATASETS[args.dataset]
    train_count, test_count = len(splits[0].train_images), len(splits[0].test_images)
    summary = (
        f"{_counted(len(splits), 'seed')}, {train_count} training and {test_count} test images, "
        f"backend {around['backend']}, {_counted(around['threads'], 'thread')}"
    )
    (folder / _NUMBERS).write_text(
        json.dumps(
            {
                "dataset": args.dataset,
                "quick": args.quick,
                "seeds": list(range(len(splits))),
                "train_images": train_count,
                "test_images": test_count,
                "seconds": seconds,
                "environment": around,
                "comparisons": to_json(comparisons),
                "judged": not args.quick,
                "failures": failures,
            },
            indent=1,
        )
        + "\n"
    )
    draw(comparisons, f"{dataset.title}: {summary}", folder / _PLOT)
    print(f"\n{table(comparisons)}\n\n{dataset.title}\n{summary}; {seconds:.0f} s")
    print("accuracy: on the test images after the last epoch, mean and standard error over seeds")
    print("Q-Q R^2: of the last norm layer's groups on test images, before the affine map, against")
    print("the normal; beside it what samples of the normal itself, as large as a group, have")
    print(f"Plot and numbers: {folder / _PLOT}, {folder / _NUMBERS}")
    for failure in failures:
        print(f"normnorm demo: {failure}", file=sys.stderr)
    return 1 if failures else 0


def compare(args: argparse.Namespace) -> int:
    """Trains every pair over every seed and reports; the exit status.

    Raises:
        CommandError: the data, the folder for the results or the backend cannot be had.
    """
    usable_device("cpu")
    dataset = _DATASETS[args.dataset]
    count = args.seeds or (1 if args.quick else dataset.seeds)
    pairs = _pairs(dataset, args.epochs or (1 if args.quick else None))
    splits = [_load(args, 0)]
    # The digits are divided anew for each seed; CIFAR-10's test images are given.
    splits += [_load(args, s) if args.dataset == "digits" else splits[0] for s in range(1, count)]
    folder = _make_folder(args.out)
    with _torch_settings(args.threads or dataset.threads or torch.get_num_threads()):
        began = time.perf_counter()
        _run_all(pairs, splits)
        return _report(args, pairs, splits, folder, time.perf_counter() - began)
