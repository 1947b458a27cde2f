"""Layers that do a neighbour's work in the norm's own pass: an activation, a residual sum."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from normnorm import functional as F
from normnorm.modules import BatchNormalNorm2d, LayerNormalNorm

__all__ = ["AddLayerNormalNorm", "BatchNormalNormAct2d"]


class BatchNormalNormAct2d(BatchNormalNorm2d):
    """Batch normality normalization of images, a residual, and an activation: one pass each way.

    ``act(norm(input) + residual)``. ReLU, the default, and the sum are done by the norm's kernel,
    which saves writing and reading its output (and the sum) in between, and writing and reading
    the activation's gradient. Beside the input the backward pass keeps the output, for the
    activation's sign: the next convolution mostly keeps it too, and with noise the sign could not
    be had again but by computing the whole output. Another activation, a dropout, or a hook on
    either of them, makes three passes of it.

    The arguments are those of timm's ``BatchNormAct2d``, and the transform's by keyword.

    Args:
        num_features, eps, momentum, affine, track_running_stats: see :class:`BatchNormalNorm1d`.
        apply_act: False for no activation.
        act_layer: a class or function that makes one.
        act_kwargs: what that is called with.
        inplace: handed to it too, where it knows that; a fused one has nothing to overwrite.
        drop_layer: makes a layer between norm and activation; there is no residual then.
        device, dtype, bias, noise_train, alpha, order, transform_eps: see
            :class:`BatchNormalNorm1d`.

    Shape: input and residual (N, C, H, W), contiguous or channels_last.

    Raises:
        ValueError: see :class:`BatchNormalNorm1d`; a residual of another shape or device, or
            behind a dropout.
        TypeError: a residual that is not floating. One of another floating dtype is promoted with
            the input, as torch promotes a sum, and the output has the wider dtype.
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
        # Tanh, GELU and others know no such thing.
        if inplace and "inplace" in inspect.signature(act_layer).parameters:
            keywords = {"inplace": True, **keywords}
        act: nn.Module = act_layer(**keywords)
        return act

    def _joins(self) -> bool:
        """Whether the norm's kernel can do all of it, unseen."""
        # Of exactly these classes: one derived from them may do anything.
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
            node: Tensor | None = self._node(BatchNormalNormAct2d, *given)
            if node is not None:
                return node
        if self._joins():
            activation = "relu" if isinstance(self.act, nn.ReLU) else None
            return self._normalize(input, residual, activation)
        if residual is not None and not isinstance(self.drop, nn.Identity):
            raise ValueError("a residual behind a dropout is not defined; got both")
        output = self.act(self.drop(self._normalize(input, residual)))
        assert isinstance(output, Tensor)
        return output


class AddLayerNormalNorm(LayerNormalNorm):
    """The residual stream of a pre-norm transformer: adds, then normalizes, in one pass each way.

    ``sum = input + residual; output = layer_normal_norm(sum)``, and both are returned: the output
    for the next attention or MLP, the sum for the residual connection after it. The sum is written
    and not read again, and its gradient is added where the norm's is written.

    ::

        x, stream = self.norm1(branch, stream)  # in place of stream = stream + branch; norm(stream)

    Args:
        normalized_shape, eps, elementwise_affine, bias, device, dtype, noise_train, alpha, order,
            transform_eps: see :class:`LayerNormalNorm`; a checkpoint of that or of torch's layer
            loads.

    Raises:
        ValueError: see :class:`LayerNormalNorm`; a residual of another shape or device.
        TypeError: a residual that is not floating. Of two floating dtypes, a branch under autocast
            and a stream in float32, the narrower is cast to what torch gives their sum; output
            and sum have that dtype.
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if type(input) is not Tensor and (
            (node := self._node(AddLayerNormalNorm, input, residual)) is not None
        ):
            return node
        return F.add_layer_normal_norm(
            input,
            residual,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            training=self.training,
            **self._transform(),
        )
