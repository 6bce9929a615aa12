"""Records that are compressed or encrypted on their way into a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

import numpy as np

from shardpoint.engine._write_streams import parts_of
from shardpoint.engine.sources import AnyRecord, RecordSource
from shardpoint.engine.written import WrittenRecords
from shardpoint.errors import PlanError
from shardpoint.formats.checksum import BytesLike, crc32
from shardpoint.transforms import Encoded, FrameMap, NumberedFrame

__all__ = ["Encode", "EncodedRecords", "frame_threads"]

Encode: TypeAlias = "Callable[[Iterable[memoryview], int | None], Iterable[BytesLike]]"
"""``encode(blocks, bytes of an element or None)`` yields what goes into the file. A block is
used only until the next one is taken."""

_ALONE = 64  # frames of a record that are encoded in its own thread: they are small ones
_GATHERED = 256 << 10  # bytes of frames that are written at once
_AHEAD = 2  # frames in the making, for each thread


@dataclass(slots=True)
class _Payload:
    """Where the payload is in a record before it is encoded, known when that is done."""

    offset: int = 0
    length: int = 0


class EncodedRecords:
    """The records of one file, each of which goes through an encoder.

    Parameters
    ----------
    records
        What is to be encoded.
    element_sizes
        Bytes of the elements of each record's payload; None where there are none.
    encode
        Encodes one record.
    """

    def __init__(
        self,
        records: Sequence[AnyRecord],
        element_sizes: Sequence[int | None],
        encode: Encode,
    ) -> None:
        self._payloads = [_Payload() for _ in records]
        self.records: list[AnyRecord] = [
            RecordSource(length=None, payload=(_EncodedSource(record, size, encode, payload),))
            for record, size, payload in zip(records, element_sizes, self._payloads, strict=True)
        ]
        """What the engine writes."""

    def decoded(self, written: WrittenRecords) -> WrittenRecords:
        """Return the columns with payloads as readers need them: as they are in decoded records.

        Offsets count from the start of each record. Of what is encoded there are no checksums
        (those of payloads are 0, and there are no blocks): an index is in plain text, and the
        CRC-32 of a secret number is the number.
        """
        table = np.array(
            [(payload.offset, payload.length) for payload in self._payloads],
            np.int64,
        ).reshape(-1, 2)
        return replace(
            written,
            payload_offset=table[:, 0].copy(),
            payload_length=table[:, 1].copy(),
            payload_checksum=np.zeros(len(table), np.uint32),
            first_block=np.zeros(len(table) + 1, np.int64),
            blocks=np.zeros(0, np.uint32),
        )


class _EncodedSource:
    """The bytes of an encoded record, as a `TensorSource` of unknown size."""

    nbytes: int | None = None

    def __init__(
        self, record: AnyRecord, element_size: int | None, encode: Encode, payload: _Payload
    ) -> None:
        self._record = record
        self._element_size = element_size
        self._encode = encode
        self._payload = payload

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        """See `TensorSource`."""
        pieces = self._encode(self._plain(block_size), self._element_size)
        for block in _gathered(pieces, min(_GATHERED, block_size)):
            for start in range(0, len(block), block_size):
                yield block[start : start + block_size]

    def _plain(self, block_size: int) -> Iterator[memoryview]:
        """Yield the record, and note where its payload is."""
        parts = parts_of(self._record)
        head = memoryview(parts.head)
        yield head
        checksum = length = 0
        for block in parts.blocks(block_size):
            checksum = crc32(block, checksum)
            length += len(block)
            yield block
        tail = memoryview(parts.tail(checksum))
        total = len(head) + length + len(tail)
        if parts.length is not None and parts.length != total:
            raise PlanError(f"a record's source announced {parts.length} bytes and gave {total}")
        self._payload.offset, self._payload.length = len(head), length
        yield tail


def _gathered(pieces: Iterable[BytesLike], enough: int) -> Iterator[memoryview]:
    """Yield the same bytes in pieces that are worth a call of the store each, but the last."""
    held: list[BytesLike] = []
    nbytes = 0
    for piece in pieces:
        held.append(piece)
        nbytes += len(piece)
        if nbytes >= enough:
            yield memoryview(b"".join(held))
            held, nbytes = [], 0
    if held:
        yield memoryview(b"".join(held))


@contextmanager
def frame_threads(threads: int) -> Iterator[FrameMap]:
    """Give what encodes the frames of records side by side, a bounded number ahead.

    Several records may use it at once. A failure is raised where the frame's turn comes.

    Parameters
    ----------
    threads
        How many frames may be encoded at once. With one, all is done by the caller.
    """
    if threads <= 1:
        yield map
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="shardpoint-encode") as pool:
        most = _AHEAD * threads

        def in_order(
            encode: Callable[[NumberedFrame], Encoded], frames: Iterable[NumberedFrame]
        ) -> Iterator[Encoded]:
            rest = iter(frames)
            yield from map(encode, islice(rest, _ALONE))
            pending: deque[Future[Encoded]] = deque()
            try:
                for frame in rest:
                    pending.append(pool.submit(encode, frame))
                    if len(pending) > most:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

        yield in_order
