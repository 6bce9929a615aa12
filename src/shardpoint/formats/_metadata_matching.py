"""Finds for each chunk the entry of ``storage_data`` that is about it, for all chunks at once."""

from __future__ import annotations

from typing import Any

import numpy as np

from shardpoint.formats._metadata_cursors import Int64s
from shardpoint.formats._pickle_opcodes import RunsRefused

__all__ = ["match_offsets"]


def match_offsets(
    chunk_tensor: Int64s,
    chunk_offset: Int64s,
    counts: Int64s,
    tensor: Int64s,
    offset: Int64s,
    position: Int64s,
) -> Int64s:
    """Return for each chunk the last entry with its tensor and offset, or -1.

    Parameters
    ----------
    chunk_tensor, chunk_offset
        ``int64[m]``, ``int64[m, D]``: of the chunks, grouped by tensor.
    counts
        ``int64[t]``: chunks of each tensor.
    tensor, offset
        ``int64[n]``, ``int64[n, D]``: of the entries.
    position
        ``int64[n]``: where the chunk may be in its tensor's list, or -1.

    Raises
    ------
    RunsRefused
        If entries collide, which only made ones do.
    """
    first = np.cumsum(counts) - counts
    result = np.full(len(chunk_tensor), -1, np.int64)
    if not len(tensor) or not len(chunk_tensor):
        return result
    if len(tensor) == len(chunk_tensor) and ((position >= 0) & (position < counts[tensor])).all():
        # As torch writes it: each entry says where its chunk is in the list, and is alone.
        chunk = first[tensor] + position
        result[chunk] = np.arange(len(chunk))
        if (
            (result >= 0).all()
            and (chunk_offset[chunk] == offset).all()
            and _ascends(chunk_tensor, chunk_offset)
        ):
            return result
    wanted, given = _hashes(chunk_tensor, chunk_offset), _hashes(tensor, offset)
    order = np.argsort(given, kind="stable")
    given = given[order]
    alike = np.flatnonzero(given[1:] == given[:-1])
    if (
        (tensor[order[alike]] != tensor[order[alike + 1]])
        | (offset[order[alike]] != offset[order[alike + 1]]).any(axis=1)
    ).any():
        raise RunsRefused  # different ones with the same hash
    at = np.searchsorted(given, wanted, side="right") - 1
    entry = order[np.maximum(at, 0)]
    equal = (tensor[entry] == chunk_tensor) & (offset[entry] == chunk_offset).all(axis=1)
    return np.where((at >= 0) & equal, entry, -1)


def _ascends(tensor: Int64s, offset: Int64s) -> bool:
    """Return whether the offsets of each tensor's chunks ascend, so that none is there twice."""
    ascends = np.zeros(max(len(tensor) - 1, 0), np.bool_)
    undecided = ~ascends
    for axis in range(offset.shape[1]):
        before, after = offset[:-1, axis], offset[1:, axis]
        ascends |= undecided & (before < after)
        undecided &= before == after
    return bool((ascends | (tensor[:-1] != tensor[1:])).all())


def _hashes(tensor: Int64s, offset: Int64s) -> Any:
    result = tensor.astype(np.uint64)
    for axis in range(offset.shape[1]):
        result = (result ^ (result >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
        result += offset[:, axis].astype(np.uint64)
    return (result ^ (result >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
