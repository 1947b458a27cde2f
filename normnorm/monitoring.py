"""Statistics of a model's normality layers during training, for a dashboard: :func:`monitor`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from . import layer_outputs
from .backends.reference import transforms_active
from .checks import check_integer, check_is_module
from .groups import Part, input_of, part_of
from .modules import _Transform
from .quantiles import normality
from .statistics import Row


def _measures(layer: Any, seen: Part) -> dict[str, float]:
    """Statistics of the layer's output before noise and affine map."""
    output, statistics = seen.transformed(layer)
    assert statistics is not None
    lmbda = statistics[Row.LMBDA]
    scale = statistics[Row.NOISE_SCALE] if seen.noisy else torch.zeros(1)
    shape = {name: values.nanmean() for name, values in normality(output).items()}
    found = {
        "lmbda": lmbda.mean(),
        "lmbda_min": lmbda.min(),
        "lmbda_max": lmbda.max(),
        "noise_scale": scale.mean(),
        "skewness": shape["skewness"],
        "excess_kurtosis": shape["kurtosis"] - 3.0,
        "qq_r2": shape["qq_r2"],
    }
    return {name: value.item() for name, value in found.items()}


class Monitor:
    """The context of :func:`monitor`; usable inside the ``with`` block and after it."""

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], groups: int, elements: int
    ) -> None:
        self._layers = layers
        self._groups = groups
        self._elements = elements
        # All keys from the start: compiled code guards on them.
        self._seen: dict[str, Part | None] = dict.fromkeys(layers)
        self._watch = layer_outputs.Watch(model, layers, self._observe, "normnorm.monitor")

    def _observe(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        # Slices and one small copy: no device synchronization, no random numbers.
        input = input_of(layer, args, kwargs, output)
        if input.is_meta or input.numel() == 0:
            return
        if not torch.compiler.is_compiling() and transforms_active():
            return
        with torch.no_grad():
            seen = part_of(layer, input.detach(), self._groups, self._elements)
            if not layer_outputs.recomputing():
                self._seen[name] = seen

    def scalars(self, prefix: str = "") -> dict[str, float]:
        """The last step's statistics as "NAME/lmbda", "NAME/qq_r2", ... for each layer that ran.

        Synchronizes with the device; computes in float64 on the host.

        Args:
            prefix: of every key, such as "train/".

        Raises:
            RuntimeError: no layer has run yet, or none in a compiled module: a model that was
                compiled before it was monitored calls no hooks.
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
        """Discards the recorded inputs: ``scalars`` then covers only layers that run afterwards."""
        self._seen.update(dict.fromkeys(self._seen))


@contextmanager
def monitor(model: nn.Module, *, groups: int = 8, elements: int = 4096) -> Iterator[Monitor]:
    """Records statistics of a model's normality layers while the block runs.

    ::

        with normnorm.monitor(model) as watch:
            for step, batch in enumerate(loader):
                train_step(batch)
                if step % 100 == 0:
                    wandb.log(watch.scalars(), step=step)
                    # or: writer.add_scalars("normality", watch.scalars(), step)

    A forward hook keeps a part of each layer's last input, at most ``groups * elements`` evenly
    spaced values, without synchronizing with the device; ``Monitor.scalars`` computes from it:

    ==================  ====================================================================
    lmbda               the mean over the groups kept; lmbda_min and lmbda_max, the extremes
    noise_scale         mean(abs(x - mean(x))), the unit of the noise; 0 without noise
    skewness            absolute skewness of the normalized values, mean over the groups
    excess_kurtosis     of the normalized values, mean over the groups
    qq_r2               R^2 of the normalized values' normal Q-Q plot, mean over the groups
    ==================  ====================================================================

    Normalized values are those before noise and affine map. Statistics of groups with more than
    ``elements`` elements are estimates from a part. Means leave out groups of equal values.

    Works in training and evaluation, under no_grad and autocast, and under torch.compile if entered
    before the first call of the compiled model (not with CUDA graphs, which would overwrite the
    kept values). Passes under torch.func transforms, passes repeated by activation checkpointing,
    and passes of copies of the model are not recorded. Each rank records its own shard.

    Args:
        model: with normnorm layers; layers that are replaced later are not recorded.
        groups: how many groups of a layer to keep.
        elements: how many elements of a group to keep.

    Raises:
        TypeError: ``model`` is not a module, or a size no int.
        ValueError: no normality layer in the model, or a part that is too small to measure.
    """
    check_is_module(model)
    check_integer("groups", groups)
    check_integer("elements", elements)
    if groups < 1 or elements < 8:
        raise ValueError(
            "groups must be at least 1 and elements at least 8; "
            f"got groups={groups}, elements={elements}"
        )
    layers = layer_outputs.named_layers(model, lambda _, module: isinstance(module, _Transform))
    if not layers:
        raise ValueError("the model has no normality layer; normnorm.replace_norms puts them in")
    watch = Monitor(model, layers, groups, elements)
    try:
        yield watch
    finally:
        watch._watch.remove()
