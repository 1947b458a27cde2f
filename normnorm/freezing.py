"""Freezing the running statistics of a model's layers, for fine-tuning."""

from __future__ import annotations

from torch import nn

from normnorm.modules import _RunningNorm

__all__ = ["freeze_statistics", "unfreeze_statistics"]


def freeze_statistics(model: nn.Module) -> int:
    """Freezes the running statistics of a model's normality layers, in place.

    A frozen layer stays in evaluation mode, also after ``model.train()``: it normalizes by its
    running mean, variance and lambda, does not update them, and adds no noise. Its weight and bias
    still train unless their ``requires_grad`` is False. Copies, pickles and
    :func:`normnorm.convert_sync` keep a layer frozen; loading a ``state_dict`` sets its statistics
    and leaves it frozen.

    Torch's batch layers are unchanged.

    Args:
        model: a model or a single layer.

    Returns:
        The number of frozen layers: batch and instance layers that keep running statistics.

    Raises:
        TypeError: ``model`` is not a module.
    """
    layers = [layer for layer in _running(model) if layer.track_running_stats]
    for layer in layers:
        layer._freeze()
    return len(layers)


def unfreeze_statistics(model: nn.Module) -> int:
    """Reverses :func:`freeze_statistics`, in place.

    A layer returns to the mode set by the last ``train()`` or ``eval()``.

    Args:
        model: a model or a single layer.

    Returns:
        The number of layers that were frozen.

    Raises:
        TypeError: ``model`` is not a module.
    """
    layers = [layer for layer in _running(model) if layer._frozen_mode is not None]
    for layer in layers:
        layer._unfreeze()
    return len(layers)


def _running(model: nn.Module) -> list[_RunningNorm]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    return [module for module in model.modules() if isinstance(module, _RunningNorm)]
