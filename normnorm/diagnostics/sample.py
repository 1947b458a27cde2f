"""A uniform sample of bounded size from a stream of rows."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RowSample"]


class RowSample:
    """Keeps a uniform sample of ``size`` of all rows added.

    Draws a random key per row and keeps the rows with the smallest keys (bottom-k sampling). Only
    kept rows are copied.

    Args:
        size: number of rows kept.
        seed: of the keys.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._rows: Tensor | None = None
        self._labels: Tensor | None = None

    def add(self, rows: Tensor, labels: Tensor | None = None) -> None:
        """Adds rows (n, columns) and, in every call or in none, their labels (n,)."""
        keys = torch.rand(rows.size(0), dtype=torch.float64, generator=self._generator)
        chosen = keys.argsort()[: self._size]
        kept = rows.index_select(0, chosen.to(rows.device)).float().cpu()
        kept_labels = None if labels is None else labels.cpu()[chosen]
        keys = keys[chosen]
        if self._rows is not None:
            keys = torch.cat([self._keys, keys])
            order = keys.argsort()[: self._size]
            keys = keys[order]
            kept = torch.cat([self._rows, kept])[order]
            if kept_labels is not None and self._labels is not None:
                kept_labels = torch.cat([self._labels, kept_labels])[order]
        self._keys, self._rows, self._labels = keys, kept, kept_labels

    @property
    def rows(self) -> Tensor:
        """(at most size, columns), float32 on the CPU."""
        return torch.empty(0, 0) if self._rows is None else self._rows

    @property
    def labels(self) -> Tensor | None:
        """(at most size,), of :attr:`rows`."""
        return self._labels
