"""Checkpoints saved with a native index, beside torch's own package."""

from __future__ import annotations

import logging
import os
import random
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp

import shardpoint
import shardpoint.dcp as dcp
from ranks import RankPool
from shardpoint.dcp._metadata_view import index_of
from shardpoint.engine.opening import open_index
from shardpoint.formats.native_index import is_index_name
from shardpoint.index import UNKNOWN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*single process:UserWarning"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint:UserWarning"),
]


def make_state(value: float) -> dict[str, Any]:
    return {
        "large": torch.arange(40_000, dtype=torch.float32).reshape(200, 200) + value,
        "turned": (torch.arange(60.0).reshape(6, 10) + value).t(),
        "half": torch.full((7,), value).bfloat16(),
        "step": torch.tensor(3),
        "objects": {"name": f"run {value}", "list": [1, 2, None]},
    }


def blank() -> dict[str, Any]:
    state = {key: torch.zeros_like(value) for key, value in make_state(0).items() if key[0] != "o"}
    return {**state, "objects": {"name": "", "list": []}}


def is_same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["objects"] == other["objects"] and all(
        torch.equal(one[key], other[key]) for key in one if key != "objects"
    )


def indexes_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if is_index_name(path.name))


def test_a_save_writes_an_index_with_all_checksums(tmp_path: Path) -> None:
    dcp.save(make_state(1), checkpoint_id=tmp_path)
    checksum = zlib.crc32((tmp_path / ".metadata").read_bytes())
    assert indexes_in(tmp_path) == [f".shardpoint-{checksum:08x}.index"]
    index = shardpoint.open(tmp_path).index
    assert index.metadata_files == [".metadata", *indexes_in(tmp_path)]
    chunks, objects = index.chunks, index.objects
    assert chunks.payloads is not None
    assert (chunks.payloads.offset != UNKNOWN).all()
    assert chunks.blocks is not None
    assert (chunks.blocks.first[1:] > chunks.blocks.first[:-1]).all()
    data = {name: (tmp_path / name).read_bytes() for name in index.files}
    for places in (chunks, objects):
        assert places.record_checksum is not None
        for row in range(len(places)):
            start, length = int(places.record_offset[row]), int(places.record_length[row])
            record = data[index.files[places.file[row]]][start : start + length]
            assert places.record_checksum[row] == zlib.crc32(record)
    report = shardpoint.open(tmp_path).verify()
    assert report.ok, str(report)


def test_the_index_comes_through_torchs_metadata_objects(tmp_path: Path) -> None:
    dcp.save(make_state(1), checkpoint_id=tmp_path)
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    again = index_of(metadata)
    assert again.chunks.blocks is not None
    assert len(metadata.state_dict_metadata) == 6  # looking changes nothing
    assert index_of(metadata).chunks.blocks is again.chunks.blocks


def test_torch_reads_what_has_an_index_and_may_save_over_it(tmp_path: Path) -> None:
    dcp.save(make_state(1), checkpoint_id=tmp_path)
    theirs = blank()
    torch_dcp.load(theirs, checkpoint_id=tmp_path)
    assert is_same(theirs, make_state(1))
    stale = indexes_in(tmp_path)
    torch_dcp.save(make_state(2), checkpoint_id=tmp_path)
    assert indexes_in(tmp_path) == stale
    index, _ = open_index(tmp_path)
    assert index.metadata_files == [".metadata"]
    ours = blank()
    dcp.load(ours, checkpoint_id=tmp_path)
    assert is_same(ours, make_state(2))
    report = shardpoint.open(tmp_path).verify()
    assert report.ok, str(report)
    assert len(report.notes) == 1
    dcp.save(make_state(3), checkpoint_id=tmp_path)
    assert len(indexes_in(tmp_path)) == 1
    assert indexes_in(tmp_path) != stale
    assert shardpoint.open(tmp_path).verify().notes == ()


@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_flipped_byte_anywhere_is_reported(tmp_path: Path, writer: str) -> None:
    save = dcp.save if writer == "ours" else torch_dcp.save
    save(make_state(1), checkpoint_id=tmp_path / "ckpt")
    (file,) = (tmp_path / "ckpt").glob("*.distcp")
    whole = file.read_bytes()
    index = shardpoint.open(tmp_path / "ckpt").index
    chance = random.Random(5)
    if writer == "ours":
        positions = [chance.randrange(len(whole)) for _ in range(25)]
        positions += [0, len(whole) - 1]
    else:  # what torch's checksums cover: the elements, above all
        at = whole.index(make_state(1)["large"].numpy().tobytes())
        positions = [at + chance.randrange(160_000) for _ in range(5)]
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        report = shardpoint.open(tmp_path / "ckpt").verify()
        assert len(report.problems) == 1, (position, str(report))
        assert report.problems[0].file == file.name
        payloads = index.chunks.payloads
        if payloads is None:
            inside = True
        else:
            end = payloads.offset + payloads.length
            inside = bool(((payloads.offset <= position) & (position < end)).any())
        if inside:
            with pytest.raises(dcp.CheckpointException, match="CRC-32"):
                dcp.load(blank(), checkpoint_id=tmp_path / "ckpt")


def test_ranks_that_save_alone_write_no_index(tmp_path: Path) -> None:
    dcp.save(make_state(1), checkpoint_id=tmp_path, use_collectives=False)
    assert indexes_in(tmp_path) == []
    ours = blank()
    dcp.load(ours, checkpoint_id=tmp_path)
    assert is_same(ours, make_state(1))


class _OddPlanner(dcp.DefaultSavePlanner):
    """Stores what nests deeper than an index holds."""

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        value: Any = 1
        for _ in range(150):
            value = (value,)
        metadata.planner_data = [value, {"a": {b"x", 2.5}}]
        return plans, metadata


def test_what_a_planner_stores_comes_back_through_the_index(tmp_path: Path) -> None:
    state = make_state(1)
    dcp.save(state, checkpoint_id=tmp_path, planner=_OddPlanner())
    assert len(indexes_in(tmp_path)) == 1
    found = dcp.FileSystemReader(tmp_path).read_metadata().planner_data
    with_index = repr(found)
    (tmp_path / indexes_in(tmp_path)[0]).unlink()
    without = dcp.FileSystemReader(tmp_path).read_metadata().planner_data
    assert with_index == repr(without)
    assert type(found[0]) is tuple


def test_a_state_that_fits_into_no_index_is_saved_without_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shardpoint.formats._index_writing.MAX_DOCUMENT_BYTES", 10)
    with caplog.at_level(logging.WARNING):
        dcp.save(make_state(1), checkpoint_id=tmp_path)
    assert "saved without an index" in caplog.text
    assert indexes_in(tmp_path) == []
    assert shardpoint.open(tmp_path).verify().ok


def _save_parts(folder: str) -> None:
    rank = dist.get_rank()
    state = {f"part{rank}": torch.full((300, 300), float(rank)), "all": torch.ones(5), "n": rank}
    dcp.save(state, checkpoint_id=folder)


def test_checksums_of_all_ranks_are_in_the_index(pool: RankPool, tmp_path: Path) -> None:
    pool.run(2, _save_parts, str(tmp_path / "ckpt"))
    index = shardpoint.open(tmp_path / "ckpt").index
    assert len(index.files) == 2
    assert index.chunks.record_checksum is not None
    assert (index.chunks.record_checksum != UNKNOWN).all()
    assert index.objects.record_checksum is not None
    assert (index.objects.record_checksum != UNKNOWN).all()
    for name in index.files:
        shutil.copytree(tmp_path / "ckpt", tmp_path / "copy")
        file = tmp_path / "copy" / name
        with file.open("r+b") as data:
            data.seek(os.path.getsize(file) // 2)
            byte = data.read(1)
            data.seek(-1, os.SEEK_CUR)
            data.write(bytes([byte[0] ^ 16]))
        (problem,) = shardpoint.open(tmp_path / "copy").verify().problems
        assert problem.file == name
        shutil.rmtree(tmp_path / "copy")


def test_a_changed_header_of_a_safetensors_image_is_reported(tmp_path: Path) -> None:
    form = dcp.filesystem.SerializationFormat.SAFETENSORS
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=form)
    dcp.save({"w": torch.ones(4, 6), "v": torch.ones(24)}, storage_writer=writer)
    assert shardpoint.open(tmp_path).verify().ok
    (file,) = tmp_path.glob("*.distcp")
    whole = file.read_bytes()
    for old, new in ((b'"shape":[4,6]', b'"shape":[6,4]'), (b'"F32"', b'"I32"')):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        report = shardpoint.open(tmp_path).verify()
        assert {problem.key for problem in report.problems} >= {"w"}
