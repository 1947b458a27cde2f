"""torchvision: its constructors take normnorm layers, and its models keep their outputs when their
norms are replaced."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from model_zoo import speak
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import normnorm

OFF = {"alpha": 0.0, "noise_train": 0.0}
NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def small_vit(**keywords):
    """vit_b_16's class and patch size with a tenth of its width and depth."""
    return models.VisionTransformer(
        image_size=48, patch_size=16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=10, **keywords,
    )  # fmt: skip


# (build, image size, layers replaced)
MODELS = {
    "resnet18": (partial(models.resnet18, num_classes=10), 48, 20),
    "convnext_tiny": (partial(models.convnext_tiny, num_classes=10), 48, 23),
    "vit": (small_vit, 48, 7),
    "swin_t": (partial(models.swin_t, num_classes=10), 64, 29),
    "mobilenet_v3_small": (partial(models.mobilenet_v3_small, num_classes=10), 48, 34),
}
SLOW = {
    "vit_b_16": (partial(models.vit_b_16, num_classes=10), 224, 25),
    "efficientnet_b0": (partial(models.efficientnet_b0, num_classes=10), 64, 49),
    "densenet121": (partial(models.densenet121, num_classes=10), 64, 121),
    "regnet_y_400mf": (partial(models.regnet_y_400mf, num_classes=10), 64, None),
    "swin_v2_t": (partial(models.swin_v2_t, num_classes=10), 64, 29),
    "maxvit_t": (partial(models.maxvit_t, num_classes=10), 224, None),
}
each_model = pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


def build(name):
    """(the model in evaluation, its input, its number of norms)."""
    make, size, count = (MODELS | SLOW)[name]
    torch.manual_seed(0)
    return speak(make()).eval(), torch.randn(2, 3, size, size), count


@each_model
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    model, input, count = build(name)
    with torch.no_grad():
        expected = model(input)
        classes = [type(module) for module in model.modules()]
        norms = sum(issubclass(cls, NORMS) for cls in classes)
        summary = normnorm.replace_norms(model, **OFF)
        assert not summary.left
        assert len(summary.replaced) == norms
        assert count in (None, norms)
        scale = expected.std().item()
        assert scale > 1e-3
        assert_close(model(input), expected, rtol=1e-4, atol=1e-4 * scale)

        # The transform changes the output; restoring reverses it.
        for module in model.modules():
            if hasattr(module, "alpha"):
                module.alpha = 1.0
                if getattr(module, "running_lmbda", None) is not None:
                    module.running_lmbda.fill_(0.7)
        assert (model(input) - expected).abs().max() > 0.01 * scale
        normnorm.restore_norms(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(model(input), expected)


@pytest.mark.parametrize("name", ["resnet18", "vit"])
def test_training_steps_are_the_same_without_transform_and_noise(name):
    gradients = []
    for replace in (False, True):
        model, input, _ = build(name)
        if replace:
            normnorm.replace_norms(model, **OFF)
        model.train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model(input.repeat(4, 1, 1, 1)).square().mean().backward()
            optimizer.step()
        gradients.append([parameter.grad for parameter in model.parameters()])
    norm = torch.stack([g.norm() for g in gradients[0]]).norm()
    for ours, theirs in zip(*reversed(gradients), strict=True):
        assert (ours - theirs).norm() < 1e-3 * norm


@pytest.mark.parametrize("given", ["class", "partial"])
def test_constructors_take_our_layer_as_norm_layer(given):
    layer = normnorm.BatchNormalNorm2d
    if given == "partial":
        layer = partial(layer, noise_train=0.1, eps=1e-3)
    model = models.resnet18(norm_layer=layer, num_classes=10)
    ours = [m for m in model.modules() if isinstance(m, normnorm.BatchNormalNorm2d)]
    assert len(ours) == 20
    assert {m.noise_train for m in ours} == {0.1 if given == "partial" else 0.4}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    input = torch.randn(4, 3, 48, 48)
    model(input).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    # A checkpoint of the plain model loads.
    plain = speak(models.resnet18(num_classes=10))
    model.load_state_dict(plain.state_dict(), strict=True)
    for module in (*model.modules(), *plain.modules()):
        if hasattr(module, "eps"):
            module.eps = 1e-5
    scale = plain.eval()(input).abs().max().item()
    assert_close(model.eval()(input), plain(input), rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize(
    ("make", "layer", "count"),
    [
        (models.mobilenet_v3_small, normnorm.BatchNormalNorm2d, 34),
        (small_vit, normnorm.LayerNormalNorm, 7),
        pytest.param(models.swin_t, normnorm.LayerNormalNorm, 29, marks=pytest.mark.slow),
        pytest.param(
            models.efficientnet_b0, normnorm.BatchNormalNorm2d, 49, marks=pytest.mark.slow
        ),
    ],
)
def test_other_constructors_take_it_too(make, layer, count):
    model = make(norm_layer=layer)
    assert sum(isinstance(module, layer) for module in model.modules()) == count
    assert model.eval()(torch.randn(2, 3, 48, 48)).isfinite().all()


def test_convnext_takes_the_channels_first_layer():
    block = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
    make = partial(models.ConvNeXt, block, num_classes=10)
    model = make(norm_layer=partial(normnorm.LayerNormalNorm2d, eps=1e-6))
    assert sum(type(m) is normnorm.LayerNormalNorm2d for m in model.modules()) == 3
    plain = make()
    normnorm.replace_norms(plain, LayerNorm2d)
    assert [type(m) for m in plain.modules()] == [
        nn.LayerNorm if type(m) is normnorm.LayerNormalNorm else type(m) for m in model.modules()
    ]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_our_channels_first_layer_is_torchvisions(memory_format):
    theirs, ours = LayerNorm2d(6), normnorm.LayerNormalNorm2d(6, **OFF)
    speak(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    input = torch.randn(2, 6, 3, 5).contiguous(memory_format=memory_format)
    outputs = []
    for layer in (theirs, ours):
        leaf = input.clone(memory_format=torch.preserve_format).requires_grad_()
        output = layer(leaf)
        output.square().sum().backward()
        outputs.append((output, leaf.grad, layer.weight.grad, layer.bias.grad))
    assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert outputs[1][0].stride() == input.stride()


def test_frozen_statistics_stay_as_they_are():
    model = models.resnet18(norm_layer=FrozenBatchNorm2d)
    summary = normnorm.replace_norms(model)
    assert not summary.replaced
    assert len(summary.left) == 20
    assert "frozen" in summary.left[0].reason


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer1"), ("convnext_tiny", "features.1")]
)
def test_the_feature_extractor_follows_replaced_norms(name, layer):
    model, input, _ = build(name)
    normnorm.replace_norms(model)
    found = []
    model.get_submodule(layer).register_forward_hook(lambda module, args, out: found.append(out))
    model(input)
    assert torch.equal(create_feature_extractor(model, [layer])(input)[layer], found[0])
