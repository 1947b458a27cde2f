"""The projected error function loss against its definition in float64; the same bits each time."""

import pytest
import torch

import normnorm
from normnorm import per


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64], ids=["float32", "bfloat16", "float64"]
)
def test_the_loss_and_its_gradient(rig, backend, dtype):
    vectors = rig.pick(70_001, 701)
    activations = (2 * torch.randn(vectors, 48, device=rig.device)).to(dtype).requires_grad_()

    def step():
        generator = torch.Generator(rig.device).manual_seed(1)
        loss = normnorm.per_loss(activations, 100, generator)
        return loss, *torch.autograd.grad(loss, activations)

    loss, gradient = step()
    generator = torch.Generator(rig.device).manual_seed(1)
    wide = torch.promote_types(dtype, torch.float32)
    slices = torch.randn(100, 48, dtype=wide, device=rig.device, generator=generator)
    slices = (slices / slices.norm(dim=1, keepdim=True)).double()
    exact = activations.detach().double().requires_grad_()
    expected = per._definition(exact, slices)
    (wanted,) = torch.autograd.grad(expected, exact)
    bound = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float64: 1e-12}[dtype]
    assert abs(loss.item() - expected.item()) <= min(bound, 2e-6) * expected.item()
    assert (gradient.double() - wanted).abs().max() <= bound * wanted.abs().max()
    for _ in range(3):
        again = step()
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)
