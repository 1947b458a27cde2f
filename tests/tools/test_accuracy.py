"""Training: data sets, networks and norms by name, runs that resume bit for bit, sweeps."""

import json
import math
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import image_archives
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import TensorDataset

from accuracy import data, nets, norms, runs
from accuracy.experiment import Experiment
from accuracy.layers import DecorrelatedBatchNorm2d, inverse_square_root
from accuracy.trainer import Trainer, World, load_data
from normnorm import BatchNormalNorm2d, backends, reference
from normnorm.cli import CommandError
from normnorm.noise import draw_seed, standard_normals

ALONE = World(0, 1, torch.device("cpu"))
SCRIPT = Path(__file__).parents[2] / "benchmarks/train.py"


# Data.


@pytest.mark.parametrize("name", image_archives.WRITERS)
def test_a_data_set_is_read_by_torchvisions_class(name, tmp_path, monkeypatch):
    image_archives.write(monkeypatch, name, tmp_path)
    spec = data.TORCHVISION[name]
    found = data.load(name, tmp_path, seed=0)
    assert found.shape == (spec.channels, spec.size, spec.size)
    assert found.classes == spec.classes
    seen = []
    for part in (found.train, found.test):
        images, labels = zip(*(part[index] for index in range(len(part))), strict=True)
        values = torch.stack(images)
        assert values.shape[1:] == found.shape
        assert values.dtype == torch.float32
        # Uniform bytes, standardized by about a half and a quarter.
        assert -5 < values.min() < 0 < 0.5 < values.max() < 5
        assert set(labels) <= set(range(found.classes))
        assert len(set(labels)) > 1
        seen.append({image.numpy().tobytes() for image in images})
    assert not seen[0] & seen[1]
    limited = data.load(name, tmp_path, 0, limit=2)
    assert (len(limited.train), len(limited.test)) == (2, len(found.test))


@pytest.mark.parametrize("name", data.TORCHVISION)
def test_a_missing_data_set_says_how_to_get_it(name, tmp_path):
    with pytest.raises(CommandError, match=f"'{name}' is not in {tmp_path}") as caught:
        data.load(name, tmp_path, seed=0)
    with pytest.raises((OSError, RuntimeError)):  # and not TypeError or ValueError
        data.TORCHVISION[name].open(tmp_path, False)
    sentence = str(caught.value)
    if "It is at http" not in sentence:
        code = shlex.split(sentence.split("This command fetches it: python -c ")[1])[0]
        compile(code, "the command", "exec")
        assert "download=True" in code
        assert str(tmp_path) in code


def test_a_torchvision_that_is_missing_or_broken_is_named(monkeypatch, tmp_path):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator nms does not exist')")
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CommandError, match=r"nms does not exist.*pip install --upgrade"):
        data.load("cifar10", tmp_path, 0)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(CommandError, match="is not installed: pip install torchvision"):
        data.load("cifar10", tmp_path, 0)


def test_images_are_scaled_to_their_shorter_side_and_cropped_to_the_middle():
    spec = replace(data.TORCHVISION["cifar10"], size=4, mean=(0, 0, 0), std=(1, 1, 1))
    picture = Image.new("RGB", (16, 8))
    picture.paste((255, 0, 0), (4, 0, 12, 8))  # the middle square is red
    (image, label) = data.Images([(picture, 3)], spec)[0]
    assert label == 3
    assert image[0, :, 1:3].min() > 0.95
    assert image[1:].max() == 0
    grey = replace(spec, channels=1, mean=(0,), std=(1,))
    assert data.Images([(picture, 3)], grey)[0][0].shape == (1, 4, 4)


def test_the_digits_are_stratified_standardized_and_disjoint():
    train, test, shape, classes = data.load("digits", Path(), 1)
    (images, labels), (held_out, test_labels) = train.tensors, test.tensors
    assert (images.shape, held_out.shape) == ((1347, *shape), (450, *shape))
    assert images.mean().item() == pytest.approx(0, abs=1e-5)
    assert images.std().item() == pytest.approx(1, abs=1e-5)
    assert abs(held_out.mean().item()) > 1e-5  # not by statistics of its own
    share = torch.bincount(test_labels, minlength=classes) / torch.bincount(labels)
    assert ((share - 1 / 3).abs() < 0.02).all()
    rows = {image.numpy().tobytes() for image in images}
    assert not rows & {image.numpy().tobytes() for image in held_out}
    assert not torch.equal(data.load("digits", Path(), 2).test.tensors[0], held_out)


def test_mnist_1d_is_drawn_anew_for_every_seed_and_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MNIST1D", {"train": 40, "test": 50, "validation": 30})
    first = data.load("mnist1d", tmp_path, 5)
    validation = data.load("mnist1d", tmp_path, 5, validation=True)
    parts = [first.train, first.test, validation.test, data.load("mnist1d", tmp_path, 6).train]
    assert [part.tensors[0].shape for part in parts] == [(n, 1, 1, 40) for n in (40, 50, 30, 40)]
    rows = [{signal.numpy().tobytes() for signal in part.tensors[0]} for part in parts]
    assert len(set().union(*rows)) == 160
    assert torch.equal(validation.train.tensors[0], first.train.tensors[0])
    monkeypatch.setitem(sys.modules, "mnist1d", None)  # read from the files from now on
    again = data.load("mnist1d", tmp_path, 5)
    assert torch.equal(again.test.tensors[0], first.test.tensors[0])


@pytest.mark.parametrize(("name", "sizes"), [("mnist5000", (500, 1000)), ("digits", (1213, 134))])
def test_settings_are_tuned_on_images_that_are_not_tested(name, sizes):
    whole = data.load(name, Path(), 3)
    held_out = data.load(name, Path(), 3, validation=True)
    assert (len(held_out.train), len(held_out.test)) == sizes
    tested, tuned = (
        {image.numpy().tobytes() for image in part.test.tensors[0]} for part in (whole, held_out)
    )
    assert not tested & tuned


def test_shifts_keep_what_stays_inside_and_mirrors_come_half_the_time():
    torch.manual_seed(0)
    images = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(400, 2, 16, 16)
    moved = data.shift_and_mirror(images, mirror=True)
    assert moved.shape == images.shape
    centre = moved[:, 0, 7, 7]
    mirrored = moved[:, 0, 7, 8] < centre
    assert 150 < mirrored.sum() < 250
    # Values run along rows by 1 and along columns by 16, which tells where the centre came from.
    position = centre.long() - 1
    shifts_down, shifts_right = position // 16 - 7, position % 16 - 7
    assert shifts_down.unique().tolist() == [-2, -1, 0, 1, 2]
    assert set(shifts_right[~mirrored].tolist()) == {-2, -1, 0, 1, 2}
    assert torch.equal(moved[:, 0], moved[:, 1])
    plain = data.shift_and_mirror(images, mirror=False)
    assert (plain[:, 0, 7, 8] - plain[:, 0, 7, 7] == 1).all()


# Norms and networks.


def test_the_inverse_square_root_and_its_gradient_with_equal_eigenvalues():
    torch.manual_seed(0)
    factor = torch.randn(2, 4, 6, dtype=torch.float64)
    matrix = factor @ factor.mT
    root = inverse_square_root(matrix)
    torch.testing.assert_close(root @ matrix @ root, torch.eye(4).double().expand(2, 4, 4))

    def of_symmetric(x):
        return inverse_square_root((x + x.mT) / 2)

    for checked in (matrix, 2 * torch.eye(3, dtype=torch.float64)):
        assert torch.autograd.gradcheck(of_symmetric, (checked.requires_grad_(),))


def test_decorrelated_batch_norm_whitens_and_remembers():
    torch.manual_seed(0)
    layer = DecorrelatedBatchNorm2d(6, group_size=3, eps=1e-8, momentum=1.0)
    mixing = torch.randn(6, 6)
    inputs = torch.einsum("ij,njhw->nihw", mixing, torch.randn(50, 6, 5, 5)) + 3
    rows = layer(inputs).transpose(0, 1).flatten(1)
    for part in (rows[:3], rows[3:]):
        covariance = part @ part.T / part.size(1)
        torch.testing.assert_close(covariance, torch.eye(len(part)), atol=2e-3, rtol=0)
    layer.eval()
    torch.testing.assert_close(layer(inputs).transpose(0, 1).flatten(1), rows, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match=r"expected \(N, 6, H, W\); got \(2, 5, 1, 1\)"):
        layer(torch.randn(2, 5, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer.train()(torch.randn(1, 6, 1, 1))
    with pytest.raises(ValueError, match="group_size 4 does not divide the 6 channels"):
        DecorrelatedBatchNorm2d(6, group_size=4)


@pytest.mark.parametrize("model", nets.MODELS)
def test_every_network_takes_every_norm_of_its_kind(model):
    net = nets.MODELS[model]
    names = list(norms.TOKENS if net.tokens else norms.IMAGES)
    if model in ("resnet34", "resnet50", "vit"):  # like resnet18 and transformer, and heavy
        names = names[1:2]
    for name in names:
        more = (None, None, 1) if net.small else ()
        network = net.build(norms.make_norm(name, net.tokens), (1, 16, 16), 7, *more).eval()
        assert network(torch.randn(2, 1, 16, 16)).shape == (2, 7)
        classes = {type(module).__name__ for module in network.modules()}
        plain = {"BatchNorm2d", "LayerNorm", "GroupNorm", "InstanceNorm2d"}
        assert not (norms.has_transform(name) and classes & plain)


def test_the_papers_networks_have_their_size():
    def parameters(model, image, classes):
        net = nets.MODELS[model]
        norm = norms.make_norm("layer" if net.tokens else "batch", net.tokens)
        with torch.device("meta"):
            return sum(p.numel() for p in net.build(norm, image, classes).parameters())

    assert parameters("wrn28-2", (3, 32, 32), 10) == 1_467_610
    assert parameters("resnet18", (3, 224, 224), 1000) == 11_689_512
    assert parameters("resnet18", (3, 32, 32), 10) == 11_173_962
    assert 56e6 < parameters("vit", (3, 32, 32), 10) < 58e6  # 8 layers of width 768


def test_options_reach_the_layers():
    layer = norms.make_norm("batchnormal", False, alpha=0.5, noise_train=0.0)(4)
    assert (layer.alpha, layer.noise_train) == (0.5, 0.0)
    assert norms.make_norm("decorrelatednormal", False, noise_train=0.1)(4).after.noise_train == 0.1


# Training.


def in_float64(experiment, parts):
    trainer = Trainer(experiment, parts, ALONE)
    trainer.network.double()
    return trainer


def float64_data(experiment):
    def doubled(images, labels):
        return TensorDataset(images.double(), labels)

    return [
        part._replace(train=doubled(*part.train.tensors), test=doubled(*part.test.tensors))
        for part in load_data(experiment)
    ]


@pytest.mark.parametrize(
    ("model", "norm"),
    [("convnet", norm) for norm in norms.IMAGES if "-" not in norm]
    + [(model, norm) for model in ("mlp", "transformer") for norm in ("layer", "layernormal")],
)
def test_copies_train_as_separate_networks_do(model, norm):
    noise = {"noise_train": 0.0} if norms.has_transform(norm) else {}
    experiment = Experiment(
        model=model, norm=norm, copies=3, epochs=2, evaluate_every=2, limit=640, augment=False,
        schedule="cosine", optimizer="adamw" if model == "transformer" else "sgd",
        learning_rate=1e-3 if model == "transformer" else 0.1, **noise,
    )  # fmt: skip
    parts = float64_data(experiment)
    packed = in_float64(experiment, parts)
    last = packed.train()[-1]
    assert packed.step == 20
    singles = [
        in_float64(replace(experiment, seed=experiment.seed + number, copies=1), [part])
        for number, part in enumerate(parts)
    ]
    epochs = [single.train()[-1] for single in singles]
    wanted = nets.concatenated([single.network for single in singles])
    for name, value in packed.network.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)
    for name in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert getattr(last, name) == pytest.approx([getattr(e, name)[0] for e in epochs])


class GivenNoise(nn.Module):
    """A batch layer by the reference, with one copy's channels of the noise of all copies."""

    def __init__(self, layer, number, copies):
        super().__init__()
        self.layer, self.number, self.copies = layer, number, copies

    def forward(self, input):
        shape = input.size(0), self.copies * input.size(1), *input.shape[2:]
        z = standard_normals(shape, draw_seed(input.device)).chunk(self.copies, 1)[self.number]
        layer = self.layer
        return reference.normal_norm(
            input, layer.weight, layer.bias, kind="batch", noise_train=layer.noise_train, z=z
        )[0]


def test_copies_have_their_slice_of_the_noise():
    experiment = Experiment(copies=3, limit=64)
    parts = float64_data(experiment)
    packed = in_float64(experiment, parts)
    singles = [
        in_float64(replace(experiment, seed=experiment.seed + number, copies=1), [part]).network
        for number, part in enumerate(parts)
    ]
    images, labels = next(packed._batches())
    torch.manual_seed(0)
    packed._losses(packed.network(images), labels)[0].sum().backward()
    for number, network in enumerate(singles):
        for index, layer in enumerate(network.features):
            if isinstance(layer, BatchNormalNorm2d):
                network.features[index] = GivenNoise(layer, number, 3)
        torch.manual_seed(0)
        logits = network(images.chunk(3, dim=1)[number])
        nn.functional.cross_entropy(logits, labels[:, number]).backward()
        for found, wanted in zip(packed.network.parameters(), network.parameters(), strict=True):
            torch.testing.assert_close(found.grad.chunk(3)[number], wanted.grad)


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line.keys() - {"time", "step_ms"}} for line in lines]


@pytest.mark.parametrize(
    "choices",
    [
        ["--norm", "batchnormal", "--augment", "--per-weight", "1e-3", "--step-epochs", "1"],
        ["--model", "transformer", "--norm", "layernormal", "--optimizer", "adamw",
         "--amp", "bfloat16", "--learning-rate", "1e-3", "--schedule", "cycle"],
    ],
    ids=["convnet", "transformer"],
)  # fmt: skip
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, monkeypatch, capsys, choices):
    words = ["--epochs", "2", "--batch-size", "128", "--limit", "700", "--checkpoint-steps", "2"]
    whole, stopped = ([*words, *choices, "--out", str(tmp_path / part)] for part in ("a", "b"))
    assert runs.main(whole) == 0
    train_step = Trainer._train_step
    for stop_at in (3, 5, 8):  # of 10 steps: an epoch has 5

        def until(trainer, *arguments, stop_at=stop_at):
            if trainer.step == stop_at:
                raise KeyboardInterrupt
            return train_step(trainer, *arguments)

        with monkeypatch.context() as during:
            during.setattr(Trainer, "_train_step", until)
            assert runs.main([*stopped, "--resume"]) == 130
        assert "interrupted; the same command with --resume goes on" in capsys.readouterr().err
        torch.randn(17)  # whatever a new process drew before
    assert runs.main([*stopped, "--resume"]) == 0
    straight, resumed = (next((tmp_path / part).iterdir()) for part in ("a", "b"))
    assert metrics(resumed) == metrics(straight)
    found = checkpoint(resumed)["network"]
    for name, value in checkpoint(straight)["network"].items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("step", [0.1] * 4 + [0.01] * 4),
        ("cosine", [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]),
        ("cycle", [0.004, 0.1]),
    ],
)
def test_the_learning_rate_follows_its_schedule_and_every_step_has_a_seed(schedule, rates):
    experiment = Experiment(epochs=4, batch_size=32, limit=64, schedule=schedule, step_epochs=2)
    trainer = Trainer(experiment, load_data(experiment), ALONE)
    (group,) = trainer._optimizer.param_groups
    seen, seeds = [group["lr"]], set()

    def on_step():
        seen.append(group["lr"])
        seeds.add(torch.initial_seed())

    trainer.train(on_step)
    assert len(seeds) == 4 * trainer.steps
    assert not trainer.network.training  # evaluated last
    if schedule == "cycle":
        seen = [seen[0], max(seen)]
    assert seen[: len(rates)] == pytest.approx(rates, rel=0.05)


def test_processes_must_share_a_batch_evenly():
    with pytest.raises(CommandError, match="batch_size 64 does not divide among 3 processes"):
        Trainer(Experiment(), load_data(Experiment()), World(0, 3, torch.device("cpu")))


def test_two_processes_train_as_one_does(tmp_path):
    # A norm without statistics of the batch, which are each process's own.
    words = ["--norm", "group", "--epochs", "1", "--limit", "700", "--learning-rate", "0.02"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
              "--rdzv-endpoint", "localhost:0"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch, str(SCRIPT), *words, "--out", str(tmp_path / "two")],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=180,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert runs.main([*words, "--out", str(tmp_path / "one")]) == 0
    two, one = (next((tmp_path / part).iterdir()) for part in ("two", "one"))
    weights = checkpoint(two)["network"]
    for key, value in checkpoint(one)["network"].items():
        torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)
    losses = [metrics(folder)[-1]["train_loss"][0] for folder in (two, one)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# The script.


@pytest.fixture
def refused(capsys):
    """Checks that train.py refuses its arguments with a line that holds a sentence."""

    def check(sentence, *words):
        capsys.readouterr()
        assert runs.main(words) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("train.py: ")
        assert sentence in line

    return check


SHORT = ("--epochs", "1", "--limit", "128")


def test_a_sweep_trains_every_combination_once(tmp_path, capsys, refused):
    words = [*SHORT, "--out", str(tmp_path), "--noise-train", "0", "0.4"]
    swept = ["--norm", "batch", "batchnormal", "--seed", "2", "3"]
    assert runs.main([*words, *swept, "--tensorboard"]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(
        f"digits-convnet-{norm}epochs1-{noise}limit128-seed{seed}"
        for norm, noise in (
            ("batch-", ""),
            ("batchnormal-", "noise_train0-"),
            ("batchnormal-", "noise_train0.4-"),
        )
        for seed in (2, 3)
    )
    assert len(capsys.readouterr().out.splitlines()) == 6
    for name in names:
        files = [path.name.split(".")[0] for path in (tmp_path / name).iterdir()]
        assert sorted(files) == ["checkpoint", "events", "metrics"]
    refused("6 of 6 runs are there already; --resume goes on with them", *words, *swept)


def test_a_sweep_is_checked_whole_before_anything_is_trained(tmp_path, refused):
    out = tmp_path / "out"
    swept = [*SHORT, "--out", str(out), "--seed", "2", "3"]
    last = out / "digits-convnet-batchnormal-epochs1-limit128-seed3"
    out.touch()
    refused(f"cannot write to {out}", *swept)
    out.unlink()
    refused("would share the folder", *swept, "--alpha", "0.50000001", "0.50000002")
    assert not out.exists()
    assert runs.main([*SHORT, "--out", str(out), "--seed", "3"]) == 0
    refused("1 of 2 runs are there already; --resume goes on with them", *swept)
    (last / "checkpoint.pt").write_bytes(b"half")
    refused("is not a checkpoint", *swept, "--resume")
    assert list(out.iterdir()) == [last]
    half = [*SHORT, "--out", str(out), "--alpha"]
    assert runs.main([*half, "0.5"]) == 0
    refused("of another experiment: alpha 0.5 (now 0.50000001)", *half, "0.50000001", "--resume")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--dataset", "cifar11"], "dataset must be one of digits, mnist"),
        (["--model", "alexnet"], "model must be one of convnet"),
        (["--norm", "rms"], "norm must be one of batch"),
        (["--norm", "layer"], "norm 'layer' does not normalize images"),
        (["--model", "vit", "--norm", "batch"], "norm 'batch' does not normalize tokens"),
        (["--norm", "batch", "--alpha", "0.5"], "norm 'batch' has no alpha"),
        (["--norm", "batchnormal-2", "--alpha", "0.5"], "it takes whole Newton steps"),
        (["--epochs", "0"], "epochs must be positive; got 0"),
        (["--learning-rate", "-1"], "learning_rate must be positive; got -1.0"),
        (["--weight-decay", "nan"], "weight_decay must be finite"),
        (["--batch-size", "5000"], "batch_size 5000 is more than the 1347 training images"),
        (["--model", "vit", "--norm", "layer", "--width", "2"], "'vit' has no width, no depth"),
        (["--per-weight", "0.1", "--copies", "2"], "per_weight needs copies 1"),
        (["--dataset", "cifar10", "--data-dir", "/nonexistent"], "This command fetches it"),
        (["--device", "foo"], "--device must be cpu, cuda, cuda:1, ...; got 'foo'"),
        (["--device", "meta"], "--device meta: "),
    ],
)
def test_bad_arguments_get_a_sentence(tmp_path, refused, words, sentence):
    refused(sentence, "--out", str(tmp_path / "out"), *words)
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_or_cannot_run_gets_a_sentence(tmp_path, refused, monkeypatch):
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "sklearn", None)
        without.setitem(sys.modules, "sklearn.datasets", None)
        refused("is not installed: pip install 'normnorm[accuracy]'", "--out", str(tmp_path))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "torch.utils.tensorboard", None)
        refused("TensorBoard, which is not installed", "--tensorboard", "--out", str(tmp_path))
    if not torch.cuda.is_available():
        refused("torch sees no CUDA device here", "--device", "cuda")

    def unavailable(_):
        raise ValueError("NORMNORM_BACKEND must be 'auto' or one of cpu, cuda")

    monkeypatch.setattr(backends, "resolve", unavailable)
    refused("NORMNORM_BACKEND must be", "--out", str(tmp_path))


@pytest.mark.slow
def test_the_papers_networks_train_on_its_data(tmp_path, monkeypatch):
    image_archives.write(monkeypatch, "tinyimagenet", tmp_path / "data", count=8)
    words = [
        "--dataset", "tinyimagenet", "--model", "resnet18", "--norm", "decorrelatednormal",
        "--epochs", "1", "--batch-size", "4", "--limit", "8", "--data-dir", str(tmp_path / "data"),
        "--out", str(tmp_path / "out"), "--workers", "1", "--learning-rate", "1e-3",
    ]  # fmt: skip
    assert runs.main(words) == 0
    (folder,) = (tmp_path / "out").iterdir()
    epoch = metrics(folder)[-1]
    assert 0 < epoch["train_loss"][0] < 100
    assert 0 <= epoch["test_accuracy"][0] <= 100
