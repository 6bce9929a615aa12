"""The index of a checkpoint: numpy columns instead of an object for every chunk.

Boxes of tensors with different numbers of axes share one pair of columns, padded to the
largest number of axes: offset 0 and size 1 in axes that a tensor does not have. Padding
changes no intersection and no volume, so one vector operation serves all tensors.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE, DType

__all__ = [
    "BLOCK_BYTES",
    "CONJUGATE",
    "NEGATIVE",
    "NO_FILE",
    "UNKNOWN",
    "BlockChecksums",
    "CheckpointIndex",
    "Chunks",
    "Container",
    "Objects",
    "Payloads",
    "Tensors",
]

Int64Array: TypeAlias = npt.NDArray[np.int64]

NO_FILE = -1
"""In a `file` column: the metadata lists the chunk but says nowhere where it lies."""

UNKNOWN = -1
"""In an offset, length or checksum column: not known without reading the record."""


BLOCK_BYTES = 64 << 10
"""Bytes that one checksum covers in the indexes that are written; readers take any size.

So small that a slice can afford to read its first and last block whole, to check all of itself:
an eighth of a tensor of 16 MiB is 2 MiB, of which two half blocks are 3 %. The checksums are
4 bytes of 64 KiB, 61 MB for each TB.
"""


CONJUGATE = 1
"""In a `flags` column: the value is the complex conjugate of the stored one."""

NEGATIVE = 2
"""In a `flags` column: the value is the negative of the stored one."""


class Container(enum.IntEnum):
    """What lies at a chunk's `record_offset`."""

    TORCH_RECORD = 0  # a file as torch.save writes it: the payload is inside
    RAW = 1  # the payload itself, row-major, little-endian (safetensors)
    SAFETENSORS_IMAGE = 2  # a whole safetensors image; the payload is found by its header


@dataclass(frozen=True, slots=True, eq=False)
class Tensors:
    """One row a tensor.

    Attributes
    ----------
    keys
        Flat keys.
    dtype
        ``uint8[n]``: `DType.code`.
    ndim
        ``int16[n]``.
    shape
        ``int64[n, D]``, padded with 1.
    first_chunk
        ``int64[n + 1]``: the chunks of row ``i`` are ``first_chunk[i]:first_chunk[i + 1]``.
    requires_grad, pin_memory
        ``bool[n]``: as torch stored them; they change nothing in reading.
    memory_format
        ``uint8[n]``: torch's ``_MEM_FORMAT_ENCODING`` value.
    """

    keys: Sequence[str]
    dtype: npt.NDArray[np.uint8]
    ndim: npt.NDArray[np.int16]
    shape: Int64Array
    first_chunk: Int64Array
    requires_grad: npt.NDArray[np.bool_]
    pin_memory: npt.NDArray[np.bool_]
    memory_format: npt.NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.keys)

    def shape_of(self, row: int) -> tuple[int, ...]:
        """Return the shape of one tensor, without padding."""
        return tuple(self.shape[row, : self.ndim[row]].tolist())

    def dtype_of(self, row: int) -> DType:
        """Return the element type of one tensor."""
        return BY_CODE[int(self.dtype[row])]


@dataclass(frozen=True, slots=True, eq=False)
class Payloads:
    """Where a chunk's elements really lie; known at once, or after reading record headers.

    Attributes
    ----------
    offset
        ``int64[m]``: byte offset of the chunk's element 0 in the file (in the decoded record
        where there is a transform), `UNKNOWN` where the record's header has not been read.
    strides
        ``int64[m, D]`` in elements, padded with 0. Payloads may be stored in any axis order.
    length
        ``int64[m]``: bytes that `checksum` covers, from `offset` on; the whole payload.
    checksum
        ``int64[m]``: CRC-32 of those bytes, or `UNKNOWN`.
    flags
        ``uint8[m]``: `CONJUGATE` or `NEGATIVE`, where the value is the conjugate or the
        negative of what is stored (torch's lazy views), else 0.
    """

    offset: Int64Array
    strides: Int64Array
    length: Int64Array
    checksum: Int64Array
    flags: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class BlockChecksums:
    """CRC-32 of every payload, block by block, so that a part of one can be checked.

    Attributes
    ----------
    block_size
        Bytes of each block of a payload but its last, which may be shorter.
    first
        ``int64[m + 1]``: the blocks of chunk ``i`` are ``first[i]:first[i + 1]``; a chunk whose
        blocks are not known has none, and so have chunks with a transform.
    values
        ``uint32[k]``: block ``j`` of a chunk covers the bytes from ``j * block_size`` on of its
        payload, which begins at `Payloads.offset` and has `Payloads.length` bytes.
    """

    block_size: int
    first: Int64Array
    values: npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """One row a chunk, grouped by tensor, in saved order.

    Attributes
    ----------
    tensor
        ``int64[m]``: row in `Tensors`.
    offsets, sizes
        ``int64[m, D]``: the box in the tensor, padded with 0 and 1.
    file
        ``int32[m]``: position in `CheckpointIndex.files`, or `NO_FILE`.
    record_offset, record_length
        ``int64[m]``: byte span of the record in the file, as the metadata says.
    container
        ``uint8[m]``: a `Container`.
    transform
        ``int16[m]``: position in `CheckpointIndex.transforms`; 0 is none.
    payloads
        None where no payload is known before its record's header is read.
    blocks
        Checksums of parts of the payloads; None where there are none.
    record_checksum
        ``int64[m]``: CRC-32 of all bytes of the record as they lie in the file, of a
        safetensors image's tensor that of the image's header; or `UNKNOWN`. None where there
        are none.
    """

    tensor: Int64Array
    offsets: Int64Array
    sizes: Int64Array
    file: npt.NDArray[np.int32]
    record_offset: Int64Array
    record_length: Int64Array
    container: npt.NDArray[np.uint8]
    transform: npt.NDArray[np.int16]
    payloads: Payloads | None = None
    blocks: BlockChecksums | None = None
    record_checksum: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """One row an object that is no tensor: a torch.save record each.

    Columns are as in `Chunks`. `values` holds objects that the container's own header
    already gave (a ``torch.save`` file's), by key; such a row has `NO_FILE`. `record_checksum`
    is ``int64[n]``, the CRC-32 of the record's bytes in the file, or None.
    """

    keys: Sequence[str]
    file: npt.NDArray[np.int32]
    record_offset: Int64Array
    record_length: Int64Array
    transform: npt.NDArray[np.int16]
    values: Mapping[str, Any] = field(default_factory=dict)
    record_checksum: Int64Array | None = None

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointIndex:
    """Everything that is known of a checkpoint without reading its data.

    Attributes
    ----------
    tensors, chunks, objects
        The columns.
    files
        Names relative to the checkpoint, ``/`` between parts.
    transforms
        Descriptor tuples, such as ``("stream.zstd/1",)``; the first one is ``()``.
    key_order
        All keys in saved order.
    paths
        Flat key to the path in the nested state, or None where it was saved flat.
    storage_meta
        torch's ``StorageMeta`` fields where there are any.
    version
        ``Metadata.version``, or None for releases before 2.9.
    source
        What was read: ``"dcp"``, ``"dcp-per-rank"``, ``"huggingface"``, ``"torch"``.
    metadata_files
        The files that hold this index.
    planner_data
        What a planner stored in place of paths: plain values only. `paths` then has the
        entries that are paths all the same, or is None.
    version_read
        What `Storage.version` said of ``.metadata`` before it was read, or `Storage.written` of
        the safetensors file that a save replaces first; None where it was not asked.
    """

    tensors: Tensors
    chunks: Chunks
    objects: Objects
    files: Sequence[str]
    transforms: Sequence[tuple[str, ...]]
    key_order: Sequence[str]
    paths: Mapping[str, tuple[str | int, ...]] | None
    storage_meta: Mapping[str, Any] | None
    version: str | None
    source: str
    metadata_files: Sequence[str] = ()
    planner_data: Any = None
    version_read: Hashable = None
