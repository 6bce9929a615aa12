"""What the native index consists of: its columns with their types, and what it says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardpoint.formats.checksum import crc32

__all__ = ["FORMAT", "KINDS", "MAX_DOCUMENT_BYTES", "VERSION", "MetadataStamp", "stamp_of"]

FORMAT = "shardpoint.index"
VERSION = "1"

MAX_DOCUMENT_BYTES = 64 << 20
"""Of the JSON part: the paths of a million keys have about as many."""

KINDS: Mapping[str, str] = {
    # Texts: UTF-8, one after the other, with the positions between them (n + 1 of them).
    "tensors.keys": "uint8",
    "tensors.keys.ends": "int64",
    "objects.keys": "uint8",
    "objects.keys.ends": "int64",
    "files": "uint8",
    "files.ends": "int64",
    # Positions in the tensors' keys followed by those of the objects.
    "key_order": "int64",
    # JSON: paths, transforms, what torch stores beside the tensors.
    "document": "uint8",
    # The rest is as in `shardpoint.index`.
    "tensors.dtype": "uint8",
    "tensors.ndim": "int16",
    "tensors.shape": "int64",
    "tensors.first_chunk": "int64",
    "tensors.requires_grad": "bool",
    "tensors.pin_memory": "bool",
    "tensors.memory_format": "uint8",
    "chunks.offsets": "int64",
    "chunks.sizes": "int64",
    "chunks.file": "int32",
    "chunks.record_offset": "int64",
    "chunks.record_length": "int64",
    "chunks.container": "uint8",
    "chunks.transform": "int16",
    "chunks.record_checksum": "int64",
    "payloads.offset": "int64",
    "payloads.strides": "int64",
    "payloads.length": "int64",
    "payloads.checksum": "int64",
    "payloads.flags": "uint8",
    "blocks.first": "int64",
    "blocks.values": "uint32",
    "objects.file": "int32",
    "objects.record_offset": "int64",
    "objects.record_length": "int64",
    "objects.transform": "int16",
    "objects.record_checksum": "int64",
}
"""Columns and the names of their element types."""


@dataclass(frozen=True, slots=True)
class MetadataStamp:
    """Which ``.metadata`` an index belongs to: its size in bytes and its CRC-32."""

    size: int
    checksum: int


def stamp_of(metadata: bytes | bytearray | memoryview) -> MetadataStamp:
    """Return the stamp of a ``.metadata`` file's bytes."""
    return MetadataStamp(len(metadata), crc32(metadata))
