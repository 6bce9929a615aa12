"""Many records of few forms, finished together: CRC-32 fields by vector arithmetic.

All bytes of a record around its payload are known before the payload is, but for the payload's
CRC-32 (in one or two places), its 20 decimal digits in the fingerprint, and the fingerprint's
own CRC-32. CRC-32 is linear over exclusive or: when a byte is changed, the checksum of what
holds it changes by a value that depends on the change and on the number of bytes that follow,
and on nothing else. So both these fields and the checksum of the whole record come from tables
that all records of the same geometry share.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shardpoint.formats.checksum import crc32, crc32_combine

__all__ = ["DIGITS", "FINGERPRINT_DIGITS", "RecordForm", "finish_records"]

FINGERPRINT_DIGITS = 40
DIGITS = FINGERPRINT_DIGITS // 2
"""Decimal digits of one CRC-32 in the fingerprint, padded with zeros."""

_TEN = 10  # digits that a CRC-32 has at most
_FIELD = 4  # bytes of a CRC-32

ByteArray = npt.NDArray[np.uint8]
CrcArray = npt.NDArray[np.uint32]


@dataclass(frozen=True, slots=True, eq=False)
class RecordForm:
    """The bytes of a record around a payload of a known length.

    Attributes
    ----------
    head
        Bytes before the payload.
    payload_length
        In bytes.
    template
        Bytes after a payload whose CRC-32 is 0.
    crc_at
        Where in `template` the payload's CRC-32 stands, little-endian.
    fingerprint_at, digits_at
        Where the fingerprint's digits begin, and the 20 of them that are the payload's CRC-32.
    fingerprint_crc_at
        Where the fingerprint's CRC-32 stands.
    length
        Bytes of the whole record.
    """

    head: bytes
    payload_length: int
    template: bytes
    crc_at: tuple[int, ...]
    fingerprint_at: int
    digits_at: int
    fingerprint_crc_at: tuple[int, ...]
    length: int = field(init=False)

    def __post_init__(self) -> None:
        length = len(self.head) + self.payload_length + len(self.template)
        object.__setattr__(self, "length", length)

    def tail(self, crc: int) -> bytes:
        """Return the bytes after a payload of that CRC-32."""
        tail = bytearray(self.template)
        tail[self.digits_at : self.digits_at + DIGITS] = b"%020d" % crc
        start = self.fingerprint_at
        fingerprint_crc = crc32(tail[start : start + FINGERPRINT_DIGITS])
        for at in self.crc_at:
            tail[at : at + _FIELD] = crc.to_bytes(_FIELD, "little")
        for at in self.fingerprint_crc_at:
            tail[at : at + _FIELD] = fingerprint_crc.to_bytes(_FIELD, "little")
        return bytes(tail)

    def _geometry(self) -> _Geometry:
        """Return what other forms with the same fields as far from the end share."""
        end = len(self.template)
        return _geometry(
            end,
            tuple(end - at for at in self.crc_at),
            end - self.digits_at,
            self.fingerprint_at + FINGERPRINT_DIGITS - self.digits_at,
            tuple(end - at for at in self.fingerprint_crc_at),
        )

    def _base(self) -> int:
        """Return the record's CRC-32, were the payload's CRC-32 0."""
        before = crc32_combine(crc32(self.head), 0, self.payload_length)
        return crc32_combine(before, crc32(self.template), len(self.template))


def finish_records(
    forms: Sequence[RecordForm], crcs: CrcArray, data: ByteArray, ends: npt.NDArray[np.int64]
) -> CrcArray:
    """Put the payloads' CRC-32 into records that have their forms' templates as tails.

    Parameters
    ----------
    forms
        Of each record; few different ones.
    crcs
        ``uint32[n]``: CRC-32 of each payload.
    data
        ``uint8[m]``: holds the records; their tails are changed.
    ends
        ``int64[n]``: where in `data` each record ends.

    Returns
    -------
    ``uint32[n]``: the CRC-32 of each whole record.
    """
    numbers = {form: number for number, form in enumerate(dict.fromkeys(forms))}
    row_form = np.fromiter(map(numbers.__getitem__, forms), np.int64, len(forms))
    base = np.array([form._base() for form in numbers], np.uint32)
    by_geometry: dict[_Geometry, list[int]] = {}
    for form, number in numbers.items():
        by_geometry.setdefault(form._geometry(), []).append(number)
    records = base[row_form]
    for geometry, members in by_geometry.items():
        if len(by_geometry) == 1:
            records ^= geometry.finish(crcs, data, ends)
            continue
        rows = np.flatnonzero(np.isin(row_form, members))
        records[rows] ^= geometry.finish(crcs[rows], data, ends[rows])
    return records


@dataclass(frozen=True, slots=True, eq=False)
class _Geometry:
    """Tables for records whose fields lie equally far from their ends.

    Attributes
    ----------
    fields_before_end
        ``int64[k]``: where the bytes to change lie, counted back from the record's end.
    crc_fields, fingerprint_crc_fields
        How often these two CRC-32 values stand in a record.
    of_crc
        ``uint32[4, 256]``: for each byte of the payload's CRC-32, the change of the record's.
    groups
        For the ten digits, in groups of 1, 3, 3 and 3: ``uint32[2, 10 or 1000]``, the changes
        of the fingerprint's CRC-32 and of the record's.
    """

    fields_before_end: npt.NDArray[np.int64]
    crc_fields: int
    fingerprint_crc_fields: int
    of_crc: CrcArray
    groups: tuple[CrcArray, ...]

    def finish(self, crcs: CrcArray, data: ByteArray, ends: npt.NDArray[np.int64]) -> CrcArray:
        """Change the tails; return the changes of the records' CRC-32."""
        rest, low = np.divmod(crcs, np.uint32(1000))
        rest, middle = np.divmod(rest, np.uint32(1000))
        first, high = np.divmod(rest, np.uint32(1000))
        digits = (first, high, middle, low)
        change = np.zeros((2, len(crcs)), np.uint32)
        for table, group in zip(self.groups, digits, strict=True):
            change ^= table[:, group]
        crc_bytes = _bytes_of(crcs)
        for place in range(_FIELD):
            change[1] ^= self.of_crc[place][crc_bytes[:, place]]
        pieces = [crc_bytes] * self.crc_fields
        pieces += [first.astype(np.uint8)[:, None]]
        pieces += [_THREE_DIGITS[group] for group in digits[1:]]
        pieces += [_bytes_of(change[0])] * self.fingerprint_crc_fields
        at = ends[:, None] - self.fields_before_end
        data[at] ^= np.concatenate(pieces, axis=1)
        changed: CrcArray = change[1]
        return changed


def _bytes_of(values: CrcArray) -> ByteArray:
    return np.ascontiguousarray(values, "<u4").view(np.uint8).reshape(-1, _FIELD)


_THREE_DIGITS: ByteArray = np.stack(
    [np.arange(1000) // 100, np.arange(1000) // 10 % 10, np.arange(1000) % 10], axis=1
).astype(np.uint8)


@functools.lru_cache(maxsize=512)
def _geometry(
    tail_length: int,
    crcs: tuple[int, ...],
    digits: int,
    digits_in_fingerprint: int,
    fingerprint_crcs: tuple[int, ...],
) -> _Geometry:
    """Make the tables; places are counted back from the end, of the record or fingerprint."""
    bits = [1 << bit for bit in range(32)]
    # What stands before the tail goes into the record's checksum by way of the payload's.
    of_crc = [crc32_combine(bit, 0, tail_length) for bit in bits]
    for before_end in crcs:
        of_crc = [a ^ b for a, b in zip(of_crc, _field_changes(before_end), strict=True)]
    of_fingerprint_crc = [0] * 32
    for before_end in fingerprint_crcs:
        changes = _field_changes(before_end)
        of_fingerprint_crc = [a ^ b for a, b in zip(of_fingerprint_crc, changes, strict=True)]
    unused = DIGITS - _TEN
    per_digit = []
    for place in range(unused, DIGITS):
        in_fingerprint = _spread(_changes(digits_in_fingerprint - place, 4))[:_TEN]
        in_record = _spread(_changes(digits - place, 4))[:_TEN]
        in_record = in_record ^ _linear(of_fingerprint_crc, in_fingerprint)
        per_digit.append(np.stack([in_fingerprint, in_record]))
    fields = [before - byte for before in crcs for byte in range(_FIELD)]
    fields += [digits - place for place in range(unused, DIGITS)]
    fields += [before - byte for before in fingerprint_crcs for byte in range(_FIELD)]
    return _Geometry(
        fields_before_end=np.array(fields, np.int64),
        crc_fields=len(crcs),
        fingerprint_crc_fields=len(fingerprint_crcs),
        of_crc=np.stack([_spread(of_crc[8 * byte : 8 * byte + 8]) for byte in range(_FIELD)]),
        groups=(per_digit[0], *(_three(per_digit[at : at + 3]) for at in (1, 4, 7))),
    )


def _changes(before_end: int, bits: int) -> list[int]:
    """Return how a CRC-32 changes with each bit of the byte so far from the end."""
    following = bytes(before_end - 1)
    zero = crc32(b"\0" + following)
    return [crc32(bytes((1 << bit,)) + following) ^ zero for bit in range(bits)]


def _field_changes(before_end: int) -> list[int]:
    """Return the changes with each bit of a little-endian field of 32 bits."""
    return [change for byte in range(_FIELD) for change in _changes(before_end - byte, 8)]


def _spread(changes: Sequence[int]) -> CrcArray:
    """Return the changes with all values of some bits, from those with each bit."""
    table = np.zeros(1, np.uint32)
    for change in changes:
        table = np.concatenate([table, table ^ np.uint32(change)])
    return table


def _linear(changes: Sequence[int], values: CrcArray) -> CrcArray:
    """Return the change with each value, from those with each of its 32 bits."""
    result = np.zeros_like(values)
    for bit, change in enumerate(changes):
        result ^= np.where(values >> np.uint32(bit) & np.uint32(1), np.uint32(change), np.uint32(0))
    return result


def _three(tables: Sequence[CrcArray]) -> CrcArray:
    """Return the table of numbers of three digits from those of the digits."""
    hundreds, tens, ones = tables
    whole = hundreds[:, :, None, None] ^ tens[:, None, :, None] ^ ones[:, None, None, :]
    table: CrcArray = whole.reshape(2, 1000)
    return table
