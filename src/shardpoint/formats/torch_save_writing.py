"""Writes whole ``torch.save`` files piece by piece: one pickle and any number of storages.

The bytes are laid out as those of torch 2.7 and later (see `_zip_writing`); the folder inside
the zip is called ``archive``, as torch calls it in streams.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from shardpoint.errors import PlanError
from shardpoint.formats._record_layout import (
    BEFORE,
    FINGERPRINT,
    FINGERPRINT_LENGTH,
    PICKLE,
    PREFIX,
    VERSION,
)
from shardpoint.formats._zip_writing import (
    central_entry,
    descriptor,
    descriptor_length,
    end,
    local_header,
)
from shardpoint.formats.checksum import BytesLike, crc32

__all__ = ["torch_save_length", "torch_save_pieces"]


_NOTHING = memoryview(b"")


def torch_save_length(pickle: bytes, sizes: Sequence[int]) -> int:
    """Return how many bytes `torch_save_pieces` gives."""
    position = directory = count = 0
    for name, size in _members(pickle, sizes):
        header = len(local_header(name, position, size))
        directory += len(central_entry(name, position, size, 0))
        position += header + size + descriptor_length(position, size)
        count += 1
    return position + directory + len(end(count, position, directory))


def torch_save_pieces(
    pickle: bytes, sizes: Sequence[int], blocks: Callable[[int], Iterable[memoryview]]
) -> Iterator[BytesLike]:
    """Yield the bytes of a file, in order.

    Parameters
    ----------
    pickle
        With a persistent id for each storage, whose key is its number.
    sizes
        The storages' bytes.
    blocks
        Gives the bytes of a storage, called once for each, in order. A block is used only
        until the next one is asked for.

    Raises
    ------
    PlanError
        If a storage's blocks have another length than announced.
    """
    zip_ = _Directory()
    yield from zip_.add(PICKLE, pickle)
    for name, data in BEFORE:
        yield from zip_.add(name, data)
    fingerprint = 0
    for number, size in enumerate(sizes):
        yield zip_.begin(_storage_name(number), size)
        crc = found = 0
        for block in blocks(number):
            crc = crc32(block, crc)
            found += len(block)
            yield block
            block = _NOTHING  # its memory may be all of the tensor's
        if found != size:
            raise PlanError(f"storage {number} was announced with {size} bytes and has {found}")
        fingerprint = crc32(crc.to_bytes(4, "little"), fingerprint)
        yield zip_.close(crc)
    yield from zip_.add(*VERSION)
    yield from zip_.add(FINGERPRINT, b"%020d%020d" % (crc32(pickle), fingerprint))
    yield zip_.finish()


def _storage_name(number: int) -> bytes:
    return b"%sdata/%d" % (PREFIX, number)


def _members(pickle: bytes, sizes: Sequence[int]) -> Iterator[tuple[bytes, int]]:
    yield PICKLE, len(pickle)
    for name, data in BEFORE:
        yield name, len(data)
    for number, size in enumerate(sizes):
        yield _storage_name(number), size
    yield VERSION[0], len(VERSION[1])
    yield FINGERPRINT, FINGERPRINT_LENGTH


class _Directory:
    """Where the members are, and the directory at the end."""

    def __init__(self) -> None:
        self._position = 0
        self._entries: list[bytes] = []
        self._open = (b"", 0, 0)

    def begin(self, name: bytes, size: int) -> bytes:
        header = local_header(name, self._position, size)
        self._open = (name, self._position, size)
        self._position += len(header) + size
        return header

    def close(self, crc: int) -> bytes:
        name, position, size = self._open
        after = descriptor(position, size, crc)
        self._position += len(after)
        self._entries.append(central_entry(name, position, size, crc))
        return after

    def add(self, name: bytes, data: bytes) -> Iterator[bytes]:
        yield self.begin(name, len(data))
        yield data
        yield self.close(crc32(data))

    def finish(self) -> bytes:
        directory = b"".join(self._entries)
        return directory + end(len(self._entries), self._position, len(directory))
