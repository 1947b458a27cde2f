"""Experiments: data sets, networks, norms by name, training that resumes bit for bit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import image_archives
import pytest
import torch

from normnorm import cli
from normnorm.experiments import datasets, folder, norms
from normnorm.experiments.augment import shift_and_mirror
from normnorm.experiments.config import Experiment, recipe
from normnorm.experiments.decorrelated import DecorrelatedBatchNorm2d, inverse_square_root
from normnorm.experiments.libraries import ExperimentError
from normnorm.experiments.nets import MODELS
from normnorm.experiments.trainer import Trainer
from normnorm.experiments.world import World

ALONE = World(0, 1, torch.device("cpu"))


# Data.


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_every_data_set_is_read_by_torchvisions_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image_archives.write(monkeypatch, name, tmp_path)
    spec = datasets.DATASETS[name]
    train, test, shape, classes = datasets.load(name, tmp_path, seed=0)
    assert shape == (spec.channels, spec.size, spec.size)
    assert (len(train) > 0, len(test) > 0, classes) == (True, True, spec.classes)
    for data in (train, test):
        labels = set()
        for index in range(len(data)):
            image, label = data[index]
            assert image.shape == shape
            assert image.dtype == torch.float32
            # Uniform bytes, standardized by about a half and a quarter.
            assert -5 < image.min() < 0 < 0.5 < image.max() < 5
            assert 0 <= label < classes
            labels.add(label)
        assert len(labels) > 1
    held_out = {test[i][0].numpy().tobytes() for i in range(len(test))}
    assert not held_out & {train[i][0].numpy().tobytes() for i in range(len(train))}
    assert [len(part) for part in datasets.load(name, tmp_path, 0, limit=2)[:2]] == [2, 2]


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_a_missing_data_set_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExperimentError) as caught:
        datasets.load(name, tmp_path, seed=0)
    sentence = str(caught.value)
    assert f"'{name}' is not in {tmp_path}" in sentence
    if datasets.DATASETS[name].fetch is None:
        assert "It is at http" in sentence
    else:
        command = sentence.split("This command fetches it: python -c ")[1]
        code = __import__("shlex").split(command)[0]
        compile(code, "the command", "exec")
        assert "download=True" in code
        assert str(tmp_path) in code


def test_images_are_scaled_to_their_shorter_side_and_cut_in_the_middle() -> None:
    from PIL import Image

    spec = replace(datasets.DATASETS["cifar10"], size=4, mean=(0, 0, 0), std=(1, 1, 1))
    picture = Image.new("RGB", (16, 8))
    picture.paste((255, 0, 0), (4, 0, 12, 8))  # the middle square is red
    (image, label) = datasets.Images([(picture, 3)], spec)[0]
    assert label == 3
    assert image[0, :, 1:3].min() > 0.95
    assert image[1:].max() == 0


def test_shifts_keep_what_stays_inside_and_mirrors_come_half_the_time() -> None:
    torch.manual_seed(0)
    images = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(400, 2, 16, 16)
    moved = shift_and_mirror(images, mirror=True)
    assert moved.shape == images.shape
    centre = moved[:, 0, 7, 7]
    mirrored = moved[:, 0, 7, 8] < centre
    assert 150 < mirrored.sum() < 250
    # Values run along rows by 1 and along columns by 16: where the centre came from.
    position = centre.long() - 1
    shifts_down, shifts_right = position // 16 - 7, position % 16 - 7
    assert shifts_down.unique().tolist() == [-2, -1, 0, 1, 2]
    assert set(shifts_right[~mirrored].tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(moved[:, 0], moved[:, 1])
    plain = shift_and_mirror(images, mirror=False)
    assert (plain[:, 0, 7, 8] - plain[:, 0, 7, 7] == 1).all()


# Norms and networks.


def test_the_inverse_square_root_and_its_gradient_with_equal_eigenvalues() -> None:
    torch.manual_seed(0)
    factor = torch.randn(2, 4, 6, dtype=torch.float64)
    matrix = factor @ factor.mT
    root = inverse_square_root(matrix)
    torch.testing.assert_close(root @ matrix @ root, torch.eye(4).double().expand(2, 4, 4))

    def of_symmetric(x: torch.Tensor) -> torch.Tensor:
        return inverse_square_root((x + x.mT) / 2)

    assert torch.autograd.gradcheck(of_symmetric, (matrix.requires_grad_(),))
    equal = (2 * torch.eye(3, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(of_symmetric, (equal,))


def test_decorrelated_batch_norm_whitens_and_remembers() -> None:
    torch.manual_seed(0)
    layer = DecorrelatedBatchNorm2d(6, group_size=4, eps=1e-8, momentum=1.0)
    mixing = torch.randn(6, 6)
    inputs = torch.einsum("ij,njhw->nihw", mixing, torch.randn(50, 6, 5, 5)) + 3
    rows = layer(inputs).transpose(0, 1).flatten(1)
    for part in (rows[:4], rows[4:]):
        covariance = part @ part.T / part.size(1)
        torch.testing.assert_close(covariance, torch.eye(len(part)), atol=2e-3, rtol=0)
    layer.eval()
    torch.testing.assert_close(layer(inputs).transpose(0, 1).flatten(1), rows, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"expected \(N, 6, H, W\); got \(2, 5, 1, 1\)"):
        layer(torch.randn(2, 5, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer.train()(torch.randn(1, 6, 1, 1))


def test_decorrelated_batch_norm_has_right_gradients() -> None:
    torch.manual_seed(0)
    layer = DecorrelatedBatchNorm2d(3, group_size=2).double()
    inputs = torch.randn(6, 3, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (inputs,))


@pytest.mark.parametrize("model", MODELS)
def test_every_network_takes_every_norm_of_its_kind(model: str) -> None:
    net = MODELS[model]
    heavy = model in ("resnet34", "resnet50", "vit")
    names = list(norms.TOKENS if net.tokens else norms.CONVOLUTIONAL)
    for name in names[:2] if heavy else names:
        network = net.build(norms.make_norm(name, net.tokens), (1, 16, 16), 7)
        network.eval()
        assert network(torch.randn(2, 1, 16, 16)).shape == (2, 7)
        classes = {type(module).__name__ for module in network.modules()}
        plain = {"BatchNorm2d", "LayerNorm", "GroupNorm", "InstanceNorm2d"}
        assert not (norms.noise_and_alpha_apply(name) and classes & plain)


def test_the_papers_networks_have_their_size() -> None:
    def parameters(model: str, image: tuple[int, int, int], classes: int) -> int:
        net = MODELS[model]
        norm = norms.make_norm("layer" if net.tokens else "batch", net.tokens)
        return sum(p.numel() for p in net.build(norm, image, classes).parameters())

    assert parameters("wrn28-2", (3, 32, 32), 10) == 1_467_610
    assert parameters("resnet18", (3, 224, 224), 1000) == 11_689_512
    assert parameters("resnet18", (3, 32, 32), 10) == 11_173_962
    vit = parameters("vit", (3, 32, 32), 10)
    assert 56e6 < vit < 58e6  # 8 layers of width 768


def test_options_reach_the_layers() -> None:
    layer = norms.make_norm("batchnormal", False, alpha=0.5, noise_train=0.0)(4)
    assert (layer.alpha, layer.noise_train) == (0.5, 0.0)
    assert norms.make_norm("layernormal", True)(4).noise_train == 1.0
    assert norms.make_norm("decorrelatednormal", False, noise_train=0.1)(4).after.noise_train == 0.1


# Training.


def _experiment(**choices: Any) -> Experiment:
    return Experiment(**{"epochs": 2, "batch_size": 128, "limit": 700, **choices})


def _state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.network.state_dict().items()}


@pytest.mark.parametrize(
    "choices",
    [
        {"norm": "batchnormal", "augment": True, "per_weight": 1e-3, "step_epochs": 1},
        {"model": "transformer", "norm": "layernormal", "optimizer": "adamw", "amp": "bfloat16",
         "learning_rate": 1e-3},
    ],
    ids=["convnet", "transformer"],
)  # fmt: skip
def test_a_run_stopped_at_any_step_goes_on_bit_for_bit(
    tmp_path: Path, choices: dict[str, Any]
) -> None:
    experiment = _experiment(**choices)
    whole = Trainer(experiment, tmp_path, ALONE)
    epochs = whole.train()

    class Stop(Exception):
        pass

    for stop_at in (1, 3, 5, 8):
        stopped = Trainer(experiment, tmp_path, ALONE)
        steps = 0

        def on_step(stopped: Trainer = stopped, stop_at: int = stop_at) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                stopped.save(tmp_path / "checkpoint.pt")
                raise Stop

        with pytest.raises(Stop):
            stopped.train(on_step)
        resumed = Trainer(experiment, tmp_path, ALONE)
        torch.randn(17)  # whatever a new process drew before
        resumed.resume(tmp_path / "checkpoint.pt")
        last = resumed.train()[-1]
        assert (last.train_loss, last.test_accuracy) == (
            epochs[-1].train_loss, epochs[-1].test_accuracy,
        )  # fmt: skip
        for name, value in _state(whole).items():
            assert torch.equal(value, resumed.network.state_dict()[name]), name


def _arguments(out: Path, *more: str) -> list[str]:
    return [
        "train", "--epochs", "3", "--batch-size", "64", "--limit", "700", "--out", str(out),
        "--checkpoint-steps", "3", *more,
    ]  # fmt: skip


def test_a_killed_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normnorm", *_arguments(tmp_path / "killed")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed/digits-convnet-batchnormal-lr0.1-seed2/checkpoint.pt"
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert checkpoint.exists()
    stood = torch.load(checkpoint, weights_only=True)
    assert stood["epoch"] < 3, "the run was over before it could be killed"
    assert cli.main(_arguments(tmp_path / "killed", "--resume")) == 0
    assert cli.main(_arguments(tmp_path / "whole")) == 0
    killed, whole = (
        torch.load(tmp_path / name / checkpoint.parent.name / "checkpoint.pt", weights_only=True)
        for name in ("killed", "whole")
    )
    assert killed["epoch"] == whole["epoch"] == 3
    assert all(torch.equal(killed["network"][name], v) for name, v in whole["network"].items())
    lines = [
        [json.loads(line) for line in (tmp_path / name / checkpoint.parent.name / "metrics.jsonl")
         .read_text().splitlines()]
        for name in ("killed", "whole")
    ]  # fmt: skip
    for resumed, straight in zip(*lines, strict=True):
        for key in ("event", "epoch", "train_loss", "test_accuracy"):
            assert resumed.get(key) == straight.get(key)


def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    # Without statistics of the batch: those are each process's own.
    words = [
        "train", "--norm", "group", "--epochs", "1", "--limit", "700", "--batch-size", "64",
        "--learning-rate", "0.02",
    ]  # fmt: skip
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "normnorm",
    ]  # fmt: skip
    done = subprocess.run(
        [*torchrun, *words, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert cli.main([*words, "--out", str(tmp_path / "one")]) == 0
    name = "digits-convnet-group-lr0.02-seed2"
    two, one = (
        torch.load(tmp_path / part / name / "checkpoint.pt", weights_only=True)["network"]
        for part in ("two", "one")
    )
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    epochs = [folder.read_epochs(tmp_path / part / name) for part in ("two", "one")]
    assert epochs[0][0].train_loss == pytest.approx(epochs[1][0].train_loss, rel=1e-3)


def test_a_sweep_trains_every_combination_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--epochs", "1", "--limit", "128", "--out", str(tmp_path)]
    swept = ["--norm", "batch", "batchnormal", "--noise-train", "0", "0.4", "--seed", "2", "3"]
    assert cli.main([*words, *swept, "--tensorboard"]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"digits-convnet-{norm}-lr0.1-seed{seed}"
        for norm in ("batch", "batchnormal-noise_train0", "batchnormal-noise_train0.4")
        for seed in (2, 3)
    )
    assert len(capsys.readouterr().out.splitlines()) == 6
    for name in names:
        files = [path.name.split(".")[0] for path in (tmp_path / name).iterdir()]
        assert sorted(files) == ["checkpoint", "events", "metrics"]
    assert cli.main([*words, *swept]) == 2
    assert "6 of 6 runs are there already; --resume goes on with them" in capsys.readouterr().err


def test_a_sweep_is_checked_whole_before_anything_is_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["train", "--epochs", "1", "--limit", "128", "--seed", "2", "3"]
    swept = [*words, "--out", str(out)]
    last = out / "digits-convnet-batchnormal-lr0.1-seed3"

    def refused(sentence: str, *more: str) -> None:
        assert cli.main([*swept, *more]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert sentence in line
        assert not out.is_dir() or list(out.iterdir()) == [last]

    out.touch()
    refused(f"cannot write to {out}")
    out.unlink()
    refused("would share the folder", "--alpha", "0.50000001", "0.50000002")
    assert cli.main([*words[:-2], "3", "--out", str(out)]) == 0
    capsys.readouterr()
    refused("1 of 2 runs are there already; --resume goes on with them")
    refused("is of another experiment: weight_decay", "--resume", "--weight-decay", "0.1")
    (last / "checkpoint.pt").write_bytes(b"half")
    refused("is not a checkpoint", "--resume")


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--epochs", "1", "--limit", "128", "--out", str(tmp_path / "out")]

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during:
        during.setattr(Trainer, "_train_step", interrupted)
        assert cli.main(words) == 130
        assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
        study = ["study", "--results", str(tmp_path / "study.json"), "--arms", "batch"]
        assert cli.main(study) == 130
        assert "interrupted; the same command goes on with the runs" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0


def test_the_papers_recipes() -> None:
    resnet = Experiment(**recipe("cifar10", "resnet18"))
    assert (resnet.optimizer, resnet.learning_rate, resnet.momentum) == ("sgd", 0.1, 0.9)
    assert (resnet.weight_decay, resnet.batch_size, resnet.epochs) == (5e-4, 128, 200)
    assert resnet.step_epochs == 60
    vit = Experiment(**recipe("cifar10", "vit"))
    assert (vit.optimizer, vit.learning_rate, vit.weight_decay) == ("adamw", 1e-3, 0.05)
    assert vit.batch_size == 32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dataset", "model", "norm", "learning_rate"),
    [("cifar10", "resnet18", "batchnormal", "1e-3"), ("mnist", "wrn28-2", "groupnormal", "1e-3"),
     ("food101", "resnet18", "instancenormal", "1e-3"),
     ("tinyimagenet", "resnet34", "decorrelatednormal", "1e-3"),
     ("cifar100", "vit", "layernormal", "1e-3"),
     # Without a norm each of the 16 blocks adds to the variance: logits begin with a standard
     # deviation of 15, and one step of 1e-3 takes the loss from 23 to 230, one of 1e-5 to 15.
     ("stl10", "resnet50", "none", "1e-5")],
)  # fmt: skip
def test_the_papers_networks_train_on_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, model: str, norm: str,
    learning_rate: str,
) -> None:  # fmt: skip
    image_archives.write(monkeypatch, dataset, tmp_path / "data", count=8)
    words = [
        "train", "--dataset", dataset, "--model", model, "--norm", norm, "--epochs", "1",
        "--batch-size", "4", "--limit", "8", "--data-dir", str(tmp_path / "data"),
        "--out", str(tmp_path / "out"), "--workers", "1", "--learning-rate", learning_rate,
    ]  # fmt: skip
    assert cli.main(words) == 0
    (path,) = (tmp_path / "out").iterdir()
    (epoch,) = folder.read_epochs(path)
    assert 0 < epoch.train_loss < 100
    assert 0 <= epoch.test_accuracy <= 100


# Bad input.


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset", "cifar11"], "dataset must be one of digits, mnist"),
        (["--model", "alexnet"], "model must be one of convnet"),
        (["--norm", "rms"], "norm must be one of batch"),
        (["--norm", "layer"], "norm 'layer' does not normalize images"),
        (["--model", "vit", "--norm", "batch"], "norm 'batch' does not normalize tokens"),
        (["--norm", "batch", "--alpha", "0.5"], "norm 'batch' has no alpha"),
        (["--epochs", "0"], "epochs must be positive; got 0"),
        (["--learning-rate", "-1"], "learning_rate must be positive; got -1.0"),
        (["--weight-decay", "nan"], "weight_decay must be finite"),
        (["--batch-size", "5000"], "batch_size 5000 is more than the 1347 training images"),
        (["--dataset", "cifar10", "--data-dir", "/nonexistent"], "This command fetches it"),
    ],
)
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert cli.main(["train", "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_experiment_is_refused(tmp_path: Path) -> None:
    options = folder.Options(out=tmp_path, resume=True)
    experiment = _experiment(epochs=1)
    folder.run(experiment, options, ALONE, hidden=True)
    metrics = tmp_path / folder.folder_name(experiment) / "metrics.jsonl"
    before = metrics.read_text()
    with pytest.raises(ExperimentError, match=r"of another experiment: weight_decay 0.0005 \(now"):
        folder.run(replace(experiment, weight_decay=0.1), options, ALONE, hidden=True)
    (metrics.parent / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(ExperimentError, match="is not a checkpoint"):
        folder.run(experiment, options, ALONE, hidden=True)
    assert metrics.read_text() == before
    with pytest.raises(ExperimentError, match="holds no run's metrics"):
        folder.read_epochs(tmp_path / "nothing")


def test_processes_must_share_a_batch_evenly(tmp_path: Path) -> None:
    three = World(0, 3, torch.device("cpu"))
    with pytest.raises(ValueError, match="batch_size 128 does not divide among 3 processes"):
        Trainer(_experiment(), tmp_path, three)
