"""MONAI: normnorm layers in its factory by name, and networks built with them."""

import pytest
import torch
from model_zoo import OFF, ours_in, speak
from monai.networks.layers import Norm
from monai.networks.nets import DenseNet, UNet
from torch.testing import assert_close

import normnorm
import normnorm.integrations.monai as normnorm_monai


@pytest.fixture(autouse=True)
def _registered():
    before, names = dict(Norm.components), Norm.__doc__
    normnorm_monai.register()
    normnorm_monai.register()  # a repeated call has no effect
    yield
    Norm.components.clear()
    Norm.components.update(before)
    Norm.__doc__ = names


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_factory_gives_the_class_of_each_dimension(dim):
    assert Norm[Norm.BATCHNORMAL, dim] is getattr(normnorm, f"BatchNormalNorm{dim}d")
    assert Norm["instancenormal", dim] is getattr(normnorm, f"InstanceNormalNorm{dim}d")
    assert Norm["groupnormal", dim] is normnorm.GroupNormalNorm
    assert Norm["layernormal", dim] is normnorm.LayerNormalNorm


@pytest.mark.parametrize(
    ("build", "count"),
    [
        (lambda norm: UNet(3, 1, 2, (4, 8, 16), (2, 2), num_res_units=1, norm=norm), 6),
        (lambda norm: DenseNet(3, 1, 2, 8, 4, (2, 2), 2, norm=norm), 11),
    ],
    ids=["UNet", "DenseNet"],
)
def test_networks_built_with_our_layers_equal_replaced_ones(build, count):
    network = speak(build(("batchnormal", OFF)))
    assert len(ours_in(network)) == count
    plain = build("batch")
    plain.load_state_dict(
        {k: v for k, v in network.state_dict().items() if not k.endswith("running_lmbda")}
    )
    input = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        expected = plain.eval()(input)
        scale = expected.std().item()
        assert_close(network.eval()(input), expected, rtol=1e-4, atol=1e-4 * scale)
    summary = normnorm.replace_norms(plain)
    assert len(summary.replaced) == count
    assert [type(m) for m in plain.modules()] == [type(m) for m in network.modules()]
