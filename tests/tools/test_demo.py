"""The demonstration: its quick form, its verdict, its sentences."""

from __future__ import annotations

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
from accuracy import demo, demo_plot
from accuracy.data import load
from accuracy.trainer import Epoch, Trainer, World
from normnorm.quantiles import normal_r_squared

SCRIPT = Path(__file__).parents[2] / "benchmarks/demo.py"


def test_the_quick_demo_prints_stores_and_draws(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "deep" / "run"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", "--out", str(folder)])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    for word in ("BatchNorm2d", "BatchNormalNorm2d", "LayerNorm", "LayerNormalNorm", "Q-Q R^2"):
        assert word in out
    assert "1347 training and 450 test images, seeds: 1, " in out
    assert str(folder / "results.png") in out
    assert out.isascii()
    assert "run 4/4" in err

    written = json.loads((folder / "results.json").read_text())
    assert (written["judged"], written["failures"]) == (False, [])
    assert written["seconds"] > 0
    around = written["environment"]
    assert (around["normnorm"], around["torch"]) == (normnorm.__version__, torch.__version__)
    assert normnorm.available_backends()[around["backend"]] is None
    assert "demo.py --quick" in around["command_line"]
    assert [(side["layer"], side["noise_train"]) for side in written["layers"]] == [
        ("BatchNorm2d", None), ("BatchNormalNorm2d", 0.4), ("LayerNorm", None),
        ("LayerNormalNorm", 1.0),
    ]  # fmt: skip
    for side in written["layers"]:
        (run,) = side["runs"]
        (epoch,) = run["epochs"]
        assert epoch["test_accuracy"] > 50  # of ten classes, after one epoch
        assert 0.8 < run["qq_r2"] < 1

    ink = torch.from_numpy((imread(folder / "results.png")[..., :3] < 0.95).any(-1))
    assert 600 <= min(ink.shape) <= max(ink.shape) <= 3000
    for row in ink.chunk(2):
        for panel in row.chunk(2, dim=1):
            assert 0.01 < panel.float().mean() < 0.6


def pair(plain, normality):
    """A plain layer's side and a normality layer's, with a run for each accuracy."""
    sides = demo.sides(1)[:2]
    for side, accuracies in zip(sides, (plain, normality), strict=True):
        side.runs = [
            demo.Run([Epoch(1, 0.1, accuracy, step_ms)], torch.randn(4, 48), 0.9)
            for accuracy, step_ms in zip(accuracies, (1.0, 3.0), strict=False)
        ]
    return sides


@pytest.mark.parametrize(
    ("plain", "normality", "words"),
    [
        ([97.0, 99.0], [98.0, 98.0], []),
        ([97.0], [96.0], []),
        ([96.9, 97.0], [98.0, 98.0], ["BatchNorm2d reached 96.95 %"]),
        # Behind by 1.5: allowed is a point and the standard error of the differences 1 and 2.
        ([98.0, 99.0], [97.0, 97.0], []),
        ([98.5, 98.5], [97.0, 97.0], ["BatchNormalNorm2d is 1.50 points"]),
        ([90.0], [80.0], ["at least 97 % was expected", "10.00 points"]),
        ([math.nan], [math.nan], ["reached nan", "nan points"]),
    ],
)
def test_judgement(plain, normality, words):
    sentences = demo.judge(pair(plain, normality))
    assert len(sentences) == len(words)
    for sentence, word in zip(sentences, words, strict=True):
        assert word in sentence


def test_the_table_shows_means_errors_medians_and_noise():
    lines = demo.table(pair([97.0, 99.0], [98.0, 98.0])).splitlines()
    numbers = ["2.00", "0.9000", f"{normal_r_squared(48):.4f}"]
    assert lines[2].split()[2:] == ["BatchNorm2d", "-", "98.00", "1.00", *numbers]
    assert lines[3].split()[2:] == ["BatchNormalNorm2d", "0.4", "98.00", "0.00", *numbers]


def test_diverged_runs_are_reported_all_the_same(tmp_path):
    sides = pair([10.0, 10.0], [100.0, 100.0])
    for run in sides[0].runs:
        run.qq_r2, run.groups = math.nan, torch.full((4, 9), math.nan)
    assert "nan" in demo.table(sides)
    demo_plot.draw(sides, "diverged", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_miss_exits_1_and_is_written_down(tmp_path, monkeypatch, capsys):
    experiment, names = demo.PRESET["convolutional net"]
    monkeypatch.setattr(demo, "PRESET", {"net": (replace(experiment, limit=100), names)})
    assert demo.main(["--epochs", "1", "--seeds", "2", "--out", str(tmp_path)]) == 1
    assert "at least 97 % was expected" in capsys.readouterr().err  # after a single step
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["judged"]
    assert any("97 %" in sentence for sentence in written["failures"])
    assert [len(side["runs"]) for side in written["layers"]] == [2, 2]


def test_pairs_start_out_equal():
    world, data = World(0, 1, torch.device("cpu")), load("digits", Path(), 0)
    sides = [Trainer(side.experiment, data, world).network.state_dict() for side in demo.sides(1)]
    for plain, normality in zip(sides[::2], sides[1::2], strict=True):
        assert plain.keys() <= normality.keys()
        assert all(torch.equal(value, normality[name]) for name, value in plain.items())


@pytest.mark.parametrize(
    ("layer", "inputs", "groups"),
    [(nn.BatchNorm2d(4), (6, 4, 3, 3), (4, 54)), (nn.LayerNorm(8), (6, 5, 8), (30, 8))],
)
def test_groups_are_normalized_without_the_affine_map(layer, inputs, groups):
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 1, 2)
    found = demo._groups(nn.Sequential(nn.LayerNorm(inputs[1:]), layer), torch.randn(inputs))
    assert found.shape == groups
    assert not found.requires_grad
    assert (layer.weight != 1).all()  # the layer itself keeps its map
    if isinstance(layer, nn.LayerNorm):
        torch.testing.assert_close(found.mean(1), torch.zeros(30))


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
