"""Which rank writes a piece that several ranks hold."""

from __future__ import annotations

import heapq
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["choose_owners", "spread_rows"]

Int64Array: TypeAlias = npt.NDArray[np.int64]

_MANY = 48  # from here on numpy finds the least of some numbers faster than Python


def choose_owners(
    replica_group: Int64Array,
    rank: Int64Array,
    nbytes: Int64Array,
    world_size: int,
    *,
    lowest_rank: bool = False,
) -> npt.NDArray[np.bool_]:
    """Choose one keeper of each group of replicas.

    Pieces that only one rank holds count towards that rank's load from the start. The
    others go, largest first, to the least loaded of their ranks (longest processing time
    first: R. L. Graham, "Bounds on multiprocessing timing anomalies", 1969); among equals
    to the lowest rank. The result depends on the set of rows only, not on their order.

    Parameters
    ----------
    replica_group
        ``int64[n]``: rows with equal numbers are copies of one piece.
    rank
        ``int64[n]``: who holds it, in ``range(world_size)``.
    nbytes
        ``int64[n]``: the bytes that this rank would write.
    lowest_rank
        Give every group to its lowest rank instead.

    Returns
    -------
    ``bool[n]``, true for the one row of each group to keep.
    """
    keep = np.zeros(len(replica_group), np.bool_)
    if not len(keep):
        return keep
    if bool((replica_group[1:] >= replica_group[:-1]).all()) and not bool(
        ((rank[1:] <= rank[:-1]) & (replica_group[1:] == replica_group[:-1])).any()
    ):
        order = np.arange(len(rank))  # as planning brings them
    else:
        order = np.lexsort((rank, replica_group))
    group = replica_group[order]
    first = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]]))
    copies = np.diff(np.append(first, len(group)))
    alone = copies == 1
    keep[order[first[alone | lowest_rank]]] = True
    if lowest_rank or alone.all():
        return keep
    load = np.zeros(world_size, np.int64)
    kept = order[first[alone]]
    np.add.at(load, rank[kept], nbytes[kept])
    largest = np.maximum.reduceat(nbytes[order], first)
    shared = np.flatnonzero(~alone)
    shared = shared[np.argsort(-largest[shared], kind="stable")]
    keep[order[_least_loaded(load, rank[order], nbytes[order], first[shared], copies[shared])]] = (
        True
    )
    return keep


def _least_loaded(
    load: Int64Array, rank: Int64Array, nbytes: Int64Array, first: Int64Array, copies: Int64Array
) -> list[int]:
    """Return the row to keep of each group, the rows ``first:first + copies``, in turn."""
    if int(copies.max()) > _MANY:
        chosen = []
        for begin, count in zip(first.tolist(), copies.tolist(), strict=True):
            row = begin + int(load[rank[begin : begin + count]].argmin())
            load[rank[row]] += nbytes[row]
            chosen.append(row)
        return chosen
    loads, ranks, sizes = load.tolist(), rank.tolist(), nbytes.tolist()
    chosen = []
    for begin, count in zip(first.tolist(), copies.tolist(), strict=True):
        candidates = [loads[r] for r in ranks[begin : begin + count]]
        row = begin + candidates.index(min(candidates))
        loads[ranks[row]] += sizes[row]
        chosen.append(row)
    return chosen


def spread_rows(
    objects: Int64Array, tensors: Int64Array, nbytes: Int64Array, count: int
) -> list[Int64Array]:
    """Spread the rows of one rank over its files, objects first in each.

    Objects are dealt out in turn; tensors go, largest first, to the file with the fewest bytes.

    Parameters
    ----------
    objects, tensors
        ``int64[n]``: numbers of rows.
    nbytes
        ``int64[n]``: bytes of each of the tensors.
    count
        How many files there may be.

    Returns
    -------
    list of int64[n]
        The rows of each file that has any.
    """
    if count == 1:
        files = [np.concatenate([objects, tensors])]
    else:
        dealt: list[list[int]] = [[] for _ in range(count)]
        loads = [(0, number) for number in range(count)]
        order = np.argsort(-nbytes, kind="stable")
        for row, size in zip(tensors[order].tolist(), nbytes[order].tolist(), strict=True):
            load, number = loads[0]
            dealt[number].append(row)
            heapq.heapreplace(loads, (load + size, number))
        files = [
            np.concatenate([objects[number::count], np.array(rows, np.int64)])
            for number, rows in enumerate(dealt)
        ]
    return [rows for rows in files if len(rows)]
