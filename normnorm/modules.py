"""The layers: constructors and state of torch.nn, with normality normalization.

Every class takes the arguments of its torch counterpart in the same order, and the keyword-only
arguments ``noise_train``, ``alpha``, ``order`` and ``transform_eps`` (:mod:`normnorm.functional`).
These are plain attributes and may change between steps. Noise is added in training only.
"""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from . import checks
from . import functional as F
from .checkpoints import Loading

CANNOT_FOLD = "a {} cannot be folded into the layer before it: its power transform is not linear"
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class Eps(float):
    """The eps of a layer with running statistics: a float that raises when added to a tensor.

    Every tool that folds a batch norm into the convolution or linear layer before it computes
    ``running_var + eps``; a power transform cannot be folded.
    """

    _layer: str

    def __new__(cls, value: float, layer: str) -> "Eps":
        eps = super().__new__(cls, value)
        eps._layer = layer
        return eps

    def __getnewargs__(self) -> tuple[float, str]:  # type: ignore[override]
        return float(self), self._layer

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _ADDITIONS:
            eps = next(value for value in (*args, *kwargs.values()) if isinstance(value, Eps))
            # Python would turn a TypeError into "unsupported operand type(s) for +".
            raise RuntimeError(
                f"{CANNOT_FOLD.format(eps._layer)}. Its eps is not added to a tensor, which such a "
                "fold begins with; float(layer.eps) is the plain number"
            )
        args = tuple(plain(value) for value in args)
        return func(*args, **{name: plain(value) for name, value in kwargs.items()})


def plain(value: Any) -> Any:
    """The plain float of an :class:`Eps`; any other value unchanged."""
    return float(value) if isinstance(value, Eps) else value


class _Transform:
    """What all layers add to their torch base class."""

    eps: float
    forward: Any
    weight: Any
    bias: Any

    def reset_parameters(self) -> None:
        """Sets weight 1 and bias 0."""
        # torch 2.10 and 2.11: the base class of batch and group layers fails here without a bias.
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def _set_transform(
        self, noise_train: float, alpha: float, order: int, transform_eps: float
    ) -> None:
        checks.check_noise_train(noise_train)
        checks.check_transform(self.eps, alpha, order, transform_eps)
        self.noise_train = noise_train
        self.alpha = alpha
        self.order = order
        self.transform_eps = transform_eps

    def _affine(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias."""
        # nn.Module's __getattr__ costs half a microsecond. Parametrized ones are not in the dict.
        parameters: dict[str, Any] = self._parameters  # type: ignore[attr-defined]
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
        return self.weight, self.bias

    def _transform(self) -> dict[str, Any]:
        return {
            "noise_train": self.noise_train,
            "alpha": self.alpha,
            "order": self.order,
            "transform_eps": self.transform_eps,
        }

    def _node(self, owner: type["_Transform"], *inputs: Any) -> Any:
        """The call as one node of a torch.fx graph, like torch's norms, if the first input is a
        proxy; None if it is a tensor of a subclass, TypeError for anything else.

        ``owner``: the class whose ``forward`` calls this, for inputs that are no plain tensor.
        """
        if not isinstance(inputs[0], Proxy):
            checks.check_is_tensor(inputs[0])
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
        # Called from the forward of a subclass; the tracer records its other operations itself.
        name = f"{owner.__module__}.{owner.__qualname__}"
        return tracer.create_proxy("call_function", inherited_forward, (layer, name, *inputs), {})

    def _repr(self, sizes: str, *names: str) -> str:
        """``extra_repr``: sizes, attributes of torch's layer by name, and the transform's."""
        shown = {name: getattr(self, name) for name in names}
        shown |= {"bias": self.bias is not None, **self._transform()}  # "bias" keeps its position
        return ", ".join([sizes, *(f"{name}={value}" for name, value in shown.items())])


def inherited_forward(layer: nn.Module, owner: str, *inputs: Any) -> Any:
    """Calls the forward of the base class with that full name. torch.fx graphs call this where a
    subclass defines a ``forward`` of its own."""
    base: Any = next(
        cls for cls in type(layer).__mro__ if f"{cls.__module__}.{cls.__qualname__}" == owner
    )
    return base.forward(layer, *inputs)


def _check_channels(input: Tensor, channels: int, name: str) -> None:
    if input.size(1) != channels:
        raise ValueError(
            f"expected an input of {channels} channels ({name}); got shape {tuple(input.shape)}"
        )


class _RunningNorm(_Transform, Loading):
    """Base of the layers that may keep running statistics.

    Derives from the common base of torch's batch and instance layers, not from ``_BatchNorm``,
    which ``SyncBatchNorm.convert_sync_batchnorm`` and others would replace by a plain BatchNorm.
    """

    _eps: float
    # While statistics are frozen: the mode last set by train(). Otherwise None.
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
            checks.check_number("momentum", momentum)
        if not bias:
            self.register_parameter("bias", None)
        ones = torch.ones(num_features, device=device, dtype=dtype) if track_running_stats else None
        self.register_buffer("running_lmbda", ones)
        self._set_transform(noise_train, alpha, order, transform_eps)

    @property
    def eps(self) -> float:  # type: ignore[override]
        """Added to the variance. A float that raises when added to a tensor (:class:`Eps`); this
        package reads the plain ``_eps``."""
        eps: Any = self._eps
        return Eps(eps, type(self).__name__) if isinstance(eps, (int, float)) else eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = plain(value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Like nn.Module's, but stores a parameter named eps, which the next call rejects."""
        if name == "eps":
            self.__dict__["_eps"] = param
        else:
            super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Any:
        """Like nn.Module's; a layer with frozen statistics stays in evaluation mode."""
        super().train(mode)
        if self._frozen_mode is not None:
            self._frozen_mode, self.training = mode, False
        return self

    def reset_running_stats(self) -> None:
        """Sets running mean 0, variance 1, lambda 1 and no batches."""
        super().reset_running_stats()
        running_lmbda = self._buffers.get("running_lmbda")  # None in the base constructor
        if running_lmbda is not None:
            running_lmbda.fill_(1)

    def reset_parameters(self) -> None:
        """Sets weight 1 and bias 0, and resets the running statistics."""
        self.reset_running_stats()
        super().reset_parameters()

    def extra_repr(self) -> str:
        names = ("eps", "momentum", "affine", "bias", "track_running_stats")
        frozen = "" if self._frozen_mode is None else ", frozen statistics"
        return self._repr(str(self.num_features), *names) + frozen


class _BatchNormalNorm(_RunningNorm):
    """Batch normality normalization. A subclass sets ``_ranks``, the numbers of dimensions that it
    accepts, and ``_wanted``, their words in the error message."""

    _ranks: Container[int]
    _wanted: str

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() not in self._ranks:
            raise ValueError(f"expected {self._wanted} input (got {input.dim()}D input)")
        _check_channels(input, self.num_features, "num_features")

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(_BatchNormalNorm, input)) is not None:
            return node
        return self._normalize(input)

    def _normalize(
        self, input: Tensor, residual: Tensor | None = None, activation: str | None = None
    ) -> Tensor:
        self._check_input_dim(input)
        # As in torch: without track_running_stats, buffers set by hand serve in evaluation only.
        training = self.training
        checks.check_noise_train(self.noise_train)  # in evaluation too, although it adds no noise
        # Read from the dictionary: nn.Module's __getattr__ costs half a microsecond per name.
        buffers = self._buffers
        mean, var = buffers["running_mean"], buffers["running_var"]
        lmbda = buffers["running_lmbda"]
        if lmbda is not None and lmbda.is_meta:
            lmbda = self.running_lmbda  # 1 if the checkpoint has no lambda
        own_statistics = training or (mean is None and var is None)
        if training and not self.track_running_stats:
            mean = var = lmbda = None
        return F.batch_normal_norm(
            input, mean, var, lmbda, *self._affine(), own_statistics, self.momentum, self._eps,
            noise_train=self.noise_train if training else 0.0, alpha=self.alpha, order=self.order,
            transform_eps=self.transform_eps, residual=residual, activation=activation,
            num_batches_tracked=None if mean is None else buffers["num_batches_tracked"],
        )  # fmt: skip


class BatchNormalNorm1d(_BatchNormalNorm):
    r"""Batch normality normalization of features, (N, C) or (N, C, L).

    Standardizes each channel over the batch, estimates a Yeo-Johnson exponent lambda by one
    Newton step, transforms the channel towards a Gaussian, adds Gaussian noise in training, and
    applies an affine map: Eftekhari and Papyan, "On the Importance of Gaussianizing
    Representations", ICML 2025.

    Args:
        num_features: number of channels, C.
        eps: added to the variance; its root also damps the Newton step.
        momentum: weight of a batch in the running statistics; None averages over all batches.
        affine: whether to learn ``weight``, and ``bias`` unless ``bias=False``.
        track_running_stats: whether to keep running statistics for evaluation. Without them the
            batch's own statistics are used there too.
        device, dtype: of parameters and buffers.
        bias: whether the affine map has a bias.
        noise_train: weight of the noise in training, in units of the channel's mean absolute
            deviation; 0 for none.
        alpha: length of the Newton step. With ``alpha=0, noise_train=0`` the layer equals torch's.
        order: 2 for Newton's step, 1 for a plain gradient step.
        transform_eps: 0 for the exact Yeo-Johnson transform. ``math.sqrt(eps)`` shifts the
            exponent as the authors' code does and reproduces the outputs of their checkpoints
            (whose unused ``running_norm`` is dropped).

    Shape: input and output (N, C) or (N, C, L), floating, in any memory layout. The output has the
    input's dtype; parameters have it too, or float32 for half-precision inputs.

    Buffers: ``running_mean``, ``running_var`` (unbiased), ``running_lmbda``,
    ``num_batches_tracked``. A torch BatchNorm checkpoint loads strictly, with lambda 1.

    Raises:
        ValueError: wrong rank or channel count, a single value per channel in training, ``eps`` <=
            0, negative or non-finite ``noise_train``, unknown ``order``; no state changes. Settings
            are checked by the constructor and at each call.
        TypeError: a setting that is no number (a tensor would get no gradient); a sparse or jagged
            input.
        TypeError or ValueError: an input that is not floating, or parameters of another dtype.
    """

    _ranks = (2, 3)
    _wanted = "2D or 3D"


class BatchNormalNorm2d(_BatchNormalNorm):
    """Batch normality normalization of images, (N, C, H, W): see :class:`BatchNormalNorm1d`.

    channels_last inputs stay channels_last.
    """

    _ranks: Container[int] = (4,)
    _wanted = "4D"


class BatchNormalNorm3d(_BatchNormalNorm):
    """Batch normality normalization of volumes, (N, C, D, H, W): see :class:`BatchNormalNorm1d`."""

    _ranks = (5,)
    _wanted = "5D"


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
            input if batched else input.unsqueeze(0), self.running_mean, self.running_var,
            self.running_lmbda, *self._affine(), self.training or not self.track_running_stats,
            self.momentum, self._eps, training=self.training, **self._transform(),
            num_batches_tracked=self.num_batches_tracked,
        )  # fmt: skip
        return output if batched else output.squeeze(0)


class InstanceNormalNorm1d(_InstanceNormalNorm):
    """Instance normality normalization, (N, C, L) or (C, L).

    Standardizes and Gaussianizes each channel of each sample. Method and arguments are those of
    :class:`BatchNormalNorm1d`. As in torch, ``affine`` and ``track_running_stats`` default to
    False; lambda is estimated in evaluation too unless running statistics are kept.
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
    Gaussianizes, adds noise in training, applies an affine map: Eftekhari and Papyan, ICML 2025.

    Args:
        normalized_shape: sizes of the trailing dimensions, or the size of the last one.
        eps: see :class:`BatchNormalNorm1d`. Must be positive; torch's layer also accepts 0.
        elementwise_affine: whether to learn ``weight``, and ``bias`` unless ``bias=False``.

    The other arguments are those of :class:`BatchNormalNorm1d`.

    Shape: input and output ``(*, *normalized_shape)``; dtypes as in :class:`BatchNormalNorm1d`.

    Raises:
        ValueError: an input that does not end in ``normalized_shape``.
        TypeError, ValueError: wrong settings or dtypes, as for :class:`BatchNormalNorm1d`.
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
            input, self.normalized_shape, *self._affine(), self.eps, training=self.training,
            **self._transform(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return self._repr(str(self.normalized_shape), "eps", "elementwise_affine", "bias")


class LayerNormalNorm2d(LayerNormalNorm):
    """Layer normality normalization over the channels of each position of (N, C, H, W).

    :class:`LayerNormalNorm` for convolutional networks such as ConvNeXt: a normalization group is
    the C values at one position of one sample. Contiguous and channels_last inputs keep their
    memory format; channels_last is normalized without strided reads.

    Args:
        num_channels: C, or a sequence of that one size.

    The other arguments are those of :class:`LayerNormalNorm`.

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
    """Group normality normalization, ``(N, C, *)``, over groups of channels of each sample.

    Standardizes and Gaussianizes groups of C / num_groups channels of one sample, each with its own
    lambda (in evaluation too): Eftekhari and Papyan, ICML 2025. Arguments are in torch's order; the
    authors' class takes the first two in reverse order.

    Args:
        num_groups: must divide ``num_channels``.
        num_channels: number of channels, C.

    The other arguments are those of :class:`BatchNormalNorm1d`.

    Shape: input and output ``(N, C, *)``; dtypes as in :class:`BatchNormalNorm1d`.

    Raises:
        ValueError: ``num_groups`` that does not divide ``num_channels``, a wrong channel count.
        TypeError, ValueError: wrong settings or dtypes, as for :class:`BatchNormalNorm1d`.
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
        checks.check_integer("num_groups", num_groups)
        if num_groups < 1:
            raise ValueError(f"num_groups must be positive; got {num_groups}")
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        if not bias:
            self.register_parameter("bias", None)
        self._set_transform(noise_train, alpha, order, transform_eps)

    def forward(self, input: Tensor) -> Tensor:
        if type(input) is not Tensor and (node := self._node(GroupNormalNorm, input)) is not None:
            return node
        if input.dim() >= 2:  # the function rejects fewer
            _check_channels(input, self.num_channels, "num_channels")
        return F.group_normal_norm(
            input, self.num_groups, *self._affine(), self.eps, training=self.training,
            **self._transform(),
        )  # fmt: skip

    def extra_repr(self) -> str:
        return self._repr(f"{self.num_groups}, {self.num_channels}", "eps", "affine", "bias")
