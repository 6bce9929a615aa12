"""Columns to the bytes of a torch ``.metadata``, opcode by opcode: no torch, no object a chunk.

The result is a protocol 4 pickle of torch's classes. What many entries share (classes, field
names, keys, dtypes) is put into the memo once, up front, so that an entry is a template with a
few numbers in it. `TensorProperties` gets the five fields that every release can read.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, filterfalse, groupby, islice, repeat
from operator import itemgetter
from pathlib import PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE
from shardpoint.errors import FormatError, NotSupportedError
from shardpoint.formats._pickle_columns import Choices, Part, assemble, integers, looked_up
from shardpoint.formats._pickle_guards import describe
from shardpoint.formats._pickle_memo import Memo
from shardpoint.formats._pickle_writing import integer as _integer
from shardpoint.formats._pickle_writing import text as _text
from shardpoint.formats._planner_data import check_plain, planner_values
from shardpoint.index import NO_FILE, CheckpointIndex, Chunks, Container, Objects

__all__ = ["write_metadata"]

Int64s: TypeAlias = npt.NDArray[np.int64]

_METADATA = "torch.distributed.checkpoint.metadata"
_NEW_WITH_FIELDS = b")\x81}("  # EMPTY_TUPLE NEWOBJ EMPTY_DICT MARK ...
_END_FIELDS = b"ub"  # ... SETITEMS BUILD
_BLOCK = 1 << 15  # rows that are assembled at once
_TRUE_FALSE = {True: b"\x88", False: b"\x89"}


_TUPLE_OF = (b")", b"\x85", b"\x86", b"\x87")


def _tuple(parts: Sequence[bytes]) -> bytes:
    if not parts:
        return b")"
    if len(parts) <= 3:
        return b"".join(parts) + _TUPLE_OF[len(parts)]
    return b"(" + b"".join(parts) + b"t"


class _Sizes:
    """``torch.Size`` of some numbers, as opcodes."""

    def __init__(self, size: bytes) -> None:
        self._size = size

    def __getitem__(self, numbers: Sequence[int]) -> bytes:
        return self._size + _tuple([_integer(number) for number in numbers]) + b"\x85R"

    def parts(self, numbers: Int64s, axes: Int64s) -> list[Part | bytes]:
        """Return the parts that are one in each row, of the first `axes` numbers there."""
        most = int(axes.max(initial=0))
        ends = [_tuple([b""] * count) for count in range(most + 1)]  # with MARK from four on
        return [
            self._size,
            *([looked_up([b"", b"("], (axes > 3).astype(np.int64))] if most > 3 else []),
            *(
                integers(numbers[:, axis].copy(), None if (axes > axis).all() else axes > axis)
                for axis in range(most)
            ),
            looked_up([end.removeprefix(b"(") + b"\x85R" for end in ends], axes),
        ]


class _Blocks:
    """The bytes of many rows, in blocks of as many rows each."""

    def __init__(self, blocks: Iterable[tuple[memoryview, Int64s]]) -> None:
        self.data: list[memoryview] = []
        ends: list[Int64s] = []
        for data, block_ends in blocks:
            self.data.append(data)
            ends.append(block_ends)
        self.ends = ends

    def rows(self, first: int, last: int) -> Iterator[memoryview]:
        """Yield the bytes of some rows, which follow one another."""
        while first < last:
            block, row = divmod(first, _BLOCK)
            stop = min(last - block * _BLOCK, _BLOCK)
            ends = self.ends[block]
            yield self.data[block][int(ends[row - 1]) if row else 0 : int(ends[stop - 1])]
            first = block * _BLOCK + stop


class _Writer:
    """The parts of one metadata, in torch's order of fields."""

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self.preamble: list[bytes] = []
        self.memo = Memo(self.preamble)
        self.sizes = _Sizes(self.memo.name("torch", "Size"))
        self.axes = index.tensors.ndim.astype(np.int64)
        self.first_chunk = index.tensors.first_chunk.tolist()
        self.chunk_blocks: _Blocks | None = None
        self.known_properties: dict[tuple[int, int, bool, bool], bytes] = {}

    def keys(self) -> dict[str, bytes]:
        """Fetches for all keys, and other texts."""
        return self.memo.texts(self.index.key_order)

    def entries(self, keys: Mapping[str, bytes]) -> list[bytes | memoryview]:
        """``state_dict_metadata``."""
        tensors = self.index.tensors
        rows = {key: row for row, key in enumerate(tensors.keys)}
        alike = self._alike()
        tensor_class = self.memo.name(_METADATA, "TensorStorageMetadata")
        fields = [self.memo.text(name) for name in ("properties", "size", "chunks")]
        bytes_object = self.memo.name(_METADATA, "BytesStorageMetadata") + b")\x81"
        known: dict[bytes, bytes] = {}
        output: list[bytes | memoryview] = [b"}("]
        for key in self.index.key_order:
            output.append(keys[key])
            row = rows.get(key)
            if row is None:
                output.append(bytes_object)
                continue
            description = alike[row]
            whole = None if description is None else known.get(description)
            if whole is not None:
                output.append(whole)
                continue
            shape = self.sizes[tensors.shape_of(row)]
            begin = tensor_class + _NEW_WITH_FIELDS + fields[0] + self.properties(row)
            begin += fields[1] + shape + fields[2]
            if description is None:
                output += (begin, *self.chunks(row), _END_FIELDS)
            else:
                whole = known[description] = b"".join((begin, *self.chunks(row), _END_FIELDS))
                output.append(whole)
        output.append(b"u")
        return output

    def _alike(self) -> list[bytes | None]:
        """Return all that the entry of each tensor of one chunk depends on; None for others."""
        tensors, chunks = self.index.tensors, self.index.chunks
        single = np.diff(tensors.first_chunk) == 1
        if not single.any():
            return [None] * len(tensors)
        chunk = np.where(single, tensors.first_chunk[:-1], 0)
        columns = [
            *(tensors.dtype, tensors.memory_format, tensors.requires_grad),
            *(tensors.pin_memory, tensors.ndim, tensors.shape),
            *(chunks.offsets[chunk], chunks.sizes[chunk]),
        ]
        described = np.ascontiguousarray(np.column_stack(columns), np.int64)
        # As bytes, which are made and compared faster than tuples of numbers.
        alike: list[bytes | None] = described.view(f"V{described.strides[0]}")[:, 0].tolist()
        for row in np.flatnonzero(~single).tolist():
            alike[row] = None
        return alike

    def properties(self, row: int) -> bytes:
        tensors = self.index.tensors
        kind = (
            int(tensors.dtype[row]),
            int(tensors.memory_format[row]),
            bool(tensors.requires_grad[row]),
            bool(tensors.pin_memory[row]),
        )
        if kind not in self.known_properties:
            self.known_properties[kind] = self._properties(*kind)
        return self.known_properties[kind]

    def _properties(
        self, dtype: int, memory_format: int, requires_grad: bool, pin_memory: bool
    ) -> bytes:
        memo = self.memo
        layout = memo.define(
            memo.name("torch.serialization", "_get_layout") + memo.text("torch.strided") + b"\x85R"
        )
        encoding = memo.define(
            memo.name(_METADATA, "_MEM_FORMAT_ENCODING") + _integer(memory_format) + b"\x85R"
        )
        state = (
            memo.name("torch", BY_CODE[dtype].name),
            layout,
            _TRUE_FALSE[requires_grad],
            encoding,
            _TRUE_FALSE[pin_memory],
        )
        return memo.name(_METADATA, "TensorProperties") + b")\x81" + _tuple(state) + b"b"

    def chunks(self, row: int) -> Iterator[bytes | memoryview]:
        if self.chunk_blocks is None:
            memo = self.memo
            chunk_class = memo.name(_METADATA, "ChunkStorageMetadata")
            start = chunk_class + _NEW_WITH_FIELDS + memo.text("offsets")
            self.chunk_blocks = _Blocks(self.chunk_rows(start, memo.text("sizes")))
        yield b"]("
        yield from self.chunk_blocks.rows(self.first_chunk[row], self.first_chunk[row + 1])
        yield b"e"

    def chunk_rows(self, start: bytes, middle: bytes) -> Iterator[tuple[memoryview, Int64s]]:
        """Yield all ``ChunkStorageMetadata``, block by block."""
        chunks = self.index.chunks
        for first in range(0, len(chunks), _BLOCK):
            rows = slice(first, first + _BLOCK)
            axes = self.axes[chunks.tensor[rows]]
            parts = [
                *self.sizes.parts(chunks.offsets[rows], axes),
                middle,
                *self.sizes.parts(chunks.sizes[rows], axes),
                _END_FIELDS,
            ]
            yield assemble(start, parts, len(axes))

    def planner_data(self) -> Iterable[bytes]:
        """``planner_data``: the planner's own values where it stored any, else the paths."""
        if self.index.planner_data is not None:
            return planner_values(self.index.planner_data, self.memo.text, self.memo.define)
        paths = self.index.paths
        if paths is None:
            return [b"N"]
        parts: dict[Any, None] = dict.fromkeys(chain.from_iterable(paths.values()))
        positions: dict[Any, bytes] = {}
        if not set(map(type, parts)) <= {str}:
            positions = {part: _integer(part) for part in parts if not isinstance(part, str)}
        texts = self.memo.texts(chain(filterfalse(positions.__contains__, parts), paths))
        known = {**texts, **positions} if positions else texts
        return self._path_items(paths, texts, known)

    def _path_items(
        self,
        paths: Mapping[str, tuple[str | int, ...]],
        texts: Mapping[str, bytes],
        known: Mapping[Any, bytes],
    ) -> list[bytes]:
        """Return the items of keys and their paths; those of one length follow in long runs."""
        output = [b"}("]
        keys, values = iter(paths), iter(paths.values())
        for length, run in groupby(map(len, paths.values())):
            count = len(list(run))
            same = list(islice(values, count))
            row: list[Iterable[bytes]] = [map(texts.__getitem__, islice(keys, count))]
            if length > 3:
                row.append(repeat(b"("))
            row += [map(known.__getitem__, map(itemgetter(at), same)) for at in range(length)]
            row.append(repeat(_TUPLE_OF[length] if length <= 3 else b"t"))
            output += chain.from_iterable(zip(*row, strict=False))
        output.append(b"u")
        return output

    def storage(self, keys: Mapping[str, bytes]) -> Iterator[bytes | memoryview]:
        """``storage_data``: objects first, as they stand first in the files."""
        index, memo = self.index, self.memo
        start = memo.name(_METADATA, "MetadataIndex") + _NEW_WITH_FIELDS + memo.text("fqn")
        hint, offset = memo.text("index"), memo.text("offset")
        place = self.places()
        yield b"}("
        objects = index.objects
        known = np.flatnonzero(objects.file != NO_FILE)
        if len(known):
            names = looked_up([keys[key] for key in objects.keys], known)
            parts = [names, hint, b"N", _END_FIELDS, *place(objects, known)]
            yield assemble(start, parts, len(known))[0]
        chunks = index.chunks
        fetches = Choices([keys[key] for key in index.tensors.keys])
        for first in range(0, len(chunks), _BLOCK):
            rows = first + np.flatnonzero(chunks.file[first : first + _BLOCK] != NO_FILE)
            tensor = chunks.tensor[rows]
            parts = [
                fetches[tensor],
                hint,
                integers(rows - index.tensors.first_chunk[tensor]),
                offset,
                *self.sizes.parts(chunks.offsets[rows], self.axes[tensor]),
                _END_FIELDS,
                *place(chunks, rows),
            ]
            yield assemble(start, parts, len(rows))[0]
        yield b"u"

    def places(self) -> Callable[[Chunks | Objects, Int64s], list[Part | bytes]]:
        """Return a function from rows to the parts that are their ``_StorageInfo``."""
        memo, index = self.memo, self.index
        module = "torch.distributed.checkpoint.filesystem"
        start = memo.name(module, "_StorageInfo") + _NEW_WITH_FIELDS + memo.text("relative_path")
        offset_name = memo.text("offset")
        files = Choices([memo.text(file) for file in index.files])
        length_name = memo.text("length")
        ends = [_END_FIELDS]
        for descriptors in index.transforms[1:]:
            items = b"".join(memo.text(descriptor) for descriptor in descriptors)
            ends.append(memo.text("transform_descriptors") + b"](" + items + b"e" + _END_FIELDS)

        def place(columns: Chunks | Objects, rows: Int64s) -> list[Part | bytes]:
            return [
                start,
                files[columns.file[rows].astype(np.int64)],
                offset_name,
                integers(columns.record_offset[rows]),
                length_name,
                integers(columns.record_length[rows]),
                looked_up(ends, columns.transform[rows].astype(np.int64)),
            ]

        return place

    def storage_meta(self, fields: Mapping[str, Any]) -> bytes:
        """``StorageMeta``."""
        memo = self.memo
        parts = [memo.name(_METADATA, "StorageMeta"), _NEW_WITH_FIELDS]
        for name, value in fields.items():
            parts += [memo.text(name), self._storage_meta_value(name, value)]
        return b"".join([*parts, _END_FIELDS])

    def _storage_meta_value(self, name: str, value: Any) -> bytes:
        if value is None:
            return b"N"
        if isinstance(value, PurePosixPath):
            # By one whole string, which pathlib of every Python version takes.
            return self.memo.name("pathlib", "PosixPath") + _text(str(value)) + b"\x85R"
        if isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            if isinstance(path, str):
                return _text(path)
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return b"](" + b"".join(map(_text, value)) + b"e"
        raise FormatError(f"storage_meta field {name!r}: cannot write {describe(value)}")


def _fields(
    pairs: Iterable[tuple[bytes, Iterable[bytes | memoryview]]],
) -> list[bytes | memoryview]:
    body: list[bytes | memoryview] = []
    for name, value in pairs:
        body.append(name)
        body.extend(value)
    return body


def write_metadata(index: CheckpointIndex) -> bytes:
    """Write the ``.metadata`` that torch reads, of any release that knows all its fields.

    `CheckpointIndex.storage_meta` and `CheckpointIndex.version` that are None are left out:
    torch 2.3 knows no ``StorageMeta``, and releases before 2.9 no version.

    Raises
    ------
    NotSupportedError
        If a chunk is in a container that ``.metadata`` cannot describe.
    FormatError
        If a field of `CheckpointIndex.storage_meta` is no path, text or list of texts,
        or `CheckpointIndex.planner_data` holds anything but plain values.
    LimitExceededError
        If `CheckpointIndex.planner_data` is nested too deeply or is far too large.
    """
    if (index.chunks.container == Container.RAW).any():
        raise NotSupportedError("a chunk outside a torch record cannot be described in .metadata")
    check_plain(index.planner_data, source="the index")
    writer = _Writer(index)
    memo = writer.memo
    keys = writer.keys()
    start = memo.name(_METADATA, "Metadata") + _NEW_WITH_FIELDS
    fields: list[tuple[bytes, Iterable[bytes | memoryview]]] = [
        (memo.text("state_dict_metadata"), writer.entries(keys)),
        (memo.text("planner_data"), writer.planner_data()),
        (memo.text("storage_data"), writer.storage(keys)),
    ]
    if index.storage_meta is not None:
        fields.append((memo.text("storage_meta"), [writer.storage_meta(index.storage_meta)]))
    if index.version is not None:
        fields.append((memo.text("version"), [memo.text(index.version)]))
    body = _fields(fields)  # also fills the preamble, which comes first
    parts = [*writer.preamble, start, *body, _END_FIELDS, b"."]
    size = sum(map(len, parts))
    return b"".join([b"\x80\x04\x95", struct.pack("<Q", size), *parts])
