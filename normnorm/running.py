"""The running statistics of a model's layers: freezing, and re-estimation from data."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .checks import check_is_module
from .modules import _RunningNorm, _Transform


def freeze_statistics(model: nn.Module) -> int:
    """Freezes the running statistics of a model's normality layers, in place.

    A frozen layer stays in evaluation mode, also after ``model.train()``: it normalizes by its
    running mean, variance and lambda, does not update them, and adds no noise. Its weight and bias
    still train unless their ``requires_grad`` is False. Copies, pickles, loading a ``state_dict``
    and :func:`normnorm.convert_sync` keep it frozen. Torch's batch layers are unchanged.

    Args:
        model: a model or a single layer.

    Returns:
        The number of frozen layers (batch and instance layers that keep running statistics).

    Raises:
        TypeError: ``model`` is not a module.
    """
    layers = [layer for layer in _running(model) if layer.track_running_stats]
    for layer in layers:
        if layer._frozen_mode is None:
            layer._frozen_mode, layer.training = layer.training, False
    return len(layers)


def unfreeze_statistics(model: nn.Module) -> int:
    """Reverses :func:`freeze_statistics`, in place.

    A layer returns to the mode set by the last ``train()`` or ``eval()``.

    Argument and errors are those of :func:`freeze_statistics`.

    Returns:
        The number of layers that were frozen.
    """
    layers = [layer for layer in _running(model) if layer._frozen_mode is not None]
    for layer in layers:
        layer.training = layer._frozen_mode
        del layer._frozen_mode
    return len(layers)


def modes(model: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, attribute, value) for all attributes of a model that train() and eval() set."""
    return [
        (module, name, value)
        for module in model.modules()
        for name in ("training", "_frozen_mode")
        if (value := getattr(module, name, None)) is not None
    ]


def _running(model: nn.Module) -> list[Any]:
    check_is_module(model)
    return [module for module in model.modules() if isinstance(module, _RunningNorm)]


def _to(value: Any, device: torch.device | str | int | None) -> Any:
    return value.to(device) if device is not None and hasattr(value, "to") else value


def _forward(model: nn.Module, batch: Any, device: torch.device | str | int | None) -> None:
    if isinstance(batch, Mapping):
        model(**{name: _to(value, device) for name, value in batch.items()})
        return
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError(
                "a batch that is a list must hold the model's input first; got an empty one"
            )
        batch = batch[0]
    model(_to(batch, device))


def _put_back(layers: Iterable[list[tuple[Tensor, Tensor]]]) -> None:
    """Copies each saved value back to its buffer, for every layer."""
    for buffers in layers:
        for buffer, value in buffers:
            buffer.copy_(value)


@torch.no_grad()
def update_stats(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | int | None = None,
    *,
    noise: bool = True,
) -> int:
    """Re-estimates the running statistics, lambda included, as the average over a loader.

    For weights without matching statistics, such as averaged or loaded ones, or a model whose norms
    were just replaced. ``torch.optim.swa_utils.update_bn`` supports torch's batch layers only; this
    function updates torch's and normnorm's in one pass.

    The statistics of every layer that is not frozen are reset and averaged over all batches with
    equal weight; a layer that processes no batch keeps its statistics. The model runs in training
    mode without gradients, with dropout active, as under ``update_bn``. Training flags, momenta and
    noise weights are restored; after an exception the statistics are too.

    Args:
        loader: yields batches, each a tensor, a list or tuple whose first element is the model's
            input, or a mapping, passed as keyword arguments.
        model: with layers that keep running statistics; otherwise it is not run.
        device: where to move the input; None leaves it.
        noise: whether normnorm layers add their noise; without, features are free of noise.

    Returns:
        The number of batches averaged.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: a loader without batches, or no layer with running statistics processed one.
    """
    check_is_module(model)
    layers: list[Any] = [
        layer
        for layer in model.modules()
        if isinstance(layer, (_RunningNorm, _BatchNorm))
        and layer.running_mean is not None
        and getattr(layer, "_frozen_mode", None) is None  # frozen statistics stay
    ]
    if not layers:
        return 0
    noisy = [layer for layer in model.modules() if isinstance(layer, _Transform)]
    attributes = [
        *modes(model),
        *((layer, "momentum", layer.momentum) for layer in layers),
        *((layer, "noise_train", layer.noise_train) for layer in noisy),
    ]
    before = {
        layer: [(buffer, buffer.clone()) for buffer in layer.buffers(recurse=False)]
        for layer in layers
    }
    count = 0
    try:
        model.train()
        for layer in layers:
            layer.reset_running_stats()
            layer.momentum = None
        if not noise:
            for transform in noisy:
                transform.noise_train = 0.0
        for batch in loader:
            _forward(model, batch, device)
            count += 1
        if count == 0:
            raise ValueError("the loader gave no batches to average")
        unseen = [before[layer] for layer in layers if layer.num_batches_tracked == 0]
        if len(unseen) == len(layers):
            raise ValueError(
                f"none of the {len(layers)} layers with running statistics saw a batch: they "
                "stay in evaluation mode when the model trains, or are in parts that did not run"
            )
        _put_back(unseen)
    except BaseException:
        _put_back(before.values())
        raise
    finally:
        for module, name, value in attributes:
            setattr(module, name, value)
    return count
