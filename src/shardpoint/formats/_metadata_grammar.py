"""What a large ``.metadata`` consists of, opcode by opcode, as columns.

These are the ``ChunkStorageMetadata`` in the list of a tensor, the pairs of a ``MetadataIndex``
and a ``_StorageInfo`` in ``storage_data``, and the ``TensorStorageMetadata`` of one chunk in
``state_dict_metadata``: as Python's pickler and `write_metadata` write them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.formats._metadata_cursors import Bytes, Cursors, Int64s, Shapes, Texts, fetch
from shardpoint.formats._metadata_tables import Names, Table, read_table

__all__ = [
    "ChunkColumns",
    "StorageColumns",
    "TensorColumns",
    "read_chunks",
    "read_storage",
    "read_tensors",
]

_MOST_DESCRIPTORS = 4
_LIST, _MARK, _APPEND, _APPENDS = ord("]"), ord("("), ord("a"), ord("e")

_Bools: TypeAlias = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, eq=False)
class ChunkColumns:
    """Chunks."""

    offsets: Shapes
    sizes: Shapes


@dataclass(frozen=True, slots=True, eq=False)
class TensorColumns:
    """Tensors of one chunk each; behind each may stand the key of the next.

    Attributes
    ----------
    dtype, layout, memory_format
        Memo slots of these.
    requires_grad, pin_memory
        Flags.
    size, offsets, sizes
        Of the tensor, of its chunk, and of its chunk.
    has_next
        Whether there is a key.
    next_key
        That.
    """

    dtype: Int64s
    layout: Int64s
    requires_grad: _Bools
    memory_format: Int64s
    pin_memory: _Bools
    size: Shapes
    offsets: Shapes
    sizes: Shapes
    has_next: _Bools
    next_key: Texts


@dataclass(frozen=True, slots=True, eq=False)
class StorageColumns:
    """Entries of ``storage_data``.

    Attributes
    ----------
    key, path
        Texts.
    position
        ``index``; -1 is None.
    has_offset
        Whether the index has an offset.
    offset
        That offset.
    record_offset, record_length
        Of the record.
    transform_start, transform_length
        The opcodes that give the list of transforms; of length 0 where there is none.
    transform_slot
        The memo slot that a list made there is put into, counted from the first, or -1.
    """

    key: Texts
    position: Int64s
    has_offset: _Bools
    offset: Shapes
    path: Texts
    record_offset: Int64s
    record_length: Int64s
    transform_start: Int64s
    transform_length: Int64s
    transform_slot: Int64s


def read_chunks(source: Bytes, names: Names, first: int) -> Table:
    """Return the ``ChunkStorageMetadata`` from position `first` on."""

    def read(at: Cursors) -> ChunkColumns:
        return ChunkColumns(*_box(at, names))

    return read_table(source, names, first, read)


def read_tensors(source: Bytes, names: Names, first: int) -> Table:
    """Return the ``TensorStorageMetadata`` of one chunk each from position `first` on."""
    properties, chunk = names.classes

    def read(at: Cursors) -> TensorColumns:
        at.expect(fetch(properties), b")")
        at.expect_new(b"\x81")
        at.expect(b"(")
        dtype, layout = at.references(), at.references()
        requires_grad, memory_format, pin_memory = at.flags(), at.references(), at.flags()
        at.expect_new(b"t")
        at.expect(b"b", names.field("size"))
        size = at.shapes(names.size)
        at.expect(names.field("chunks"))
        at.expect_new(b"]")
        marked = at.next() == _MARK
        at.position = at.position + marked
        at.expect(fetch(chunk), b")")
        at.expect_new(b"\x81")
        at.expect_new(b"}")
        at.expect(b"(", names.field("offsets"))
        offsets, sizes = _box(at, names)
        at.good &= at.next() == np.where(marked, _APPENDS, _APPEND)
        at.position = at.position + 1
        at.expect(b"u", b"b")
        return TensorColumns(
            dtype,
            layout,
            requires_grad,
            memory_format,
            pin_memory,
            size,
            offsets,
            sizes,
            *_optional_text(at),
        )

    return read_table(source, names, first, read)


def read_storage(source: Bytes, names: Names, first: int) -> Table:
    """Return the pairs of ``MetadataIndex`` and ``_StorageInfo`` from position `first` on."""

    def read(at: Cursors) -> StorageColumns:
        key = at.texts()
        at.expect(names.field("index"))
        position = at.integers_or_none()
        has_offset, offset = _optional_offset(at, names)
        at.expect(b"u", b"b", fetch(*names.classes), b")")
        at.expect_new(b"\x81")
        at.expect_new(b"}")
        at.expect(b"(", names.field("relative_path"))
        path = at.texts()
        at.expect(names.field("offset"))
        record_offset = at.integers()
        at.expect(names.field("length"))
        record_length = at.integers()
        transforms = _optional_transforms(at, names)
        at.expect(b"u", b"b")
        return StorageColumns(
            key,
            position,
            has_offset,
            offset,
            path,
            record_offset,
            record_length,
            *transforms,
        )

    return read_table(source, names, first, read)


def _box(at: Cursors, names: Names) -> tuple[Shapes, Shapes]:
    """Pass offsets and sizes of a chunk, and its end."""
    offsets = at.shapes(names.size)
    at.expect(names.field("sizes"))
    sizes = at.shapes(names.size)
    at.expect(b"u", b"b")
    return offsets, sizes


def _optional_offset(at: Cursors, names: Names) -> tuple[_Bools, Shapes]:
    there = at.next() != ord("u")
    if there.all():
        at.expect(names.field("offset"))
        return there, at.shapes(names.size)
    count = len(there)
    rows = np.flatnonzero(there)
    part = at.part(rows)
    part.expect(names.field("offset"))
    shapes = part.shapes(names.size)
    at.put(rows, part)
    numbers = np.zeros((count, shapes.numbers.shape[1]), np.int64)
    numbers[rows] = shapes.numbers
    axes = _spread(shapes.axes, rows, count, 0)
    reference = _spread(shapes.reference, rows, count, -1)
    return there, Shapes(numbers, axes, reference, _spread(shapes.slot, rows, count, -1))


def _optional_text(at: Cursors) -> tuple[_Bools, Texts]:
    there = at.at_text()
    count = len(there)
    rows = np.flatnonzero(there)
    part = at.part(rows)
    texts = part.texts()
    at.put(rows, part)
    return there, Texts(
        _spread(texts.start, rows, count, 0),
        _spread(texts.length, rows, count, 0),
        _spread(texts.reference, rows, count, -1),
        _spread(texts.slot, rows, count, -1),
    )


def _spread(values: Int64s, rows: Int64s, count: int, filler: int) -> Int64s:
    result = np.full(count, filler, np.int64)
    result[rows] = values
    return result


def _optional_transforms(at: Cursors, names: Names) -> tuple[Int64s, Int64s, Int64s]:
    start = np.zeros(len(at.position), np.int64)
    length = np.zeros(len(at.position), np.int64)
    slot = np.full(len(at.position), -1, np.int64)
    rows = np.flatnonzero(at.next() != ord("u"))
    if not len(rows):
        return start, length, slot
    part = at.part(rows)
    if "transform_descriptors" not in dict(names.fields):
        part.good[:] = False
    else:
        part.expect(names.field("transform_descriptors"))
        start[rows] = part.position
        if names.memoized:
            slot[rows] = np.where(part.next() == _LIST, part.slots, -1)
        _pass_list(part)
        length[rows] = part.position - start[rows]
    at.put(rows, part)
    return start, length, slot


def _pass_list(at: Cursors) -> None:
    """Pass a list of a few texts: made here, or from the memo."""
    made = at.next() == _LIST
    if not made.all():
        rows = np.flatnonzero(~made)
        part = at.part(rows)
        part.references()
        at.put(rows, part)
        rows = np.flatnonzero(made)
        part = at.part(rows)
        if len(rows):
            _pass_list(part)
        at.put(rows, part)
        return
    at.expect_new(b"]")
    marked = at.next() == _MARK
    at.position = at.position + marked
    at.good &= marked | (at.next() != _APPEND)
    for _ in range(_MOST_DESCRIPTORS):
        opcode = at.next()
        rows = np.flatnonzero((opcode != _APPEND) & (opcode != _APPENDS))
        if not len(rows):
            break
        part = at.part(rows)
        part.texts()
        part.good &= marked[rows] | (part.next() == _APPEND)
        at.put(rows, part)
    at.good &= at.next() == np.where(marked, _APPENDS, _APPEND)
    at.position = at.position + 1
