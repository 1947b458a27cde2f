"""The ops with the weight of the noise as a tensor, for compiled graphs in which it changes.

A compiler takes a float argument of an op for a constant: each new value would compile the graph
again. A one-element tensor is an input like any other. So the first graph of a layer has its
``noise_train`` as a constant, which costs nothing; once the attribute has changed, the compiler
makes it symbolic, and the graph then takes it through these ops. The tensor lives on the host,
where reading it waits for no device.

``normnorm::normal_norm_forward.annealed`` and ``normnorm::normal_norm_backward.annealed`` have
the schemas of :mod:`normnorm.ops` in all else, and hand over to those ops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normnorm import ops
from normnorm.config import Config

__all__ = ["as_tensor", "is_symbolic", "normal_norm_forward"]

# Where noise_train stands, from the end of every argument list.
_NOISE_TRAIN = Config._fields.index("noise_train") - len(Config._fields)


def is_symbolic(noise_train: float) -> bool:
    """Whether the compiler at work treats the number as one that changes."""
    # Here and not above, since it imports sympy, which a compiler has done long since.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(noise_train)


def as_tensor(noise_train: float) -> Tensor:
    """A symbolic number as a tensor, by an operation that compilers turn into an input."""
    return torch.ones((), dtype=torch.float64) * noise_train


def _with_number(arguments: tuple[Any, ...], noise_train: float | None = None) -> tuple[Any, ...]:
    """The arguments of the op itself: the tensor's number, or the one given."""
    number = float(arguments[_NOISE_TRAIN]) if noise_train is None else noise_train
    return (*arguments[:_NOISE_TRAIN], number, *arguments[_NOISE_TRAIN + 1 :])


def _implementation(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: op(*_with_number(arguments))


def _fake(fake: Callable[..., Any]) -> Callable[..., Any]:
    # A fake tensor has no number; any weight of noise gives the same shapes.
    return lambda *arguments: fake(*_with_number(arguments, 1.0))


_library = torch.library.Library("normnorm", "FRAGMENT")
for _name, _op in (
    ("normal_norm_forward", ops.normal_norm_forward),
    ("normal_norm_backward", ops.normal_norm_backward),
):
    _schema = ops.SCHEMAS[_name].replace("float noise_train", "Tensor noise_train")
    _library.define(f"{_name}.annealed{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(f"{_name}.annealed", _implementation(_op), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"normnorm::{_name}.annealed", _fake(ops.FAKES[_name]), lib=_library
    )
ops.register_gradients(_library, "annealed")

normal_norm_forward = torch.ops.normnorm.normal_norm_forward.annealed
