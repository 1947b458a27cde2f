"""What a normalization layer makes of test images, group by group."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

__all__ = ["normalized_groups"]


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
