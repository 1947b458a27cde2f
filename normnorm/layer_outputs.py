"""Which of a model's layers a caller means, hooks on them, and how what they give out is read.

What :func:`normnorm.monitor`, :class:`normnorm.PER` and :mod:`normnorm.diagnostics` have in
common: the same layers, hooks with the same limits, the same numbers for a vector of channels.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from normnorm.fused import AddLayerNormalNorm
from normnorm.modules import _InstanceNormalNorm

__all__ = ["Hook", "Watch", "channels_last", "named_layers", "recomputing", "tensor_of"]

# As in Conv1d, LayerNorm2d, LayerNormAct2dFp32: how many dimensions stand behind (batch, channels).
_POSITIONS = re.compile(r"([123])d(?![a-z])")
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, _InstanceNormalNorm)


def named_layers(
    model: nn.Module, layers: str | Iterable[str] | Callable[[str, nn.Module], bool]
) -> dict[str, nn.Module]:
    """The layers that are meant, by name; none where the names or the predicate choose none.

    Args:
        model: whose ``named_modules`` are meant, without the "_orig_mod." that torch.compile puts
            into their names.
        layers: a name, names, or a predicate of (name, module). A module that the model uses
            under several names goes by each of them, and is offered to a predicate once.

    Raises:
        ValueError: a name is not the model's.
    """
    if callable(layers):
        once = ((_plain(name), module) for name, module in model.named_modules())
        return {name: module for name, module in once if layers(name, module)}
    every = model.named_modules(remove_duplicate=False)
    modules = {_plain(name): module for name, module in every}
    names = [layers] if isinstance(layers, str) else list(layers)
    unknown = [name for name in names if _plain(name) not in modules]
    if unknown:
        raise ValueError(f"the model has no layer named {', '.join(map(repr, unknown))}")
    return {name: modules[_plain(name)] for name in names}


def _plain(name: str) -> str:
    """A module's name as it is without torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def recomputing() -> bool:
    """Whether a backward pass is running: a forward pass inside it repeats an earlier one, for
    either kind of activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Hook:
    """A hook of one module that does nothing for any other.

    A copy of a module has the module's hooks: a shallow copy and a replica of nn.DataParallel
    share them, a deep copy and a pickled module have copies of them, which do nothing.

    Args:
        module: whose calls are meant.
        function: called with ``first`` and the hook's arguments; what it returns is handed on.

    Attributes:
        ran: whether the module was called; written only, since compiled code would be compiled
            again for another value that it reads.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], *first: Any) -> None:
        self._module = module
        self._function = function
        self._first = first
        self.ran = False

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if module is not self._module:
            return None
        self.ran = True
        return self._function(*self._first, module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _inert_hook, ()


def _inert_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    """The hook of a copy."""


class Watch:
    """Forward hooks on layers, and which of these layers ran.

    A copied or unpickled watch watches nothing.

    Args:
        model: whose layers they are.
        layers: by name.
        see: called as ``see(name, layer, args, kwargs, output)`` after each forward pass of a
            layer, a recomputation among them (:func:`recomputing`); what it returns, unless None,
            takes the place of the output.
        owner: whom the hooks serve, for the sentences of errors.

    Raises:
        TypeError: a layer is a module of TorchScript, whose code calls no hooks.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        see: Callable[[str, nn.Module, Any, Any, Any], Any],
        owner: str,
    ) -> None:
        for name, layer in layers.items():
            if isinstance(layer, torch.jit.ScriptModule):
                raise TypeError(
                    f"{owner} cannot watch {name!r}: it is a module of TorchScript, whose code "
                    "calls no hooks; give the model as it was before torch.jit"
                )
        self._owner = owner
        self._compiled = _compiled_layers(model, layers)  # of which none has run yet
        self._hooks = {name: Hook(layer, see, name) for name, layer in layers.items()}
        self._handles = [
            layer.register_forward_hook(self._hooks[name], with_kwargs=True)
            for name, layer in layers.items()
        ]

    def require_ran(self, afresh: bool = False) -> None:
        """Makes sure that what the hooks have seen is what ran.

        Args:
            afresh: to ask at the next call only about what ran since this one.

        Raises:
            RuntimeError: no layer ran, or one of a compiled module never has: then other code than
                the layers' own ran in their place.
        """
        ran = {name for name, hook in self._hooks.items() if hook.ran}
        self._compiled -= ran
        if not ran or self._compiled:
            silent = ", ".join(map(repr, sorted(self._compiled)))
            raise RuntimeError(
                f"{f'{silent} was not seen' if ran else 'no layer was seen'}: code compiled before "
                f"{self._owner} began does not call its hooks, nor does a copy of the model, a "
                f"replica of nn.DataParallel, or a direct call of forward. Let {self._owner} begin "
                "before the first call of the compiled code, or call torch.compiler.reset() after "
                "it began"
            )
        if afresh:
            for hook in self._hooks.values():
                hook.ran = False

    def remove(self) -> None:
        """Takes the hooks off the layers."""
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (nn.Module(), {}, _nothing, self._owner)


def _compiled_layers(model: nn.Module, layers: dict[str, nn.Module]) -> set[str]:
    """The layers that are, or are inside, a module given to torch.compile."""
    inside = {
        inner
        for module in model.modules()
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None
        for inner in module.modules()
    }
    return {name for name, layer in layers.items() if layer in inside}


def tensor_of(name: str, module: nn.Module, output: Any) -> Tensor:
    """What a layer gave out as one tensor; of :class:`AddLayerNormalNorm` what it normalized,
    without the sum.

    Raises:
        TypeError: the output is anything else.
    """
    if isinstance(module, AddLayerNormalNorm):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name!r} ({type(module).__name__}) gave {type(output).__name__}; "
            "wanted is a layer that gives one tensor"
        )
    return output


def channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """The output with its channels as the last dimension; all others are positions.

    The channels are dimension 1 of what batch, group and instance layers give out, and of any
    layer whose class says how many dimensions follow them and gives that many: ``Conv1d`` of
    (N, C, L), ``LayerNorm2d`` of (N, C, H, W). They are the last dimension behind other layer
    normalizations and behind ``nn.Linear``. What no class tells is decided by the rank: (batch,
    length, features) of three dimensions, (batch, channels, ...) of more.

    Args:
        module: the layer that gave the output.
        output: (batch, ...), two dimensions or more.

    Returns:
        a view, (batch, ..., channels).

    Raises:
        ValueError: the output has fewer than two dimensions, or is a single sample of a
            convolution or an instance layer, without the dimension of the batch.
    """
    positions = _positions(module)
    # These also take a sample alone, whose dimension 1 is a position.
    unbatched = output.dim() - 1 == positions and (
        hasattr(module, "out_channels") or isinstance(module, _INSTANCE_NORMS)
    )
    if output.dim() < 2 or unbatched:
        raise ValueError(
            f"outputs of shape (batch, ...) are wanted; {type(module).__name__} gave "
            f"{tuple(output.shape)}"
        )
    first = isinstance(module, (_NormBase, nn.GroupNorm)) or output.dim() - 2 == positions
    return output.movedim(1, -1) if first or not _last(module, output) else output


def _positions(module: nn.Module) -> int | None:
    """How many dimensions the layer's class, or one that it derives from, says to follow the
    channels. By name: torchvision's and timm's channels-first ``LayerNorm2d`` derive from
    ``nn.LayerNorm`` like ours, and differ from it in nothing else that could be asked of them
    without importing these libraries."""
    for cls in type(module).__mro__:
        found = _POSITIONS.search(cls.__name__)
        if found:
            return int(found[1])
    return None


def _last(module: nn.Module, output: Tensor) -> bool:
    """Whether a layer that has not said otherwise by its class has its channels last."""
    # Layer and root mean square norms have this attribute, torch's and other libraries' alike;
    # those of transformers say the layout in a second one where they know both.
    if hasattr(module, "normalized_shape"):
        return getattr(module, "data_format", None) != "channels_first"
    return isinstance(module, nn.Linear) or output.dim() == 3
