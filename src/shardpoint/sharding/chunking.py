"""One axis cut into pieces of one length, as ``torch.chunk``, ``Shard(axis)`` and FSDP2 do it."""

from __future__ import annotations

from shardpoint.errors import PlanError

__all__ = ["chunk_length", "chunk_spans", "split_length"]


def split_length(extent: int, pieces: int) -> int:
    """Return the length of every piece but the last ones: `extent` over `pieces`, rounded up.

    Raises
    ------
    PlanError
        If `extent` is negative or there are no pieces.
    """
    if extent < 0 or pieces < 1:
        raise PlanError(f"cannot cut an axis of {extent} elements into {pieces} pieces")
    return -(-extent // pieces)


def chunk_length(extent: int, length: int, position: int) -> int:
    """Return the length of one piece: `length`, less at the end, 0 after it."""
    return max(min(extent, length * (position + 1)) - length * position, 0)


def chunk_spans(extent: int, pieces: int) -> list[tuple[int, int]]:
    """Return the (offset, length) of every piece of an axis.

    Pieces after the axis's end are empty and begin there.

    Examples
    --------
    >>> chunk_spans(10, 4)
    [(0, 3), (3, 3), (6, 3), (9, 1)]
    >>> chunk_spans(2, 3)
    [(0, 1), (1, 1), (2, 0)]
    """
    length = split_length(extent, pieces)
    return [(min(length * i, extent), chunk_length(extent, length, i)) for i in range(pieces)]
