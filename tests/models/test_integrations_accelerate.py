"""accelerate: models made on the meta device, loaded tensor by tensor from a checkpoint."""

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

import normnorm


def network(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 3), norm(2))


@pytest.mark.parametrize(
    ("how", "norm", "include_buffers"),
    [
        ("load", nn.BatchNorm2d, True), ("load", normnorm.BatchNormalNorm2d, False),
        ("dispatch", nn.BatchNorm2d, False), ("dispatch", normnorm.BatchNormalNorm2d, True),
        ("hooks", nn.BatchNorm2d, True),
    ],
)  # fmt: skip
def test_a_big_model_has_the_checkpoints_lambda_or_one(how, norm, include_buffers, tmp_path):
    saved = network(norm)
    for _ in range(3):
        saved(torch.empty(4, 3, 8, 8).exponential_())
    save_file(saved.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    with accelerate.init_empty_weights(include_buffers=include_buffers):
        model = network(normnorm.BatchNormalNorm2d)
    model.eval()
    if how == "load":
        accelerate.load_checkpoint_in_model(model, tmp_path, device_map={"": "cpu"})
    else:
        model = accelerate.load_checkpoint_and_dispatch(
            model, tmp_path, device_map={"": "cpu"}, force_hooks=how == "hooks"
        )
    input = torch.randn(2, 3, 8, 8)
    assert_close(model(input), saved.eval()(input), rtol=1e-4, atol=1e-5)
    for index in (1, 4):
        expected = getattr(saved[index], "running_lmbda", torch.ones(saved[index].num_features))
        assert torch.equal(model[index].running_lmbda, expected)


def test_a_layer_whose_forward_accelerate_has_wrapped_is_left():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    accelerate.hooks.add_hook_to_module(model[1], accelerate.hooks.ModelHook())
    (left,) = normnorm.replace_norms(model).left
    assert "forward was replaced" in left.reason
    accelerate.hooks.remove_hook_from_module(model[1])
    assert len(normnorm.replace_norms(model).replaced) == 1
