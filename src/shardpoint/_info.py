"""What the index tells of one key, as values for users."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import dtype_named
from shardpoint.index import NO_FILE, UNKNOWN, CheckpointIndex
from shardpoint.sharding import Layout, layout_of

__all__ = ["ChunkInfo", "ObjectInfo", "Path", "TensorInfo", "object_info", "tensor_info"]

Path: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class ChunkInfo:
    """One stored piece of a tensor.

    Attributes
    ----------
    offsets, sizes
        The half-open box that it covers, an axis each.
    file
        Name relative to the checkpoint; None where the metadata names no file for it.
    record_offset, record_length
        Byte span in the file, as the metadata has it. For torch's ``.distcp`` files the span
        is a whole ``torch.save`` record with the elements inside.
    transforms
        What was done to the record's bytes, such as ``("stream.zstd/1",)``.
    payload_offset
        Byte offset of the elements in the file (after undoing the transforms), or None
        where only the record's own header tells.
    checksum
        CRC-32 of the elements' bytes, or None where it is not known without reading.
    record_checksum
        CRC-32 of all bytes of the span, or of the header of the safetensors image that the
        chunk is in, or None where the index has none.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str | None
    record_offset: int
    record_length: int
    transforms: tuple[str, ...] = ()
    payload_offset: int | None = None
    checksum: int | None = None
    record_checksum: int | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor.

    Attributes
    ----------
    key, path
        The flat key, and the path in the nested state (None where it was saved flat).
    shape, nbytes
        Of the whole tensor.
    dtype
        torch's name without ``torch.``, such as ``"bfloat16"``.
    requires_grad
        As it was saved; it changes nothing in reading.
    chunks
        Its stored pieces, in saved order.
    layout
        How it was sharded, as far as the pieces tell: ``str(layout)`` is ``"Shard(0) over 8"``,
        ``"grid 2 x 4"``, or names the boxes.
    """

    key: str
    path: Path | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    requires_grad: bool
    chunks: tuple[ChunkInfo, ...]
    layout: Layout

    @property
    def numpy_dtype(self) -> np.dtype[np.generic]:
        """The dtype of the arrays that reading gives."""
        return dtype_named(self.dtype).numpy

    def __repr__(self) -> str:
        files = len({chunk.file for chunk in self.chunks})
        return (
            f"TensorInfo({self.key!r}, {self.dtype}{list(self.shape)}, {self.nbytes:,} bytes, "
            f"{_count(len(self.chunks), 'chunk')} in {_count(files, 'file')})"
        )


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One value that is no tensor.

    Attributes are those of `TensorInfo` and `ChunkInfo`; `file` is None and the span is empty
    where the value came with the index (a ``torch.save`` file's).
    """

    key: str
    path: Path | None
    file: str | None
    record_offset: int
    record_length: int
    transforms: tuple[str, ...] = ()
    record_checksum: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its record."""
        return self.record_length

    def __repr__(self) -> str:
        return f"ObjectInfo({self.key!r}, {self.record_length:,} bytes in {self.file!r})"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def tensor_info(index: CheckpointIndex, row: int) -> TensorInfo:
    """Describe one row of the tensors; reads nothing."""
    tensors, chunks, payloads = index.tensors, index.chunks, index.chunks.payloads
    key = tensors.keys[row]
    shape = tensors.shape_of(row)
    dtype = tensors.dtype_of(row)
    axes = len(shape)
    first, last = int(tensors.first_chunk[row]), int(tensors.first_chunk[row + 1])
    described = []
    for i in range(first, last):
        payload_offset = checksum = UNKNOWN
        if payloads is not None:
            payload_offset, checksum = int(payloads.offset[i]), int(payloads.checksum[i])
        described.append(
            ChunkInfo(
                offsets=tuple(chunks.offsets[i, :axes].tolist()),
                sizes=tuple(chunks.sizes[i, :axes].tolist()),
                file=_file_name(index, int(chunks.file[i])),
                record_offset=int(chunks.record_offset[i]),
                record_length=int(chunks.record_length[i]),
                transforms=index.transforms[int(chunks.transform[i])],
                payload_offset=None if payload_offset == UNKNOWN else payload_offset,
                checksum=None if checksum == UNKNOWN else checksum,
                record_checksum=_known(chunks.record_checksum, i),
            )
        )
    nbytes = dtype.itemsize
    for size in shape:
        nbytes *= size
    return TensorInfo(
        key=key,
        path=_path(index, key),
        shape=shape,
        dtype=dtype.name,
        nbytes=nbytes,
        requires_grad=bool(tensors.requires_grad[row]),
        chunks=tuple(described),
        layout=layout_of(shape, chunks.offsets[first:last, :axes], chunks.sizes[first:last, :axes]),
    )


def object_info(index: CheckpointIndex, row: int) -> ObjectInfo:
    """Describe one row of the objects; reads nothing."""
    objects = index.objects
    key = objects.keys[row]
    return ObjectInfo(
        key=key,
        path=_path(index, key),
        file=_file_name(index, int(objects.file[row])),
        record_offset=int(objects.record_offset[row]),
        record_length=int(objects.record_length[row]),
        transforms=index.transforms[int(objects.transform[row])],
        record_checksum=_known(objects.record_checksum, row),
    )


def _known(column: npt.NDArray[np.int64] | None, row: int) -> int | None:
    """Return a value of a column that may be missing, or hold `UNKNOWN`."""
    return None if column is None or column[row] == UNKNOWN else int(column[row])


def _file_name(index: CheckpointIndex, number: int) -> str | None:
    return None if number == NO_FILE else index.files[number]


def _path(index: CheckpointIndex, key: str) -> Path | None:
    return None if index.paths is None else index.paths.get(key)
