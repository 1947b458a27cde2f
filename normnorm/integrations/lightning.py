"""Lightning: synchronised layers by a plugin of its Trainer.

::

    from normnorm.integrations.lightning import NormalNormSync

    trainer = Trainer(strategy="ddp", devices=4, plugins=[NormalNormSync()])

``Trainer(sync_batchnorm=True)`` knows torch's BatchNorm alone and leaves our layers as they are.
"""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from normnorm.sync import convert_sync, revert_sync

__all__ = ["NormalNormSync"]


def _plugin_classes() -> tuple[type, ...]:
    """TorchSyncBatchNorm of each of the two names that Lightning is installed under.

    They are different classes, and a Trainer knows that of its own name alone.
    """
    found = []
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            found.append(importlib.import_module(f"{name}.plugins").TorchSyncBatchNorm)
        except ModuleNotFoundError as error:
            if error.name not in (name.partition(".")[0], name):
                raise
    if not found:
        raise ModuleNotFoundError(
            "normnorm.integrations.lightning needs the package 'lightning' or "
            "'pytorch-lightning'; neither is installed",
            name="lightning",
        )
    return tuple(dict.fromkeys(found))


_Base: Any = type("_Base", _plugin_classes(), {})


class NormalNormSync(_Base):
    """Makes a model's BatchNormalNorm layers SyncBatchNormalNorm while a Trainer fits it.

    The Trainer's strategy (ddp, fsdp) applies it before it wraps the model, and reverts it after
    the fit. Torch's own BatchNorm layers are synchronised with them, as ``sync_batchnorm=True``
    would do, unless ``torch_layers`` is False: torch's SyncBatchNorm runs on GPUs only, ours on
    the CPU too.

    Args:
        process_group: whose ranks hold the batch; None for all.
        torch_layers: whether to synchronise torch's BatchNorm layers as well.
    """

    def __init__(self, process_group: Any = None, torch_layers: bool = True) -> None:
        self.process_group = process_group
        self.torch_layers = torch_layers

    def apply(self, model: nn.Module) -> nn.Module:
        """The model with its batch layers synchronised."""
        model = convert_sync(model, self.process_group)
        if self.torch_layers:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.process_group)
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """The model with the layers that it had."""
        model = revert_sync(model)
        if self.torch_layers:
            model = super().revert(model)
        return model
