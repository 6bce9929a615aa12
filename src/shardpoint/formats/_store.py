"""What the readers of whole files need of a store.

`shardpoint.storage.Storage` has it. It is said here once more because formats and storage are
of the same layer and know nothing of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from shardpoint.formats._zip_reading import ReadAt

__all__ = ["OpenFile", "Store", "reader_of"]


class OpenFile(Protocol):
    """An open file, to be used as a context manager."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read_into(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Fill all buffers, one after the other, or raise."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


class Store(Protocol):
    """A place where files lie; it confines names, and raises errors of its own."""

    @property
    def location(self) -> str:
        """For messages."""

    def list_folder(self, folder: str = "") -> list[str]:
        """Return what is directly in one folder, sorted; names of folders end with ``/``."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def open(self, name: str) -> OpenFile:
        """Open a file for reading."""


def reader_of(file: OpenFile) -> ReadAt:
    """Return what reads pieces of an open file."""

    def read_at(offset: int, length: int) -> bytes:
        data = bytearray(length)
        file.read_into(offset, [memoryview(data)])
        return bytes(data)

    return read_at
