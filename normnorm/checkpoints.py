"""Loading of checkpoints by layers with running statistics, with or without lambda.

A checkpoint of torch's layer has no lambda. It is set to 1, the identity, if the checkpoint has the
layer's other statistics; otherwise the layer keeps its own.
"""

import sys
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import UninitializedBuffer, is_lazy

# Initial values of a new layer's tensors.
INITIAL = {
    "weight": 1.0,
    "bias": 0.0,
    "running_mean": 0.0,
    "running_var": 1.0,
    "running_lmbda": 1.0,
    "num_batches_tracked": 0.0,
}


class Loading(_NormBase):
    """Base of the layers with running statistics: loads checkpoints with and without lambda."""

    # Version 3 has running_lmbda. Torch's checkpoints have version 2, the authors' none.
    _version = 3

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        *arguments: Any,
    ) -> None:
        version = local_metadata.get("version")
        foreign = version is None or version < 3
        if foreign:  # the authors' layer has a running_norm that no formula reads
            state_dict.pop(prefix + "running_norm", None)
        if self._buffers.get("running_lmbda") is not None:
            names = ("running_mean", "running_var", "running_lmbda")
            mean, var, lmbda = (state_dict.get(prefix + name) for name in names)
            # torch.distributed.checkpoint fills gaps with the model's tensors, even on meta.
            missing = foreign if lmbda is None else getattr(lmbda, "is_meta", False)
            # Requires both, because some loaders load one tensor at a time.
            if missing and isinstance(mean, Tensor) and isinstance(var, Tensor):
                state_dict[prefix + "running_lmbda"] = _ones_like(mean)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._complete()
        return super()._apply(fn, recurse)

    @torch.jit.unused  # type: ignore[prop-decorator]
    @property
    def running_lmbda(self) -> Tensor | None:
        """(C,), or None without running statistics."""
        if "running_lmbda" not in self._buffers:  # in the base constructor
            raise AttributeError(f"'{type(self).__name__}' object has no attribute 'running_lmbda'")
        self._complete()
        return self._buffers["running_lmbda"]

    def _complete(self) -> None:
        """Sets lambda to 1 if a loader such as accelerate's has loaded the mean, but not lambda,
        onto a layer made on the meta device."""
        mean, lmbda = self._buffers.get("running_mean"), self._buffers.get("running_lmbda")
        if lmbda is not None and lmbda.is_meta and mean is not None and not mean.is_meta:
            self._buffers["running_lmbda"] = torch.ones_like(lmbda, device=mean.device)

    @torch.jit.unused  # type: ignore[prop-decorator]
    @property
    def _is_hf_initialized(self) -> bool:
        """transformers' mark for a layer that needs no initialization.

        ``from_pretrained`` gives tensors that the checkpoint lacks uninitialized memory, and reads
        this mark before it initializes the layers that it knows. Reading it initializes this one.
        """
        marked: bool = vars(self).get("_is_hf_initialized", False)
        if not marked and _transformers_is_loading(sys._getframe(1)):
            for name, value in INITIAL.items():
                tensor = self._parameters.get(name, self._buffers.get(name))
                if tensor is not None and not getattr(tensor, "_is_hf_initialized", False):
                    with torch.no_grad():
                        tensor.fill_(value)
        return marked

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, marked: bool) -> None:
        vars(self)["_is_hf_initialized"] = marked


def _ones_like(mean: Tensor) -> Tensor:
    if is_lazy(mean):  # in the state of torch's lazy layer
        unsized: Any = UninitializedBuffer
        return unsized(device=mean.device, dtype=mean.dtype)
    return torch.ones_like(mean)


def _transformers_is_loading(frame: Any) -> bool:
    """Whether the frame is transformers' private initialization of keys missing from a checkpoint.
    In any other frame, reading the mark must change nothing."""
    if frame.f_code.co_name != "_initialize_weights":
        return False
    while frame is not None and frame.f_code.co_name != "_initialize_missing_keys":
        frame = frame.f_back
    return frame is not None
