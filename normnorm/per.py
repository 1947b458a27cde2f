"""Projected error function regularization: penalizes activations that are not standard normal.

Joo, Kang and Kim, "Regularizing activations in neural networks via distribution matching with the
Wasserstein metric" (ICLR 2020, arXiv 2002.05366).
"""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import backends, layer_outputs
from .autograd import forward_mode
from .backends.reference import transforms_active
from .checks import check_integer, check_number
from .namespace import compiled_namespace
from .statistics import statistics_dtype

# Projections per block: 2^17 float32 fit a CPU's second-level cache.
_BLOCK = 1 << 17
_BLOCK_ON_GPU = 1 << 22
# Partial sums of GPU programs; CPU threads accumulate into one.
_SUMS_ON_GPU = 1024


_ROOT_HALF = math.sqrt(0.5)
_ROOT_TWO_OVER_PI = math.sqrt(2 / math.pi)

# The op of the projected error function, (projections, sums, slopes). The products with the
# directions before and after it are torch's.
#   projections  t, float32 or float64, contiguous; replaced by the slopes erf(t / sqrt 2) if
#                `slopes`, else undefined afterwards
#   sums         float64 vector on the same device; the sum over t of t erf(t / sqrt 2) + sqrt(2 /
#                pi) exp(-t^2 / 2) is added, distributed over the elements in any way
ProjectedError = Callable[[Tensor, Tensor, bool], None]

_NAMESPACE = compiled_namespace("cpu")
_library = torch.library.Library(_NAMESPACE, "FRAGMENT")
_library.define(
    "projected_error_(Tensor(a!) projections, Tensor(b!) sums, bool slopes) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.register_fake(f"{_NAMESPACE}::projected_error_", lambda *_: None, lib=_library)
_compiled = getattr(torch.ops, _NAMESPACE).projected_error_.default


def projected_error_of(device: torch.device) -> ProjectedError:
    """The implementation for tensors on ``device``, by the backend in use.

    The CUDA library has no kernel for it; backend ``cuda`` takes Triton's if Triton is installed.
    """
    name = backends.resolve(device).name
    if name == "cpu":
        return _compiled
    if name in ("cuda", "triton") and backends.available_backends()["triton"] is None:
        return importlib.import_module(".triton_kernels.projected", __package__).projected_error_
    return _plain


def _plain(projections: Tensor, sums: Tensor, slopes: bool) -> None:
    """In PyTorch operations, for every device."""
    slope = torch.erf(projections * _ROOT_HALF)
    sums[0] += torch.linalg.vecdot(projections.flatten(), slope.flatten())
    sums[0] += _ROOT_TWO_OVER_PI * projections.square_().mul_(-0.5).exp_().sum()
    if slopes:
        projections.copy_(slope)


def _check_directions(num_slices: int, generator: torch.Generator | None) -> None:
    check_integer("num_slices", num_slices)
    if num_slices < 1:
        raise ValueError(f"num_slices must be positive; got {num_slices}")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None; got {type(generator).__name__}"
        )


def per_loss(
    activations: Tensor, num_slices: int = 256, generator: torch.Generator | None = None
) -> Tensor:
    """The projected error function loss of activation vectors.

    ``num_slices`` directions theta are drawn from N(0, I) and scaled to length 1. With ``t =
    <theta, h>``, the loss is the mean over vectors and directions of ``t erf(t / sqrt 2) + sqrt(2 /
    pi) exp(-t^2 / 2)``. This is the mean of ``|t - z|`` over a standard normal z and bounds the
    sliced Wasserstein distance to the standard normal (arXiv 2002.05366); its gradient in h is the
    mean of ``erf(t / sqrt 2) theta``.

    Forward and backward hold one block of the (vectors, directions) matrix at a time; forward also
    computes and keeps the gradient if it is needed. Under torch.compile, torch.func transforms and
    in forward mode the formula is evaluated in full, with the whole matrix.

    The minimum, sqrt(2 / pi), is reached where all activations are zero: the loss regularizes
    together with a task's loss and does not measure normality.

    Args:
        activations: (..., features), floating point; each leading index is a vector.
        num_slices: number of directions.
        generator: draws the directions, on the activations' device; None: torch's default one.

    Returns:
        A scalar, float64 for float64 activations, else float32; on meta for meta activations.

    Raises:
        TypeError: activations that are not a floating tensor, another argument of a wrong type.
        ValueError: empty activations, or num_slices that is not positive.
        RuntimeError: in the backward pass, if activation checkpointing drew other directions than
            the forward pass, as with an explicit generator.
    """
    if not isinstance(activations, Tensor):
        raise TypeError(f"activations must be a tensor; got {type(activations).__name__}")
    if not activations.is_floating_point():
        raise TypeError(f"activations must be floating point; got {activations.dtype}")
    if activations.dim() == 0 or activations.numel() == 0:
        raise ValueError(
            f"activations must be (..., features), not empty; got {tuple(activations.shape)}"
        )
    _check_directions(num_slices, generator)
    vectors = activations.flatten(0, -2) if activations.dim() > 1 else activations.unsqueeze(0)
    dtype = statistics_dtype(vectors.dtype)
    if vectors.is_meta:  # meta has no generator and no autocast
        return _definition(
            vectors.to(dtype), vectors.new_empty((num_slices, vectors.size(1)), dtype=dtype)
        )
    slices = torch.randn(
        num_slices, vectors.size(1), dtype=dtype, device=vectors.device, generator=generator
    )
    slices = slices / slices.norm(dim=1, keepdim=True)
    with torch.autocast(vectors.device.type, enabled=False):
        # A compiler fuses the formula; transforms and forward mode differentiate it.
        if torch.compiler.is_compiling() or transforms_active() or forward_mode():
            return _definition(vectors.to(dtype), slices)
        return _Blockwise.apply(vectors, slices)


def _definition(vectors: Tensor, slices: Tensor) -> Tensor:
    """The formula in full: differentiable to any order, holds the whole projection matrix."""
    t = vectors @ slices.T
    return (t * torch.erf(t * _ROOT_HALF) + _ROOT_TWO_OVER_PI * torch.exp(-t.square() / 2)).mean()


class _Blockwise(torch.autograd.Function):
    """The loss and its gradient by blocks of vectors: multiply by the directions, apply the
    projected error function in place, multiply back."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, slices: Tensor) -> Tensor:
        projected_error_ = projected_error_of(vectors.device)
        on_cpu = vectors.device.type == "cpu"
        rows = max(1, (_BLOCK if on_cpu else _BLOCK_ON_GPU) // slices.size(0))
        gradient = torch.empty_like(vectors) if ctx.needs_input_grad[0] else None
        # The kept gradient is scaled by a power of two near the number of vectors: float16 cannot
        # represent 1e-7, and scaling by a power of two is exact.
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
        ctx.slices = slices
        return (sums.sum() / count).to(slices.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        vectors, slices, gradient = ctx.saved_tensors
        if slices is not ctx.slices and not torch.equal(slices, ctx.slices):
            raise RuntimeError(
                "activation checkpointing ran per_loss again with other directions: leave "
                "generator None and preserve_rng_state True, or call it outside the checkpoint"
            )
        if torch.is_grad_enabled():  # double backward
            with torch.enable_grad():
                loss = _definition(vectors.to(slices.dtype), slices)
                (gradient,) = torch.autograd.grad(loss, vectors, create_graph=True)
            return (grads[0] * gradient).to(vectors.dtype), None
        return (grads[0] * ctx.shift * gradient.to(slices.dtype)).to(vectors.dtype), None


class _Pass(NamedTuple):
    """A layer's output in one pass, (vectors, features); its version then, None if compiled."""

    vectors: Tensor
    version: int | None


def _is_dead(tensor: Tensor) -> bool:
    """Whether the tensor belongs to a finished torch.func transform."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.unwrap_if_dead(tensor) is not tensor


def _in_reentrant_checkpoint(name: str) -> bool:
    """Whether a layer runs inside an autograd.Function's forward, as in the first run of reentrant
    checkpointing, which has no gradients; warns then."""
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._is_fwd_grad_enabled()  # off in an autograd.Function, on under no_grad
        or torch.is_inference_mode_enabled()
    ):
        return False
    warnings.warn(
        f"normnorm.PER passes {name!r} over: reentrant activation checkpointing runs it without "
        "gradients. checkpoint(..., use_reentrant=False) can be regularized",
        stacklevel=2,
    )
    return True


class PER:
    """Adds :func:`per_loss` of layer outputs to a training loss.

    ::

        per = normnorm.PER(model, ["layer1", "layer2"], weight=1e-4)
        loss = criterion(model(inputs), targets) + per.loss()

    Each forward pass of a layer in training mode with gradients enabled counts, once if activation
    checkpointing repeats it. A pass of the whole model that ends in an exception is discarded. A
    vector is one position of one sample, over the channels: the last dimension of the output of
    linear and layer norm layers, dimension 1 of the output of convolutions, the other norms and
    ``LayerNorm2d``. For other classes an output of three dimensions is (batch, length, features),
    and one of more is (batch, channels, ...).

    Reentrant checkpointing first runs a layer without gradients; such a layer is skipped with a
    warning. Copies of the model, or of this object, record nothing.

    Args:
        model: contains the layers.
        layers: names in ``model.named_modules()``, or one, or a predicate of (name, module). Each
            must return one tensor (batch, ...); of :class:`AddLayerNormalNorm` the output is used.
        weight: multiplies the sum over layers of the mean loss of their passes.
        num_slices, generator: as for :func:`per_loss`; directions are drawn for each pass.

    Raises:
        ValueError: an unknown name, no layer, or a weight that is negative or not finite; in a
            forward pass, an output that is not (batch, ...).
        TypeError: a TorchScript layer; in a forward pass, an output that is not one tensor.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str | Sequence[str] | Callable[[str, nn.Module], bool],
        weight: float,
        num_slices: int = 256,
        generator: torch.Generator | None = None,
    ) -> None:
        check_number("weight", weight)
        _check_directions(num_slices, generator)
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight must be finite and not negative; got {weight}")
        chosen = layer_outputs.named_layers(model, layers)
        if not chosen:
            raise ValueError("no layer was chosen to regularize")
        self.weight = weight
        self._num_slices = num_slices
        self._generator = generator
        # Passes since the last loss().
        self._losses: dict[str, list[_Pass]] = {name: [] for name in chosen}
        self._begun: list[tuple[BaseException | None, dict[str, int]]] = []
        self._removed = False
        self._watch = layer_outputs.Watch(model, chosen, self._take, "normnorm.PER")
        self._handles = [
            model.register_forward_pre_hook(layer_outputs.Hook(model, self._begin)),
            model.register_forward_hook(layer_outputs.Hook(model, self._end), always_call=True),
        ]

    def _take(self, name: str, module: nn.Module, _: Any, __: Any, output: Any) -> None:
        # loss() computes the loss: here, checkpointing would compute it twice.
        if not module.training or _in_reentrant_checkpoint(name) or not torch.is_grad_enabled():
            return
        vectors = layer_outputs.channels_last(module, layer_outputs.tensor_of(name, module, output))
        vectors = vectors.flatten(0, -2)
        if torch.compiler.is_compiling():
            self._losses[name].append(_Pass(vectors.clone(), None))
        elif not layer_outputs.recomputing():
            self._losses[name].append(_Pass(vectors, vectors._version))

    def _begin(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            lengths = {name: len(taken) for name, taken in self._losses.items()}
            self._begun.append((sys.exc_info()[1], lengths))

    def _end(self, *_: Any) -> None:
        if torch.compiler.is_compiling() or not self._begun:
            return
        before, lengths = self._begun.pop()
        if sys.exc_info()[1] is not before:  # the pass failed
            for name, length in lengths.items():
                del self._losses[name][length:]

    def loss(self) -> Tensor | float:
        """The weighted loss of the passes since the last call; 0.0 if none had gradients, and after
        :meth:`remove`.

        Raises:
            RuntimeError: no layer ran since the last call, or none in a compiled module ever did;
                or a layer's output was changed in place.
        """
        if not self._removed:
            self._watch.require_ran(afresh=True)
        taken, self._losses = self._losses, {name: [] for name in self._losses}
        means = []
        for name, passes in taken.items():
            losses = []
            for vectors, version in passes:
                if _is_dead(vectors):
                    continue
                if version is not None and vectors._version != version:
                    raise RuntimeError(
                        f"the output of {name!r} was changed in place before PER.loss() could read "
                        "it, such as by nn.ReLU(inplace=True) behind it"
                    )
                losses.append(per_loss(vectors, self._num_slices, self._generator))
            if losses:
                means.append(torch.stack(losses).mean())
        return self.weight * sum(means[1:], means[0]) if means else 0.0

    def remove(self) -> None:
        """Removes the hooks. ``with PER(...) as per:`` does so at the end of the block."""
        self._removed = True
        self._watch.remove()
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_losses": {}, "_begun": [], "_handles": []}

    def __enter__(self) -> "PER":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()
