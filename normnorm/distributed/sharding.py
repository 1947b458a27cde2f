"""Distributed tensors (``torch.distributed.tensor.DTensor``): each rank normalizes its own shard.

A group must lie whole on one rank; then nothing is sent but what the placements of the parameters
ask for, and the kernels see ordinary tensors, in eager mode and in compiled graphs alike. Where a
shard would cut a group, a sentence says so.

What lies on one rank whole, by kind: ``layer``, shards of the dimensions before the normalized
ones; ``instance``, of batch and channels; ``group``, of the batch, and of channels where no group
is cut; ``batch`` with its own statistics, of channels; with running statistics, of everything. A
shard of the channels takes its share of the parameters.

Each shard has noise of its own: its index among the shards is the noise's stream. Copies on other
ranks get the same noise: they agree on a seed, by one message of eight bytes, where an input is
replicated along a dimension of the mesh.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from normnorm.config import Config

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["Shards", "check_plain", "is_dtensor", "shards_of", "shards_of_batch", "to_local"]

_CHANNELS = 1  # the dimension in every kind but "layer"


def is_dtensor(value: Any) -> bool:
    """Whether it is a distributed tensor; imports nothing."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def to_local(tensor: Any) -> Any:
    """This rank's part of a distributed tensor; anything else as it is."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_plain(input: Tensor, **tensors: Tensor | None) -> None:
    """Refuses distributed tensors beside an input that is none.

    Raises:
        TypeError: with the tensor's name.
    """
    for name, tensor in tensors.items():
        if is_dtensor(tensor) and not is_dtensor(input):
            raise TypeError(
                f"{name} is a DTensor and the input a {type(input).__name__}; wanted both or "
                "neither (DTensor.from_local makes one of a shard)"
            )


class Shards(NamedTuple):
    """How an input lies on a mesh, under placements that leave every group whole."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    kind: str

    def stream(self) -> int:
        """This rank's index among the shards; copies of a shard have the same."""
        index = 0
        coordinate = self.mesh.get_coordinate() or [0] * len(self.placements)
        for i, placement in enumerate(self.placements):
            if placement.is_shard():
                index = index * self.mesh.size(i) + coordinate[i]
        return index

    def _cuts_channels(self, i: int) -> bool:
        return self.kind != "layer" and self.placements[i].is_shard(_CHANNELS)

    def parameter(self, name: str, parameter: Tensor | None) -> Tensor | None:
        """This rank's part of a parameter; its gradient is summed over the shards."""
        from torch.distributed.tensor import Partial, Replicate, Shard

        if parameter is None:
            return None
        self._check_mesh(name, parameter)
        wanted: list[Placement] = []
        gradients: list[Placement] = []
        for i, placement in enumerate(self.placements):
            cut = self._cuts_channels(i)
            wanted.append(Shard(0) if cut else Replicate())
            gradients.append(
                Shard(0) if cut else Partial() if placement.is_shard() else Replicate()
            )
        return _placed(parameter, wanted).to_local(grad_placements=gradients)

    def statistic(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """This rank's part of a running statistic, which may also be an ordinary tensor, equal on
        all ranks. Unless channels are cut it is the tensor's own memory."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        if tensor is None:
            return None
        if not is_dtensor(tensor):
            copies = [Replicate() for _ in self.placements]
            tensor = DTensor.from_local(tensor, self.mesh, copies, run_check=False)
        self._check_mesh(name, tensor)
        return _placed(
            tensor,
            [
                Shard(0) if self._cuts_channels(i) else Replicate()
                for i in range(len(self.placements))
            ],
        ).to_local()

    def residual(self, residual: Tensor | None) -> Any:
        """This rank's part of a tensor that is added to the input."""
        if residual is None:
            return None
        self._check_mesh("residual", residual)
        return _placed(residual, self.placements).to_local()

    def seed(self, seed: Tensor | None) -> Tensor | None:
        """The seed that all copies of this rank's shard have: that of the first of them."""
        from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

        if seed is None:
            return None
        if is_dtensor(seed):
            return to_local(seed)
        if all(placement.is_shard() for placement in self.placements):
            return seed
        coordinate = self.mesh.get_coordinate() or [0] * len(self.placements)
        copies = [not placement.is_shard() for placement in self.placements]
        first = all(coordinate[i] == 0 for i, copied in enumerate(copies) if copied)
        # The sum of one seed and zeros, over the dimensions along which there are copies. The
        # shards along the others keep the seeds that they have.
        found = DTensor.from_local(
            seed if first else torch.zeros_like(seed),
            self.mesh,
            [Partial() if copied else Shard(0) for copied in copies],
            run_check=False,
        )
        return found.redistribute(
            placements=[Replicate() if copied else Shard(0) for copied in copies]
        ).to_local()

    def whole(self, local: Tensor) -> Tensor:
        """The distributed tensor of which this rank computed its shard."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=self.shape,
            stride=self.stride,
        )  # fmt: skip

    def _check_mesh(self, name: str, tensor: Any) -> None:
        if not is_dtensor(tensor):
            raise TypeError(
                f"the input is a DTensor and {name} a {type(tensor).__name__}; wanted both or "
                "neither (parallelize_module and distribute_module make them of a module's)"
            )
        if tensor.device_mesh != self.mesh:
            raise ValueError(
                f"{name} must be on the input's mesh {self.mesh}; got {tensor.device_mesh}"
            )


def _placed(tensor: Any, placements: Any) -> Any:
    """The tensor under these placements; itself where it has them, so that its gradient stays a
    sum that is not yet taken, as in torch's layers."""
    if tuple(tensor.placements) == tuple(placements):
        return tensor
    return tensor.redistribute(placements=placements)


def shards_of(
    input: Any, config: Config, own_statistics: bool, updates: bool
) -> tuple[Shards, Tensor, Config]:
    """How a distributed input is normalized shard by shard.

    Args:
        input: the DTensor.
        config: its op's, for the whole input.
        own_statistics: whether groups are normalized by their own statistics.
        updates: whether running statistics are moved towards them.

    Returns:
        the shards, this rank's, and the configuration for it.

    Raises:
        ValueError: a shard would cut a group, or running statistics would be a shard's alone.
    """
    from torch.distributed.tensor import Replicate

    mesh = input.device_mesh
    # A sum that is not yet taken is normalized once it is.
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
            _check_cut(input, dim, parts, config, own_statistics, updates)
    shards = Shards(mesh, placements, input.shape, input.stride(), config.kind)
    local = _placed(input, placements).to_local()
    groups = config.num_groups
    if config.kind == "group" and cuts[_CHANNELS]:
        # A shard without channels has no elements either, and then any number of groups will do.
        groups = max(1, groups * local.size(_CHANNELS) // input.size(_CHANNELS))
    stream = shards.stream() if config.noise_train > 0.0 else 0
    return shards, local, config._replace(num_groups=groups, stream=stream)


def _check_cut(
    input: Any, dim: int, parts: list[int], config: Config, own_statistics: bool, updates: bool
) -> None:
    """Refuses a dimension that is cut into so many parts, each of these into so many, ..."""
    kind = config.kind
    advice = "redistribute it to Replicate first"
    if kind == "layer":
        whole = dim < input.dim() - config.normalized_ndim
        advice += ", or to a Shard of a dimension before the normalized ones"
    elif kind == "batch":
        whole = not own_statistics or dim == _CHANNELS
        if not whole:
            advice += ", or use SyncBatchNormalNorm, whose statistics are those of all shards"
    elif kind == "instance":
        whole = dim in (0, _CHANNELS)
    else:
        whole = dim in (0, _CHANNELS)
        if dim == _CHANNELS:
            size = input.size(_CHANNELS)
            group = size // config.num_groups
            for count in parts:
                size = -(-size // count)  # of all shards but the last, as torch.chunk cuts
                whole = whole and size % group == 0
    if not whole:
        raise ValueError(
            f"the input's placements {tuple(input.placements)} cut dimension {dim} of shape "
            f"{tuple(input.shape)}, and with it groups of the {kind} layer, which must each lie "
            f"whole on a rank; {advice}"
        )
    if updates:
        raise ValueError(
            f"running statistics are to be moved towards those of an input that is cut along "
            f"dimension {dim} ({tuple(input.placements)}), of which a rank sees its shard alone; "
            "use track_running_stats=False, or redistribute the input to Replicate first"
        )


def shards_of_batch(input: Any, process_group: Any) -> Shards:
    """How a batch is spread over the ranks of a group, each with a shard of its own.

    Raises:
        ValueError: the mesh has other ranks than the group, channels are cut, or some ranks hold
            copies.
    """
    mesh, placements = input.device_mesh, tuple(input.placements)
    fits = mesh.size() == dist.get_world_size(process_group)
    if fits and not torch.compiler.is_compiling():  # which has no list of the mesh's ranks
        ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        fits = sorted(mesh.mesh.flatten().tolist()) == sorted(ranks)
    if not fits or any(not p.is_shard() or p.is_shard(_CHANNELS) for p in placements):
        raise ValueError(
            "a synchronised layer wants an input that is cut along its batch or its positions "
            f"among all ranks of its process_group; got placements {placements} on {mesh}"
        )
    return Shards(mesh, placements, input.shape, input.stride(), "batch")
