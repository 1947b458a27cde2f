"""The demonstration: its quick form, its verdict, its sentences."""

import json
import math
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from torch import nn

import normnorm
from accuracy import data, demo, demo_plot
from accuracy.experiment import Experiment
from accuracy.measures import layer_runs, norm_layers, normalization_groups
from accuracy.trainer import Epoch, Trainer, World, load_data
from normnorm.quantiles import normal_r_squared

SCRIPT = Path(__file__).parents[2] / "benchmarks/demo.py"
ALONE = World(0, 1, torch.device("cpu"))


def test_the_quick_demo_prints_stores_and_draws(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "deep" / "run"
    monkeypatch.setattr(data, "MNIST1D", {"train": 1000, "test": 200})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--out", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    for word in ("BatchNorm2d", "BatchNormalNorm2d", "LayerNorm", "LayerNormalNorm", "Q-Q R^2"):
        assert word in out
    assert "1000 to train, 200 to test, seeds: 1, " in out
    assert "accuracy against BatchNorm2d: BatchNormalNorm2d " in out
    assert str(folder / "results.png") in out
    assert out.isascii()
    assert "run 6/6" in err

    written = json.loads((folder / "results.json").read_text())
    assert (written["judged"], written["failures"]) == (False, [])
    assert written["seconds"] > 0
    around = written["environment"]
    assert (around["normnorm"], around["torch"]) == (normnorm.__version__, torch.__version__)
    assert normnorm.available_backends()[around["backend"]] is None
    assert "demo.py --quick" in around["command_line"]
    assert [(side["layer"], side["noise_train"]) for side in written["layers"]] == [
        ("BatchNorm2d", None), ("BatchNormalNorm2d", 0.4), ("BatchNorm2d, decay 0.01", None),
        ("LayerNorm", None), ("LayerNormalNorm, noise 0.3", 0.3), ("LayerNormalNorm", 1.0),
    ]  # fmt: skip
    for side in written["layers"]:
        (epoch,) = side["epochs"]
        assert 0 < epoch["test_accuracy"][0] < 100
        assert 0.8 < side["qq_r2"][0] < 1

    ink = torch.from_numpy((imread(folder / "results.png")[..., :3] < 0.95).any(-1))
    assert 600 <= min(ink.shape) <= max(ink.shape) <= 3000
    for row in ink.chunk(2):
        for panel in row.chunk(2, dim=1):
            assert 0.01 < panel.float().mean() < 0.6


DIGITS, DIGITS_OF_TOKENS = demo.digits()


def sides(*accuracies):
    """The sides of the digits' convolutional net, with test accuracies by seed."""
    found = demo.sides(DIGITS, 1, len(accuracies[0]))
    for side, values in zip(found, accuracies, strict=True):
        side.epochs = [Epoch(1, [0.1], [50.0], [0.1], list(values), None, 2.0 * len(values))]
        side.groups = [torch.randn(4, 48) for _ in values]
        side.qq_r2 = [0.9 for _ in values]
    return found


@pytest.mark.parametrize(
    ("plain", "normality", "words"),
    [
        ([97.0, 99.0], [98.0, 98.0], []),
        ([97.0], [96.0], []),
        ([96.9, 97.0], [98.0, 98.0], ["BatchNorm2d reached 96.95 %"]),
        # Behind by 1.5: allowed is a point and the standard error of the differences 1 and 2.
        ([98.0, 99.0], [97.0, 97.0], []),
        ([98.5, 98.5], [97.0, 97.0], ["BatchNormalNorm2d is -1.50 points"]),
        ([90.0], [80.0], ["at least 97 % was expected", "-10.00 points"]),
        ([math.nan], [math.nan], ["reached nan", "nan points"]),
    ],
)
def test_judgement(plain, normality, words):
    sentences = demo.judge(DIGITS, sides(plain, normality))
    assert len(sentences) == len(words)
    for sentence, word in zip(sentences, words, strict=True):
        assert word in sentence


def test_table_and_finding_show_means_errors_and_noise():
    found = sides([97.0, 99.0], [98.0, 99.0])
    lines = demo.table(found).splitlines()
    numbers = ["2.00", "0.9000", f"{normal_r_squared(48):.4f}"]
    assert lines[2].split()[2:] == ["BatchNorm2d", "-", "98.00", "1.00", *numbers]
    assert lines[3].split()[2:] == ["BatchNormalNorm2d", "0.4", "98.50", "0.50", *numbers]
    assert demo.finding(found).endswith("against BatchNorm2d: BatchNormalNorm2d +0.5 +- 0.5.")


def test_diverged_runs_are_reported_all_the_same(tmp_path):
    found = sides([10.0, 10.0], [100.0, 100.0])
    found[0].qq_r2, found[0].groups = [math.nan] * 2, [torch.full((4, 9), math.nan)] * 2
    found[1].groups = [torch.randn(4, 9)] * 2
    assert "nan" in demo.table(found)
    demo_plot.draw([found], "diverged", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_miss_exits_1_and_is_written_down(tmp_path, monkeypatch, capsys):
    few = {label: replace(e, limit=100) for label, e in DIGITS.layers.items()}
    preset = lambda: (DIGITS._replace(layers=few),), "digits"
    monkeypatch.setitem(demo.PRESETS, "digits", preset)
    words = ["--dataset", "digits", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path)]
    assert demo.main(words) == 1
    assert "at least 97 % was expected" in capsys.readouterr().err  # after a single step
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["judged"]
    assert any("97 %" in sentence for sentence in written["failures"])
    assert [len(side["epochs"][0]["test_accuracy"]) for side in written["layers"]] == [2, 2]


def test_layers_that_are_compared_start_out_equal():
    for comparison in (DIGITS, DIGITS_OF_TOKENS):
        first, second = (
            Trainer(side.experiment, load_data(side.experiment), ALONE).network.state_dict()
            for side in demo.sides(comparison, 1, 2)
        )
        assert first.keys() <= second.keys()
        assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize(
    ("model", "norm", "groups"),
    [
        ("convnet", "batchnormal", (2, 32, 450 * 16)), ("convnet", "group", (2, 450 * 8, 64)),
        ("convnet", "instancenormal", (2, 450 * 32, 16)),
        ("transformer", "layernormal", (2, 450 * 16, 48)),
    ],
)  # fmt: skip
def test_groups_are_normalized_without_the_affine_map(model, norm, groups):
    experiment = Experiment(model=model, norm=norm, copies=2, limit=64)
    trainer = Trainer(experiment, load_data(experiment), ALONE)
    layer = norm_layers(trainer.network)[-1]
    before = nn.init.uniform_(layer.get_parameter("weight"), 2, 3).clone()
    (*_, (layer, input, _)), _ = layer_runs(trainer)
    found = normalization_groups(layer, input, 2)
    assert found.shape == groups
    assert not found.requires_grad
    assert torch.equal(layer.get_parameter("weight"), before)  # the layer itself keeps its map
    if norm != "batchnormal":  # in evaluation it normalizes with its running statistics
        assert found.std(2).median().item() == pytest.approx(1, abs=0.1)


def test_bad_arguments_get_a_sentence(tmp_path, capsys):
    for words in (["--epochs", "0"], ["--seeds", "many"], ["--threads", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            demo.main(words)
        assert stopped.value.code == 2
        assert f"must be a whole number of at least 1; got '{words[1]}'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    (tmp_path / "out/results.json").mkdir(parents=True)
    sentences = {"file": "demo.py: cannot write to", "out": "results.json is a folder"}
    for out, sentence in sentences.items():
        assert demo.main(["--quick", "--out", str(tmp_path / out)]) == 2
        assert sentence in capsys.readouterr().err
