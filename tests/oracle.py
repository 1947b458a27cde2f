"""Normality normalization once more, in NumPy extended precision, apart from the product.

It shares no code with ``normnorm``: forward and closed-form backward pass over a (groups, n)
array, a Philox generator, and bounds on what floating arithmetic may do to the results.

How the bounds come about. :func:`run` takes a ``unit``: with the unit roundoff u of a dtype it
disturbs every intermediate value by a random amount of the size that one rounding in that dtype
could have (a sum of n terms by u :func:`depth` (n) times the sum of magnitudes). The largest
change that a few such runs make in a group is the size of error that any order of operations in
that precision has to expect there, with all cancellation and amplification of that group's own
data. :func:`bounds` allows ``FACTOR`` times as much, for the roundings that add up along a
formula, and one rounding to the storage dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import normnorm.functional as F
from normnorm.config import Config

REAL = np.longdouble
FACTOR = 8.0
SAMPLES = 3

UNIT = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
DTYPES = tuple(UNIT)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Where the arithmetic happens for a storage dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Case:
    """A layer kind with an input shape: which elements belong to one group."""

    kind: str
    shape: tuple[int, ...]
    num_groups: int = 0
    normalized_ndim: int = 0

    def __str__(self) -> str:
        extra = f"-g{self.num_groups}" if self.num_groups else ""
        return f"{self.kind}-{'x'.join(map(str, self.shape))}{extra}"

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.kind == "layer":
            return self.shape[len(self.shape) - self.normalized_ndim :]
        return (self.shape[1],)

    @property
    def groups(self) -> int:
        if self.kind == "batch":
            return self.shape[1]
        if self.kind == "layer":
            return math.prod(self.shape[: len(self.shape) - self.normalized_ndim])
        return self.shape[0] * (self.num_groups if self.kind == "group" else self.shape[1])

    @property
    def size(self) -> int:
        """Elements in one group."""
        return math.prod(self.shape) // self.groups

    def group(self, array: np.ndarray) -> np.ndarray:
        """An array of the input's shape as (groups, n)."""
        if self.kind == "batch":
            array = np.moveaxis(array, 1, 0)
        return array.reshape(self.groups, self.size)

    def ungroup(self, grouped: np.ndarray) -> np.ndarray:
        if self.kind != "batch":
            return grouped.reshape(self.shape)
        moved = (self.shape[1], self.shape[0], *self.shape[2:])
        return np.moveaxis(grouped.reshape(moved), 0, 1)

    def spread(self, parameter: np.ndarray) -> np.ndarray:
        """A weight or bias, broadcast to the input's shape."""
        if self.kind != "layer":
            parameter = parameter.reshape(1, -1, *(1,) * (len(self.shape) - 2))
        return np.broadcast_to(parameter, self.shape)

    def collect(self, array: np.ndarray) -> np.ndarray:
        """The sum of an array of the input's shape over the elements that share a parameter."""
        ndim = len(self.shape)
        if self.kind == "layer":
            return array.sum(tuple(range(ndim - self.normalized_ndim)))
        return array.sum((0, *range(2, ndim)))

    def apply(self, x: torch.Tensor, weight=None, bias=None, **options: Any) -> torch.Tensor:
        """The product's function for this kind, by ``running`` (mean, var, lmbda) if they are
        given and by the input's own statistics if not, training unless told."""
        training = options.pop("training", True)
        if self.kind == "layer":
            return F.layer_normal_norm(
                x, self.parameter_shape, weight, bias, training=training, **options
            )
        if self.kind == "group":
            return F.group_normal_norm(
                x, self.num_groups, weight, bias, training=training, **options
            )
        running = options.pop("running", None)
        tensors = (x, *(running or (None, None, None)), weight, bias)
        if self.kind == "batch":
            return F.batch_normal_norm(*tensors, training and running is None, **options)
        return F.instance_normal_norm(*tensors, training=training, **options)

    def config(self, backend: str, **options: Any) -> Config:
        """The configuration arguments of the raw ops."""
        geometry = (self.kind, self.num_groups, self.normalized_ndim)
        return Config(*geometry, 1e-5, 0.0, 1.0, 2, 0.0, 0, False, "", backend)._replace(**options)


# One small case for each kind and rank.
CASES = (
    Case("batch", (12, 5)), Case("batch", (4, 3, 7)), Case("batch", (3, 4, 5, 6)),
    Case("batch", (2, 3, 2, 3, 4)), Case("layer", (9, 40), normalized_ndim=1),
    Case("layer", (5, 4, 9), normalized_ndim=2), Case("layer", (2, 3, 4, 5), normalized_ndim=3),
    Case("group", (5, 12), num_groups=3), Case("group", (3, 6, 7), num_groups=2),
    Case("group", (2, 8, 5, 5), num_groups=4), Case("group", (2, 4, 2, 3, 4), num_groups=1),
    Case("instance", (3, 4, 11)), Case("instance", (2, 3, 5, 6)), Case("instance", (2, 3, 2, 3, 4)),
)  # fmt: skip


def depth(n: int, alike: int = 0) -> float:
    """Roundings that meet in a sum of n terms: the levels of a tree whose leaves are runs of up
    to 512 terms added in sequence. There errors grow like the root of the run's length; those of
    ``alike`` equal terms all have one sign, and grow like the length."""
    n = max(n, 1)
    return 4.0 + math.log2(n) + math.sqrt(min(n, 256)) + min(alike, 512) / 4


def _most_alike(groups: np.ndarray) -> int:
    """How often the commonest value occurs in one group."""
    if groups.size == 0:
        return 0
    ordered = np.sort(groups, axis=-1)
    ends = np.ones(ordered.shape, bool)  # the last of each run of equal values
    ends[:, :-1] = ordered[:, 1:] != ordered[:, :-1]
    return int(np.diff(np.flatnonzero(ends), prepend=-1).max())


class _Exact:
    """Arithmetic without disturbance."""

    def value(self, array, magnitude=None):
        return array

    def mean(self, terms, magnitude=None):
        return terms.mean(-1, keepdims=True)


class _Rounded(_Exact):
    """Every value off by a random part of one rounding."""

    def __init__(self, unit: float, seed: int, alike: int = 0) -> None:
        self.unit, self.random, self.alike = unit, np.random.default_rng(seed), alike

    def value(self, array, magnitude=None):
        size = np.abs(array) if magnitude is None else magnitude
        return array + self.unit * size * self.random.uniform(-1, 1, array.shape)

    def mean(self, terms, magnitude=None):
        size = (np.abs(terms) if magnitude is None else magnitude).mean(-1, keepdims=True)
        meeting = depth(terms.shape[-1], self.alike)
        return self.value(terms.mean(-1, keepdims=True), meeting * size)


def _transform(h, t, sign, log, lmbda, transform_eps, r):
    """(x, dpsi/dh, dpsi/dlmbda)"""
    eta = 1 + sign * (lmbda - 1)
    eta = r.value(eta, 1 + np.abs(lmbda))
    limit = np.zeros(h.shape, bool)
    if transform_eps > 0:
        limit = np.abs(eta) <= transform_eps
        eta = eta + np.where(eta < 0, -1, 1) * REAL(transform_eps)
        eta = np.where(limit, 0, eta)
    a = r.value(eta * log)
    # (exp(a) - 1) / a and its derivative, the latter by series where it cancels
    first = np.where(a == 0, 1, np.expm1(a) / np.where(a == 0, 1, a))
    near = np.abs(a) < 1e-3
    power = np.exp(a)
    second = np.where(
        near,
        REAL(1) / 2 + a / 3 + a**2 / 8 + a**3 / 30 + a**4 / 144,
        (power - first) / np.where(near, 1, a),
    )
    x = r.value(log * first)
    psi_h = r.value(power / (1 + t))
    psi_lmbda = np.where(limit, 0, r.value(log**2 * second))
    return sign * x, psi_h, psi_lmbda


def _results(case, out, du, g, y) -> dict[str, np.ndarray]:
    """From arrays (groups, n): the output, the input's gradient, the output's, and the output
    before the affine map."""
    weighted = g * y
    return {
        "y": case.ungroup(out),
        "du": case.ungroup(du),
        "dweight": case.collect(case.ungroup(weighted)),
        "dbias": case.collect(case.ungroup(g)),
        "size_dweight": case.collect(case.ungroup(np.abs(weighted))),
        "size_dbias": case.collect(case.ungroup(np.abs(g))),
    }


def run(
    case: Case,
    u: np.ndarray,
    g: np.ndarray,
    weight: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    *,
    eps: float = 1e-5,
    noise_train: float = 0.0,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    z: np.ndarray | None = None,
    noise_scale: np.ndarray | None = None,
    unit: float = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Forward and backward pass with a group's own statistics; ``g`` is the output's gradient.

    Returns y and du in the input's shape, dweight and dbias in the parameters', stats (8, groups),
    and the sums of magnitudes behind the parameter gradients under ``size_dweight, size_dbias``.
    """
    u, g = (np.asarray(a, REAL) for a in (u, g))
    weight = np.ones(case.parameter_shape) if weight is None else weight
    bias = np.zeros(case.parameter_shape) if bias is None else bias
    w, b = (case.group(case.spread(np.asarray(p, REAL))) for p in (weight, bias))
    u, g = case.group(u), case.group(g)
    r = _Rounded(unit, seed, _most_alike(u)) if unit else _Exact()
    eps, alpha = REAL(eps), REAL(alpha)

    mu = u.mean(-1, keepdims=True)
    c = u - mu
    low = c.mean(-1, keepdims=True)
    mu, c = mu + low, c - low
    c = r.value(c - (r.mean(c) - c.mean(-1, keepdims=True)))
    rstd = r.value(1 / np.sqrt(r.mean(c * c) + eps))
    h = r.value(c * rstd)

    sign = np.where(h < 0, REAL(-1), REAL(1))
    t = np.abs(h)
    log = r.value(np.log1p(t))
    q = r.value((1 + t) * log)
    d = r.value(q - t, q)
    mean_a = r.mean(h * d)
    mean_b = r.mean(sign * log)
    mean_d = r.mean(d)
    e = q * q + q * t * (log - 4) + 3 * t * t
    mean_e = r.mean(e, q * q + q * t * (log + 4) + 3 * t * t)
    slope = r.value(mean_a - mean_b, np.abs(mean_a) + np.abs(mean_b))
    parts = mean_e + mean_d**2 + 2 * mean_a**2
    curvature = np.maximum(r.value(mean_e - mean_d**2 - 2 * mean_a**2, parts), 0) + np.sqrt(eps)
    curvature = r.value(curvature)
    if order == 1:
        kappa, c_r = -slope, alpha + 0 * slope
        c_e, c_o = -c_r, 0 * slope
    else:
        kappa, c_r = r.value(-slope / curvature), alpha / curvature
        c_e, c_o = r.value(-c_r * (1 - 4 * mean_a * kappa)), r.value(-c_r * kappa)
    lmbda = r.value(1 + alpha * kappa, 1 + np.abs(alpha * kappa))
    x, psi_h, psi_lmbda = _transform(h, t, sign, log, lmbda, transform_eps, r)

    scale = np.zeros_like(mu)
    y = x
    if noise_train > 0:
        if noise_scale is None:
            centred = x - r.mean(x)
            scale = r.mean(np.abs(centred), np.abs(x))
        else:
            scale = np.asarray(noise_scale, REAL).reshape(-1, 1)
        noise = case.group(np.asarray(z, REAL))
        noise = r.value(noise, 4 + 2 * np.abs(noise))
        y = r.value(x + REAL(noise_train) * scale * noise)
    out = r.value(w * y + b, np.abs(w * y) + np.abs(b))

    weighted = r.value(w * g)
    size = np.abs(weighted)
    s_a = r.mean(weighted * psi_h, size * psi_h)
    s_b = r.mean(weighted * psi_h * h, size * psi_h * t)
    lam = r.mean(weighted * psi_lmbda, size * np.abs(psi_lmbda))
    bracket = ((3 + 4 * t) * log - (2 + 4 * t + 2 * mean_d)) * log + 2 * t
    bracket_size = ((3 + 4 * t) * log + (2 + 4 * t + 2 * mean_d)) * log + 2 * t
    slopes = c_e * ((1 + 2 * t) * log - t) + c_r / (1 + t) + c_o * sign * bracket
    slopes_size = (
        np.abs(c_e) * ((1 + 2 * t) * log + t) + np.abs(c_r) / (1 + t) + np.abs(c_o) * bracket_size
    )
    slopes = r.value(slopes, slopes_size)
    w0 = r.mean(slopes, slopes_size)
    w1 = r.mean(h * slopes, t * slopes_size)
    direct = r.value(weighted * psi_h)
    du = rstd * (
        direct
        + r.value(lam * slopes)
        - r.value(s_a + lam * w0, np.abs(s_a) + np.abs(lam * w0))
        - r.value(h * (s_b + lam * w1), t * (np.abs(s_b) + np.abs(lam * w1)))
    )
    du = r.value(du)

    stats = np.concatenate([mu, 0 * mu, rstd, lmbda, scale, mean_a, mean_d, curvature], axis=1).T
    return {**_results(case, out, du, g, y), "stats": stats}


def run_frozen(
    case: Case,
    u: np.ndarray,
    g: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    *,
    running: tuple[np.ndarray, np.ndarray, np.ndarray],
    eps: float = 1e-5,
    transform_eps: float = 0.0,
    unit: float = 0.0,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """A batch layer in evaluation, by ``running`` = (mean, var, lmbda) of shape (C,)."""
    r = _Rounded(unit, seed) if unit else _Exact()
    u, g = (case.group(np.asarray(a, REAL)) for a in (u, g))
    w, b = (case.group(case.spread(np.asarray(p, REAL))) for p in (weight, bias))
    mean, var, lmbda = (np.asarray(s, REAL).reshape(-1, 1) for s in running)
    rstd = r.value(1 / np.sqrt(r.value(var + REAL(eps))))
    # the mean is a given number, which a kernel may round to its own dtype
    h = r.value(r.value(u - mean, np.abs(u) + np.abs(mean)) * rstd)
    sign, t = np.where(h < 0, REAL(-1), REAL(1)), np.abs(h)
    x, psi_h, _ = _transform(h, t, sign, r.value(np.log1p(t)), lmbda, transform_eps, r)
    out = r.value(w * x + b, np.abs(w * x) + np.abs(b))
    du = r.value(w * g * psi_h * rstd)
    return _results(case, out, du, g, x)


def bounds(
    case: Case, exact: dict[str, np.ndarray], *args: Any, dtype: torch.dtype, parameter_dtype=None,
    function=run, **options: Any,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What a result computed for storage in ``dtype`` may differ from ``exact`` by.

    ``args`` and ``options`` are those of ``function``, which gave ``exact``. The bounds of y and
    du come from the largest change in the element's group, those of dweight and dbias from the
    element's own.
    """
    unit = UNIT[compute_dtype(dtype)]
    store = UNIT[dtype] if dtype != compute_dtype(dtype) else unit
    parameter_store = UNIT[parameter_dtype or dtype]
    runs = [function(case, *args, **options, unit=unit, seed=seed) for seed in range(SAMPLES)]
    found = {}
    for name in ("y", "du"):
        change = np.max([np.abs(other[name] - exact[name]) for other in runs], axis=0)
        worst = case.group(change).max(-1, keepdims=True)
        largest = case.group(np.abs(exact[name])).max(-1, keepdims=True)
        allowed = np.broadcast_to(FACTOR * (worst + unit * largest), (case.groups, case.size))
        found[name] = case.ungroup(allowed) + 1.01 * store * np.abs(exact[name])
        if dtype == torch.float16:  # its smallest step
            found[name] = found[name] + 2.0**-24
    count = exact["y"].size // exact["dbias"].size
    for name in ("dweight", "dbias"):
        change = np.max([np.abs(other[name] - exact[name]) for other in runs], axis=0)
        summed = unit * depth(count) * exact[f"size_{name}"]
        found[name] = FACTOR * (change + summed) + 1.01 * parameter_store * np.abs(exact[name])
        if (parameter_dtype or dtype) == torch.float16:
            found[name] = found[name] + 2.0**-24
    if "stats" in exact:
        stats = np.max([np.abs(other["stats"] - exact["stats"]) for other in runs], axis=0)
        found["stats"] = FACTOR * (stats + 4 * unit * np.abs(exact["stats"]) + 4 * unit)
    return found


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Exactly the tensor's values."""
    return tensor.detach().double().cpu().numpy()


def assert_within(got: torch.Tensor, want: np.ndarray, bound: np.ndarray, what: str) -> None:
    """Every element within its bound; the sentence names the worst one."""
    error = np.abs(to_numpy(got).astype(REAL) - want)
    good = error <= bound
    if got.dtype == torch.float16:  # past its range an infinity is right
        beyond = np.abs(want) + bound >= 65520
        good |= beyond & np.isinf(to_numpy(got)) & (np.sign(to_numpy(got)) == np.sign(want))
    if good.all():
        return
    ratio = np.where(good, 0, np.where(np.isfinite(error), error / bound, np.inf))
    at = np.unravel_index(np.argmax(ratio), ratio.shape) if ratio.ndim else ()
    raise AssertionError(
        f"{what}: {np.count_nonzero(~good)} of {good.size} elements out of bounds; at {at} "
        f"got {to_numpy(got)[at]:.9g}, wanted {float(want[at]):.9g}, "
        f"error {float(error[at]):.3g} > bound {float(np.broadcast_to(bound, good.shape)[at]):.3g}"
    )


def check(
    case: Case,
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    g: torch.Tensor | None = None,
    *,
    seed: int = 0,
    channels_last: bool = False,
    running: Sequence[torch.Tensor] | None = None,
    what: str = "",
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The product on these tensors, output and every gradient within bounds of :func:`run`, or of
    :func:`run_frozen` by ``running`` statistics.

    ``options`` are the function's; ``channels_last`` says in whose order the noise is expected.
    Returns (output, gradient of x).
    """
    frozen = {} if running is None else {"running": running}
    if running is None:
        options.setdefault("noise_train", 0.0)
    parameters = {"dweight": weight, "dbias": bias}
    given = {name: p.detach().requires_grad_() for name, p in parameters.items() if p is not None}
    leaf = x.detach().requires_grad_()
    if g is None:
        random = np.random.default_rng(abs(seed) + 17)
        g = torch.from_numpy(random.normal(size=case.shape)).to(x.device, x.dtype)
    y = case.apply(leaf, given.get("dweight"), given.get("dbias"), seed=seed, **frozen, **options)
    assert y.dtype == x.dtype
    assert y.shape == x.shape
    gradients = torch.autograd.grad(y, (leaf, *given.values()), g)
    function = run
    if running is not None:
        function, options["running"] = run_frozen, [to_numpy(s) for s in running]
    elif options["noise_train"]:
        options["z"] = normals(case.shape, seed, channels_last=channels_last)
    arguments = tuple(None if a is None else to_numpy(a) for a in (x, g, weight, bias))
    exact = function(case, *arguments, **options)
    parameter_dtype = next(iter(given.values())).dtype if given else None
    allowed = bounds(
        case, exact, *arguments, dtype=x.dtype, parameter_dtype=parameter_dtype,
        function=function, **options,
    )  # fmt: skip
    for name, got in zip(("y", "du", *given), (y, *gradients), strict=True):
        assert_within(got, exact[name], allowed[name], f"{what} {name} ({case}, {x.dtype})")
    return y.detach(), gradients[0]


# --- data laws ---


LAWS = {
    "normal": lambda random, groups, n: random.normal(size=(groups, n)),
    "exponential": lambda random, groups, n: random.exponential(size=(groups, n)),
    "negative_exponential": lambda random, groups, n: -random.exponential(size=(groups, n)),
    "student_t": lambda random, groups, n: random.standard_t(2, size=(groups, n)),
    "lognormal": lambda random, groups, n: np.exp(1.5 * random.normal(size=(groups, n))),
    "relu": lambda random, groups, n: np.maximum(random.normal(size=(groups, n)), 0.0),
    "bimodal": lambda random, groups, n: (
        random.choice([-2.0, 2.0], (groups, n)) + 0.3 * random.normal(size=(groups, n))
    ),
    "one_hot": lambda random, groups, n: np.eye(n)[random.integers(0, n, groups)],
    "outlier": lambda random, groups, n: np.where(
        np.arange(n) == 0, 1000.0, random.normal(size=(groups, n))
    ),
    "tiny_variance": lambda random, groups, n: 1e-4 * random.normal(size=(groups, n)),
    "offset": lambda random, groups, n: 100.0 + random.normal(size=(groups, n)),
    "constant": lambda random, groups, n: np.full((groups, n), 3.3),
}


def draw(case: Case, law: str, seed: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """An input of a case whose every group follows a law."""
    random = np.random.default_rng(seed)
    values = case.ungroup(LAWS[law](random, case.groups, case.size))
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, dtype)


def draw_parameters(
    case: Case, seed: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight (no two signs or sizes alike) and a bias."""
    random = np.random.default_rng(seed + 1000)
    weight = torch.from_numpy(random.uniform(0.5, 2.0, case.parameter_shape))
    bias = torch.from_numpy(random.normal(size=case.parameter_shape))
    return weight.to(device, dtype), bias.to(device, dtype)


# --- noise ---

# Random123's kat_vectors for philox4x32-7: counter, key, words.
KNOWN_ANSWERS = (
    ([0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
    ),
)


def philox(counter: np.ndarray, key: tuple[int, int], rounds: int = 7) -> np.ndarray:
    """Philox4x32 of Salmon, Moraes, Dror and Shaw (2011): (..., 4) uint32 words to the same."""
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    k0, k1 = (np.uint64(k) for k in key)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    for _ in range(rounds):
        first = np.uint64(0xD2511F53) * c[0]  # below 2^64: no wrap
        second = np.uint64(0xCD9E8D57) * c[2]
        c = [(second >> shift) ^ c[1] ^ k0, second & low, (first >> shift) ^ c[3] ^ k1, first & low]
        k0 = (k0 + np.uint64(0x9E3779B9)) & low
        k1 = (k1 + np.uint64(0xBB67AE85)) & low
    return np.stack(c, -1).astype(np.uint32)


def noise_words(counters: int, seed: int, stream: int = 0, first: int = 0) -> np.ndarray:
    """The words of ``counters`` counters from ``first`` on, (counters, 4)."""
    counts = np.arange(first, first + counters, dtype=np.uint64)
    counter = np.zeros((counters, 4), np.uint32)
    counter[:, 0] = (counts & np.uint64(0xFFFFFFFF)).astype(np.uint32)
    counter[:, 1] = (counts >> np.uint64(32)).astype(np.uint32)
    counter[:, 2] = stream
    bits = seed & (2**64 - 1)
    return philox(counter, (bits & 0xFFFFFFFF, bits >> 32))


def turns(words: np.ndarray) -> np.ndarray:
    """The angles of pairs of normals, times 2^32: word j of a counter, times 2^32 over the golden
    ratio, plus word j + 1."""
    return words * np.uint32(0x9E3779B9) + np.roll(words, -1, axis=-1)


def normals_of(words: np.ndarray) -> np.ndarray:
    """The eight normals of each counter, (counters, 8), from its four words."""
    radius = np.sqrt(-2 * np.log((words.astype(REAL) + REAL(0.5)) / REAL(2) ** 32))
    angle = 2 * REAL(np.pi) * (turns(words).astype(REAL) / REAL(2) ** 32)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1).reshape(-1, 8)


def normals(
    shape: tuple[int, ...], seed: int, stream: int = 0, channels_last: bool = False
) -> np.ndarray:
    """The noise of a tensor: element i takes normal i % 8 of counter i // 8, in the canonical
    order."""
    order = (shape[0], *shape[2:], shape[1]) if channels_last else tuple(shape)
    count = math.prod(order)
    words = noise_words((count + 7) // 8, seed, stream)
    z = normals_of(words).reshape(-1)[:count].reshape(order)
    return np.moveaxis(z, -1, 1) if channels_last else z
