"""Layers that learn ``num_features`` from their first input, as torch.nn's lazy layers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normnorm import modules
from normnorm.checks import check_is_tensor
from normnorm.modules import _InstanceNormalNorm, _RunningNorm

__all__ = [
    "LazyBatchNormalNorm1d",
    "LazyBatchNormalNorm2d",
    "LazyBatchNormalNorm3d",
    "LazyInstanceNormalNorm1d",
    "LazyInstanceNormalNorm2d",
    "LazyInstanceNormalNorm3d",
]


class _Lazy(LazyModuleMixin, _RunningNorm):  # type: ignore[misc]
    """A layer without sizes; its first input makes it the class ``cls_to_become``."""

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        noise_train: float = 0.4,
        alpha: float = 1.0,
        order: int = 2,
        transform_eps: float = 0.0,
    ) -> None:
        # Without parameters and buffers, which would have no sizes yet.
        super().__init__(
            0, eps, momentum, False, False, bias=False, noise_train=noise_train, alpha=alpha,
            order=order, transform_eps=transform_eps,
        )  # fmt: skip
        self.affine = affine
        self.track_running_stats = track_running_stats
        parameter: Any = UninitializedParameter
        buffer: Any = UninitializedBuffer
        if affine:
            self.weight = parameter(device=device, dtype=dtype)
            if bias:
                self.bias = parameter(device=device, dtype=dtype)
        if track_running_stats:
            for name in ("running_mean", "running_var", "running_lmbda"):
                setattr(self, name, buffer(device=device, dtype=dtype))
            self.num_batches_tracked = torch.tensor(0, dtype=torch.long, device=device)

    def reset_parameters(self) -> None:
        """As in the layer that it becomes; nothing before the sizes are known."""
        if not self.has_uninitialized_params() and self.num_features != 0:
            _RunningNorm.reset_parameters(self)

    def initialize_parameters(self, input: Tensor) -> None:  # type: ignore[override]
        """Takes ``num_features``, and the size of what has none yet, from the first input."""
        check_is_tensor(input)
        becomes = self.cls_to_become
        assert becomes is not None  # every class below names its own
        # An instance layer's input may come without the batch dimension.
        instance = issubclass(becomes, _InstanceNormalNorm)
        self.num_features = input.size(1 - becomes._rank if instance else 1)
        missing = [
            tensor
            for tensor in (*self._parameters.values(), *self._buffers.values())
            if isinstance(tensor, (UninitializedParameter, UninitializedBuffer))
        ]
        for tensor in missing:
            tensor.materialize((self.num_features,))
        if missing:  # and not loaded from a checkpoint
            self.reset_parameters()


class LazyBatchNormalNorm1d(_Lazy, modules.BatchNormalNorm1d):
    """A :class:`~normnorm.BatchNormalNorm1d` that takes ``num_features`` from its first input.

    The other arguments are those of :class:`~normnorm.BatchNormalNorm1d`.
    """

    cls_to_become = modules.BatchNormalNorm1d


class LazyBatchNormalNorm2d(_Lazy, modules.BatchNormalNorm2d):
    """A :class:`~normnorm.BatchNormalNorm2d` that takes ``num_features`` from its first input."""

    cls_to_become = modules.BatchNormalNorm2d


class LazyBatchNormalNorm3d(_Lazy, modules.BatchNormalNorm3d):
    """A :class:`~normnorm.BatchNormalNorm3d` that takes ``num_features`` from its first input."""

    cls_to_become = modules.BatchNormalNorm3d


class LazyInstanceNormalNorm1d(_Lazy, modules.InstanceNormalNorm1d):
    """A :class:`~normnorm.InstanceNormalNorm1d` that takes ``num_features`` from its first input.

    As in torch's lazy layer, and unlike the layer that it becomes, ``affine`` and
    ``track_running_stats`` are True by default.
    """

    cls_to_become = modules.InstanceNormalNorm1d


class LazyInstanceNormalNorm2d(_Lazy, modules.InstanceNormalNorm2d):
    """A :class:`~normnorm.InstanceNormalNorm2d` that takes ``num_features`` from its first input:
    see :class:`LazyInstanceNormalNorm1d`."""

    cls_to_become = modules.InstanceNormalNorm2d


class LazyInstanceNormalNorm3d(_Lazy, modules.InstanceNormalNorm3d):
    """A :class:`~normnorm.InstanceNormalNorm3d` that takes ``num_features`` from its first input:
    see :class:`LazyInstanceNormalNorm1d`."""

    cls_to_become = modules.InstanceNormalNorm3d
