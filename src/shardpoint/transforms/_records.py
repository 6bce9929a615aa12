"""What transforms work on: the bytes of one record, read at any place."""

from __future__ import annotations

import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, TypeAlias

from shardpoint.errors import CorruptionError, LimitExceededError, NotSupportedError, Problem

__all__ = [
    "Buffer",
    "MemoryRecord",
    "Origin",
    "RecordBytes",
    "RecordReader",
    "StreamRecord",
    "Tally",
    "Transform",
    "read_at",
]

Buffer: TypeAlias = "bytearray | memoryview"
"""Writable memory: C-contiguous, of single bytes."""


class RecordBytes(Protocol):
    """The bytes of one record, as they are stored or as a transform gives them back.

    May be read by several threads side by side.
    """

    @property
    def size(self) -> int:
        """How many bytes there are."""
        ...

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill the buffers, one after the other, with the bytes from `offset` on.

        The buffers belong to the caller and are not kept. The bytes asked for must be
        inside the record.

        Raises
        ------
        CorruptionError
            If the bytes are damaged.
        ShardpointError
            Whatever the store raises.
        """
        ...


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record comes from, for messages.

    Attributes
    ----------
    key
        The flat key.
    file, offset
        The file, relative to the checkpoint, and the record's place in it in bytes, if known.
    """

    key: str
    file: str
    offset: int | None = None

    def _problem(self, message: str) -> str:
        return str(Problem(message, self.key, self.file, self.offset))

    def corrupt(self, message: str) -> CorruptionError:
        """Return an error that names key, file and offset."""
        return CorruptionError(self._problem(message))

    def not_supported(self, message: str) -> NotSupportedError:
        """Return an error that names key, file and offset."""
        return NotSupportedError(self._problem(message))

    def too_large(self, message: str) -> LimitExceededError:
        """Return an error that names key, file and offset."""
        return LimitExceededError(self._problem(message))


@dataclass(slots=True, eq=False)
class Tally:
    """Counts bytes that transforms made; several threads may add.

    Attributes
    ----------
    decoded_bytes
        Bytes of records that the transforms next to them gave back, wanted or not.
    """

    decoded_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, nbytes: int) -> None:
        """Add what was decoded at once."""
        with self._lock:
            self.decoded_bytes += nbytes


class Transform(Protocol):
    """Undoes what was done to records on their way into a file.

    One object serves all records and all threads. One whose `undo` decodes nothing, but gives a
    record that decodes what is read of it, may say so by an attribute ``decodes_in_parts``, true:
    then large records are read by several threads.
    """

    @property
    def name(self) -> str:
        """The descriptor without its version, such as ``"stream.zstd"``."""
        ...

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        """Return the record before the transform; may read from `stored` now and later.

        Parameters
        ----------
        stored
            What the transform made.
        version
            The part of the descriptor after the slash; ``""`` where there is none.
        most
            The most bytes that the record may have.
        origin
            For messages.
        tally
            Counts decoded bytes, or None.

        Raises
        ------
        NotSupportedError
            If the version is not known, or a package or a key is missing.
        CorruptionError
            If the bytes are damaged or incomplete.
        LimitExceededError
            If the record would have more than `most` bytes; found before they are made.
        """
        ...


class MemoryRecord:
    """A record in memory."""

    __slots__ = ("_data", "size")

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.size = len(self._data)

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `RecordBytes`."""
        for buffer in buffers:
            end = offset + len(buffer)
            buffer[:] = self._data[offset:end]
            offset = end

    def memory(self) -> memoryview:
        """Return all bytes, not copied."""
        return self._data


def read_at(record: RecordBytes, offset: int, length: int) -> bytearray:
    """Return bytes of a record; they must be inside it."""
    if isinstance(record, MemoryRecord):
        return bytearray(record.memory()[offset : offset + length])
    data = bytearray(length)
    record.read_into(offset, [data])
    return data


class RecordReader(io.RawIOBase):
    """A record as a stream that can be read and sought; put a `io.BufferedReader` around it."""

    def __init__(self, record: RecordBytes) -> None:
        self._record = record
        self._position = 0

    def readable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """Yes."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See `io.IOBase.seek`."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._record.size}
        self._position = max(0, base[whence] + offset)
        return self._position

    def tell(self) -> int:
        """See `io.IOBase.tell`."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase.readinto`."""
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._record.size - self._position))
        if count:
            self._record.read_into(self._position, [view[:count]])
        self._position += count
        return count


class StreamRecord:
    """The rest of a stream as a record: sought if it can be, else read into memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        if not stream.seekable():
            stream = io.BytesIO(stream.read())
        self._stream = stream
        self._lock = threading.Lock()
        self._start = stream.tell()
        stream.seek(0, io.SEEK_END)
        self.size = stream.tell() - self._start

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `RecordBytes`."""
        with self._lock:
            self._stream.seek(self._start + offset)
            for buffer in buffers:
                view = memoryview(buffer)
                while len(view):
                    data = self._stream.read(len(view))
                    if not data:
                        raise CorruptionError("the stream ends before its end")
                    view[: len(data)] = data
                    view = view[len(data) :]
