"""The definition against independent oracles: SciPy, mpmath, and a closed-form NumPy one."""

import math

import mpmath
import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from oracle import LAWS, UNIT

from normnorm import estimate_lmbda, yeo_johnson

U = UNIT[torch.float64]


# --- psi: values ---

LAMBDAS = [-5.2, -1.0, -1e-9, 0.0, 1e-9, 0.3, 1.0, 1.7, 2.0, 3.5, 7.2]


def test_psi_is_scipys_yeojohnson():
    random = np.random.default_rng(1)
    h = np.concatenate(
        [random.normal(size=200), 50 * random.standard_t(2, size=200), [0.0, -0.0, 1e-290, -1e-290]]
    )
    got = yeo_johnson(torch.from_numpy(h)[:, None], torch.tensor(LAMBDAS, dtype=torch.float64))
    assert got.shape == (len(h), len(LAMBDAS))
    for column, lmbda in zip(got.numpy().T, LAMBDAS, strict=True):
        want = scipy.stats.yeojohnson(h, lmbda=lmbda)
        # Both take the logarithm, multiply by the exponent and exponentiate: a rounding of the
        # exponent counts times its size. normnorm also computes 1 + sign (lmbda - 1).
        exponent = (1 + abs(lmbda)) * np.log1p(np.abs(h))
        bound = U * (8 + 4 * exponent) * np.abs(want) + 1e-310
        np.testing.assert_array_less(np.abs(column - want), bound)
        np.testing.assert_array_equal(column, yeo_johnson(torch.from_numpy(h), lmbda).numpy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_psi_keeps_order_and_sign_and_is_finite_with_its_gradients_for_every_h(dtype):
    far = torch.tensor([torch.finfo(dtype).max, 1e30, 1e10], dtype=dtype)
    h = torch.cat([-far, -torch.logspace(6, -8, 200), torch.zeros(1), torch.logspace(-8, 6, 200),
                   far.flip(0)]).to(dtype).requires_grad_()  # fmt: skip
    for lmbda in np.linspace(-5.2, 7.2, 32):
        e = torch.full_like(h, lmbda, requires_grad=True)
        x = yeo_johnson(h, e)
        assert (x.diff() >= 0).all()
        assert torch.equal(x.sign(), h.sign())
        for tensor in (x, *torch.autograd.grad(x.sum(), (h, e))):
            assert tensor.isfinite().all()


@pytest.mark.parametrize("lmbda", [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
def test_psi_of_an_infinity_is_no_nan_and_nan_stays_nan(lmbda):
    h = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.float64)
    x = yeo_johnson(h, lmbda)
    assert x[0] > 0 > x[1]
    assert x[2].isnan()
    assert x[3].isfinite()


# --- psi: limits and derivatives ---


def _mp_psi(h, lmbda):
    h, lmbda = mpmath.mpf(h), mpmath.mpf(lmbda)
    sign, eta = (1, lmbda) if h >= 0 else (-1, 2 - lmbda)
    log = mpmath.log1p(abs(h))
    return sign * (log if eta == 0 else mpmath.expm1(eta * log) / eta)


def _mp_derivative(h: float, lmbda: float, order: tuple[int, int]):
    """d^i/dh^i d^j/dlmbda^j of psi, from (1/eta) ((1+t)^eta - 1) = integral of s^(eta-1) for s from
    1 to 1+t, whose derivatives have no singularity at eta = 0."""
    h, lmbda = mpmath.mpf(h), mpmath.mpf(lmbda)
    sign, eta = (1, lmbda) if h >= 0 else (-1, 2 - lmbda)
    top = 1 + abs(h)
    by_h, by_lmbda = order

    def integrand(s):
        return s ** (eta - 1) * mpmath.log(s) ** by_lmbda

    if by_h == 0:
        value = mpmath.quad(integrand, [1, top])
    else:
        value = mpmath.diff(integrand, top, by_h - 1) if by_h > 1 else integrand(top)
    # each derivative by h adds a factor sign (d|h|/dh), each by lmbda sign (deta/dlmbda)
    return value * sign ** (1 + by_h + by_lmbda)


def _our_derivatives(h: float, lmbda: float) -> dict[tuple[int, int], float]:
    x = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    e = torch.tensor(lmbda, dtype=torch.float64, requires_grad=True)
    psi = yeo_johnson(x, e)
    by_h, by_lmbda = torch.autograd.grad(psi, (x, e), create_graph=True)
    h_h, h_l = torch.autograd.grad(by_h, (x, e), retain_graph=True)
    l_h, l_l = torch.autograd.grad(by_lmbda, (x, e))
    assert l_h.item() == pytest.approx(h_l.item(), rel=1e-12, abs=1e-14)
    return {
        (0, 0): psi.item(), (1, 0): by_h.item(), (0, 1): by_lmbda.item(),
        (2, 0): h_h.item(), (1, 1): h_l.item(), (0, 2): l_l.item(),
    }  # fmt: skip


ETAS = [0.0] + [sign * 10.0**k for k in (-300, -100, -20, -15, -8, -4, -2) for sign in (1, -1)]


@pytest.mark.parametrize("eta", [*ETAS, 0.2, -0.3, 0.7, 1.0, 1.9, -2.5, 4.0])
@pytest.mark.parametrize("side", [1, -1])
def test_psi_and_its_derivatives_to_second_order_hold_near_every_exponent(eta, side):
    """The exponent is lmbda for h >= 0 and 2 - lmbda below; near 0 the quotient cancels."""
    lmbda = eta if side > 0 else 2.0 - eta
    with mpmath.workdps(25):
        for h in (1e-12, 0.3, 2.7, 30.0):
            for order, got in _our_derivatives(side * h, lmbda).items():
                want = _mp_derivative(side * h, lmbda, order)
                # eta is computed from lmbda with an absolute error of one or two roundings of 1 +
                # |lmbda|, and each of the few products of a second derivative adds its own.
                rounding = 64 * U * (1 + abs(lmbda)) * (1 + math.log1p(h)) ** 3 * abs(want)
                cancelled = 1.0 if order == (2, 0) else h  # d2psi/dh2 = (eta - 1) psi' / (1+t)
                assert abs(got - want) <= rounding + 8 * U * cancelled, (order, got, float(want))


@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("lmbda", [-3.0, 0.0, 1.0, 1.3, 2.0, 5.0])
def test_derivatives_at_zero_are_the_true_ones(zero, lmbda):
    """psi(h) = h + (lmbda - 1) h^2 / 2 + ..., from both sides."""
    found = _our_derivatives(zero, lmbda)
    assert found[0, 0] == 0.0
    assert found[1, 0] == 1.0
    assert found[0, 1] == 0.0
    assert found[2, 0] == pytest.approx(lmbda - 1.0, abs=4 * U * (1 + abs(lmbda)))
    assert found[1, 1] == 0.0
    assert found[0, 2] == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_psi_keeps_its_digits_where_it_is_small(dtype):
    """(1+t)^(eta-1) falls to 1e-9 at h = 30, lmbda = -5: it must not be a difference of larger
    values."""
    h = torch.logspace(-3, 2, 60, dtype=dtype).requires_grad_()
    exact = h.detach().numpy().astype(oracle.REAL)
    for lmbda in (-5.0, -1.3, -0.4, 0.0, 0.5, 1.0, 1.6, 4.0):
        (got,) = torch.autograd.grad(yeo_johnson(h, lmbda).sum(), h)
        want = (1 + exact) ** (oracle.REAL(lmbda) - 1)
        exponent = (1 + abs(lmbda)) * np.log1p(exact)
        oracle.assert_within(got, want, UNIT[dtype] * (16 + 4 * exponent) * want, "dpsi/dh")


# --- psi: shifted, half types ---


def test_within_transform_eps_of_zero_lmbda_has_no_gradient():
    shift = math.sqrt(1e-5)
    h = torch.linspace(0.5, 3, 6, dtype=torch.float64)
    lmbda = torch.tensor([0.9 * shift, 2 - 0.9 * shift], dtype=torch.float64, requires_grad=True)
    x = yeo_johnson(torch.stack([h, -h], 1), lmbda, shift)
    torch.testing.assert_close(x[:, 0], torch.log1p(h), rtol=4 * U, atol=0)
    torch.testing.assert_close(x[:, 1], -x[:, 0], rtol=4 * U, atol=0)
    (slope,) = torch.autograd.grad(x.sum(), lmbda)
    assert torch.equal(slope, torch.zeros_like(slope))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_compute_in_float32_and_round_once(dtype):
    h = (4 * torch.randn(500)).to(dtype)
    for lmbda in (0.0, 0.4, 1.0, 2.0):
        got = yeo_johnson(h, lmbda)
        assert got.dtype == dtype
        assert torch.equal(got, yeo_johnson(h.float(), lmbda).to(dtype))
    assert estimate_lmbda(h).dtype == torch.float32
    assert torch.equal(estimate_lmbda(h), estimate_lmbda(h.float()))


# --- lambda ---


@pytest.mark.parametrize("law", ["exponential", "student_t", "bimodal", "one_hot"])
def test_lmbda_is_the_newton_step_to_rounding(law):
    """L' and L'' at 1 differentiated in 40 digits from the likelihood itself."""
    values = LAWS[law](np.random.default_rng(0), 1, 24)[0].astype(oracle.REAL)
    centred = values - values.mean()
    h = torch.from_numpy((centred / np.sqrt((centred**2).mean())).astype(np.float64))
    with mpmath.workdps(40):
        data = [mpmath.mpf(value) for value in h.tolist()]

        def likelihood(lmbda):
            x = [_mp_psi(value, lmbda) for value in data]
            mean = mpmath.fsum(x) / len(x)
            variance = mpmath.fsum((value - mean) ** 2 for value in x) / len(x)
            logs = [mpmath.sign(value) * mpmath.log1p(abs(value)) for value in data]
            return mpmath.log(variance) / 2 - (lmbda - 1) * mpmath.fsum(logs) / len(logs)

        first, second = (float(mpmath.diff(likelihood, 1, order)) for order in (1, 2))
    # the data are standardized only to rounding, and Q may be small
    for options in ({}, {"eps": 1e-2}, {"alpha": 0.5}, {"alpha": 0.0}):
        curvature = second + math.sqrt(options.get("eps", 1e-5))
        want = 1 - options.get("alpha", 1.0) * first / curvature
        assert estimate_lmbda(h, **options).item() == pytest.approx(want, rel=1e-12, abs=1e-12)
    gradient_step = estimate_lmbda(h, alpha=0.5, order=1).item()
    assert gradient_step == pytest.approx(1 - 0.5 * first, rel=1e-12, abs=1e-12)


def test_lmbda_over_some_dimensions_is_the_one_of_each_slice():
    h = torch.randn(3, 4, 5, dtype=torch.float64)
    want = torch.stack([estimate_lmbda(h[:, channel]) for channel in range(4)])
    torch.testing.assert_close(estimate_lmbda(h, (0, 2)), want, rtol=1e-14, atol=0)
    assert estimate_lmbda(h, (0, 2), keepdim=True).shape == (1, 4, 1)
    assert estimate_lmbda(h, -1).shape == (3, 4)
