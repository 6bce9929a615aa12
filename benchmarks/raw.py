"""The limit: the same bytes with `os.pwritev` and `os.preadv`, and nothing else.

No metadata, no checksum, no format. Buffers are moved in vectored calls of up to 1 MiB: a
file is preallocated and written by one thread, since more only wait for each other there, and
read by as many threads as there are processors. Larger calls are no faster, and to write by
them can be much slower: Linux then takes huge pages for its cache, which a virtual machine may
have to get back from its host first.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

__all__ = ["read", "side_by_side", "write"]

_BLOCK = 1 << 20
_VECTOR = 1024
_THREADS = min(4, os.cpu_count() or 1)

Call = Callable[[int, Any, int], int]


def write(path: Path, buffers: Sequence[memoryview], *, sync: bool) -> None:
    """Write buffers one after the other into a new file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        length = sum(map(len, buffers))
        if length:
            os.posix_fallocate(descriptor, 0, length)
        _run(os.pwritev, descriptor, _packed(buffers), threads=1)
        if sync:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if sync:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Path, buffers: Sequence[memoryview], offsets: Sequence[int] | None = None) -> None:
    """Fill buffers from a file; one after the other, or each from its own offset."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if offsets is None:
            _run(os.preadv, descriptor, _packed(buffers), threads=_THREADS)
        else:
            works = zip(([buffer] for buffer in buffers), offsets, strict=True)
            _run(os.preadv, descriptor, works, threads=_THREADS)
    finally:
        os.close(descriptor)


def _packed(buffers: Sequence[memoryview]) -> Iterator[tuple[list[memoryview], int]]:
    """Yield vectors of at most `_BLOCK` bytes, and where in the file each begins."""
    vector: list[memoryview] = []
    length = offset = 0
    for buffer in buffers:
        for start in range(0, len(buffer), _BLOCK):
            block = buffer[start : start + _BLOCK]
            if vector and (length + len(block) > _BLOCK or len(vector) == _VECTOR):
                yield vector, offset
                offset, vector, length = offset + length, [], 0
            vector.append(block)
            length += len(block)
    if vector:
        yield vector, offset


def _run(call: Call, descriptor: int, works: Any, *, threads: int) -> None:
    works = list(works)

    def move(numbers: range) -> None:
        for number in numbers:
            _move(call, descriptor, *works[number])

    side_by_side(move, len(works), threads=threads)


def side_by_side(move: Callable[[range], object], count: int, *, threads: int = _THREADS) -> None:
    """Call a function with ranges that together are all numbers below `count`."""
    if threads == 1 or count < 2:
        move(range(count))
        return
    share = max(1, -(-count // (threads * 4)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(move, [range(n, min(n + share, count)) for n in range(0, count, share)]))


def _move(call: Call, descriptor: int, vector: list[memoryview], offset: int) -> None:
    done = call(descriptor, vector, offset)
    while done < sum(map(len, vector)):
        if done == 0:
            raise OSError(f"the file ends at {offset}")
        offset += done
        rest = []
        for buffer in vector:
            rest.append(buffer[done:])
            done = max(0, done - len(buffer))
        vector = [buffer for buffer in rest if len(buffer)]
        done = call(descriptor, vector, offset)
