"""Statistics of a stream of rows in bounded memory: columns' moments, a sample, rows' normality."""

from collections import Counter

import torch
from torch import Tensor

from ..quantiles import normal_r_squared, normality


class ColumnMoments:
    """Central moments of every column and the correlations between them, accumulated over batches.

    Batches are merged by the pairwise formulae of Pébay ("Formulas for robust, one-pass parallel
    computation of covariances and arbitrary-order statistical moments", Sandia 2008), in float64:
    order and sizes of the batches change the result only by rounding.
    """

    def __init__(self, columns: int) -> None:
        self.count = 0
        self._least = torch.full((columns,), torch.inf, dtype=torch.float64)
        self._most = torch.full((columns,), -torch.inf, dtype=torch.float64)
        self.zeros = torch.zeros(columns, dtype=torch.int64)
        # The mean; sums of the second to fourth powers of the deviations, and of their products.
        self.mean, self._m2, self._m3, self._m4 = torch.zeros(4, columns, dtype=torch.float64)
        self._products = torch.zeros(columns, columns, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Adds a batch of rows: (rows, columns), any floating dtype and device."""
        rows = values.size(0)
        if rows == 0:
            return
        self.zeros += (values == 0).sum(0).cpu()
        values = values.double()
        self._least = self._least.minimum(values.amin(0).cpu())
        self._most = self._most.maximum(values.amax(0).cpu())
        mean = values.mean(0)
        deviations = values - mean
        squares = deviations.square()
        sums = squares.sum(0), (squares * deviations).sum(0), squares.square().sum(0)
        products = deviations.T @ deviations
        mean, m2, m3, m4, products = (t.cpu() for t in (mean, *sums, products))
        before, total = self.count, self.count + rows
        step = mean - self.mean
        share, rest = rows / total, before / total
        self._m4 += (
            m4
            + step**4 * before * share * (rest**2 - rest * share + share**2)
            + 6 * step**2 * (rest**2 * m2 + share**2 * self._m2)
            + 4 * step * (rest * m3 - share * self._m3)
        )
        self._m3 += (
            m3
            + step**3 * before * share * (rest - share)
            + 3 * step * (rest * m2 - share * self._m2)
        )
        self._m2 += m2 + step**2 * before * share
        self._products += products + torch.outer(step, step) * before * share
        self.mean += step * share
        self.count = total

    @property
    def constant(self) -> Tensor:
        """(columns,), whether all values of a column are equal; its variance is rounded."""
        return self._least == self._most

    @property
    def variance(self) -> Tensor:
        """(columns,), biased."""
        return self._m2 / self.count

    @property
    def skewness(self) -> Tensor:
        """(columns,), the biased g1; NaN for a constant column."""
        return self._varying(self._m3 / self.count / self.variance**1.5)

    @property
    def kurtosis(self) -> Tensor:
        """(columns,), the biased excess g2: 0 for the normal; NaN for a constant column."""
        return self._varying(self._m4 / self.count / self.variance.square() - 3)

    @property
    def sparsity(self) -> Tensor:
        """(columns,), the share of values that are exactly zero."""
        return self.zeros.double() / self.count

    @property
    def correlation(self) -> Tensor:
        """(columns, columns), Pearson's; NaN for a constant column."""
        scale = self._varying(self._m2.sqrt())
        return self._products / torch.outer(scale, scale)

    def _varying(self, values: Tensor) -> Tensor:
        return values.masked_fill(self.constant, torch.nan)


class RowSample:
    """Keeps a uniform sample of ``size`` of all rows added: ``rows``, (at most size, columns),
    float32 on the CPU, and their ``labels`` or None.

    Draws a random key per row and copies the rows with the smallest keys (bottom-k sampling).
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0, dtype=torch.float64)
        self.rows = torch.empty(0, 0)
        self.labels: Tensor | None = None

    def add(self, rows: Tensor, labels: Tensor | None = None) -> None:
        """Adds rows (n, columns) and, in every call or in none, their labels (n,)."""
        keys = torch.rand(rows.size(0), dtype=torch.float64, generator=self._generator)
        chosen = keys.argsort()[: self._size]
        keys = keys[chosen]
        kept = rows.index_select(0, chosen.to(rows.device)).float().cpu()
        kept_labels = None if labels is None else labels.cpu()[chosen]
        if len(self._keys):
            keys = torch.cat([self._keys, keys])
            order = keys.argsort()[: self._size]
            keys, kept = keys[order], torch.cat([self.rows, kept])[order]
            if kept_labels is not None and self.labels is not None:
                kept_labels = torch.cat([self.labels, kept_labels])[order]
        self._keys, self.rows, self.labels = keys, kept, kept_labels


class GroupMeans:
    """Means of the normality of normalization groups (:func:`normnorm.quantiles.normality`)."""

    def __init__(self) -> None:
        self._sums = {"skewness": 0.0, "kurtosis": 0.0, "qq_r2": 0.0}
        self._sizes: Counter[int] = Counter()  # number of groups that vary, by their size
        self._constant = self._nonfinite = self._groups = 0

    def add(self, groups: Tensor) -> None:
        """Adds groups: (groups, values)."""
        if groups.size(1) == 0:
            return
        constant = groups.amin(1) == groups.amax(1)
        varying = groups[~constant]
        self._constant += int(constant.sum())
        self._nonfinite += int((~varying.isfinite().all(1)).sum())
        self._groups += groups.size(0)
        self._sizes[groups.size(1)] += varying.size(0)
        for name, values in normality(varying).items():
            self._sums[name] += float(values.sum())

    def result(self) -> dict[str, float] | None:
        """``own_groups`` of :class:`normnorm.diagnostics.LayerDiagnosis`; None without groups."""
        if not self._groups:
            return None
        number = self._sizes.total()
        found = {name: total / number if number else torch.nan
                 for name, total in self._sums.items()}  # fmt: skip
        found["kurtosis"] -= 3.0
        normal = sum(count * normal_r_squared(size) for size, count in self._sizes.items() if count)
        found["normal_qq_r2"] = normal / number if number else torch.nan
        counts = {
            "groups": self._groups, "constant": self._constant, "nonfinite": self._nonfinite
        }  # fmt: skip
        return found | counts
