"""Transforms whose records can be decoded in parts: independent frames, found by a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

__all__ = ["FramedRecord", "FramedTransform", "ReadAt", "open_framed"]

ReadAt: TypeAlias = Callable[[int, int], "bytes | bytearray | memoryview"]
"""``read_at(offset, length)`` returns exactly those bytes; they lie inside what is read."""


class FramedRecord(Protocol):
    """One encoded record, open for reading any part of what it decodes to."""

    @property
    def size(self) -> int:
        """Bytes of the decoded record."""
        ...

    def read(self, offset: int, length: int) -> bytes | bytearray | memoryview:
        """Return a span of the decoded record; it lies inside ``size``.

        Reads and decodes the frames that the span touches, and no others. The last frame of a
        call is kept until the next one, so that reading on from where one ended decodes no
        frame twice. Called by one thread at a time. The caller does not change the result.

        Raises
        ------
        CorruptionError
            If a frame is damaged; names the key, the file and the frame's span.
        """
        ...


class FramedTransform(Protocol):
    """Undoes one transform, part by part."""

    def open(
        self, read_at: ReadAt, length: int, *, max_size: int, key: str, file: str
    ) -> FramedRecord:
        """Read the frame table and return the record.

        Parameters
        ----------
        read_at
            Reads the encoded bytes; byte 0 is the first of the record.
        length
            How many there are.
        max_size
            The most bytes that the decoded record can have.
        key, file
            Where the record belongs, for messages.

        Raises
        ------
        CorruptionError
            If the table is damaged.
        LimitExceededError
            If the decoded record would have more than `max_size` bytes.
        NotSupportedError
            If what undoes the transform is not installed, or a key is not given.
        """
        ...


def open_framed(
    transforms: Mapping[str, FramedTransform],
    descriptors: tuple[str, ...],
    read_at: ReadAt,
    length: int,
    *,
    max_size: int,
    key: str,
    file: str,
) -> FramedRecord | None:
    """Open a record whose transforms are all framed; None where one of them is not.

    Parameters
    ----------
    transforms
        The framed ones, by descriptor.
    descriptors
        In the order in which they were applied.
    read_at, length, max_size, key, file
        As for `FramedTransform.open`.
    """
    if not descriptors or not all(descriptor in transforms for descriptor in descriptors):
        return None
    record: FramedRecord | None = None
    for step, descriptor in enumerate(reversed(descriptors), 1):
        # What is still encoded is hardly larger than what it becomes.
        limit = max_size if step == len(descriptors) else 2 * max_size
        record = transforms[descriptor].open(read_at, length, max_size=limit, key=key, file=file)
        read_at, length = record.read, record.size
    return record
