"""How `ShardedTensor`s are laid out: torch's sharding specs, with both kinds able to shard.

The names are those of ``torch.distributed._shard.sharding_spec``. The classes here are kinds of
torch's, so that its ``ShardedTensor`` takes them; the arithmetic is `shardpoint.sharding`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torch.distributed._shard.sharded_tensor.metadata import ShardedTensorMetadata
from torch.distributed._shard.sharded_tensor.metadata import TensorProperties as _TensorProperties
from torch.distributed._shard.sharded_tensor.shard import Shard
from torch.distributed._shard.sharded_tensor.utils import _parse_and_validate_remote_device
from torch.distributed._shard.sharding_spec import api as _torch
from torch.distributed._shard.sharding_spec.chunk_sharding_spec import (
    ChunkShardingSpec as _TorchChunkShardingSpec,
)
from torch.distributed.remote_device import _remote_device

from shardpoint.errors import NotSupportedError, PlanError, Problem
from shardpoint.region import Region
from shardpoint.sharding import chunk_length, chunk_spans, split_length, tiling_problems

__all__ = [
    "ChunkShardingSpec",
    "DevicePlacementSpec",
    "EnumerableShardingSpec",
    "PlacementSpec",
    "ShardMetadata",
    "ShardingSpec",
    "check_tensor",
    "custom_sharding_spec_op",
    "get_chunk_sharding_params",
    "get_chunked_dim_size",
    "get_split_size",
    "infer_sharding_spec_from_shards_metadata",
    "validate_non_overlapping_shards_metadata",
]

Function = TypeVar("Function", bound=Callable[..., Any])


class PlacementSpec(_torch.PlacementSpec):
    """Says where something lies; extend it for placements of your own."""


@dataclass
class DevicePlacementSpec(PlacementSpec):
    """A device, possibly another rank's: ``"rank:1/cuda:0"``, ``"worker/cpu"`` or ``"cpu"``."""

    device: _remote_device

    def __post_init__(self) -> None:
        self.device = _placement(self.device)


class ShardingSpec(_torch.ShardingSpec):
    """Says which rank holds which part of a tensor; extend it for layouts of your own."""

    @abstractmethod
    def build_metadata(
        self, tensor_sizes: torch.Size, tensor_properties: _TensorProperties
    ) -> ShardedTensorMetadata:
        """Return where the parts of a tensor of these sizes lie."""

    @abstractmethod
    def shard(
        self,
        tensor: torch.Tensor,
        src_rank: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> ShardedTensor:
        """Distribute one rank's tensor; every rank of the group calls this."""


@dataclass
class ChunkShardingSpec(_TorchChunkShardingSpec, ShardingSpec):
    """One axis cut into pieces of one length, the last ones shorter or empty.

    Parameters
    ----------
    dim
        The axis; negative ones count from the end.
    placements
        Where each piece lies, in the order of the pieces.

    Raises
    ------
    PlanError
        If `dim` is no integer, or a placement cannot be understood.
    NotSupportedError
        If `dim` is a name.
    """

    dim: Any
    placements: list[Any]

    def __post_init__(self) -> None:
        self._verify_dim(self.dim)
        self.placements = [_placement(place) for place in self.placements]

    @staticmethod
    def _verify_dim(dim: object) -> None:
        if isinstance(dim, str):
            raise NotSupportedError(f"the axis to cut must be a number, not the name {dim!r}")
        if not isinstance(dim, int):
            raise PlanError(f"the axis to cut must be an integer, found {dim!r}")

    def build_metadata(
        self, tensor_sizes: torch.Size, tensor_properties: _TensorProperties
    ) -> ShardedTensorMetadata:
        """Return where the pieces of a tensor of these sizes lie.

        Raises
        ------
        PlanError
            If there are no placements, or the tensor has no such axis.
        """
        sizes = list(tensor_sizes)
        if not -len(sizes) <= self.dim < len(sizes):
            raise PlanError(f"a tensor of shape {tuple(sizes)} has no axis {self.dim} to cut")
        axis = self.dim % len(sizes)
        if not self.placements:
            raise PlanError("a ChunkShardingSpec without placements cannot place anything")
        spans = chunk_spans(sizes[axis], len(self.placements))
        shards = []
        for place, (offset, length) in zip(self.placements, spans, strict=True):
            offsets, lengths = [0] * len(sizes), sizes.copy()
            offsets[axis], lengths[axis] = offset, length
            shards.append(ShardMetadata(offsets, lengths, place))
        return ShardedTensorMetadata(shards, torch.Size(sizes), tensor_properties)

    def shard(
        self,
        tensor: torch.Tensor,
        src_rank: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> ShardedTensor:
        """Distribute the tensor of the rank `src_rank` (in the group) to the placements.

        The other ranks give a tensor of the same shape and dtype, whose values do not matter.

        Raises
        ------
        PlanError
            If the tensor and the spec do not fit, or a placement is outside of the group.
        """
        return _distribute(self, tensor, src_rank, process_group)


@dataclass
class EnumerableShardingSpec(_torch.EnumerableShardingSpec, ShardingSpec):
    """Any boxes that tile a tensor, each with its place.

    Raises
    ------
    PlanError
        If there are none, they differ in their number of axes, or overlap; names every pair.
    """

    shards: list[ShardMetadata]

    def __post_init__(self) -> None:
        if not self.shards:
            raise PlanError("an EnumerableShardingSpec needs at least one shard")
        validate_non_overlapping_shards_metadata(self.shards)

    def build_metadata(
        self, tensor_sizes: torch.Size, tensor_properties: _TensorProperties
    ) -> ShardedTensorMetadata:
        """Return where the parts of a tensor of these sizes lie.

        Raises
        ------
        PlanError
            If the shards do not tile it; names every overlap, gap and shard outside.
        """
        check_tensor(self.shards, tensor_sizes)
        return ShardedTensorMetadata(self.shards, torch.Size(tensor_sizes), tensor_properties)

    def shard(
        self,
        tensor: torch.Tensor,
        src_rank: int = 0,
        process_group: dist.ProcessGroup | None = None,
    ) -> ShardedTensor:
        """Distribute a tensor; see `ChunkShardingSpec.shard`. torch 2.13 does not have this."""
        return _distribute(self, tensor, src_rank, process_group)


def get_split_size(dim_size: int, chunks: int) -> int:
    """Return the length of the pieces of an axis; the last ones may be shorter or empty."""
    return split_length(dim_size, chunks)


def get_chunked_dim_size(dim_size: int, split_size: int, idx: int) -> int:
    """Return the length of piece `idx` of an axis that is cut into lengths of `split_size`."""
    return chunk_length(dim_size, split_size, idx)


def get_chunk_sharding_params(
    sharding_dim_size: int, world_size: int, spec: ChunkShardingSpec, rank: int
) -> tuple[int, int]:
    """Return where the piece of one rank begins on the cut axis, and its length.

    Raises
    ------
    PlanError
        If the spec places nothing on that rank.
    """
    spans = chunk_spans(sharding_dim_size, world_size)
    for place, span in zip(spec.placements, spans, strict=False):
        if place.rank() == rank:
            return span
    raise PlanError(f"the spec's placements {spec.placements} have none on rank {rank}")


def validate_non_overlapping_shards_metadata(shards: Sequence[ShardMetadata]) -> None:
    """Check that no two shards share an element.

    Raises
    ------
    PlanError
        Names every pair that does.
    """
    _raise("the shards do not fit together", tiling_problems(_regions(shards), None))


def check_tensor(shards_metadata: Sequence[ShardMetadata], tensor_dims: Sequence[int]) -> None:
    """Check that shards tile a tensor of this shape.

    Raises
    ------
    PlanError
        Names every overlap, every gap, and every shard outside of the tensor.
    """
    shape = tuple(tensor_dims)
    problems = tiling_problems(_regions(shards_metadata), shape)
    _raise(f"the shards do not tile a tensor of shape {shape}", problems)


def infer_sharding_spec_from_shards_metadata(
    shards_metadata: Sequence[ShardMetadata],
) -> ChunkShardingSpec | EnumerableShardingSpec:
    """Return the simplest spec that lays a tensor out like this.

    A `ChunkShardingSpec` where one axis is cut into pieces of one length and every piece has a
    place, else an `EnumerableShardingSpec`.

    Raises
    ------
    PlanError
        If there are no shards, or some overlap.
    """
    shards = sorted(shards_metadata, key=lambda shard: list(shard.shard_offsets))
    placed = all(shard.placement is not None for shard in shards)
    if placed and len(shards) > 1:
        axes = len(shards[0].shard_offsets)
        cut = [
            axis
            for axis in range(axes)
            if len(
                {shard.shard_offsets[axis] for shard in shards if len(shard.shard_offsets) > axis}
            )
            > 1
        ]
        if len(cut) == 1:
            spec = ChunkShardingSpec(cut[0], [shard.placement for shard in shards])
            if _is_laid_out_by(spec, shards):
                return spec
    return EnumerableShardingSpec(list(shards_metadata))


_infer_sharding_spec_from_shards_metadata = infer_sharding_spec_from_shards_metadata


def custom_sharding_spec_op(
    sharding_spec_class: type, func: Callable[..., Any]
) -> Callable[[Function], Function]:
    """Return a decorator that registers what `func` does on tensors laid out by a kind of spec.

    The decorated function gets ``(types, args, kwargs, process_group)`` (and for torch's own
    dispatch is found in torch's table, in which `ShardedTensor` looks).
    """
    table = _torch._CUSTOM_SHARDING_SPEC_OPS.setdefault(_table_name(sharding_spec_class), {})

    def register(function: Function) -> Function:
        table[func] = function
        return function

    return register


def _has_custom_op(sharding_spec: object, op: Callable[..., Any]) -> bool:
    """Whether something is registered for an operation on tensors with this spec."""
    return op in _torch._CUSTOM_SHARDING_SPEC_OPS.get(_table_name(type(sharding_spec)), {})


def _dispatch_custom_op(
    sharding_spec: object,
    op: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    process_group: dist.ProcessGroup | None,
) -> Any:
    """Run what is registered for an operation.

    Raises
    ------
    NotSupportedError
        If nothing is.
    """
    if not _has_custom_op(sharding_spec, op):
        raise NotSupportedError(
            f"nothing is registered for {op} on tensors with a {type(sharding_spec).__qualname__}; "
            f"register it with custom_sharding_spec_op"
        )
    table = _torch._CUSTOM_SHARDING_SPEC_OPS[_table_name(type(sharding_spec))]
    return table[op](types, args, kwargs, process_group)


def _placement(place: Any) -> _remote_device:
    return place if isinstance(place, _remote_device) else _remote_device(place)


def _table_name(kind: type) -> str:
    return kind.__qualname__


def _regions(shards: Sequence[ShardMetadata]) -> list[Region]:
    return [Region(tuple(shard.shard_offsets), tuple(shard.shard_sizes)) for shard in shards]


def _raise(summary: str, problems: Sequence[Problem]) -> None:
    if problems:
        raise PlanError(summary, problems)


def _is_laid_out_by(spec: ChunkShardingSpec, shards: Sequence[ShardMetadata]) -> bool:
    regions = _regions(shards)
    shape = [max(ends) for ends in zip(*(map(sum, _spans(r)) for r in regions), strict=True)]
    wanted = spec.build_metadata(torch.Size(shape), _TensorProperties()).shards_metadata
    return _regions(wanted) == regions


def _spans(region: Region) -> list[tuple[int, int]]:
    return list(zip(region.offsets, region.sizes, strict=True))


def _distribute(
    spec: ShardingSpec,
    tensor: torch.Tensor,
    source: int,
    process_group: dist.ProcessGroup | None,
) -> ShardedTensor:
    """Send every shard from the source rank to its own; one scatter, padded to the largest part."""
    group = process_group if process_group is not None else dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise PlanError("shard needs a process group: call init_process_group first")
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if not 0 <= source < world_size:
        raise PlanError(f"src_rank {source} is not a rank of a group of {world_size}")
    properties = _TensorProperties(
        dtype=tensor.dtype,
        layout=tensor.layout,
        requires_grad=tensor.requires_grad,
        memory_format=torch.contiguous_format,
        pin_memory=tensor.is_pinned(),
    )
    metadata = spec.build_metadata(tensor.size(), properties)
    places = [
        _parse_and_validate_remote_device(group, shard.placement)  # type: ignore[no-untyped-call]
        for shard in metadata.shards_metadata
    ]
    parts: list[list[int]] = [[] for _ in range(world_size)]
    for number, (owner, _) in enumerate(places):
        parts[owner].append(number)
    numels = [torch.Size(shard.shard_sizes).numel() for shard in metadata.shards_metadata]
    most = max(sum(numels[number] for number in part) for part in parts)
    received = tensor.new_empty(most, requires_grad=False)
    sent = None
    if rank == source:
        sent = [
            _padded(
                [_narrowed(tensor.detach(), metadata.shards_metadata[i]) for i in part], received
            )
            for part in parts
        ]
    dist.scatter(received, sent, src=dist.get_global_rank(group, source), group=group)
    shards, start = [], 0
    for number in parts[rank]:
        shard = metadata.shards_metadata[number]
        local = received[start : start + numels[number]].reshape(shard.shard_sizes).clone()
        local = local.to(places[number][1]).requires_grad_(tensor.requires_grad)
        shards.append(Shard(local, replace(shard)))
        start += numels[number]
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        shards, metadata, process_group=group, sharding_spec=spec
    )


def _narrowed(tensor: torch.Tensor, shard: ShardMetadata) -> torch.Tensor:
    for axis, (offset, size) in enumerate(zip(shard.shard_offsets, shard.shard_sizes, strict=True)):
        tensor = tensor.narrow(axis, offset, size)
    return tensor


def _padded(parts: Sequence[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros_like(like)
    start = 0
    for part in parts:
        buffer[start : start + part.numel()].view(part.shape).copy_(part)
        start += part.numel()
    return buffer
