"""Decorrelated batch normalization: whitening in place of standardizing.

Huang, Yang, Lang and Deng, "Decorrelated Batch Normalization" (CVPR 2018). Eftekhari and Papyan put
the power transform behind it as well, to make features both independent and Gaussian.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from normnorm.modules import BatchNormalNorm2d

__all__ = ["DecorrelatedBatchNorm2d", "inverse_square_root"]


class _InverseSquareRoot(torch.autograd.Function):
    """S^(-1/2) of symmetric positive definite matrices (..., n, n).

    Its derivative in the basis of eigenvectors is the divided difference of l^(-1/2), which for
    this function needs no difference of eigenvalues: equal ones, where the derivative of the
    eigenvectors themselves does not exist, do no harm.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        roots = values.sqrt()
        ctx.save_for_backward(roots, vectors)
        return (vectors / roots.unsqueeze(-2)) @ vectors.mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        roots, vectors = ctx.saved_tensors
        rows, columns = roots.unsqueeze(-1), roots.unsqueeze(-2)
        inside = vectors.mT @ grads[0] @ vectors / -(rows * columns * (rows + columns))
        return vectors @ ((inside + inside.mT) / 2) @ vectors.mT


def inverse_square_root(matrix: Tensor) -> Tensor:
    """S^(-1/2) of symmetric positive definite matrices (..., n, n), with its gradient."""
    return _InverseSquareRoot.apply(matrix)


class DecorrelatedBatchNorm2d(nn.Module):
    """Whitens groups of channels over the batch (ZCA), then an affine map.

    Args:
        num_features: channels of the input (N, C, H, W).
        group_size: channels that are whitened together; the last group may be smaller.
        eps: added to the covariance's diagonal.
        momentum: of the running mean and covariance.
        power: whether normality normalization follows the whitening.
        **transform: ``noise_train``, ``alpha`` and what else :class:`BatchNormalNorm2d` takes by
            keyword; with ``power`` alone.

    Raises:
        ValueError: the input is not (N, num_features, H, W), or one value a channel in training.
    """

    def __init__(
        self,
        num_features: int,
        group_size: int = 16,
        eps: float = 1e-3,
        momentum: float = 0.1,
        *,
        power: bool = False,
        **transform: Any,
    ) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        starts = range(0, num_features, group_size)
        self.sizes = [min(group_size, num_features - start) for start in starts]
        self.running_mean: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features))
        for number, size in enumerate(self.sizes):
            self.register_buffer(f"running_covariance_{number}", torch.eye(size))
        self.after: nn.Module
        if power:
            self.after = BatchNormalNorm2d(num_features, **transform)
        else:
            self.after = _Affine(num_features)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4 or input.size(1) != self.num_features:
            raise ValueError(f"expected (N, {self.num_features}, H, W); got {tuple(input.shape)}")
        # (C, N H W), in float32 at least: a covariance in half precision is not positive definite.
        rows = input.transpose(0, 1).flatten(1)
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.training and rows.size(1) < 2:
            raise ValueError(
                f"more than 1 value per channel is needed in training; got {tuple(input.shape)}"
            )
        with torch.autocast(input.device.type, enabled=False):
            mean = rows.mean(1) if self.training else self.running_mean
            centred = rows - mean.unsqueeze(1)
            if self.training:
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            groups = centred.split(self.sizes)
            whitened = torch.cat([self._whiten(i, group) for i, group in enumerate(groups)])
        shape = (input.size(1), input.size(0), *input.shape[2:])
        return self.after(whitened.view(shape).transpose(0, 1).to(input.dtype))

    def _whiten(self, number: int, centred: Tensor) -> Tensor:
        running = self.get_buffer(f"running_covariance_{number}")
        covariance = running
        if self.training:
            covariance = centred @ centred.T / centred.size(1)
            with torch.no_grad():
                running.lerp_(covariance.to(running.dtype), self.momentum)
        ridge = self.eps * torch.eye(len(running), dtype=centred.dtype, device=centred.device)
        return inverse_square_root(covariance.to(centred.dtype) + ridge) @ centred

    def extra_repr(self) -> str:
        return f"{self.num_features}, group_size={self.sizes[0]}, eps={self.eps}"


class _Affine(nn.Module):
    """weight * x + bias by channel."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (p.view(1, -1, 1, 1).to(input.dtype) for p in (self.weight, self.bias))
        return input * weight + bias
