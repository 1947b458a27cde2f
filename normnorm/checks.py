"""The checks of every op's arguments, and their error messages.

Backends written in Python and the shape inference of the ops call these functions; the compiled
backends check the same rules before they read a pointer. No function reads a tensor's values, so
none waits for a device. Messages are formatted only when an error is raised, because a compiler
that traces this code cannot format a symbolic number.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor, nn

from .config import ACTIVATIONS, KINDS, BackwardArguments, Config, ForwardArguments
from .statistics import Row, statistics_dtype

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_STRIDED = torch.strided
_LEAST, _MOST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def group_count(input: Tensor, config: Config) -> int:
    """The number of groups of an input: the second size of its statistics tensor."""
    if config.kind == "batch":
        return input.size(1)
    if config.kind == "layer":
        return math.prod(input.shape[: input.dim() - config.normalized_ndim])
    return input.size(0) * (config.num_groups if config.kind == "group" else input.size(1))


def group_size(input: Tensor, config: Config) -> int:
    """The number of elements of one group."""
    if config.kind == "layer":
        return math.prod(input.shape[input.dim() - config.normalized_ndim :])
    spatial = math.prod(input.shape[2:])
    if config.kind == "batch":
        return input.size(0) * spatial
    return spatial * (input.size(1) // config.num_groups if config.kind == "group" else 1)


def parameter_shape(input: Tensor, config: Config) -> tuple[int, ...]:
    """The shape that weight and bias must have."""
    if config.kind == "layer":
        return tuple(input.shape[input.dim() - config.normalized_ndim :])
    return (input.size(1),)


def _check_config(input: Tensor, config: Config) -> None:
    kind, num_groups, normalized_ndim = config[:3]
    _check_floating("input", input)
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got '{kind}'")
    if kind == "layer":
        if not 1 <= normalized_ndim <= input.dim():
            raise ValueError(
                f"kind 'layer' normalizes between 1 and all of the input's trailing dimensions; "
                f"got normalized_ndim {normalized_ndim} for an input of shape {_shape(input)}"
            )
    elif normalized_ndim != 0:
        raise ValueError(
            f"normalized_ndim belongs to kind 'layer'; got {normalized_ndim} for kind '{kind}'"
        )
    elif input.dim() < 2:
        raise ValueError(
            f"kind '{kind}' wants an input of shape (N, C, ...); got shape {_shape(input)}"
        )
    if kind == "group":
        if num_groups < 1:
            raise ValueError(f"num_groups must be positive; got {num_groups}")
        if input.size(1) % num_groups != 0:
            raise ValueError(
                f"num_channels ({input.size(1)}) must be divisible by num_groups ({num_groups})"
            )
    elif num_groups != 0:
        raise ValueError(f"num_groups belongs to kind 'group'; got {num_groups} for '{kind}'")
    check_transform(config.eps, config.alpha, config.order, config.transform_eps)
    check_activation(config.activation)


def _check_floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name} must be float64, float32, bfloat16 or float16; got {tensor.dtype}")


def _check_device(name: str, tensor: Tensor, other: Tensor, owner: str = "input's") -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} must be on the {owner} device {other.device}; got {tensor.device}"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], which: str) -> None:
    """``which`` describes the shape in the error message."""
    if _shape(tensor) != shape:
        raise ValueError(f"{name} must have shape {shape}{which}; got {_shape(tensor)}")


def _check_statistics_dtype(name: str, tensor: Tensor, input: Tensor) -> None:
    dtype = statistics_dtype(input.dtype)
    if tensor.dtype != dtype:
        raise TypeError(f"{name} must be {dtype} for this input; got {tensor.dtype}")


def check_number(name: str, value: Any) -> None:
    """Checks for a real number of Python or numpy, or a compiler's symbolic number."""
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)):
        return
    if isinstance(value, Tensor):
        # An op would read the number from the tensor, which would get no gradient.
        raise TypeError(
            f"{name} must be a number, since its gradient is not computed; got a tensor of shape "
            f"{_shape(value)}"
        )
    if not (isinstance(value, numbers.Real) and type(value).__module__ == "numpy"):
        raise TypeError(f"{name} must be a number; got {value!r} of type {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """Checks for a number of an integer type."""
    check_number(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")


def check_is_module(model: nn.Module) -> None:
    """Checks for an nn.Module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")


def check_tensors(**tensors: Any) -> None:
    """Checks that the arguments are tensors or None."""
    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None; got {type(tensor).__name__}")


def _check_eps(eps: float) -> None:
    if not 0.0 < eps < math.inf:
        raise ValueError(f"eps must be positive and finite; got {eps}")


def check_transform(eps: float, alpha: float, order: int, transform_eps: float) -> None:
    """Checks the settings of the standardization and the transform."""
    check_number("eps", eps)
    check_number("alpha", alpha)
    check_integer("order", order)
    check_number("transform_eps", transform_eps)
    _check_eps(eps)
    if not _LEAST <= eps <= _MOST:
        raise ValueError(
            f"eps must lie between 1.1755e-38 and 3.4028e+38, what float32 holds in full; got {eps}"
        )
    if not -math.inf < alpha < math.inf:
        raise ValueError(f"alpha must be finite; got {alpha}")
    if order not in (1, 2):
        raise ValueError(f"order must be 1 or 2; got {order}")
    if not 0.0 <= transform_eps < math.inf:
        raise ValueError(f"transform_eps must be finite and at least 0; got {transform_eps}")


def check_noise_train(noise_train: float) -> None:
    """Checks the weight of the noise, also in evaluation."""
    if type(noise_train) is not float:
        check_number("noise_train", noise_train)
    if not 0.0 <= noise_train < math.inf:
        raise ValueError(f"noise_train must be finite and at least 0; got {noise_train}")


def check_is_tensor(tensor: Tensor, name: str = "input") -> None:
    """Checks for a dense (strided) tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(tensor).__name__}")
    if tensor.layout is not _STRIDED:
        raise TypeError(f"{name} must be a dense tensor, of layout {_STRIDED}; got {tensor.layout}")


def check_activation(activation: str) -> None:
    """Checks the name of the activation."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be 'relu', or None or '' for none; got '{activation}'")


def _check_place(name: str, tensor: Tensor, input: Tensor) -> None:
    _check_device(name, tensor, input)
    if _shape(tensor) != _shape(input):
        raise ValueError(
            f"{name} must have the input's shape {_shape(input)}; got {_shape(tensor)}"
        )


def _check_like_input(name: str, tensor: Tensor, input: Tensor) -> None:
    _check_place(name, tensor, input)
    if tensor.dtype != input.dtype:
        raise TypeError(f"{name} must have the input's dtype {input.dtype}; got {tensor.dtype}")


def with_residual(input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Input and residual in the dtype of ``input + residual``, since the ops require one dtype.

    Under autocast, for example, a branch is in half precision and the residual stream in float32.
    """
    check_is_tensor(residual, "residual")
    _check_place("residual", residual, input)
    if residual.dtype is input.dtype:
        return input, residual
    _check_floating("input", input)
    _check_floating("residual", residual)
    dtype = torch.promote_types(input.dtype, residual.dtype)
    return input.to(dtype), residual.to(dtype)


def _check_parameters(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> None:
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None:
            continue
        _check_device(name, parameter, input)
        _check_shape(name, parameter, shape, " for this input")
        if parameter.dtype not in (input.dtype, statistics_dtype(input.dtype)):
            half = "" if input.dtype == statistics_dtype(input.dtype) else " or torch.float32"
            raise TypeError(
                f"{name} must have the input's dtype {input.dtype}{half}; got {parameter.dtype}"
            )
    if weight is not None and bias is not None and weight.dtype != bias.dtype:
        raise TypeError(f"weight and bias must have one dtype; got {weight.dtype} and {bias.dtype}")


def _check_noise(
    input: Tensor, noise_train: float, seed: Tensor | None, noise_scale: Tensor | None, groups: int
) -> None:
    check_noise_train(noise_train)
    if noise_train > 0.0 and seed is None:
        raise ValueError("noise_train > 0 needs a seed tensor; got None")
    if seed is not None:
        _check_device("seed", seed, input)
        if seed.dtype != torch.int64:
            raise TypeError(f"seed must be an int64 tensor; got {seed.dtype}")
        if _shape(seed) != (1,):
            raise ValueError(f"seed must have shape (1,); got shape {_shape(seed)}")
    if noise_scale is not None:
        _check_device("noise_scale", noise_scale, input)
        _check_shape("noise_scale", noise_scale, (groups,), ", one for each group")
        _check_statistics_dtype("noise_scale", noise_scale, input)


def check_together(mean: Tensor | None, var: Tensor | None, lmbda: Tensor | None) -> None:
    """Checks that all three running statistics are given, or none."""
    given = (mean is not None) + (var is not None) + (lmbda is not None)
    if given not in (0, 3):
        raise ValueError(
            "running_mean, running_var and running_lmbda must be given together or not at all; "
            f"got {given} of them"
        )


def check_momentum(momentum: float | None, num_batches_tracked: Tensor | None) -> None:
    """Checks the momentum, and with None that ``num_batches_tracked`` is given."""
    if momentum is not None:
        check_number("momentum", momentum)
        if not -math.inf < momentum < math.inf:
            raise ValueError(f"momentum must be finite or None; got {momentum}")
    elif num_batches_tracked is None:
        raise ValueError("momentum None (a cumulative average) needs num_batches_tracked; got None")


def _check_channel_buffer(name: str, tensor: Tensor, channels: int) -> None:
    _check_shape(name, tensor, (channels,), ", one for each channel")
    _check_floating(name, tensor)


def check_forward(call: ForwardArguments, shard: bool = False) -> None:
    """Checks all arguments of ``normal_norm_forward``.

    A ``shard`` may have groups of any size, because other ranks hold the rest of them.
    """
    input, config = call.input, call.config
    check_tensors(weight=call.weight, bias=call.bias)
    _check_config(input, config)
    if call.residual is not None:
        _check_like_input("residual", call.residual, input)
    running = call[1:4]
    if call.prenorm:
        if call.residual is None:
            raise ValueError("prenorm needs a residual; got None")
        if any(tensor is not None for tensor in running):
            raise ValueError("prenorm takes no running statistics; got them")
    check_together(*running)
    if call.running_mean is None:
        whole = config.kind in ("batch", "instance") and not shard
        if whole and group_size(input, config) == 1:
            what = "value per channel" if config.kind == "batch" else "spatial element"
            raise ValueError(
                f"Expected more than 1 {what} when training, got input size {list(input.shape)}"
            )
    else:
        if config.kind != "batch":
            raise ValueError(f"running statistics belong to kind 'batch'; got kind '{config.kind}'")
        for name, tensor in zip(call._fields[1:4], running, strict=True):
            assert tensor is not None
            _check_device(name, tensor, input)
            _check_channel_buffer(name, tensor, input.size(1))
    _check_noise(input, config.noise_train, call.seed, call.noise_scale, group_count(input, config))
    _check_parameters(input, call.weight, call.bias, parameter_shape(input, config))


def check_backward(call: BackwardArguments) -> None:
    """Checks all arguments of ``normal_norm_backward``."""
    input, stats, config = call.input, call.stats, call.config
    _check_config(input, config)
    _check_like_input("grad_output", call.grad_output, input)
    if config.activation and call.output is None:
        raise ValueError(f"activation '{config.activation}' needs the forward's output; got None")
    if call.output is not None:
        if not config.activation:
            raise ValueError("output belongs to an activation; got a tensor and activation ''")
        _check_like_input("output", call.output, input)
    if call.grad_sum is not None:
        _check_like_input("grad_sum", call.grad_sum, input)
    groups = group_count(input, config)
    _check_device("stats", stats, input)
    _check_shape("stats", stats, (len(Row), groups), " for this input")
    _check_statistics_dtype("stats", stats, input)
    _check_noise(input, config.noise_train, call.seed, None, groups)
    _check_parameters(input, call.weight, call.bias, parameter_shape(input, config))
    if call.needs_weight and call.weight is None:
        raise ValueError("needs_weight asks for weight; got None")
    if call.needs_bias and call.bias is None:
        raise ValueError("needs_bias asks for bias; got None")


def check_fold(
    stats: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_lmbda: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    eps: float,
) -> None:
    """Checks all arguments of ``fold_running_``."""
    _check_eps(eps)
    if count < 2:
        raise ValueError(f"running statistics need at least 2 elements a group; got count {count}")
    if stats.dim() != 2 or stats.size(0) != len(Row):
        raise ValueError(f"stats must have shape ({len(Row)}, groups); got {_shape(stats)}")
    if stats.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"stats must be float32 or float64; got {stats.dtype}")
    if running_mean.dim() != 1:
        raise ValueError(f"running_mean must have shape (C,); got {_shape(running_mean)}")
    channels = running_mean.size(0)
    names = ("running_mean", "running_var", "running_lmbda")
    for name, buffer in zip(names, (running_mean, running_var, running_lmbda), strict=True):
        _check_channel_buffer(name, buffer, channels)
        _check_device(name, buffer, stats, "statistics'")
        if channels > 1 and buffer.stride(0) == 0:
            raise ValueError(
                f"{name} must have memory for each channel; got one element expanded to {channels}"
            )
    if running_mean is running_var or running_var is running_lmbda or running_lmbda is running_mean:
        raise ValueError(
            "running_mean, running_var and running_lmbda must be three buffers; "
            "got the same memory twice"
        )
    if channels == 0 or stats.size(1) == 0 or stats.size(1) % channels != 0:
        raise ValueError(
            f"stats must hold a multiple of the {channels} channels; got {stats.size(1)} groups"
        )
    if num_batches_tracked is not None:
        _check_device("num_batches_tracked", num_batches_tracked, stats, "statistics'")
        if num_batches_tracked.dtype != torch.int64 or num_batches_tracked.numel() != 1:
            raise TypeError(
                "num_batches_tracked must be one int64; got "
                f"{num_batches_tracked.dtype} of shape {_shape(num_batches_tracked)}"
            )
    check_momentum(momentum, num_batches_tracked)
