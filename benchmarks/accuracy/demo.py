"""The demonstration: a convolutional net with BatchNorm and BatchNormalNorm, a transformer with
LayerNorm and LayerNormalNorm, over several seeds; a table, a plot and what they show."""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from scipy import stats
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from accuracy.experiment import Experiment, recipe
from accuracy.measures import layer_runs, normalization_groups
from accuracy.nets import MODELS
from accuracy.norms import make_norm
from accuracy.trainer import Epoch, Trainer, World, load_data
from commands import check_folder, check_output, positive, usable_device
from normnorm import backends, environment
from normnorm.cli import execute
from normnorm.diagnostics import normal_r_squared, qq_r_squared

SEEDS = 5
STUDY = "docs/measured/results.md"


class Comparison(NamedTuple):
    """A network and its layers, by label: a plain layer, the normality layer that is judged against
    it, then others for comparison."""

    network: str
    bar: float  # percent that the plain layer must reach for the comparison to mean something
    gain: float  # points that the normality layer must be ahead, less a standard error
    layers: dict[str, Experiment]


def mnist1d() -> tuple[Comparison, ...]:
    convnet, transformer = (
        Experiment(**{**recipe("mnist1d", model), "limit": 1000})
        for model in ("convnet", "transformer")
    )
    convnet = replace(convnet, norm="batch", evaluate_every=4)
    # Chosen for a visible difference, on other seeds (docs/measured/experiments.md).
    transformer = replace(transformer, norm="layer", learning_rate=3e-3, evaluate_every=5)
    normal = replace(transformer, norm="layernormal")
    return (
        Comparison("convolutional net", 70.0, 2.0, {
            "BatchNorm2d": convnet,
            "BatchNormalNorm2d": replace(convnet, norm="batchnormal"),
            "BatchNorm2d, decay 0.01": replace(convnet, weight_decay=0.01),
        }),
        Comparison("transformer", 65.0, 1.5, {
            "LayerNorm": transformer,
            "LayerNormalNorm, noise 0.3": replace(normal, noise_train=0.3),
            "LayerNormalNorm": normal,
        }),
    )  # fmt: skip


def digits() -> tuple[Comparison, ...]:
    cycle = Experiment(optimizer="adamw", weight_decay=0.01, schedule="cycle")
    convnet = replace(cycle, epochs=15, learning_rate=0.01)
    transformer = replace(cycle, model="transformer", epochs=20, learning_rate=0.003)
    return (
        Comparison("convolutional net", 97.0, -1.0, {
            "BatchNorm2d": replace(convnet, norm="batch"),
            "BatchNormalNorm2d": replace(convnet, norm="batchnormal"),
        }),
        Comparison("transformer", 90.0, -1.0, {
            "LayerNorm": replace(transformer, norm="layer"),
            "LayerNormalNorm": replace(transformer, norm="layernormal"),
        }),
    )  # fmt: skip


# By data set, the comparisons and its description.
PRESETS = {
    "mnist1d": (mnist1d, "MNIST-1D (generated signals of length 40)"),
    "digits": (digits, "Handwritten digits (scikit-learn, 8 x 8)"),
}


@dataclass
class Side:
    """A network with one layer, and what its runs gave."""

    network: str
    layer: str
    experiment: Experiment  # of all seeds, which are trained as one network (``copies``)
    noise_train: float | None  # of the layer; None for a plain one
    epochs: list[Epoch] = field(default_factory=list)
    groups: list[Tensor] = field(default_factory=list)  # of the last norm layer, for every seed
    qq_r2: list[float] = field(default_factory=list)  # theirs, for every seed

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies after the last epoch, percent, in the order of the seeds."""
        return self.epochs[-1].test_accuracy or []


def sides(comparison: Comparison, epochs: int | None, seeds: int) -> list[Side]:
    found = []
    for label, experiment in comparison.layers.items():
        chosen = replace(experiment, seed=0, copies=seeds, epochs=epochs or experiment.epochs)
        tokens = MODELS[chosen.model].tokens
        layer = make_norm(chosen.norm, tokens, noise_train=chosen.noise_train)(1)
        noise = getattr(layer, "noise_train", None)
        found.append(Side(comparison.network, label, chosen, noise))
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over seeds; None for a single one."""
    return float(stats.sem(values)) if len(values) > 1 else None


def ahead(side: Side, plain: Side) -> tuple[float, float | None]:
    """Points of accuracy, the mean of the paired differences and its standard error."""
    differences = [a - b for a, b in zip(side.accuracies, plain.accuracies, strict=True)]
    return mean(differences), standard_error(differences)


def judge(comparison: Comparison, found: Sequence[Side]) -> list[str]:
    """A sentence for everything that falls short: the plain layer of its bar, the normality layer
    of its gain."""
    plain, normality = found[:2]
    sentences = []
    if not mean(plain.accuracies) >= comparison.bar:
        sentences.append(
            f"{plain.layer} reached {mean(plain.accuracies):.2f} % test accuracy; "
            f"at least {comparison.bar:g} % was expected"
        )
    gain, error = ahead(normality, plain)
    wanted = comparison.gain - (error or 0.0)
    if not gain >= wanted:
        sentences.append(
            f"{normality.layer} is {gain:+.2f} points of test accuracy against {plain.layer}; "
            f"at least {wanted:+.2f} ({comparison.gain:+g} less a standard error) was expected"
        )
    return sentences


def finding(found: Sequence[Side]) -> str:
    """What the runs of a network show, in a sentence."""
    parts = []
    for side in found[1:]:
        gain, error = ahead(side, found[0])
        parts.append(f"{side.layer} {gain:+.1f}" + ("" if error is None else f" +- {error:.1f}"))
    return f"{found[0].network}: points of accuracy against {found[0].layer}: {'; '.join(parts)}."


def table(found: Sequence[Side]) -> str:
    """The closing table, in ASCII."""
    rows = [
        {
            "network": side.network,
            "layer": side.layer,
            "noise_train": side.noise_train,
            "accuracy %": mean(side.accuracies),
            "std. error": standard_error(side.accuracies),
            "ms a step": median(epoch.step_ms for epoch in side.epochs) / side.experiment.copies,
            "Q-Q R^2": mean(side.qq_r2),
            "(normal)": normal_r_squared(side.groups[0].size(1)),
        }
        for side in found
    ]
    digits = ("", "", "g", ".2f", ".2f", ".2f", ".4f", ".4f")
    return tabulate(rows, "keys", "simple", digits, missingval="-", numalign="right")


def _train(found: list[Side]) -> list[Trainer]:
    """Every side's runs."""
    world = World(0, 1, torch.device("cpu"))
    print("loading the data", file=sys.stderr, flush=True)
    trainers = [Trainer(side.experiment, load_data(side.experiment), world) for side in found]
    # A transformer's step takes about eight times as long as a convolutional net's.
    costs = [8 if side.experiment.model == "transformer" else 1 for side in found]
    with tqdm(
        total=sum(c * t.experiment.epochs * t.steps for c, t in zip(costs, trainers, strict=True)),
        bar_format="{percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left{postfix}",
        smoothing=0,
        ncols=shutil.get_terminal_size().columns,  # 80 where the terminal does not say
        mininterval=0.2 if sys.stderr.isatty() else 15,
    ) as bar:
        runs = zip(trainers, found, costs, strict=True)
        for number, (trainer, side, cost) in enumerate(runs, 1):
            words = f"run {number}/{len(trainers)}: {side.layer}"
            bar.set_postfix_str(words, refresh=False)
            side.epochs = trainer.train(partial(bar.update, cost))
            (*_, (layer, input, _)), _ = layer_runs(trainer)
            side.groups = list(normalization_groups(layer, input, side.experiment.copies))
            side.qq_r2 = [float(qq_r_squared(groups).nanmean()) for groups in side.groups]
    return trainers


def _run(args: argparse.Namespace) -> int:
    from accuracy.demo_plot import draw

    usable_device("cpu")
    folder = args.out or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    numbers, plot = folder / "results.json", folder / "results.png"
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    check_output("--out", numbers)
    check_output("--out", plot)
    torch.set_num_threads(args.threads)

    chosen, description = PRESETS[args.dataset][0](), PRESETS[args.dataset][1]
    seeds = args.seeds or (1 if args.quick else SEEDS)
    epochs = args.epochs or (1 if args.quick else None)
    rows = [sides(comparison, epochs, seeds) for comparison in chosen]
    found = [side for row in rows for side in row]
    began = time.perf_counter()
    data = _train(found)[0].data[0]
    seconds = time.perf_counter() - began

    judged = () if args.quick else zip(chosen, rows, strict=True)
    failures = [sentence for comparison, row in judged for sentence in judge(comparison, row)]
    around = environment.facts() | {
        "command_line": environment.command_line(),
        "backend": backends.resolve(torch.device("cpu")).name,
    }
    layers = [asdict(replace(side, epochs=[], groups=[])) for side in found]
    for written, side in zip(layers, found, strict=True):
        del written["groups"]
        written["epochs"] = [epoch._asdict() for epoch in side.epochs]
    content = {"environment": around, "seconds": seconds, "layers": layers,
               "judged": not args.quick, "failures": failures}  # fmt: skip
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    summary = (
        f"{description}: {len(data.train)} to train, {len(data.test)} to test, "
        f"seeds: {seeds}, backend: {around['backend']}, threads: {args.threads}"
    )
    draw(rows, summary, plot)
    print(f"\n{table(found)}\n\n{summary}; {seconds:.0f} s")
    print("accuracy: on the test set after the last epoch, mean and standard error over seeds")
    print("ms a step: of one seed's network; the seeds are trained as one network")
    print("Q-Q R^2: of the last norm layer's groups on test data, before the affine map, against")
    print("the normal; beside it the value for normal samples as large as a group")
    print(f"Plot and numbers: {plot}, {numbers}\n")
    for row in rows:
        print(finding(row))
    print(f"More seeds, settings and layers: {STUDY}")
    for failure in failures:
        print(f"demo.py: {failure}", file=sys.stderr)
    return 1 if failures else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains every network over every seed and reports; 1 where an accuracy falls short
    (:func:`judge`)."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="Trains small networks with and without normality normalization side by side.",
    )
    parser.add_argument("--dataset", choices=PRESETS, default="mnist1d", help="(mnist1d)")
    for name, default, text in (
        ("--epochs", None, "passes over the training data (default: each network's own)"),
        ("--seeds", None, f"seeds to average over, 0 to N - 1 (default: {SEEDS})"),
        ("--threads", 1, "torch's threads (default: 1: networks this small gain nothing from 2)"),
    ):
        kind = positive(int, "a whole number of at least 1")
        parser.add_argument(name, type=kind, metavar="N", default=default, help=text)
    parser.add_argument(
        "--quick", action="store_true",
        help="one epoch and one seed unless said otherwise, and no judgement of the accuracies",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the plot and the numbers (default: runs/demo-<date>-<time>)",
    )  # fmt: skip
    parser.set_defaults(run=_run, extra="accuracy")
    return execute(parser, arguments)
