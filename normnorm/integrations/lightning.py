"""Lightning: a Trainer plugin for synchronized layers, and freezing of normnorm layers by
callbacks.

::

    from normnorm.integrations.lightning import NormalNormSync

    trainer = Trainer(strategy="ddp", devices=4, plugins=[NormalNormSync()])

``Trainer(sync_batchnorm=True)`` converts torch's BatchNorm only.

Importing this module makes ``BaseFinetuning`` and its subclasses freeze and unfreeze normnorm's
batch layers with torch's; :func:`normnorm.replace_norms` imports it if Lightning is loaded.
"""

import functools
import importlib
from importlib.util import find_spec
from typing import Any

from torch import nn

from ..modules import _BatchNormalNorm
from ..running import freeze_statistics, unfreeze_statistics
from ..sync import convert_sync, revert_sync


def _classes(module: str, cls: str) -> tuple[Any, ...]:
    """A class of Lightning under each of the two package names.

    These are different classes; a Trainer uses that of its own package.
    """
    found = [
        getattr(importlib.import_module(f"{name}.{module}"), cls)
        for name in ("lightning.pytorch", "pytorch_lightning")
        if find_spec(name.partition(".")[0]) is not None
    ]
    if not found:
        raise ModuleNotFoundError(
            "normnorm.integrations.lightning needs the package 'lightning' or "
            "'pytorch-lightning'; neither is installed",
            name="lightning",
        )
    return tuple(dict.fromkeys(found))


def _wrap(finetuning: Any) -> None:
    """Makes the static methods of a BaseFinetuning, which test for torch's ``_BatchNorm``, treat
    normnorm's batch layers likewise: with ``train_bn`` they are not frozen."""
    make_trainable, freeze_module = finetuning.make_trainable, finetuning.freeze_module
    filter_params, freeze = finetuning.filter_params, finetuning.freeze

    def ours(modules: Any) -> list[nn.Module]:
        flat = finetuning.flatten_modules(modules)
        return [module for module in flat if isinstance(module, _BatchNormalNorm)]

    @functools.wraps(make_trainable)
    def make_trainable_too(modules: Any) -> None:
        modules = _again(modules)
        for layer in ours(modules):
            unfreeze_statistics(layer)
        make_trainable(modules)

    @functools.wraps(freeze_module)
    def freeze_module_too(module: nn.Module) -> None:
        if isinstance(module, _BatchNormalNorm):
            freeze_statistics(module)
        freeze_module(module)

    @functools.wraps(freeze)
    def freeze_too(modules: Any, train_bn: bool = True) -> None:
        modules = _again(modules)
        freeze(modules, train_bn=train_bn)
        if train_bn:
            finetuning.make_trainable(ours(modules))

    @functools.wraps(filter_params)
    def filter_params_too(modules: Any, train_bn: bool = True, requires_grad: bool = True) -> Any:
        modules = _again(modules)
        left = () if train_bn else ours(modules)
        parameters = {id(parameter) for layer in left for parameter in layer.parameters()}
        for parameter in filter_params(modules, train_bn=train_bn, requires_grad=requires_grad):
            if id(parameter) not in parameters:
                yield parameter

    replaced: Any = make_trainable_too, freeze_module_too, freeze_too, filter_params_too
    for function in replaced:
        setattr(finetuning, function.__name__, staticmethod(function))


def _again(modules: Any) -> Any:
    """The modules, in a form that can be iterated repeatedly."""
    return modules if isinstance(modules, nn.Module) else list(modules)


for _finetuning in _classes("callbacks", "BaseFinetuning"):
    _wrap(_finetuning)


class NormalNormSync(*_classes("plugins", "TorchSyncBatchNorm")):  # type: ignore[misc]
    """Converts a model's BatchNormalNorm layers to SyncBatchNormalNorm while a Trainer fits it.

    The Trainer's strategy (ddp, fsdp) applies it before it wraps the model, and reverts it after
    the fit. Torch's BatchNorm layers are converted too, as by ``sync_batchnorm=True``, unless
    ``torch_layers`` is False: torch's SyncBatchNorm runs on GPUs only, normnorm's also on the CPU.

    Args:
        process_group: the ranks that hold the batch; None for all.
        torch_layers: whether to convert torch's BatchNorm layers too.
    """

    def __init__(self, process_group: Any = None, torch_layers: bool = True) -> None:
        self.process_group = process_group
        self.torch_layers = torch_layers

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts the model's batch layers; returns the model."""
        model = convert_sync(model, self.process_group)
        if self.torch_layers:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.process_group)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Restores the model's layers; returns the model."""
        model = revert_sync(model)
        if self.torch_layers:
            model = super().revert(model)
        return model
