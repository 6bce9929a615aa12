"""Reads the headers of records, so that every payload's place is known before data is read."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

from shardpoint.engine._files import CountedFile, OpenFiles
from shardpoint.engine._payload import from_image, from_record
from shardpoint.engine._readplan import ChunkWork
from shardpoint.formats.safetensors import read_header
from shardpoint.formats.torch_record import HEAD_BYTES, SMALL_RECORD_BYTES, TAIL_BYTES
from shardpoint.index import Container

__all__ = ["resolve_tasks"]

_BATCH = 64


def resolve_tasks(files: OpenFiles, works: Sequence[ChunkWork]) -> Iterator[Callable[[], None]]:
    """Yield tasks that find the payloads of these chunks, which are in file order."""
    for (file, container), group in groupby(works, key=lambda w: (w.place.file, w.place.container)):
        members = list(group)
        if container == Container.SAFETENSORS_IMAGE:
            for _, image in groupby(members, key=lambda w: w.place.record_offset):
                yield partial(_resolve_image, files, file, list(image))
        else:
            for start in range(0, len(members), _BATCH):
                yield partial(_resolve_records, files, file, members[start : start + _BATCH])


def _resolve_image(files: OpenFiles, name: str, works: Sequence[ChunkWork]) -> None:
    with files.use(name) as file:
        offset = works[0].place.record_offset
        header = read_header(file.read_at, file.size, offset=offset, file=name)
        for work in works:
            work.payload = from_image(work.place, header)


def _resolve_records(files: OpenFiles, name: str, works: Sequence[ChunkWork]) -> None:
    with files.use(name) as file:
        headers = _Headers(file, works)
        for work in works:
            place = work.place
            work.payload = from_record(
                place, headers.read_at, place.record_offset, place.record_length
            )


class _Headers:
    """Reads the ends of records; one's end and the next one's start in one go."""

    def __init__(self, file: CountedFile, works: Sequence[ChunkWork]) -> None:
        self._file = file
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._data: dict[int, bytes] = {}
        for work in works:
            start = work.place.record_offset
            end = start + work.place.record_length
            if work.place.record_length <= SMALL_RECORD_BYTES:
                self._add(start, end)
            else:
                self._add(start, start + HEAD_BYTES)
                self._add(end - TAIL_BYTES, end)

    def _add(self, start: int, end: int) -> None:
        if self._ends and self._starts[-1] <= start <= self._ends[-1]:
            self._ends[-1] = max(self._ends[-1], end)
        elif not self._ends or start > self._ends[-1]:
            self._starts.append(start)
            self._ends.append(end)

    def read_at(self, offset: int, length: int) -> bytes:
        """Return bytes of the file; each window is read once, when it is first needed."""
        window = bisect_right(self._starts, offset) - 1
        if window < 0 or offset + length > self._ends[window]:
            return self._file.read_at(offset, length)
        start = self._starts[window]
        data = self._data.get(window)
        if data is None:
            data = self._data[window] = self._file.read_at(start, self._ends[window] - start)
        return data[offset - start : offset - start + length]
