"""The demonstration: a convolutional net with BatchNorm and BatchNormalNorm, a transformer with
LayerNorm and LayerNormalNorm, over several seeds; a table, a plot and a verdict."""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, median

import torch
from scipy import stats
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from accuracy.data import load
from accuracy.experiment import Experiment
from accuracy.nets import MODELS
from accuracy.norms import make_norm
from accuracy.trainer import Epoch, Trainer, World
from commands import check_folder, check_output, usable_device
from normnorm import backends, environment
from normnorm.cli import execute
from normnorm.diagnostics import normal_r_squared, qq_r_squared
from normnorm.diagnostics.capture import NORM_LAYERS

SEEDS = 5
BAR = 97.0  # percent that BatchNorm must reach for the comparison to mean something
TOLERANCE = 1.0  # points of accuracy that a normality layer may lack, beside a standard error
_CYCLE = Experiment(optimizer="adamw", weight_decay=0.01, schedule="cycle")
# By network: its training, its plain norm and its normality norm.
PRESET = {
    "convolutional net": (
        replace(_CYCLE, model="convnet", epochs=15, learning_rate=0.01), ("batch", "batchnormal")
    ),
    "transformer": (
        replace(_CYCLE, model="transformer", epochs=20, learning_rate=0.003),
        ("layer", "layernormal"),
    ),
}  # fmt: skip


@dataclass
class Run:
    """One seed's epochs, and the Q-Q R^2 of its last norm layer's groups (:func:`_groups`)."""

    epochs: list[Epoch]
    groups: Tensor
    qq_r2: float


@dataclass
class Side:
    """A network with one layer, and its runs; ``noise_train`` is None for a plain layer."""

    network: str
    experiment: Experiment
    layer: str
    noise_train: float | None
    runs: list[Run] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies after the last epoch, percent, in the order of the seeds."""
        return [run.epochs[-1].test_accuracy for run in self.runs]

    @property
    def qq_r2(self) -> float:
        return mean(run.qq_r2 for run in self.runs)


def sides(epochs: int | None) -> list[Side]:
    """Every network with its plain and then with its normality layer."""
    found = []
    for network, (experiment, norms) in PRESET.items():
        for norm in norms:
            layer = make_norm(norm, MODELS[experiment.model].tokens)(1)
            chosen = replace(experiment, norm=norm, epochs=epochs or experiment.epochs)
            noise = getattr(layer, "noise_train", None)
            found.append(Side(network, chosen, type(layer).__name__, noise))
    return found


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean over seeds; None for a single one."""
    return float(stats.sem(values)) if len(values) > 1 else None


def judge(found: Sequence[Side]) -> list[str]:
    """A sentence for everything that falls short: BatchNorm's mean accuracy below :data:`BAR`, or a
    normality layer behind its plain one by more than :data:`TOLERANCE` points and one standard
    error of the paired differences."""
    sentences = []
    for plain, normality in zip(found[::2], found[1::2], strict=True):
        if plain.experiment.norm == "batch" and not mean(plain.accuracies) >= BAR:
            sentences.append(
                f"{plain.layer} reached {mean(plain.accuracies):.2f} % test accuracy; "
                f"at least {BAR:g} % was expected"
            )
        behind = [p - n for p, n in zip(plain.accuracies, normality.accuracies, strict=True)]
        allowed = TOLERANCE + (standard_error(behind) or 0.0)
        if not mean(behind) <= allowed:
            sentences.append(
                f"{normality.layer} is {mean(behind):.2f} points of test accuracy behind "
                f"{plain.layer}; {allowed:.2f} (a point and a standard error) is allowed"
            )
    return sentences


def table(found: Sequence[Side]) -> str:
    """The closing table, in ASCII."""
    rows = [
        {
            "network": side.network,
            "layer": side.layer,
            "noise_train": side.noise_train,
            "accuracy %": mean(side.accuracies),
            "std. error": standard_error(side.accuracies),
            "ms a step": median(epoch.step_ms for run in side.runs for epoch in run.epochs),
            "Q-Q R^2": side.qq_r2,
            "(normal)": normal_r_squared(side.runs[0].groups.size(1)),
        }
        for side in found
    ]
    digits = ("", "", "g", ".2f", ".2f", ".2f", ".4f", ".4f")
    return tabulate(rows, "keys", "simple", digits, missingval="-", numalign="right")


@torch.no_grad()
def _groups(network: nn.Module, images: Tensor) -> Tensor:
    """The normalization groups of the network's last norm layer on test images, before its affine
    map: (groups, values). A group is a channel over all images and positions for a batch layer, the
    features of one token for a layer normalization. In evaluation mode: no noise, and a batch
    layer's running statistics."""
    layer = [module for module in network.modules() if isinstance(module, NORM_LAYERS)][-1]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network.eval()(images)
    hook.remove()
    bare = copy.deepcopy(layer)
    bare.get_parameter("weight").fill_(1.0)
    bare.get_parameter("bias").fill_(0.0)
    output = bare(seen[0])
    if isinstance(layer, nn.LayerNorm):
        return output.flatten(0, -2)
    return output.transpose(0, 1).flatten(1)


def _train(found: list[Side], seeds: int) -> list[Trainer]:
    """Every seed's run of every side."""
    world = World(0, 1, torch.device("cpu"))
    trainers = []
    for seed in range(seeds):
        for side in found:
            chosen = replace(side.experiment, seed=seed)
            data = load(chosen.dataset, Path("data"), seed, chosen.limit)
            trainers.append(Trainer(chosen, data, world))
    with tqdm(
        total=sum(trainer.experiment.epochs * trainer.steps for trainer in trainers),
        bar_format="{percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left{postfix}",
        smoothing=0,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 15,
    ) as bar:
        for number, trainer in enumerate(trainers):
            side = found[number % len(found)]
            words = f"run {number + 1}/{len(trainers)}: {side.layer}, seed {number // len(found)}"
            bar.set_postfix_str(words, refresh=False)
            epochs = trainer.train(bar.update)
            groups = _groups(trainer.network, next(trainer.test_batches())[0])
            side.runs.append(Run(epochs, groups, float(qq_r_squared(groups).nanmean())))
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

    found = sides(args.epochs or (1 if args.quick else None))
    seeds = args.seeds or (1 if args.quick else SEEDS)
    began = time.perf_counter()
    data = _train(found, seeds)[0].data
    seconds = time.perf_counter() - began

    failures = [] if args.quick else judge(found)
    around = environment.facts() | {
        "command_line": environment.command_line(),
        "backend": backends.resolve(torch.device("cpu")).name,
    }
    comparisons = [asdict(replace(side, runs=[])) for side in found]
    for written, side in zip(comparisons, found, strict=True):
        written["runs"] = [
            {"qq_r2": run.qq_r2, "epochs": [e._asdict() for e in run.epochs]} for run in side.runs
        ]
    content = {"environment": around, "seconds": seconds, "layers": comparisons,
               "judged": not args.quick, "failures": failures}  # fmt: skip
    numbers.write_text(json.dumps(content, indent=1) + "\n")
    summary = (
        f"Handwritten digits (scikit-learn, 8 x 8): {len(data.train)} training and "
        f"{len(data.test)} test images, seeds: {seeds}, backend: {around['backend']}, threads: "
        f"{args.threads}"
    )
    draw(found, summary, plot)
    print(f"\n{table(found)}\n\n{summary}; {seconds:.0f} s")
    print("accuracy: on the test images after the last epoch, mean and standard error over seeds")
    print("Q-Q R^2: of the last norm layer's groups on test images, before the affine map, against")
    print("the normal; beside it the value for normal samples as large as a group")
    print(f"Plot and numbers: {plot}, {numbers}")
    for failure in failures:
        print(f"demo.py: {failure}", file=sys.stderr)
    return 1 if failures else 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains every network over every seed and reports; 1 where an accuracy falls short
    (:func:`judge`)."""
    parser = argparse.ArgumentParser(
        prog="demo.py",
        description="Trains small networks with and without normality normalization side by side.",
    )
    for name, default, text in (
        ("--epochs", None, "passes over the training data (default: 15 and 20)"),
        ("--seeds", None, f"seeds to average over, 0 to N - 1 (default: {SEEDS})"),
        ("--threads", 1, "torch's threads (default: 1: networks this small gain nothing from 2)"),
    ):
        parser.add_argument(name, type=_positive, metavar="N", default=default, help=text)
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
