"""Numbers read by the thousand are those that are read one by one, damage and all."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardpoint.engine.objects import read_objects
from shardpoint.errors import CorruptionError, FormatError, ShardpointError
from shardpoint.formats.checksum import crc32
from shardpoint.formats.number_records import numbers_in
from shardpoint.formats.object_decoder import NumpyFactory
from shardpoint.formats.torch_record import object_record
from shardpoint.index import CheckpointIndex, ObjectEntry, build_index
from shardpoint.storage import LocalStorage
from shardpoint.storage.testing import CountingStorage

_FLOATS = [0.5 * n for n in range(300)]
_MIXED = [*_FLOATS, *range(200), *range(300, 340), -1, 1 << 40, *[True] * 30, None, "a", [1]] * 2


def _index(folder: Path, values: list[Any], *, checksums: bool) -> CheckpointIndex:
    records = [object_record(pickle.dumps(value, 2)) for value in values]
    (folder / "f").write_bytes(b"".join(records))
    ends = np.cumsum([len(record) for record in records]).tolist()
    entries = [
        ObjectEntry(f"k{n}", "f", end - len(record), len(record), ())
        for n, (record, end) in enumerate(zip(records, ends, strict=True))
    ]
    index = build_index(
        [],
        entries,
        key_order=[entry.key for entry in entries],
        paths=None,
        storage_meta=None,
        version=None,
        source="dcp",
        metadata_files=[".metadata"],
    )
    if not checksums:
        return index
    column = np.array([crc32(record) for record in records], np.int64)
    return replace(index, objects=replace(index.objects, record_checksum=column))


def _read(index: CheckpointIndex, storage: Any, **options: Any) -> dict[int, Any]:
    rows = range(len(index.objects))
    found = list(read_objects(index, storage, rows, factory=NumpyFactory(), allowed={}, **options))
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("values", [_FLOATS, _MIXED, _MIXED[::7]])
@pytest.mark.parametrize("checksums", [False, True])
def test_values_and_types_come_back(tmp_path: Path, values: list[Any], checksums: bool) -> None:
    storage = CountingStorage(LocalStorage(tmp_path))
    found = _read(_index(tmp_path, values, checksums=checksums), storage, verify=True)
    assert [found[row] for row in range(len(values))] == values
    assert [type(found[row]) for row in range(len(values))] == [type(value) for value in values]
    if values is _FLOATS:
        assert storage.calls["read"] == 1


def test_numbers_of_other_types_are_taken_one_by_one() -> None:
    records = [object_record(pickle.dumps(value, 2)) for value in (1, 255, 7, 0)]
    rows = np.frombuffer(b"".join(records), np.uint8).reshape(4, -1)
    assert numbers_in(rows, np.zeros(4, np.bool_)) == [1, 255, 7, 0]
    assert numbers_in(rows[:0], np.zeros(0, np.bool_)) == []


@pytest.mark.parametrize("checksums", [False, True])
def test_a_damaged_record_among_many_is_named(tmp_path: Path, checksums: bool) -> None:
    """Any byte where there are checksums of whole records; without them, the pickle's."""
    index = _index(tmp_path, _FLOATS, checksums=checksums)
    length = int(index.objects.record_length[0])
    record = (tmp_path / "f").read_bytes()[:length]
    pickled = record.index(b"\x80\x02G")
    whole = bytearray((tmp_path / "f").read_bytes())
    positions = range(0, length, 13) if checksums else range(pickled, pickled + 12)
    for position in positions:
        damaged = bytearray(whole)
        damaged[123 * length + position] ^= 0x20
        (tmp_path / "f").write_bytes(damaged)
        with pytest.raises((CorruptionError, FormatError), match="'k123'"):
            _read(index, LocalStorage(tmp_path), verify=True)
        failures: dict[int, ShardpointError] = {}
        found = _read(index, LocalStorage(tmp_path), verify=True, failures=failures)
        assert list(failures) == [123]
        assert len(found) == 299
        assert all(found[row] == _FLOATS[row] for row in found)


def test_a_file_that_ends_early_is_an_error_of_its_last_records(tmp_path: Path) -> None:
    index = _index(tmp_path, _FLOATS, checksums=True)
    (tmp_path / "f").write_bytes((tmp_path / "f").read_bytes()[:-10])
    failures: dict[int, ShardpointError] = {}
    found = _read(index, LocalStorage(tmp_path), verify=True, failures=failures)
    assert list(failures) == [299]
    assert len(found) == 299
