"""torch.compile around a layer on the device: the same numbers, one graph."""

import pytest
import torch

import normnorm


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_compiled_layers_agree_with_eager_ones(rig, backend, kind):
    make = {"batch": normnorm.BatchNormalNorm2d, "layer": normnorm.LayerNormalNorm}[kind]
    eager, layer = (make(16, noise_train=0.0, device=rig.device) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True, backend=rig.pick("inductor", "aot_eager"))
    x = torch.randn(8, 16, 16, 16, device=rig.device, requires_grad=True)
    g = torch.randn_like(x)
    wanted = [x, eager.weight, eager.bias]
    want = torch.autograd.grad(eager(x), wanted, g)
    got = torch.autograd.grad(compiled(x), [x, layer.weight, layer.bias], g)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
