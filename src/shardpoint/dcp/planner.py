"""Plans, and the two interfaces by which programs shape what is saved and loaded."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from typing import Any

import torch

from shardpoint.dcp.metadata import (
    STATE_DICT_TYPE,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)

__all__ = [
    "BytesIOWriteData",
    "LoadItemType",
    "LoadPlan",
    "LoadPlanner",
    "ReadItem",
    "SavePlan",
    "SavePlanner",
    "TensorWriteData",
    "WriteItem",
    "WriteItemType",
]


class _Kind(Enum):
    """Equal to the member of that name of torch's enumeration: programs may name either."""

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Enum) and type(other).__name__ == type(self).__name__:
            return self.name == other.name
        return NotImplemented

    __hash__ = Enum.__hash__


class WriteItemType(_Kind):
    """What a `WriteItem` writes."""

    TENSOR = auto()
    SHARD = auto()
    BYTE_IO = auto()


class LoadItemType(_Kind):
    """What a `ReadItem` reads."""

    TENSOR = auto()
    BYTE_IO = auto()


@dataclass(frozen=True)
class BytesIOWriteData:
    """Size in bytes of an object that is written as it is."""

    nbytes: int


@dataclass(frozen=True)
class TensorWriteData:
    """The chunk that is written, and the tensor it belongs to."""

    chunk: ChunkStorageMetadata
    properties: TensorProperties
    size: torch.Size


@dataclass(frozen=True)
class WriteItem:
    """One thing to write."""

    index: MetadataIndex
    type: WriteItemType
    bytes_io_data: BytesIOWriteData | None = None
    tensor_data: TensorWriteData | None = None

    def tensor_storage_size(self) -> int | None:
        """Return the bytes of the chunk that is written, or None for an object."""
        if self.tensor_data is None:
            return None
        return prod(self.tensor_data.chunk.sizes) * self.tensor_data.properties.dtype.itemsize


@dataclass(frozen=True)
class ReadItem:
    """One box to read out of a stored chunk into a box of a local one.

    Attributes
    ----------
    dest_index, dest_offsets
        The local chunk, and where in it the box begins.
    storage_index, storage_offsets
        The stored chunk, and where in it the box begins.
    lengths
        The box's sizes.
    """

    type: LoadItemType
    dest_index: MetadataIndex
    dest_offsets: torch.Size
    storage_index: MetadataIndex
    storage_offsets: torch.Size
    lengths: torch.Size


@dataclass(frozen=True)
class SavePlan:
    """What one rank writes.

    Attributes
    ----------
    items
        A list, or a view over the engine's columns that makes items when they are looked at.
    storage_data, planner_data
        What the storage writer and the planner add on the way.
    usable
        False where the plan says "as last time".
    """

    items: list[WriteItem]
    storage_data: Any = None
    planner_data: Any = None
    usable: bool = True


@dataclass
class LoadPlan:
    """What one rank reads; see `SavePlan`."""

    items: list[ReadItem]
    storage_data: Any = None
    planner_data: Any = None


class SavePlanner(ABC):
    """Shapes a save: what is written, under which key, by which rank.

    On every rank the methods are called in the order in which they stand here;
    `create_global_plan` on the coordinator only. Most programs extend `DefaultSavePlanner`.
    """

    @abstractmethod
    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict that is to be saved."""

    @abstractmethod
    def create_local_plan(self) -> SavePlan:
        """Return what this rank would write."""

    @abstractmethod
    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return what each rank writes in the end, and the checkpoint's metadata."""

    @abstractmethod
    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Take this rank's part of the global plan; return what is to be carried out."""

    @abstractmethod
    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """Return the data of one item. May be called several times and in several threads."""


class LoadPlanner(ABC):
    """Shapes a load: what is read, and where it goes. See `SavePlanner` for the calls."""

    @abstractmethod
    def set_up_planner(
        self,
        state_dict: STATE_DICT_TYPE,
        metadata: Metadata | None = None,
        is_coordinator: bool = False,
    ) -> None:
        """Take the state dict that is to be filled and the checkpoint's metadata."""

    @abstractmethod
    def create_local_plan(self) -> LoadPlan:
        """Return what this rank would read."""

    @abstractmethod
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return what each rank reads in the end."""

    @abstractmethod
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Take this rank's part of the global plan; return what is to be carried out."""

    @abstractmethod
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put an object, given as its stored bytes, into the state dict."""

    def resolve_bytes(self, read_item: ReadItem) -> io.BytesIO:
        """Return the stream to read an object's bytes into; storage readers need not ask."""
        raise NotImplementedError(f"{type(self).__name__} does not implement resolve_bytes")

    @abstractmethod
    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the tensor, of the item's lengths, that its values are read into."""

    @abstractmethod
    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Called when `tensor`, from `resolve_tensor`, holds its values."""
