"""What SciPy and scikit-learn say of a sample of a layer's channels."""

from __future__ import annotations

import math
import warnings
from functools import cache

import numpy as np
from scipy import stats
from sklearn import metrics, model_selection, neighbors

from normnorm.quantiles import normal_quantiles

__all__ = [
    "clustering",
    "joint_distance",
    "mutual_information",
    "normal_joint_distance",
    "shapiro_wilk",
    "varying",
]

_SHAPIRO_ROWS = 2000  # beyond 5000 SciPy's p-value is not meant to hold
_BINS = 16
_FOLDS = 5


def varying(sample: np.ndarray) -> np.ndarray:
    """(columns,), whether a column is not constant. Exactly, where a standard deviation is
    rounded; a column that holds NaN is not constant."""
    return np.asarray(sample.min(0) != sample.max(0))


def _finite(sample: np.ndarray) -> bool:
    return bool(np.isfinite(sample).all())


def shapiro_wilk(sample: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shapiro and Wilk's W and its p-value for every column of (rows, columns) that varies; NaN
    for one that holds NaN or infinity."""
    sample = sample[:_SHAPIRO_ROWS]
    found = [
        tuple(stats.shapiro(column)) if _finite(column) else (math.nan, math.nan)
        for column in sample[:, varying(sample)].T
    ]
    return np.array([w for w, _ in found]), np.array([p for _, p in found])


def joint_distance(sample: np.ndarray, projections: int, seed: int) -> float:
    """How far pairs of channels are from jointly normal: 0 for the normal, more for less.

    The energy distance (Székely and Rizzo, 2013) between the normal and the sample, standardized
    by columns, projected on random directions in the plane of two random columns and standardized
    again; the mean over the projections. Two columns and not all of them: a direction across many
    columns gives nearly normal values whatever the columns are, by the central limit theorem.

    Args:
        sample: (rows, columns).
        projections: how many directions.
        seed: of the directions.

    Returns:
        NaN where fewer than two columns vary, or a value is NaN or infinite.
        :func:`normal_joint_distance` is what a sample of the normal itself has.
    """
    columns = sample[:, varying(sample)]
    rows, count = columns.shape
    if count < 2 or rows < 3 or not _finite(columns):
        return math.nan
    columns = (columns - columns.mean(0)) / columns.std(0)
    random = np.random.default_rng(seed)
    normal = normal_quantiles(rows).numpy()
    distances = []
    for _ in range(projections):
        pair = random.choice(count, 2, replace=False)
        angle = random.uniform(0, math.pi)
        values = columns[:, pair] @ [math.cos(angle), math.sin(angle)]
        spread = values.std()
        if spread > 1e-6:  # two equal columns leave nothing in one direction
            distances.append(stats.energy_distance((values - values.mean()) / spread, normal))
    return float(np.mean(distances)) if distances else math.nan


@cache
def normal_joint_distance(rows: int) -> float:
    """What :func:`joint_distance` gives that many rows of independent normal columns."""
    sample = np.random.default_rng(0).standard_normal((rows, 16))
    return joint_distance(sample, 64, 0)


def mutual_information(sample: np.ndarray, pairs: int, seed: int) -> float:
    """The mean adjusted mutual information of random pairs of columns: 0 for independent ones.

    Every column is cut into 16 bins of equal counts (fewer where values repeat) and the pair is
    scored by scikit-learn's ``adjusted_mutual_info_score``, which subtracts what chance gives.
    NaN where fewer than two columns vary, or a value is NaN or infinite.
    """
    columns = sample[:, varying(sample)]
    count = columns.shape[1]
    if count < 2 or not _finite(columns):
        return math.nan
    edges = np.quantile(columns, np.linspace(0, 1, _BINS + 1)[1:-1], axis=0)
    bins = [np.searchsorted(np.unique(edges[:, c]), columns[:, c]) for c in range(count)]
    every = [(i, j) for i in range(count) for j in range(i)]
    random = np.random.default_rng(seed)
    chosen = random.choice(len(every), min(pairs, len(every)), replace=False)
    return float(
        np.mean([metrics.adjusted_mutual_info_score(bins[i], bins[j])
                 for i, j in (every[k] for k in chosen)])
    )  # fmt: skip


def clustering(vectors: np.ndarray, labels: np.ndarray) -> dict[str, float] | None:
    """How samples of one class lie together; None where fewer than two classes have five samples,
    NaN where all vectors are equal or one holds NaN or infinity.

    * ``within_between``: the root mean square distance of samples to their own class's mean, over
      that of the class means to the mean of these; small where classes are apart.
    * ``silhouette``: scikit-learn's, -1 to 1.
    * ``nearest_centroid``: the accuracy, 0 to 1, of scikit-learn's nearest-centroid classifier,
      cross-validated over 5 folds.

    Potgieter, Mouton and Davel (arXiv 2501.14441) study the clustering and the sparsity of
    normalized representations; these measures are our own and claim no equality with theirs.

    Args:
        vectors: (samples, features).
        labels: (samples,), integers.
    """
    classes, counts = np.unique(labels, return_counts=True)
    keep = np.isin(labels, classes[counts >= _FOLDS])
    vectors, labels = vectors[keep].astype(np.float64), labels[keep]
    classes = np.unique(labels)
    if len(classes) < 2:
        return None
    if not _finite(vectors) or not varying(vectors).any():
        return dict.fromkeys(("within_between", "silhouette", "nearest_centroid"), math.nan)
    means = np.stack([vectors[labels == c].mean(0) for c in classes])
    own = means[np.searchsorted(classes, labels)]
    within = np.square(vectors - own).sum(1).mean()
    between = np.square(means - means.mean(0)).sum(1).mean()
    folds = model_selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        # A feature without any spread within a class: it then tells the classes apart by itself.
        warnings.simplefilter("ignore", UserWarning)
        accuracy = model_selection.cross_val_score(
            neighbors.NearestCentroid(), vectors, labels, cv=folds
        ).mean()
    return {
        "within_between": float(np.sqrt(within / between)) if between > 0 else math.inf,
        "silhouette": float(metrics.silhouette_score(vectors, labels)),
        "nearest_centroid": float(accuracy),
    }
