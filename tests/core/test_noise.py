"""The noise: random words bit for bit, distribution, and agreement of forward and backward pass."""

from __future__ import annotations

import math

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from oracle import CASES, DTYPES, UNIT, Case, check, draw, draw_parameters, normals, run
from oracle import to_numpy as numpy

import normnorm
from normnorm import functional as F
from normnorm import noise
from normnorm.statistics import Row

SEEDS = (0, 1, -1, 2**31, 2**32, 0x0123456789ABCDEF, 2**63 - 1, -(2**63), -0x0FEDCBA987654321)


def _name(value) -> str:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else str(value)


def _seed(value: int, device: str = "cpu") -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int64, device=device)


# --- words ---

# Random123's kat_vectors for philox4x32-10: counter, key, words.
KNOWN_ANSWERS = [
    (
        (0x00000000, 0x00000000, 0x00000000, 0x00000000),
        (0x00000000, 0x00000000),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_the_numpy_generator_gives_the_published_answers(counter, key, words):
    got = oracle.philox(np.array(counter, np.uint32), key)
    assert tuple(int(word) for word in got) == words


def test_the_product_gives_the_published_answer_that_its_counter_can_reach():
    """The last counter word is always 0, so only the all-zero vector applies."""
    words = noise.philox_words(torch.zeros(1, dtype=torch.int64), _seed(0), 0)
    assert [hex(int(word)) for word in words] == [hex(word) for word in KNOWN_ANSWERS[0][2]]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stream", [0, 1, 7, 2**31, 2**32 - 1])
def test_words_are_bitwise_those_of_the_numpy_generator(seed, stream, devices):
    for first in (0, 5, 2**32 - 3, 2**40, 2**61):
        want = oracle.noise_words(64, seed, stream, first).reshape(-1, 4)
        for device in devices:
            counter = torch.arange(first, first + 16, device=device)
            got = noise.philox_words(counter, _seed(seed, device), stream)
            got = torch.stack(got, -1).cpu().numpy()
            assert got.min() >= 0
            np.testing.assert_array_equal(got.astype(np.uint64), want.astype(np.uint64))


@pytest.mark.parametrize("seed", SEEDS[::2])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normals_are_those_of_the_numpy_generator_to_rounding(seed, channels_last, devices):
    for shape in ((1,), (3,), (5, 7), (2, 3, 5), (2, 3, 5, 4), (2, 3, 2, 3, 2)):
        if channels_last and len(shape) < 4:
            continue
        want = normals(shape, seed, 3, channels_last)
        for device in devices:
            z = noise.standard_normals(shape, _seed(seed, device), 3, channels_last)
            assert z.shape == shape
            assert z.dtype == torch.float64
            # the angle 2 pi is rounded, times a radius of at most 6.7
            bound = 8 * UNIT[torch.float64] * (7 + np.abs(want))
            oracle.assert_within(z, want, bound, "z")
            z = noise.standard_normals(shape, _seed(seed, device), 3, channels_last, torch.float32)
            oracle.assert_within(z, want, UNIT[torch.float32] * (1e-6 + np.abs(want)) * 1.01, "z")


def test_uniforms_exclude_zero_and_one():
    unit = 2.0**-33
    words = torch.tensor([0, 1, 2**31, 2**32 - 1])
    assert noise.uniforms(words).tolist() == [unit, 3 * unit, 0.5 + unit, 1 - unit]


# --- distribution ---

SAMPLE = 1 << 18


@pytest.fixture(scope="module")
def sample() -> np.ndarray:
    return noise.standard_normals((SAMPLE,), _seed(20250705)).numpy()


def _within(value: float, deviation: float) -> bool:
    """Within five standard deviations: fails by chance less than once in a million."""
    return abs(value) < 5 * deviation


def test_normals_pass_a_distribution_test(sample):
    assert scipy.stats.kstest(sample, "norm").pvalue > 1e-3
    for start in range(4):  # cosine and sine of either pair alone
        assert scipy.stats.kstest(sample[start::4], "norm").pvalue > 1e-3


def test_moments_are_those_of_the_normal_law(sample):
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (5, 0), (6, 15), (8, 105)):
        # Var(z^p) = E z^2p - (E z^p)^2, with E z^2k = (2k-1)!!
        double = math.prod(range(1, 2 * power, 2))
        deviation = math.sqrt((double - moment**2) / SAMPLE)
        assert _within((sample**power).mean() - moment, deviation), power


def test_tails_match_the_normal_distribution(sample):
    for threshold in (1.0, 2.0, 3.0, 4.0):
        for tail in (sample, -sample):
            chance = scipy.stats.norm.sf(threshold)
            count = np.count_nonzero(tail > threshold)
            assert _within(count - chance * SAMPLE, math.sqrt(chance * SAMPLE)), threshold


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 7, 8, 16, 32, 64, 100, 256, 1024, 4096])
def test_elements_at_a_lag_are_independent(lag, sample):
    """Correlations of the values, of their squares, and between both."""
    first, second = sample[:-lag], sample[lag:]
    functions = (lambda v: v, lambda v: (v**2 - 1) / math.sqrt(2), lambda v: np.sign(v))
    for f in functions:
        for g in functions:
            assert _within((f(first) * g(second)).mean(), 1 / math.sqrt(len(first)))


def test_channels_and_samples_are_independent():
    z = noise.standard_normals((16, 16, 32, 32), _seed(7)).numpy()
    for rows in (z.reshape(256, -1), np.moveaxis(z, 1, 0).reshape(16, -1)):
        correlation = rows @ rows.T / rows.shape[1]
        off = correlation[~np.eye(len(rows), dtype=bool)]
        assert np.abs(off).max() < 5.5 / math.sqrt(rows.shape[1])


def test_adjacent_seeds_and_streams_are_independent():
    draws = [
        noise.standard_normals((1 << 16,), _seed(seed), stream).numpy()
        for seed, stream in ((5, 0), (6, 0), (5 + 2**32, 0), (-5, 0), (5, 1), (5, 2), (6, 1))
    ]
    correlation = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / 256


def test_fresh_seeds_use_all_sixty_four_bits(devices):
    for device in devices:
        seeds = [int(noise.draw_seed(torch.device(device))) & (2**64 - 1) for _ in range(400)]
        assert len(set(seeds)) == 400
        ones = np.array([[seed >> bit & 1 for bit in range(64)] for seed in seeds]).sum(0)
        assert np.abs(ones - 200).max() < 55  # 5.5 standard deviations of 10


# --- through the layers ---


def _clean_and_noisy(case: Case, x, weight, bias, noise_train, **options):
    clean = case.apply(x, weight, bias, noise_train=0.0)
    return clean, case.apply(x, weight, bias, noise_train=noise_train, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=_name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_noise_in_an_output_is_the_streams(case, dtype, backend, device):
    """(y_noisy - y_clean) / (noise_train s) equals z, in either memory order."""
    noise_train, seed = 3.0, -0x123456789ABCDEF
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    x = draw(case, "exponential", 1, dtype, device)
    for channels_last in (False, True):
        if channels_last:
            if x.dim() not in formats:
                continue
            x = x.contiguous(memory_format=formats[x.dim()])
        clean, noisy = _clean_and_noisy(case, x, None, None, noise_train, seed=seed)
        z = normals(case.shape, seed, channels_last=channels_last)
        scale = run(case, numpy(x), numpy(x), noise_train=1.0, z=z)["stats"][Row.NOISE_SCALE]
        scale = case.ungroup(np.broadcast_to(scale[:, None], (case.groups, case.size)))
        recovered = (numpy(noisy) - numpy(clean)) / (noise_train * scale)
        # both outputs are rounded to storage, s and z by the arithmetic
        compute = UNIT[oracle.compute_dtype(dtype)]
        size = np.abs(numpy(noisy)) + np.abs(numpy(clean))
        bound = (UNIT[dtype] + 8 * compute) * size / (noise_train * scale) + 64 * compute * (
            1 + np.abs(z)
        )
        error = np.abs(recovered - z)
        assert (error <= bound).all(), f"off by {error.max()}, allowed {bound.min()}"
        assert np.corrcoef(recovered.ravel().astype(float), z.ravel().astype(float))[0, 1] > 0.999


def test_the_noise_of_a_long_input_is_the_streams_to_its_end(backend, device):
    """Sizes beyond every block and vector boundary, not divisible by any vector length."""
    for case in (
        Case("layer", (3, 100_003), normalized_ndim=1),
        Case("batch", (7, 5, 3001)),
        Case("batch", (20_011, 5)),
        Case("instance", (3, 5, 10_007)),
        Case("group", (5, 6, 3001), num_groups=2),
    ):
        x = draw(case, "normal", 1, torch.float32, device)
        clean, noisy = _clean_and_noisy(case, x, None, None, 1.0, seed=99)
        z = normals(case.shape, 99)
        difference = case.group(numpy(noisy) - numpy(clean))
        scale = (difference * case.group(z)).sum(1) / (case.group(z) ** 2).sum(1)
        error = difference - scale[:, None] * case.group(z)
        assert np.abs(error).max() < 1e-5, case


def test_the_law_of_a_layers_noise_is_the_normal_one(backend, device):
    case = Case("batch", (64, 8, 16, 16))
    x = draw(case, "normal", 1, torch.float32, device)
    clean, noisy = _clean_and_noisy(case, x, None, None, 1.0, seed=4)
    difference = case.group(numpy(noisy) - numpy(clean))
    z = difference / difference.std(1, keepdims=True)
    for channel in z:
        assert scipy.stats.kstest(channel, "norm").pvalue > 1e-4
    correlation = np.corrcoef(z) - np.eye(8)
    assert np.abs(correlation).max() < 5 / math.sqrt(case.size)
    adjacent = (z[:, 1:] * z[:, :-1]).mean(1)
    assert np.abs(adjacent).max() < 5 / math.sqrt(case.size)


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


def test_the_high_half_of_a_seed_counts_too(backend, device):
    case = Case("layer", (4, 50), normalized_ndim=1)
    x = draw(case, "normal", 1, torch.float32, device)
    outputs = [case.apply(x, noise_train=0.5, seed=5 + (k << 32)) for k in (0, 1, 2**31 - 1)]
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    for seed in SEEDS:
        check(case, x, seed=seed, noise_train=0.5)


LAYERS = [
    (lambda: normnorm.BatchNormalNorm1d(6), (16, 6)),
    (lambda: normnorm.BatchNormalNorm2d(6), (4, 6, 3, 5)),
    (lambda: normnorm.BatchNormalNorm3d(6), (2, 6, 2, 3, 4)),
    (lambda: normnorm.LayerNormalNorm(12), (5, 12)),
    (lambda: normnorm.GroupNormalNorm(3, 6), (4, 6, 5)),
    (lambda: normnorm.InstanceNormalNorm1d(6), (4, 6, 9)),
    (lambda: normnorm.InstanceNormalNorm2d(6), (4, 6, 3, 5)),
    (lambda: normnorm.InstanceNormalNorm3d(6), (2, 6, 2, 3, 4)),
]


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_manual_seed_makes_a_layer_reproducible(build, shape, backend, device):
    layer, x = build().to(device), torch.randn(shape, device=device)
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append((layer(x), layer(x)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert torch.equal(outputs[0][1], outputs[1][1])
    assert not torch.equal(outputs[0][0], outputs[0][1])


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_no_noise_draws_nothing_and_evaluation_neither(build, shape, backend, device):
    layer, x = build().to(device), torch.randn(shape, device=device, requires_grad=True)

    def state():
        state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
        return state.clone()

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
    assert torch.equal(before, state())
    assert torch.equal(evaluated, layer(x))


def test_a_seed_given_by_the_caller_draws_nothing(backend, device):
    x = torch.randn(4, 20, device=device)
    before = torch.get_rng_state()
    F.layer_normal_norm(x, (20,), training=True, seed=5)
    F.layer_normal_norm(x, (20,), training=True, seed=_seed(5, device))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_noise_train_may_change_between_steps(build, shape, backend, device):
    """Annealing: the noise is proportional to noise_train, independent of its earlier values."""
    layer, x = build().to(device), torch.randn(shape, device=device, dtype=torch.float32)
    outputs = {}
    for noise_train in (0.0, 1.0, 0.25, 0.0, 1.0):
        layer.noise_train = noise_train
        torch.manual_seed(8)
        y = layer(x)
        if noise_train in outputs:
            assert torch.equal(outputs[noise_train], y)
        outputs[noise_train] = y.detach()
    full, quarter = (outputs[k] - outputs[0.0] for k in (1.0, 0.25))
    torch.testing.assert_close(quarter, 0.25 * full, rtol=1e-4, atol=1e-5)
    assert full.abs().max() > 0.1


# --- forward and backward agree ---


def _gradients(y, x, weight, bias, g):
    return torch.autograd.grad(y, (x, weight, bias), g)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_the_weight_contains_the_noise(case, backend, device):
    x = draw(case, "exponential", 1, torch.float64, device).requires_grad_()
    weight, bias = (p.requires_grad_() for p in draw_parameters(case, 1, torch.float64, device))
    g = torch.randn(case.shape, dtype=torch.float64).to(device)
    found = []
    for noise_train in (0.0, 2.0):
        y = case.apply(x, weight, bias, noise_train=noise_train, seed=6)
        found.append((y.detach(), *_gradients(y, x, weight, bias, g)))
    (clean, du, dweight, dbias), (noisy, noisy_du, noisy_dweight, noisy_dbias) = found
    # dout/dweight is the normalized value with its noise, computed from the output
    spread = torch.from_numpy(case.spread(numpy(weight)).copy()).to(device)
    term = numpy(g * (noisy - clean) / spread)
    want = case.collect(term)
    np.testing.assert_allclose(
        numpy(noisy_dweight - dweight), want, rtol=0, atol=1e-13 * np.abs(term).sum()
    )
    assert np.abs(want).max() > 0.1
    # noise has no gradient to bias and input; kernels that split work at the noise's counters may
    # sum in another order
    torch.testing.assert_close(noisy_dbias, dbias, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(noisy_du, du, rtol=1e-12, atol=1e-13)


def _repack(how):
    """Hooks that return a saved tensor with other strides, as offloading may."""

    def unpack(tensor):
        if tensor.dim() >= 4 and how == "channels_last":
            formats = {4: torch.channels_last, 5: torch.channels_last_3d}
            return tensor.contiguous(memory_format=formats[tensor.dim()])
        if tensor.dim() >= 2 and how == "reversed":
            order = tuple(range(tensor.dim()))[::-1]
            return tensor.permute(order).contiguous().permute(order)
        return tensor.contiguous()

    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, unpack)


def _in_format(x, memory_format):
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats[x.dim()]) if memory_format == "channels_last" else x


SPATIAL = [
    pytest.param(case, memory_format, id=f"{case}-{memory_format}")
    for case in CASES
    for memory_format in ("contiguous", "channels_last")
    if len(case.shape) >= (4 if memory_format == "channels_last" else 3)
]


@pytest.mark.parametrize(("case", "memory_format"), SPATIAL)
def test_a_saved_input_with_other_strides_has_the_same_noise(case, memory_format, backend, device):
    x = _in_format(draw(case, "exponential", 1, torch.float32, device), memory_format)
    weight, bias = draw_parameters(case, 1, torch.float32, device)
    last = memory_format == "channels_last"
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


def test_the_backward_pass_runs_while_saved_tensor_hooks_are_active(backend, device):
    """Offloading contexts often stay open for the whole step."""
    for case in CASES[::4]:
        x = draw(case, "exponential", 1, torch.float32, device)
        weight, bias = draw_parameters(case, 1, torch.float32, device)
        leaves = [tensor.requires_grad_() for tensor in (x, weight, bias)]
        g = torch.randn(case.shape, device=device)
        want = _gradients(case.apply(*leaves, noise_train=1.0, seed=6), *leaves, g)
        with torch.autograd.graph.save_on_cpu():
            got = _gradients(case.apply(*leaves, noise_train=1.0, seed=6), *leaves, g)
        for one, other in zip(got, want, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_slice_has_the_noise_of_its_dense_copy(case, backend, device):
    wide = draw(case, "normal", 1, torch.float32, device).repeat_interleave(2, -1)
    wide = torch.cat([wide, wide + 1], 1)
    view = wide[:, : case.shape[1], ..., ::2] if len(case.shape) > 2 else wide[:, ::4]
    assert view.shape == case.shape
    assert not view.is_contiguous()
    weight, bias = draw_parameters(case, 1, torch.float32, device)
    clean, noisy = _clean_and_noisy(case, view, weight, bias, 1.0, seed=5)
    dense_clean, dense_noisy = _clean_and_noisy(case, view.contiguous(), weight, bias, 1.0, seed=5)
    torch.testing.assert_close(noisy - clean, dense_noisy - dense_clean, rtol=1e-4, atol=2e-5)
    check(case, view, weight, bias, seed=5, noise_train=1.0)


# --- the raw op: stream, given scale ---


def _forward(case, x, backend, *, weight=None, seed=5, noise_scale=None, **options):
    return torch.ops.normnorm.normal_norm_forward(
        x, None, None, None, weight, None, None, _seed(seed, str(x.device)), noise_scale,
        False, True, *case.config(backend, **options),
    )[:2]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_stream_changes_the_noise_to_that_of_the_stream(case, backend, device):
    x = draw(case, "normal", 1, torch.float64, device)
    clean = numpy(_forward(case, x, backend)[0])
    for stream in (0, 1, 5, 2**31 - 1):
        y, stats = _forward(case, x, backend, noise_train=1.0, stream=stream)
        scale = numpy(stats[Row.NOISE_SCALE])[:, None]
        z = case.group(numpy(y) - clean) / scale
        want = case.group(normals(case.shape, 5, stream))
        np.testing.assert_allclose(z.astype(float), want.astype(float), rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=_name)
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
@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_activation_checkpointing_recomputes_the_same_noise(
    build, shape, use_reentrant, backend, device
):
    layer = build().to(device)
    network = torch.nn.Sequential(layer, torch.nn.Tanh(), layer)
    x = torch.randn(shape, device=device, requires_grad=True)
    wanted = [x, *layer.parameters()]
    found = []
    for checkpointed in (False, True):
        torch.manual_seed(5)
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(network, x, use_reentrant=use_reentrant)
        else:
            y = network(x)
        if use_reentrant:
            for tensor in wanted:
                tensor.grad = None
            y.square().sum().backward()
            found.append([y.detach(), *(tensor.grad.clone() for tensor in wanted)])
        else:
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), wanted)])
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize(
    "build",
    [normnorm.LayerNormalNorm, normnorm.AddLayerNormalNorm],
    ids=["layer", "sum"],
)
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


@pytest.mark.parametrize(
    "case",
    [
        Case("batch", (9, 2)),
        Case("layer", (2, 9), normalized_ndim=1),
        Case("group", (2, 4, 5), num_groups=2),
        Case("instance", (2, 2, 9)),
    ],
    ids=str,
)
def test_gradcheck_fails_with_noise_because_its_scale_is_held_fixed(case, backend, device):
    """The derivative omits ds/du by definition: finite differences must disagree."""
    x = draw(case, "exponential", 1, torch.float64, device).requires_grad_()

    def function(x):
        return case.apply(x, noise_train=1.0, seed=3)

    assert not torch.autograd.gradcheck(function, (x,), raise_exception=False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradcheck_passes_with_noise_and_its_scale_given_as_constants(case):
    x = draw(case, "exponential", 1, torch.float64).requires_grad_()
    weight, bias = (p.requires_grad_() for p in draw_parameters(case, 1, torch.float64))
    z = torch.from_numpy(normals(case.shape, 3).astype(np.float64))
    scale = torch.linspace(0.5, 2.0, case.groups, dtype=torch.float64)

    def function(x, weight, bias):
        return normnorm.reference.normal_norm(
            x, weight, bias, kind=case.kind, num_groups=case.num_groups,
            normalized_ndim=case.normalized_ndim, noise_train=0.7, z=z, noise_scale=scale,
        )[0]  # fmt: skip

    assert torch.autograd.gradcheck(function, (x, weight, bias), fast_mode=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_differentiated_by_autograd_holds_its_noise_scale_fixed(case):
    x = draw(case, "exponential", 1, torch.float64).requires_grad_()
    g = torch.randn(case.shape, dtype=torch.float64)
    found = []
    for noise_train in (0.0, 2.0):
        y = normnorm.reference.normal_norm(
            x, kind=case.kind, num_groups=case.num_groups, normalized_ndim=case.normalized_ndim,
            noise_train=noise_train, seed=_seed(3),
        )[0]  # fmt: skip
        found.append(torch.autograd.grad(y, x, g)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)


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
