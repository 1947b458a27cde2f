"""Batch normality normalization with more than one Newton step, in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normnorm import reference
from normnorm.backends.reference import fold_running_
from normnorm.functional import estimate_lmbda
from normnorm.modules import BatchNormalNorm2d
from normnorm.noise import draw_seed

__all__ = ["IteratedBatchNormalNorm2d"]

_DIMS = (0, 2, 3)


class IteratedBatchNormalNorm2d(BatchNormalNorm2d):
    """:class:`BatchNormalNorm2d` whose lambda, in training, is refined further.

    Args:
        num_features: channels.
        iterations: Newton steps; None for the likelihood's optimum.
        **options: what else :class:`BatchNormalNorm2d` takes by keyword, alpha and order excepted.
    """

    def __init__(self, num_features: int, iterations: int | None, **options: Any) -> None:
        super().__init__(num_features, **options)
        self.iterations = iterations

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        self._check_input_dim(input)
        h, *_ = reference.standardize(input.float(), _DIMS, self._eps)
        lmbda = estimate_lmbda(h, _DIMS, eps=self._eps, iterations=self.iterations)
        output, statistics = reference.normal_norm(
            input,
            self.weight,
            self.bias,
            kind="batch",
            eps=self._eps,
            noise_train=self.noise_train,
            seed=draw_seed(input.device) if self.noise_train > 0 else None,
            lmbda=lmbda,
        )
        mean, var, running_lmbda = self.running_mean, self.running_var, self.running_lmbda
        assert mean is not None
        assert var is not None
        assert running_lmbda is not None
        count = input.numel() // input.size(1)
        fold_running_(
            statistics, mean, var, running_lmbda, self.num_batches_tracked, self.momentum, count,
            self._eps, "reference",
        )  # fmt: skip
        return output

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, iterations={self.iterations}"
