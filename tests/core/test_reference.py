"""The definition against independent oracles: SciPy, mpmath, and a closed-form NumPy one."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import mpmath
import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from oracle import CASES, LAWS, UNIT, Case, check, draw, draw_parameters

from normnorm import estimate_lmbda, reference, yeo_johnson

HERE = Path(__file__).parent
U = UNIT[torch.float64]


# --- psi: values ---


def _standardized(law: str, n: int, seed: int = 0) -> torch.Tensor:
    """One group of a distribution with mean 0 and variance 1, in float64."""
    values = LAWS[law](np.random.default_rng(seed), 1, n)[0].astype(oracle.REAL)
    centred = values - values.mean()
    return torch.from_numpy((centred / np.sqrt((centred**2).mean())).astype(np.float64))


@pytest.mark.parametrize("lmbda", [-5.2, -1.0, -1e-9, 0.0, 1e-9, 0.3, 1.0, 1.7, 2.0, 3.5, 7.2])
def test_psi_is_scipys_yeojohnson(lmbda):
    random = np.random.default_rng(1)
    h = np.concatenate(
        [random.normal(size=200), 50 * random.standard_t(2, size=200), [0.0, -0.0, 1e-290, -1e-290]]
    )
    got = yeo_johnson(torch.from_numpy(h), lmbda).numpy()
    want = scipy.stats.yeojohnson(h, lmbda=lmbda)
    # Both take the logarithm, multiply by the exponent and exponentiate: a rounding of the exponent
    # counts times its size. normnorm also computes 1 + sign (lmbda - 1).
    exponent = (1 + abs(lmbda)) * np.log1p(np.abs(h))
    np.testing.assert_array_less(np.abs(got - want), U * (8 + 4 * exponent) * np.abs(want) + 1e-310)


def test_psi_of_a_tensor_of_lmbdas_broadcasts_and_is_scipys_for_each():
    h = torch.randn(6, 1, dtype=torch.float64)
    lmbdas = torch.linspace(-2, 4, 13, dtype=torch.float64)
    got = yeo_johnson(h, lmbdas)
    assert got.shape == (6, 13)
    for column, lmbda in enumerate(lmbdas.tolist()):
        want = scipy.stats.yeojohnson(h[:, 0].numpy(), lmbda=lmbda)
        np.testing.assert_allclose(got[:, column].numpy(), want, rtol=1e-14, atol=0)


def test_lmbda_one_is_the_identity():
    h = torch.linspace(-40, 40, 4001, dtype=torch.float64)
    bound = U * (4 + 2 * torch.log1p(h.abs())) * h.abs()
    assert ((yeo_johnson(h, 1.0) - h).abs() <= bound).all()


def test_psi_keeps_order_and_sign_for_every_lmbda():
    h = torch.cat([-torch.logspace(6, -8, 200), torch.zeros(1), torch.logspace(-8, 6, 200)])
    for lmbda in np.linspace(-5.2, 7.2, 32):
        x = yeo_johnson(h.double(), float(lmbda))
        assert (x.diff() >= 0).all()
        assert torch.equal(x.sign(), h.double().sign())


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
@pytest.mark.parametrize("h", [1e-12, 0.3, 2.7, 30.0])
@pytest.mark.parametrize("side", [1, -1])
def test_psi_and_its_derivatives_to_second_order_hold_near_every_exponent(eta, h, side):
    """The exponent is lmbda for h >= 0 and 2 - lmbda below; near 0 the quotient cancels."""
    lmbda = eta if side > 0 else 2.0 - eta
    with mpmath.workdps(25):
        for order, got in _our_derivatives(side * h, lmbda).items():
            want = _mp_derivative(side * h, lmbda, order)
            # eta is computed from lmbda with an absolute error of one or two roundings of 1 +
            # |lmbda|, and each of the few products of a second derivative adds its own.
            allowed = 64 * U * (1 + abs(lmbda)) * (1 + math.log1p(h)) ** 3 * abs(want)
            allowed += 8 * U * (1.0 if order == (2, 0) else h)  # d2psi/dh2 = (eta - 1) psi' / (1+t)
            assert abs(got - want) <= allowed, (order, got, float(want))


def test_the_integral_form_of_the_oracle_is_psi():
    with mpmath.workdps(40):
        for h, lmbda in ((0.7, 0.4), (-2.1, 1.3), (3.0, 0.0), (-3.0, 2.0)):
            assert abs(_mp_derivative(h, lmbda, (0, 0)) - _mp_psi(h, lmbda)) < 1e-30


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


def test_an_element_exactly_at_the_mean_has_the_true_gradient(backend, device):
    """At h = 0 an implementation by sign(h) would lose the element's gradient."""
    case = Case("batch", (5, 2))
    x = torch.tensor([[-2.0, 1.0], [-1.0, 0.0], [0.0, 0.0], [1.0, 0.0], [2.0, -1.0]])
    check(case, x.to(device, torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lmbda", [-5.0, -1.3, -0.4, 0.0, 0.5, 1.0, 1.6, 4.0])
def test_the_slope_of_psi_keeps_its_digits_where_it_is_small(lmbda, dtype):
    """(1+t)^(eta-1) falls to 1e-9 at h = 30, lmbda = -5: it must not be a difference of larger
    values."""
    h = torch.logspace(-3, 2, 60, dtype=dtype).requires_grad_()
    (got,) = torch.autograd.grad(yeo_johnson(h, lmbda).sum(), h)
    exact = h.detach().numpy().astype(oracle.REAL)
    want = (1 + exact) ** (oracle.REAL(lmbda) - 1)
    exponent = (1 + abs(lmbda)) * np.log1p(exact)
    oracle.assert_within(got, want, UNIT[dtype] * (16 + 4 * exponent) * want, "dpsi/dh")


# --- psi: far out, shifted, half types ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("lmbda", [-5.0, 0.0, 0.5, 1.0, 2.0, 7.0])
def test_psi_and_its_gradients_stay_finite_wherever_h_is(dtype, lmbda):
    largest = torch.finfo(dtype).max
    h = torch.tensor([-largest, -1e30, -1e10, 1e10, 1e30, largest], dtype=dtype)
    h.requires_grad_()
    e = torch.tensor(lmbda, dtype=dtype, requires_grad=True)
    x = yeo_johnson(h, e)
    assert x.isfinite().all()
    assert torch.equal(x.sign(), h.sign())
    assert (x.diff() >= 0).all()
    gradients = torch.autograd.grad(x.sum(), (h, e))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("lmbda", [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
def test_psi_of_an_infinity_is_no_nan_and_nan_stays_nan(lmbda):
    h = torch.tensor([math.inf, -math.inf, math.nan, 1.0], dtype=torch.float64)
    x = yeo_johnson(h, lmbda)
    assert not x[:2].isnan().any()
    assert x[0] > 0 > x[1]
    assert x[2].isnan()
    assert x[3].isfinite()


def _shifted_psi(h: np.ndarray, lmbda: float, shift: float) -> np.ndarray:
    """The authors' transform, written from their formula."""
    eta = np.where(h >= 0, lmbda, 2 - lmbda)
    moved = eta + np.where(eta >= 0, shift, -shift)
    t = np.abs(h)
    power = ((1 + t) ** moved - 1) / moved
    return np.where(h >= 0, 1, -1) * np.where(np.abs(eta) <= shift, np.log1p(t), power)


@pytest.mark.parametrize("lmbda", [-2.0, -0.01, -0.003, 0.0, 0.003, 0.01, 0.9, 1.998, 2.0, 2.01, 4])
def test_transform_eps_moves_the_exponent_away_from_zero(lmbda):
    shift = math.sqrt(1e-5)
    h = np.linspace(-6, 6, 101)
    got = yeo_johnson(torch.from_numpy(h), float(lmbda), shift)
    np.testing.assert_allclose(got.numpy(), _shifted_psi(h, lmbda, shift), rtol=1e-11, atol=1e-13)


def test_within_transform_eps_of_zero_psi_is_the_logarithm_and_lmbda_has_no_gradient():
    shift = math.sqrt(1e-5)
    h = torch.linspace(-3, 3, 13, dtype=torch.float64)
    lmbda = torch.tensor([0.9 * shift, 2 - 0.9 * shift], dtype=torch.float64, requires_grad=True)
    x = yeo_johnson(h[:, None], lmbda, shift)
    (slope,) = torch.autograd.grad(x[7:, 0].sum() + x[:6, 1].sum(), lmbda)
    assert torch.equal(slope, torch.zeros_like(slope))
    torch.testing.assert_close(x[7:, 0], torch.log1p(h[7:]), rtol=4 * U, atol=0)
    torch.testing.assert_close(x[:6, 1], -torch.log1p(-h[:6]), rtol=4 * U, atol=0)


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

SHAPES = [law for law in LAWS if law not in ("constant", "offset", "tiny_variance")]


def _negative_log_likelihood(lmbda: float, h: np.ndarray) -> float:
    return -scipy.stats.yeojohnson_llf(lmbda, h) / h.size


@pytest.mark.parametrize("law", SHAPES)
def test_lmbda_is_one_newton_step_on_scipys_likelihood(law):
    h = _standardized(law, 300)
    step = 2e-3
    values = {k: _negative_log_likelihood(1 + k * step, h.numpy()) for k in range(-3, 4)}
    # central differences of sixth order
    first = (45 * (values[1] - values[-1]) - 9 * (values[2] - values[-2])
             + (values[3] - values[-3])) / (60 * step)  # fmt: skip
    second = (270 * (values[1] + values[-1]) - 27 * (values[2] + values[-2])
              + 2 * (values[3] + values[-3]) - 490 * values[0]) / (180 * step**2)  # fmt: skip
    for eps in (1e-5, 1e-2):
        want = 1 - first / (second + math.sqrt(eps))
        assert estimate_lmbda(h, eps=eps).item() == pytest.approx(want, rel=1e-5, abs=1e-6)
    half = estimate_lmbda(h, alpha=0.5).item()
    assert half == pytest.approx(1 - 0.5 * first / (second + math.sqrt(1e-5)), rel=1e-5, abs=1e-6)
    gradient_step = estimate_lmbda(h, alpha=0.5, order=1).item()
    assert gradient_step == pytest.approx(1 - 0.5 * first, rel=1e-7, abs=1e-8)
    assert estimate_lmbda(h, alpha=0.0).item() == 1.0


@pytest.mark.parametrize("law", ["exponential", "one_hot", "bimodal"])
def test_lmbda_is_the_newton_step_to_rounding(law):
    """L' and L'' at 1 differentiated in 40 digits from the likelihood itself."""
    h = _standardized(law, 24)
    with mpmath.workdps(40):
        data = [mpmath.mpf(value) for value in h.tolist()]

        def likelihood(lmbda):
            x = [_mp_psi(value, lmbda) for value in data]
            mean = mpmath.fsum(x) / len(x)
            variance = mpmath.fsum((value - mean) ** 2 for value in x) / len(x)
            logs = [mpmath.sign(value) * mpmath.log1p(abs(value)) for value in data]
            return mpmath.log(variance) / 2 - (lmbda - 1) * mpmath.fsum(logs) / len(logs)

        first, second = (mpmath.diff(likelihood, 1, order) for order in (1, 2))
        want = float(1 - first / (second + mpmath.sqrt(mpmath.mpf(1e-5))))
    # the data are standardized only to rounding, and Q may be small
    assert estimate_lmbda(h).item() == pytest.approx(want, rel=1e-12, abs=1e-12)


def test_lmbda_over_some_dimensions_is_the_one_of_each_slice():
    h = torch.randn(3, 4, 5, dtype=torch.float64)
    got = estimate_lmbda(h, (0, 2))
    assert got.shape == (4,)
    assert estimate_lmbda(h, (0, 2), keepdim=True).shape == (1, 4, 1)
    assert estimate_lmbda(h, -1).shape == (3, 4)
    for channel in range(4):
        assert got[channel].item() == pytest.approx(estimate_lmbda(h[:, channel]).item(), rel=1e-14)


@pytest.mark.parametrize("law", SHAPES)
def test_lmbda_does_not_move_with_a_shift_and_moves_with_scale_only_through_eps(law):
    """sum dlmbda/du = 0 and sum (u - mu) dlmbda/du = eps r^2 sum (h dlmbda/dh)."""
    eps = 1e-2
    u = (3.0 + 0.7 * _standardized(law, 60)).requires_grad_()
    h, mean, low, rstd = reference.standardize(u, (0,), eps)
    lmbda = estimate_lmbda(h, eps=eps)
    by_u, by_h = torch.autograd.grad(lmbda, (u, h))
    centred = u.detach() - mean.detach() - low.detach()
    size = by_u.abs().sum().item()
    assert by_u.sum().item() == pytest.approx(0.0, abs=200 * U * size)
    want = eps * rstd.item() ** 2 * (h * by_h).sum().item()
    assert (centred * by_u).sum().item() == pytest.approx(want, rel=1e-9, abs=1e-12 * size)


def test_mirrored_data_give_the_mirrored_lmbda():
    """psi(-h; lmbda) = -psi(h; 2 - lmbda) holds for the estimate too."""
    for law in SHAPES:
        h = _standardized(law, 200)
        got, mirrored = estimate_lmbda(h).item(), estimate_lmbda(-h).item()
        assert got - 1.0 == pytest.approx(1.0 - mirrored, rel=1e-11, abs=1e-12)
        torch.testing.assert_close(yeo_johnson(-h, mirrored), -yeo_johnson(h, got))


def test_the_clamp_of_the_second_derivative_only_absorbs_rounding():
    """log Var(psi) is convex in lmbda: Q is at least sqrt(eps) for any data."""
    random = np.random.default_rng(5)
    smallest = math.inf
    for law in LAWS:
        for n in (2, 3, 5, 40):
            u = LAWS[law](random, 40, n)
            if law in ("constant", "offset"):
                continue
            h = torch.from_numpy((u - u.mean(1, keepdims=True)) / (u.std(1, keepdims=True) + 1e-30))
            _, a, d, q = reference.lmbda_newton_step(h, (1,), 1e-5, 1.0, 2)
            t, log = h.abs(), torch.log1p(h.abs())
            big = (1 + t) * log
            second = (big**2 + t * big * log - 4 * big * t + 3 * t**2).mean(1, keepdim=True)
            raw = second - d**2 - 2 * a**2
            smallest = min(smallest, raw.min().item())
            assert (q >= math.sqrt(1e-5)).all()
    assert smallest > -1e-12


# --- the whole map ---

OPTIONS = [
    {},
    {"order": 1, "alpha": 0.5},
    {"alpha": 0.6, "eps": 1e-2},
    {"transform_eps": math.sqrt(1e-5)},
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
def test_forward_and_gradients_are_the_closed_forms(case, options, backend, device):
    """Outputs and gradients against an independent closed form in float64, gradients derived by
    hand."""
    for law in ("exponential", "student_t"):
        x = draw(case, law, 1, torch.float64, device)
        weight, bias = draw_parameters(case, 1, torch.float64, device)
        check(case, x, weight, bias, seed=1, what=law, **options)


# --- other projects' tests ---


@pytest.mark.parametrize(
    ("module", "which", "least"),
    [
        ("scipy.stats.tests.test_morestats", "Yeojohnson", 50),
        ("sklearn.preprocessing.tests.test_data", "yeo or power_transformer", 40),
    ],
)
def test_the_yeo_johnson_tests_that_others_ship_pass_with_our_transform(
    module, which, least, tmp_path
):
    paths = (str(HERE.parents[1]), str(HERE), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment["OMP_NUM_THREADS"] = "1"
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "foreign_plugin",
        "--pyargs", module, "-k", which,
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-4000:]
    passed = re.search(r"(\d+) passed", report)
    assert passed, report[-2000:]
    assert int(passed[1]) >= least, report[-2000:]
    calls = re.search(r"our transform was called (\d+) times", report)
    assert calls, report[-2000:]
    assert int(calls[1]) >= int(passed[1]), report[-2000:]
