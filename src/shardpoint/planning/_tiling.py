"""Which tensors are cut into a regular grid: the common case, proved without comparing pairs."""

from __future__ import annotations

import numpy as np

from shardpoint.region import BoolArray, Int64Array

__all__ = ["is_grid"]

_KEY_LIMIT = 2**62


def is_grid(
    shape: Int64Array, tensor: Int64Array, offsets: Int64Array, sizes: Int64Array
) -> BoolArray:
    """Tell which tensors are proved to be covered, each element by exactly one box.

    A tensor is, if its boxes are all cells of a grid: along every axis each of them ends where
    the next larger start of the tensor's boxes is, or at the tensor's end. Then two boxes are
    the same cell or share nothing, and as many different cells as the grid has are the tensor.
    False says nothing.

    Parameters
    ----------
    shape
        ``int64[n, D]``: the tensors' shapes.
    tensor
        ``int64[m]``: the tensor of each box, ascending.
    offsets, sizes
        ``int64[m, D]``: boxes that lie in their tensors.
    """
    count = len(shape)
    if (sizes == 0).any():
        holds = (sizes != 0).all(axis=1)
        tensor, offsets, sizes = tensor[holds], offsets[holds], sizes[holds]
    if not len(tensor):
        empty: BoolArray = (shape == 0).any(axis=1)
        return empty
    boxes = np.bincount(tensor, minlength=count)
    good = np.ones(count, np.bool_)
    cells = np.ones(count, np.float64)  # exact up to 2**53, and there are never so many boxes
    code = tensor  # which cell, axis by axis
    codes = count
    for axis in range(offsets.shape[1]):
        start, extent = offsets[:, axis], shape[tensor, axis]
        end = start + sizes[:, axis]
        if not start.any() and (end == extent).all():
            continue
        span = int(shape[:, axis].max()) + 1
        if span * count >= _KEY_LIMIT or span * codes >= _KEY_LIMIT:
            return np.zeros(count, np.bool_)
        starts = tensor * span + start
        is_sorted = bool((starts[1:] >= starts[:-1]).all())
        edges = starts if is_sorted else np.sort(starts)
        edges = edges[np.concatenate([[True], edges[1:] != edges[:-1]])]
        at = np.searchsorted(edges, starts) if not is_sorted else _run_numbers(starts)
        owner = edges // span
        per_tensor = np.bincount(owner, minlength=count)
        last = np.concatenate([owner[1:] != owner[:-1], [True]])
        following = np.where(last, owner * span + shape[owner, axis], np.append(edges[1:], 0))
        first = np.concatenate([[True], last[:-1]])
        good[owner[first & (edges != owner * span)]] = False
        good[tensor[tensor * span + end != following[at]]] = False
        cells *= np.maximum(per_tensor, 1)
        code = code * span + start
        codes *= span
    good &= boxes == np.where((shape == 0).any(axis=1), 0, cells)
    different = code[1:] > code[:-1]
    if not different.all():
        ordered = np.sort(code)
        again = np.flatnonzero(ordered[1:] == ordered[:-1])
        good[ordered[again] // (codes // count)] = False
    return good


def _run_numbers(ordered: Int64Array) -> Int64Array:
    return np.cumsum(np.concatenate([[0], ordered[1:] != ordered[:-1]]))
