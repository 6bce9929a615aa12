"""What torch's checkpoint extensions did to a record on its way into the file, undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from shardpoint.errors import LimitExceededError, NotSupportedError, Problem
from shardpoint.transforms import zstd

__all__ = ["decode"]

_DECODERS: Mapping[str, Callable[[memoryview, int, str, str], bytes]] = MappingProxyType(
    {"stream.zstd/1": zstd.decompress}
)

_MOST = 8
_SLACK = 1 << 20


def decode(
    descriptors: tuple[str, ...],
    data: bytes | bytearray | memoryview,
    *,
    max_size: int,
    key: str,
    file: str,
) -> bytes:
    """Undo transforms of a record, the last one first.

    torch lists them in the order in which they were applied (observed with torch 2.13:
    ``_extensions=[A, B]`` writes ``A(B(record))`` and the descriptors of B, A).

    Parameters
    ----------
    descriptors
        As in the metadata, such as ``("stream.zstd/1",)``.
    data
        The bytes of the whole record in the file.
    max_size
        The most bytes that the record itself can have.
    key, file
        Where the record belongs, for messages.

    Raises
    ------
    NotSupportedError
        If a descriptor is unknown, or the package that undoes it is not installed.
    CorruptionError
        If the bytes are damaged or incomplete.
    LimitExceededError
        If the result would have more than `max_size` bytes; found before they are made.
    """
    if len(descriptors) > _MOST:
        message = f"{len(descriptors)} transforms on one record, of which {_MOST} may be"
        raise LimitExceededError(str(Problem(message, key, file)))
    for descriptor in descriptors:
        if descriptor not in _DECODERS:
            known = ", ".join(map(repr, _DECODERS))
            message = f"unknown transform {descriptor!r}; known: {known}"
            raise NotSupportedError(str(Problem(message, key, file)))
    view = memoryview(data)
    for step, descriptor in enumerate(reversed(descriptors), 1):
        # What is still compressed is hardly larger than what it becomes.
        limit = max_size if step == len(descriptors) else max_size + (max_size >> 6) + _SLACK
        view = memoryview(_DECODERS[descriptor](view, limit, key, file))
    return bytes(view)
