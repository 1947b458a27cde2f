"""The demonstration: its quick form through the real command, its verdict, its sentences."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import normnorm
from normnorm import cli, quantiles
from normnorm.demo import data, main, nets, normality, plot, results, train


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """``python -m normnorm demo --quick`` in a process of its own."""
    folder = tmp_path_factory.mktemp("demo") / "deep" / "run"
    command = [sys.executable, "-m", "normnorm", "demo", "--quick", "--threads", "1"]
    done = subprocess.run(
        [*command, "--out", str(folder)], capture_output=True, text=True, check=False
    )
    return {"done": done, "folder": folder}


def test_quick_prints_the_table(quick: dict[str, Any]) -> None:
    done = quick["done"]
    assert done.returncode == 0, done.stderr
    for word in ("BatchNorm2d", "BatchNormalNorm2d", "LayerNorm", "LayerNormalNorm", "Q-Q R^2"):
        assert word in done.stdout
    assert "results.png" in done.stdout
    assert done.stdout.isascii()
    assert "run 4/4" in done.stderr
    assert "left" in done.stderr


def test_quick_writes_all_numbers(quick: dict[str, Any]) -> None:
    written = json.loads((quick["folder"] / "results.json").read_text())
    assert written["dataset"] == "digits"
    assert written["seeds"] == [0]
    assert (written["train_images"], written["test_images"]) == (1347, 450)
    assert written["seconds"] > 0
    assert (written["judged"], written["failures"]) == (False, [])
    around = written["environment"]
    assert around["normnorm"] == normnorm.__version__
    assert around["torch"] == torch.__version__
    assert around["threads"] == 1
    assert normnorm.available_backends()[around["backend"]] is None
    assert "demo --quick" in around["command_line"]
    assert all(around[key] for key in ("python", "platform", "cpu", "scikit-learn", "matplotlib"))
    layers = [layer for pair in written["comparisons"] for layer in pair["layers"]]
    assert [(layer["layer"], layer["noise_train"]) for layer in layers] == [
        ("BatchNorm2d", None),
        ("BatchNormalNorm2d", 0.4),
        ("LayerNorm", None),
        ("LayerNormalNorm", 1.0),
    ]
    for pair in written["comparisons"]:
        assert pair["network"] in ("convolutional net", "transformer")
        assert pair["epochs"] == 1
        assert 0.97 < pair["qq_r2_of_normal_samples"] < 1
    for layer in layers:
        (accuracy,) = layer["test_accuracy_percent"]["per_seed"]
        assert layer["test_accuracy_percent"]["mean"] == accuracy
        assert layer["test_accuracy_percent"]["standard_error"] is None
        assert accuracy > 50  # of ten classes, after one epoch
        assert layer["curves"]["test_accuracy_percent"] == [[accuracy]]
        assert len(layer["curves"]["train_loss"][0]) == 1
        assert 0 < layer["step_ms_median"] < 10_000
        assert 0.8 < layer["qq_r2"]["mean"] < 1


def test_quick_draws_the_plot(quick: dict[str, Any]) -> None:
    png = (quick["folder"] / "results.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))
    assert 1000 <= width <= 3000
    assert 600 <= height <= 3000
    from matplotlib.image import imread

    image = imread(quick["folder"] / "results.png")[..., :3]
    ink = (image < 0.95).any(-1)
    for row in np.array_split(ink, 2):
        for panel in np.array_split(row, 3, axis=1):
            assert 0.01 < panel.mean() < 0.6


def _side(layer: str, accuracies: list[float], noise: float | None = None) -> results.Results:
    runs = [
        train.Run(seed, [0.1], [accuracy], [1.0, 3.0, 2.0], 0.9, torch.randn(4, 48))
        for seed, accuracy in enumerate(accuracies)
    ]
    return results.Results(layer, noise, runs)


def _pair(plain: list[float], normality: list[float], bar: float | None) -> results.Comparison:
    sides = _side("BatchNorm2d", plain), _side("BatchNormalNorm2d", normality, 0.4)
    return results.Comparison("convolutional net", 1, *sides, bar)


@pytest.mark.parametrize(
    ("plain", "normal", "bar", "words"),
    [
        ([97.0, 99.0], [98.0, 98.0], 97.0, []),
        ([97.0], [96.0], 97.0, []),
        ([96.9, 97.0], [98.0, 98.0], 97.0, ["BatchNorm2d reached 96.95 %"]),
        ([50.0], [50.0], None, []),
        # Behind by 1.5: allowed is a point and the standard error of the differences 1 and 2.
        ([98.0, 99.0], [97.0, 97.0], 97.0, []),
        ([98.5, 98.5], [97.0, 97.0], 97.0, ["BatchNormalNorm2d is 1.50 points"]),
        ([98.0], [96.9], 97.0, ["1.00 (a point and a standard error) is allowed"]),
        ([90.0], [80.0], 97.0, ["at least 97 % was expected", "10.00 points"]),
        ([math.nan], [math.nan], 97.0, ["reached nan", "nan points"]),
    ],
)
def test_judgement(plain: Any, normal: Any, bar: float | None, words: list[str]) -> None:
    sentences = results.judge([_pair(plain, normal, bar)])
    assert len(sentences) == len(words)
    for sentence, word in zip(sentences, words, strict=True):
        assert word in sentence


def test_standard_error_is_scipys() -> None:
    values = [97.1, 98.4, 98.9, 96.0]
    assert results.standard_error(values) == pytest.approx(scipy.stats.sem(values))
    assert results.standard_error([97.1]) is None


def test_table_shows_means_errors_medians_and_noise() -> None:
    lines = results.table([_pair([97.0, 99.0], [98.0, 98.0], None)]).splitlines()
    cells = [re.split(r" {2,}", line.strip()) for line in lines]
    assert cells[0][2:6] == ["noise_train", "accuracy %", "std. error", "ms a step"]
    assert cells[0][6:] == ["Q-Q R^2", "(normal)"]
    numbers = ["2.00", "0.9000", f"{quantiles.normal_r_squared(48):.4f}"]
    assert cells[2] == ["convolutional net", "BatchNorm2d", "-", "98.00", "1.00", *numbers]
    assert cells[3] == ["BatchNormalNorm2d", "0.4", "98.00", "0.00", *numbers]


def test_diverged_runs_are_reported_all_the_same(tmp_path: Path) -> None:
    pair = _pair([10.0, 10.0], [100.0, 100.0], None)
    for run in pair.plain.runs:
        run.train_loss, run.qq_r2, run.groups = [math.inf], math.nan, torch.full((4, 9), math.nan)
    for run in pair.normality.runs:
        run.groups = torch.randn(4, 9)
    written = json.dumps(results.to_json([pair]), allow_nan=False)
    assert json.loads(written)[0]["layers"][0]["qq_r2"]["mean"] is None
    assert "nan" in results.table([pair])
    plot.draw([pair], "diverged", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of a few steps: the first 100 training images, one epoch, two seeds."""
    whole = main.load_digits

    def load(seed: int) -> data.Split:
        split = whole(seed)
        return data.Split(
            split.train_images[:100], split.train_labels[:100], split.test_images, split.test_labels
        )

    monkeypatch.setattr(main, "load_digits", load)


@pytest.mark.usefixtures("short")
def test_a_miss_exits_1_and_is_written_down(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    arguments = ["demo", "--epochs", "1", "--seeds", "2", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1  # nothing reaches 97 % in one step
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    printed = capsys.readouterr()
    assert "at least 97 % was expected" in printed.err
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["judged"]
    assert any("97 %" in sentence for sentence in written["failures"])
    for pair in written["comparisons"]:
        for layer in pair["layers"]:
            assert len(layer["test_accuracy_percent"]["per_seed"]) == 2
            assert layer["test_accuracy_percent"]["standard_error"] is not None


@pytest.mark.usefixtures("short")
def test_equal_seeds_give_equal_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = main._DATASETS["digits"].transformer
    short = train.Recipe(recipe.build, 2, 25, recipe.learning_rate)
    split = main.load_digits(0)
    steps: list[int] = []
    runs = []
    for seed in (3, 3, 4):
        torch.manual_seed(99)  # whatever went before
        runs.append(
            train.train(short, normnorm.LayerNormalNorm, split, seed, lambda: steps.append(1))
        )
    assert len(steps) == 3 * short.steps(split) == 3 * 2 * 4
    one, same, other = runs
    assert one.train_loss == same.train_loss
    assert one.test_accuracy == same.test_accuracy
    assert torch.equal(one.groups, same.groups)
    assert one.train_loss != other.train_loss


@pytest.mark.parametrize("network", ["convolutional", "transformer"])
def test_a_pair_starts_out_equal(network: str) -> None:
    build = getattr(main._DATASETS["digits"], network).build
    plain, normal = (
        (nn.BatchNorm2d, normnorm.BatchNormalNorm2d)
        if network == "convolutional"
        else (nn.LayerNorm, normnorm.LayerNormalNorm)
    )
    parameters = []
    for norm in (plain, normal):
        torch.manual_seed(5)
        parameters.append(build(norm, (1, 8, 8), 10).state_dict())
    assert parameters[0].keys() <= parameters[1].keys()
    for name, value in parameters[0].items():
        assert torch.equal(value, parameters[1][name])


def test_the_blocks_use_the_layers_they_were_given() -> None:
    """In evaluation too, where torch's own encoder layer would not."""
    torch.manual_seed(0)
    network = nets.Transformer(normnorm.LayerNormalNorm, (1, 8, 8), 10, (2, 2), 16, 2).eval()
    calls = []
    for module in network.modules():
        if isinstance(module, normnorm.LayerNormalNorm):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert network(torch.randn(3, 1, 8, 8)).shape == (3, 10)
    assert len(calls) == 5


def test_split_is_stratified_standardized_and_disjoint() -> None:
    split = data.load_digits(1)
    assert split.train_images.shape == (1347, 1, 8, 8)
    assert split.test_images.shape == (450, 1, 8, 8)
    assert split.classes == 10
    assert split.train_images.mean().item() == pytest.approx(0, abs=1e-5)
    assert split.train_images.std().item() == pytest.approx(1, abs=1e-5)
    assert abs(split.test_images.mean().item()) > 1e-5  # not by statistics of its own
    share = torch.bincount(split.test_labels) / torch.bincount(split.train_labels)
    assert ((share - 1 / 3).abs() < 0.02).all()
    rows = {image.numpy().tobytes() for image in split.train_images}
    assert len(rows & {image.numpy().tobytes() for image in split.test_images}) == 0
    again = data.load_digits(2)
    assert not torch.equal(split.test_images, again.test_images)


@pytest.mark.parametrize(
    ("layer", "inputs", "groups"),
    [(nn.BatchNorm2d(4), (6, 4, 3, 3), (4, 54)), (nn.LayerNorm(8), (6, 5, 8), (30, 8))],
)
def test_groups_are_normalized_without_the_affine_map(
    layer: nn.Module, inputs: tuple[int, ...], groups: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    with torch.no_grad():
        weight.uniform_(1, 2)
        bias.uniform_(1, 2)
    network = nn.Sequential(nn.Identity(), layer)
    found = normality.normalized_groups(network, layer, torch.randn(inputs))
    assert found.shape == groups
    assert not found.requires_grad
    assert (weight != 1).all()  # the layer itself keeps its map
    if isinstance(layer, nn.LayerNorm):
        torch.testing.assert_close(found.mean(1), torch.zeros(30))


# --- sentences ------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["matplotlib", "sklearn", "tqdm"])
def test_a_missing_extra_is_named(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert cli.main(["demo", "--quick"]) == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert module.replace("sklearn", "scikit-learn") in sentence
    assert 'pip install "normnorm[demo]"' in sentence


def test_importing_it_needs_torch_alone() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import normnorm.demo; "
        "print({'matplotlib', 'sklearn', 'scipy', 'tqdm'} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--epochs", "0"], "must be a whole number of at least 1; got '0'"),
        (["--seeds", "many"], "must be a whole number of at least 1; got 'many'"),
        (["--threads", "-1"], "must be a whole number of at least 1; got '-1'"),
        (["--dataset", "mnist"], "invalid choice: 'mnist'"),
    ],
)
def test_bad_arguments(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *arguments])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_a_file_in_the_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "cannot write to" in capsys.readouterr().err
    (tmp_path / "out/results.json").mkdir(parents=True)
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "out")]) == 2
    assert "results.json is a folder" in capsys.readouterr().err


def test_data_dir_without_cifar10(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--quick", "--data-dir", str(tmp_path)]) == 2
    assert "--data-dir is for --dataset cifar10" in capsys.readouterr().err


def test_cifar10_without_torchvision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    assert cli.main(["demo", "--quick", "--dataset", "cifar10"]) == 2
    assert "pip install torchvision" in capsys.readouterr().err


def test_cifar10_with_a_torchvision_for_another_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = tmp_path / "torchvision"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(data.DemoError, match=r"nms does not exist.*pip install --upgrade"):
        data.load_cifar10(tmp_path)


# --- CIFAR-10 -------------------------------------------------------------------------------------


class StandIn:
    """Where torchvision is absent: as much of its CIFAR10 as the demonstration relies on."""

    base_folder = "cifar-10-batches-py"
    train_list = (("data_batch_1", "checksum"),)
    test_list = (("test_batch", "checksum"),)
    meta = None

    def __init__(self, root: str, train: bool, download: bool) -> None:
        assert not download
        parts = []
        for name, md5 in self.train_list if train else self.test_list:
            path = Path(root) / self.base_folder / name
            if not path.exists() or hashlib.md5(path.read_bytes()).hexdigest() != md5:
                raise RuntimeError("Dataset not found or corrupted.")
            parts.append(pickle.loads(path.read_bytes()))
        self.targets = [label for part in parts for label in part["labels"]]
        pixels = np.concatenate([part["data"] for part in parts])
        self.data = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


@pytest.fixture
def cifar10(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """torchvision's class, or the stand-in where it cannot be imported."""
    library = None
    if torch.version.cuda is None:
        # torchvision's wheel for CUDA wants operators that its library cannot bring to this torch.
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            if not hasattr(torch.ops.torchvision, name):
                library.define(f"{name}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError):
        CIFAR10 = StandIn
        package, datasets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
        datasets.CIFAR10 = StandIn  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torchvision", package)
        monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    yield CIFAR10
    del library


@pytest.fixture
def archive(cifar10: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches of four images in the real format; the class is told their checksums."""
    folder = tmp_path / "images" / cifar10.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def write(name: str, content: dict[str, Any]) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    checksums = []
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        pixels[:, 2048:] //= 2  # a channel of its own kind
        labels = [0, 1, 8, 9]
        checksums.append([name, write(name, {"data": pixels, "labels": labels})])
    names = write("batches.meta", {"label_names": [str(i) for i in range(10)]})
    monkeypatch.setattr(cifar10, "train_list", checksums[:5])
    monkeypatch.setattr(cifar10, "test_list", checksums[5:])
    monkeypatch.setattr(
        cifar10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": names}
    )
    return tmp_path / "images"


def test_cifar10_is_read_as_it_lies_on_disk(archive: Path) -> None:
    split = data.load_cifar10(archive)
    assert split.train_images.shape == (20, 3, 32, 32)
    assert split.test_images.shape == (4, 3, 32, 32)
    assert split.classes == 10
    assert split.train_labels.tolist() == [0, 1, 8, 9] * 5
    torch.testing.assert_close(split.train_images.mean((0, 2, 3)), torch.zeros(3))
    torch.testing.assert_close(split.train_images.std((0, 2, 3)), torch.ones(3))
    batch = pickle.loads((archive / "cifar-10-batches-py" / "data_batch_1").read_bytes())
    red = torch.from_numpy(batch["data"][0, :1024].astype("float32"))
    torch.testing.assert_close(
        torch.corrcoef(torch.stack([red, split.train_images[0, 0].flatten()]))[0, 1],
        torch.tensor(1.0),
    )


def test_cifar10_runs(archive: Path, tmp_path: Path) -> None:
    arguments = ["demo", "--quick", "--dataset", "cifar10", "--data-dir", str(archive)]
    assert cli.main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["dataset"], written["train_images"]) == ("cifar10", 20)
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.usefixtures("cifar10")
def test_absent_cifar10_names_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--quick", "--dataset", "cifar10", "--data-dir", str(tmp_path / "none")]
    assert cli.main(arguments) == 2
    sentence = capsys.readouterr().err
    assert "download=True" in sentence
    assert str(tmp_path / "none") in sentence
