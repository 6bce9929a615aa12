"""Reads segments straight into the memory they go to, checking while the bytes are in cache."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

import numpy as np
from zlib_ng.zlib_ng import crc32

from shardpoint.engine._blocks import Blocks, blocks_of, damaged
from shardpoint.engine._checksums import PiecewiseChecksum
from shardpoint.engine._files import CountedFile, OpenFiles
from shardpoint.engine._segments import Segments
from shardpoint.engine.targets import Progress, Targets
from shardpoint.index import UNKNOWN, CheckpointIndex
from shardpoint.storage import Buffer

__all__ = ["DenseReader"]

_Task: TypeAlias = Callable[[], None]

_GROUP = 1 << 20  # small segments read in one call; as much as a core's cache holds
_READ = 1 << 20  # read at once where a checksum is taken: it is still in cache then
_PIECE = 8 << 20  # what one thread takes of a large segment
_BUFFERED = 256 << 10  # up to here, blocks around a segment are read with it into a buffer
_FREE_GAP = 2048  # between neighbours: the end of one record and the beginning of the next


class DenseReader:
    """Makes the tasks that read segments."""

    def __init__(
        self,
        index: CheckpointIndex,
        files: OpenFiles,
        segments: Segments,
        targets: Targets,
        progress: Progress,
        *,
        verify: bool,
        gap_ratio: float,
    ) -> None:
        self._index = index
        self._files = files
        self._segments = segments
        self._targets = targets
        self._progress = progress
        self._verify = verify
        self._gap_ratio = gap_ratio
        self._is_whole = segments.is_whole
        self._is_plain = self._is_whole if verify else np.ones(len(segments), np.bool_)
        self._scratch = memoryview(bytearray(max(_FREE_GAP, int(gap_ratio * _GROUP) + 1)))
        self._lock = threading.Lock()
        self.metadata_bytes = 0
        """Bytes between neighbours that were read with them."""

    def tasks(self) -> Iterator[_Task]:
        """Yield what is to be done, in the order of the files."""
        groups = self._segments.groups(
            most_bytes=_GROUP, gap_ratio=self._gap_ratio, free_gap=_FREE_GAP
        )
        for rows in groups:
            if len(rows) == 1 and self._segments.length[rows.start] > _GROUP:
                yield from self._large(rows.start)
            elif self._is_plain[rows.start : rows.stop].all():
                yield partial(self._read_neighbours, rows)
            else:
                yield partial(self._read_one_by_one, rows)

    def _name(self, row: int) -> str:
        return self._index.files[int(self._segments.file[row])]

    def _read_neighbours(self, rows: range) -> None:
        """Read segments that follow each other closely in one call, then check them."""
        segments, span = self._segments, slice(rows.start, rows.stop)
        numbers: list[int] = segments.number[span].tolist()
        starts, lengths = segments.start[span], segments.length[span]
        buffers = self._targets.buffers(numbers)
        if not segments.fills[span].all():
            spans = zip(segments.at[span].tolist(), lengths.tolist(), strict=True)
            buffers = [b[at : at + n] for b, (at, n) in zip(buffers, spans, strict=True)]
        gaps = starts[1:] - (starts + lengths)[:-1]
        with self._files.use(self._name(rows.start)) as file:
            file.read_into(int(starts[0]), self._with_gaps(buffers, gaps.tolist()))
        if self._verify:
            wanted = segments.checksum[span]
            found = np.fromiter(map(crc32, buffers), np.int64, len(buffers))
            wrong = np.flatnonzero((found != wanted) & (wanted != UNKNOWN))
            if len(wrong):
                self._fail(rows.start + int(wrong[0]), int(found[wrong[0]]))
        self._progress.finish(numbers)
        with self._lock:
            self.metadata_bytes += int(gaps[gaps <= _FREE_GAP].sum())

    def _with_gaps(self, buffers: list[Buffer], gaps: list[int]) -> list[Buffer]:
        """Return a vector that fills the buffers and puts what lies between them nowhere."""
        if not any(gaps):
            return buffers
        vector = buffers[:1]
        scratch = {gap: self._scratch[:gap] for gap in set(gaps)}
        for buffer, gap in zip(buffers[1:], gaps, strict=True):
            if gap:
                vector.append(scratch[gap])
            vector.append(buffer)
        return vector

    def _fail(self, row: int, found: int) -> None:
        segments = self._segments
        start = int(segments.origin[row])
        damaged(
            self._index,
            int(segments.chunk[row]),
            start=start,
            stop=start + int(segments.payload_length[row]),
            wanted=int(segments.checksum[row]),
            found=found,
        )

    def _read_one_by_one(self, rows: range) -> None:
        for row in rows:
            for task in self._large(row):
                task()

    def _large(self, row: int) -> Iterator[_Task]:
        """Yield the tasks that read one segment in pieces."""
        segments = self._segments
        begin = int(segments.start[row] - segments.origin[row])
        end = begin + int(segments.length[row])
        blocks = None
        if self._verify and not (self._is_whole[row] and segments.checksum[row] != UNKNOWN):
            blocks = blocks_of(self._index, int(segments.chunk[row]))
        pieces = list(_pieces(begin, end, blocks, self._gap_ratio))
        checksum = PiecewiseChecksum([last - first for first, last, _ in pieces])
        for number, (first, last, is_edge) in enumerate(pieces):
            if is_edge and blocks is not None:
                yield partial(self._read_edge, row, number, first, last, blocks, checksum)
            else:
                yield partial(self._read_piece, row, number, first, last, blocks, checksum)

    def _buffer(self, row: int, first: int, last: int) -> Buffer:
        """Return the target's memory for a span of the payload."""
        segments = self._segments
        (whole,) = self._targets.buffers([int(segments.number[row])])
        base = int(segments.at[row] - (segments.start[row] - segments.origin[row]))
        return whole[base + first : base + last]

    def _read_piece(
        self,
        row: int,
        number: int,
        first: int,
        last: int,
        blocks: Blocks | None,
        checksum: PiecewiseChecksum,
    ) -> None:
        into = self._buffer(row, first, last)
        origin = int(self._segments.origin[row])
        known = self._verify and int(self._segments.checksum[row]) != UNKNOWN
        found = 0
        with self._files.use(self._name(row)) as file:
            if blocks is not None:
                _read_blocks(file, first, into, blocks)
            elif known and self._is_whole[row]:
                for at in range(0, len(into), _READ):
                    block = into[at : at + _READ]
                    file.read_into(origin + first + at, [block])
                    found = crc32(block, found)
            else:
                file.read_into(origin + first, [into])
        self._finish(row, number, found, checksum)

    def _read_edge(
        self,
        row: int,
        number: int,
        first: int,
        last: int,
        blocks: Blocks,
        checksum: PiecewiseChecksum,
    ) -> None:
        """Read whole blocks, of which the target takes a part, through a buffer."""
        segments = self._segments
        data = memoryview(bytearray(last - first))
        with self._files.use(self._name(row)) as file:
            file.read_into(blocks.origin + first, [data])
        blocks.check(data, first)
        begin = int(segments.start[row]) - blocks.origin
        start, stop = max(first, begin), min(last, begin + int(segments.length[row]))
        self._buffer(row, start, stop)[:] = data[start - first : stop - first]
        self._finish(row, number, 0, checksum)

    def _finish(self, row: int, number: int, found: int, checksum: PiecewiseChecksum) -> None:
        if not checksum.put(number, found):
            return
        segments = self._segments
        wanted = int(segments.checksum[row])
        if self._verify and wanted != UNKNOWN and self._is_whole[row]:
            total = checksum.combined()
            if total != wanted:
                self._fail(row, total)
        self._progress.finish([int(segments.number[row])])


def _read_blocks(file: CountedFile, first: int, into: Buffer, blocks: Blocks) -> None:
    """Read a piece of a payload and compare the blocks that lie whole in it."""
    step = max(_READ - _READ % blocks.size, blocks.size)
    position, end = first, first + len(into)
    while position < end:
        stop = min((position // step + 1) * step, end)
        data = into[position - first : stop - first]
        file.read_into(blocks.origin + position, [data])
        blocks.check(data, position)
        position = stop


def _pieces(
    begin: int, end: int, blocks: Blocks | None, gap_ratio: float
) -> Iterator[tuple[int, int, bool]]:
    """Yield (first, last, is_edge) of what to read of a payload for ``begin:end`` of it.

    Edges are whole blocks that reach past what is wanted; there are none without blocks.
    """
    first, last = begin, end
    size = 1
    if blocks is not None:
        size = blocks.size
        first, last = blocks.widen(begin, end, gap_ratio)
        if (first, last) != (begin, end) and last - first <= max(_BUFFERED, size):
            yield first, last, True
            return
        if first < begin:
            yield first, first + size, True
            begin = first + size
        if last > end:
            edge = (end // size) * size
            yield edge, last, True
            end = edge
    step = max(_PIECE - _PIECE % size, size)
    while begin < end:
        stop = min((begin // step + 1) * step, end)
        yield begin, stop, False
        begin = stop
