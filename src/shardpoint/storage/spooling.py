"""New files for stores that take a file whole: collected at any offsets, handed over at the end."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import TypeAlias

from shardpoint.errors import StorageError
from shardpoint.storage._files import LocalWritableFile, refused
from shardpoint.storage.base import Buffer, Closing

__all__ = ["MOST_IN_MEMORY", "SpooledFile"]

PutBytes: TypeAlias = Callable[[bytes], None]
PutFile: TypeAlias = Callable[[str], None]

MOST_IN_MEMORY = 8 << 20
"""Files up to this size are collected in memory, larger ones in a temporary file: a few of
them may be open at once, and what they take comes on top of the state that is saved."""


class SpooledFile(Closing):
    """A `shardpoint.storage.base.WritableFile` that reaches the store when it is closed.

    Object stores, and file systems that only append, cannot be written at offsets by several
    threads. So the bytes are collected, in memory or in a local temporary file, and handed over
    in one piece: then they are there as a whole, or not at all. A file whose announced size was
    not reached when it is closed is dropped: whoever wrote it has failed.

    Parameters
    ----------
    path
        For messages.
    size
        Bytes in all; None where that is not known, and then whatever was written counts.
    put_bytes, put_file
        Store the content: as bytes, or as the file with that name. One of them is called once.
    """

    def __init__(
        self, path: str, size: int | None, *, put_bytes: PutBytes, put_file: PutFile
    ) -> None:
        self._path = path
        self._size = size
        self._put_bytes = put_bytes
        self._put_file = put_file
        self._lock = threading.Lock()
        self._written = 0
        self._closed = False
        self._memory: memoryview | None = None
        self._file: LocalWritableFile | None = None
        self._temporary = ""
        if size is not None and size <= MOST_IN_MEMORY:
            self._memory = memoryview(bytearray(size))
            return
        try:
            descriptor, self._temporary = tempfile.mkstemp(prefix="shardpoint-")
        except OSError as error:
            raise refused("make a temporary file for", path, error) from error
        self._file = LocalWritableFile(descriptor, self._temporary)

    def write_from(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Take all buffers; see the protocol."""
        length = sum(map(len, buffers))
        if self._size is not None and offset + length > self._size:
            raise StorageError(
                f"cannot write bytes {offset} to {offset + length} of {self._path!r}: "
                f"it was announced with {self._size} bytes"
            )
        if self._file is not None:
            self._file.write_from(offset, buffers)
        elif self._memory is not None:
            for buffer in buffers:
                self._memory[offset : offset + len(buffer)] = buffer
                offset += len(buffer)
        else:
            raise StorageError(f"cannot write to {self._path!r}: it has been closed")
        with self._lock:
            self._written += length

    def sync(self) -> None:
        """Do nothing: closing hands the file over, and is done when the store has it."""

    def close(self) -> None:
        """Hand the file over; closing again does nothing.

        Raises
        ------
        StorageError
            If the store does not take it.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        memory, self._memory = self._memory, None
        file, self._file = self._file, None
        is_whole = self._size is None or self._written == self._size
        if memory is not None and is_whole:
            self._put_bytes(bytes(memory))
        if file is None:
            return
        try:
            file.close()
            if is_whole:
                self._put_file(self._temporary)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
