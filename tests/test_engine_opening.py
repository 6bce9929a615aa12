"""Opening: what lies at a place is found out, and every kind reads to the expected values."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import shardpoint
from engine_support import request, sink_of
from fixture_support import PUBLIC, Fixture, assert_same_array, public_fixtures
from shardpoint.engine import unfinished
from shardpoint.engine.objects import read_object_records, read_objects
from shardpoint.engine.opening import open_index
from shardpoint.engine.reading import read_object, read_tensors
from shardpoint.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    PlanError,
    ShardpointError,
    StorageError,
    UnsafePathError,
)
from shardpoint.formats.object_decoder import NumpyFactory
from shardpoint.index import CheckpointIndex, Container
from shardpoint.storage import LocalStorage, Storage
from shardpoint.storage.testing import CountingStorage

PLACES = [(f, place) for f in public_fixtures() for place in f.places]
BY_NAME = {fixture.name: fixture for fixture in public_fixtures()}


def _objects(index: CheckpointIndex, storage: Storage) -> dict[str, object]:
    return {
        key: read_object(index, storage, row, factory=NumpyFactory(), allowed={}, verify=True)
        for row, key in enumerate(index.objects.keys)
    }


@pytest.mark.parametrize(("fixture", "place"), PLACES, ids=lambda value: str(value)[-60:])
def test_every_tensor_of_every_release_reads_as_saved(fixture: Fixture, place: Path) -> None:
    index, storage = open_index(place)
    assert set(index.tensors.keys) == set(fixture.tensors)
    reads = {key: request(index, key) for key in index.tensors.keys}
    read_tensors(index, storage, list(reads.values()), threads=2, verify=True)
    for key, wanted in fixture.tensors.items():
        assert_same_array(sink_of(reads[key]).array, wanted, key)
        assert sink_of(reads[key]).commits == 1
    assert set(_objects(index, storage)) == set(fixture.objects)


def test_the_kind_is_found_out() -> None:
    sources = {
        "2.13.0/async_w2": "dcp",
        "2.11.0/no_collectives_w2": "dcp-per-rank",
        "2.13.0/hf_dist_w2": "huggingface",
    }
    for name, source in sources.items():
        assert open_index(BY_NAME[name].checkpoint)[0].source == source
    file = BY_NAME["2.13.0/torch_save_w1"].checkpoint / "full.pt"
    assert open_index(file)[0].source == "torch"
    assert open_index(LocalStorage(BY_NAME["2.13.0/async_w2"].checkpoint))[0].source == "dcp"
    assert open_index(BY_NAME["2.13.0/async_w2"].checkpoint / ".metadata")[0].source == "dcp"
    assert open_index(f"file://{file}")[0].source == "torch"


@pytest.mark.parametrize("fixture", public_fixtures(), ids=str)
def test_only_safetensors_images_are_taken_for_such(fixture: Fixture) -> None:
    if fixture.expected["format"] == "torch":
        return
    storage = CountingStorage(LocalStorage(fixture.checkpoint))
    index, _ = open_index(storage)
    images = index.chunks.container == Container.SAFETENSORS_IMAGE
    if fixture.expected["format"] == "fs-safetensors":
        assert images.all()
    else:
        assert not images.any()
    if fixture.expected["format"] == "fs":
        opened = {o.name for o in storage.operations if o.kind == "open"}
        assert opened == set(index.metadata_files), "no data file is looked into"


def test_nothing_there_tells_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="absent"):
        open_index(tmp_path / "absent")
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_index(tmp_path)
    for looked_for in (str(tmp_path), ".metadata", "__<rank>.metadata", "safetensors", ".pt"):
        assert looked_for in str(caught.value)
    with pytest.raises(CheckpointNotFoundError):
        open_index("")
    with pytest.raises(NotSupportedError, match="s3://"):
        open_index("s3://bucket/step-1")


def test_one_torch_save_file_is_enough_and_two_are_too_many(tmp_path: Path) -> None:
    source = BY_NAME["2.13.0/torch_save_w1"].checkpoint
    shutil.copy(source / "full.pt", tmp_path / "model.pt")
    assert open_index(tmp_path)[0].source == "torch"
    shutil.copy(source / "full.pt", tmp_path / "other.pt")
    with pytest.raises(CheckpointNotFoundError, match=r"model\.pt, other\.pt"):
        open_index(tmp_path)


def test_other_files_are_refused_with_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no checkpoint")
    with pytest.raises(ShardpointError, match=r"notes\.txt"):
        open_index(tmp_path / "notes.txt")


def test_a_link_given_by_the_caller_is_followed_but_not_one_inside(tmp_path: Path) -> None:
    source = BY_NAME["2.13.0/async_w2"].checkpoint
    (tmp_path / "link").symlink_to(source)
    assert open_index(tmp_path / "link")[0].source == "dcp"
    inside = tmp_path / "inside"
    inside.mkdir()
    os.symlink(source / ".metadata", inside / ".metadata")
    with pytest.raises(UnsafePathError):
        open_index(inside)


def test_an_image_that_is_cut_is_named(tmp_path: Path) -> None:
    place = tmp_path / "ckpt"
    shutil.copytree(BY_NAME["2.13.0/safetensors_fmt_w2"].checkpoint, place)
    file = place / "__1_0.distcp"
    os.chmod(file, 0o644)
    file.write_bytes(file.read_bytes()[:-5])
    index, storage = open_index(place)
    with pytest.raises(ShardpointError, match="__1_0"):
        read_tensors(index, storage, [request(index, "norm")], threads=1, verify=True)


@pytest.mark.parametrize("release", ["2.11.0", "2.15.0"])
@pytest.mark.parametrize("rank", [0, 1])
def test_own_rank_comes_first_where_ranks_saved_alone(release: str, rank: int) -> None:
    fixture = BY_NAME[f"{release}/no_collectives_w2"]
    own = fixture.expected["per_rank"][f"__{rank}.metadata"]
    index, storage = open_index(fixture.checkpoint, prefer_rank=rank)
    places = set()
    for chunk in range(len(index.chunks)):
        row = int(index.chunks.tensor[chunk])
        axes = int(index.tensors.ndim[row])
        places.add(
            (
                index.tensors.keys[row],
                tuple(index.chunks.offsets[chunk, :axes].tolist()),
                index.files[index.chunks.file[chunk]],
                int(index.chunks.record_offset[chunk]),
                int(index.chunks.record_length[chunk]),
            )
        )
    for key, chunks in own["tensors"].items():
        for chunk in chunks:
            assert (key, tuple(chunk["offsets"]), *chunk["storage"].values()) in places
    for row, key in enumerate(index.objects.keys):
        if key in own["objects"]:
            assert own["objects"][key] == {
                "relative_path": index.files[index.objects.file[row]],
                "offset": index.objects.record_offset[row],
                "length": index.objects.record_length[row],
            }
    reads = {key: request(index, key) for key in index.tensors.keys}
    read_tensors(index, storage, list(reads.values()), threads=1, verify=True)
    assert set(_objects(index, storage)) == set(fixture.objects)


def test_objects_that_are_not_where_the_metadata_says(tmp_path: Path) -> None:
    place = tmp_path / "ckpt"
    shutil.copytree(BY_NAME["2.13.0/async_w2"].checkpoint, place)
    index, storage = open_index(place)
    key = index.objects.keys[0]
    for column, value in (("record_offset", 1 << 40), ("record_length", -3), ("file", -1)):
        index, storage = open_index(place)
        getattr(index.objects, column)[0] = value
        with pytest.raises(CorruptionError, match=repr(key)):
            read_object(index, storage, 0, factory=NumpyFactory(), allowed={}, verify=True)
    index, storage = open_index(place)
    with pytest.raises(PlanError):
        read_object(index, storage, 999, factory=NumpyFactory(), allowed={}, verify=True)
    (place / index.files[int(index.objects.file[0])]).unlink()
    with pytest.raises(CorruptionError, match=repr(key)):
        read_object(index, storage, 0, factory=NumpyFactory(), allowed={}, verify=True)


def test_compressed_chunks_that_decode_to_too_much_are_refused() -> None:
    hostile = PUBLIC.parent / "hostile" / "zstd_bomb" / "ckpt"
    index, storage = open_index(hostile)
    read = request(index, "zeros")
    with pytest.raises(LimitExceededError, match="zeros"):
        read_tensors(index, storage, [read], threads=1, verify=True)
    assert sink_of(read).asked == 0


def _cache(tmp_path: Path, *, blob: str = "0a1b2c") -> Path:
    """Lay a file out as Hugging Face's cache does; return the snapshot's folder."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "f00d"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parent.parent / "blobs"
    blobs.mkdir()
    save_file({"w": np.arange(6.0)}, blobs / blob)
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{blob}")
    return snapshot


def _read(place: Path | str, key: str) -> np.ndarray:  # type: ignore[type-arg]
    index, storage = open_index(place)
    read = request(index, key)
    read_tensors(index, storage, [read], threads=1, verify=True)
    return sink_of(read).array


def test_the_cache_of_hugging_face_is_read(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path)
    for place in (snapshot, snapshot / "model.safetensors"):
        assert _read(place, "w").tolist() == [0, 1, 2, 3, 4, 5]
    (snapshot.parent / "main").symlink_to("f00d")
    assert _read(snapshot.parent / "main", "w").tolist() == [0, 1, 2, 3, 4, 5]
    index = snapshot.parent.parent / "blobs" / "1111"
    index.write_text(json.dumps({"weight_map": {"w": "model.safetensors"}}))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/1111")
    for place in (snapshot, snapshot / "model.safetensors.index.json"):
        assert open_index(place)[0].metadata_files == ["model.safetensors.index.json"]
        assert _read(place, "w").tolist() == [0, 1, 2, 3, 4, 5]


def test_other_links_out_of_a_snapshot_are_refused(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    (tmp_path / "secret").write_bytes((blobs / "0a1b2c").read_bytes())
    (blobs / "sub").mkdir()
    (blobs / "sub" / "deep").write_bytes((blobs / "0a1b2c").read_bytes())
    (blobs / "away").symlink_to(tmp_path / "secret")
    for target in ("../../../secret", "../../blobs/sub/deep", "../../blobs/away"):
        (snapshot / "model.safetensors").unlink()
        (snapshot / "model.safetensors").symlink_to(target)
        with pytest.raises(UnsafePathError, match="model"):
            open_index(snapshot)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../blobs/0a1b2c")
    with pytest.raises(UnsafePathError):
        open_index(snapshot)


def test_blobs_are_for_reading_only(tmp_path: Path) -> None:
    snapshot = _cache(tmp_path)
    (snapshot / "sub").symlink_to("../../blobs")
    with pytest.raises(UnsafePathError):
        LocalStorage(snapshot).replace("sub/0a1b2c", b"", sync=False)
    with pytest.raises(UnsafePathError):
        LocalStorage(snapshot).remove("sub/0a1b2c")


def test_a_file_is_what_its_name_says_wherever_its_link_leads(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_file({"w": np.arange(3.0)}, tmp_path / "a" / "content")
    (tmp_path / "b" / "w.safetensors").symlink_to("../a/content")
    assert _read(tmp_path / "b" / "w.safetensors", "w").tolist() == [0, 1, 2]
    with pytest.raises(UnsafePathError):
        open_index(tmp_path / "b")


def test_only_the_folders_that_count_are_looked_into(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    save_file({"w": np.arange(3.0)}, tmp_path / "deep" / "er" / "model.safetensors")
    with pytest.raises(CheckpointNotFoundError, match="no checkpoint at"):
        open_index(tmp_path)
    save_file({"w": np.arange(4.0)}, tmp_path / "model.safetensors")
    storage = CountingStorage(LocalStorage(tmp_path))
    assert open_index(storage)[0].tensors.shape_of(0) == (4,)
    assert {o.name for o in storage.operations if o.kind == "list_folder"} == {""}
    assert not storage.calls["list"]


def test_a_subfolder_that_cannot_be_listed_is_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sharded", "other"):
        (tmp_path / name).mkdir()
    scan = os.scandir

    def scandir(path: str) -> object:
        if os.path.basename(path) in ("sharded", "other"):
            raise PermissionError(errno.EACCES, "no", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match="sharded"):
        open_index(tmp_path)
    shutil.copy(BY_NAME["2.13.0/torch_save_w1"].checkpoint / "full.pt", tmp_path / "model.pt")
    assert open_index(tmp_path)[0].source == "torch"
    save_file({"w": np.arange(3.0)}, tmp_path / "model.safetensors")
    assert open_index(tmp_path)[0].source == "huggingface"


def test_a_parent_of_checkpoints_names_them(tmp_path: Path) -> None:
    for step in (1, 2):
        (tmp_path / f"step-{step}").mkdir()
        (tmp_path / f"step-{step}" / ".metadata").touch()
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_index(tmp_path)
    assert "'step-1', 'step-2'" in str(caught.value)
    assert "logs" not in str(caught.value)


def test_a_data_file_is_told_from_a_checkpoint() -> None:
    folder = BY_NAME["2.13.0/async_w2"].checkpoint
    with pytest.raises(FormatError, match="a data file of a checkpoint folder: open its folder"):
        open_index(folder / "__0_0.distcp")


class _FailingStorage(LocalStorage):
    """Reading over one position of a file fails."""

    def __init__(self, path: Path, name: str, position: int, error: Exception) -> None:
        super().__init__(path)
        self._bad = (name, position, error)

    def open(self, name: str) -> Any:
        file = super().open(name)
        bad, position, error = self._bad
        if name == bad:
            read_into = file.read_into

            class Failing:
                size = file.size
                close = file.close

                def read_into(self, offset: int, buffers: Any) -> None:
                    if offset <= position < offset + sum(map(len, buffers)):
                        raise error
                    read_into(offset, buffers)

            return Failing()
        return file


def _objects_of_plain() -> tuple[CheckpointIndex, Path, list[int]]:
    """Return an index, its place, and rows of at least three objects that touch."""
    place = BY_NAME["2.13.0/plain_w1"].checkpoint
    index, _ = open_index(place)
    rows = sorted(range(len(index.objects)), key=lambda row: int(index.objects.record_offset[row]))
    return index, place, rows


def test_the_object_that_cannot_be_read_is_the_one_named() -> None:
    index, place, rows = _objects_of_plain()
    middle = rows[len(rows) // 2]
    key = index.objects.keys[middle]
    position = int(index.objects.record_offset[middle]) + 10
    name = index.files[int(index.objects.file[middle])]
    error = ForbiddenContentError("made up", qualified_name="a.B")
    storage = _FailingStorage(place, name, position, error)
    with pytest.raises(ForbiddenContentError, match="made up") as caught:
        list(read_object_records(index, storage, rows))
    assert str(caught.value).startswith(f"key {key!r}: ")
    assert caught.value.qualified_name == "a.B"
    failures: dict[int, ShardpointError] = {}
    found = dict(read_object_records(index, storage, rows, failures=failures))
    assert list(failures) == [middle]
    assert set(found) == set(rows) - {middle}
    refusing = _FailingStorage(place, name, position, StorageError(errno.EIO, "broken"))
    with pytest.raises(StorageError, match="broken") as refused:
        list(read_object_records(index, refusing, rows))
    assert refused.value.errno == errno.EIO


def test_all_objects_are_read_but_the_bad_ones() -> None:
    index, place, rows = _objects_of_plain()
    bad = rows[1]
    index.objects.record_length[bad] += 1 << 40
    failures: dict[int, ShardpointError] = {}
    values = dict(
        read_objects(
            index,
            LocalStorage(place),
            rows,
            factory=NumpyFactory(),
            allowed={},
            verify=True,
            failures=failures,
        )
    )
    assert list(failures) == [bad]
    assert repr(index.objects.keys[bad]) in str(failures[bad])
    assert set(values) == set(rows) - {bad}


@pytest.mark.parametrize("place", ["nul\0byte", "\ud800"])
def test_what_can_be_no_path_is_said_also_while_a_save_goes_on(
    monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    waited: list[str] = []
    monkeypatch.setattr(unfinished, "_waits", [waited.append])
    with pytest.raises(StorageError, match="can be no file's name"):
        shardpoint.open(place)
    assert not waited
