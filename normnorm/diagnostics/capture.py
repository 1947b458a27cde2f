"""Selection of layers, and hooks that capture their outputs for a loader's batches."""

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import layer_outputs
from ..groups import input_of
from ..running import modes

# The default layers: torch's norm layers and normnorm's, which derive from the same bases.
NORM_LAYERS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def choose_layers(model: nn.Module, layers: layer_outputs.Layers | None) -> dict[str, nn.Module]:
    """The selected layers (:func:`normnorm.layer_outputs.named_layers`; None for every norm layer),
    by name; ValueError if there are none."""
    if layers is None:
        chosen = layer_outputs.named_layers(model, lambda _, layer: isinstance(layer, NORM_LAYERS))
        wanted = "a normalization layer"
    else:
        chosen = layer_outputs.named_layers(model, layers)
        wanted = "a layer that the predicate accepts" if callable(layers) else "one of no names"
    if not chosen:
        raise ValueError(f"the model has nothing to watch: {wanted} was wanted; name some layers")
    return chosen


def batches(
    loader: Iterable[Any], model: nn.Module, limit: int | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(inputs, labels or None) from a loader of tensors or of (inputs, labels, ...), on the
    model's device. TypeError for any other batch, ValueError for an empty loader."""
    parameter = next(model.parameters(), next(model.buffers(), None))
    device = torch.device("cpu") if parameter is None else parameter.device
    empty = True
    for batch in itertools.islice(loader, limit):
        empty = False
        inputs, *rest = batch if isinstance(batch, (tuple, list)) and batch else (batch,)
        labels = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].dim() == 1 else None
        if not isinstance(inputs, Tensor):
            raise TypeError(
                f"a batch must be a tensor or (inputs, labels); got {type(inputs).__name__}"
            )
        yield inputs.to(device), labels
    if empty:
        raise ValueError("the loader gave no batch")


@contextmanager
def watching(
    model: nn.Module,
    layers: dict[str, nn.Module],
    see: Callable[[str, Tensor, Callable[[], Tensor]], Tensor | None],
    owner: str,
) -> Iterator[None]:
    """Runs the block in evaluation mode without gradients, with compiled code uncompiled. ``see``
    is called with the name and output of each of ``layers`` and a function that returns a norm
    layer's input (:func:`normnorm.groups.input_of`); it may return a replacement output. Afterwards
    the model's state is restored. ValueError if a layer never ran or had an empty output."""
    before = modes(model)
    silent = set(layers)

    def seen(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        given = layer_outputs.tensor_of(name, module, output)
        if given.numel() > 0:
            silent.discard(name)
        other = see(name, given, partial(input_of, module, args, kwargs, output))
        if other is None or isinstance(output, Tensor):
            return other
        return (other, *output[1:])

    watch = layer_outputs.Watch(model, layers, seen, owner)
    # Compiled functions run eagerly, with all hooks. Importing torch._dynamo would take seconds.
    compiles = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    try:
        model.eval()
        with torch.no_grad(), eager:
            yield
    finally:
        watch.remove()
        for module, name, value in before:
            setattr(module, name, value)
    if silent:
        names = ", ".join(repr(name) for name in layers if name in silent)
        raise ValueError(f"nothing passed through {names}")
