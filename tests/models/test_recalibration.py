"""update_stats: re-estimated running statistics, with all other state unchanged."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.testing import assert_close

import normnorm


def network(noise_train=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), normnorm.BatchNormalNorm1d(6, noise_train=noise_train), nn.ReLU(),
        nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.3), nn.Dropout(0.5),
        normnorm.LayerNormalNorm(5),
        normnorm.BatchNormalNorm1d(5, momentum=None, noise_train=noise_train),
    )  # fmt: skip


def batches(count=3, size=16):
    generator = torch.Generator().manual_seed(1)
    return [torch.empty(size, 4).exponential_(generator=generator) for _ in range(count)]


def state_of(model):
    settings = [
        (module.training, getattr(module, "momentum", 0), getattr(module, "noise_train", None))
        for module in model.modules()
    ]
    return settings, {name: t.clone() for name, t in model.state_dict().items()}


def assert_state(model, before):
    assert state_of(model)[0] == before[0]
    assert_close(dict(model.state_dict()), before[1], rtol=0, atol=0)


def test_statistics_are_the_equal_average_over_the_batches():
    model = network()
    model[1].running_mean.fill_(7.0)  # must be discarded
    assert normnorm.update_stats(batches(), model) == 3
    with torch.no_grad():
        features = [model[0](batch).double() for batch in batches()]
    mean = torch.stack([f.mean(0) for f in features]).mean(0)
    var = torch.stack([f.var(0) for f in features]).mean(0)
    h = [(f - f.mean(0)) / (f.var(0, correction=0) + 1e-5).sqrt() for f in features]
    lmbda = torch.stack([normnorm.estimate_lmbda(x, 0) for x in h]).mean(0)
    assert_close(model[1].running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    assert_close(model[1].running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert_close(model[1].running_lmbda.double(), lmbda, rtol=1e-4, atol=1e-4)
    assert model[1].num_batches_tracked == model[4].num_batches_tracked == 3


def test_torch_layers_get_what_update_bn_gives_them():
    ours, theirs = network(), network()
    torch.manual_seed(3)
    normnorm.update_stats(batches(), ours)
    torch.manual_seed(3)
    update_bn(batches(), theirs)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_close(getattr(ours[4], name), getattr(theirs[4], name))


def test_flags_momenta_and_parameters_are_put_back():
    model = network(0.4).train()
    model[4].eval()  # frozen by the caller
    model[6].eval()
    settings, before = state_of(model)
    normnorm.update_stats(batches(), model, noise=False)
    assert state_of(model)[0] == settings
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert model[4].num_batches_tracked == 3


class Unlucky:
    def __iter__(self):
        yield batches()[0]
        raise OSError("the disk is gone")


@pytest.mark.parametrize(
    ("loader", "error", "words"),
    [
        (Unlucky(), OSError, "disk"),
        ([batches()[0], torch.zeros(3, 99)], RuntimeError, "shapes"),
        ([], ValueError, "gave no batches"),
        ([[]], ValueError, "hold the model's input first"),
    ],
)
def test_an_exception_leaves_everything_as_it_was(loader, error, words):
    model = network(0.4)
    model(batches()[0])
    model[1].eval()
    before = state_of(model)
    with pytest.raises(error, match=words):
        normnorm.update_stats(loader, model, noise=False)
    assert_state(model, before)


def test_without_noise_the_statistics_are_those_of_evaluation():
    torch.manual_seed(0)
    model = nn.Sequential(
        normnorm.BatchNormalNorm1d(4, noise_train=2.0), normnorm.BatchNormalNorm1d(4)
    )
    data = batches(1, 4096)
    normnorm.update_stats(data, model)
    noisy = model[1].running_var.clone()
    normnorm.update_stats(data, model, noise=False)
    quiet = model[1].running_var
    # Noise of weight 2 and scale sqrt(2 / pi) of a normal: variance about 1 + 4 * 2 / pi.
    assert (noisy > 2.5 * quiet).all()
    output = model[0].eval()(data[0])
    assert_close(quiet, output.var(0), rtol=1e-3, atol=1e-3)


class Branches(nn.ModuleDict):
    """Runs the first of two branches."""

    def __init__(self):
        super().__init__({"taken": network(), "not_taken": network()})

    def forward(self, x):
        return self["taken"](x)


def test_layers_that_see_no_batch_keep_their_statistics():
    model = Branches()
    model["not_taken"](batches()[0])
    before = state_of(model["not_taken"])
    normnorm.update_stats(batches(), model)
    assert_state(model["not_taken"], before)
    assert model["taken"][1].running_mean.any()


def test_a_model_whose_layers_see_no_batch_is_unchanged():
    model = Branches()
    model["taken"] = nn.Linear(4, 4)
    model["not_taken"](batches()[0])
    before = state_of(model)
    with pytest.raises(ValueError, match="none of the 3 layers with running statistics saw"):
        normnorm.update_stats(batches(), model)
    assert_state(model, before)


class Keywords(nn.ModuleDict):
    def forward(self, input, scale):
        return self["norm"](scale * input)


def test_batches_may_be_tensors_sequences_or_mappings():
    found = []
    for wrap in (lambda x: x, lambda x: (x, "label"), lambda x: [x]):
        model = network()
        torch.manual_seed(5)
        normnorm.update_stats((wrap(batch) for batch in batches()), model, "cpu")
        found.append(model.state_dict())
    for other in found[1:]:
        assert_close(other, found[0])
    model = Keywords({"norm": normnorm.BatchNormalNorm1d(4)})
    normnorm.update_stats(
        [{"input": batch, "scale": torch.tensor(2.0)} for batch in batches()], model, "cpu"
    )
    mean = torch.stack([batch.mean(0) for batch in batches()]).mean(0)
    assert_close(model["norm"].running_mean, 2 * mean)


def test_tracked_instance_layers_are_updated_too():
    model = nn.Sequential(normnorm.InstanceNormalNorm1d(3, track_running_stats=True))
    data = [torch.randn(2, 3, 8) + 5.0 for _ in range(2)]
    normnorm.update_stats(data, model)
    expected = torch.stack([batch.mean((0, 2)) for batch in data]).mean(0)
    assert_close(model[0].running_mean, expected)


def test_a_model_without_running_statistics_is_not_run():
    def loader():
        raise AssertionError("nobody should ask")
        yield

    model = nn.Sequential(normnorm.LayerNormalNorm(4), nn.Linear(4, 4))
    assert normnorm.update_stats(loader(), model) == 0
    with pytest.raises(TypeError, match=r"nn\.Module; got list"):
        normnorm.update_stats([], [])
