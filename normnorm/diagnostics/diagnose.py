"""Statistics of a model's layers over a loader, and the effect of noise on their outputs."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import layer_outputs
from ..checks import check_integer, check_number
from ..groups import Part, part_of, running_of, uses_running
from ..quantiles import normal_r_squared, qq_r_squared
from . import capture, statistics
from .accumulators import ColumnMoments, GroupMeans, RowSample
from .result import Diagnosis, LayerDiagnosis, listed


class _Watched:
    """A layer's outputs so far: moments of all of them, and a sample; a norm layer's groups."""

    def __init__(self, module: nn.Module, sample_size: int, channels: int, seed: int) -> None:
        self.module = module
        self._sizes = sample_size, channels
        self._seed = seed
        self.channels = 0
        self.sample = RowSample(sample_size, seed)
        self.vectors = RowSample(sample_size, seed + 1)
        # Of a norm layer; where groups are channels over all batches, its input's observations.
        self._own_groups = GroupMeans()
        self._inputs = RowSample(sample_size, seed)
        self._running: list[Tensor] | None = None

    def add(self, output: Tensor, labels: Tensor | None, given: Callable[[], Tensor]) -> None:
        moved = layer_outputs.channels_last(self.module, output)
        rows = moved.flatten(0, -2)
        if not self.channels:
            self.channels = rows.size(1)
            watched = min(self.channels, self._sizes[1])
            generator = torch.Generator().manual_seed(self._seed)
            order = torch.randperm(self.channels, generator=generator)
            self._chosen = order[:watched].sort().values
            self.moments = ColumnMoments(watched)
        if rows.size(1) != self.channels:
            raise ValueError(
                f"{type(self.module).__name__} gave {rows.size(1)} channels after {self.channels}"
            )
        chosen = self._chosen.to(rows.device)
        rows = rows.index_select(1, chosen)
        self.moments.add(rows)
        self.sample.add(rows)
        if isinstance(self.module, capture.NORM_LAYERS):
            self._add_groups(given())
        if labels is not None:
            # One vector per sample, the mean over its positions.
            means = moved.flatten(1, -2).mean(1) if moved.dim() > 2 else moved
            vectors = means.index_select(1, chosen)
            # Skips layers whose samples are patches or windows, which have no labels.
            if vectors.size(0) == labels.size(0):
                self.vectors.add(vectors, labels)

    def _add_groups(self, input: Tensor) -> None:
        if uses_running(self.module):
            rows = layer_outputs.channels_last(self.module, input).flatten(0, -2)
            chosen = self._chosen.to(rows.device)
            self._inputs.add(rows.index_select(1, chosen))
            if (running := running_of(self.module)) is not None:
                self._running = [tensor[chosen] for tensor in running]
            return
        size, groups = self._sizes
        part = part_of(self.module, input, groups, size)
        self._own_groups.add(part.transformed(self.module)[0])

    def result(self, projections: int) -> LayerDiagnosis:
        if self._inputs.rows.numel():
            part = Part(self._inputs.rows.T, self._running, noisy=False)
            self._own_groups.add(part.transformed(self.module)[0])
        moments, rows = self.moments, self.sample.rows
        sample = rows.numpy()
        r2 = qq_r_squared(rows.T) if rows.size(0) > 1 else torch.full((rows.size(1),), torch.nan)
        w, passed = statistics.shapiro_wilk(sample)
        correlation, varies, labels = moments.correlation, ~moments.constant, self.vectors.labels
        pairs = torch.outer(varies, varies) & ~torch.eye(len(varies), dtype=torch.bool)
        return LayerDiagnosis(
            layer=type(self.module).__name__,
            channels=self.channels,
            watched_channels=rows.size(1),
            observations=moments.count,
            constant_channels=self._chosen[moments.constant].tolist(),
            nonfinite_channels=self._chosen[~moments.mean.isfinite()].tolist(),
            own_groups=self._own_groups.result(),
            skewness=_mean(moments.skewness.abs(), varies),
            kurtosis=_mean(moments.kurtosis, varies),
            qq_r2=_mean(r2, torch.from_numpy(statistics.varying(sample))),
            normal_qq_r2=normal_r_squared(rows.size(0)) if rows.size(0) > 1 else float("nan"),
            shapiro_w=w,
            shapiro_passed=passed,
            joint_distance=statistics.joint_distance(sample, projections, self._seed),
            normal_joint_distance=statistics.normal_joint_distance(rows.size(0)),
            correlation=_mean(correlation.abs(), pairs),
            mutual_information=statistics.mutual_information(sample, projections, self._seed),
            sparsity=float(moments.sparsity.mean()),
            dead_channels=float((moments.zeros == moments.count).double().mean()),
            clustering=None
            if labels is None
            else statistics.clustering(self.vectors.rows.numpy(), labels.numpy()),
            by_channel={
                "channel": self._chosen.tolist(),
                "skewness": moments.skewness.tolist(),
                "kurtosis": moments.kurtosis.tolist(),
                "qq_r2": r2.tolist(),
                "sparsity": moments.sparsity.tolist(),
            },
            sample=sample,
        )


def _mean(values: Tensor, chosen: Tensor) -> float:
    """The mean of the chosen values; NaN if there are none or one is NaN."""
    return float(values[chosen].mean())


def diagnose(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    batches: int | None = None,
    sample_size: int = 2048,
    channels: int = 64,
    projections: int = 64,
    seed: int = 0,
) -> Diagnosis:
    """Measures how normal, independent, sparse and clustered the outputs of a model's layers are,
    and how normal the norm layers' normalization groups are before the affine map.

    Makes one pass in evaluation mode, in memory that does not grow with the data: moments,
    correlations and zeros are over all observations, the other statistics (SciPy's and
    scikit-learn's) over a uniform sample. The model's state is restored.

    An observation is one position of a sample, (batch, height, width) or (batch, token); its
    variables are the channels: the last dimension after a layer normalization or a linear layer,
    dimension 1 after every other norm, a convolution, and a ``LayerNorm2d``. A normalization group
    is what a norm layer normalizes together (:func:`normnorm.groups.groups_of`): in evaluation a
    channel over the whole loader for a layer with running statistics.

    Args:
        model: any module whose input is one tensor.
        loader: yields tensors, or (inputs, labels, ...); clustering needs integer labels (batch,).
        layers: names in ``model.named_modules()``, or one, or a predicate of (name, module); by
            default every normalization layer, torch's and normnorm's.
        batches: the number of batches used; None for all.
        sample_size: observations kept per layer, and the most values of a normalization group.
        channels: the most channels measured per layer, drawn at random, and the most normalization
            groups per batch of layers without running statistics, evenly spaced.
        projections: directions of the joint statistic, pairs of channels of mutual information.
        seed: of the choice of sample, channels, directions and pairs.

    Raises:
        ValueError: unknown layer names, no layer selected, an empty loader, a layer that never ran
            or whose output is not (batch, ...), or a size that is not positive.
        TypeError: a batch, or a layer's output, that is not a tensor.
    """
    numbers = {"sample_size": sample_size, "channels": channels, "projections": projections}
    if batches is not None:
        numbers["batches"] = batches
    for name, value in numbers.items():
        check_integer(name, value)
        if value < 1:
            raise ValueError(f"{name} must be positive; got {value}")
    check_integer("seed", seed)
    chosen = capture.choose_layers(model, layers)
    watched = {
        name: _Watched(module, sample_size, channels, seed) for name, module in chosen.items()
    }
    labels: Tensor | None = None

    def see(name: str, output: Tensor, given: Callable[[], Tensor]) -> None:
        watched[name].add(output, labels, given)

    with capture.watching(model, chosen, see, "normnorm.diagnostics.diagnose"):
        for inputs, labels in capture.batches(loader, model, batches):  # noqa: B007
            model(inputs)
    found = Diagnosis({name: layer.result(projections) for name, layer in watched.items()})
    for name, result in found.layers.items():
        if result.nonfinite_channels:
            warnings.warn(
                f"layer '{name}': {listed(result.nonfinite_channels)} of {result.channels} hold NaN"
                " or infinity; statistics that they enter are NaN",
                RuntimeWarning,
                stacklevel=2,
            )
    return found


def noise_robustness(
    model: nn.Module,
    loader: Iterable[Any],
    layers: str | Sequence[str] | Callable[[str, nn.Module], bool] | None = None,
    *,
    scales: Sequence[float] = (0.1, 0.2, 0.5, 1.0),
    batches: int | None = None,
    seed: int = 0,
) -> dict[str, dict[float, float]]:
    """Measures the relative change of the model's output under noise on one layer's output at a
    time.

    For every layer and scale, adds Gaussian noise with ``scale`` times the standard deviation of
    the layer's output (over the batch) to that output, and measures the change of the model's
    output: ``||f_noisy - f|| / ||f||``, Euclidean norms over the batch, averaged over the batches.
    Eftekhari and Papyan (ICML 2025) report such changes; noise and average are defined here.

    Args:
        model, loader, layers, batches: as for :func:`diagnose`.
        scales: of the noise, in standard deviations of the layer's output.
        seed: of the noise, the same for every layer and scale.

    Returns:
        the relative change by layer and scale; 0 for a scale of 0.

    Raises:
        ValueError, TypeError: as :func:`diagnose`; also for a scale that is negative or not finite,
            and a model whose output is not one tensor.
    """
    for scale in scales:
        check_number("scales", scale)
        if not 0 <= scale < float("inf"):
            raise ValueError(f"scales must be finite and not negative; got {scale}")
    check_integer("seed", seed)
    if batches is not None:
        check_integer("batches", batches)
    chosen = capture.choose_layers(model, layers)
    changes = {name: dict.fromkeys(scales, 0.0) for name in chosen}
    count = 0
    noisy: str | None = None
    scale = 0.0
    generator = torch.Generator()

    def disturb(name: str, output: Tensor, _: Any) -> Tensor | None:
        if name != noisy:
            return None
        noise = torch.randn(output.shape, generator=generator, dtype=torch.float32)
        return output + noise.to(output) * (scale * output.std())

    def run(inputs: Tensor) -> Tensor:
        output = model(inputs)
        if not isinstance(output, Tensor):
            raise TypeError(f"the model must give one tensor; got {type(output).__name__}")
        return output.double()

    with capture.watching(model, chosen, disturb, "normnorm.diagnostics.noise_robustness"):
        for inputs, _ in capture.batches(loader, model, batches):
            noisy = None
            clean = run(inputs)
            for noisy in chosen:
                for scale in scales:
                    generator.manual_seed(seed + count)
                    change = (run(inputs) - clean).norm() / clean.norm()
                    changes[noisy][scale] += float(change)
            count += 1
    return {
        name: {scale: total / count for scale, total in by_scale.items()}
        for name, by_scale in changes.items()
    }
