"""Normalization layers for experiments alone: decorrelated batch normalization, and batch normality
normalization with more than one Newton step, both in plain PyTorch."""

from typing import Any

import torch
from torch import Tensor, nn

from normnorm import reference
from normnorm.backends.reference import fold_running_
from normnorm.functional import estimate_lmbda
from normnorm.modules import BatchNormalNorm2d
from normnorm.noise import draw_seed


class _InverseSquareRoot(torch.autograd.Function):
    """S^(-1/2) of symmetric positive definite matrices (..., n, n).

    In the basis of eigenvectors its derivative is the divided difference of l^(-1/2), which needs
    no difference of eigenvalues, so that equal eigenvalues have a gradient too; that of eigh itself
    has none there.
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


inverse_square_root = _InverseSquareRoot.apply


class DecorrelatedBatchNorm2d(nn.Module):
    """Whitens groups of channels over the batch (ZCA), then an affine map: Huang, Yang, Lang and
    Deng, "Decorrelated Batch Normalization" (CVPR 2018).

    Args:
        num_features: channels of the input (N, C, H, W).
        group_size: channels that are whitened together; divides ``num_features``.
        eps: added to the covariance's diagonal.
        momentum: of the running mean and covariance.
        power: whether normality normalization follows the whitening, as in Eftekhari and Papyan's
            study of independence.
        **transform: keywords of :class:`BatchNormalNorm2d`; with ``power`` alone.

    Raises:
        ValueError: group_size does not divide num_features; the input is not (N, num_features, H,
            W), or has one value a channel in training.
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
        if num_features % group_size:
            raise ValueError(f"group_size {group_size} does not divide the {num_features} channels")
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.group_size = group_size
        self.running_mean: Tensor
        self.running_covariance: Tensor
        self.register_buffer("running_mean", torch.zeros(num_features))
        groups = torch.eye(group_size).repeat(num_features // group_size, 1, 1)
        self.register_buffer("running_covariance", groups)
        make = BatchNormalNorm2d if power else _Affine
        self.after = make(num_features, **transform)

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
            centred = (rows - mean.unsqueeze(1)).unflatten(0, (-1, self.group_size))
            covariance = self.running_covariance
            if self.training:
                covariance = centred @ centred.mT / centred.size(2)
                with torch.no_grad():
                    self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
                    running = self.running_covariance
                    running.lerp_(covariance.to(running.dtype), self.momentum)
            ridge = self.eps * torch.eye(self.group_size, dtype=rows.dtype, device=rows.device)
            whitened = inverse_square_root(covariance.to(rows.dtype) + ridge) @ centred
        shape = (input.size(1), input.size(0), *input.shape[2:])
        return self.after(whitened.view(shape).transpose(0, 1).to(input.dtype))


class _Affine(nn.Module):
    """weight * x + bias by channel."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (p.view(1, -1, 1, 1).to(input.dtype) for p in (self.weight, self.bias))
        return input * weight + bias


class IteratedBatchNormalNorm2d(BatchNormalNorm2d):
    """:class:`BatchNormalNorm2d` with more Newton steps towards lambda in training.

    Args:
        num_features: channels.
        iterations: Newton steps; None for the likelihood's optimum.
        **options: keywords of :class:`BatchNormalNorm2d`, alpha and order excepted.
    """

    def __init__(self, num_features: int, iterations: int | None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.iterations = iterations

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        dims = (0, 2, 3)
        h, *_ = reference.standardize(input.float(), dims, self._eps)
        output, statistics = reference.normal_norm(
            input,
            self.weight,
            self.bias,
            kind="batch",
            eps=self._eps,
            noise_train=self.noise_train,
            seed=draw_seed(input.device) if self.noise_train > 0 else None,
            lmbda=estimate_lmbda(h, dims, eps=self._eps, iterations=self.iterations),
        )
        fold_running_(
            statistics, self.running_mean, self.running_var, self.running_lmbda,
            self.num_batches_tracked, self.momentum, input.numel() // input.size(1), self._eps,
            "reference",
        )  # fmt: skip
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"
