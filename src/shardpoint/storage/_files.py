"""Open files of the local file system: positioned, vectored, complete."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from shardpoint.errors import CorruptionError, StorageError
from shardpoint.storage._gathering import gather
from shardpoint.storage.base import Buffer, Closing

__all__ = ["LocalReadableFile", "LocalWritableFile", "refused"]

_VECTOR_LIMIT = min(os.sysconf("SC_IOV_MAX"), 1024) if "SC_IOV_MAX" in os.sysconf_names else 16


# With this flag alone Linux starts the transfer and does not wait; a failure of it is kept for
# the next fsync (sync_file_range(2)). Python has no function for it.
_START_ONLY = 2


def _find_sync_file_range() -> Callable[..., int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
        function.restype = ctypes.c_int
    return function


_sync_file_range = _find_sync_file_range()


def refused(action: str, path: str, cause: OSError) -> StorageError:
    """Return a `StorageError` that names the file and keeps the cause's ``errno``."""
    reason = cause.strerror or str(cause)
    return StorageError(cause.errno, f"cannot {action} {path!r}: {reason}")


class _LocalFile(Closing):
    """A descriptor that is closed once, also when several threads close it."""

    def __init__(self, descriptor: int, path: str) -> None:
        self._descriptor = descriptor
        self._path = path
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close the file; closing again does nothing.

        Raises
        ------
        StorageError
            If the store reports a failed write only now.
        """
        with self._lock:
            descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            try:
                os.close(descriptor)
            except OSError as error:
                raise refused("close", self._path, error) from error

    def __del__(self) -> None:
        """Close what an interrupt (Ctrl-C) kept from being closed, between two statements."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)


class LocalReadableFile(_LocalFile):
    """A regular file open for reading; implements `shardpoint.storage.base.ReadableFile`."""

    def __init__(self, descriptor: int, path: str, size: int) -> None:
        super().__init__(descriptor, path)
        self._size = size

    @property
    def size(self) -> int:
        """Size in bytes when the file was opened."""
        return self._size

    def read_into(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers with the bytes from `offset` on; see the protocol."""
        waiting = [buffer for buffer in buffers if len(buffer)]
        first = 0
        while first < len(waiting):
            batch = waiting[first : first + _VECTOR_LIMIT]
            try:
                count = os.preadv(self._descriptor, batch, offset)
            except OSError as error:
                raise refused(f"read at byte {offset} of", self._path, error) from error
            if count == 0:
                missing = sum(map(len, waiting[first:]))
                raise CorruptionError(
                    f"file {self._path!r} ends at byte {offset}: {missing} bytes are missing"
                )
            offset += count
            first = _advance(waiting, first, count)

    def map(self) -> Buffer:
        """Return all bytes as mapped memory; see `shardpoint.storage.base.MappableFile`."""
        try:
            return memoryview(mmap.mmap(self._descriptor, self._size, access=mmap.ACCESS_READ))
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else OSError(str(error))
            raise refused("map", self._path, cause) from error

    def read_spans(self, starts: npt.NDArray[np.int64], length: int, into: Buffer) -> None:
        """Fill a buffer with spans of one length, one after the other; see `SpanReadable`."""
        done = gather(self._descriptor, starts, length, into)
        at = done * length
        preadv, descriptor = os.preadv, self._descriptor
        for start in starts[done:].tolist():
            span = into[at : at + length]
            at += length
            try:
                count = preadv(descriptor, [span], start)
            except OSError as error:
                raise refused(f"read at byte {start} of", self._path, error) from error
            if count != length:
                self.read_into(start + count, [span[count:]])


class LocalWritableFile(_LocalFile):
    """A new file open for writing; implements `shardpoint.storage.base.WritableFile`."""

    def write_from(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write all buffers from `offset` on; see the protocol."""
        waiting = [buffer for buffer in buffers if len(buffer)]
        first = 0
        while first < len(waiting):
            batch = waiting[first : first + _VECTOR_LIMIT]
            try:
                count = os.pwritev(self._descriptor, batch, offset)
            except OSError as error:
                raise refused(f"write at byte {offset} of", self._path, error) from error
            if count == 0:
                raise StorageError(f"cannot write at byte {offset} of {self._path!r}: no progress")
            offset += count
            first = _advance(waiting, first, count)

    def start_writeback(self, offset: int, length: int) -> None:
        """Let the system begin to move a span to the disk; errors show in `sync`."""
        descriptor = self._descriptor
        if _sync_file_range is not None and descriptor >= 0:
            _sync_file_range(descriptor, offset, length, _START_ONLY)

    def sync(self) -> None:
        """Return only when everything written is durable."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            raise refused("sync", self._path, error) from error


def _advance(waiting: list[Buffer], first: int, count: int) -> int:
    """Drop `count` transferred bytes from the front; return the first buffer not done.

    The kernel may stop anywhere (at 2 GiB, at a signal), also within a buffer.
    """
    while first < len(waiting) and count >= len(waiting[first]):
        count -= len(waiting[first])
        first += 1
    if count:
        waiting[first] = waiting[first][count:]
    return first
