"""Writes torch.save records of tensors by byte layout.

The bytes are those of torch 2.13's own ``torch.save`` for the same tensor, but for the 40
digits of ``.data/serialization_id``, a fingerprint that nothing reads.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass

from shardpoint.dtypes import BY_NAME, DType
from shardpoint.errors import PlanError
from shardpoint.formats._zip_writing import (
    ALIGNMENT,
    CENTRAL_CRC_AT,
    CENTRAL_POSITION_AT,
    CENTRAL_SIZES_AT,
    DESCRIPTOR_CRC_AT,
    DESCRIPTOR_SIZES_AT,
    END_POSITION_AT,
    END_WIDE_POSITIONS_AT,
    central_entry,
    descriptor,
    descriptor_length,
    end,
    local_header,
)
from shardpoint.formats.checksum import BytesLike, crc32
from shardpoint.formats.record_form import DIGITS, FINGERPRINT_DIGITS, RecordForm
from shardpoint.index import row_major_strides

__all__ = [
    "BEFORE",
    "FIELD",
    "FINGERPRINT",
    "FINGERPRINT_LENGTH",
    "PICKLE",
    "PREFIX",
    "VERSION",
    "TensorRecordLayout",
    "Zip",
]

PREFIX = b"archive/"
PICKLE = PREFIX + b"data.pkl"
_PAYLOAD = PREFIX + b"data/0"
FINGERPRINT = PREFIX + b".data/serialization_id"
FINGERPRINT_LENGTH = FINGERPRINT_DIGITS
FIELD = struct.Struct("<L")
_WIDE_FIELD = struct.Struct("<Q")
_SURELY_SMALL = (1 << 32) - (1 << 20)  # head and tail have far less than 1 MiB
BEFORE = (
    (PREFIX + b".format_version", b"1"),
    (PREFIX + b".storage_alignment", b"64"),
    (PREFIX + b"byteorder", b"little"),
)
VERSION = (PREFIX + b"version", b"3\n")


class TensorRecordLayout:
    """The record of one tensor: everything but the tensor's own bytes.

    A record is `head`, then `payload_length` bytes (the elements in storage order,
    little-endian), then what `tail` gives for their CRC-32. It is what torch 2.7 and later
    write, and what ``torch.load(weights_only=True)`` of torch 2.3 and later reads.

    Parameters
    ----------
    dtype, shape
        Of the tensor.
    strides
        In elements; None is row-major. The payload has every element up to the last one
        that the strides reach.
    requires_grad
        Kept in the record as torch keeps it.

    Attributes
    ----------
    head
        Bytes before the payload; a multiple of 64.
    payload_length, tail_length, length
        Bytes of the payload, of the tail, of the whole record.
    form
        Head and tail in the form in which many records are finished together; the same
        object for tensors alike, as long as it is remembered.

    Raises
    ------
    PlanError
        If shape or strides have a negative number or do not fit each other.
    """

    __slots__ = ("form", "head", "length", "payload_length", "tail_length")

    def __init__(
        self,
        dtype: DType,
        shape: tuple[int, ...],
        strides: tuple[int, ...] | None = None,
        requires_grad: bool = False,
    ) -> None:
        # The dtype's name, since hashing a DType hashes all that it has.
        form = self.form = _prepare(dtype.name, shape, strides, requires_grad)
        self.head, self.payload_length = form.head, form.payload_length
        self.tail_length = len(form.template)
        self.length = form.length

    def tail(self, crc: int) -> bytes:
        """Return the bytes after a payload of that CRC-32."""
        return self.form.tail(crc)

    def tail_fields(self) -> list[tuple[int, int]]:
        """Return position and length of what differs between tails of records of this form."""
        form = self.form
        crcs = (*form.crc_at, *form.fingerprint_crc_at)
        return [(form.fingerprint_at, FINGERPRINT_LENGTH), *((at, FIELD.size) for at in crcs)]


@functools.lru_cache(maxsize=1024)
def _prepare(
    dtype_name: str, shape: tuple[int, ...], strides: tuple[int, ...] | None, requires_grad: bool
) -> RecordForm:
    dtype = BY_NAME[dtype_name]
    pickle, payload_length = _tensor_pickle(dtype, shape, strides, requires_grad)
    pickle_crc = crc32(pickle)
    frame = _frame(len(pickle), _representative(payload_length))
    after_pickle = descriptor(0, len(pickle), pickle_crc)
    head = b"".join((frame.before_pickle, pickle, after_pickle, frame.before_payload))
    return RecordForm(
        head=head,
        payload_length=payload_length,
        template=frame.prepare_tail(payload_length, pickle_crc),
        crc_at=frame.payload_crcs_at,
        fingerprint_at=frame.fingerprint_at,
        digits_at=frame.fingerprint_at + DIGITS,
        fingerprint_crc_at=frame.fingerprint_crcs_at,
    )


def _tensor_pickle(
    dtype: DType, shape: tuple[int, ...], strides: tuple[int, ...] | None, requires_grad: bool
) -> tuple[bytes, int]:
    """Return the protocol-2 pickle of a tensor, and the bytes of its storage."""
    if strides is None:
        strides = row_major_strides(shape)
    if len(strides) != len(shape) or any(n < 0 for n in (*shape, *strides)):
        raise PlanError(f"no tensor has the shape {shape} and the strides {strides}")
    count = 0
    if 0 not in shape:
        count = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    payload_length = count * dtype.itemsize
    typed = dtype.storage_name is not None
    version = b"2" if typed else b"3"
    storage = (
        f"ctorch\n{dtype.storage_name}\n" if typed else "ctorch.storage\nUntypedStorage\n"
    ).encode()
    memo = 6
    pieces = [
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v" + version + b"\nq\x00((",
        b"X\x07\x00\x00\x00storageq\x01" + storage + b"q\x02",
        b"X\x01\x00\x00\x000q\x03X\x03\x00\x00\x00cpuq\x04",
        _integer(count if typed else payload_length) + b"tq\x05QK\x00",
    ]
    for numbers in (shape, strides):
        pieces.append(_tuple(numbers))
        if numbers:
            pieces.append(b"q%c" % memo)
            memo += 1
    pieces.append(b"\x88" if requires_grad else b"\x89")
    pieces.append(b"ccollections\nOrderedDict\nq%c)Rq%c" % (memo, memo + 1))
    memo += 2
    if not typed:
        pieces.append(b"ctorch\n" + dtype.name.encode() + b"\nq%c" % memo)
        memo += 1
    pieces.append(b"tq%cRq%c." % (memo, memo + 1))
    return b"".join(pieces), payload_length


def _integer(value: int) -> bytes:
    """Return the opcode that pushes a number that is not negative."""
    if value < 1 << 8:
        return b"K%c" % value
    if value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little")
    length = value.bit_length() // 8 + 1  # one more bit for the sign
    return b"\x8a%c" % length + value.to_bytes(length, "little")


def _tuple(numbers: tuple[int, ...]) -> bytes:
    """Return the opcodes that push a tuple of numbers."""
    items = b"".join(map(_integer, numbers))
    if len(numbers) > 3:
        return b"(" + items + b"t"
    return items + (b")", b"\x85", b"\x86", b"\x87")[len(numbers)]


@dataclass(frozen=True, slots=True)
class _Frame:
    """The bytes around pickle and payload, the same for many tensors.

    Made for a payload of `payload_length`; one that is longer by a multiple of the alignment
    changes nothing but the numbers at `sizes_at` (32 bits) and `positions_at` (struct, place).
    """

    payload_length: int
    before_pickle: bytes
    before_payload: bytes  # from the end of the pickle's descriptor on
    tail: bytes  # with CRC-32 fields and fingerprint zero
    sizes_at: tuple[int, ...]
    positions_at: tuple[tuple[struct.Struct, int], ...]
    pickle_crc_at: int
    payload_crcs_at: tuple[int, ...]
    fingerprint_at: int
    fingerprint_crcs_at: tuple[int, int]

    def prepare_tail(self, payload_length: int, pickle_crc: int) -> bytes:
        """Return the tail of all payloads of a length whose CRC-32 is 0."""
        tail = bytearray(self.tail)
        longer = payload_length - self.payload_length
        if longer:
            for at in self.sizes_at:
                FIELD.pack_into(tail, at, payload_length)
            for form, at in self.positions_at:
                form.pack_into(tail, at, form.unpack_from(tail, at)[0] + longer)
        FIELD.pack_into(tail, self.pickle_crc_at, pickle_crc)
        fingerprint = b"%020d%020d" % (pickle_crc, 0)
        tail[self.fingerprint_at : self.fingerprint_at + FINGERPRINT_LENGTH] = fingerprint
        for at in self.fingerprint_crcs_at:
            FIELD.pack_into(tail, at, crc32(fingerprint))
        return bytes(tail)


def _representative(payload_length: int) -> int:
    """Return the shortest payload with the same frame; itself near and past 4 GiB."""
    if payload_length == 0 or payload_length > _SURELY_SMALL:
        return payload_length
    return (payload_length - 1) % ALIGNMENT + 1


@functools.lru_cache(maxsize=4096)
def _frame(pickle_length: int, payload_length: int) -> _Frame:
    first = local_header(PICKLE, 0, pickle_length)
    before = Zip(len(first) + pickle_length + descriptor_length(0, pickle_length))
    before.entries.append(central_entry(PICKLE, 0, pickle_length, 0))
    for name, data in BEFORE:
        before.add(name, data)
    payload_at = before.position
    before.begin(_PAYLOAD, payload_length)

    after = Zip(before.position + payload_length)
    start = after.position
    after.close(_PAYLOAD, payload_at, payload_length, 0)
    after.add(*VERSION)
    fingerprint_at = after.position
    after.begin(FINGERPRINT, FINGERPRINT_LENGTH)
    fingerprint_data_at = after.position - start
    after.write(bytes(FINGERPRINT_LENGTH))
    fingerprint_crc_at = after.position - start + DESCRIPTOR_CRC_AT
    after.close(FINGERPRINT, fingerprint_at, FINGERPRINT_LENGTH, 0)
    after.entries[:0] = before.entries
    entries_at = [after.position - start]
    for entry in after.entries:
        entries_at.append(entries_at[-1] + len(entry))
    after.finish()

    *_, payload, version, fingerprint, end_at = entries_at
    sizes_at: tuple[int, ...] = ()
    payload_crcs_at: tuple[int, ...] = ()
    if payload_length:
        sizes_at = (*DESCRIPTOR_SIZES_AT, *(payload + at for at in CENTRAL_SIZES_AT))
        payload_crcs_at = (DESCRIPTOR_CRC_AT, payload + CENTRAL_CRC_AT)
    return _Frame(
        payload_length=payload_length,
        before_pickle=first,
        before_payload=b"".join(before.pieces),
        tail=b"".join(after.pieces),
        sizes_at=sizes_at,
        positions_at=(
            (FIELD, version + CENTRAL_POSITION_AT),
            (FIELD, fingerprint + CENTRAL_POSITION_AT),
            *((_WIDE_FIELD, end_at + at) for at in END_WIDE_POSITIONS_AT),
            (FIELD, end_at + END_POSITION_AT),
        ),
        pickle_crc_at=entries_at[0] + CENTRAL_CRC_AT,
        payload_crcs_at=payload_crcs_at,
        fingerprint_at=fingerprint_data_at,
        fingerprint_crcs_at=(fingerprint_crc_at, fingerprint + CENTRAL_CRC_AT),
    )


class Zip:
    """A zip in the making: pieces, and the directory's entries."""

    def __init__(self, position: int) -> None:
        self.position = position
        self.pieces: list[BytesLike] = []
        self.entries: list[bytes] = []

    def write(self, data: BytesLike) -> None:
        self.pieces.append(data)
        self.position += len(data)

    def begin(self, name: bytes, size: int) -> None:
        self.write(local_header(name, self.position, size))

    def close(self, name: bytes, position: int, size: int, crc: int) -> None:
        self.write(descriptor(position, size, crc))
        self.entries.append(central_entry(name, position, size, crc))

    def add(self, name: bytes, data: BytesLike) -> None:
        position = self.position
        self.begin(name, len(data))
        self.write(data)
        self.close(name, position, len(data), crc32(data))

    def finish(self) -> None:
        directory = b"".join(self.entries)
        position = self.position
        self.write(directory)
        self.write(end(len(self.entries), position, len(directory)))
