"""How normal features are: the quantile-quantile plot against the normal, and its R^2."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["normal_quantiles", "normal_r_squared", "normalized_groups", "qq_r_squared"]


def normal_quantiles(count: int) -> Tensor:
    """Where the sorted values of a normal sample lie: (count,), float64.

    The normal quantiles of the medians of uniform order statistics, by Filliben's approximation
    ("The probability plot correlation coefficient test for normality", Technometrics 1975).
    """
    medians = (torch.arange(1, count + 1, dtype=torch.float64) - 0.3175) / (count + 0.365)
    medians[-1] = 0.5 ** (1.0 / count)
    medians[0] = 1.0 - medians[-1]
    return torch.special.ndtri(medians)


def qq_r_squared(groups: Tensor) -> Tensor:
    """R^2 of each row's normal quantile-quantile plot: 1 for a perfectly normal shape.

    The squared correlation between the row's sorted values and :func:`normal_quantiles`, blind
    to location and scale; what ``scipy.stats.probplot`` fits. A normal sample itself has a
    little less than 1: :func:`normal_r_squared`.

    Args:
        groups: (rows, n).

    Returns:
        (rows,), float64; NaN for a row of equal values.
    """
    values = groups.double().sort(dim=1).values
    values = values - values.mean(1, keepdim=True)
    quantiles = normal_quantiles(groups.size(1))
    cosine = (values @ quantiles) / (values.norm(dim=1) * quantiles.norm())
    return cosine.square()


def normal_r_squared(count: int) -> float:
    """What :func:`qq_r_squared` gives samples of the normal itself: 0.977 for 48 values, more for
    more. An average over simulated samples, right to about 0.0005."""
    rows = min(max(100_000 // count, 16), 2000)
    samples = torch.randn(rows, count, generator=torch.Generator().manual_seed(0))
    return float(qq_r_squared(samples).mean())


@torch.no_grad()
def normalized_groups(network: nn.Module, layer: nn.Module, images: Tensor) -> Tensor:
    """What a normalization layer makes of test images, group by group, before its affine map.

    A group is what the layer normalizes together, and so what it can Gaussianize: a channel over
    all images and positions for a batch layer, the features of one token for a layer
    normalization. Evaluation mode: no noise, and a batch layer's running statistics.

    Args:
        network: holds ``layer``; left in evaluation mode.
        layer: a batch layer over (N, C, ...), or a layer normalization.
        images: the network's input.

    Returns:
        (groups, values), float32.
    """
    seen: list[Tensor] = []
    network.eval()
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        network(images)
    finally:
        hook.remove()
    bare = copy.deepcopy(layer)
    for name, identity in (("weight", 1.0), ("bias", 0.0)):
        getattr(bare, name).fill_(identity)
    output = bare(seen[0])
    if isinstance(layer, nn.LayerNorm):
        return output.flatten(0, -2)
    return output.transpose(0, 1).flatten(1)
