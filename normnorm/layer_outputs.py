"""Selecting a model's layers, hooks on them, and the channel dimension of their outputs.

Shared by :func:`normnorm.monitor`, :class:`normnorm.PER` and :mod:`normnorm.diagnostics`.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .fused import AddLayerNormalNorm
from .modules import _InstanceNormalNorm

# Conv1d, LayerNorm2d, LayerNormAct2dFp32: the number of dimensions after (batch, channels).
_POSITIONS = re.compile(r"([123])d(?![a-z])")
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, _InstanceNormalNorm)


Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


def named_layers(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    """The selected layers, by name; may be empty. ValueError for an unknown name.

    Names are those of ``named_modules`` without torch.compile's "_orig_mod.". A module with several
    names can be selected by each of them; a predicate of (name, module) sees it once.
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
    """A module's name without the prefixes of torch.compile."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def recomputing() -> bool:
    """Whether a backward pass is running: a forward pass is then activation checkpointing's."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class Hook:
    """A hook that acts on one module only, by ``function(*first, *the hook's arguments)``.

    Copies of a module keep its hooks: shallow copies and replicas of nn.DataParallel share them,
    deep copies and pickled modules have copies of them. On all of these the hook does nothing.
    """

    def __init__(self, module: nn.Module, function: Callable[..., Any], *first: Any) -> None:
        self._module = module
        self._function = function
        self._first = first
        # Whether the module was called. Compiled code only writes it, since reading would add a
        # guard and recompile when it changes.
        self.ran = False

    def __call__(self, module: nn.Module, *arguments: Any) -> Any:
        if module is not self._module:
            return None
        self.ran = True
        return self._function(*self._first, module, *arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, (nn.Module(), _nothing)


def _nothing(*_: Any) -> None:
    """A copied hook."""


class Watch:
    """Forward hooks on the layers of a model, and a record of which of them ran.

    After each forward pass of a layer, recomputations included (:func:`recomputing`), they call
    ``see(name, layer, args, kwargs, output)``, whose result, unless None, replaces the output.
    ``owner`` names itself in error messages. A copied or unpickled watch has no hooks.
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
        inside = {
            inner
            for module in model.modules()
            if "_orig_mod" in module._modules or module._compiled_call_impl is not None
            for inner in module.modules()
        }
        self._owner = owner
        # Layers in modules given to torch.compile that have not run.
        self._compiled = {name for name, layer in layers.items() if layer in inside}
        self._hooks = {name: Hook(layer, see, name) for name, layer in layers.items()}
        self._handles = [
            layer.register_forward_hook(self._hooks[name], with_kwargs=True)
            for name, layer in layers.items()
        ]

    def require_ran(self, afresh: bool = False) -> None:
        """Raises RuntimeError if no layer ran, or a layer of a compiled module never has: then
        compiled code without the hooks ran in its place. With ``afresh`` the next call considers
        only what runs after this one."""
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
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watch, (nn.Module(), {}, _nothing, self._owner)


def tensor_of(name: str, module: nn.Module, output: Any) -> Tensor:
    """A layer's output as one tensor, or TypeError; of :class:`AddLayerNormalNorm` the normalized
    output without the sum."""
    if isinstance(module, AddLayerNormalNorm):
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(
            f"{name!r} ({type(module).__name__}) gave {type(output).__name__}; "
            "wanted is a layer that gives one tensor"
        )
    return output


def channels_last(module: nn.Module, output: Tensor) -> Tensor:
    """A view (batch, ..., channels) of the output; all dimensions between are positions.

    The channels are dimension 1 for batch, group and instance layers, and for any layer whose class
    name says how many dimensions follow the channels, if the output has that many: ``Conv1d`` with
    (N, C, L), ``LayerNorm2d`` with (N, C, H, W). They are the last dimension for other layer
    normalizations and for ``nn.Linear``. For any other layer, three dimensions are read as (batch,
    length, features), more as (batch, channels, ...). ValueError for fewer than two dimensions and
    for an unbatched sample of a convolution or an instance layer.
    """
    # torchvision's and timm's channels-first LayerNorm2d derive from nn.LayerNorm and, without
    # importing these libraries, are recognized by name only.
    names = (_POSITIONS.search(cls.__name__) for cls in type(module).__mro__)
    positions = next((int(found[1]) for found in names if found), None)
    # These layers also take an unbatched sample, whose dimension 1 is a position.
    unbatched = output.dim() - 1 == positions and (
        hasattr(module, "out_channels") or isinstance(module, INSTANCE_NORMS)
    )
    if output.dim() < 2 or unbatched:
        raise ValueError(
            f"outputs of shape (batch, ...) are wanted; {type(module).__name__} gave "
            f"{tuple(output.shape)}"
        )
    if isinstance(module, (_NormBase, nn.GroupNorm)) or output.dim() - 2 == positions:
        last = False
    elif hasattr(module, "normalized_shape"):
        # Layer and RMS norms of torch and other libraries; those of transformers with two layouts
        # name theirs in a second attribute.
        last = getattr(module, "data_format", None) != "channels_first"
    else:
        last = isinstance(module, nn.Linear) or output.dim() == 3
    return output if last else output.movedim(1, -1)
