"""Verification with the native index: every changed byte is found and placed."""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import shardpoint
from engine_support import grid, save
from shardpoint.cli import main
from shardpoint.engine import checksumming, committing
from shardpoint.engine.checksumming import Spans, checksum_spans
from shardpoint.errors import ShardpointWarning
from shardpoint.formats.dcp_metadata import write_metadata
from shardpoint.formats.native_index import index_name, is_index_name, stamp_of, write_index
from shardpoint.formats.torch_record import object_record, tensor_payload_from_bytes
from shardpoint.index import BlockChecksums, CheckpointIndex, Objects, Payloads
from shardpoint.storage import LocalStorage
from shardpoint.verify import _objects as verify_objects

BLOCK = 256
PICKLE = b"\x80\x02K\x07."  # the integer 7


def with_checksums(index: CheckpointIndex, folder: Path) -> CheckpointIndex:
    """Return the index with all checksums, taken from the files with Python's own CRC-32."""
    chunks = index.chunks
    count = len(chunks)
    payloads = Payloads(
        offset=np.zeros(count, np.int64),
        strides=np.zeros_like(chunks.sizes),
        length=np.zeros(count, np.int64),
        checksum=np.zeros(count, np.int64),
        flags=np.zeros(count, np.uint8),
    )
    records, blocks, first = [], [], [0]
    for row in range(count):
        data = (folder / index.files[chunks.file[row]]).read_bytes()
        start, length = int(chunks.record_offset[row]), int(chunks.record_length[row])
        record = data[start : start + length]
        found = tensor_payload_from_bytes(record, start, file="f", key="k")
        payload = data[found.payload_offset : found.payload_offset + found.payload_length]
        payloads.offset[row] = found.payload_offset
        payloads.length[row] = found.payload_length
        payloads.checksum[row] = zlib.crc32(payload)
        payloads.strides[row, : len(found.strides)] = found.strides
        records.append(zlib.crc32(record))
        blocks += [zlib.crc32(payload[at : at + BLOCK]) for at in range(0, len(payload), BLOCK)]
        first.append(len(blocks))
    objects = index.objects
    object_records = [
        zlib.crc32((folder / index.files[file]).read_bytes()[start : start + length])
        for file, start, length in zip(
            objects.file, objects.record_offset, objects.record_length, strict=True
        )
    ]
    return dataclasses.replace(
        index,
        chunks=dataclasses.replace(
            chunks,
            payloads=payloads,
            blocks=BlockChecksums(BLOCK, np.array(first), np.array(blocks, np.uint32)),
            record_checksum=np.array(records, np.int64),
        ),
        objects=dataclasses.replace(objects, record_checksum=np.array(object_records, np.int64)),
    )


def commit(folder: Path, index: CheckpointIndex, *, native: bool = True) -> None:
    metadata = write_metadata(index)
    committing.commit(
        LocalStorage(folder),
        ".metadata",
        metadata,
        index=committing.index_for(index, metadata) if native else None,
        sync=False,
    )


def make(folder: Path) -> CheckpointIndex:
    """Write tensors in several chunks and files, one object, and the index."""
    arrays = {
        "w": np.arange(400, dtype=np.float32).reshape(20, 20),
        "b": np.arange(7),
        "empty": np.zeros((0, 3), np.float32),
    }
    chunks = [
        *grid("w", (20, 20), [[4], [10]]),
        *grid("b", (7,), [[]]),
        *grid("empty", (0, 3), [[], []]),
    ]
    index = save(LocalStorage(folder), arrays, chunks)
    record = object_record(PICKLE, [])
    name = index.files[0]
    at = (folder / name).stat().st_size
    with (folder / name).open("ab") as file:
        file.write(record)
    index = dataclasses.replace(
        index,
        paths=None,
        storage_meta={"checkpoint_id": "c", "save_id": "this save", "load_id": None, "modules": []},
        key_order=[*index.key_order, "step"],
        objects=Objects(
            keys=["step"],
            file=np.zeros(1, np.int32),
            record_offset=np.array([at]),
            record_length=np.array([len(record)]),
            transform=np.zeros(1, np.int16),
        ),
    )
    index = with_checksums(index, folder)
    commit(folder, index)
    return index


def index_file(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if is_index_name(path.name))
    return found


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << position % 8
    file.write_bytes(data)


def test_what_is_whole_has_no_problems(tmp_path: Path) -> None:
    index = make(tmp_path)
    checkpoint = shardpoint.open(tmp_path)
    report = checkpoint.verify()
    assert report.ok, str(report)
    assert report.notes == ()
    assert report.chunks_read == len(index.chunks) - 1  # one is empty
    assert report.bytes_read >= sum(path.stat().st_size for path in tmp_path.glob("*.distcp"))
    assert checkpoint["step"] == 7
    assert checkpoint.verify(quick=True).ok


def test_every_flipped_byte_of_every_file_is_reported(tmp_path: Path) -> None:
    index = make(tmp_path)
    owners = {name: set() for name in index.files}
    for name in index.files:
        file = tmp_path / name
        whole = file.read_bytes()
        # Every byte of a record's head and tail in steps, and all over the payloads.
        for position in range(0, len(whole), 23):
            flip(file, position)
            report = shardpoint.open(tmp_path).verify()
            assert [problem.file for problem in report.problems] == [name], position
            (problem,) = report.problems
            assert problem.offset is not None
            assert problem.offset <= position
            assert "wanted" in problem.message
            assert "found" in problem.message
            owners[name].add(problem.key)
            file.write_bytes(whole)
    assert set().union(*owners.values()) == {"w", "b", "empty", "step"}
    assert shardpoint.open(tmp_path).verify().ok


def test_damage_is_placed_by_blocks(tmp_path: Path) -> None:
    index = make(tmp_path)
    payloads = index.chunks.payloads
    assert payloads is not None
    row = int(np.argmax(payloads.length))
    assert payloads.length[row] > 2 * BLOCK
    file = tmp_path / index.files[index.chunks.file[row]]
    start = int(payloads.offset[row])
    flip(file, start + BLOCK + 5)
    flip(file, start + 2 * BLOCK + 1)
    problems = shardpoint.open(tmp_path).verify().problems
    assert [(problem.key, problem.offset) for problem in problems] == [
        ("w", start + BLOCK),
        ("w", start + 2 * BLOCK),
    ]
    assert f"bytes {start + BLOCK} to {start + 2 * BLOCK} are damaged" in problems[0].message


def test_all_problems_are_reported(tmp_path: Path) -> None:
    index = make(tmp_path)
    chunks = index.chunks
    for row in range(len(chunks)):
        flip(tmp_path / index.files[chunks.file[row]], int(chunks.record_offset[row]) + 5)
    flip(tmp_path / index.files[0], int(index.objects.record_offset[0]) + 70)
    report = shardpoint.open(tmp_path).verify()
    assert len(report.problems) == len(chunks) + 1


@pytest.mark.parametrize("where", ["behind", "between"])
def test_bytes_that_belong_to_no_record_are_reported(tmp_path: Path, where: str) -> None:
    index = make(tmp_path)
    name = index.files[1]
    file = tmp_path / name
    data = file.read_bytes()
    if where == "behind":
        file.write_bytes(data + b"?")
        at = len(data)
    else:
        rows = np.flatnonzero(index.chunks.file == 1)
        last = rows[np.argmax(index.chunks.record_offset[rows])]
        at = int(index.chunks.record_offset[last])
        file.write_bytes(data[:at] + bytes(64) + data[at:])
        moved = index.chunks.record_offset.copy()
        moved[last] += 64
        index = dataclasses.replace(
            index, chunks=dataclasses.replace(index.chunks, record_offset=moved)
        )
        (tmp_path / index_file(tmp_path)).unlink()
        commit(tmp_path, with_checksums(index, tmp_path))
    (problem,) = shardpoint.open(tmp_path).verify().problems
    assert (problem.file, problem.offset) == (name, at)
    assert "belong to no record" in problem.message
    assert shardpoint.open(tmp_path).verify(quick=True).ok


def test_a_missing_and_a_short_file_are_reported(tmp_path: Path) -> None:
    index = make(tmp_path)
    (tmp_path / index.files[1]).unlink()
    os.truncate(tmp_path / index.files[0], 100)
    report = shardpoint.open(tmp_path).verify()
    assert {problem.file for problem in report.problems} == set(index.files)


@pytest.mark.parametrize("quick", [True, False])
def test_a_missing_file_of_empty_tensors_is_reported(tmp_path: Path, quick: bool) -> None:
    arrays = {"empty": np.zeros((0, 3), np.float32)}
    index = save(LocalStorage(tmp_path), arrays, grid("empty", (0, 3), [[], []]))
    commit(tmp_path, index)
    assert shardpoint.open(tmp_path).verify(quick=quick).ok
    (tmp_path / index.files[0]).unlink()
    (problem,) = shardpoint.open(tmp_path).verify(quick=quick).problems
    assert problem.file == index.files[0]
    assert "missing" in problem.message


def test_an_index_with_false_places_is_reported(tmp_path: Path) -> None:
    """Its checksums are right, but not where it says the elements are."""
    index = make(tmp_path)
    payloads = index.chunks.payloads
    assert payloads is not None
    payloads.offset[0] -= 8
    index_file(tmp_path).unlink()
    commit(tmp_path, index)
    (problem,) = shardpoint.open(tmp_path).verify().problems
    assert problem.key == "w"
    assert "the record has" in problem.message


def _other_shape(index: CheckpointIndex) -> CheckpointIndex:
    shape = index.tensors.shape.copy()
    shape[0, 0] += 1
    return dataclasses.replace(index, tensors=dataclasses.replace(index.tensors, shape=shape))


def _other_place(index: CheckpointIndex) -> CheckpointIndex:
    offsets = index.chunks.record_offset.copy()
    offsets[2] += 1
    return dataclasses.replace(
        index, chunks=dataclasses.replace(index.chunks, record_offset=offsets)
    )


def _other_files(index: CheckpointIndex) -> CheckpointIndex:
    return dataclasses.replace(index, files=index.files[::-1])


def _other_object(index: CheckpointIndex) -> CheckpointIndex:
    lengths = index.objects.record_length - 1
    return dataclasses.replace(
        index, objects=dataclasses.replace(index.objects, record_length=lengths)
    )


def _other_key(index: CheckpointIndex) -> CheckpointIndex:
    return dataclasses.replace(
        index,
        objects=dataclasses.replace(index.objects, keys=["stop"]),
        key_order=[*index.key_order[:-1], "stop"],
    )


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        (_other_shape, {"w"}),
        (_other_place, {"w"}),
        (_other_files, {"w", "b", "empty", "step"}),
        (_other_object, {"step"}),
        (_other_key, {None}),
        (lambda index: dataclasses.replace(index, version="9"), {None}),
        (lambda index: dataclasses.replace(index, paths={"w": ("x",)}), {None}),
        (lambda index: dataclasses.replace(index, key_order=index.key_order[::-1]), {None}),
    ],
)
def test_an_index_that_says_something_else_is_reported(
    tmp_path: Path, change: Callable[[CheckpointIndex], CheckpointIndex], keys: set[Any]
) -> None:
    index = make(tmp_path)
    file = index_file(tmp_path)
    stamp = stamp_of((tmp_path / ".metadata").read_bytes())
    file.write_bytes(write_index(change(index), stamp))
    report = shardpoint.open(tmp_path).verify()
    found = {
        problem.key
        for problem in report.problems
        if problem.file == file.name and "differ in" in problem.message
    }
    assert found == keys
    # A quick look does not read what may be a large pickle.
    assert not [
        p for p in shardpoint.open(tmp_path).verify(quick=True).problems if "differ" in str(p)
    ]


def test_a_damaged_index_is_reported(tmp_path: Path) -> None:
    make(tmp_path)
    file = index_file(tmp_path)
    flip(file, file.stat().st_size // 2)
    with pytest.warns(ShardpointWarning, match="damaged"):
        checkpoint = shardpoint.open(tmp_path)
    for quick in (True, False):
        (problem,) = checkpoint.verify(quick=quick).problems
        assert problem.file == file.name
        assert "damaged" in problem.message


def test_a_changed_metadata_file_is_reported_and_another_save_is_not(tmp_path: Path) -> None:
    index = make(tmp_path)
    file = index_file(tmp_path)
    metadata = tmp_path / ".metadata"
    whole = metadata.read_bytes()
    metadata.write_bytes(whole.replace(b"1.0.0", b"1.0.1"))
    assert metadata.read_bytes() != whole
    report = shardpoint.open(tmp_path).verify(quick=True)
    assert [problem.file for problem in report.problems] == [".metadata"]
    assert index.storage_meta is not None
    save_id = index.storage_meta["save_id"].encode()
    for found, wanted in ((save_id, save_id.swapcase()), (b"save_id", b"cave_id")):
        metadata.write_bytes(whole.replace(found, wanted))
        (problem,) = shardpoint.open(tmp_path).verify(quick=True).problems
        assert problem.file == ".metadata"
        assert file.name in problem.message
    # What other software saves has another save_id.
    other = {**index.storage_meta, "save_id": "the save of another"}
    metadata.write_bytes(write_metadata(dataclasses.replace(index, storage_meta=other)))
    report = shardpoint.open(tmp_path).verify()
    assert report.ok, str(report)
    (note,) = report.notes
    assert file.name in note
    assert "note" in str(report)


def test_an_index_of_no_bytes_is_said_to_be_cut(tmp_path: Path) -> None:
    make(tmp_path)
    index_file(tmp_path).write_bytes(b"")
    with pytest.warns(ShardpointWarning, match="it has 0 bytes"):
        shardpoint.open(tmp_path)


def test_left_indexes_are_told_of(tmp_path: Path) -> None:
    make(tmp_path)
    (tmp_path / index_name(stamp_of(b"something else"))).write_bytes(b"half")
    report = shardpoint.open(tmp_path).verify()
    assert report.ok
    assert len(report.notes) == 1


def test_records_that_overlap_are_reported_and_not_read_twice(tmp_path: Path) -> None:
    index = make(tmp_path)
    chunks = index.chunks
    length = chunks.record_length.copy()
    row = int(np.flatnonzero((chunks.file == 0) & (chunks.record_offset == 0))[0])
    length[row] = (tmp_path / index.files[0]).stat().st_size
    changed = dataclasses.replace(index, chunks=dataclasses.replace(chunks, record_length=length))
    index_file(tmp_path).unlink()
    commit(tmp_path, changed)
    report = shardpoint.open(tmp_path).verify()
    assert any("begins inside another one" in problem.message for problem in report.problems)


def test_without_an_index_torchs_own_checksums_are_compared(tmp_path: Path) -> None:
    """Bytes of all members; what lies between them has no checksum."""
    index = make(tmp_path)
    index_file(tmp_path).unlink()
    report = shardpoint.open(tmp_path).verify()
    assert report.ok
    assert "no native index" in " ".join(report.notes)
    assert shardpoint.open(tmp_path).verify(quick=True).notes == ()
    file = tmp_path / index.files[0]
    whole = file.read_bytes()
    for name in (b"archive/data.pkl", b"archive/version", b".data/serialization_id"):
        at = whole.index(name) + len(name) + 2
        content = whole.index(b"PK\x07\x08", at) - 1  # the member's last byte
        flip(file, content)
        (problem,) = shardpoint.open(tmp_path).verify().problems
        assert problem.key in ("w", "b")
        assert problem.file == file.name
        file.write_bytes(whole)


def test_an_object_that_many_keys_name_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = make(tmp_path)
    keys = [f"step{number}" for number in range(50)]
    objects = index.objects
    for name in ("file", "record_offset", "record_length", "transform"):
        column = np.repeat(getattr(objects, name), len(keys))
        objects = dataclasses.replace(objects, **{name: column})
    many = dataclasses.replace(objects, keys=keys, record_checksum=None)
    order = [*index.tensors.keys, *keys]
    index_file(tmp_path).unlink()
    commit(tmp_path, dataclasses.replace(index, objects=many, key_order=order), native=False)
    asked: list[int] = []
    decode = verify_objects.read_objects

    def counting(index: Any, storage: Any, rows: Any, **options: Any) -> Any:
        asked.extend(rows)
        return decode(index, storage, rows, **options)

    monkeypatch.setattr(verify_objects, "read_objects", counting)
    assert shardpoint.open(tmp_path).verify().ok
    assert len(asked) == 1
    file = tmp_path / index.files[objects.file[0]]
    data = file.read_bytes()
    file.write_bytes(data.replace(PICKLE, b"\x80\x02K\x07\xff"))
    found = {problem.key for problem in shardpoint.open(tmp_path).verify().problems}
    assert found == set(keys)


def test_a_record_that_many_keys_name_is_compared_once(tmp_path: Path) -> None:
    arrays = {f"k{number}": np.ones(5000, np.float32) for number in range(20)}
    chunks = [chunk for key in arrays for chunk in grid(key, (5000,), [[]])]
    index = save(LocalStorage(tmp_path), arrays, chunks)
    same = {
        name: np.full_like(column, column[0])
        for name in ("file", "record_offset", "record_length")
        for column in (getattr(index.chunks, name),)
    }
    index = dataclasses.replace(index, chunks=dataclasses.replace(index.chunks, **same))
    commit(tmp_path, index, native=False)
    report = shardpoint.open(tmp_path).verify()
    assert report.ok, str(report)
    assert report.bytes_read < 5 * 20_000
    file = tmp_path / index.files[0]
    flip(file, file.read_bytes().index(np.ones(9, np.float32).tobytes()) + 100)
    assert not shardpoint.open(tmp_path).verify().ok


def test_a_huge_chunk_is_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = make(tmp_path)
    monkeypatch.setattr(checksumming, "_PIECE", 100)
    monkeypatch.setattr("shardpoint.verify._headers._SMALL_MEMBER", 50)
    taken: list[int] = []
    take = checksumming.BufferPool.take
    monkeypatch.setattr(
        checksumming.BufferPool, "take", lambda self: taken.append(self._size) or take(self)
    )
    for native in (True, False):
        if not native:
            index_file(tmp_path).unlink()
        taken.clear()
        assert shardpoint.open(tmp_path).verify().ok
        assert len(taken) > 10
        assert set(taken) == {100}
    assert index.chunks.payloads is not None
    flip(tmp_path / index.files[0], int(index.chunks.payloads.offset[0]) + 3)
    assert not shardpoint.open(tmp_path).verify().ok


def test_checksums_of_spans_are_those_of_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = np.random.default_rng(3)
    contents = [chance.bytes(5000), chance.bytes(300)]
    names = ["a", "b", "missing"]
    for name, content in zip(names, contents, strict=False):
        (tmp_path / name).write_bytes(content)
    monkeypatch.setattr(checksumming, "_PIECE", 64)
    file = chance.integers(0, 2, 200)
    start = chance.integers(0, 200, 200)
    length = chance.integers(0, 200, 200)
    file[7], start[8] = 2, 10_000
    length[[7, 8]] = 5
    told: list[int] = []
    spans = Spans(names, file, start, length)
    found = checksum_spans(LocalStorage(tmp_path), spans, threads=2, progress=told.append)
    too_long = {
        row
        for row in range(200)
        if file[row] == 2 or start[row] + length[row] > len(contents[file[row]])
    }
    assert set(found.errors) == too_long
    assert {7, 8} <= too_long
    assert sum(told) == length.sum()
    for row in set(range(200)) - too_long:
        wanted = contents[file[row]][start[row] : start[row] + length[row]]
        assert found.values[row] == zlib.crc32(wanted)


def test_the_commands_show_checksums_and_notes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = make(tmp_path)
    assert index.chunks.record_checksum is not None
    (tmp_path / index_name(stamp_of(b"something else"))).write_bytes(b"half")
    assert main(["info", str(tmp_path), "b"]) == 0
    row = int(index.tensors.first_chunk[index.tensors.keys.index("b")])
    shown = capsys.readouterr().out
    assert f"{int(index.chunks.record_checksum[row]):08x}" in shown
    assert f"{int(index.chunks.payloads.checksum[row]):08x}" in shown
    assert f"{int(index.chunks.payloads.offset[row]):,}" in shown
    assert main(["info", str(tmp_path), "step"]) == 0
    assert f"{int(index.objects.record_checksum[0]):08x}" in capsys.readouterr().out
    assert main(["verify", str(tmp_path)]) == 0
    assert "note: " in capsys.readouterr().out
    assert main(["info", str(tmp_path)]) == 0
    assert ".index" in capsys.readouterr().out
