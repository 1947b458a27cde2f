"""Norm classes that normnorm does not know, and what a user says stands for them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from normnorm.modules import _Transform

__all__ = ["Registered", "register_norm", "registered", "registered_base"]

Convert = Callable[[Any], nn.Module]


class Registered(NamedTuple):
    """A class with the functions that exchange its layers."""

    cls: type[nn.Module]
    convert: Convert
    restore: Convert | None


# By the handle's number, the last one for a class is in force.
_REGISTERED: OrderedDict[int, Registered] = OrderedDict()


def register_norm(
    cls: type[nn.Module], convert: Convert, restore: Convert | None = None
) -> RemovableHandle:
    """Teaches :func:`replace_norms` and :func:`restore_norms` a class of layers.

    ::

        def convert(norm):
            new = normnorm.LayerNormalNorm(norm.weight.shape, norm.variance_epsilon, bias=False)
            new.weight = norm.weight  # the parameter itself: an optimizer may hold it
            return new

        def restore(layer):
            old = CohereLayerNorm(layer.normalized_shape, layer.eps)
            old.weight = layer.weight
            return old

        normnorm.register_norm(CohereLayerNorm, convert, restore)

    It holds for layers of exactly that class, in this process, and comes before what normnorm
    knows by itself. ``replace_norms`` itself copies the training flag and the forward and
    backward hooks to the new layer and applies the settings it was given; other settings stay as
    ``convert`` returned them.

    Args:
        cls: the class of the layers.
        convert: makes a layer of normnorm, or of a class derived from one, for such a layer.
        restore: makes a layer of ``cls`` for what ``convert`` has made; None if there is no way
            back. Called by :func:`restore_norms` in a process where ``cls`` is registered. A
            layer with running statistics is asked for ``float(layer.eps)``.

    Returns:
        A handle: its ``remove()`` undoes this, and ``with register_norm(...):`` does at the end of
        the block. Until then a later call for the same class takes the place of an earlier one.

    Raises:
        TypeError: ``cls`` is no class of modules, or a function is not callable.
        ValueError: ``cls`` is a layer of normnorm already.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise TypeError(f"cls must be a class derived from torch.nn.Module; got {cls!r}")
    if issubclass(cls, _Transform):
        raise ValueError(f"{cls.__name__} is a layer of normnorm, or derived from one, already")
    if not callable(convert):
        raise TypeError(f"convert must be a function of a layer; got {convert!r}")
    if restore is not None and not callable(restore):
        raise TypeError(f"restore must be a function of a layer, or None; got {restore!r}")
    handle = RemovableHandle(_REGISTERED)
    _REGISTERED[handle.id] = Registered(cls, convert, restore)
    return handle


def registered(cls: type[nn.Module]) -> Registered | None:
    """What was registered last for exactly this class."""
    return next((known for known in reversed(_REGISTERED.values()) if known.cls is cls), None)


def registered_base(cls: type[nn.Module]) -> type[nn.Module] | None:
    """A registered class that this one is derived from."""
    return next((known.cls for known in _REGISTERED.values() if issubclass(cls, known.cls)), None)
