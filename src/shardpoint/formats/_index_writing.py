"""Columns of a checkpoint to the bytes of its native index."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from shardpoint.errors import FormatError
from shardpoint.formats._index_container import Column, write_container
from shardpoint.formats._index_format import (
    FORMAT,
    KINDS,
    MAX_DOCUMENT_BYTES,
    VERSION,
    MetadataStamp,
)
from shardpoint.formats._plain_json import to_json
from shardpoint.index import CheckpointIndex, Chunks, Objects, Tensors

__all__ = ["write_index"]


def write_index(index: CheckpointIndex, stamp: MetadataStamp) -> bytes:
    """Return the file for an index.

    Parameters
    ----------
    index
        Its `source` and `metadata_files` are not written: reading gives them.
    stamp
        Of the ``.metadata`` that says the same.

    Raises
    ------
    FormatError
        If the columns do not fit together, or the planner's data are not of plain types.
    """
    keys = [*index.tensors.keys, *index.objects.keys]
    numbers = {key: number for number, key in enumerate(keys)}
    if len(numbers) != len(keys) or index.objects.values:
        raise FormatError("an index holds each key once, and no values of objects")
    try:
        order = np.array([numbers[key] for key in index.key_order], np.int64)
    except KeyError as error:
        raise FormatError(f"key {error} is in the order of keys, and is not there") from None
    columns: dict[str, Column] = {
        **_strings("tensors.keys", index.tensors.keys),
        **_strings("objects.keys", index.objects.keys),
        **_strings("files", index.files),
        "key_order": order,
        "document": np.frombuffer(_document(index), np.uint8),
        **_tensor_columns(index.tensors),
        **_place_columns("chunks", index.chunks),
        **_chunk_columns(index.chunks),
        **_place_columns("objects", index.objects),
    }
    blocks = index.chunks.blocks
    return write_container(
        {name: np.asarray(column, KINDS[name]) for name, column in columns.items()},
        {
            "format": FORMAT,
            "version": VERSION,
            "metadata_size": str(stamp.size),
            "metadata_checksum": f"{stamp.checksum:08x}",
            "block_size": str(0 if blocks is None else blocks.block_size),
        },
    )


def _strings(name: str, values: Sequence[str]) -> dict[str, Column]:
    encoded = [value.encode("utf-8", "surrogatepass") for value in values]
    ends = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(value) for value in encoded], out=ends[1:])
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}.ends": ends}


def _document(index: CheckpointIndex) -> bytes:
    """Return what is small and no column, as JSON."""
    paths = index.paths
    try:
        document = {
            "version": index.version,
            "storage_meta": None if index.storage_meta is None else to_json({**index.storage_meta}),
            "transforms": [list(names) for names in index.transforms],
            "path_keys": None if paths is None or list(paths) == index.key_order else [*paths],
            "paths": None if paths is None else [list(path) for path in paths.values()],
            "planner_data": to_json(index.planner_data),
        }
        text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode()
    except (RecursionError, ValueError) as error:
        raise FormatError(f"what the planner stored does not fit into an index: {error}") from error
    if len(text) > MAX_DOCUMENT_BYTES:
        raise FormatError(f"what the planner stored takes {len(text)} bytes, too many for an index")
    return text


def _tensor_columns(tensors: Tensors) -> dict[str, Column]:
    return {
        "tensors.dtype": tensors.dtype,
        "tensors.ndim": tensors.ndim,
        "tensors.shape": tensors.shape,
        "tensors.first_chunk": tensors.first_chunk,
        "tensors.requires_grad": tensors.requires_grad,
        "tensors.pin_memory": tensors.pin_memory,
        "tensors.memory_format": tensors.memory_format,
    }


def _place_columns(name: str, places: Chunks | Objects) -> dict[str, Column]:
    columns: dict[str, Column] = {
        f"{name}.file": places.file,
        f"{name}.record_offset": places.record_offset,
        f"{name}.record_length": places.record_length,
        f"{name}.transform": places.transform,
    }
    if places.record_checksum is not None:
        columns[f"{name}.record_checksum"] = places.record_checksum
    return columns


def _chunk_columns(chunks: Chunks) -> dict[str, Column]:
    columns: dict[str, Column] = {
        "chunks.offsets": chunks.offsets,
        "chunks.sizes": chunks.sizes,
        "chunks.container": chunks.container,
    }
    payloads, blocks = chunks.payloads, chunks.blocks
    if payloads is not None:
        columns["payloads.offset"] = payloads.offset
        columns["payloads.length"] = payloads.length
        columns["payloads.checksum"] = payloads.checksum
        columns["payloads.strides"] = payloads.strides
        columns["payloads.flags"] = payloads.flags
    if blocks is not None:
        columns["blocks.first"] = blocks.first
        columns["blocks.values"] = blocks.values
    return columns
