"""The ops with ``noise_train`` as a tensor, for compiled graphs in which it changes.

A compiler treats a float argument of an op as a constant, so each new value would recompile the
graph; a one-element tensor is an ordinary input. The first graph of a layer has ``noise_train`` as
a constant, which costs nothing. Once the attribute has changed, the compiler makes it symbolic, and
the graph takes it through these ops. The tensor is on the host, so reading it needs no wait.

``normnorm::normal_norm_forward.annealed`` and ``normnorm::normal_norm_backward.annealed`` have
the schemas of :mod:`normnorm.ops` in all else, and call those ops.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import ops
from .config import Config
from .namespace import NAMESPACE, OPS

# Index of noise_train from the end of every argument list.
_NOISE_TRAIN = Config._fields.index("noise_train") - len(Config._fields)


def is_symbolic(noise_train: float) -> bool:
    """Whether the active compiler treats the value as variable."""
    # Local import: it imports sympy, which a compiler has already done.
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not has_static_value(noise_train)


def _replaced(arguments: tuple[Any, ...], noise_train: Any) -> tuple[Any, ...]:
    return (*arguments[:_NOISE_TRAIN], noise_train, *arguments[_NOISE_TRAIN + 1 :])


def with_tensor(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of the op with the symbolic ``noise_train`` as a tensor, an input of graphs."""
    one = torch.ones((), dtype=torch.float64)
    return _replaced(arguments, one * arguments[_NOISE_TRAIN])


def _with_number(op: Callable[..., Any], number: Callable[[Any], float]) -> Callable[..., Any]:
    """An op that takes a tensor from one that takes a number."""
    return lambda *arguments: op(*_replaced(arguments, number(arguments[_NOISE_TRAIN])))


library = torch.library.Library(NAMESPACE, "FRAGMENT")
for _name in ("normal_norm_forward", "normal_norm_backward"):
    _annealed = f"{_name}.annealed"
    _schema = ops.SCHEMAS[_name].replace("float noise_train", "Tensor noise_train")
    library.define(_annealed + _schema, tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(_annealed, _with_number(getattr(ops, _name), float), "CompositeExplicitAutograd")
    # A fake tensor has no number; any weight of noise gives the same shapes.
    _fake = _with_number(ops.FAKES[_name], lambda _: 1.0)
    torch.library.register_fake(f"{NAMESPACE}::{_annealed}", _fake, lib=library)

normal_norm_forward = OPS.normal_norm_forward.annealed
