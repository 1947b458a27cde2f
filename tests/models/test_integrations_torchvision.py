"""torchvision: its models keep their outputs when their norms are replaced."""

import pytest
import torch
from model_zoo import check_replaced_and_restored, speak
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.ops import FrozenBatchNorm2d

import normnorm


def small_vit(**keywords):
    """vit_b_16's class and patch size with a tenth of its width and depth."""
    return models.VisionTransformer(
        image_size=48, patch_size=16, num_layers=3, num_heads=4, hidden_dim=64, mlp_dim=128,
        **keywords,
    )  # fmt: skip


# name -> (build, image size)
MODELS = {
    "resnet18": (models.resnet18, 48),
    "convnext_tiny": (models.convnext_tiny, 48),
    "vit": (small_vit, 48),
    "swin_t": (models.swin_t, 64),
    "mobilenet_v3_small": (models.mobilenet_v3_small, 48),
}
SLOW = {
    "vit_b_16": (models.vit_b_16, 224),
    "efficientnet_b0": (models.efficientnet_b0, 64),
    "densenet121": (models.densenet121, 64),
    "swin_v2_t": (models.swin_v2_t, 64),
    "maxvit_t": (models.maxvit_t, 224),
}


def build(name):
    """(the model in evaluation, its input)."""
    make, size = (MODELS | SLOW)[name]
    torch.manual_seed(0)
    return speak(make(num_classes=10)).eval(), torch.randn(2, 3, size, size)


@pytest.mark.parametrize(
    "name", [*MODELS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_outputs_stay_without_transform_and_noise_and_come_back_exactly(name):
    assert check_replaced_and_restored(*build(name)) > 4


def test_frozen_statistics_stay_as_they_are():
    model = models.resnet18(norm_layer=FrozenBatchNorm2d)
    summary = normnorm.replace_norms(model)
    assert not summary.replaced
    assert len(summary.left) == 20
    assert "frozen" in summary.left[0].reason


def test_the_feature_extractor_follows_replaced_norms():
    model, input = build("resnet18")
    normnorm.replace_norms(model)
    found = []
    model.layer1.register_forward_hook(lambda module, args, out: found.append(out))
    model(input)
    extractor = create_feature_extractor(model, ["layer1"])
    assert torch.equal(extractor(input)["layer1"], found[0])
