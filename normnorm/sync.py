"""Batch normality normalization of a batch that is sharded over the ranks of a process group: the
function, the layers, and the conversion of a model. The collectives are in
:mod:`normnorm.distributed.statistics`.
"""

from collections.abc import Container
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import checks, modules
from . import functional as F
from .autograd import Running, forward_mode
from .backends.reference import count_batch, move_running, transforms_active
from .config import ForwardArguments
from .distributed.sharding import check_plain, is_dtensor, shards_of_batch, to_local
from .distributed.statistics import Synchronised
from .fused import BatchNormalNormAct2d
from .modules import _BatchNormalNorm
from .noise import as_seed
from .ops import empty_statistics

# Whether torch.compile differentiates the collectives; under 2.11 the input's gradient is wrong.
COMPILES = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def sync_batch_normal_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
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
    process_group: Any = None,
) -> Tensor:
    """Batch normality normalization in training over the shards of all ranks.

    Every rank of the group must call it with the same arguments; only the input's elements and its
    batch size, which may be 0, may differ. All must run the backward pass if any does.

    Args:
        input: (N, C) or ``(N, C, *)``, this rank's shard of the batch.
        running_mean, running_var, running_lmbda: (C,), all three or none; updated from the
            statistics of the whole batch, equal on all ranks afterwards if they were before.
        seed: may be equal on all ranks, since the global rank is the noise's stream.
        process_group: of the ranks that hold the batch; None for all.

    The other arguments are those of :func:`normnorm.functional.batch_normal_norm`.

    Raises:
        ValueError, TypeError: bad arguments, before any communication; a single value per channel
            over all ranks (on the CPU, where reading the count costs no synchronization).
        RuntimeError: under torch.func transforms and in forward mode; inside torch.compile with
            fullgraph=True before torch 2.13; and from torch.distributed, if another rank fails or
            exceeds the group's time-out.
    """
    checks.check_is_tensor(input)
    compiling = torch.compiler.is_compiling()
    if compiling and not COMPILES:
        raise RuntimeError(
            f"torch.compile of synchronised layers needs torch 2.13; got {torch.__version__} "
            "(compiled gradients were wrong under 2.11; without fullgraph=True they run uncompiled)"
        )
    if not compiling and (transforms_active() or forward_mode()):
        raise RuntimeError(
            "synchronised layers communicate, which torch.func transforms and forward-mode "
            "derivatives do not support; use BatchNormalNorm there"
        )
    running: Running = (running_mean, running_var, running_lmbda)
    tracked = F._check_running(input, running, momentum, num_batches_tracked, True)
    config = F._configure(
        input, "batch", 0, 0, eps, noise_train, True, alpha, order, transform_eps, activation
    )
    backend = "reference" if compiling else config.backend
    config = config._replace(stream=dist.get_rank(), backend=backend)
    check_plain(input, weight=weight, bias=bias)
    if residual is not None:
        input, weight, bias, residual = F._with_residual(input, weight, bias, residual, False)
    seed_tensor = as_seed(seed, input.device) if config.noise_train > 0.0 else None
    shards = None
    if is_dtensor(input):
        shards = shards_of_batch(input, process_group)
        input, seed_tensor = to_local(input), to_local(seed_tensor)
        weight, bias = shards.local("weight", weight), shards.local("bias", bias)
        residual = shards.local("residual", residual)
        running = tuple(map(to_local, running))
        num_batches_tracked = to_local(num_batches_tracked)
    tensors = (input, *running, weight, bias, residual, seed_tensor, None)
    checks.check_forward(ForwardArguments._make((*tensors, False, True, config)), shard=True)
    if tracked:
        stats = empty_statistics(input, config)
        checks.check_fold(stats, *running, num_batches_tracked, momentum, 2, eps)  # type: ignore[arg-type]
    output, stats, count = Synchronised.apply(
        input, weight, bias, residual, seed_tensor, config, process_group
    )
    if input.device.type == "cpu" and not compiling and count.item() == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 over all ranks "
            f"(input size {list(input.shape)} on this one)"
        )
    if tracked:
        # An empty batch changes no running statistics. A branch on the count would synchronize.
        factor = (count > 0).double() * count_batch(num_batches_tracked, momentum)
        move_running(stats, running, factor, count.clamp_min(2.0), eps)  # type: ignore[arg-type]
    return output if shards is None else shards.whole(output)


# For revert_sync(): the layer's class before the conversion, and its attribute "original_class",
# which replace_norms() set, or None. convert_sync() removes that attribute, because it names an
# unsynchronised class.
_BeforeSync = tuple[type[_BatchNormalNorm], type[nn.Module] | None]


class SyncBatchNormalNorm(_BatchNormalNorm):
    """Batch normality normalization of a batch that is sharded over a process group.

    In training the statistics, lambda and the noise's scale are those of the whole batch; outputs,
    gradients and running statistics equal those of one process with the whole batch. Shards may
    differ in size and be empty. In evaluation, in a group of one rank and without an initialised
    torch.distributed it equals :class:`BatchNormalNorm2d` and communicates nothing.

    The global rank is the noise's stream, so that ranks with equal seeds have different noise.

    Args:
        process_group: of the ranks that hold the batch; None for all. Every rank of it must take
            part in each training step, forward and backward.

    The other arguments are those of :class:`BatchNormalNorm1d`.

    Shape: (N, C) or ``(N, C, *)``, on a device that the group's backend serves (CPU with gloo, CUDA
    with NCCL).

    Raises:
        ValueError, TypeError: see :class:`BatchNormalNorm1d`, before any communication; a single
            value per channel over all ranks.
        RuntimeError: see :func:`sync_batch_normal_norm`.
    """

    _ranks: Container[int] = range(2, 65)  # torch's tensors have at most 64 dimensions
    _wanted = "at least 2D"
    _before_sync: _BeforeSync | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
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
        self.process_group = process_group

    def _normalize(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        alone = not (dist.is_available() and dist.is_initialized())
        if not self.training or alone or dist.get_world_size(self.process_group) == 1:
            return super()._normalize(input, residual, activation)
        self._check_input_dim(input)
        checks.check_noise_train(self.noise_train)
        self._complete()
        names = ("running_mean", "running_var", "running_lmbda", "num_batches_tracked")
        buffers = self._buffers if self.track_running_stats else {}
        mean, var, lmbda, tracked = map(buffers.get, names)
        return sync_batch_normal_norm(
            input, mean, var, lmbda, self.weight, self.bias, self.momentum, self._eps,
            **self._transform(), num_batches_tracked=tracked, residual=residual,
            activation=activation, process_group=self.process_group,
        )  # fmt: skip


class SyncBatchNormalNormAct2d(SyncBatchNormalNorm, BatchNormalNormAct2d):
    """:class:`BatchNormalNormAct2d` of a batch that is sharded over a process group.

    ``act(norm(input) + residual)``, fused, with the statistics of :class:`SyncBatchNormalNorm`.

    Args:
        arguments, keywords: those of :class:`BatchNormalNormAct2d`.
        process_group: of the ranks that hold the batch; None for all.

    Shape: input and residual (N, C) or ``(N, C, *)``.

    Raises:
        ValueError, TypeError, RuntimeError: see the two classes, before any communication.
    """

    def __init__(self, *arguments: Any, process_group: Any = None, **keywords: Any) -> None:
        # SyncBatchNormalNorm's constructor takes no activation.
        BatchNormalNormAct2d.__init__(self, *arguments, **keywords)
        self.process_group = process_group


# Classes and their synchronised counterparts, without subclasses, which may add state.
SYNCHRONISED: dict[type[_BatchNormalNorm], type[SyncBatchNormalNorm]] = {
    modules.BatchNormalNorm1d: SyncBatchNormalNorm,
    modules.BatchNormalNorm2d: SyncBatchNormalNorm,
    modules.BatchNormalNorm3d: SyncBatchNormalNorm,
    BatchNormalNormAct2d: SyncBatchNormalNormAct2d,
}


def convert_sync(module: nn.Module, process_group: Any = None) -> nn.Module:
    """Converts every BatchNormalNorm layer of a model to a synchronised one, in place.

    BatchNormalNorm1d, 2d and 3d become :class:`SyncBatchNormalNorm`, BatchNormalNormAct2d becomes
    :class:`SyncBatchNormalNormAct2d`. Parameters, buffers, hooks and attributes remain the same
    objects, so that optimizers stay valid. BatchNorm layers of torch and timm are not converted;
    ``torch.nn.SyncBatchNorm.convert_sync_batchnorm`` and ``timm.layers.convert_sync_batchnorm`` do
    that, and do not convert layers of normnorm.

    Args:
        module: a model or a single layer.
        process_group: of the ranks that hold the batch; None for all.

    Returns:
        The same module.

    Raises:
        TypeError: a layer's class is derived from one of normnorm (a lazy layer before its first
            input, a parametrized one, a user's class), whose additions would be lost. The model is
            unchanged then.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module; got {type(module).__name__}")
    layers = []
    for name, layer in module.named_modules():
        if isinstance(layer, _BatchNormalNorm) and not isinstance(layer, SyncBatchNormalNorm):
            if type(layer) not in SYNCHRONISED:
                raise TypeError(
                    f"'{name}' is a {type(layer).__name__}, derived from a layer of normnorm; "
                    "conversion would lose what it adds. Expected BatchNormalNorm1d, 2d or 3d, "
                    "or BatchNormalNormAct2d"
                )
            layers.append(layer)
    for layer in layers:
        before: _BeforeSync = type(layer), layer.__dict__.pop("original_class", None)
        layer.__class__ = SYNCHRONISED[type(layer)]  # type: ignore[assignment]
        layer.__dict__.update(process_group=process_group, _before_sync=before)
    return module


def revert_sync(module: nn.Module) -> nn.Module:
    """Reverses :func:`convert_sync`, in place; layers constructed as synchronised ones stay.

    Returns:
        The same module.
    """
    for layer in module.modules():
        if isinstance(layer, SyncBatchNormalNorm) and layer._before_sync is not None:
            plain, original = layer._before_sync
            del layer.process_group, layer._before_sync
            layer.__class__ = plain  # type: ignore[assignment]
            if original is not None:
                layer.__dict__["original_class"] = original
    return module
