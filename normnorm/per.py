"""Projected error function regularization: pushes activations towards a standard normal law.

Joo, Kang and Kim, "Regularizing activations in neural networks via distribution matching with the
Wasserstein metric" (ICLR 2020, arXiv 2002.05366).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from normnorm import watched
from normnorm.per_ops import ROOT_HALF, ROOT_TWO_OVER_PI, projected_error_of

__all__ = ["PER", "per_loss"]

# Projections held at a time: 2^17 float32 fit a processor's second-level cache.
_BLOCK = 1 << 17
_BLOCK_ON_GPU = 1 << 22
# Sums that the programs of a GPU keep side by side; a processor's threads are added up as they end.
_SUMS_ON_GPU = 1024


def per_loss(
    activations: Tensor, num_slices: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """The projected error function loss of vectors of activations.

    ``num_slices`` directions theta are drawn from N(0, I) and scaled to length 1. With
    ``t = <theta, h>``, the loss is the mean over vectors and directions of ``t erf(t / sqrt 2) +
    sqrt(2 / pi) exp(-t^2 / 2)``, which is the mean of ``|t - z|`` over a standard normal z and so
    bounds the sliced Wasserstein distance to the standard normal (arXiv 2002.05366); its gradient
    in h is the mean of ``erf(t / sqrt 2) theta``. Forward and backward hold only a block of the
    (vectors, directions) matrix at a time; with gradients wanted, the gradient is computed along
    with the loss and kept, as large as the activations.

    Its least value, sqrt(2 / pi), is reached where all activations are zero. It is a regularizer
    and works against a task's loss; it does not measure normality.

    Args:
        activations: (..., features), floating point; every leading index is a vector.
        num_slices: how many directions.
        generator: of the directions, on the device of the activations; torch's own by default.

    Returns:
        a scalar, float32 or, of float64 activations, float64.

    Raises:
        TypeError: the activations are not floating point.
        ValueError: there are no activations, or num_slices is not positive.
    """
    if not activations.is_floating_point():
        raise TypeError(f"activations must be floating point; got {activations.dtype}")
    if activations.dim() == 0 or activations.numel() == 0:
        raise ValueError(
            f"activations must be (..., features), not empty; got {tuple(activations.shape)}"
        )
    if num_slices < 1:
        raise ValueError(f"num_slices must be positive; got {num_slices}")
    vectors = activations.flatten(0, -2) if activations.dim() > 1 else activations.unsqueeze(0)
    dtype = torch.float64 if vectors.dtype == torch.float64 else torch.float32
    slices = torch.randn(
        num_slices, vectors.size(1), dtype=dtype, device=vectors.device, generator=generator
    )
    slices = slices / slices.norm(dim=1, keepdim=True)
    with torch.autocast(vectors.device.type, enabled=False):
        if torch.compiler.is_compiling():  # a compiler fuses the formula by itself
            return _definition(vectors.to(dtype), slices)
        return _Blockwise.apply(vectors, slices)


def _definition(vectors: Tensor, slices: Tensor) -> Tensor:
    """The loss as it is written down: differentiable to any order, and as large as it looks."""
    t = vectors @ slices.T
    return (t * torch.erf(t * ROOT_HALF) + ROOT_TWO_OVER_PI * torch.exp(-t.square() / 2)).mean()


class _Blockwise(torch.autograd.Function):
    """The loss and its gradient in blocks of vectors: a product with the directions, the projected
    error function in its place, a product back."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, slices: Tensor) -> Tensor:
        projected_error_ = projected_error_of(vectors.device)
        on_cpu = vectors.device.type == "cpu"
        rows = max(1, (_BLOCK if on_cpu else _BLOCK_ON_GPU) // slices.size(0))
        gradient = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        # The gradient is kept times a power of two near the number of vectors: float16 has no room
        # for 1e-7, and a power of two rounds nothing when it is taken out again.
        ctx.shift = 2.0 ** -vectors.size(0).bit_length()
        count = vectors.size(0) * slices.size(0)
        shares = slices / (count * ctx.shift)
        sums = torch.zeros(
            1 if on_cpu else _SUMS_ON_GPU, dtype=torch.float64, device=vectors.device
        )
        for start in range(0, vectors.size(0), rows):
            block = slice(start, start + rows)
            t = vectors[block].to(slices.dtype) @ slices.T
            projected_error_(t, sums, gradient is not None)
            if gradient is not None:
                gradient[block] = t @ shares
        ctx.save_for_backward(vectors, slices, gradient)
        return (sums.sum() / count).to(slices.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        vectors, slices, gradient = ctx.saved_tensors
        if torch.is_grad_enabled():  # someone wants the gradient's gradient
            with torch.enable_grad():
                loss = _definition(vectors.to(slices.dtype), slices)
                (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
            return (grads[0] * gradient).to(vectors.dtype), None
        return (grads[0] * ctx.shift * gradient.to(slices.dtype)).to(vectors.dtype), None


class PER:
    """Adds :func:`per_loss` of some layers' outputs to a training loss.

    ::

        per = normnorm.PER(model, ["layer1", "layer2"], weight=1e-4)
        loss = criterion(model(inputs), targets) + per.loss()

    While a layer is in training mode and gradients are wanted, each of its forward passes is
    taken in. A vector is one position of one sample, of as many features as there are channels:
    the last dimension of what linear and layer norm layers give out, dimension 1 behind
    convolutions, the other norms and ``LayerNorm2d``. Where the layer's class tells nothing, an
    output of three dimensions is (batch, length, features) and one of more is (batch, channels,
    ...).

    Args:
        model: whose layers are meant.
        layers: names in ``model.named_modules()``, or one, or a predicate of (name, module). Each
            gives one tensor (batch, ...), but for :class:`AddLayerNormalNorm`, whose normalized
            output is taken and not the sum.
        weight: of the sum over layers of the mean loss of their passes.
        num_slices, generator: as for :func:`per_loss`; fresh directions in every pass.

    Raises:
        ValueError: an unknown name, no layer, or a weight that is negative or not finite; in a
            forward pass, an output that is not (batch, ...).
        TypeError: in a forward pass, an output that is not one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] | Callable[[str, nn.Module], bool],
        weight: float,
        num_slices: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and not negative; got {weight}")
        chosen = watched.named_layers(model, layers)
        if not chosen:
            raise ValueError("no layer was chosen to regularize")
        self.weight = weight
        self._num_slices = num_slices
        self._generator = generator
        self._losses: dict[str, list[Tensor]] = {name: [] for name in chosen}
        self._handles = [
            module.register_forward_hook(self._taking(name)) for name, module in chosen.items()
        ]

    def _taking(self, name: str) -> Callable[..., None]:
        def take(module: nn.Module, _: Any, output: Any) -> None:
            if not (module.training and torch.is_grad_enabled()):
                return
            vectors = watched.channels_last(module, watched.tensor_of(name, module, output))
            self._losses[name].append(per_loss(vectors, self._num_slices, self._generator))

        return take

    def loss(self) -> Tensor | float:
        """The weighted loss of the passes since the last call; 0.0 where there were none."""
        means = [torch.stack(losses).mean() for losses in self._losses.values() if losses]
        for losses in self._losses.values():
            losses.clear()
        return self.weight * sum(means[1:], means[0]) if means else 0.0

    def remove(self) -> None:
        """Takes the hooks off the model. ``with PER(...) as per:`` does so at the block's end."""
        for handle in self._handles:
            handle.remove()

    def __enter__(self) -> PER:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
