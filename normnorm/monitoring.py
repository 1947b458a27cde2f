"""Statistics of a model's normality layers during training, for a dashboard: :func:`monitor`."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from normnorm import annealing, layer_outputs, modules, reference
from normnorm.backends.reference import transforms_active
from normnorm.checks import check_integer, check_is_module
from normnorm.fused import AddLayerNormalNorm
from normnorm.modules import _BatchNormalNorm, _InstanceNormalNorm, _Transform
from normnorm.quantiles import qq_r_squared
from normnorm.statistics import Row


class _Seen(NamedTuple):
    """What is kept of a layer's last input."""

    # (groups, elements)
    values: Tensor
    # (groups,) each: the mean, variance and lambda that were used; None if estimated from the input
    running: list[Tensor] | None
    # whether noise was added
    noisy: bool


def _thin(values: Tensor, dim: int, at_most: int) -> Tensor:
    """At most ``at_most`` slices along a dimension, evenly spaced.

    The step is coprime to the size: a step of an image's width would select one column, a step of a
    sequence's length only first tokens. A symbolic size under a compiler uses the plain step.
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
    """(groups, elements) of at most ``at_most`` normalization groups."""
    if isinstance(layer, _InstanceNormalNorm) and input.dim() == layer._rank - 1:
        input = input.unsqueeze(0)
    if isinstance(layer, _BatchNormalNorm) or _uses_running(layer):
        return _thin(input, 1, at_most).transpose(0, 1).flatten(1)
    # Thins samples first, because the operations below may copy.
    input = _thin(input, 0, at_most)
    if isinstance(layer, modules.LayerNormalNorm):
        if isinstance(layer, modules.LayerNormalNorm2d):
            input = input.permute(0, 2, 3, 1)
        rows = input.reshape(-1, math.prod(layer.normalized_shape))
    else:
        groups = layer.num_groups if isinstance(layer, modules.GroupNormalNorm) else input.size(1)
        rows = input.reshape(input.size(0) * groups, -1)
    return _thin(rows, 0, at_most)


def _measures(layer: Any, seen: _Seen) -> dict[str, float]:
    """Statistics of the layer's output before noise and affine map."""
    values = seen.values.cpu().double()
    frozen = None
    if seen.running is not None:
        mean, var, lmbda = (tensor.cpu() for tensor in seen.running)
        frozen = reference.pack_running(mean, var, lmbda, float(layer.eps), torch.float64)
    # As kind layer, whose normalization groups are rows.
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
    """The context of :func:`monitor`; usable inside the ``with`` block and after it."""

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], groups: int, elements: int
    ) -> None:
        self._layers = layers
        self._groups = groups
        self._elements = elements
        # All keys from the start: compiled code guards on them.
        self._seen: dict[str, _Seen | None] = dict.fromkeys(layers)
        self._watch = layer_outputs.Watch(model, layers, self._observe, "normnorm.monitor")

    def _observe(self, name: str, layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        # Slices and one small copy: no device synchronization, no random numbers.
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
                used = layer.running_mean, layer.running_var, layer.running_lmbda
                running = [_thin(tensor, 0, self._groups).clone() for tensor in used]
            noisy = layer.training and layer.noise_train > 0.0
            seen = _Seen(values.clone(), running, noisy)
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
        """Discards the recorded inputs, so that ``scalars`` covers only layers that run
        afterwards."""
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
    qq_r2               R^2 of the normalized values' Q-Q plot against the normal, mean over
                        the groups
    ==================  ====================================================================

    Normalized values are those before noise and affine map. Statistics of groups with more than
    ``elements`` elements are estimates from a part. Groups of equal values are left out of the
    means.

    Works in training and evaluation, under no_grad and autocast, and under torch.compile if entered
    before the first call of the compiled model (not with CUDA graphs, which would overwrite the
    kept values). Passes under torch.func transforms, passes repeated by activation checkpointing,
    and passes of copies of the model are not recorded. In a process group each rank records its own
    shard.

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
