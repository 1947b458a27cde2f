"""Statistics of a sample of a layer's channels, by SciPy and scikit-learn."""

import math
import warnings
from functools import cache

import numpy as np
from scipy import stats
from sklearn import metrics, model_selection, neighbors

from ..quantiles import normal_quantiles

_SHAPIRO_ROWS = 2000  # SciPy's p-value is inaccurate above 5000
_BINS = 16
_FOLDS = 5


def varying(sample: np.ndarray) -> np.ndarray:
    """(columns,), whether a column is not constant. Compares extremes, because a standard deviation
    is rounded; a column with NaN is not constant."""
    return np.asarray(sample.min(0) != sample.max(0))


def _finite(sample: np.ndarray) -> bool:
    return bool(np.isfinite(sample).all())


def shapiro_wilk(sample: np.ndarray) -> tuple[float, float]:
    """The mean of Shapiro and Wilk's W over the non-constant columns of (rows, columns), and the
    share of them whose p-value is above 5 %.

    NaN if a column has NaN or infinity, no column varies, or there are fewer than three rows.
    """
    sample = sample[:_SHAPIRO_ROWS]
    columns = sample[:, varying(sample)].T
    if len(sample) < 3 or not len(columns) or not _finite(columns):
        return math.nan, math.nan
    found = np.array([stats.shapiro(column) for column in columns])
    return float(found[:, 0].mean()), float((found[:, 1] > 0.05).mean())


def joint_distance(sample: np.ndarray, projections: int, seed: int) -> float:
    """Distance of pairs of channels from jointly normal: 0 for the normal.

    The energy distance (Székely and Rizzo, 2013) between the normal and the sample, standardized by
    columns, projected on random directions in the plane of two random columns and standardized
    again; the mean over the projections. Directions across many columns would give nearly normal
    values for any data, by the central limit theorem. NaN if fewer than two columns vary or a value
    is not finite. For normal samples see :func:`normal_joint_distance`.
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
        if spread > 1e-6:  # 0 in one direction for two equal columns
            distances.append(stats.energy_distance((values - values.mean()) / spread, normal))
    return float(np.mean(distances)) if distances else math.nan


@cache
def normal_joint_distance(rows: int) -> float:
    """The :func:`joint_distance` of that many rows of independent normal columns."""
    sample = np.random.default_rng(0).standard_normal((rows, 16))
    return joint_distance(sample, 64, 0)


def mutual_information(sample: np.ndarray, pairs: int, seed: int) -> float:
    """The mean adjusted mutual information of random pairs of columns: 0 for independent columns.

    Divides every column into 16 bins of equal counts (fewer if values repeat) and scores each pair
    by scikit-learn's ``adjusted_mutual_info_score``, which corrects for chance. NaN if fewer than
    two columns vary, or a value is NaN or infinite.
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
    """Clustering of samples by class; None if fewer than two classes have five samples, NaN values
    if all vectors are equal or one has NaN or infinity.

    * ``within_between``: the root mean square distance of samples to their own class's mean, over
      that of the class means to the mean of these; small where classes are apart.
    * ``silhouette``: scikit-learn's, -1 to 1.
    * ``nearest_centroid``: 0 to 1, the 5-fold accuracy of scikit-learn's ``NearestCentroid``.

    Potgieter, Mouton and Davel (arXiv 2501.14441) study the clustering and sparsity of normalized
    representations; these measures are defined independently and are not theirs.
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
        # For a feature without spread within a class, which separates the classes by itself.
        warnings.simplefilter("ignore", UserWarning)
        accuracy = model_selection.cross_val_score(
            neighbors.NearestCentroid(), vectors, labels, cv=folds
        ).mean()
    return {
        "within_between": float(np.sqrt(within / between)) if between > 0 else math.inf,
        "silhouette": float(metrics.silhouette_score(vectors, labels)),
        "nearest_centroid": float(accuracy),
    }
