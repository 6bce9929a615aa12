"""The protocol by which any tensor subclass takes part in saving and loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import torch

from shardpoint.dcp.metadata import ChunkStorageMetadata, MetadataIndex
from shardpoint.dcp.planner import WriteItem

__all__ = ["Checkpointable"]


@runtime_checkable
class Checkpointable(Protocol):
    """A value that brings its own chunks: a part of a larger tensor, or one stored otherwise.

    The names are those of torch's protocol, and an object that implements torch's works here
    unchanged: it may return torch's own ``WriteItem`` and ``ChunkStorageMetadata`` as well. A
    `DTensor` whose local tensor is such a value is asked through it.
    """

    def __create_write_items__(self, fqn: str, object: object) -> Sequence[WriteItem]:
        """Return what this rank writes of the value, under the key `fqn`."""
        ...

    def __create_chunk_list__(self) -> Sequence[ChunkStorageMetadata]:
        """Return the boxes, in the whole tensor, that this rank holds and wants filled."""
        ...

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        """Return the plain tensor that is the chunk an index names, to be read or filled."""
        ...


_Checkpointable = Checkpointable
