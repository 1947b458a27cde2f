"""Lightning: the plugin that synchronizes normnorm layers, and the Trainer with replaced models."""

import copy

import lightning.pytorch as lightning
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import normnorm
from normnorm import sync
from normnorm.integrations.lightning import NormalNormSync

QUIET = {
    "accelerator": "cpu", "enable_checkpointing": False, "enable_progress_bar": False,
    "enable_model_summary": False,
}  # fmt: skip


def make_module(base):
    class Regression(base):
        """Linear regression that counts the classes of norm layers in its steps."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(4, 8), normnorm.BatchNormalNorm1d(8, noise_train=0.0), nn.Linear(8, 1)
            )
            self.register_buffer("steps_synchronised", torch.zeros(()))

        def training_step(self, batch, index):
            if type(self.net[1]) is sync.SyncBatchNormalNorm:
                self.steps_synchronised += 1
            input, target = batch
            return (self.net(input) - target).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    return Regression()


def data(batch_size):
    """Sixteen samples, which two shards of eight cover in any order."""
    generator = torch.Generator().manual_seed(1)
    input = torch.empty(16, 4).exponential_(generator=generator)
    return DataLoader(TensorDataset(input, input.sum(1, keepdim=True)), batch_size=batch_size)


@pytest.mark.parametrize("package", [lightning, pytorch_lightning], ids=lambda p: p.__name__)
def test_two_processes_with_the_plugin_train_as_one_with_the_whole_batch(package):
    alone = make_module(package.LightningModule)
    trainer = package.Trainer(**QUIET, max_epochs=4, logger=False)
    trainer.fit(alone, data(16))
    assert alone.steps_synchronised == 0

    both = make_module(package.LightningModule)
    trainer = package.Trainer(
        **QUIET, max_epochs=4, logger=False, strategy="ddp_fork", devices=2,
        plugins=[NormalNormSync(torch_layers=False)],
    )  # fmt: skip
    trainer.fit(both, data(8))
    assert both.steps_synchronised == 4
    assert type(both.net[1]) is normnorm.BatchNormalNorm1d  # reverted after the fit
    ours, theirs = both.state_dict(), alone.state_dict()
    assert (theirs["net.1.running_lmbda"] != 1).any()
    for name in theirs:
        if name != "steps_synchronised":
            assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("torch_layers", [True, False])
def test_torch_layers_are_synchronised_with_ours_unless_told_otherwise(torch_layers):
    model = nn.Sequential(nn.BatchNorm1d(3), normnorm.BatchNormalNorm1d(3))
    plugin = NormalNormSync(torch_layers=torch_layers)
    applied = plugin.apply(copy.deepcopy(model))
    assert type(applied[0]) is (nn.SyncBatchNorm if torch_layers else nn.BatchNorm1d)
    assert type(applied[1]) is sync.SyncBatchNormalNorm
    reverted = plugin.revert(applied)
    assert not isinstance(reverted[0], nn.SyncBatchNorm)
    assert type(reverted[1]) is normnorm.BatchNormalNorm1d
    input = torch.randn(6, 3)
    assert_close(reverted.eval()(input), model.eval()(input))


@pytest.mark.parametrize("package", [lightning, pytorch_lightning])
def test_finetuning_callbacks_freeze_our_batch_layers_as_torchs(package):
    finetuning = package.callbacks.BaseFinetuning

    def network():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
        return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), inner)

    def state(model):
        mean = model[1].running_mean.clone()
        model.train()(torch.randn(4, 3, 2, 2))
        trains = [parameter.requires_grad for parameter in model.parameters()]
        wanted = [
            len(list(finetuning.filter_params(iter([model]), train_bn, requires_grad)))
            for train_bn in (True, False)
            for requires_grad in (True, False)
        ]
        return not torch.equal(mean, model[1].running_mean), trains, wanted

    theirs, ours = network(), network()
    normnorm.replace_norms(ours)
    for change in (
        lambda model: finetuning.freeze(model, train_bn=True),
        lambda model: finetuning.freeze(iter([model]), train_bn=False),
        finetuning.make_trainable,
        lambda model: finetuning.freeze_module(model[1]),
    ):
        change(theirs)
        change(ours)
        assert state(ours) == state(theirs)
    assert not state(ours)[0]
