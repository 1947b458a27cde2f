"""Both passes of a synchronised layer over the shards of a batch, in one process and without
messages."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import raw_ops
import torch
from oracle import Case
from torch import Tensor

from normnorm.config import Config
from normnorm.distributed import statistics

_Kernels = statistics._Kernels


class _Together:
    """The kernels' passes over several shards, with what the messages make of their sums."""

    def __init__(self, sizes: Sequence[int], shape: torch.Size, *arguments: Any) -> None:
        def cut(given: Any) -> Sequence[Any]:
            if isinstance(given, statistics._Shard):
                return [type(given)(*each) for each in zip(*map(cut, given), strict=True)]
            whole = isinstance(given, Tensor) and given.shape == shape
            return given.split(sizes) if whole else [given] * len(sizes)

        self._each = [_Kernels(*each) for each in zip(*map(cut, arguments), strict=True)]

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            found = [getattr(each, name)(*arguments) for each in self._each]
            if name == "parameter_gradients":
                columns = zip(*found, strict=True)
                return [None if c[0] is None else sum(c[1:], c[0]) for c in columns]
            if name in ("output", "input_gradient"):
                return torch.cat(found) if len(found) > 1 else found[0]
            return torch.stack(found) if name == "moments" else sum(found)

        return call


def sharded_passes(
    backend: str, case: Case, t: dict[str, Tensor], sizes: Sequence[int],
    fused: Sequence[str] = (), last: bool = False, **options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """(y, stats, du, dw, db), as of raw_ops.both_passes(), of a batch in shards of these sizes;
    all have the same stream of noise."""
    made = []

    def together(*arguments: Any) -> _Together:
        made.append(_Together(sizes, t["x"].shape, *arguments))
        return made[-1]

    def gathered(message: Tensor, group: Any) -> Tensor:
        if len(sizes) == 1:
            return message[None]
        moments = message[1:].reshape(len(sizes), -1)
        counts = torch.tensor(sizes, dtype=message.dtype, device=message.device)
        return torch.cat([counts[:, None] * (case.size // case.shape[0]), moments], 1)

    config = raw_ops._config(case, fused, last, options)
    names = ("x", "weight", "bias")
    leaves = {name: t[name].detach().requires_grad_() for name in names if name in t}
    residual = t["residual"] if "residual" in fused else None
    with mock.patch.multiple(
        statistics, _Kernels=together, _all_gather=gathered, _all_reduce=lambda sums, _: sums
    ):
        y, stats, _ = statistics.Synchronised.apply(
            *map(leaves.get, names), residual, raw_ops._seed(t, options), Config(*config, backend),
            None,
        )  # fmt: skip
        found = torch.autograd.grad(y, list(leaves.values()), t["g"])
    assert len(made) == 2, "the kernels did not compute both passes"
    gradients = dict(zip(leaves, found, strict=True))
    return y.detach(), stats, *map(gradients.get, names)
