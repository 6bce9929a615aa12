"""Encoding on the way into a file: frames side by side, in order, a bounded number ahead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest

from shardpoint.engine.encoding import EncodedRecords, frame_threads
from shardpoint.engine.sources import AnyRecord, ArraySource, RecordSource
from shardpoint.engine.writing import write_files
from shardpoint.errors import PlanError
from shardpoint.formats.checksum import crc32
from shardpoint.storage import LocalStorage
from shardpoint.transforms import (
    Encoded,
    MemoryRecord,
    NumberedFrame,
    Origin,
    ShuffleZstd,
    Transforms,
    open_record,
    read_at,
)


def _encode(frame: NumberedFrame) -> Encoded:
    number, data = frame
    return (len(data), number, 0), bytes(data)


def _frames(count: int) -> Iterator[NumberedFrame]:
    for number in range(count):
        yield number, bytearray(b"%d" % number)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 300])
def test_frames_come_in_order(threads: int, count: int) -> None:
    def encode(frame: NumberedFrame) -> Encoded:
        time.sleep(frame[0] % 3 * 1e-4)
        return _encode(frame)

    with frame_threads(threads) as frame_map:
        rows = [row for row, _ in frame_map(encode, _frames(count))]
    assert [number for _, number, _ in rows] == list(range(count))


def test_frames_ahead_are_bounded() -> None:
    taken = []

    def frames() -> Iterator[NumberedFrame]:
        for frame in _frames(1000):
            taken.append(frame[0])
            yield frame

    with frame_threads(2) as frame_map:
        for given, _ in enumerate(frame_map(_encode, frames())):
            assert len(taken) - given < 10


def test_a_failing_frame_is_raised_in_its_turn_and_leaves_no_thread() -> None:
    def encode(frame: NumberedFrame) -> Encoded:
        if frame[0] == 200:
            raise OSError("no more ink")
        return _encode(frame)

    with frame_threads(3) as frame_map:
        given: list[int] = []
        with pytest.raises(OSError, match="no more ink"):
            given.extend(row[1] for row, _ in frame_map(encode, _frames(1000)))
    assert given == list(range(200))
    assert not [t for t in threading.enumerate() if t.name.startswith("shardpoint-encode")]


def test_many_records_side_by_side(tmp_path: Path) -> None:
    """Their payloads are where the columns say, in the decoded record."""
    arrays = [np.arange(n, dtype=np.float32) for n in (0, 3, 400_000, 50_000)]
    records: list[AnyRecord] = [
        RecordSource(
            length=5 + array.nbytes + 3,
            head=b"head!",
            payload=(ArraySource(array),),
            tail=lambda checksum: b"end",
        )
        for array in arrays
    ]
    storage = LocalStorage(tmp_path)
    with frame_threads(2) as frame_map:

        def encode(blocks: Iterable[memoryview], element_size: int | None) -> Iterator[bytes]:
            return ShuffleZstd().stream(element_size).encode(blocks, frame_map=frame_map)

        encoded = {
            name: EncodedRecords(records, [4, None, 4, 8], encode) for name in ("one", "two")
        }
        stored = write_files(
            storage, {n: e.records for n, e in encoded.items()}, threads=2, sync=False
        )
    for name, file in encoded.items():
        written = file.decoded(stored[name])
        data = storage.read(name)
        assert not len(written.blocks)
        for row, array in enumerate(arrays):
            start, length = int(written.offset[row]), int(written.length[row])
            piece = data[start : start + length]
            assert crc32(piece) == written.record_checksum[row]
            record = open_record(
                Transforms(),
                [ShuffleZstd.descriptor],
                MemoryRecord(piece),
                most=1 << 30,
                origin=Origin("k", name),
                tally=None,
            )
            assert bytes(read_at(record, 0, record.size)) == b"head!" + array.tobytes() + b"end"
            assert written.payload_offset[row] == 5
            assert written.payload_length[row] == array.nbytes
    assert crc32(arrays[2].tobytes()) not in written.payload_checksum


def test_a_source_that_gives_other_than_it_announced_is_refused(tmp_path: Path) -> None:
    wrong = RecordSource(length=99, payload=(ArraySource(np.zeros(3)),))
    file = EncodedRecords([wrong], [8], lambda blocks, size: (bytes(b) for b in blocks))
    with pytest.raises(PlanError, match="announced 99 bytes and gave 24"):
        write_files(LocalStorage(tmp_path), {"f": file.records}, threads=1, sync=False)
    assert not list(tmp_path.iterdir())
