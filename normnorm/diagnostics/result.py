"""Results of the diagnostics by layer, as a table and as JSON."""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "normnorm diagnosis 2"


@dataclass
class LayerDiagnosis:
    """One layer's statistics. Means over the channels of its output unless noted; constant channels
    are left out. NaN if nothing varies or a channel has NaN or infinity.

    Attributes:
        layer: the module's class.
        channels: of the layer.
        watched_channels: the number of channels measured, drawn at random.
        observations: values per channel.
        constant_channels: indices of the measured channels whose values are all equal.
        nonfinite_channels: indices of the measured channels with NaN or infinity.
        own_groups: of a norm layer's normalization groups before noise and affine map, and so of
            what the layer itself makes normal; None for other layers. Means ``skewness``,
            ``kurtosis``, ``qq_r2`` and ``normal_qq_r2`` as below, over groups that are not
            constant; numbers of ``groups``, of ``constant`` ones and of ``nonfinite`` ones.
        skewness: mean absolute skewness; 0 for the normal. Over all observations.
        kurtosis: mean excess kurtosis; 0 for the normal. Over all observations.
        qq_r2: R^2 of the normal quantile-quantile plot; 1 for a perfectly normal shape.
        normal_qq_r2: ``qq_r2`` of normal samples of the same size.
        shapiro_w: Shapiro and Wilk's W.
        shapiro_passed: share of the channels that the Shapiro-Wilk test does not reject at 5 %.
            With many observations it rejects almost all.
        joint_distance: energy distance of pairs of channels from jointly normal.
        normal_joint_distance: ``joint_distance`` of normal samples of the same size.
        correlation: mean absolute correlation of two channels. Over all observations.
        mutual_information: mean adjusted mutual information of two channels, 0 to 1.
        sparsity: share of exact zeros. Over all observations.
        dead_channels: share of the channels that are always zero.
        clustering: ``within_between``, ``silhouette`` and ``nearest_centroid`` of the samples'
            vectors (means over positions) by class; None without labels.
        by_channel: ``skewness``, ``kurtosis``, ``qq_r2``, ``sparsity`` of every measured channel,
            and its index ``channel``.
    """

    layer: str
    channels: int
    watched_channels: int
    observations: int
    constant_channels: list[int]
    nonfinite_channels: list[int]
    own_groups: dict[str, float] | None
    skewness: float
    kurtosis: float
    qq_r2: float
    normal_qq_r2: float
    shapiro_w: float
    shapiro_passed: float
    joint_distance: float
    normal_joint_distance: float
    correlation: float
    mutual_information: float
    sparsity: float
    dead_channels: float
    clustering: dict[str, float] | None
    by_channel: dict[str, list[float]] = field(repr=False)
    # For the plots, not in the JSON: (rows, measured channels).
    sample: np.ndarray | None = field(default=None, repr=False, compare=False)


# Columns of the table: the head, and the name of the number.
_OWN_GROUPS = (
    ("group skew", "skewness"),
    ("kurtosis", "kurtosis"),
    ("Q-Q R^2", "qq_r2"),
    ("(normal)", "normal_qq_r2"),
)
_CHANNELS = (
    ("channel skew", "skewness"),
    ("kurtosis", "kurtosis"),
    ("Q-Q R^2", "qq_r2"),
    ("(normal)", "normal_qq_r2"),
    ("W", "shapiro_w"),
    ("joint", "joint_distance"),
    ("(normal)", "normal_joint_distance"),
    ("|corr|", "correlation"),
    ("AMI", "mutual_information"),
    ("zeros", "sparsity"),
)
_CLUSTERING = (
    ("within/between", "within_between"),
    ("silhouette", "silhouette"),
    ("centroid acc.", "nearest_centroid"),
)
_LISTED = 8


def listed(channels: list[int]) -> str:
    """Channels by their indices, the first of many."""
    more = f", ... ({len(channels)})" if len(channels) > _LISTED else ""
    words = ", ".join(map(str, channels[:_LISTED])) + more
    return f"channel{'s' if len(channels) > 1 else ''} {words}"


@dataclass
class Diagnosis:
    """The :class:`LayerDiagnosis` of every measured layer, by name, in the model's order."""

    layers: dict[str, LayerDiagnosis]

    def table(self) -> str:
        """One line per layer, in plain text: a norm layer's own groups, then the channels of its
        output. Below it, what is constant or not finite."""
        layers = self.layers.values()
        head, rows = ["layer"], [[name] for name in self.layers]
        for columns, numbers in (
            (_OWN_GROUPS, [layer.own_groups for layer in layers]),
            (_CHANNELS, [vars(layer) for layer in layers]),
            (_CLUSTERING, [layer.clustering for layer in layers]),
        ):
            if any(numbers):
                head += [title for title, _ in columns]
                for row, found in zip(rows, numbers, strict=True):
                    row += [_cell((found or {}).get(key, math.nan)) for _, key in columns]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in (head, *rows)
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines + [f"{name}: {words}" for name, words in self._exceptions()])

    def _exceptions(self) -> Iterator[tuple[str, str]]:
        """What of which layer is constant or not finite."""
        for name, layer in self.layers.items():
            own = layer.own_groups or {}
            for key, words in (("constant", "constant"), ("nonfinite", "not finite")):
                channels = getattr(layer, f"{key}_channels")
                if channels:
                    yield name, f"{listed(channels)} of {layer.channels} {words}"
                if own.get(key):
                    yield name, f"{own[key]} of {own['groups']} groups {words}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON types: NaN becomes None; the samples are left out."""
        layers = {}
        for name, layer in self.layers.items():
            numbers = asdict(layer)
            del numbers["sample"]
            layers[name] = _mapped(numbers, _to_json)
        return {"format": FORMAT, "layers": layers}

    def save(self, path: str | Path) -> None:
        """Writes :meth:`to_dict` as JSON, atomically."""
        path = Path(path)
        half = path.with_name(path.name + ".part")
        half.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
        half.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Diagnosis":
        """Reads a file of :meth:`save`.

        Raises:
            ValueError: the file is not a saved diagnosis.
        """
        try:
            content = json.loads(Path(path).read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            layers = {}
            for name, numbers in content["layers"].items():
                found = _mapped(numbers, lambda value: math.nan if value is None else value)
                layers[name] = LayerDiagnosis(**found)
                for key in ("clustering", "own_groups"):
                    if numbers[key] is None:
                        setattr(layers[name], key, None)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} is not a saved diagnosis ({FORMAT}): {error}") from None
        return cls(layers)

    def plot(self, folder: str | Path) -> list[Path]:
        """Draws the statistics over the layers and, for a diagnosis with samples, Q-Q grids and
        histograms.

        Needs matplotlib.

        Returns:
            the PNG files, in ``folder``, which is created if missing.
        """
        from . import plots

        return plots.draw(self, Path(folder))


def _cell(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}" if abs(number) < 1000 else f"{number:.3g}"


def _mapped(value: Any, convert: Callable[[Any], Any]) -> Any:
    """Dictionaries and lists with every value in them converted."""
    if isinstance(value, dict):
        return {key: _mapped(part, convert) for key, part in value.items()}
    if isinstance(value, list):
        return [_mapped(part, convert) for part in value]
    return convert(value)


def _to_json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
