"""Norm layers with a fused epilogue: an activation, a residual addition, or both."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import functional as F
from .modules import BatchNormalNorm2d, LayerNormalNorm


class BatchNormalNormAct2d(BatchNormalNorm2d):
    """Batch normality normalization of images, fused with a residual addition and ReLU.

    Computes ``act(norm(input) + residual)``. The norm's kernel applies the sum and ReLU, the
    default activation, which saves a write and a read of the norm's output, of the sum, and of the
    activation's gradient. The backward pass keeps input and output; the output gives the sign for
    ReLU's gradient, and the next convolution usually keeps it too. Another activation, a dropout,
    or a hook on either runs as separate operations.

    Arguments are those of timm's ``BatchNormAct2d``; the transform's are keyword-only.

    Args:
        apply_act: False for no activation.
        act_layer: a class or function that returns the activation module.
        act_kwargs: its keyword arguments.
        inplace: passed to ``act_layer`` too if it takes ``inplace``; no effect when fused.
        drop_layer: returns a module between norm and activation; a residual is then an error.

    The other arguments are those of :class:`BatchNormalNorm1d`.

    Shape: input and residual (N, C, H, W), contiguous or channels_last.

    Raises:
        ValueError: see :class:`BatchNormalNorm1d`; a residual that does not fit, or with a dropout.
        TypeError: a residual that is not floating. Input and residual of different floating dtypes
            are promoted as in torch's addition; the output has the promoted dtype.
    """

    drop: nn.Module
    act: nn.Module

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        apply_act: bool = True,
        act_layer: Any = nn.ReLU,
        act_kwargs: dict[str, Any] | None = None,
        inplace: bool = True,
        drop_layer: Callable[[], nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        noise_train: float = 0.4,
        alpha: float = 1.0,
        order: int = 2,
        transform_eps: float = 0.0,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias,
            noise_train=noise_train, alpha=alpha, order=order, transform_eps=transform_eps,
        )  # fmt: skip
        self.drop = nn.Identity() if drop_layer is None else drop_layer()
        act = None
        if apply_act and act_layer is not None:
            act = self._make_act(act_layer, inplace, act_kwargs or {})
        self.act = nn.Identity() if act is None else act

    def _make_act(
        self, act_layer: Any, inplace: bool, keywords: dict[str, Any]
    ) -> nn.Module | None:
        if isinstance(act_layer, str):
            raise TypeError(
                f"act_layer must be a class or function that makes a layer; got '{act_layer}'. "
                "normnorm.integrations.timm.BatchNormalNormAct2d takes timm's names"
            )
        # Tanh, GELU and others have no such argument.
        if inplace and "inplace" in inspect.signature(act_layer).parameters:
            keywords = {"inplace": True, **keywords}
        return act_layer(**keywords)

    def _fuses(self) -> bool:
        """Whether the norm's kernel can replace dropout and activation."""
        # Exactly these classes: a subclass may do anything.
        if type(self.drop) is not nn.Identity or type(self.act) not in (nn.Identity, nn.ReLU):
            return False
        return not any(
            layer._forward_hooks
            or layer._forward_pre_hooks
            or layer._backward_hooks
            or layer._backward_pre_hooks
            for layer in (self.drop, self.act)
        )

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if type(input) is not Tensor:
            given = (input,) if residual is None else (input, residual)
            if (node := self._node(BatchNormalNormAct2d, *given)) is not None:
                return node
        if self._fuses():
            activation = "relu" if isinstance(self.act, nn.ReLU) else None
            return self._normalize(input, residual, activation)
        if residual is not None and not isinstance(self.drop, nn.Identity):
            raise ValueError("a residual behind a dropout is not defined; got both")
        return self.act(self.drop(self._normalize(input, residual)))


class AddLayerNormalNorm(LayerNormalNorm):
    """Residual addition and layer norm of a pre-norm transformer, fused:
    :func:`normnorm.functional.add_layer_normal_norm`.

    Returns the output, for the next attention or MLP, and the sum, for the connection after it::

        x, stream = self.norm1(branch, stream)  # replaces stream = stream + branch; norm(stream)

    Arguments and checkpoints are those of :class:`LayerNormalNorm`; torch's checkpoints load too.

    Input and residual of different floating dtypes, such as a branch under autocast and a float32
    stream, are promoted as in torch's addition; output and sum have the promoted dtype.

    Raises:
        ValueError: see :class:`LayerNormalNorm`; a residual of another shape or device.
        TypeError: a residual that is not floating.
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if type(input) is not Tensor and (
            (node := self._node(AddLayerNormalNorm, input, residual)) is not None
        ):
            return node
        return F.add_layer_normal_norm(
            input, residual, self.normalized_shape, *self._affine(), self.eps,
            training=self.training, **self._transform(),
        )  # fmt: skip
