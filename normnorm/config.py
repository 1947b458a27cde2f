"""The arguments of an op that are not tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

__all__ = ["Config"]


class Config(NamedTuple):
    """An op's configuration, in schema order.

    Attributes:
        kind: "batch", "layer", "group" or "instance": what a group of elements is.
        num_groups: channel groups a sample for kind "group", else 0.
        normalized_ndim: trailing dimensions for kind "layer", else 0.
        eps: added to the variance, and its root to the Newton step's denominator.
        noise_train: weight of the noise; 0 for none (always, outside training).
        alpha: length of the Newton step; 0 turns the transform off.
        order: 2 for Newton's step, 1 for a gradient step.
        transform_eps: distance that the transform's exponent keeps from zero.
        stream: which noise of a seed: the rank in synchronised layers, else 0.
        channels_last: the noise index follows (N, spatial..., C) instead of row-major order.
        activation: "relu", applied to the output, or "" for none.
        backend: who computes.
    """

    kind: str
    num_groups: int
    normalized_ndim: int
    eps: float
    noise_train: float
    alpha: float
    order: int
    transform_eps: float
    stream: int
    channels_last: bool
    activation: str
    backend: str

    def for_infer(self) -> tuple[Any, ...]:
        """The part of it that ``normal_norm_infer`` takes: nothing of the noise."""
        return (*self[:4], *self[5:8], *self[10:])

    @classmethod
    def from_infer(cls, *arguments: Any) -> Config:
        """The configuration of a ``normal_norm_infer`` call."""
        return cls._make((*arguments[:4], 0.0, *arguments[4:7], 0, False, *arguments[7:]))
