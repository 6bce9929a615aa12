"""Columns in a safetensors file that ends with the CRC-32 of all before it.

The last tensor of the file is that checksum (four bytes, little-endian), so any changed byte
is noticed before the header is believed. Columns stand in the order of their element sizes:
where the file's bytes are mapped or read to an aligned place, each column is aligned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType, dtype_named
from shardpoint.errors import CorruptionError, FormatError, LimitExceededError, Problem
from shardpoint.formats.checksum import crc32
from shardpoint.formats.safetensors import SafetensorsTensor, encode_header, read_header

__all__ = ["Column", "Container", "read_container", "write_container"]

Column: TypeAlias = npt.NDArray[Any]

_CHECKSUM = "checksum"
_CHECKSUM_BYTES = 4
_MAX_HEADER_BYTES = 1 << 20  # some dozens of columns have names of some letters


@dataclass(frozen=True, slots=True)
class Container:
    """A container in memory: columns by name, and the header's texts."""

    data: memoryview
    tensors: Mapping[str, SafetensorsTensor]
    metadata: Mapping[str, str]
    file: str

    def fail(self, message: str) -> FormatError:
        """Return an error that names the file."""
        return FormatError(str(Problem(message, file=self.file)))

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def column(self, name: str, kind: str, *shape: int | None) -> Column:
        """Return a column as a view that cannot be written to.

        Parameters
        ----------
        kind
            The name of the element type that it must have.
        shape
            The shape that it must have; None where any size will do.

        Raises
        ------
        FormatError
            If there is no such column, or it has another type or shape.
        """
        found = self.tensors.get(name)
        if found is None:
            raise self.fail(f"the index has no column {name!r}")
        fits = len(found.shape) == len(shape) and all(
            # A column without bytes could claim any number of rows.
            wanted == size or (wanted is None and size <= len(self.data))
            for wanted, size in zip(shape, found.shape, strict=True)
        )
        if found.dtype.name != kind or not fits:
            wanted = ["any" if size is None else size for size in shape]
            raise self.fail(
                f"column {name!r} should be {kind} {wanted}, it is {found.dtype.name} "
                f"{list(found.shape)}"
            )
        raw = np.frombuffer(self.data[found.start : found.end], np.uint8)
        if kind == "bool" and raw.max(initial=0) > 1:
            raise self.fail(f"column {name!r} has values that are neither true nor false")
        return raw.view(found.dtype.numpy).reshape(found.shape)


def write_container(columns: Mapping[str, Column], metadata: Mapping[str, str]) -> bytes:
    """Return a file of columns of integers and booleans."""
    ordered = sorted(columns.items(), key=lambda item: -item[1].itemsize)
    tensors: list[tuple[str, DType, tuple[int, ...]]] = [
        (name, dtype_named(column.dtype.name), column.shape) for name, column in ordered
    ]
    tensors.append((_CHECKSUM, dtype_named("uint8"), (_CHECKSUM_BYTES,)))
    header, spans = encode_header(tensors, metadata=metadata)
    result = bytearray(spans[_CHECKSUM][1])
    result[: len(header)] = header
    for name, column in ordered:
        start, end = spans[name]
        if end > start:
            target = np.frombuffer(result, column.dtype, column.size, start)
            target.reshape(column.shape)[...] = column
    checksum = crc32(memoryview(result)[:-_CHECKSUM_BYTES])
    result[-_CHECKSUM_BYTES:] = checksum.to_bytes(_CHECKSUM_BYTES, "little")
    return bytes(result)


def read_container(data: memoryview, *, file: str) -> Container:
    """Check a file's bytes against their checksum and find its columns.

    Parameters
    ----------
    data
        The whole file; the columns are views of it.
    file
        Its name, for messages.

    Raises
    ------
    CorruptionError
        If bytes are missing or changed.
    FormatError, LimitExceededError, NotSupportedError
        If it is no safetensors file, or has a header that an index does not have.
    """
    body = data[:-_CHECKSUM_BYTES]
    wanted = int.from_bytes(data[-_CHECKSUM_BYTES:], "little")
    found = crc32(body)
    is_cut = len(data) <= 8 + _CHECKSUM_BYTES
    if is_cut or found != wanted:
        message = (
            f"the index is damaged: it has {len(data)} bytes, too few to be one"
            if is_cut
            else f"the index is damaged: the CRC-32 of its {len(data)} bytes should be "
            f"{wanted:#010x}, it is {found:#010x}"
        )
        raise CorruptionError(str(Problem(message, file=file)))
    length = int.from_bytes(data[:8], "little")
    if length > _MAX_HEADER_BYTES:
        message = f"the header has {length} bytes, more than {_MAX_HEADER_BYTES}"
        raise LimitExceededError(str(Problem(message, file=file)))
    header = read_header(lambda at, count: bytes(data[at : at + count]), len(data), file=file)
    tensors = dict(header.tensors)
    checksum = tensors.pop(_CHECKSUM, None)
    if checksum is None or checksum.end != len(data):
        message = "the index does not end with its checksum"
        raise FormatError(str(Problem(message, file=file)))
    return Container(data.toreadonly(), tensors, header.metadata, file)
