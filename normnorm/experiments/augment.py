"""Random shifts and mirror images of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["shift_and_mirror"]


def shift_and_mirror(images: Tensor, mirror: bool) -> Tensor:
    """Each image moved by up to an eighth of its size over zeros, every other one mirrored.

    On whole batches, from torch's generator of the images' device: the outcome does not depend on
    how many processes loaded the batch.

    Args:
        images: (N, C, H, W).
        mirror: whether a mirror image keeps its label; not so of digits.
    """
    count, _, height, width = images.shape
    reach = max(1, height // 8)
    device = images.device
    top, left = torch.randint(0, 2 * reach + 1, (2, count, 1), device=device)
    rows = (top + torch.arange(height, device=device)).unsqueeze(2)
    columns = (left + torch.arange(width, device=device)).unsqueeze(1)
    number = torch.arange(count, device=device).view(-1, 1, 1)
    moved = pad(images, [reach] * 4)[number, :, rows, columns].movedim(-1, 1)
    if mirror:
        chosen = torch.rand(count, 1, 1, 1, device=device) < 0.5
        moved = torch.where(chosen, moved.flip(-1), moved)
    return moved
