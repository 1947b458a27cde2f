"""Lambda by several Newton steps, or at the likelihood's optimum.

The layers take one step from lambda 1, as Eftekhari and Papyan do, who leave open whether more are
worth their cost. ``docs/internals/likelihood.md`` compares the results.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from .reference import yeo_johnson

# The likelihood is convex in lambda: damped Newton steps reach float64 rounding long before these.
_MOST_STEPS = 50
_MOST_HALVINGS = 30


def _derivatives(h: Tensor, lmbda: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """psi and its first and second derivative in lambda."""
    lmbda = lmbda.expand_as(h).clone()
    one = torch.ones_like(lmbda)

    def first(value: Tensor) -> Any:
        return jvp(lambda v: yeo_johnson(h, v), (value,), (one,))

    found: Any = jvp(first, (lmbda,), (one,))
    (psi, slope), (_, bend) = found
    return psi, slope, bend


def _ones(h: Tensor, dim: tuple[int, ...]) -> Tensor:
    """One per group, with reduced dimensions of size 1."""
    return torch.ones_like(h.detach().sum(dim, keepdim=True))


def _mean_log(h: Tensor, dim: tuple[int, ...]) -> Tensor:
    return torch.where(h < 0, -torch.log1p(h.abs()), torch.log1p(h.abs())).mean(dim, keepdim=True)


def negative_log_likelihood(h: Tensor, lmbda: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Yeo and Johnson's negative log-likelihood divided by the number of values, up to a constant,
    at the mean and variance that maximize the likelihood.

    ``log(Var psi(h; lmbda)) / 2 - (lmbda - 1) mean(sign(h) log(1 + |h|))`` over ``dim``; ``lmbda``:
    one per group, with reduced dimensions of size 1.
    """
    variance = yeo_johnson(h, lmbda).var(dim, correction=0, keepdim=True)
    return 0.5 * torch.log(variance) - (lmbda - 1.0) * _mean_log(h, dim)


def _slope_and_curvature(h: Tensor, lmbda: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The first and second derivative of the negative log-likelihood in lambda."""
    psi, slope, bend = (x - x.mean(dim, keepdim=True) for x in _derivatives(h, lmbda))
    variance = psi.square().mean(dim, keepdim=True)
    along = (psi * slope).mean(dim, keepdim=True) / variance
    across = (slope.square() + psi * bend).mean(dim, keepdim=True) / variance
    return along - _mean_log(h, dim), across - 2.0 * along.square()


def newton_lmbda(h: Tensor, dim: tuple[int, ...], iterations: int, eps: float = 1e-5) -> Tensor:
    """``iterations`` Newton steps from lambda 1, all differentiable.

    As in the layers, each step clamps the second derivative at 0 and adds ``sqrt(eps)``. A group of
    equal values keeps lambda 1. One iteration equals :func:`normnorm.reference.estimate_lmbda`.
    """
    varies, h = _varying(h, dim)
    lmbda = _ones(h, dim)
    for _ in range(iterations):
        slope, curvature = _slope_and_curvature(h, lmbda, dim)
        lmbda = lmbda - slope / (curvature.clamp_min(0.0) + eps**0.5)
    return torch.where(varies, lmbda, 1.0)


def _varying(h: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whether the values of a group differ, or contain NaN; and values with other groups replaced,
    whose gradient would be 0 * inf. Compares extremes: variances of equal values are rounded."""
    if h.numel() == 0:
        return torch.ones_like(_ones(h, dim), dtype=torch.bool), h
    values = h.detach()
    varies = values.amax(dim, keepdim=True) != values.amin(dim, keepdim=True)
    ramp = torch.linspace(-1, 1, h.numel(), dtype=h.dtype, device=h.device).view(h.shape)
    return varies, torch.where(varies, h, ramp)


def optimal_lmbda(h: Tensor, dim: tuple[int, ...]) -> Tensor:
    """The lambda of maximum likelihood, with its gradient by the implicit function theorem.

    ``dlambda/dh = -(dL'/dh) / L''`` at the optimum; higher derivatives are not those of the
    optimum. A group of equal values keeps lambda 1; one with NaN or infinity gets NaN.
    """
    varies, h = _varying(h, dim)
    best = _search(h.detach(), dim)
    slope, curvature = _slope_and_curvature(h, best, dim)
    # The slope is zero at the optimum, up to rounding, so the step changes only the gradient.
    step = slope / curvature.detach()
    return torch.where(varies, best - (step - step.detach()), 1.0)


@torch.no_grad()
def _search(h: Tensor, dim: tuple[int, ...]) -> Tensor:
    lmbda = _ones(h, dim)
    loss = negative_log_likelihood(h, lmbda, dim)
    for _ in range(_MOST_STEPS):
        slope, curvature = _slope_and_curvature(h, lmbda, dim)
        step = torch.where(curvature > 0, slope / curvature, slope)
        # A group is done when a step would lower its loss by less than the loss is rounded.
        moved = done = slope * step < 1e-15
        for halving in range(_MOST_HALVINGS):
            trial = lmbda - step * 0.5**halving
            trial_loss = negative_log_likelihood(h, trial, dim)
            better = (trial_loss < loss) & ~moved
            lmbda = torch.where(better, trial, lmbda)
            loss = torch.where(better, trial_loss, loss)
            moved = moved | better
            if moved.all():
                break
        if not (moved & ~done).any():
            break
    # The flat minimum determines lambda to half the digits; two Newton steps on the slope to all.
    for _ in range(2):
        slope, curvature = _slope_and_curvature(h, lmbda, dim)
        lmbda = lmbda - torch.where(curvature > 0, slope / curvature, 0.0)
    return lmbda
