"""What a checkpoint holds, as torch's object model has it.

Where such objects come from the engine they are views over its columns, made when they are
looked at; where a program makes them they are plain dataclasses.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

import torch

from shardpoint.dcp.stateful import Stateful

__all__ = [
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
]


@dataclass
class ChunkStorageMetadata:
    """One stored box of a tensor.

    Attributes
    ----------
    offsets, sizes
        In elements, one number an axis.
    """

    offsets: torch.Size
    sizes: torch.Size


class _MEM_FORMAT_ENCODING(Enum):
    """How files spell a memory format."""

    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


_MEMORY_FORMATS = {
    torch.contiguous_format: _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
    torch.channels_last: _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST,
    torch.preserve_format: _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT,
}


@dataclass
class TensorProperties:
    """How a tensor was made; loading needs only `dtype`."""

    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    layout: torch.layout = field(default=torch.strided)
    requires_grad: bool = False
    memory_format: torch.memory_format = field(default=torch.contiguous_format)
    pin_memory: bool = False

    def __getstate__(self) -> tuple[Any, ...]:
        # five fields: what every release from 2.3 on can read
        try:
            encoding = _MEMORY_FORMATS[self.memory_format]
        except KeyError:
            raise ValueError(f"memory format {self.memory_format} cannot be stored") from None
        return (self.dtype, self.layout, self.requires_grad, encoding, self.pin_memory)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # a sixth field, strides, comes with 2.15 and is not to be relied on
        self.dtype, self.layout, self.requires_grad, encoding, self.pin_memory = state[:5]
        number = getattr(encoding, "value", encoding)
        self.memory_format = next(f for f, e in _MEMORY_FORMATS.items() if e.value == number)

    @staticmethod
    def create_from_tensor(tensor: torch.Tensor) -> TensorProperties:
        """Return the properties of a tensor."""
        return TensorProperties(
            dtype=tensor.dtype,
            layout=tensor.layout,
            requires_grad=tensor.requires_grad,
            memory_format=torch.contiguous_format,
            pin_memory=tensor.is_pinned(),
        )


@dataclass
class TensorStorageMetadata:
    """A stored tensor: its properties, global size, and the chunks it lies in."""

    properties: TensorProperties
    size: torch.Size
    chunks: list[ChunkStorageMetadata]


@dataclass
class BytesStorageMetadata:
    """A stored object that is no tensor."""


STORAGE_TYPES: TypeAlias = TensorStorageMetadata | BytesStorageMetadata
STATE_DICT_TYPE: TypeAlias = dict[str, Stateful | Any]


@dataclass
class StorageMeta:
    """Which checkpoint this is: its place, and the identities of the save and the load."""

    checkpoint_id: str | os.PathLike[str] | None = None
    save_id: str | None = None
    load_id: str | None = None
    modules: list[str] = field(default_factory=list)


@dataclass
class Metadata:
    """Everything that is known of a checkpoint without reading its data.

    Attributes
    ----------
    state_dict_metadata
        Flat key to what is stored under it.
    planner_data
        With flattening: flat key to its path in the nested state dict.
    storage_data
        `MetadataIndex` to where the item lies.
    storage_meta, version
        See `StorageMeta`; the metadata's format version.
    """

    state_dict_metadata: dict[str, STORAGE_TYPES]
    planner_data: Any = None
    storage_data: Any = None
    storage_meta: StorageMeta | None = None
    version: str | None = None


@dataclass(frozen=True, init=False)
class MetadataIndex:
    """Names one item: an object by its key, a chunk by its key and offset.

    Attributes
    ----------
    fqn
        The flat key.
    offset
        Where the chunk begins in the tensor; None for objects.
    index
        A hint: the chunk's place in the list of chunks. Not part of equality or hash.
    """

    fqn: str
    offset: torch.Size | None = None
    index: int | None = field(hash=False, compare=False, default=None)

    def __init__(
        self, fqn: str, offset: Sequence[int] | None = None, index: int | None = None
    ) -> None:
        object.__setattr__(self, "fqn", fqn)
        object.__setattr__(self, "index", index)
        if offset is not None:
            object.__setattr__(self, "offset", torch.Size(offset))

    def __eq__(self, other: object) -> bool:
        # by name: torch's own finds what is stored under ours, and the other way round
        if type(other).__name__ != "MetadataIndex":
            return NotImplemented
        return self.fqn == getattr(other, "fqn", None) and self.offset == getattr(
            other, "offset", None
        )
