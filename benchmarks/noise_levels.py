"""Which noise_train lets which kind of network learn: accuracies on handwritten digits.

    python benchmarks/noise_levels.py [--networks NAME ...] [--output FILE]

Every network is trained with its plain norms and with `replace_norms` at several weights of the
noise, constant, falling to 0 or rising from 0; some are also trained with their plain norms first,
converted, and trained on. AdamW and one cycle of the learning rate throughout. What the file holds
of networks that are not named stays. Needs scikit-learn, and torchvision for MobileNetV3 and
EfficientNet.

A row has the number of norm layers, the weight of the noise (null for plain norms), the mean
training loss of the last epoch, noise included, and percent of the test images that are right
after it; and before it, where a trained network was trained on.
"""

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean

import torch
from torch import nn
from torch.nn.functional import interpolate
from torch.utils.data import TensorDataset

import normnorm
import record
from accuracy.data import Data, load
from accuracy.experiment import Experiment
from accuracy.nets import ConvNet, Transformer
from accuracy.trainer import Trainer, World
from speed import tables

TUNING_EPOCHS = 3  # with a tenth of the learning rate
OF_BATCH, OF_LAYER = (0.4, 0.2, 0.1, 0.05, 0.0), (1.0, 0.5, 0.25, 0.1, 0.0)


@dataclass(frozen=True)
class Network:
    """A network of the comparison and how it is trained."""

    build: Callable[[], nn.Module]
    learning_rate: float
    levels: tuple[float, ...] = OF_BATCH  # weights of the noise, the layers' default first
    epochs: int = 15
    seeds: int = 3
    # Height and width that the images are scaled to, in three channels; 0 for (1, 8, 8).
    pixels: int = 0
    annealed: bool = False  # whether schedules are tried
    tuned: bool = False  # whether the conversion of a trained network is tried


def convolution(channels: int, width: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    ]  # fmt: skip


def stack(layers: int, width: int = 16) -> nn.Module:
    body = [part for _ in range(layers - 1) for part in convolution(width, width)]
    first = convolution(1, width)
    return nn.Sequential(*first, *body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


def mlp(norm: Callable[[int], nn.Module], width: int = 16) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for features in (64, width):
        layers += [nn.Linear(features, width), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v3_small

    # Its own momentum, 0.01, leaves the running statistics behind in so few steps.
    return mobilenet_v3_small(width_mult=0.5, num_classes=10, norm_layer=nn.BatchNorm2d)


def efficientnet() -> nn.Module:
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    stages = (
        (1, 3, 1, 32, 16, 1), (6, 3, 2, 16, 24, 2), (6, 5, 2, 24, 40, 2), (6, 3, 2, 40, 80, 3),
        (6, 5, 1, 80, 112, 3), (6, 5, 2, 112, 192, 4), (6, 3, 1, 192, 320, 1),
    )  # fmt: skip
    return EfficientNet([MBConvConfig(*s, width_mult=0.25) for s in stages], 0.2, num_classes=10)


NETWORKS = {
    "MLP, 2 batch norms": Network(lambda: mlp(nn.BatchNorm1d), 0.01),
    "MLP, 2 layer norms": Network(lambda: mlp(nn.LayerNorm), 0.01, OF_LAYER, annealed=True),
    "convolutions, 2 norms": Network(
        lambda: ConvNet(nn.BatchNorm2d, (1, 8, 8), 10, (16, 32)), 0.01, tuned=True
    ),
    "convolutions, 16 norms": Network(lambda: stack(16), 0.003, annealed=True),
    "transformer, 2 blocks": Network(
        lambda: Transformer(nn.LayerNorm, (1, 8, 8), 10, (1, 8), 48, 2),
        0.003,
        OF_LAYER[:3],
        seeds=2,
        tuned=True,
    ),
    "MobileNetV3-small x0.5": Network(mobilenet, 0.002, (0.4, 0.1), epochs=4, seeds=2, pixels=32),
    "EfficientNet-B0 x0.25": Network(efficientnet, 0.002, (0.4, 0.1), epochs=4, seeds=2, pixels=32),
}


def scaled(data: Data, pixels: int) -> Data:
    def of(part: TensorDataset) -> TensorDataset:
        images, labels = part.tensors
        larger = interpolate(images, size=(pixels, pixels), mode="bilinear")
        return TensorDataset(larger.expand(-1, 3, -1, -1).contiguous(), labels)

    return Data(of(data.train), of(data.test), (3, pixels, pixels), data.classes)


def train(trainer: Trainer, noise_train: float | None, schedule: str) -> tuple[float, float]:
    """The last epoch's mean loss and the accuracy after it."""
    noisy = [layer for layer in trainer.network.modules() if hasattr(layer, "noise_train")]

    def anneal() -> None:
        passed = trainer.step / (trainer.experiment.epochs * trainer.steps)
        for layer in noisy:
            layer.noise_train = noise_train * (passed if schedule == "rising" else 1 - passed)

    if schedule == "constant":
        last = trainer.train()[-1]
    else:
        anneal()
        last = trainer.train(on_step=anneal)[-1]
    return last.train_loss[0], last.test_accuracy[0]


def measure(name: str, seed: int) -> list[record.Row]:
    kind, rows = NETWORKS[name], []
    data = load("digits", Path(), seed)
    if kind.pixels:
        data = scaled(data, kind.pixels)
    torch.manual_seed(seed)
    fresh = kind.build()
    classes = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm)
    norms = sum(isinstance(module, classes) for module in fresh.modules())

    def run(
        noise: float | None, schedule: str = "constant", trained: nn.Module | None = None
    ) -> nn.Module:
        network = copy.deepcopy(trained or fresh)
        experiment = Experiment(
            seed=seed, optimizer="adamw", weight_decay=0.01, schedule="cycle",
            epochs=TUNING_EPOCHS if trained else kind.epochs,
            learning_rate=kind.learning_rate / (10 if trained else 1),
        )  # fmt: skip
        make = partial(Trainer, experiment, [data], World(0, 1, torch.device("cpu")))
        before = make(network=network).evaluate().accuracy[0] if trained else None
        if noise is not None:
            normnorm.replace_norms(network, noise_train=noise)
        began = time.process_time()
        loss, accuracy = train(make(network=network), noise, schedule)
        row = {
            "network": name, "norms": norms, "start": "trained" if trained else "scratch",
            "noise_train": noise, "schedule": schedule, "seed": seed, "epochs": experiment.epochs,
            "loss": loss, "accuracy": accuracy, "accuracy_before": before,
        }  # fmt: skip
        rows.append(row)
        print(f"{row}, {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)
        return network

    plain = run(None)
    for noise in kind.levels:
        run(noise)
    if kind.annealed:
        for schedule in ("falling", "rising"):
            run(kind.levels[0], schedule)
    if kind.tuned:
        for tuning in (None, *kind.levels):
            run(tuning, trained=plain)
    return rows


def table(rows: list[record.Row]) -> str:
    runs: dict[tuple[str, ...], dict[float | None, list[float]]] = {}
    for row in rows:
        of = runs.setdefault((row["network"], row["start"], row["schedule"]), {})
        of.setdefault(row["noise_train"], []).append(row["accuracy"])
    head, lines = ("network", "start", "noise", "accuracy %, mean over seeds, by noise_train"), []
    for names, levels in runs.items():
        cells = (
            f"{'plain' if noise is None else noise}: {mean(found):.1f}"
            for noise, found in levels.items()
        )
        lines.append((*names, ", ".join(cells)))
    return tables.table(head, lines, len(head))


def rows(options: argparse.Namespace) -> list[record.Row]:
    torch.set_num_threads(1)
    runs = [(name, seed) for name in options.networks for seed in range(NETWORKS[name].seeds)]
    stored = record.stored(record.path("noise_levels", options))
    kept = [row for row in stored if row["network"] not in options.networks]
    return kept + [row for run in runs for row in measure(*run)]


def main() -> int:
    parser = record.parser(__doc__)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    return record.main("noise_levels", parser, rows, table)


if __name__ == "__main__":
    sys.exit(main())
