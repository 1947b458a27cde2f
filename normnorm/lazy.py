"""Layers that take ``num_features`` from their first input, like torch.nn's lazy layers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import UninitializedBuffer, is_lazy

from . import modules
from .checkpoints import INITIAL
from .checks import check_is_tensor, check_noise_train
from .modules import _InstanceNormalNorm, _RunningNorm


class _Lazy(_LazyNormBase, _RunningNorm):  # type: ignore[misc]
    """A layer without sizes. The first input turns it into the class ``cls_to_become``."""

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
        # Without parameters and buffers, whose sizes are unknown here.
        super().__init__(eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        if track_running_stats:
            buffer: Any = UninitializedBuffer
            self._buffers["running_lmbda"] = buffer(device=device, dtype=dtype)
        self._set_transform(noise_train, alpha, order, transform_eps)

    def initialize_parameters(self, input: Tensor) -> None:  # type: ignore[override]
        """Sets ``num_features`` and materializes uninitialized tensors from the first input.

        An input that the layer rejects raises here and changes nothing.
        """
        check_is_tensor(input)
        becomes = self.cls_to_become
        assert becomes is not None  # every subclass sets it
        # The input of an instance layer may have no batch dimension.
        axis = 1 - becomes._rank if issubclass(becomes, _InstanceNormalNorm) else 1
        channels = int(input.size(axis)) if -input.dim() <= axis < input.dim() else 0
        self._try(becomes, input, channels)
        self.num_features = channels
        for name, value in INITIAL.items():
            tensor: Any = self._parameters.get(name, self._buffers.get(name))
            if is_lazy(tensor):  # not loaded from a checkpoint
                with torch.no_grad():
                    tensor.materialize((channels,))
                    tensor.fill_(value)

    def _try(self, becomes: type[_RunningNorm], input: Tensor, channels: int) -> None:
        """Runs the forward pass of the class that this becomes, on temporary tensors."""
        check_noise_train(self.noise_train)
        trial = becomes.__new__(becomes)

        def ones(tensor: Any) -> Tensor | None:
            if tensor is None:
                return None
            shape = (channels,) if is_lazy(tensor) else tuple(tensor.shape)
            # Of the input, which is a fake tensor if a compiler initializes the layer.
            return input.new_ones(shape, dtype=tensor.dtype, device=tensor.device)

        tensors = {
            kind: {name: ones(tensor) for name, tensor in getattr(self, kind).items()}
            for kind in ("_parameters", "_buffers")
        }
        # Without noise, which would draw a seed from the generator.
        vars(trial).update(vars(self) | tensors, num_features=channels, noise_train=0.0)
        with torch.no_grad():
            becomes.forward(trial, input)


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
