"""The layers: torch.nn's constructors and state, normality normalization inside.

Every class takes its torch counterpart's arguments in the same order, and by keyword
``noise_train``, ``alpha``, ``order`` and ``transform_eps`` (:mod:`normnorm.functional`), which are
plain attributes that may change between steps. Noise is added in training only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from normnorm import functional as F
from normnorm.checkpoints import Loading
from normnorm.checks import (
    check_integer,
    check_is_tensor,
    check_noise_train,
    check_number,
    check_transform,
)
from normnorm.eps import Eps, plain

__all__ = [
    "BatchNormalNorm1d",
    "BatchNormalNorm2d",
    "BatchNormalNorm3d",
    "GroupNormalNorm",
    "InstanceNormalNorm1d",
    "InstanceNormalNorm2d",
    "InstanceNormalNorm3d",
    "LayerNormalNorm",
    "LayerNormalNorm2d",
]


class _Transform:
    """What every layer has of its own beside its torch base class."""

    eps: float
    forward: Any
    noise_train: float
    alpha: float
    order: int
    transform_eps: float
    weight: Any
    bias: Any

    def reset_parameters(self) -> None:
        """Weight 1 and bias 0."""
        # The batch and group layers of torch 2.10 and 2.11 want a bias wherever there is a weight.
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _set_transform(
        self, noise_train: float, alpha: float, order: int, transform_eps: float
    ) -> None:
        check_noise_train(noise_train)
        check_transform(self.eps, alpha, order, transform_eps)
        self.noise_train = noise_train
        self.alpha = alpha
        self.order = order
        self.transform_eps = transform_eps

    def _transform(self) -> dict[str, Any]:
        return {
            "noise_train": self.noise_train,
            "alpha": self.alpha,
            "order": self.order,
            "transform_eps": self.transform_eps,
        }

    def _node(self, owner: type[_Transform], *inputs: Any) -> Any:
        """The layer as one node of a torch.fx graph, as torch's own norms are, for inputs that
        stand for tensors there; None for tensors of a class of their own.

        Called first in the ``forward`` of the class ``owner``, where no plain tensor comes in.
        """
        if not isinstance(inputs[0], Proxy):
            check_is_tensor(inputs[0])
            return None
        tracer: Any = inputs[0].tracer
        layer: Any = self
        path = tracer.path_of_module(layer) if isinstance(tracer, torch.fx.Tracer) else ""
        if not path:
            raise TypeError(
                f"torch.fx traces models that hold a {type(self).__name__}, and not that layer "
                "alone; wrap it in nn.Sequential"
            )
        if getattr(self.forward, "__func__", None) is owner.forward:
            return tracer.create_proxy("call_module", path, inputs, {})
        # From the forward of a class derived from ours: what it does beside is traced by itself.
        name = f"{owner.__module__}.{owner.__qualname__}"
        return tracer.create_proxy("call_function", inherited_forward, (layer, name, *inputs), {})

    def _transform_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self._transform().items())


def inherited_forward(layer: nn.Module, owner: str, *inputs: Any) -> Any:
    """The forward pass that a layer has from the base class of that full name: what a torch.fx
    graph calls where a derived class has a ``forward`` of its own."""
    base: Any = next(
        cls for cls in type(layer).__mro__ if f"{cls.__module__}.{cls.__qualname__}" == owner
    )
    return base.forward(layer, *inputs)


class _RunningNorm(_Transform, Loading):
    """Base of the layers that may keep running statistics.

    Derived from the common base of torch's batch and instance layers, never from
    ``_BatchNorm``: ``SyncBatchNorm.convert_sync_batchnorm`` and its like would replace such a
    subclass by a plain BatchNorm without a word.
    """

    _eps: float
    # While the statistics are frozen, the mode that train() has asked for; None otherwise.
    _frozen_mode: bool | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
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
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        if momentum is not None:
            check_number("momentum", momentum)
        if not bias:
            self.register_parameter("bias", None)
        running_lmbda = (
            torch.ones(num_features, device=device, dtype=dtype) if track_running_stats else None
        )
        self.register_buffer("running_lmbda", running_lmbda)
        # Buffers in the order of their names' meaning; num_batches_tracked came from the base.
        self._set_transform(noise_train, alpha, order, transform_eps)

    @property
    def eps(self) -> float:  # type: ignore[override]
        """Added to the variance. A float that refuses to be added to a tensor
        (:class:`normnorm.eps.Eps`); the code of this package reads the plain ``_eps``."""
        eps: Any = self._eps
        return Eps(eps, type(self).__name__) if isinstance(eps, (int, float)) else eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = plain(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module, but for an eps that is one: the next call refuses it, as any tensor."""
        if name == "eps":
            self.__dict__["_eps"] = param
        else:
            super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Any:
        """As of any module; a layer with frozen statistics itself stays in evaluation mode."""
        super().train(mode)
        if self._frozen_mode is not None:
            self._frozen_mode, self.training = mode, False
        return self

    def _freeze(self) -> None:
        if self._frozen_mode is None:
            self._frozen_mode, self.training = self.training, False

    def _unfreeze(self) -> None:
        if self._frozen_mode is not None:
            self.training = self._frozen_mode
            del self._frozen_mode

    def reset_running_stats(self) -> None:
        """Running mean 0, variance 1, lambda 1, no batches."""
        super().reset_running_stats()
        running_lmbda = self._buffers.get("running_lmbda")  # absent while the base constructs
        if running_lmbda is not None:
            running_lmbda.fill_(1)

    def reset_parameters(self) -> None:
        """Weight 1 and bias 0, and running statistics as before the first batch."""
        self.reset_running_stats()
        super().reset_parameters()

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, "
            f"affine={self.affine}, bias={self.bias is not None}, "
            f"track_running_stats={self.track_running_stats}, {self._transform_repr()}"
            f"{'' if self._frozen_mode is None else ', frozen statistics'}"
        )


class _BatchNormalNorm(_RunningNorm):
    """Batch normality normalization over inputs of the ranks ``_ranks``."""

    _ranks: tuple[int, ...]

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            wanted = " or ".join(f"{rank}D" for rank in self._ranks)
            raise ValueError(f"expected {wanted} input (got {input.dim()}D input)")
        if input.size(1) != self.num_features:
            raise ValueError(
                f"expected an input of {self.num_features} channels (num_features); "
                f"got shape {tuple(input.shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(_BatchNormalNorm, input)) is not None:
            return node
        return self._normalize(input)

    def _normalize(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        # In training without track_running_stats the buffers are None; in evaluation they may be
        # set by hand, and are used then, as in torch.
        training = self.training
        check_noise_train(self.noise_train)  # in evaluation too, which adds none
        # From the dictionary: nn.Module's __getattr__ costs half a microsecond a name.
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        lmbda = buffers["running_lmbda"]
        if lmbda is not None and lmbda.is_meta:
            lmbda = self.running_lmbda  # where a checkpoint brought the other statistics, 1
        own_statistics = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = lmbda = None
        return F.batch_normal_norm(
            input,
            mean,
            var,
            lmbda,
            self.weight,
            self.bias,
            own_statistics,
            self.momentum,
            self._eps,
            noise_train=self.noise_train if training else 0.0,
            alpha=self.alpha,
            order=self.order,
            transform_eps=self.transform_eps,
            num_batches_tracked=None if mean is None else buffers["num_batches_tracked"],
            residual=residual,
            activation=activation,
        )


class BatchNormalNorm1d(_BatchNormalNorm):
    r"""Batch normality normalization of features, (N, C) or (N, C, L).

    Standardizes each channel over the batch, estimates a Yeo-Johnson exponent lambda by one
    Newton step, transforms the channel towards a Gaussian, adds Gaussian noise in training, and
    applies an affine map: Eftekhari and Papyan, "On the Importance of Gaussianizing
    Representations", ICML 2025.

    Args:
        num_features: C.
        eps: added to the variance; its root also damps the Newton step.
        momentum: weight of a batch in the running statistics; None averages over all batches.
        affine: whether to learn ``weight``, and ``bias`` unless ``bias=False``.
        track_running_stats: whether to keep running statistics for evaluation. Without them the
            batch's own statistics are used there too.
        device, dtype: of parameters and buffers.
        bias: whether the affine map has a bias.
        noise_train: weight of the noise in training, in units of the channel's mean absolute
            deviation; 0 for none.
        alpha: length of the Newton step. ``alpha=0, noise_train=0`` is torch's layer.
        order: 2 for Newton's step, 1 for a plain gradient step.
        transform_eps: 0 for the exact Yeo-Johnson transform. The authors' code shifts its
            exponent: a checkpoint of theirs (loaded as it is; its unused ``running_norm`` is
            dropped) gives their outputs with ``transform_eps=math.sqrt(eps)``.

    Buffers: ``running_mean``, ``running_var`` (unbiased), ``running_lmbda``,
    ``num_batches_tracked``. A torch BatchNorm checkpoint loads strictly, with lambda 1.

    Raises:
        ValueError: wrong rank or channel count, a single value per channel in training,
            ``eps`` <= 0, negative or non-finite ``noise_train``, unknown ``order``; nothing has
            changed then. The settings are checked when the layer is made, and at each call.
        TypeError: a setting that is no number; a tensor is none, since no gradient of it would be
            computed. A sparse or jagged input.
        TypeError or ValueError: an input that is not floating, or parameters of another dtype.
    """

    _ranks = (2, 3)


class BatchNormalNorm2d(_BatchNormalNorm):
    """Batch normality normalization of images, (N, C, H, W): see :class:`BatchNormalNorm1d`.

    channels_last inputs stay channels_last.
    """

    _ranks = (4,)


class BatchNormalNorm3d(_BatchNormalNorm):
    """Batch normality normalization of volumes, (N, C, D, H, W): see :class:`BatchNormalNorm1d`."""

    _ranks = (5,)


class _InstanceNormalNorm(_RunningNorm):
    """Instance normality normalization over inputs of rank ``_rank``, or one less unbatched."""

    _rank: int

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
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

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (
            (node := self._node(_InstanceNormalNorm, input)) is not None
        ):
            return node
        if input.dim() not in (self._rank - 1, self._rank):
            raise ValueError(
                f"expected {self._rank - 1}D or {self._rank}D input (got {input.dim()}D input)"
            )
        if input.size(-self._rank + 1) != self.num_features:
            raise ValueError(
                f"expected input's size at dim={input.dim() - self._rank + 1} to match "
                f"num_features ({self.num_features}), but got: {input.size(-self._rank + 1)}."
            )
        batched = input.dim() == self._rank
        output = F.instance_normal_norm(
            input if batched else input.unsqueeze(0),
            self.running_mean,
            self.running_var,
            self.running_lmbda,
            self.weight,
            self.bias,
            self.training or not self.track_running_stats,
            self.momentum,
            self._eps,
            training=self.training,
            **self._transform(),
            num_batches_tracked=self.num_batches_tracked,
        )
        return output if batched else output.squeeze(0)


class InstanceNormalNorm1d(_InstanceNormalNorm):
    """Instance normality normalization, (N, C, L) or (C, L).

    Standardizes and Gaussianizes each channel of each sample: :class:`BatchNormalNorm1d` tells
    how and what the arguments mean. As in torch, ``affine`` and ``track_running_stats`` are
    False by default; lambda is estimated in evaluation too unless running statistics are kept.
    """

    _rank = 3


class InstanceNormalNorm2d(_InstanceNormalNorm):
    """Instance normality normalization, (N, C, H, W) or (C, H, W): see
    :class:`InstanceNormalNorm1d`."""

    _rank = 4


class InstanceNormalNorm3d(_InstanceNormalNorm):
    """Instance normality normalization, (N, C, D, H, W) or (C, D, H, W): see
    :class:`InstanceNormalNorm1d`."""

    _rank = 5


class LayerNormalNorm(_Transform, nn.LayerNorm):
    """Layer normality normalization over the trailing dimensions of each sample.

    Standardizes each sample's trailing dimensions, estimates its lambda (in evaluation too),
    Gaussianizes, adds noise in training, and applies an elementwise affine map: Eftekhari and
    Papyan, ICML 2025.

    Args:
        normalized_shape: sizes of the trailing dimensions, or the size of the last one.
        eps: added to the variance; its root also damps the Newton step. Must be positive, where
            torch's layer accepts 0.
        elementwise_affine: whether to learn ``weight``, and ``bias`` unless ``bias=False``.
        bias: whether the affine map has a bias.
        device, dtype: of the parameters.
        noise_train, alpha, order, transform_eps: see :class:`BatchNormalNorm1d`.

    Raises:
        ValueError: an input that does not end in ``normalized_shape``, ``eps`` <= 0, negative or
            non-finite ``noise_train``, unknown ``order``.
        TypeError or ValueError: an input that is not floating, or parameters of another dtype.
    """

    def __init__(
        self,
        normalized_shape: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        noise_train: float = 1.0,
        alpha: float = 1.0,
        order: int = 2,
        transform_eps: float = 0.0,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._set_transform(noise_train, alpha, order, transform_eps)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(LayerNormalNorm, input)) is not None:
            return node
        return F.layer_normal_norm(
            input,
            self.normalized_shape,
            self.weight,
            self.bias,
            self.eps,
            training=self.training,
            **self._transform(),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}, "
            f"{self._transform_repr()}"
        )


class LayerNormalNorm2d(LayerNormalNorm):
    """Layer normality normalization over the channels of each position of (N, C, H, W).

    :class:`LayerNormalNorm` for convolutional networks such as ConvNeXt: a group is the C values
    at one position of one sample. Contiguous and channels_last inputs keep their memory format;
    channels_last is the one that is normalized without strided reads.

    Args:
        num_channels: C, or a sequence that holds it alone.
        eps, elementwise_affine, bias, device, dtype: see :class:`LayerNormalNorm`.
        noise_train, alpha, order, transform_eps: see :class:`BatchNormalNorm1d`.

    Raises:
        ValueError: also for more than one normalized size, and an input that is not 4D.
    """

    def __init__(
        self,
        num_channels: int | list[int] | torch.Size,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        noise_train: float = 1.0,
        alpha: float = 1.0,
        order: int = 2,
        transform_eps: float = 0.0,
    ) -> None:
        super().__init__(
            num_channels, eps, elementwise_affine, bias, device, dtype, noise_train=noise_train,
            alpha=alpha, order=order, transform_eps=transform_eps,
        )  # fmt: skip
        if len(self.normalized_shape) != 1:
            raise ValueError(
                "LayerNormalNorm2d normalizes over channels alone; "
                f"got {len(self.normalized_shape)} sizes: {list(self.normalized_shape)}"
            )

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(LayerNormalNorm2d, input)) is not None:
            return node
        if input.dim() != 4:
            raise ValueError(f"expected 4D input (got {input.dim()}D input)")
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class GroupNormalNorm(_Transform, nn.GroupNorm):
    """Group normality normalization, (N, C, *), over groups of channels of each sample.

    Standardizes and Gaussianizes C / num_groups channels of one sample together, with a lambda
    of their own (in evaluation too): Eftekhari and Papyan, ICML 2025. Arguments in torch's
    order; the authors' class takes the first two the other way round.

    Args:
        num_groups: must divide ``num_channels``.
        num_channels: C.
        eps: added to the variance; its root also damps the Newton step.
        affine: whether to learn ``weight``, and ``bias`` unless ``bias=False``.
        device, dtype: of the parameters.
        bias: whether the affine map has a bias.
        noise_train, alpha, order, transform_eps: see :class:`BatchNormalNorm1d`.

    Raises:
        ValueError: groups that do not divide, a wrong channel count, ``eps`` <= 0, negative or
            non-finite ``noise_train``, unknown ``order``.
        TypeError or ValueError: an input that is not floating, or parameters of another dtype.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        noise_train: float = 0.4,
        alpha: float = 1.0,
        order: int = 2,
        transform_eps: float = 0.0,
    ) -> None:
        check_integer("num_groups", num_groups)
        if num_groups < 1:
            raise ValueError(f"num_groups must be positive; got {num_groups}")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set_transform(noise_train, alpha, order, transform_eps)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(GroupNormalNorm, input)) is not None:
            return node
        if input.dim() >= 2 and input.size(1) != self.num_channels:
            raise ValueError(
                f"expected an input of {self.num_channels} channels (num_channels); "
                f"got shape {tuple(input.shape)}"
            )
        return F.group_normal_norm(
            input,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            training=self.training,
            **self._transform(),
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"bias={self.bias is not None}, {self._transform_repr()}"
        )
