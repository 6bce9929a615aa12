"""Which transform a descriptor means, and several of them undone in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from shardpoint.transforms._records import (
    MemoryRecord,
    Origin,
    RecordBytes,
    Tally,
    Transform,
    read_at,
)
from shardpoint.transforms.aes_gcm import AesGcmWithoutKey
from shardpoint.transforms.shuffle_zstd import ShuffleZstd
from shardpoint.transforms.zstd import Zstd

__all__ = ["TransformFinder", "Transforms", "decode", "open_record"]

_MOST = 8
_SLACK = 1 << 20


class TransformFinder(Protocol):
    """Knows transforms by their descriptors."""

    def find(self, descriptor: str, origin: Origin) -> Transform:
        """Return what undoes a transform.

        Raises
        ------
        NotSupportedError
            If there is none; names the descriptor, and says how to give one.
        """
        ...


class Transforms:
    """The transforms that shardpoint knows itself, and those that a caller adds.

    Parameters
    ----------
    added
        Each takes the place of one of the same name, if there is one.
    """

    def __init__(self, added: Iterable[Transform] = ()) -> None:
        known: list[Transform] = [Zstd(), ShuffleZstd(), AesGcmWithoutKey(), *added]
        self._by_name = {transform.name: transform for transform in known}

    def find(self, descriptor: str, origin: Origin) -> Transform:
        """See `TransformFinder`."""
        name = descriptor.partition("/")[0]
        if name not in self._by_name:
            raise origin.not_supported(
                f"unknown transform {descriptor!r}; known: "
                f"{', '.join(map(repr, self._by_name))}; give one that undoes it to "
                f"shardpoint.open(..., transforms=[...]), or register its extension in the "
                f"ExtensionRegistry that FileSystemReader is given"
            )
        return self._by_name[name]


def open_record(
    finder: TransformFinder,
    descriptors: Sequence[str],
    stored: RecordBytes,
    *,
    most: int,
    origin: Origin,
    tally: Tally | None,
) -> RecordBytes:
    """Return a record with its transforms undone, the last one first.

    torch lists them in the order in which they were applied (observed with torch 2.13:
    ``_extensions=[A, B]`` writes ``A(B(record))`` and the descriptors of B, A).

    Parameters
    ----------
    finder
        Knows the transforms.
    descriptors
        As in the metadata, such as ``("stream.zstd/1",)``.
    stored
        The record as it lies in the file.
    most
        The most bytes that the record itself can have.
    origin
        For messages.
    tally
        Counts the bytes of the record that are decoded, or None.

    Raises
    ------
    NotSupportedError
        If a descriptor is unknown, or a package or a key is missing.
    CorruptionError
        If the bytes are damaged or incomplete; reading from the result may raise it too.
    LimitExceededError
        If the result would have more than `most` bytes; found before they are made.
    """
    if len(descriptors) > _MOST:
        raise origin.too_large(
            f"{len(descriptors)} transforms on one record, of which {_MOST} may be"
        )
    transforms = [finder.find(descriptor, origin) for descriptor in descriptors]
    for step in range(len(descriptors) - 1, -1, -1):
        # What is still compressed is hardly larger than what it becomes.
        limit = most if step == 0 else most + (most >> 6) + _SLACK
        stored = transforms[step].undo(
            stored,
            descriptors[step].partition("/")[2],
            most=limit,
            origin=origin,
            tally=tally if step == 0 else None,
        )
    return stored


def decode(
    descriptors: Sequence[str],
    data: bytes | bytearray | memoryview,
    *,
    finder: TransformFinder,
    max_size: int,
    key: str,
    file: str,
) -> memoryview:
    """Undo the transforms of a whole record in memory; as `open_record`."""
    origin = Origin(key, file)
    record = open_record(
        finder, descriptors, MemoryRecord(data), most=max_size, origin=origin, tally=None
    )
    if isinstance(record, MemoryRecord):
        return record.memory()
    return memoryview(read_at(record, 0, record.size))
