"""Lambda by several Newton steps and at the optimum, against SciPy's, with correct gradients."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from oracle import LAWS
from torch import Tensor

import normnorm
from accuracy.layers import IteratedBatchNormalNorm2d
from normnorm import likelihood, reference

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
TRIED = (
    "normal", "exponential", "relu", "bimodal", "lognormal", "negative_exponential", "student_t",
)  # fmt: skip
each_law = pytest.mark.parametrize(
    ("law", "size"), [*((law, 500) for law in TRIED), ("exponential", 4)]
)


def _standardized(law: str, size: int) -> Tensor:
    values = torch.from_numpy(LAWS[law](np.random.default_rng(0), 3, size))
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True, correction=0)


@each_law
def test_the_likelihood_and_its_optimum_are_scipys(law: str, size: int) -> None:
    h = _standardized(law, size)
    for lmbda in (-0.5, 0.0, 1.0, 2.0, 2.3):
        same = torch.full((3, 1), lmbda, dtype=torch.float64)
        found = likelihood.negative_log_likelihood(h, same, (1,))
        expected = [-scipy.stats.yeojohnson_llf(lmbda, row) / row.size for row in h.numpy()]
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10, atol=1e-12)
    found = normnorm.estimate_lmbda(h, 1, iterations=None)
    expected = [scipy.stats.yeojohnson_normmax(row) for row in h.numpy()]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    slope, curvature = likelihood._slope_and_curvature(h, found.unsqueeze(1), (1,))
    assert slope.abs().max() < 1e-12
    assert (curvature > 0).all()


@each_law
def test_one_iteration_is_the_layers_step_and_more_come_closer(law: str, size: int) -> None:
    h = _standardized(law, size)
    first = likelihood.newton_lmbda(h, (1,), 1)
    torch.testing.assert_close(first, reference.estimate_lmbda(h, (1,)), rtol=1e-12, atol=1e-12)
    optimum = likelihood.optimal_lmbda(h, (1,))
    gaps = [
        (normnorm.estimate_lmbda(h, 1, iterations=i, eps=1e-12, keepdim=True) - optimum).abs().max()
        for i in (1, 2, 4, 30)
    ]
    assert gaps == sorted(gaps, reverse=True) or gaps[0] < 1e-6
    assert gaps[-1] < 1e-5


@pytest.mark.parametrize("iterations", [2, 3, None])
def test_gradients_are_right(iterations: int | None) -> None:
    h = _standardized("exponential", 12)[:2].clone().requires_grad_()

    def estimate(h: Tensor) -> Tensor:
        return normnorm.estimate_lmbda(h, 1, iterations=iterations)

    assert torch.autograd.gradcheck(estimate, (h,), atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("iterations", [1, 2, None])
def test_no_dimensions_are_all_of_them_as_in_torch(iterations: int | None) -> None:
    h = torch.randn(10, 3)
    wanted = normnorm.estimate_lmbda(h.flatten(), iterations=iterations)
    for dim in ((), [], None, (0, 1), (-1, 0)):
        found = normnorm.estimate_lmbda(h, dim, iterations=iterations)
        torch.testing.assert_close(found, wanted)
        assert normnorm.estimate_lmbda(h, dim, iterations=iterations, keepdim=True).shape == (1, 1)


@pytest.mark.parametrize("iterations", [1, 2, 5, None])
@pytest.mark.parametrize("constant", [0.0, 0.1])
def test_degenerate_groups_have_lambda_one_or_nan(iterations: int | None, constant: float) -> None:
    h = torch.randn(1000, 4, dtype=torch.float64)
    h = (h - h.mean(0)) / h.std(0, correction=0)
    alone = normnorm.estimate_lmbda(h[:, 3], iterations=iterations)
    h[:, 0] = constant if iterations != 1 else 0.0  # one step assumes standardized h
    h[3, 1] = math.nan
    h[3, 2] = math.inf
    h.requires_grad_()
    found = normnorm.estimate_lmbda(h, 0, iterations=iterations)
    assert found[0] == 1
    assert found[1:3].isnan().all()
    torch.testing.assert_close(found[3], alone)
    (gradient,) = torch.autograd.grad(found.sum(), h)
    assert gradient[:, [0, 3]].isfinite().all()


def test_the_layer_normalizes_and_remembers_with_its_own_lambda() -> None:
    inputs = torch.randn(8, 3, 4, 4).exp()
    layers = [
        IteratedBatchNormalNorm2d(3, 1, noise_train=0.0),
        IteratedBatchNormalNorm2d(3, None, noise_train=0.0),
        normnorm.BatchNormalNorm2d(3, noise_train=0.0),
    ]
    one, optimal, plain = (layer(inputs) for layer in layers)
    torch.testing.assert_close(one, plain, **CLOSE)
    h, *_ = reference.standardize(inputs.double(), (0, 2, 3), 1e-5)
    lmbda = likelihood.optimal_lmbda(h, (0, 2, 3))
    torch.testing.assert_close(optimal, reference.yeo_johnson(h, lmbda).float(), **CLOSE)
    expected = 1 + 0.1 * (lmbda.flatten().float() - 1)
    torch.testing.assert_close(layers[1].running_lmbda, expected, **CLOSE)
    assert layers[1].num_batches_tracked == 1
    layers[1].eval()
    assert layers[1](inputs).shape == inputs.shape


@pytest.mark.parametrize("iterations", [2, None])
def test_a_dead_channel_of_the_layer_is_its_bias(iterations: int | None) -> None:
    layer = IteratedBatchNormalNorm2d(2, iterations)
    x = torch.randn(4, 2, 5, 5)
    x[:, 1] = 0.1
    assert (layer(x)[:, 1] == 0).all()
    assert layer.running_lmbda[1] == 1
