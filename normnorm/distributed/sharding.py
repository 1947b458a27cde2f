"""``torch.distributed.tensor.DTensor`` inputs: each rank normalizes its own shard.

Every normalization group must lie on one rank, or an error is raised. So only redistributed
parameters are communicated, and the kernels see local tensors, compiled graphs included.

Dimensions that may be sharded, by kind: ``layer``, those before the normalized ones; ``instance``,
batch and channels; ``group``, the batch, and channels if no group is split; ``batch`` with batch
statistics, channels; with running statistics, all. Parameters are sharded with the channels.

The index of a shard is the noise's stream, so that shards have different noise. Replicas of a shard
share a seed, and so their noise: one message of eight bytes per replicated mesh dimension.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..config import Config, ForwardArguments

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

_CHANNELS = 1  # the channels' dimension in every kind but "layer"


def is_dtensor(value: Any) -> bool:
    """Whether a value is a DTensor, without importing torch.distributed.tensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def to_local(tensor: Any) -> Any:
    """The local tensor of a DTensor; any other value unchanged."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_plain(input: Tensor, **tensors: Tensor | None) -> None:
    """Raises TypeError for a DTensor argument beside a plain input."""
    for name, tensor in tensors.items():
        if is_dtensor(tensor) and not is_dtensor(input):
            raise TypeError(
                f"{name} is a DTensor and the input a {type(input).__name__}; wanted both or "
                "neither (DTensor.from_local makes one of a shard)"
            )


class Shards(NamedTuple):
    """An input's placements on a mesh, none of which splits a group."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    kind: str

    def _coordinate(self) -> Sequence[int]:
        return self.mesh.get_coordinate() or [0] * len(self.placements)

    def stream(self) -> int:
        """This rank's index among the shards; equal for replicas."""
        index = 0
        for i, (placement, at) in enumerate(zip(self.placements, self._coordinate(), strict=True)):
            if placement.is_shard():
                index = index * self.mesh.size(i) + at
        return index

    def local(self, name: str, tensor: Any) -> Any:
        """The local part of a running statistic, parameter or residual, or None for None.

        A running statistic may also be a plain tensor, equal on all ranks; the result shares memory
        with it unless channels are sharded. The gradient of a parameter is summed over the shards.
        """
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if tensor is None:
            return None
        running = name.startswith("running_")
        if running and not is_dtensor(tensor):
            copies = [Replicate() for _ in self.placements]
            tensor = DTensor.from_local(tensor, self.mesh, copies, run_check=False)
        if not is_dtensor(tensor):
            raise TypeError(
                f"the input is a DTensor and {name} a {type(tensor).__name__}; wanted both or "
                "neither (parallelize_module and distribute_module make them of a module's)"
            )
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name} must be on the input's mesh {self.mesh}; got {tensor.device_mesh}"
            )
        if name == "residual":
            return _placed(tensor, self.placements).to_local()
        cut = [self.kind != "layer" and p.is_shard(_CHANNELS) for p in self.placements]
        placed = _placed(tensor, [Shard(0) if channels else Replicate() for channels in cut])
        if running:
            return placed.to_local()
        gradients = [
            Shard(0) if channels else Partial() if placement.is_shard() else Replicate()
            for channels, placement in zip(cut, self.placements, strict=True)
        ]
        return placed.to_local(grad_placements=gradients)

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """The seed of the first replica of this rank's shard, for all its replicas."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if seed is None or is_dtensor(seed):
            return to_local(seed)
        copied = [not placement.is_shard() for placement in self.placements]
        if not any(copied):
            return seed
        first = not any(at for at, copy in zip(self._coordinate(), copied, strict=True) if copy)
        # A sum of the first replica's seed and zeros over the replicated mesh dimensions; along
        # the others the seeds are left as they are.
        found = DTensor.from_local(
            seed if first else torch.zeros_like(seed),
            self.mesh,
            [Partial() if copy else Shard(0) for copy in copied],
            run_check=False,
        )
        whole = [Replicate() if copy else Shard(0) for copy in copied]
        return found.redistribute(placements=whole).to_local()

    def whole(self, local: Tensor) -> Tensor:
        """The DTensor with this local shard."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape,
            stride=self.stride,
        )  # fmt: skip


def _placed(tensor: Any, placements: Any) -> Any:
    """The tensor redistributed to these placements. The same object if it has them already, so that
    its gradient stays a Partial placement, as in torch's layers."""
    if tuple(tensor.placements) == tuple(placements):
        return tensor
    return tensor.redistribute(placements=placements)


def shards_of(
    tensors: tuple[Any, ...], config: Config, updates: bool
) -> tuple[Shards, tuple[Any, ...], Config]:
    """The placements of an input, and the local tensors and configuration for its shard.

    ``tensors``: fields ``input``, a DTensor, to ``noise_scale``, which is None, of
    :class:`normnorm.config.ForwardArguments`. ``updates``: whether running statistics are updated.
    Raises ValueError if a shard splits a group or running statistics would depend on one shard.
    """
    from torch.distributed.tensor import Replicate

    input = tensors[0]
    mesh = input.device_mesh
    # A Partial input is summed before it is normalized.
    placements = tuple(p if not p.is_partial() else Replicate() for p in input.placements)
    cuts: list[list[int]] = [[] for _ in range(input.dim())]
    placement: Any
    for i, placement in enumerate(placements):
        if not (placement.is_replicate() or placement.is_shard()):
            raise ValueError(f"a DTensor's placements must be Shard or Replicate; got {placement}")
        if placement.is_shard() and mesh.size(i) > 1:
            cuts[placement.dim].append(mesh.size(i))
    for dim, parts in enumerate(cuts):
        if parts:
            _check_cut(input, dim, parts, config, tensors[1] is None, updates)
    shards = Shards(mesh, placements, input.shape, input.stride(), config.kind)
    local = _placed(input, placements).to_local()
    groups = config.num_groups
    if config.kind == "group" and cuts[_CHANNELS]:
        # A shard without channels has no elements: any positive number of groups is correct.
        groups = max(1, groups * local.size(_CHANNELS) // input.size(_CHANNELS))
    stream = shards.stream() if config.noise_train > 0.0 else 0
    rest = zip(ForwardArguments._fields[1:7], tensors[1:7], strict=True)
    others = (shards.local(name, tensor) for name, tensor in rest)
    local_tensors = (local, *others, shards.seed(tensors[7]), None)
    return shards, local_tensors, config._replace(num_groups=groups, stream=stream)


def _check_cut(
    input: Any, dim: int, parts: list[int], config: Config, own_statistics: bool, updates: bool
) -> None:
    """Raises ValueError if sharding a dimension into parts[0] parts, each of these into parts[1],
    and so on, splits a group or makes updated running statistics depend on one shard."""
    kind = config.kind
    advice = "redistribute it to Replicate first"
    if kind == "layer":
        whole = dim < input.dim() - config.normalized_ndim
        advice += ", or to a Shard of a dimension before the normalized ones"
    elif kind == "batch":
        whole = not own_statistics or dim == _CHANNELS
        if not whole:
            advice += ", or use SyncBatchNormalNorm, whose statistics are those of all shards"
    else:
        whole = dim in (0, _CHANNELS)
    if kind == "group" and dim == _CHANNELS:
        size = input.size(_CHANNELS)
        group = size // config.num_groups
        for count in parts:
            size = -(-size // count)  # of all shards but the last, as in torch.chunk
            whole = whole and size % group == 0
    if not whole:
        raise ValueError(
            f"the input's placements {tuple(input.placements)} cut dimension {dim} of shape "
            f"{tuple(input.shape)}, and with it groups of the {kind} layer, which must each lie "
            f"whole on a rank; {advice}"
        )
    if updates:
        raise ValueError(
            f"the input is sharded along dimension {dim} ({tuple(input.placements)}), so that each "
            "rank would update the running statistics from its own shard; use "
            "track_running_stats=False, or redistribute the input to Replicate first"
        )


def shards_of_batch(input: Any, process_group: Any) -> Shards:
    """The placements of a batch with one shard on every rank of a process group; ValueError for
    other ranks in the mesh than in the group, sharded channels and replicated shards."""
    mesh, placements = input.device_mesh, tuple(input.placements)
    fits = mesh.size() == dist.get_world_size(process_group)
    if fits and not torch.compiler.is_compiling():  # where the mesh has no list of ranks
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        fits = sorted(mesh.mesh.flatten().tolist()) == sorted(ranks)
    if not fits or any(not p.is_shard() or p.is_shard(_CHANNELS) for p in placements):
        raise ValueError(
            "a synchronised layer wants an input that is cut along its batch or its positions "
            f"among all ranks of its process_group; got placements {placements} on {mesh}"
        )
    return Shards(mesh, placements, input.shape, input.stride(), "batch")
