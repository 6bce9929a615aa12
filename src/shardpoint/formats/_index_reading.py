"""The bytes of a native index to the columns of a checkpoint; nothing in them is believed."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeAlias

import numpy as np

from shardpoint.errors import FormatError, LimitExceededError, NotSupportedError, Problem
from shardpoint.formats._index_checks import check_columns, check_first
from shardpoint.formats._index_container import Column, Container, read_container
from shardpoint.formats._index_format import (
    FORMAT,
    KINDS,
    MAX_DOCUMENT_BYTES,
    VERSION,
    MetadataStamp,
)
from shardpoint.formats._plain_json import from_json
from shardpoint.index import BlockChecksums, CheckpointIndex, Chunks, Objects, Payloads, Tensors

__all__ = ["read_index", "read_save_id"]

Paths: TypeAlias = "dict[str, tuple[str | int, ...]]"


def read_index(
    data: memoryview, stamp: MetadataStamp, *, file: str, metadata_file: str
) -> CheckpointIndex:
    """Read an index; its columns are views of `data`.

    Parameters
    ----------
    data
        The whole file. It is kept as long as the index is, and must not change.
    stamp
        Of the ``.metadata`` that is there.
    file, metadata_file
        Their names, for messages and `CheckpointIndex.metadata_files`.

    Raises
    ------
    CorruptionError
        If bytes are missing or changed.
    FormatError
        If it belongs to another ``.metadata``, or a column has another type or shape than it
        should, or values that cannot be.
    NotSupportedError
        If a later version of the format wrote it.
    LimitExceededError
    """
    container = read_container(data, file=file)
    block_size = _check_metadata(container, stamp)
    document = _read_document(container)
    tensors = _read_tensors(container)
    chunks = _read_chunks(container, tensors, block_size)
    objects = _read_objects(container)
    keys = [*tensors.keys, *objects.keys]
    key_order = _read_order(container, keys)
    paths, transforms = document.paths(key_order), document.transforms()
    index = CheckpointIndex(
        tensors=tensors,
        chunks=chunks,
        objects=objects,
        files=_read_strings(container, "files"),
        transforms=transforms,
        key_order=key_order,
        paths=paths,
        storage_meta=document.storage_meta(),
        version=document.version(),
        source="dcp",
        metadata_files=[metadata_file, file],
        planner_data=document.planner_data(),
    )
    check_columns(index, file=file)
    return index


def read_save_id(data: memoryview, *, file: str) -> str | None:
    """Return which save an index belongs to, whatever ``.metadata`` there is.

    Raises
    ------
    CorruptionError, FormatError, NotSupportedError, LimitExceededError
        As `read_index`.
    """
    meta = _read_document(read_container(data, file=file)).storage_meta() or {}
    save_id = meta.get("save_id")
    return save_id if isinstance(save_id, str) else None


def _column(container: Container, name: str, *shape: int | None) -> Column:
    return container.column(name, KINDS[name], *shape)


def _check_metadata(container: Container, stamp: MetadataStamp) -> int:
    """Check what an index says of itself; return the size of the checksums' blocks."""
    texts = container.metadata
    if texts.get("format") != FORMAT:
        raise container.fail(f"the file is no index: its format is {texts.get('format')!r}")
    if texts.get("version") != VERSION:
        message = f"version {texts.get('version')!r} of the index is not known"
        raise NotSupportedError(str(Problem(message, file=container.file)))
    wanted = str(stamp.size), f"{stamp.checksum:08x}"
    found = texts.get("metadata_size"), texts.get("metadata_checksum")
    if found != wanted:
        raise container.fail(
            f"the index belongs to metadata of {found[0]} bytes and CRC-32 {found[1]}, not to "
            f"the one there of {wanted[0]} bytes and CRC-32 {wanted[1]}"
        )
    block_size = texts.get("block_size", "")
    if not re.fullmatch(r"[0-9]{1,18}", block_size):
        raise container.fail(f"block_size is {block_size[:40]!r}")
    return int(block_size)


def _read_strings(container: Container, name: str) -> list[str]:
    ends = _column(container, f"{name}.ends", None)
    raw = _column(container, name, None)
    check_first(ends, len(raw), f"{name}.ends", file=container.file)
    try:
        places = ends.tolist()
        data = raw.tobytes()
        if data.isascii():
            text = data.decode()
            found = [text[a:b] for a, b in itertools.pairwise(places)]
        else:
            found = [
                data[a:b].decode("utf-8", "surrogatepass") for a, b in itertools.pairwise(places)
            ]
    except UnicodeDecodeError as error:
        raise container.fail(f"column {name!r} is no UTF-8: {error}") from error
    if len(set(found)) != len(found):
        raise container.fail(f"column {name!r} has a name twice")
    return found


def _read_order(container: Container, keys: Sequence[str]) -> list[str]:
    if len(set(keys)) != len(keys):
        raise container.fail("a key is a tensor and an object")
    order = _column(container, "key_order", len(keys))
    if not np.array_equal(np.sort(order), np.arange(len(keys))):
        raise container.fail("the order of keys does not name each key once")
    return [keys[number] for number in order.tolist()]


def _read_tensors(container: Container) -> Tensors:
    keys = _read_strings(container, "tensors.keys")
    count = len(keys)
    return Tensors(
        keys=keys,
        dtype=_column(container, "tensors.dtype", count),
        ndim=_column(container, "tensors.ndim", count),
        shape=_column(container, "tensors.shape", count, None),
        first_chunk=_column(container, "tensors.first_chunk", count + 1),
        requires_grad=_column(container, "tensors.requires_grad", count),
        pin_memory=_column(container, "tensors.pin_memory", count),
        memory_format=_column(container, "tensors.memory_format", count),
    )


def _read_places(container: Container, name: str, count: int) -> dict[str, Any]:
    return {
        "file": _column(container, f"{name}.file", count),
        "record_offset": _column(container, f"{name}.record_offset", count),
        "record_length": _column(container, f"{name}.record_length", count),
        "transform": _column(container, f"{name}.transform", count),
    }


def _read_checksums(container: Container, name: str, count: int) -> Column | None:
    name = f"{name}.record_checksum"
    return _column(container, name, count) if name in container else None


def _read_chunks(container: Container, tensors: Tensors, block_size: int) -> Chunks:
    axes = tensors.shape.shape[1]
    offsets = _column(container, "chunks.offsets", None, axes)
    count = len(offsets)
    # Before anything of that length is made; `count` is of rows that the file really has.
    check_first(tensors.first_chunk, count, "tensors.first_chunk", file=container.file)
    places = _read_places(container, "chunks", count)
    if "payloads.offset" in container:
        payloads = Payloads(
            offset=_column(container, "payloads.offset", count),
            strides=_column(container, "payloads.strides", count, axes),
            length=_column(container, "payloads.length", count),
            checksum=_column(container, "payloads.checksum", count),
            flags=_column(container, "payloads.flags", count),
        )
    else:
        payloads = None
    return Chunks(
        tensor=np.repeat(np.arange(len(tensors), dtype=np.int64), np.diff(tensors.first_chunk)),
        offsets=offsets,
        sizes=_column(container, "chunks.sizes", count, axes),
        container=_column(container, "chunks.container", count),
        payloads=payloads,
        blocks=_read_blocks(container, count, block_size),
        record_checksum=_read_checksums(container, "chunks", count),
        **places,
    )


def _read_blocks(container: Container, count: int, block_size: int) -> BlockChecksums | None:
    if "blocks.first" not in container:
        return None
    if block_size < 1:
        raise container.fail("there are checksums of blocks of no bytes")
    first = _column(container, "blocks.first", count + 1)
    values = _column(container, "blocks.values", None)
    check_first(first, len(values), "blocks.first", file=container.file)
    return BlockChecksums(block_size, first, values)


def _read_objects(container: Container) -> Objects:
    keys = _read_strings(container, "objects.keys")
    return Objects(
        keys=keys,
        record_checksum=_read_checksums(container, "objects", len(keys)),
        **_read_places(container, "objects", len(keys)),
    )


@dataclass(frozen=True, slots=True)
class _Document:
    """The JSON part, field by field."""

    container: Container
    fields: Mapping[str, Any]

    def version(self) -> str | None:
        version = self.fields.get("version")
        if version is not None and not isinstance(version, str):
            raise self.container.fail("version is no text")
        return version

    def transforms(self) -> list[tuple[str, ...]]:
        found = self.fields.get("transforms")
        if not isinstance(found, list) or found[:1] != [[]] or not all(map(_is_texts, found)):
            raise self.container.fail("transforms are not lists of names after an empty one")
        return [tuple(names) for names in found]

    def paths(self, key_order: Sequence[str]) -> Paths | None:
        paths, keys = self.fields.get("paths"), self.fields.get("path_keys")
        if paths is None:
            return None
        if keys is None:
            keys = key_order
        if not isinstance(paths, list) or not _is_texts(keys) or len(keys) != len(paths):
            raise self.container.fail("paths are not one list for each key")
        if not all(map(_is_path, paths)):
            raise self.container.fail("a path has parts that are neither names nor numbers")
        return dict(zip(keys, map(tuple, paths), strict=True))

    def storage_meta(self) -> dict[str, Any] | None:
        found = self._plain("storage_meta")
        if found is None:
            return None
        if not isinstance(found, dict) or not _is_texts(list(found)):
            raise self.container.fail("storage_meta is no dict of fields")
        for name, value in found.items():
            if not (value is None or isinstance(value, str | PurePath) or _is_texts(value)):
                raise self.container.fail(f"field {name[:40]!r} of storage_meta is no text")
        return found

    def planner_data(self) -> Any:
        return self._plain("planner_data")

    def _plain(self, name: str) -> Any:
        try:
            return from_json(self.fields.get(name))
        except (FormatError, RecursionError) as error:
            raise self.container.fail(f"{name}: {error}") from error


def _read_document(container: Container) -> _Document:
    raw = _column(container, "document", None)
    if len(raw) > MAX_DOCUMENT_BYTES:
        message = f"column 'document' has {len(raw)} bytes, more than {MAX_DOCUMENT_BYTES}"
        raise LimitExceededError(str(Problem(message, file=container.file)))
    try:
        fields = json.loads(raw.tobytes())
    except (ValueError, RecursionError) as error:
        raise container.fail(f"column 'document' is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise container.fail("column 'document' is no JSON object")
    return _Document(container, fields)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)


def _is_path(value: Any) -> bool:
    return isinstance(value, list) and all(type(part) in (str, int) for part in value)
