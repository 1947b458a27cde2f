"""Plots of the diagnostics: layer profiles, Q-Q grids, histograms against the normal."""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..quantiles import normal_quantiles
from . import statistics
from .result import Diagnosis, LayerDiagnosis

_BLUE, _ORANGE, _GREY = "#0072b2", "#d55e00", "#777777"  # distinguishable with any colour vision
_PANELS = 12  # channels in a grid
_PROFILE = (
    ("Q-Q R²", "qq_r2", "normal_qq_r2"),
    ("excess kurtosis", "kurtosis", None),
    ("|skewness|", "skewness", None),
    ("joint distance", "joint_distance", "normal_joint_distance"),
    ("|correlation|", "correlation", None),
    ("share of zeros", "sparsity", None),
)


def draw(diagnosis: Diagnosis, folder: Path) -> list[Path]:
    """Draws the profile, and a Q-Q grid and histograms of every layer with a sample; the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [_save(_profile(diagnosis), folder / "profile.png")]
    for name, layer in diagnosis.layers.items():
        if layer.sample is None:
            continue
        stem = re.sub(r"[^\w.-]", "_", name) or "model"
        title = f"{name or 'model'} ({layer.layer})"
        files.append(_save(_grid(title, layer, _qq), folder / f"qq_{stem}.png"))
        files.append(_save(_grid(title, layer, _histogram), folder / f"hist_{stem}.png"))
    return files


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=120)
    return path


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)


def _profile(diagnosis: Diagnosis) -> Figure:
    """Each statistic over the layers, of channels and own groups, and its value for the normal."""
    layers = list(diagnosis.layers.values())
    depth = np.arange(1, len(layers) + 1)
    figure = Figure(figsize=(9, 5), layout="constrained")
    panels = figure.subplots(2, 3)
    for axes, (title, key, normal) in zip(panels.flat, _PROFILE, strict=True):
        _bare(axes)
        axes.plot(depth, [getattr(layer, key) for layer in layers], "o-", color=_BLUE, ms=4,
                  label="channels")  # fmt: skip
        own = [(layer.own_groups or {}).get(key, math.nan) for layer in layers]
        if not np.isnan(own).all():
            axes.plot(depth, own, "s-", color=_ORANGE, ms=4, label="own groups")
            axes.legend(fontsize=7, frameon=False)
        if normal is not None:
            expected = [getattr(layer, normal) for layer in layers]
            axes.plot(depth, expected, "--", color=_GREY, lw=1)
            axes.annotate("normal samples", (depth[0], expected[0]), (0, 3), fontsize=7,
                          textcoords="offset points", color=_GREY)  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[1]:
        axes.set_xlabel("layer, first to last", fontsize=8)
    return figure


def _columns(layer: LayerDiagnosis) -> Iterator[tuple[int, np.ndarray]]:
    sample = layer.sample
    assert sample is not None
    drawn = statistics.varying(sample) & np.isfinite(sample).all(0)
    for column in np.flatnonzero(drawn)[:_PANELS]:
        values = np.sort(sample[:, column].astype(np.float64))
        yield int(layer.by_channel["channel"][column]), (values - values.mean()) / values.std()


def _grid(title: str, layer: LayerDiagnosis, panel: Callable[[Axes, np.ndarray], None]) -> Figure:
    columns = list(_columns(layer))
    across = min(4, max(1, len(columns)))
    down = max(1, math.ceil(len(columns) / across))
    figure = Figure(figsize=(2.2 * across + 0.4, 2.0 * down + 0.6), layout="constrained")
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(down, across, squeeze=False)
    for axes, found in zip(panels.flat, columns, strict=False):
        _bare(axes)
        panel(axes, found[1])
        axes.set_title(f"channel {found[0]}", fontsize=8)
    for axes in panels.flat[len(columns) :]:
        axes.set_axis_off()
    return figure


def _qq(axes: Axes, values: np.ndarray) -> None:
    normal = normal_quantiles(len(values)).numpy()
    low, high = normal[0], normal[-1]
    axes.plot([low, high], [low, high], color=_ORANGE, lw=1)
    axes.plot(normal, values, ".", color=_BLUE, ms=2)


def _histogram(axes: Axes, values: np.ndarray) -> None:
    axes.hist(values, bins=40, density=True, color=_BLUE, alpha=0.6)
    grid = np.linspace(-4, 4, 200)
    axes.plot(grid, np.exp(-(grid**2) / 2) / math.sqrt(2 * math.pi), color=_ORANGE, lw=1)
    axes.set_yticks([])
