"""Finds where a chunk's elements lie inside its record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from shardpoint.dtypes import DType
from shardpoint.engine._geometry import Numbers, extent
from shardpoint.errors import CorruptionError, FormatError, Problem
from shardpoint.formats.safetensors import SafetensorsHeader
from shardpoint.formats.torch_record import read_tensor_payload
from shardpoint.index import UNKNOWN, CheckpointIndex, Container, row_major_strides

__all__ = ["Payload", "Place", "from_image", "from_record", "known_payload", "place_of"]

ReadAt: TypeAlias = Callable[[int, int], bytes]


@dataclass(frozen=True, slots=True)
class Place:
    """One chunk, out of its columns: what it is, and where its record lies."""

    chunk: int
    key: str
    dtype: DType
    offsets: Numbers
    sizes: Numbers
    file: str
    record_offset: int
    record_length: int
    container: Container
    transforms: tuple[str, ...]

    def fail(self, message: str, *, at: int | None = None) -> FormatError:
        """Return an error that names the chunk's key, file and offset."""
        offset = self.record_offset if at is None else at
        return FormatError(str(Problem(message, self.key, self.file, offset)))


@dataclass(frozen=True, slots=True)
class Payload:
    """Where elements lie, as in `shardpoint.index.Payloads`; `offset` counts in the file,
    or in the decoded record where there is a transform.
    """

    offset: int
    strides: Numbers
    length: int
    checksum: int
    flags: int

    def compare(self, place: Place, found: int) -> None:
        """Raise unless `found` is the checksum wanted.

        Raises
        ------
        CorruptionError
            Names key, file, byte range and both checksums.
        """
        if found != self.checksum:
            message = (
                f"bytes {self.offset} to {self.offset + self.length} are damaged: "
                f"wanted CRC-32 {self.checksum:#010x}, found {found:#010x}"
            )
            raise CorruptionError(str(Problem(message, place.key, place.file, self.offset)))


def place_of(index: CheckpointIndex, chunk: int) -> Place:
    """Return one chunk as a value. It must have a file."""
    chunks, tensors = index.chunks, index.tensors
    row = int(chunks.tensor[chunk])
    axes = int(tensors.ndim[row])
    return Place(
        chunk=chunk,
        key=tensors.keys[row],
        dtype=tensors.dtype_of(row),
        offsets=tuple(chunks.offsets[chunk, :axes].tolist()),
        sizes=tuple(chunks.sizes[chunk, :axes].tolist()),
        file=index.files[int(chunks.file[chunk])],
        record_offset=int(chunks.record_offset[chunk]),
        record_length=int(chunks.record_length[chunk]),
        container=Container(int(chunks.container[chunk])),
        transforms=index.transforms[int(chunks.transform[chunk])],
    )


def known_payload(index: CheckpointIndex, place: Place) -> Payload | None:
    """Return what the index itself knows, None where a header has to be read.

    Raises
    ------
    FormatError
        If the payload is not inside its record, or too small for its strides.
    """
    payloads = index.chunks.payloads
    chunk = place.chunk
    if payloads is not None and payloads.offset[chunk] != UNKNOWN:
        payload = Payload(
            offset=int(payloads.offset[chunk]),
            strides=tuple(payloads.strides[chunk, : len(place.sizes)].tolist()),
            length=int(payloads.length[chunk]),
            checksum=int(payloads.checksum[chunk]),
            flags=int(payloads.flags[chunk]),
        )
    elif place.container == Container.RAW:
        strides = row_major_strides(place.sizes)
        payload = Payload(place.record_offset, strides, place.record_length, UNKNOWN, 0)
    else:
        return None
    _check_span(place, payload)
    return payload


def from_record(place: Place, read_at: ReadAt, offset: int, length: int) -> Payload:
    """Read the header of a torch.save record that lies at `offset` of what `read_at` reads.

    Raises
    ------
    FormatError, CorruptionError, NotSupportedError
        If the record is damaged, or holds another tensor than the index says.
    """
    found = read_tensor_payload(read_at, offset, length, file=place.file, key=place.key)
    _check_tensor(place, found.dtype, tuple(found.shape))
    checksum = UNKNOWN if found.checksum is None else found.checksum
    payload = Payload(
        found.payload_offset, tuple(found.strides), found.payload_length, checksum, found.flags
    )
    _check_extent(place, payload)
    return payload


def from_image(place: Place, header: SafetensorsHeader) -> Payload:
    """Find the chunk's tensor in a safetensors image.

    Raises
    ------
    FormatError
        If the image has no such tensor, or another than the index says.
    """
    entry = header.tensors.get(place.key)
    if entry is None:
        raise place.fail("the safetensors image has no tensor of that name")
    _check_tensor(place, entry.dtype, tuple(entry.shape))
    length = entry.end - entry.start
    payload = Payload(entry.start, row_major_strides(place.sizes), length, UNKNOWN, 0)
    _check_extent(place, payload)
    return payload


def _check_tensor(place: Place, dtype: DType, shape: Numbers) -> None:
    if dtype != place.dtype or shape != place.sizes:
        raise place.fail(
            f"wanted a chunk of {place.dtype.name} {list(place.sizes)}, "
            f"found {dtype.name} {list(shape)}"
        )


def _check_span(place: Place, payload: Payload) -> None:
    """Check that a payload that the index gives is inside its record."""
    start, end = payload.offset, payload.offset + payload.length
    first, last = place.record_offset, place.record_offset + place.record_length
    inside = start >= 0 and payload.length >= 0
    if not place.transforms and place.container != Container.SAFETENSORS_IMAGE:
        inside = inside and first <= start and end <= last
    if not inside:
        raise place.fail(f"bytes {start} to {end} are outside the record at {first} to {last}")
    _check_extent(place, payload)


def _check_extent(place: Place, payload: Payload) -> None:
    if any(stride < 0 for stride in payload.strides):
        raise place.fail(f"strides {list(payload.strides)} are negative")
    wanted = extent(place.sizes, payload.strides) * place.dtype.itemsize
    if wanted > payload.length:
        raise place.fail(
            f"a payload of {payload.length} bytes is too short: sizes {list(place.sizes)} with "
            f"strides {list(payload.strides)} reach over {wanted}"
        )
