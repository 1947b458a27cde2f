"""A float eps that keeps tools from folding a layer into the linear layer before it."""

from __future__ import annotations

from typing import Any

__all__ = ["CANNOT_FOLD", "Eps", "plain"]

CANNOT_FOLD = "a {} cannot be folded into the layer before it: its power transform is not linear"
_ADDITIONS = ("add", "add_", "__add__", "__radd__", "__iadd__")


class Eps(float):
    """The eps attribute of a layer with running statistics: a float that raises when added to a
    tensor.

    Every tool that folds a batch norm into the convolution or linear layer before it computes
    ``running_var + eps``; a power transform cannot be folded.
    """

    _layer: str

    def __new__(cls, value: float, layer: str) -> Eps:
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
