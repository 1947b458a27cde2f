"""The diagnostics: Q-Q statistics, moments, independence, sparsity, clusters, robustness."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from normnorm.diagnostics import quantiles


@pytest.mark.parametrize("count", [2, 3, 48, 1000])
def test_qq_r_squared_is_probplots(count: int) -> None:
    groups = np.random.default_rng(count).gamma(2.0, size=(5, count))
    found = quantiles.qq_r_squared(torch.from_numpy(groups))
    for row, r2 in zip(groups, found, strict=True):
        (expected, _), (_, _, r) = scipy.stats.probplot(row)
        np.testing.assert_allclose(quantiles.normal_quantiles(count), expected, atol=1e-12)
        assert r2.item() == pytest.approx(r**2, abs=1e-12)


def test_normal_samples_have_the_r_squared_that_is_said() -> None:
    assert quantiles.normal_r_squared(48) == pytest.approx(0.977, abs=1e-3)
    assert 0.999 < quantiles.normal_r_squared(7200) < 1


def test_qq_r_squared_of_constants_is_nan() -> None:
    found = quantiles.qq_r_squared(torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 4.0]]))
    assert found[0].isnan()
    assert not found[1].isnan()
