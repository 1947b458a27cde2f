"""Normality normalization as functions, in torch.nn.functional's argument order.

Each function standardizes groups of elements, estimates a Yeo-Johnson exponent lambda by one Newton
step, transforms the elements towards a Gaussian, adds scaled Gaussian noise in training, and
applies an affine map (Eftekhari and Papyan, ICML 2025; ``docs/internals/mathematics.md``).

Arguments and errors that the functions share:

* dtypes float64, float32, bfloat16 and float16 (half types compute in float32); the output has
  the input's dtype (except with a ``residual`` of another dtype), shape and memory format;
* ``eps``: added to the variance; its root also damps the Newton step. Must be positive (torch's own
  layer_norm accepts 0);
* ``momentum``: weight of a batch in the running statistics; None averages over all batches and
  needs ``num_batches_tracked``;
* ``noise_train``: weight of the noise, in units of the group's mean absolute deviation;
* ``alpha``: length of the Newton step; with ``alpha=0`` and no noise each function equals its
  counterpart in torch.nn.functional;
* ``order``: 2 for a Newton step, 1 for a plain gradient step;
* ``transform_eps``: 0 for the exact Yeo-Johnson transform; ``math.sqrt(eps)`` shifts its exponent
  as the authors' code does;
* ``residual``: added to the output, of the input's shape; ``activation``: None or "relu", applied
  last. The same kernel computes both, without intermediate reads and writes of memory. With an
  activation autograd saves the output in addition to the input, as torch's relu does. A residual
  of another floating dtype is promoted with the input as in torch's ``input + residual``, before
  the op, and the output has the promoted dtype;
* ``seed``: makes the noise reproducible: an int or an int64 tensor of shape (1,) on the input's
  device. None draws one from the device's default generator;
* errors: wrong arguments raise ValueError or TypeError with the expected and the actual value, and
  leave every buffer unchanged. RuntimeError if the chosen backend cannot run or does not serve the
  input's device (:func:`normnorm.use_backend`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends, checks, likelihood, reference
from .autograd import Running, normal_norm
from .config import Config
from .distributed.sharding import check_plain, is_dtensor, shards_of, to_local
from .noise import as_seed, draw_seed
from .ops import Update
from .statistics import statistics_dtype

__all__ = [
    "add_layer_normal_norm",
    "batch_normal_norm",
    "estimate_lmbda",
    "group_normal_norm",
    "instance_normal_norm",
    "layer_normal_norm",
    "yeo_johnson",
]

_NO_RUNNING: Running = (None, None, None)


def _is_channels_last(input: Tensor) -> bool:
    """Whether the input is dense in (N, spatial..., C) order and not in row-major order. Compares
    strides, because torch.vmap does not support queries of memory formats."""
    if input.dim() not in (4, 5) or input.is_contiguous():
        return False
    expected = 1
    for dim in (1, *range(input.dim() - 1, 1, -1), 0):
        if input.size(dim) != 1:
            if input.stride(dim) != expected:
                return False
            expected *= input.size(dim)
    return True


def _configure(
    input: Tensor,
    kind: str,
    num_groups: int,
    normalized_ndim: int,
    eps: float,
    noise_train: float,
    training: bool,
    alpha: float,
    order: int,
    transform_eps: float,
    activation: str | None = None,
) -> Config:
    """The op's configuration: the caller's settings, the noise's order, and the backend's name."""
    floats = type(eps) is type(alpha) is type(transform_eps) is float
    if not (floats and type(order) is int):
        # An op would read the number from a tensor and drop its gradient without an error.
        checks.check_transform(eps, alpha, order, transform_eps)
    checks.check_noise_train(noise_train)
    if activation is not None:
        checks.check_activation(activation)  # the definition does not check it
    if not (training and noise_train > 0.0):
        noise_train = 0.0  # a constant even if a compiler has made the attribute symbolic
    channels_last = noise_train > 0.0 and _is_channels_last(input)
    fields = (
        kind, num_groups, normalized_ndim, eps, noise_train, alpha, order, transform_eps, 0,
        channels_last, activation or "", backends.resolve(input.device).name,
    )  # fmt: skip
    if torch.compiler.is_compiling():
        return Config(*fields)
    return tuple.__new__(Config, fields)  # skips Config.__new__, to save host time


def _apply(
    input: Tensor,
    running: Running,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | int | None,
    config: Config,
    residual: Tensor | None = None,
    prenorm: bool = False,
    update: Update | None = None,
) -> tuple[Any, Any]:
    """Runs the op on plain or distributed tensors: (output, sum)."""
    if (weight is not None and type(weight) is not Parameter) or (
        bias is not None and type(bias) is not Parameter
    ):
        checks.check_tensors(weight=weight, bias=bias)
        check_plain(input, weight=weight, bias=bias)
    if residual is not None or prenorm:  # before a seed is drawn
        input, weight, bias, residual = _with_residual(input, weight, bias, residual, prenorm)
    drawn: Any = None
    if config.noise_train > 0.0 and seed is not None:
        drawn = as_seed(seed, input.device)
    tensors = (input, *running, weight, bias, residual, drawn, None)
    if type(input) is Tensor or not is_dtensor(input):
        return normal_norm(tensors, config, prenorm, update)
    if config.noise_train > 0.0 and drawn is None:
        tensors = (*tensors[:7], draw_seed(input.device), None)
    shards, tensors, config = shards_of(tensors, config, update is not None)
    if update is not None:  # replicated: shards_of() raises an error if they could differ
        update = Update(*map(to_local, update))
    output, total = normal_norm(tensors, config, prenorm, update)
    return shards.whole(output), shards.whole(total) if prenorm and total is not None else None


def _with_residual(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any, prenorm: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """(input, weight, bias, residual) for an op over the dtype of ``input + residual``."""
    check_plain(input, residual=residual)
    narrow = input.dtype
    input, residual = checks.with_residual(input, residual)
    if input.dtype is not narrow and not prenorm:
        weight, bias = _promoted(weight, narrow, input), _promoted(bias, narrow, input)
    return input, weight, bias, residual


def _promoted(parameter: Tensor | None, narrow: torch.dtype, input: Tensor) -> Tensor | None:
    """A parameter for an input of dtype ``narrow``, cast for the promoted input."""
    if parameter is None or parameter.dtype not in (narrow, statistics_dtype(narrow)):
        return parameter  # None, or of a wrong dtype, for which the op raises an error
    return parameter.to(statistics_dtype(input.dtype))


def _check_running(
    input: Tensor, running: Running, momentum: float | None, tracked: Tensor | None, update: bool
) -> bool:
    """Whether running statistics were given. Checks them here, before a seed is drawn."""
    mean, var, lmbda = running
    if mean is None or var is None or lmbda is None:
        checks.check_together(mean, var, lmbda)
        return False
    if not (type(mean) is Tensor and type(var) is Tensor and type(lmbda) is Tensor):
        checks.check_tensors(running_mean=mean, running_var=var, running_lmbda=lmbda)
    if tracked is not None and type(tracked) is not Tensor:
        checks.check_tensors(num_batches_tracked=tracked)
    # fold_running_ checks that var and lambda have the shape of mean.
    if update and input.dim() > 1 and mean.shape != input.shape[1:2]:
        raise ValueError(
            f"running_mean must have shape ({input.size(1)},) for an input of shape "
            f"{tuple(input.shape)}; got {tuple(mean.shape)}"
        )
    if type(momentum) is not float and (update or momentum is not None):
        checks.check_momentum(momentum, tracked)
    return True


def batch_normal_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    noise_train: float = 0.4,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | int | None = None,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Batch normality normalization: a group is one channel over the batch and its positions.

    In training the batch's own statistics are used, noise is added, and the running statistics,
    where given, move towards the batch's by ``momentum`` (the variance is unbiased, lambda is the
    batch's estimate). In evaluation the running statistics are used, lambda too, without noise.

    Args:
        input: (N, C) or ``(N, C, *)``.
        running_mean, running_var, running_lmbda: (C,), all three or none; updated in place in
            training, required otherwise.
        weight, bias: (C,).
        training: whether to use the batch's statistics and add noise.
        num_batches_tracked: int64, one element, incremented in training.

    The other arguments are described in the module's docstring.

    Raises:
        ValueError: also for a single value per channel in training.
    """
    checks.check_is_tensor(input)
    running: Running = (running_mean, running_var, running_lmbda)
    tracked = _check_running(input, running, momentum, num_batches_tracked, training)
    if not training and not tracked:
        raise ValueError(
            "Expected running_mean, running_var and running_lmbda to be given when training=False"
        )
    config = _configure(
        input, "batch", 0, 0, eps, noise_train, training, alpha, order,
        transform_eps, activation,
    )  # fmt: skip
    if not training:
        return _apply(input, running, weight, bias, seed, config, residual)[0]
    update = None
    if tracked and input.numel() > 0:
        update = Update(*running, num_batches_tracked, momentum)  # type: ignore[arg-type]
    output, _ = _apply(input, _NO_RUNNING, weight, bias, seed, config, residual, False, update)
    if tracked and update is None and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return output


def layer_normal_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    training: bool = False,
    noise_train: float = 1.0,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | int | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Layer normality normalization: a group is the trailing dimensions of one sample.

    Args:
        input: ``(*, *normalized_shape)``.
        normalized_shape: sizes of the trailing dimensions to normalize over.
        weight, bias: of shape ``normalized_shape``.
        training: whether to add noise.

    The other arguments are described in the module's docstring.

    Raises:
        ValueError: also if the input's shape does not end in ``normalized_shape``.
    """
    _check_normalized_shape(input, normalized_shape)
    config = _configure(
        input, "layer", 0, len(normalized_shape), eps, noise_train, training, alpha, order,
        transform_eps, activation,
    )  # fmt: skip
    return _apply(input, _NO_RUNNING, weight, bias, seed, config, residual)[0]


def _check_normalized_shape(input: Tensor, normalized_shape: Sequence[int]) -> None:
    checks.check_is_tensor(input)
    if type(normalized_shape) is not tuple and isinstance(normalized_shape, int):
        raise TypeError(f"normalized_shape must be a sequence of ints; got {normalized_shape}")
    shape = tuple(normalized_shape)
    if not shape or tuple(input.shape[max(input.dim() - len(shape), 0) :]) != shape:
        raise ValueError(
            f"Given normalized_shape={list(shape)}, expected input with shape "
            f"[*, {', '.join(map(str, shape))}], but got input of size {list(input.shape)}"
        )


def add_layer_normal_norm(
    input: Tensor,
    residual: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    training: bool = False,
    noise_train: float = 1.0,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | int | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual stream of a pre-norm transformer: adds, then normalizes the sum.

    ``sum = input + residual; output = layer_normal_norm(sum, ...)`` by fused kernels: the sum is
    not read again, and the backward pass adds its gradient as it writes that of the input.

    Args:
        input, residual: ``(*, *normalized_shape)``, of one shape and device. Different floating
            dtypes are promoted as in ``input + residual``.

    The other arguments are those of :func:`layer_normal_norm`.

    Returns:
        (output, sum), both of the input's shape and of the dtype of ``input + residual``; the sum
        is the residual stream that the next block adds to.

    Raises:
        ValueError: also if the residual has another shape or device than the input.
        TypeError: also if the residual is not floating, or the parameters have neither the sum's
            dtype nor float32.
    """
    _check_normalized_shape(input, normalized_shape)
    config = _configure(
        input, "layer", 0, len(normalized_shape), eps, noise_train, training, alpha, order,
        transform_eps,
    )  # fmt: skip
    return _apply(input, _NO_RUNNING, weight, bias, seed, config, residual, True)


def group_normal_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    training: bool = False,
    noise_train: float = 0.4,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | int | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Group normality normalization: a group is C / num_groups channels of one sample.

    Args:
        input: ``(N, C, *)``.
        num_groups: must divide C.
        weight, bias: (C,).
        training: whether to add noise.

    The other arguments are described in the module's docstring.

    Raises:
        ValueError: also if the batch is one sample and a group has one value, as in torch.
    """
    checks.check_is_tensor(input)
    if input.dim() < 2:
        raise ValueError(f"Expected at least 2 dimensions for input tensor but got {input.dim()}")
    if type(num_groups) is not int:
        checks.check_integer("num_groups", num_groups)
    config = _configure(
        input, "group", num_groups, 0, eps, noise_train, training, alpha, order,
        transform_eps, activation,
    )  # fmt: skip
    divides = num_groups >= 1 and input.size(1) % num_groups == 0
    if divides and input.size(0) * checks.group_size(input, config) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, "
            f"got input size {list(input.shape)}"
        )
    return _apply(input, _NO_RUNNING, weight, bias, seed, config, residual)[0]


def instance_normal_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    running_lmbda: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    training: bool = False,
    noise_train: float = 0.4,
    alpha: float = 1.0,
    order: int = 2,
    transform_eps: float = 0.0,
    seed: Tensor | int | None = None,
    num_batches_tracked: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Instance normality normalization: a group is one channel of one sample.

    Args:
        input: ``(N, C, *)``.
        running_mean, running_var, running_lmbda: (C,), all three or none. With
            ``use_input_stats`` they move towards the mean of the samples' statistics; without
            it they replace the samples' statistics.
        weight, bias: (C,).
        use_input_stats: whether each instance is normalized by its own statistics.
        training: whether to add noise; without ``use_input_stats`` none is added.
        num_batches_tracked: int64, one element, incremented with the running statistics.

    The other arguments are described in the module's docstring.

    Raises:
        ValueError: also for a single spatial element with ``use_input_stats``.
    """
    checks.check_is_tensor(input)
    running: Running = (running_mean, running_var, running_lmbda)
    tracked = _check_running(input, running, momentum, num_batches_tracked, use_input_stats)
    if not use_input_stats and not tracked:
        raise ValueError(
            "Expected running_mean, running_var and running_lmbda to be given when "
            "use_input_stats=False"
        )
    # With running statistics, the same for all samples, it equals a batch norm in evaluation.
    kind = "instance" if use_input_stats else "batch"
    config = _configure(
        input, kind, 0, 0, eps, noise_train, training and use_input_stats, alpha, order,
        transform_eps, activation,
    )  # fmt: skip
    if not use_input_stats:
        return _apply(input, running, weight, bias, seed, config, residual)[0]
    update = None
    if tracked and input.numel() > 0:
        update = Update(*running, num_batches_tracked, momentum)  # type: ignore[arg-type]
    return _apply(input, _NO_RUNNING, weight, bias, seed, config, residual, False, update)[0]


def yeo_johnson(h: Tensor, lmbda: Tensor | float, transform_eps: float = 0.0) -> Tensor:
    """The Yeo-Johnson power transform (Yeo and Johnson, Biometrika 2000), elementwise.

    Differentiable in ``h`` and ``lmbda`` to any order, with exact limits at lambda 0 and 2.

    Args:
        h: any shape, floating; half types compute in float32.
        lmbda: broadcastable to h; a number or a tensor.
        transform_eps: distance that the exponent keeps from zero; 0 for the exact transform.

    Returns:
        A tensor of the broadcast shape in h's dtype.

    Raises:
        TypeError: h is not a floating tensor, or lmbda is neither a real number nor a tensor.
        ValueError: transform_eps is negative or not finite.
    """
    _check_floating("h", h)
    checks.check_transform(1.0, 1.0, 2, transform_eps)
    dtype = statistics_dtype(h.dtype)
    if not isinstance(lmbda, Tensor):
        checks.check_number("lmbda", lmbda)
    elif lmbda.is_complex():
        raise TypeError(f"lmbda must be real; got {lmbda.dtype}")
    else:
        lmbda = lmbda.to(dtype)
    return reference.yeo_johnson(h.to(dtype), lmbda, transform_eps).to(h.dtype)


def estimate_lmbda(
    h: Tensor,
    dim: int | Sequence[int] | None = None,
    *,
    eps: float = 1e-5,
    alpha: float = 1.0,
    order: int = 2,
    keepdim: bool = False,
    iterations: int | None = 1,
) -> Tensor:
    """Lambda by Newton's method from 1 on the Yeo-Johnson negative log-likelihood.

    Args:
        h: standardized values (mean 0, variance 1 over ``dim``), floating.
        dim: the dimensions to reduce; None or () for all.
        eps: its root is added to the second derivative.
        alpha: length of the step.
        order: 2 for Newton's step, 1 for a plain gradient step.
        keepdim: whether the reduced dimensions stay as size 1.
        iterations: number of steps (the layers take 1); None for the likelihood's optimum, with its
            gradient by the implicit function theorem. Values other than 1 require ``alpha=1`` and
            ``order=2``.

    Returns:
        Lambda in float32 (float64 for float64 input), differentiable in ``h``.

    Raises:
        TypeError: h is not a floating tensor, or another argument has the wrong type.
        ValueError: eps, alpha, order or iterations out of range, a dimension named twice.
        IndexError: a dimension that h does not have.
    """
    _check_floating("h", h)
    checks.check_transform(eps, alpha, order, 0.0)
    dims = _dims(h, dim)
    if not isinstance(keepdim, bool):
        raise TypeError(f"keepdim must be True or False; got {keepdim!r}")
    if iterations is not None:
        checks.check_integer("iterations", iterations)
        if iterations < 1:
            raise ValueError(f"iterations must be positive or None; got {iterations}")
    h = h.to(statistics_dtype(h.dtype))
    if iterations == 1:
        lmbda = reference.estimate_lmbda(h, dims, eps, alpha, order)
    elif alpha != 1.0 or order != 2:
        raise ValueError(
            f"iterations other than 1 take whole Newton steps (alpha 1, order 2); got alpha "
            f"{alpha} and order {order}"
        )
    elif iterations is None:
        lmbda = likelihood.optimal_lmbda(h, dims)
    else:
        lmbda = likelihood.newton_lmbda(h, dims, iterations, eps)
    return lmbda if keepdim else lmbda.squeeze(dims)


def _dims(h: Tensor, dim: int | Sequence[int] | None) -> tuple[int, ...]:
    """The dimensions to reduce, as non-negative indices: all for None and (), as in torch."""
    given: Any = () if dim is None else (dim,) if isinstance(dim, int) else dim
    if (
        isinstance(given, str)
        or not isinstance(given, Sequence)
        or any(isinstance(d, bool) or not isinstance(d, int) for d in given)
    ):
        raise TypeError(f"dim must be an int, a sequence of ints or None; got {dim!r}")
    if any(not -h.dim() <= d < h.dim() for d in given):
        raise IndexError(f"dim must name dimensions of a tensor of {h.dim()}; got {dim!r}")
    dims = tuple(d % h.dim() for d in given)
    if len(set(dims)) < len(dims):
        raise ValueError(f"dim must name each dimension once; got {dim!r}")
    return dims or tuple(range(h.dim()))


def _check_floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a floating tensor; got {got}")


# For torch.fx's symbolic tracer: each call is one node of its graph.
for _name in __all__:
    torch.fx.wrap(_name)
