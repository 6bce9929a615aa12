"""Writing: the same bytes whatever the sizes, strides and threads; checksums; failures."""

from __future__ import annotations

import threading
import tracemalloc
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.engine.writing import (
    ArraySource,
    RecordSource,
    TensorSource,
    write_file,
    write_files,
)
from shardpoint.errors import PlanError, StorageError
from shardpoint.storage import LocalStorage
from shardpoint.storage._files import LocalWritableFile
from shardpoint.storage.testing import CountingStorage, Operation


class _Stream:
    """A source that does not know its size."""

    nbytes = None

    def __init__(self, data: bytes) -> None:
        self._data = data

    def blocks(self, block_size: int) -> Iterator[memoryview]:
        buffer = bytearray(min(block_size, 1000))
        for start in range(0, len(self._data), len(buffer)):
            piece = self._data[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]


def _record(head: bytes, parts: Sequence[TensorSource]) -> RecordSource:
    """A record whose tail is the payload's checksum."""
    sizes = [part.nbytes for part in parts]
    known = [size for size in sizes if size is not None]
    length = len(head) + sum(known) + 4 if len(known) == len(sizes) else None
    return RecordSource(length, head, parts, lambda checksum: checksum.to_bytes(4, "little"))


def _expected(head: bytes, arrays: Sequence[np.ndarray]) -> bytes:
    payload = b"".join(array.tobytes() for array in arrays)
    return head + payload + zlib.crc32(payload).to_bytes(4, "little")


def _arrays() -> list[np.ndarray]:
    random = np.random.default_rng(5)
    cube = random.integers(0, 256, (30, 40, 50)).astype(np.uint16)
    wide = random.integers(0, 256, (3, 600_000)).astype(np.uint8)
    large = random.integers(0, 256, 33 << 20, dtype=np.uint8)
    return [
        np.zeros((), np.float32),
        np.zeros((0, 3), np.int64),
        np.arange(12, dtype=np.float32).reshape(3, 4),
        cube.transpose(2, 0, 1),
        cube[::2, ::-1, 3:7],
        np.broadcast_to(np.arange(7, dtype=ml_dtypes.bfloat16), (500, 7)),
        wide,
        wide.T,
        large,
        large[: 8 << 20].reshape(-1, 16)[:, 3:5],
        np.asfortranarray(cube),
    ]


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("sync", [False, True])
def test_records_follow_each_other_exactly(tmp_path: Path, threads: int, sync: bool) -> None:
    arrays = _arrays()
    records = [_record(b"head%d" % i, [ArraySource(a)]) for i, a in enumerate(arrays)]
    records.append(RecordSource(3, b"obj"))
    records.append(_record(b"both", [ArraySource(arrays[2]), ArraySource(arrays[6])]))
    records.append(_record(b"large", [ArraySource(arrays[7]), ArraySource(arrays[8])]))
    wanted = [_expected(b"head%d" % i, [a]) for i, a in enumerate(arrays)]
    wanted += [b"obj", _expected(b"both", [arrays[2], arrays[6]])]
    wanted += [_expected(b"large", [arrays[7], arrays[8]])]
    storage = LocalStorage(tmp_path)
    files = {"a": records, "sub/b": list(reversed(records)), "empty": []}
    spans = write_files(storage, files, threads=threads, sync=sync)
    assert storage.list() == ["a", "empty", "sub/b"]
    assert (tmp_path / "a").read_bytes() == b"".join(wanted)
    assert (tmp_path / "sub" / "b").read_bytes() == b"".join(reversed(wanted))
    assert (tmp_path / "empty").read_bytes() == b""
    assert spans["empty"].spans() == []
    data = (tmp_path / "a").read_bytes()
    assert [data[o : o + n] for o, n in spans["a"].spans()] == wanted


def test_streams_of_unknown_size_are_written_in_order(tmp_path: Path) -> None:
    data = bytes(range(256)) * 50
    records = [
        _record(b"one", [_Stream(data)]),
        RecordSource(6, b"object"),
        _record(b"two", [ArraySource(np.arange(5)), _Stream(b"")]),
    ]
    spans = write_files(LocalStorage(tmp_path), {"a": records}, threads=4, sync=False)
    wanted = [_expected(b"one", [np.frombuffer(data, np.uint8)]), b"object"]
    wanted += [_expected(b"two", [np.arange(5)])]
    assert (tmp_path / "a").read_bytes() == b"".join(wanted)
    assert [length for _, length in spans["a"].spans()] == [len(w) for w in wanted]


def test_small_records_are_gathered(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    arrays = [np.full(10, i, np.int32) for i in range(1000)]
    records = [_record(b"h", [ArraySource(a)]) for a in arrays]
    write_file(storage, "a", records, sync=True)
    assert storage.calls["write"] <= 5
    assert storage.calls["create"] == 1
    assert (tmp_path / "a").read_bytes() == b"".join(_expected(b"h", [a]) for a in arrays)
    kinds = [operation.kind for operation in storage.operations]
    assert kinds[-2:] == ["sync", "sync"]
    assert [operation.name for operation in storage.operations[-2:]] == ["a", ""]
    assert storage.open_files == 0


def test_contiguous_memory_is_not_copied() -> None:
    array = np.arange(100, dtype=np.float64).reshape(4, 25)
    memory = ArraySource(array).memory()
    assert memory is not None
    assert np.shares_memory(np.frombuffer(memory, np.uint8), array)
    assert ArraySource(array.T).memory() is None


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_blocks_give_the_row_major_bytes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 6), max_size=4)))
    array = np.arange(int(np.prod(shape)), dtype=np.int32).reshape(shape)
    array = array.transpose(data.draw(st.permutations(range(len(shape)))))
    steps = [data.draw(st.sampled_from([1, 2, -1])) for _ in shape]
    array = array[tuple(slice(None, None, step) for step in steps)]
    block_size = data.draw(st.integers(4, 200))
    pieces = [bytes(block) for block in ArraySource(array).blocks(block_size)]
    assert b"".join(pieces) == array.tobytes()
    assert all(len(piece) <= block_size for piece in pieces)


@pytest.mark.parametrize("kind", ["create", "write", "sync"])
@pytest.mark.parametrize("threads", [1, 3])
def test_failure_is_raised_and_leaves_nothing(tmp_path: Path, kind: str, threads: int) -> None:
    (tmp_path / "kept").write_bytes(b"1")
    arrays = [np.zeros(2 << 20, np.uint8) for _ in range(6)]
    files = {f"f{i}": [_record(b"h", [ArraySource(a)])] for i, a in enumerate(arrays)}
    total = CountingStorage(LocalStorage(tmp_path / "dry"), fail_kinds=frozenset({kind}))
    total.prepare()
    write_files(total, files, threads=1, sync=True)
    for number in range(0, total.calls[kind], 3):
        storage = CountingStorage(
            LocalStorage(tmp_path / "real"), fail_at=number, fail_kinds=frozenset({kind})
        )
        storage.prepare()
        with pytest.raises(StorageError, match="injected"):
            write_files(storage, files, threads=threads, sync=True)
        assert storage.list() == []
        assert storage.open_files == 0
    assert not [t for t in threading.enumerate() if t.name.startswith("shardpoint")]


def test_a_file_that_was_there_is_neither_changed_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    files = {name: [_record(b"h", [ArraySource(np.zeros(3))])] for name in "abc"}
    with pytest.raises(StorageError, match="exists"):
        write_files(LocalStorage(tmp_path), files, threads=2, sync=False)
    assert LocalStorage(tmp_path).list() == ["b"]
    assert (tmp_path / "b").read_bytes() == b"old"


@pytest.mark.parametrize("size", [100, 500_000])
def test_sources_that_give_other_than_announced_are_refused(tmp_path: Path, size: int) -> None:
    class Liar:
        nbytes = size

        def blocks(self, block_size: int) -> Iterator[memoryview]:
            yield memoryview(b"short")

    with pytest.raises(PlanError, match="announced"):
        write_file(LocalStorage(tmp_path), "a", [_record(b"h", [Liar()])], sync=False)
    assert LocalStorage(tmp_path).list() == []


def test_error_of_a_source_comes_through(tmp_path: Path) -> None:
    class Failing:
        nbytes = 1 << 20

        def blocks(self, block_size: int) -> Iterator[memoryview]:
            yield memoryview(bytes(block_size))
            raise RuntimeError("device lost")

    storage = CountingStorage(LocalStorage(tmp_path))
    files = {"a": [_record(b"", [Failing()])], "b": [_record(b"", [ArraySource(np.ones(4))])]}
    with pytest.raises(RuntimeError, match="device lost"):
        write_files(storage, files, threads=2, sync=False)
    assert storage.list() == []
    assert storage.open_files == 0


@pytest.mark.parametrize("sync", [False, True])
def test_what_is_to_be_durable_starts_for_the_disk_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    started: list[tuple[int, int]] = []
    real = LocalWritableFile.start_writeback

    def note(self: LocalWritableFile, offset: int, length: int) -> None:
        started.append((offset, length))
        real(self, offset, length)

    monkeypatch.setattr(LocalWritableFile, "start_writeback", note)
    records = [_record(b"h", [ArraySource(np.ones(n, np.uint8))]) for n in (10, 500_000, 20)]
    write_file(LocalStorage(tmp_path), "a", records, sync=sync)
    end = 0
    for offset, length in sorted(started):
        assert offset == end
        end += length
    assert end == ((tmp_path / "a").stat().st_size if sync else 0)


class _Discarding(LocalStorage):
    """Takes what is written and forgets it."""

    def create(self, name: str, *, size: int | None) -> Any:
        return self

    def write_from(self, offset: int, buffers: Sequence[memoryview]) -> None:
        pass

    def close(self) -> None:
        pass


def test_memory_stays_bounded_whatever_the_strides(tmp_path: Path) -> None:
    column = np.arange(1 << 14, dtype=np.float32)
    wide = np.broadcast_to(column[:, None], (1 << 14, 1 << 10))  # 64 MiB, none of it there
    records = [_record(b"h", [ArraySource(wide)]) for _ in range(2)]
    records += [_record(b"h", [ArraySource(wide[:, :7].T)])]
    small = np.zeros(50_000, np.uint8)
    records += [_record(b"h", [ArraySource(small)]) for _ in range(1000)]
    tracemalloc.start()
    try:
        write_files(_Discarding(tmp_path), {"a": records}, threads=2, sync=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20


def test_all_bytes_are_written_once(tmp_path: Path) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    write_file(storage, "a", [_record(b"h", [ArraySource(a)]) for a in _arrays()], sync=False)
    writes = sorted(
        (operation.offset, operation.nbytes)
        for operation in storage.operations
        if operation.kind == "write"
    )
    end = 0
    for offset, nbytes in writes:
        assert offset == end
        end += nbytes
    assert end == (tmp_path / "a").stat().st_size
    assert all(isinstance(operation, Operation) for operation in storage.operations)
