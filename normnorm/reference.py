"""The definition of normality normalization, in plain differentiable PyTorch.

This file is what everything else is compared with. It runs in any floating dtype on any device
that has float64, under every PyTorch transform (autograd to any order, torch.func,
torch.compile, export), and serves as the path of double backward, of export and of last resort.
Formulae and their derivation: ``docs/internals/mathematics.md``; source: Eftekhari and Papyan,
"On the Importance of Gaussianizing Representations", ICML 2025 (arXiv 2505.00685), and Yeo and
Johnson (2000).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import relu

from .noise import standard_normals
from .statistics import statistics_dtype

# The exponent of the power transform saturates here, so that a frozen lambda and an input far
# outside what it was estimated on give finite outputs. A group's own statistics never come near.
_LARGEST_EXPONENT = {torch.float32: 80.0, torch.float64: 700.0}

# 1/(k+1)! : below |a| = 1/2 the series of (exp(a) - 1)/a and of its first three derivatives
# is exact to float64 rounding, where the quotient would cancel.
_SERIES = tuple(1.0 / math.factorial(k + 1) for k in range(19))
_SERIES_RADIUS = 0.5


def _split_sign(h: Tensor) -> tuple[Tensor, Tensor]:
    """(sign, abs(h)) with sign +1 at zero, so that the derivative at zero is the true one."""
    sign = torch.where(h < 0, -1.0, 1.0).to(h.dtype)
    return sign, h * sign


def rstd_of(variance: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """``(variance + eps) ** -0.5``, NaN where ``dtype`` holds the variance as infinite.

    The root's reciprocal is 0 there: values beyond the range would come out as zeros.
    """
    too_large = variance > torch.finfo(dtype).max
    return torch.where(too_large, math.nan, torch.rsqrt(variance + eps))


def standardize(
    u: Tensor, dim: tuple[int, ...], eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h = (u - mean) / sqrt(var + eps) over ``dim``, with the biased variance.

    The mean is taken twice: u is first re-centred by the rounded mean, then by the mean of
    what is left, so that an offset of 1e4 standard deviations costs no digits in float32 and
    a constant group gives zeros exactly.

    Returns:
        (h, mean, mean_low, rstd), the last three with ``dim`` kept as size 1.
    """
    mean = u.mean(dim, keepdim=True).detach()
    centred = u - mean
    mean_low = centred.mean(dim, keepdim=True)
    centred = centred - mean_low
    rstd = rstd_of(centred.square().mean(dim, keepdim=True), eps, u.dtype)
    return centred * rstd, mean, mean_low, rstd


def newton_terms(h: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four quantities of every element whose means over a group are A, B, D and E."""
    sign, t = _split_sign(h)
    log = torch.log1p(t)
    q = (1.0 + t) * log
    d = q - t
    return h * d, sign * log, d, d.square() + t * (q * log - 2.0 * d)


def newton_step(
    means: Sequence[Tensor], eps: float, alpha: float, order: int
) -> tuple[Tensor, Tensor]:
    """(lmbda, Q) from the means A, B, D and E: see :func:`estimate_lmbda`."""
    mean_hd, mean_log, mean_d, mean_e = means
    slope = mean_hd - mean_log
    # log Var(psi) is convex in lambda: the clamp only absorbs rounding.
    curvature = (mean_e - mean_d.square() - 2.0 * mean_hd.square()).clamp_min(0.0) + math.sqrt(eps)
    step = slope / curvature if order == 2 else slope
    return 1.0 - alpha * step, curvature


def estimate_lmbda(
    h: Tensor, dim: tuple[int, ...], eps: float = 1e-5, alpha: float = 1.0, order: int = 2
) -> Tensor:
    """One Newton step from lambda 1 on the Yeo-Johnson negative log-likelihood of h.

    ``1 - alpha L'(1) / (L''(1) + sqrt(eps))``, or ``1 - alpha L'(1)`` for order 1, with h taken
    as standardized. The reduced dimensions are kept as size 1.
    """
    means = [term.mean(dim, keepdim=True) for term in newton_terms(h)]
    return newton_step(means, eps, alpha, order)[0]


def yeo_johnson(h: Tensor, lmbda: Tensor | float, transform_eps: float = 0.0) -> Tensor:
    """The Yeo-Johnson power transform psi(h; lmbda), elementwise and broadcasting.

    With eta = lmbda for h >= 0 and 2 - lmbda below, t = abs(h):
    ``psi = sign(h) ((1 + t) ** eta - 1) / eta`` and its limit ``sign(h) log(1 + t)`` at eta 0.
    ``transform_eps`` > 0 moves eta away from zero by that much and takes the limit within it,
    as the authors' code does with sqrt(eps).
    """
    sign, t = _split_sign(h)
    # Finite for an infinite t, whose product with a zero exponent would be NaN.
    log = torch.log1p(t).clamp_max(math.log(torch.finfo(t.dtype).max))
    eta = 1.0 + sign * (lmbda - 1.0)
    if transform_eps > 0.0:
        away = torch.full_like(eta, transform_eps)
        shifted = eta + torch.where(eta < 0, -away, away)
        eta = torch.where(eta.abs() <= transform_eps, torch.zeros_like(eta), shifted)
    exponent = eta * log
    small = exponent.abs() < _SERIES_RADIUS
    # The branch not taken computes on a harmless value, or its gradient would be 0 * inf.
    near = torch.where(small, exponent, torch.zeros_like(exponent))
    series = torch.full_like(near, _SERIES[-1])
    for coefficient in _SERIES[-2::-1]:
        series = series * near + coefficient
    far = torch.where(small, torch.ones_like(exponent), exponent)
    far = far.clamp_max(_LARGEST_EXPONENT[statistics_dtype(far.dtype)])
    # exp() - 1 and not expm1(): nothing cancels here, and the derivative of expm1 is computed as
    # its result + 1, which does where the exponent is very negative.
    quotient = (torch.exp(far) - 1.0) / torch.where(small, torch.ones_like(eta), eta)
    return sign * torch.where(small, log * series, quotient)


def pack_running(
    mean: Tensor, var: Tensor, lmbda: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Running statistics of shape (C,) as a statistics tensor of shape (8, C)."""
    mean, var, lmbda = (s.to(dtype) for s in (mean, var, lmbda))
    zero = torch.zeros_like(mean)
    return torch.stack([mean, zero, rstd_of(var, eps, dtype), lmbda, zero, zero, zero, zero])


def normal_norm(
    input: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    kind: str,
    num_groups: int = 0,
    normalized_ndim: int = 0,
    eps: float = 1e-5,
    noise_train: float = 0.0,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | None = None,
    stream: int = 0,
    channels_last: bool = False,
    z: Tensor | None = None,
    noise_scale: Tensor | None = None,
    lmbda: Tensor | None = None,
    frozen: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
) -> tuple[Tensor, Tensor]:
    """Normality normalization of any layer kind, differentiable in input, weight and bias.

    Args:
        input: (N, C, *) for kinds ``batch``, ``group`` and ``instance``; any shape for ``layer``.
            Half types are computed in float32.
        weight, bias: (C,), or the trailing ``normalized_ndim`` sizes for kind ``layer``.
        kind: ``batch`` (a group is a channel), ``layer`` (the trailing dimensions of a sample),
            ``group`` (``num_groups`` channel groups a sample) or ``instance`` (a channel of a
            sample).
        noise_train: weight of the noise; 0 for none.
        seed, stream, channels_last: where the noise comes from (:mod:`normnorm.noise`).
        z: given noise of the input's shape, in place of the stream's.
        noise_scale: given noise scale s, shape (groups,), in place of mean(abs(x - mean(x))).
        lmbda: given lambda, shape (groups,), in place of the Newton step's (:mod:`likelihood
            <normnorm.likelihood>` has others); gradients flow into it.
        frozen: a statistics tensor (8, groups) to normalize with instead of the input's own.
        residual: of the input's shape, added to the output before the activation.
        activation: ``relu``, or empty for none.

    Returns:
        (output, statistics): the output in the input's dtype, and the detached statistics
        tensor (8, groups) with the rows of :class:`normnorm.statistics.Row`.
    """
    u = input.to(statistics_dtype(input.dtype))
    if kind == "group":
        u = u.unflatten(1, (num_groups, u.size(1) // num_groups))
    # The dimensions that one group spans.
    dim = tuple(range(u.dim() - normalized_ndim if kind == "layer" else 2, u.dim()))
    if kind == "batch":
        dim = (0, *dim)
    per_group = tuple(1 if i in dim else size for i, size in enumerate(u.shape))

    if frozen is None:
        h, mean, mean_low, rstd = standardize(u, dim, eps)
        means = [term.mean(dim, keepdim=True) for term in newton_terms(h)]
        step, curvature = newton_step(means, eps, alpha, order)
        mean_hd, _, mean_d, _ = means
        lmbda = step if lmbda is None else lmbda.reshape(per_group)
    else:
        mean, mean_low, rstd, lmbda, _, mean_hd, mean_d, curvature = (
            row.reshape(per_group) for row in frozen.unbind(0)
        )
        h = ((u - mean) - mean_low) * rstd
    x = yeo_johnson(h, lmbda, transform_eps)

    scale = torch.zeros_like(mean)
    if noise_train > 0.0:
        if noise_scale is None:
            constant = x.detach()
            scale = (constant - constant.mean(dim, keepdim=True)).abs().mean(dim, keepdim=True)
        else:
            scale = noise_scale.reshape(per_group)
        if z is None:
            if seed is None:
                raise ValueError("noise_train > 0 needs a seed or given noise z; got neither")
            z = standard_normals(input.shape, seed, stream, channels_last, u.dtype)
        x = x + (noise_train * scale) * z.to(u.dtype).reshape(u.shape)

    if kind == "group":
        x = x.flatten(1, 2)
    affine_shape = tuple(input.shape[input.dim() - normalized_ndim :])
    if kind != "layer":
        affine_shape = (1, input.size(1), *(1,) * (input.dim() - 2))
    if weight is not None:
        x = x * weight.to(x.dtype).reshape(affine_shape)
    if bias is not None:
        x = x + bias.to(x.dtype).reshape(affine_shape)
    if residual is not None:
        x = x + residual.to(x.dtype)
    if activation == "relu":
        x = relu(x)

    # In the order of Row.
    rows = (mean, mean_low, rstd, lmbda, scale, mean_hd, mean_d, curvature)
    return x.to(input.dtype), torch.stack([row.flatten() for row in rows]).detach()
