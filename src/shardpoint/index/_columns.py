"""The index of a checkpoint: numpy columns instead of an object for every chunk.

Boxes of tensors with different numbers of axes share one pair of columns, padded to the
largest number of axes: offset 0 and size 1 in axes that a tensor does not have. Padding
changes no intersection and no volume, so one vector operation serves all tensors.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import BY_CODE, DType
from shardpoint.errors import FormatError

__all__ = [
    "CONJUGATE",
    "NEGATIVE",
    "NO_FILE",
    "UNKNOWN",
    "CheckpointIndex",
    "ChunkEntry",
    "Chunks",
    "Container",
    "ObjectEntry",
    "Objects",
    "Payloads",
    "TensorEntry",
    "Tensors",
    "build_index",
    "row_major_strides",
]

Int64Array: TypeAlias = npt.NDArray[np.int64]

NO_FILE = -1
"""In a `file` column: the metadata lists the chunk but says nowhere where it lies."""

UNKNOWN = -1
"""In an offset, length or checksum column: not known without reading the record."""


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

    def __len__(self) -> int:
        return len(self.tensor)


@dataclass(frozen=True, slots=True, eq=False)
class Objects:
    """One row an object that is no tensor: a torch.save record each.

    Columns are as in `Chunks`. `values` holds objects that the container's own header
    already gave (a ``torch.save`` file's), by key; such a row has `NO_FILE`.
    """

    keys: Sequence[str]
    file: npt.NDArray[np.int32]
    record_offset: Int64Array
    record_length: Int64Array
    transform: npt.NDArray[np.int16]
    values: Mapping[str, Any] = field(default_factory=dict)

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


@dataclass(frozen=True, slots=True)
class ChunkEntry:
    """One chunk on its way into columns; see `Chunks` for the fields."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str | None
    record_offset: int
    record_length: int
    container: Container = Container.TORCH_RECORD
    transforms: tuple[str, ...] = ()
    payload_offset: int = UNKNOWN
    strides: tuple[int, ...] | None = None  # None: row-major
    payload_length: int = 0
    checksum: int = UNKNOWN
    flags: int = 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor on its way into columns; see `Tensors` for the fields."""

    key: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: Sequence[ChunkEntry]
    requires_grad: bool = False
    pin_memory: bool = False
    memory_format: int = 0


@dataclass(frozen=True, slots=True)
class ObjectEntry:
    """One object on its way into columns; see `Objects` for the fields."""

    key: str
    file: str | None
    record_offset: int = 0
    record_length: int = 0
    transforms: tuple[str, ...] = ()
    value: Any = None  # where file is None


class _Numbering:
    """Gives each distinct value the next number."""

    def __init__(self, first: Iterable[Any] = ()) -> None:
        self.numbers: dict[Any, int] = {}
        for value in first:
            self[value]

    def __getitem__(self, value: Any) -> int:
        return self.numbers.setdefault(value, len(self.numbers))


def row_major_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides, in elements, of a row-major array of these sizes."""
    strides = [1] * len(sizes)
    for axis in range(len(sizes) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * max(sizes[axis + 1], 1)
    return tuple(strides)


def build_index(
    tensors: Sequence[TensorEntry],
    objects: Sequence[ObjectEntry],
    *,
    key_order: Sequence[str],
    paths: Mapping[str, tuple[str | int, ...]] | None,
    storage_meta: Mapping[str, Any] | None,
    version: str | None,
    source: str,
    metadata_files: Sequence[str],
) -> CheckpointIndex:
    """Turn entries into columns.

    Raises
    ------
    FormatError
        If a chunk has another number of axes than its tensor, or a number does not fit
        into 64 bits.
    """
    axes = max((len(t.shape) for t in tensors), default=0)
    count = len(tensors)
    chunk_count = sum(len(t.chunks) for t in tensors)
    shape = np.ones((count, axes), np.int64)
    first_chunk = np.zeros(count + 1, np.int64)
    offsets = np.zeros((chunk_count, axes), np.int64)
    sizes = np.ones((chunk_count, axes), np.int64)
    strides = np.zeros((chunk_count, axes), np.int64)
    numbers = np.zeros((chunk_count, 10), np.int64)
    files, transforms = _Numbering(), _Numbering([()])
    row = 0
    try:
        for i, tensor in enumerate(tensors):
            rank = len(tensor.shape)
            shape[i, :rank] = tensor.shape
            for chunk in tensor.chunks:
                if len(chunk.offsets) != rank or len(chunk.sizes) != rank:
                    raise FormatError(
                        f"key {tensor.key!r}: a chunk has offsets {chunk.offsets} and sizes "
                        f"{chunk.sizes}, but the tensor has shape {tensor.shape}"
                    )
                offsets[row, :rank] = chunk.offsets
                sizes[row, :rank] = chunk.sizes
                strides[row, :rank] = (
                    row_major_strides(chunk.sizes) if chunk.strides is None else chunk.strides
                )
                numbers[row] = (
                    i,
                    NO_FILE if chunk.file is None else files[chunk.file],
                    chunk.record_offset,
                    chunk.record_length,
                    chunk.container,
                    transforms[chunk.transforms],
                    chunk.payload_offset,
                    chunk.payload_length,
                    chunk.checksum,
                    chunk.flags,
                )
                row += 1
            first_chunk[i + 1] = row
        object_numbers = np.array(
            [
                (
                    NO_FILE if o.file is None else files[o.file],
                    o.record_offset,
                    o.record_length,
                    transforms[o.transforms],
                )
                for o in objects
            ],
            np.int64,
        ).reshape(-1, 4)
    except OverflowError as error:
        raise FormatError("a number in the metadata does not fit into 64 bits") from error
    known = bool((numbers[:, 6] != UNKNOWN).any())
    return CheckpointIndex(
        tensors=Tensors(
            keys=[t.key for t in tensors],
            dtype=np.array([t.dtype.code for t in tensors], np.uint8),
            ndim=np.array([len(t.shape) for t in tensors], np.int16),
            shape=shape,
            first_chunk=first_chunk,
            requires_grad=np.array([t.requires_grad for t in tensors], np.bool_),
            pin_memory=np.array([t.pin_memory for t in tensors], np.bool_),
            memory_format=np.array([t.memory_format for t in tensors], np.uint8),
        ),
        chunks=Chunks(
            tensor=numbers[:, 0].copy(),
            offsets=offsets,
            sizes=sizes,
            file=numbers[:, 1].astype(np.int32),
            record_offset=numbers[:, 2].copy(),
            record_length=numbers[:, 3].copy(),
            container=numbers[:, 4].astype(np.uint8),
            transform=numbers[:, 5].astype(np.int16),
            payloads=Payloads(
                offset=numbers[:, 6].copy(),
                strides=strides,
                length=numbers[:, 7].copy(),
                checksum=numbers[:, 8].copy(),
                flags=numbers[:, 9].astype(np.uint8),
            )
            if known
            else None,
        ),
        objects=Objects(
            keys=[o.key for o in objects],
            file=object_numbers[:, 0].astype(np.int32),
            record_offset=object_numbers[:, 1].copy(),
            record_length=object_numbers[:, 2].copy(),
            transform=object_numbers[:, 3].astype(np.int16),
            values={o.key: o.value for o in objects if o.file is None},
        ),
        files=list(files.numbers),
        transforms=list(transforms.numbers),
        key_order=list(key_order),
        paths=paths,
        storage_meta=storage_meta,
        version=version,
        source=source,
        metadata_files=list(metadata_files),
    )
