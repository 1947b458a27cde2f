"""Lambda beyond one Newton step: against SciPy's optimum, with right gradients."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import normnorm
from normnorm import likelihood, reference
from normnorm.experiments.iterated import IteratedBatchNormalNorm2d

LAWS = {
    "normal": lambda r: r.standard_normal((3, 500)),
    "exponential": lambda r: r.exponential(size=(3, 500)),
    "relu": lambda r: np.maximum(r.standard_normal((3, 500)), 0),
    "lognormal": lambda r: np.exp(1.5 * r.standard_normal((3, 500))),
    "negative lognormal": lambda r: -np.exp(r.standard_normal((3, 500))),
    "uniform": lambda r: r.uniform(size=(3, 500)),
    "student": lambda r: r.standard_t(3, size=(3, 500)),
    "few": lambda r: r.exponential(size=(3, 4)),
}


def _standardized(law: str) -> Tensor:
    values = torch.from_numpy(LAWS[law](np.random.default_rng(0)))
    return (values - values.mean(1, keepdim=True)) / values.std(1, keepdim=True, correction=0)


@pytest.mark.parametrize("law", LAWS)
def test_the_likelihood_is_scipys(law: str) -> None:
    h = _standardized(law)
    for lmbda in (-0.5, 0.0, 1.0, 2.0, 2.3):
        same = torch.full((3, 1), lmbda, dtype=torch.float64)
        found = likelihood.negative_log_likelihood(h, same, (1,))
        expected = [-scipy.stats.yeojohnson_llf(lmbda, row) / row.size for row in h.numpy()]
        np.testing.assert_allclose(found[:, 0], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_the_optimum_is_scipys_and_its_slope_is_zero(law: str) -> None:
    h = _standardized(law)
    found = normnorm.estimate_lmbda(h, 1, iterations=None)
    expected = [scipy.stats.yeojohnson_normmax(row) for row in h.numpy()]
    np.testing.assert_allclose(found, expected, atol=2e-6)
    slope, curvature = likelihood._slope_and_curvature(h, found.unsqueeze(1), (1,))
    assert slope.abs().max() < 1e-12
    assert (curvature > 0).all()


@pytest.mark.parametrize("law", LAWS)
def test_one_iteration_is_the_layers_step_and_more_come_closer(law: str) -> None:
    h = _standardized(law)
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
    h = _standardized("exponential")[:2, :12].clone().requires_grad_()

    def estimate(h: Tensor) -> Tensor:
        return normnorm.estimate_lmbda(h, 1, iterations=iterations)

    assert torch.autograd.gradcheck(estimate, (h,), atol=1e-6)


def test_a_constant_group_keeps_lambda_one() -> None:
    h = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    lmbda = normnorm.estimate_lmbda(h, 1, iterations=None)
    assert lmbda.tolist() == [1.0, 1.0]
    lmbda.sum().backward()
    assert torch.isfinite(h.grad).all()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"iterations": 0}, "iterations must be positive or None; got 0"),
        ({"iterations": 2, "alpha": 0.5}, "whole Newton steps"),
        ({"iterations": None, "order": 1}, "whole Newton steps"),
    ],
)
def test_bad_iterations_are_refused(options: dict[str, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        normnorm.estimate_lmbda(torch.randn(10), **options)


def test_the_layer_normalizes_and_remembers_with_its_own_lambda() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(8, 3, 4, 4).exp()
    layers = [
        IteratedBatchNormalNorm2d(3, 1, noise_train=0.0),
        IteratedBatchNormalNorm2d(3, None, noise_train=0.0),
        normnorm.BatchNormalNorm2d(3, noise_train=0.0),
    ]
    one, optimal, plain = (layer(inputs) for layer in layers)
    torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)
    h, *_ = reference.standardize(inputs.double(), (0, 2, 3), 1e-5)
    lmbda = likelihood.optimal_lmbda(h, (0, 2, 3))
    torch.testing.assert_close(
        optimal, reference.yeo_johnson(h, lmbda).float(), rtol=1e-4, atol=1e-5
    )
    expected = 1 + 0.1 * (lmbda.flatten().float() - 1)
    torch.testing.assert_close(layers[1].running_lmbda, expected, rtol=1e-4, atol=1e-5)
    assert layers[1].num_batches_tracked == 1
    layers[1].eval()
    assert layers[1](inputs).shape == inputs.shape
