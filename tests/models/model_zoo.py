"""Small models of other libraries, with non-trivial weights."""

import torch
from torch import nn
from torch.testing import assert_close

import normnorm

NORMS = (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)
OFF = {"alpha": 0.0, "noise_train": 0.0}  # a normality layer that gives what torch's gives


def ours_in(model):
    """The model's normality layers."""
    return [module for module in model.modules() if hasattr(module, "noise_train")]


def check_replaced_and_restored(model, input):
    """All norms are replaced, without transform and noise the model's output stays, and after
    restoring it is equal to the last bit. Returns the number of norms."""
    norms = sum(isinstance(module, NORMS) for module in model.modules())
    with torch.no_grad():
        expected = first_tensor(model(input))
        classes = [type(module) for module in model.modules()]
        summary = normnorm.replace_norms(model, **OFF)
        assert not summary.left, summary
        assert len(summary.replaced) == norms
        scale = expected.std().item()
        assert scale > 1e-3
        assert_close(first_tensor(model(input)), expected, rtol=1e-4, atol=1e-4 * scale)
        normnorm.restore_norms(model)
        assert [type(module) for module in model.modules()] == classes
        assert torch.equal(first_tensor(model(input)), expected)
    return norms


def speak(model, seed=0):
    """Gives every norm layer a random weight, bias and running statistics, and every zero parameter
    a value: heads and residual branches of a new model may be zero, which would hide differences
    before them."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    with torch.no_grad():
        for module in model.modules():
            weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
            if "Norm" in type(module).__name__:
                for tensor, low, high in ((weight, 0.5, 1.5), (bias, -0.3, 0.3)):
                    if tensor is not None:
                        uniform(tensor, low, high)
                if getattr(module, "running_mean", None) is not None:
                    uniform(module.running_mean, -0.3, 0.3)
                    uniform(module.running_var, 0.5, 1.5)
        for parameter in model.parameters():
            if not parameter.any():
                uniform(parameter, -0.1, 0.1)
    return model


def first_tensor(output):
    """The tensor that a model returns, or the first of its output."""
    return output if isinstance(output, torch.Tensor) else output[0]
