"""CRC-32 values of many byte spans of files, with bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt

from shardpoint.engine._files import BufferPool, OpenFiles
from shardpoint.engine.executor import run_tasks
from shardpoint.errors import ShardpointError
from shardpoint.formats.checksum import crc32, crc32_combine
from shardpoint.storage import Storage

__all__ = ["SpanChecksums", "Spans", "checksum_spans"]

_PIECE = 4 << 20  # what one thread reads at once
_ROUND = 16  # pieces for each thread between two reports of progress


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """Byte spans of files.

    Attributes
    ----------
    names
        Of the files.
    file
        ``int64[n]``: position in `names`.
    start, length
        ``int64[n]``, not negative.
    """

    names: Sequence[str]
    file: npt.NDArray[np.int64]
    start: npt.NDArray[np.int64]
    length: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.start)


@dataclass(frozen=True, slots=True, eq=False)
class SpanChecksums:
    """What was found.

    Attributes
    ----------
    values
        ``int64[n]``: CRC-32 of each span; meaningless where there was an error.
    errors
        By span: why it could not be read.
    bytes_read
        Of all spans.
    """

    values: npt.NDArray[np.int64]
    errors: dict[int, ShardpointError]
    bytes_read: int


@dataclass(frozen=True, slots=True)
class _Piece:
    span: int
    file: int
    start: int
    length: int
    number: int


def checksum_spans(
    storage: Storage,
    spans: Spans,
    *,
    threads: int,
    progress: Callable[[int], None] | None,
) -> SpanChecksums:
    """Read spans, neighbours together, and take their checksums.

    Holds 4 MiB for each thread. Errors of shardpoint's are those of the spans that they
    concern; the others are read all the same.

    Parameters
    ----------
    progress
        Told now and then, in the calling thread, how many bytes more have been read.
    """
    pieces = list(_pieces(spans))
    values = [0] * len(pieces)
    errors: dict[int, ShardpointError] = {}
    pool = BufferPool(_PIECE)
    runs = _runs(pieces)
    with OpenFiles(storage) as files:
        while batch := list(islice(runs, _ROUND * max(threads, 1))):
            run_tasks(
                (partial(_read_run, run, spans, files, pool, values, errors) for run in batch),
                threads=threads,
                name="shardpoint-verify",
            )
            if progress is not None:
                progress(sum(piece.length for run in batch for piece in run))
        bytes_read = files.bytes_read
    combined = np.zeros(len(spans), np.int64)
    for piece in pieces:
        value = values[piece.number]
        if piece.start != spans.start[piece.span]:
            value = crc32_combine(int(combined[piece.span]), value, piece.length)
        combined[piece.span] = value
    return SpanChecksums(combined, errors, bytes_read)


def _pieces(spans: Spans) -> Iterator[_Piece]:
    """Cut spans into pieces that fit into a buffer, in the order of the files."""
    number = 0
    order = np.lexsort((spans.start, spans.file))
    columns = (column[order].tolist() for column in (spans.file, spans.start, spans.length))
    for span, file, start, length in zip(order.tolist(), *columns, strict=True):
        for at in range(0, length, _PIECE):
            yield _Piece(span, file, start + at, min(_PIECE, length - at), number)
            number += 1


def _runs(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Group pieces that follow each other in a file and fit into one buffer."""
    run: list[_Piece] = []
    end = room = 0
    for piece in pieces:
        if run and (piece.file != run[0].file or piece.start != end or piece.length > room):
            yield run
            run = []
        if not run:
            room = _PIECE
        run.append(piece)
        end, room = piece.start + piece.length, room - piece.length
    if run:
        yield run


def _read_run(
    run: Sequence[_Piece],
    spans: Spans,
    files: OpenFiles,
    pool: BufferPool,
    values: list[int],
    errors: dict[int, ShardpointError],
) -> None:
    first = run[0].start
    try:
        with pool.take() as buffer, files.use(spans.names[run[0].file]) as file:
            data = buffer[: run[-1].start + run[-1].length - first]
            file.read_into(first, [data])
            for piece in run:
                at = piece.start - first
                values[piece.number] = crc32(data[at : at + piece.length])
    except ShardpointError as error:
        if len(run) == 1:
            errors.setdefault(run[0].span, error)
            return
        for piece in run:
            _read_run([piece], spans, files, pool, values, errors)
