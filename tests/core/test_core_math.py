"""csrc/math against mpmath and SciPy, on every instruction set of this processor."""

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import mpmath
import numpy as np
import pytest
import torch
from oracle import KNOWN_ANSWERS, noise_words, normals
from scipy.stats import yeojohnson

ROOT = Path(__file__).resolve().parents[2]
BINDING = ROOT / "tests/core/core_binding.cpp"
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
FLAGS = {"generic": [], "avx2": AVX2, "avx512": [*AVX2, *AVX512, "-mprefer-vector-width=512"]}
CXX = next((c for c in ("c++", "g++", "clang++") if shutil.which(c)), None)
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")


def runnable() -> list[str]:
    """The instruction sets of this processor."""
    best = torch.backends.cpu.get_cpu_capability()
    return list(FLAGS)[: {"AVX2": 2, "AVX512": 3}.get(best, 1)]


def build(isa: str, folder: Path) -> ModuleType:
    pybind11 = pytest.importorskip("pybind11")
    name = f"core_{isa}"
    target = folder / f"{name}.so"
    command = [
        *(CXX, "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden"),
        *("-fno-math-errno", "-fno-trapping-math", "-Wno-psabi", *FLAGS[isa]),
        *(f"-DNN_MODULE={name}", f"-I{pybind11.get_include()}"),
        *(f"-I{sysconfig.get_paths()['include']}", str(BINDING), "-o", str(target)),
    ]
    subprocess.run(command, check=True)
    specification = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModuleType]:
    folder = tmp_path_factory.mktemp("core")
    return {isa: build(isa, folder) for isa in runnable()}


@pytest.fixture(params=["generic", "avx2", "avx512"])
def core(request: pytest.FixtureRequest, modules: dict[str, ModuleType]) -> ModuleType:
    if request.param not in modules:
        pytest.skip(f"this processor has no {request.param}: its functions were not tested")
    return modules[request.param]


def exactly(function, arguments: np.ndarray) -> np.ndarray:
    """mpmath's function at float arguments, rounded to float64."""
    with mpmath.workdps(30):
        return np.array([float(function(mpmath.mpf(float(a)))) for a in arguments])


def ulps(got: np.ndarray, want: np.ndarray) -> float:
    """The largest error in units in the last place of the wanted value, in the dtype of ``got``."""
    spacing = np.abs(np.spacing(want.astype(got.dtype))).astype(np.float64)
    return float(np.max(np.abs(got.astype(np.float64) - want) / spacing))


def powers(low: float, high: float, count: int = 1501) -> np.ndarray:
    return np.exp(np.linspace(np.log(low), np.log(high), count)).astype(np.float32)


# --- elementary functions ------------------------------------------------------------------------


def test_log1p_is_within_two_ulp(core):
    t = np.concatenate([powers(1e-30, 1e30), np.linspace(0, 10, 1501, dtype=np.float32)])
    assert ulps(core.float32.log1p(t), exactly(mpmath.log1p, t)) <= 2.0


def test_powers_of_two_are_within_two_ulp_and_minus_one_within_three(core):
    a = np.concatenate([-powers(1e-20, 125), powers(1e-20, 120)])
    assert ulps(core.float32.power(a), exactly(lambda a: 2**a, a)) <= 2.0
    minus_one = exactly(lambda a: mpmath.expm1(a * mpmath.ln2), a)
    assert ulps(core.float32.power_minus_one(a), minus_one) <= 3.0


def test_elementary_functions_at_their_limits(core):
    points = np.array([0.0, np.nan, -1e4], np.float32)
    np.testing.assert_array_equal(core.float32.log1p(points[:2]), [0, np.nan])
    np.testing.assert_array_equal(core.float32.power_minus_one(points), [0, np.nan, -1])
    power = core.float32.power(points)
    np.testing.assert_array_equal(power[:2], [1, np.nan])
    assert 0 <= power[2] < 2e-38


def test_the_projected_error_function_and_its_slope_are_within_two_ulp(core):
    t = np.concatenate([powers(1e-30, 30), np.linspace(1.3, 1.6, 1201, dtype=np.float32)])
    t = np.concatenate([t, -t])

    def value(t):
        return t * slope(t) + mpmath.sqrt(2 / mpmath.pi) * mpmath.exp(-t * t / 2)

    def slope(t):
        return mpmath.erf(t / mpmath.sqrt(2))

    for module in (core.float32, core.float64):
        got = module.projected_error(t)
        assert ulps(got[0], exactly(value, t)) <= 2.0
        assert ulps(got[1], exactly(slope, t)) <= 2.0


def test_the_projected_error_function_at_its_limits(core):
    far = np.array([0.0, -0.0, 1e38, -1e38, np.inf, -np.inf, np.nan], np.float32)
    value, slope = core.float32.projected_error(far)
    assert value[0] == value[1] == np.float32(np.sqrt(2 / np.pi))
    np.testing.assert_array_equal(value[2:], np.abs(far[2:]))
    np.testing.assert_array_equal(slope, [0, 0, 1, -1, 1, -1, np.nan])
    assert list(np.signbit(slope[:2])) == [False, True]


def test_a_point_on_the_circle_is_within_three_ulp_of_one(core):
    random = np.random.default_rng(0)
    words = random.integers(0, 2**32, 2000, dtype=np.uint32)
    edges = (np.arange(8, dtype=np.uint64) << np.uint64(29)).astype(np.uint32)
    words = np.concatenate([words, edges, edges - np.uint32(1)])
    angle = words.astype(np.longdouble) * (2 * np.longdouble(np.pi) / 2**32)
    for got, function in zip(core.on_circle(words), (np.cos, np.sin), strict=True):
        assert np.abs(got - function(angle)).max() <= 3 * 2.0**-24


def test_logarithm_of_the_uniform_is_within_five_ulp_at_both_ends(core):
    random = np.random.default_rng(1)
    small = np.arange(40, dtype=np.uint32)
    words = np.concatenate(
        [random.integers(0, 2**32, 2000, dtype=np.uint32), small, np.uint32(2**32 - 1) - small]
    )
    with mpmath.workdps(30):
        half, unit = mpmath.mpf(0.5), mpmath.mpf(2) ** 32
        want = np.array([float(-2 * mpmath.log((int(w) + half) / unit)) for w in words])
    assert ulps(core.minus_two_log_uniform(words), want) <= 5.0


# --- the transform -------------------------------------------------------------------------------

LAMBDAS = (-5.0, -0.01, 0.0, 1e-6, 0.3, 1.0, 1.25, 2.0, 2.003, 7.0)


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    positive = np.concatenate([powers(1e-6, 30, 300), np.zeros(1, np.float32)])
    return np.concatenate([positive, -positive])


def psi_exact(h: float, lmbda: float) -> mpmath.mpf:
    t, sign = mpmath.mpf(abs(h)), -1 if h < 0 else 1
    eta = 1 + sign * (mpmath.mpf(lmbda) - 1)
    logarithm = mpmath.log1p(t)
    return sign * (logarithm if eta == 0 else mpmath.expm1(eta * logarithm) / eta)


@pytest.mark.parametrize("lmbda", LAMBDAS)
def test_psi_is_accurate_for_every_lambda(core, values, lmbda):
    wide = values.astype(np.float64)
    np.testing.assert_allclose(
        core.float64.psi(wide, lmbda, 0.0), yeojohnson(wide, lmbda), rtol=3e-14
    )
    lmbda = float(np.float32(lmbda))
    want = np.array([float(psi_exact(float(h), lmbda)) for h in values])
    got = core.float32.psi(values, lmbda, 0.0)
    nonzero = want != 0
    # (1+t)^eta amplifies the logarithm's error by the exponent
    exponent = np.abs((1 + np.sign(values) * (lmbda - 1)) * np.log1p(np.abs(values)))
    bound = (6 + 3 * exponent[nonzero]) * 2.0**-23
    assert np.all(np.abs(got - want)[nonzero] <= bound * np.abs(want[nonzero]))
    assert np.all(got[~nonzero] == 0)


@pytest.mark.parametrize("lmbda", LAMBDAS)
def test_slopes_of_psi_are_its_derivatives(core, values, lmbda):
    lmbda = float(np.float32(lmbda))
    h = values[values != 0][::7]
    with mpmath.workdps(40):
        by_h = np.array(
            [float(mpmath.diff(lambda a: psi_exact(a, lmbda), mpmath.mpf(float(v)))) for v in h]
        )
        step = mpmath.mpf(10) ** -12
        above, below = ([psi_exact(float(v), lmbda + s) for v in h] for s in (step, -step))
        differences = [a - b for a, b in zip(above, below, strict=True)]
        by_lambda = np.array([float(d / (2 * step)) for d in differences])
    wide = h.astype(np.float64)
    assert core.float64.psi_h(np.zeros(1), lmbda, 0.0)[0] == 1
    assert core.float64.psi_lambda(np.zeros(1), lmbda, 0.0)[0] == 0
    np.testing.assert_allclose(core.float64.psi_h(wide, lmbda, 0.0), by_h, rtol=2e-13)
    np.testing.assert_allclose(
        core.float64.psi_lambda(wide, lmbda, 0.0), by_lambda, rtol=1e-11, atol=2e-14
    )
    exponent = np.abs((np.sign(h) * (lmbda - 1)) * np.log1p(np.abs(h)))
    error = np.abs(core.float32.psi_h(h, lmbda, 0.0) - by_h) / by_h
    assert np.all(error <= (8 + 4 * exponent) * 2.0**-23)
    # the derivative in lambda is only summed: its error is relative to log(1+t) P
    power = (1 + np.abs(wide)) ** (1 + np.sign(wide) * (lmbda - 1))
    scale = np.log1p(np.abs(wide)) * np.maximum(power, 1)
    error = np.abs(core.float32.psi_lambda(h, lmbda, 0.0) - by_lambda)
    assert np.all(error <= (24 + 6 * exponent) * 2.0**-23 * scale)


@pytest.mark.parametrize("lmbda", [0.0, 0.001, -0.003, 2.0, 0.5])
def test_shifted_exponent_takes_the_logarithm_near_zero(core, values, lmbda):
    shift = np.sqrt(1e-5)
    h = values.astype(np.float64)
    t, sign = np.abs(h), np.where(h < 0, -1.0, 1.0)
    eta = 1 + sign * (lmbda - 1)
    linear = np.abs(eta) <= shift
    moved = np.where(linear, 1.0, eta + np.where(eta < 0, -shift, shift))
    power = (1 + t) ** moved
    want = sign * np.where(linear, np.log1p(t), (power - 1) / moved)
    np.testing.assert_allclose(core.float64.psi(h, lmbda, shift), want, rtol=1e-9, atol=1e-15)
    slope = np.where(linear, 1 / (1 + t), power / (1 + t))
    np.testing.assert_allclose(core.float64.psi_h(h, lmbda, shift), slope, rtol=1e-12)
    assert np.all(core.float64.psi_lambda(h, lmbda, shift)[linear] == 0)


# --- moments -------------------------------------------------------------------------------------


def test_merged_parts_are_the_moments_of_the_whole(core):
    random = np.random.default_rng(3)
    x = 1e4 + random.normal(size=1000)
    total = (0.0, 0.0, 0.0, 0.0)
    for part in np.split(x, [10, 400, 401, 900]):
        centre = float(np.float32(part.mean()))
        c = part - centre
        total = core.merge(total, core.recentred_moments(len(part), centre, c.sum(), (c * c).sum()))
    assert total[0] == 1000
    exact = x.astype(np.longdouble).mean()
    assert abs((np.longdouble(total[1]) - exact) + np.longdouble(total[2])) < 1e-13
    assert total[3] / 1000 == pytest.approx(x.var(), rel=1e-12)
    assert core.recentred_moments(7, 3.3, 0.0, 0.0) == (7, 3.3, 0, 0)


# --- the noise -----------------------------------------------------------------------------------


def test_philox_gives_the_known_answers(core):
    for counter, key, words in KNOWN_ANSWERS:
        assert list(core.philox(np.array(counter, np.uint32), *key)) == words


def test_vectorised_words_are_those_of_the_oracle_bit_for_bit(core):
    seed, stream = -123456789012345, 7
    for first in (0, 5, 2**32 - 3, 2**40 + 1):
        want = noise_words(61, seed, stream, first)
        got = core.lane_words(seed & (2**64 - 1), stream, first, 61)
        np.testing.assert_array_equal(got.reshape(61, 4), want)


def assert_normal(got: np.ndarray, positions: np.ndarray) -> None:
    """Normals of seed 99 and stream 3 at positions of the noise."""
    all_of_them = normals((int(positions.max()) // 2 * 2 + 2,), 99, 3)
    want = all_of_them[positions]
    if got.dtype == np.float64:
        np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-13, atol=1e-14)
        return
    radius = np.hypot(all_of_them[::2], all_of_them[1::2])[positions // 2]
    assert np.all(np.abs(got - want) <= 6 * 2.0**-24 * radius)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normals_are_those_of_the_oracle(core, dtype):
    for count in (1, 333, 2049):
        for position in (0, 1, 6, 7, 4095):
            got = getattr(core, dtype).normals(99, 3, position, count, False, 1, 1)
            assert_normal(got, position + np.arange(count))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_short_runs_have_the_normals_of_their_positions(core, dtype):
    for length, step, runs in ((1, 1, 70), (5, 160, 409), (8, 8, 3), (49, 147, 41), (511, 600, 4)):
        got = getattr(core, dtype).normals_of_runs(99, 3, 3, step, length, runs)
        assert_normal(got, (3 + step * np.arange(runs)[:, None] + np.arange(length)).ravel())


def test_normals_where_the_canonical_order_is_transposed(core):
    want = normals((2, 3, 4), 5, 0, channels_last=True).ravel()
    got = core.float64.normals(5, 0, 0, 24, True, 3, 4)
    np.testing.assert_allclose(got, want.astype(np.float64), rtol=1e-13, atol=1e-14)


# --- half precision ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_half_numbers_widen_exactly_and_floats_narrow_to_the_nearest_even(core, name):
    def as_torch(bits):
        return torch.from_numpy(bits.view(np.int16)).view(getattr(torch, name))

    every = np.arange(2**16, dtype=np.uint16)
    widened = getattr(core, f"widen_{name}")(every)
    np.testing.assert_array_equal(widened, as_torch(every).float().numpy())
    random = np.random.default_rng(4)
    bits = random.integers(0, 2**32, 40_003, dtype=np.uint32)
    ties = (np.arange(2**16, dtype=np.uint32) << np.uint32(16)) | np.uint32(0x8000)
    half = (random.integers(0x38000000, 0x47800000, 20_000, dtype=np.uint32) >> 12) << 12
    x = np.concatenate([bits, ties, half.astype(np.uint32)]).view(np.float32)
    x = x[~np.isnan(x)]
    narrow = getattr(core, f"narrow_{name}")
    want = torch.from_numpy(x).to(getattr(torch, name)).view(torch.int16).numpy()
    np.testing.assert_array_equal(narrow(x), want.view(np.uint16))
    assert as_torch(narrow(np.array([np.nan], np.float32))).isnan().all()
