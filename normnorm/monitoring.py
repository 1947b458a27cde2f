"""What the layers of a model do, step by step, as numbers for a dashboard: :func:`monitor`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normnorm import annealing, reference, watched
from normnorm.backends.reference import transforms_active
from normnorm.checks import check_integer
from normnorm.fused import AddLayerNormalNorm
from normnorm.modules import (
    GroupNormalNorm,
    LayerNormalNorm,
    LayerNormalNorm2d,
    _BatchNormalNorm,
    _InstanceNormalNorm,
    _Transform,
)
from normnorm.quantiles import qq_r_squared
from normnorm.statistics import Row

__all__ = ["Monitor", "monitor"]


@dataclass(frozen=True)
class _Seen:
    """A layer's last input, or a part of it that stands for the rest.

    Attributes:
        values: (groups, elements), the layer's input.
        running: (groups,) each, the mean, variance and lambda that were used; None where the
            layer took them from its input.
        noisy: whether noise was added.
    """

    values: Tensor
    running: tuple[Tensor, Tensor, Tensor] | None
    noisy: bool


def _thin(values: Tensor, dim: int, at_most: int) -> Tensor:
    """At most so many along a dimension, evenly spaced.

    By a step that has no factor in common with the size: a step of an image's width would take
    one column of it, a step of a sequence's length its first token. Where a compiler knows the
    size as a symbol alone, the step is taken as it comes.
    """
    size = values.size(dim)
    step = max(1, math.ceil(size / at_most))
    if not (torch.compiler.is_compiling() and annealing.is_symbolic(size)):
        while 1 < step < size and math.gcd(step, size) > 1:
            step += 1
    return values[(slice(None),) * dim + (slice(None, None, step),)]


def _uses_running(layer: Any) -> bool:
    if isinstance(layer, _BatchNormalNorm):
        return not layer.training and layer.running_mean is not None
    return isinstance(layer, _InstanceNormalNorm) and not (
        layer.training or not layer.track_running_stats
    )


def _groups(layer: Any, input: Tensor, at_most: int) -> Tensor:
    """(groups, elements) of what the layer normalizes together; at most so many groups."""
    if isinstance(layer, _InstanceNormalNorm) and input.dim() == layer._rank - 1:
        input = input.unsqueeze(0)
    if isinstance(layer, _BatchNormalNorm) or _uses_running(layer):
        return _thin(input, 1, at_most).transpose(0, 1).flatten(1)
    # Samples first: what follows may copy.
    input = _thin(input, 0, at_most)
    if isinstance(layer, LayerNormalNorm):
        if isinstance(layer, LayerNormalNorm2d):
            input = input.permute(0, 2, 3, 1)
        rows = input.reshape(-1, math.prod(layer.normalized_shape))
    else:
        groups = layer.num_groups if isinstance(layer, GroupNormalNorm) else input.size(1)
        rows = input.reshape(input.size(0) * groups, -1)
    return _thin(rows, 0, at_most)


def _measures(layer: Any, seen: _Seen) -> dict[str, float]:
    """What the layer made of its input, before noise and affine map."""
    values = seen.values.cpu().double()
    frozen = None
    if seen.running is not None:
        mean, var, lmbda = (tensor.cpu() for tensor in seen.running)
        frozen = reference.pack_running(mean, var, lmbda, float(layer.eps), torch.float64)
    # Every group a row: the layer kind whose groups are rows.
    output, statistics = reference.normal_norm(
        values, kind="layer", normalized_ndim=1, eps=float(layer.eps), alpha=layer.alpha,
        order=layer.order, transform_eps=layer.transform_eps, noise_train=1.0,
        z=torch.zeros_like(values), frozen=frozen,
    )  # fmt: skip
    lmbda = statistics[Row.LMBDA]
    scale = statistics[Row.NOISE_SCALE] if seen.noisy else torch.zeros(1)
    deviations = output - output.mean(1, keepdim=True)
    deviations = deviations / deviations.square().mean(1, keepdim=True).sqrt()
    found = {
        "lmbda": lmbda.mean(),
        "lmbda_min": lmbda.min(),
        "lmbda_max": lmbda.max(),
        "noise_scale": scale.mean(),
        "skewness": deviations.pow(3).mean(1).abs().nanmean(),
        "excess_kurtosis": (deviations.pow(4).mean(1) - 3.0).nanmean(),
        "qq_r2": qq_r_squared(output).nanmean(),
    }
    return {name: value.item() for name, value in found.items()}


class Monitor:
    """What :func:`monitor` gives; its methods are for use inside the ``with`` block, or after.

    Args:
        model: whose layers are watched.
        layers: these, by name.
        groups, elements: how large a part of a layer's input is kept.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], groups: int, elements: int
    ) -> None:
        self._layers = layers
        self._groups = groups
        self._elements = elements
        # Every name from the start: compiled code takes note of which there are.
        self._seen: dict[str, _Seen | None] = dict.fromkeys(layers)
        self._watch = watched.Watch(model, layers, self._observe, "normnorm.monitor")

    def _observe(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        # Slices and one small copy: nothing here waits for a device or draws a random number.
        input = args[0] if args else kwargs["input"]
        if isinstance(layer, AddLayerNormalNorm):
            input = output[1]  # the sum is what was normalized
        if input.is_meta or input.numel() == 0:
            return
        if not torch.compiler.is_compiling() and transforms_active():
            return
        with torch.no_grad():
            values = _thin(_groups(layer, input.detach(), self._groups), 1, self._elements)
            running = None
            if _uses_running(layer):
                running = (
                    _thin(layer.running_mean, 0, self._groups).clone(),
                    _thin(layer.running_var, 0, self._groups).clone(),
                    _thin(layer.running_lmbda, 0, self._groups).clone(),
                )
            noisy = layer.training and layer.noise_train > 0.0
            seen = _Seen(values.clone(), running, noisy)
            if not watched.recomputing():
                self._seen[name] = seen

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The last step's numbers, flat: "NAME/lmbda", "NAME/qq_r2", ... for each layer that ran.

        The one place that waits for the device. The arithmetic is done in float64 on the host.

        Args:
            prefix: put before every key, such as "train/".

        Raises:
            RuntimeError: no layer has run yet, or none of a compiled module has: the model may
                have been compiled before it was monitored, and such code calls no hooks.
        """
        self._watch.require_ran()
        numbers = {}
        for name, seen in self._seen.items():
            if seen is None:
                continue
            for measure, value in _measures(self._layers[name], seen).items():
                numbers[f"{prefix}{name}/{measure}" if name else f"{prefix}{measure}"] = value
        return numbers

    def clear(self) -> None:
        """Forgets what was seen, so that ``scalars`` speaks of layers that ran since."""
        self._seen.update(dict.fromkeys(self._seen))


@contextmanager
def monitor(model: nn.Module, *, groups: int = 8, elements: int = 4096) -> Iterator[Monitor]:
    """Watches the normality layers of a model while the block runs.

    ::

        with normnorm.monitor(model) as watch:
            for step, batch in enumerate(loader):
                train_step(batch)
                if step % 100 == 0:
                    wandb.log(watch.scalars(), step=step)
                    # or: writer.add_scalars("normality", watch.scalars(), step)

    A forward hook keeps a part of each layer's last input, at most ``groups * elements`` values,
    evenly spaced, without waiting for a device; ``Monitor.scalars`` computes from it:

    ==================  ====================================================================
    lmbda               the mean over the groups kept; lmbda_min and lmbda_max, the extremes
    noise_scale         mean(abs(x - mean(x))), in units of which noise is added; 0 where
                        none is
    skewness            of the normalized values, its absolute value, mean over the groups
    excess_kurtosis     of the same, mean over the groups
    qq_r2               R^2 of their quantile-quantile plot against the normal, mean over the
                        groups
    ==================  ====================================================================

    Normalized values are those before noise and affine map. Where a group has no more than
    ``elements`` elements the numbers are those of the whole group; otherwise they are estimates
    from a part of it. Groups of equal values have no shape and are left out of the means.

    It works in training and evaluation, under no_grad and autocast, and under torch.compile if
    it is entered before the first call of the compiled model (not with CUDA graphs, which would
    overwrite what was kept). Under torch.func transforms nothing is recorded, nor is what
    activation checkpointing runs again, nor what copies of the model do. In a process group each
    rank sees its own shard.

    Args:
        model: with layers of ours; those that are replaced later are not seen.
        groups: how many groups of a layer to keep.
        elements: how many elements of a group to keep.

    Raises:
        TypeError: ``model`` is not a module, or a size no int.
        ValueError: no normality layer in the model, or a part that is too small to measure.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    check_integer("groups", groups)
    check_integer("elements", elements)
    if groups < 1 or elements < 8:
        raise ValueError(
            "groups must be at least 1 and elements at least 8; "
            f"got groups={groups}, elements={elements}"
        )
    layers = watched.named_layers(model, lambda _, module: isinstance(module, _Transform))
    if not layers:
        raise ValueError("the model has no normality layer; normnorm.replace_norms puts them in")
    watch = Monitor(model, layers, groups, elements)
    try:
        yield watch
    finally:
        watch._watch.remove()
