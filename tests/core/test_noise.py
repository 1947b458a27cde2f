"""The noise: random words bit for bit, distribution, and agreement of forward and backward pass."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from conftest import DEVICES
from layer_table import LAYERS
from oracle import CASES, DTYPES, UNIT, Case, check, draw, draw_parameters, normals, run
from oracle import to_numpy as numpy
from test_numerics import _channels_last

import normnorm
from normnorm import noise
from normnorm.backends import cpu
from normnorm.statistics import Row

SEEDS = (0, 1, -1, 2**31, 2**32, 0x0123456789ABCDEF, 2**63 - 1, -(2**63), -0x0FEDCBA987654321)


def _seed(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


# --- words ---


def test_the_generators_give_the_published_answers():
    for counter, key, words in oracle.KNOWN_ANSWERS:
        assert list(oracle.philox(np.array(counter, np.uint32), key)) == words
    # the last counter word is always 0 here, so that only the all-zero answer applies
    words = noise.philox_words(torch.zeros(1, dtype=torch.int64), _seed(0), 0)
    assert [int(word) for word in words] == oracle.KNOWN_ANSWERS[0][2]


@pytest.mark.parametrize("stream", [0, 7, 2**32 - 1])
def test_words_are_bitwise_those_of_the_numpy_generator(stream):
    for seed in SEEDS:
        for first in (0, 5, 2**32 - 3, 2**40, 2**60):
            want = oracle.noise_words(16, seed, stream, first)
            for device in DEVICES:
                counter = torch.arange(first, first + 16, device=device)
                words = noise.philox_words(counter, _seed(seed, device), stream)
                got = torch.stack(words, -1).cpu().numpy()
                np.testing.assert_array_equal(got, want.astype(np.int64))
                following = (*words[1:], words[0])
                turns = [noise.turn_words(*pair) for pair in zip(words, following, strict=True)]
                got = torch.stack(turns, -1).cpu().numpy()
                np.testing.assert_array_equal(got, oracle.turns(want).astype(np.int64))


@pytest.mark.parametrize("channels_last", [False, True])
def test_normals_are_those_of_the_numpy_generator_to_rounding(channels_last):
    for shape in ((1,), (7,), (5, 7), (2, 3, 5, 4), (2, 3, 2, 3, 2)):
        if channels_last and len(shape) < 4:
            continue
        want = normals(shape, -77, 3, channels_last)
        for device in DEVICES:
            z = noise.standard_normals(shape, _seed(-77, device), 3, channels_last)
            assert z.shape == shape
            assert z.dtype == torch.float64
            # the angle 2 pi is rounded, times a radius of at most 6.8
            bound = 8 * UNIT[torch.float64] * (7 + np.abs(want))
            oracle.assert_within(z, want, bound, "z")
            z = noise.standard_normals(shape, _seed(-77, device), 3, channels_last, torch.float32)
            oracle.assert_within(z, want, UNIT[torch.float32] * (1e-6 + np.abs(want)) * 1.01, "z")


def test_uniforms_exclude_zero_and_one():
    numerators = (noise.uniforms(torch.tensor([0, 1, 2**31, 2**32 - 1])) * 2**33).tolist()
    assert numerators == [1, 3, 2**32 + 1, 2**33 - 1]


@pytest.mark.parametrize("version", [None, noise.STREAM_VERSION + 1])
def test_a_library_with_another_noise_is_refused(version, monkeypatch):
    """One that names no version has the noise of version 1."""
    exports = {} if version is None else {"normnorm_stream_version": lambda: version}
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(cpu, "LIBRARY", Path(__file__))
    monkeypatch.setattr(cpu, "library", lambda: SimpleNamespace(**exports))
    said = f"draw version {version or 1} of the noise .* {noise.STREAM_VERSION}: rebuild them"
    assert re.search(said, cpu._load())


# --- distribution ---

COUNTERS = 1 << 18


@pytest.fixture(scope="module")
def words() -> np.ndarray:
    return oracle.noise_words(COUNTERS, 20250705)


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return noise.standard_normals((COUNTERS,), _seed(20250705)).numpy()


def _within(value: float, deviation: float) -> bool:
    """Within five standard deviations: fails by chance less than once in a million."""
    return abs(value) < 5 * deviation


def test_normals_pass_a_distribution_test(sample):
    assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    for start in range(8):  # each normal of a counter alone
        assert scipy.stats.kstest(sample[start::8], "norm").pvalue > 1e-3


def test_moments_are_those_of_the_normal_law(sample):
    for power, moment in enumerate((1, 0, 1, 0, 3, 0, 15, 0, 105)):
        # Var(z^p) = E z^2p - (E z^p)^2, with E z^2k = (2k-1)!!
        double = math.prod(range(1, 2 * power, 2))
        deviation = math.sqrt((double - moment**2) / len(sample))
        assert _within((sample**power).mean() - moment, deviation + 1e-15), power


def test_tails_match_the_normal_distribution(sample):
    for threshold in (1.0, 2.0, 3.0, 4.0):
        for tail in (sample, -sample):
            chance = scipy.stats.norm.sf(threshold)
            count = np.count_nonzero(tail > threshold)
            expected = chance * len(sample)
            assert _within(count - expected, math.sqrt(expected)), threshold


def test_pairs_repeat_and_come_close_as_often_as_independent_ones(words):
    """2^20 pairs of the radius's word and the turns: no two are equal, and squares of side 2^-17
    hold as many coincidences as points that are uniform and independent."""
    pairs = words.astype(np.uint64).ravel() << np.uint64(32) | oracle.turns(words).ravel()
    assert len(np.unique(pairs)) == len(pairs)
    coincidences = len(pairs) - len(np.unique(pairs & np.uint64(0xFFFF8000_FFFF8000)))
    expected = 32  # len(pairs)^2 / 2 / 2^34
    assert _within(coincidences - expected, math.sqrt(expected))


def test_the_normals_of_a_counter_are_independent(words):
    """Correlations of all pairs of the eight, in Hermite polynomials up to the fourth."""
    z = oracle.normals_of(words[: COUNTERS // 2]).astype(float)
    polynomials = (z, (z**2 - 1) / 2**0.5, (z**3 - 3 * z) / 6**0.5, (z**4 - 6 * z**2 + 3) / 24**0.5)
    features = np.stack(polynomials, -1).reshape(len(z), 32)
    correlation = (features.T @ features / len(z)).reshape(8, 4, 8, 4).swapaxes(1, 2)
    others = correlation[~np.eye(8, dtype=bool)]
    assert np.abs(others).max() < 5.5 / math.sqrt(len(z))


@pytest.mark.parametrize("lag", [1, 2, 4, 7, 8, 9, 16, 64, 100, 1024])
def test_elements_at_a_lag_are_independent(lag, sample):
    """Correlations of the values, of their squares, and between both."""
    first, second = sample[:-lag], sample[lag:]
    functions = (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2), lambda v: np.sign(v))
    for f in functions:
        for g in functions:
            assert _within((f(first) * g(second)).mean(), 1 / math.sqrt(len(first)))


def test_neighbouring_channels_samples_seeds_and_streams_are_independent():
    z = noise.standard_normals((16, 16, 32, 32), _seed(7)).numpy()
    draws = [
        noise.standard_normals((1 << 16,), _seed(seed), stream).numpy()
        for seed, stream in ((5, 0), (6, 0), (5 + 2**32, 0), (-5, 0), (5, 1), (5, 2), (6, 1))
    ]
    for rows in (z.reshape(256, -1), np.moveaxis(z, 1, 0).reshape(16, -1), np.stack(draws)):
        correlation = rows @ rows.T / rows.shape[1]
        off = correlation[~np.eye(len(rows), dtype=bool)]
        assert np.abs(off).max() < 5.5 / math.sqrt(rows.shape[1])


def test_fresh_seeds_use_all_sixty_four_bits():
    for device in DEVICES:
        seeds = [int(noise.draw_seed(torch.device(device))) & (2**64 - 1) for _ in range(400)]
        assert len(set(seeds)) == 400
        ones = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds]).sum(0)
        assert np.abs(ones - 200).max() < 55  # 5.5 standard deviations of 10


# --- through the layers ---


def _clean_and_noisy(case: Case, x, weight, bias, noise_train, **options):
    clean = case.apply(x, weight, bias, noise_train=0.0)
    return clean, case.apply(x, weight, bias, noise_train=noise_train, **options)


def _forward(case, x, backend, *, weight=None, seed=5, noise_scale=None, **options):
    """The raw op's output and statistics."""
    return torch.ops.normnorm.normal_norm_forward(
        x, None, None, None, weight, None, None, _seed(seed, str(x.device)), noise_scale,
        False, True, *case.config(backend, **options),
    )[:2]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_noise_in_an_output_is_the_streams(case, dtype, backend, device):
    """(y_noisy - y_clean) / (noise_train s) equals z of every stream, in either memory order."""
    for stream, last in ((0, False), (2**31 - 1, False), (5, True)):
        x = draw(case, "exponential", 1, dtype, device)
        x = _channels_last(x) if last else x
        last = last and x.dim() > 3
        clean = numpy(_forward(case, x, backend)[0])
        options = {"noise_train": 3.0, "stream": stream, "channels_last": last}
        y, stats = _forward(case, x, backend, **options)
        scale = 3.0 * numpy(stats[Row.NOISE_SCALE])[:, None]
        scale = case.ungroup(np.broadcast_to(scale, (case.groups, case.size)))
        z = normals(case.shape, 5, stream, last)
        # both outputs are rounded to storage, s and z by the arithmetic
        compute = UNIT[oracle.compute_dtype(dtype)]
        size = (np.abs(numpy(y)) + np.abs(clean)) / scale
        bound = (UNIT[dtype] + 8 * compute) * size + 64 * compute * (1 + np.abs(z))
        error = np.abs((numpy(y) - clean) / scale - z)
        assert (error <= bound).all(), f"off by {error.max()}, allowed {bound.min()}"


def test_the_noise_of_a_long_input_is_the_streams_to_its_end(backend, device):
    """Sizes beyond every block and vector boundary, not divisible by any vector length."""
    for case in (
        Case("layer", (3, 100_003), normalized_ndim=1), Case("batch", (7, 5, 3001)),
        Case("batch", (20_011, 5)), Case("batch", (701, 3, 5)), Case("instance", (3, 5, 10_007)),
        Case("group", (5, 6, 3001), num_groups=2),
    ):  # fmt: skip
        x = draw(case, "normal", 1, torch.float32, device)
        clean, noisy = _clean_and_noisy(case, x, None, None, 1.0, seed=99)
        z = normals(case.shape, 99)
        difference = case.group(numpy(noisy) - numpy(clean))
        scale = (difference * case.group(z)).sum(1) / (case.group(z) ** 2).sum(1)
        error = difference - scale[:, None] * case.group(z)
        assert np.abs(error).max() < 1e-5, case


@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_is_fresh_each_call_and_the_same_for_the_same_seed(case, backend, device):
    x = draw(case, "normal", 1, torch.float32, device)
    first, second = (case.apply(x, noise_train=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    by_int, again, by_tensor, other = (
        case.apply(x, noise_train=0.5, seed=seed)
        for seed in (-77, -77, _seed(-77, device), _seed(-76, device))
    )
    assert torch.equal(by_int, again)
    assert torch.equal(by_int, by_tensor)
    assert not torch.equal(by_int, other)


@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_without_noise_in_evaluation_and_with_a_given_seed_nothing_is_drawn(row, backend, device):
    layer = row.make().to(device)
    x = torch.randn(row.shape, device=device, requires_grad=True)
    state = torch.cuda.get_rng_state if device == "cuda" else torch.get_rng_state
    before = state()
    layer(x)
    assert not torch.equal(before, state())
    before = state()
    layer.noise_train = 0.0
    layer(x).sum().backward()
    layer.eval()
    layer.noise_train = 0.7
    evaluated = layer(x)
    evaluated.sum().backward()
    assert torch.equal(evaluated, layer(x))
    for seed in (5, _seed(5, device)):
        row.apply(x, noise_train=0.5, seed=seed)
    assert torch.equal(before, state())


# --- forward and backward agree ---


def _gradients(y, x, weight, bias, g):
    return torch.autograd.grad(y, (x, weight, bias), g)


def _repack(how):
    """Hooks that return a saved tensor with other strides, as offloading may."""

    def unpack(tensor):
        if how == "channels_last":
            return _channels_last(tensor)
        if tensor.dim() >= 2 and how == "reversed":
            order = tuple(range(tensor.dim()))[::-1]
            return tensor.permute(order).contiguous().permute(order)
        return tensor.contiguous()

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack)


SPATIAL = [(case, last) for case in CASES for last in (False, True) if len(case.shape) >= 3 + last]


@pytest.mark.parametrize(("case", "last"), SPATIAL, ids=str)
def test_a_saved_input_with_other_strides_has_the_same_noise(case, last, backend, device):
    x = draw(case, "exponential", 1, torch.float32, device)
    x = _channels_last(x) if last else x
    weight, bias = draw_parameters(case, 1, torch.float32, device)
    check(case, x, weight, bias, seed=6, noise_train=1.0, channels_last=last)
    leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
    g = torch.randn(case.shape, device=device)
    want = _gradients(case.apply(*leaves, noise_train=1.0, seed=6), *leaves, g)
    for how in ("contiguous", "channels_last", "reversed"):
        with _repack(how):
            y = case.apply(*leaves, noise_train=1.0, seed=6)
        got = _gradients(y, *leaves, g)
        for name, one, other in zip(("du", "dweight", "dbias"), got, want, strict=True):
            # only the order of summation differs
            largest = float(other.abs().max())
            error = float((one - other).abs().max())
            assert error <= 1e-5 * largest, f"{name} with the input {how}: off by {error}"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_given_noise_scale_replaces_the_groups(case, dtype, backend, device):
    x = draw(case, "exponential", 1, dtype, device)
    weight, _ = draw_parameters(case, 1, dtype, device)
    g = torch.randn(case.shape, device=device).to(dtype)
    given = torch.linspace(0.5, 3.0, case.groups, dtype=dtype, device=device)
    y, stats = _forward(case, x, backend, weight=weight, noise_scale=given, noise_train=0.7)
    assert torch.equal(stats[Row.NOISE_SCALE], given)
    gradients = torch.ops.normnorm.normal_norm_backward(
        g, x, stats, weight, None, None, _seed(5, device), None, True, True, False, False,
        *case.config(backend, noise_train=0.7),
    )  # fmt: skip
    options = {"noise_train": 0.7, "z": normals(case.shape, 5), "noise_scale": numpy(given)}
    arguments = (*(numpy(a) for a in (x, g, weight)), None)
    exact = run(case, *arguments, **options)
    allowed = oracle.bounds(case, exact, *arguments, dtype=dtype, **options)
    for name, got in zip(("y", "du", "dweight"), (y, *gradients[:2]), strict=True):
        oracle.assert_within(got, exact[name], allowed[name], name)


# --- checkpointing, gradcheck ---


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("row", LAYERS, ids=lambda row: row.name)
def test_activation_checkpointing_recomputes_the_same_noise(row, use_reentrant, backend, device):
    layer = row.make().to(device)
    network = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
    x = torch.randn(row.shape, device=device, requires_grad=True)
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=use_reentrant)
        else:
            y = network(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters())])
        x.grad = None
        layer.zero_grad()
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("build", [normnorm.LayerNormalNorm, normnorm.AddLayerNormalNorm])
def test_checkpointing_that_restores_no_random_state_is_refused(build):
    layer, x = build(6), torch.randn(5, 6)

    def run(x):
        return layer(x) if build is normnorm.LayerNormalNorm else layer(x, x)[0]

    options = {"use_reentrant": False, "preserve_rng_state": False}
    output = torch.utils.checkpoint.checkpoint(run, x, **options)
    with pytest.raises(RuntimeError, match="ran a normality layer again with other noise"):
        output.sum().backward()
    layer.noise_train = 0.0
    torch.utils.checkpoint.checkpoint(run, x, **options).sum().backward()


def _compiled_error(layer, budget, how):
    """The difference between the weight's gradient and its value from the output."""
    before = torch.nn.Linear(8, 8)

    def network(x):
        return layer(before(torch.tanh(before(x))))

    def run(x):
        if how == "checkpoint":
            return torch.utils.checkpoint.checkpoint(network, x, use_reentrant=False)
        return torch.vmap(network, randomness="same")(x[None])[0] if how == "vmap" else network(x)

    torch.compiler.reset()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        output = torch.compile(run, backend="aot_eager", fullgraph=True)(torch.randn(32, 8))
    g = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, layer.weight, g)
    torch.compiler.reset()
    return (gradient - (g * (output - layer.bias) / layer.weight).sum(0)).abs().max().item()


@pytest.mark.parametrize(("budget", "how"), [(0.5, ""), (0.01, ""), (0.5, "checkpoint")])
@pytest.mark.parametrize("build", [normnorm.BatchNormalNorm1d, normnorm.LayerNormalNorm])
def test_a_compiled_backward_pass_that_recomputes_has_the_noise_of_the_forward(build, budget, how):
    assert _compiled_error(build(8), budget, how) < 1e-3


@pytest.mark.parametrize(("budget", "how"), [(0.0, ""), (0.5, "vmap")])
def test_a_budget_at_which_the_seed_cannot_be_saved_is_refused(budget, how):
    layer = normnorm.LayerNormalNorm(8)
    with pytest.raises(
        Exception, match=f"budget of {budget} torch.compile would draw another noise"
    ):
        _compiled_error(layer, budget, how)
    layer.noise_train = 0.0
    assert _compiled_error(layer, budget, how) < 1e-3


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_with_noise_are_those_of_the_map_with_constants(case, backend, device):
    """Every gradient of the actual map against autograd of the definition with s and z given."""
    x = draw(case, "lognormal", 1, torch.float64, device).requires_grad_()
    weight, bias = (p.requires_grad_() for p in draw_parameters(case, 1, torch.float64, device))
    g = torch.randn(case.shape, dtype=torch.float64).to(device)
    y = case.apply(x, weight, bias, noise_train=0.9, seed=3)
    got = _gradients(y, x, weight, bias, g)
    z = normals(case.shape, 3)
    scale = run(case, numpy(x), numpy(x), noise_train=0.9, z=z)["stats"][Row.NOISE_SCALE]
    constant = normnorm.reference.normal_norm(
        x, weight, bias, kind=case.kind, num_groups=case.num_groups,
        normalized_ndim=case.normalized_ndim, noise_train=0.9,
        z=torch.from_numpy(z.astype(np.float64)).to(device),
        noise_scale=torch.from_numpy(scale.astype(np.float64)).to(device),
    )[0]  # fmt: skip
    torch.testing.assert_close(y, constant, rtol=1e-11, atol=1e-12)
    for one, other in zip(got, _gradients(constant, x, weight, bias, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)
