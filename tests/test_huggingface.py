"""Folders of safetensors files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from fixture_support import HOSTILE, PUBLIC, Fixture, assert_same_array, public_fixtures
from shardpoint.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    NotSupportedError,
    UnsafePathError,
)
from shardpoint.formats.huggingface import read_directory
from shardpoint.index import CheckpointIndex, Container
from shardpoint.storage import LocalStorage

HF_FIXTURES = [f for f in public_fixtures() if f.expected["format"] == "hf"]


def read_all(folder: Path, index: CheckpointIndex) -> dict[str, np.ndarray[Any, Any]]:
    """Put every tensor together from the spans in the index, in the plainest way."""
    result = {}
    chunks = index.chunks
    assert chunks.payloads is not None
    for row, key in enumerate(index.tensors.keys):
        dtype, shape = index.tensors.dtype_of(row), index.tensors.shape_of(row)
        whole = np.zeros(shape, dtype.numpy)
        covered = 0
        for c in range(index.tensors.first_chunk[row], index.tensors.first_chunk[row + 1]):
            assert chunks.container[c] == Container.RAW
            offsets = chunks.offsets[c, : len(shape)].tolist()
            sizes = chunks.sizes[c, : len(shape)].tolist()
            start, length = int(chunks.payloads.offset[c]), int(chunks.payloads.length[c])
            assert (start, length) == (chunks.record_offset[c], chunks.record_length[c])
            data = (folder / index.files[chunks.file[c]]).read_bytes()[start : start + length]
            box = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            whole[box] = np.frombuffer(data, dtype.numpy).reshape(sizes)
            covered += int(np.prod(sizes))
        assert covered == whole.size
        result[key] = whole
    return result


def boxes(index: CheckpointIndex, key: str) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    row = list(index.tensors.keys).index(key)
    axes = int(index.tensors.ndim[row])
    rows = range(index.tensors.first_chunk[row], index.tensors.first_chunk[row + 1])
    return {
        (
            tuple(index.chunks.offsets[c, :axes].tolist()),
            tuple(index.chunks.sizes[c, :axes].tolist()),
        )
        for c in rows
    }


@pytest.mark.parametrize("fixture", HF_FIXTURES, ids=str)
def test_reads_what_torch_wrote(fixture: Fixture) -> None:
    index = read_directory(LocalStorage(fixture.checkpoint))
    assert index.source == "huggingface"
    assert set(index.key_order) == fixture.keys
    assert index.paths == {key: (key,) for key in fixture.keys}
    found = read_all(fixture.checkpoint, index)
    for key, expected in fixture.tensors.items():
        assert_same_array(found[key], expected, key)
        entry = fixture.expected["tensors"][key]
        wanted = entry.get("consolidated_chunks", entry["chunks"])
        assert boxes(index, key) == {(tuple(c["offsets"]), tuple(c["sizes"])) for c in wanted}


CONSOLIDATED = PUBLIC / "2.13.0" / "hf_consolidated_w2"


def test_full_files_are_preferred_to_shards() -> None:
    index = read_directory(LocalStorage(CONSOLIDATED / "ckpt"))
    assert not any(name.startswith("sharded/") for name in index.files)
    assert list(index.metadata_files) == ["model.safetensors.index.json"]


def test_shards_are_read_where_there_are_no_full_files(tmp_path: Path) -> None:
    shutil.copytree(CONSOLIDATED / "ckpt" / "sharded", tmp_path / "x" / "sharded")
    index = read_directory(LocalStorage(tmp_path / "x"))
    fixture = next(f for f in HF_FIXTURES if f.directory == CONSOLIDATED)
    for key, array in read_all(tmp_path / "x", index).items():
        assert_same_array(array, fixture.tensors[key], key)


def test_one_file_alone(tmp_path: Path) -> None:
    arrays = {"b": np.arange(5, dtype=np.int16), "a": np.array(2.5)}
    save_file(arrays, tmp_path / "model.safetensors")
    save_file({"other": np.ones(2)}, tmp_path / "other.safetensors")
    index = read_directory(LocalStorage(tmp_path), "model.safetensors")
    assert set(index.key_order) == {"a", "b"}
    for key, array in read_all(tmp_path, index).items():
        assert_same_array(array, arrays[key], key)


def test_index_decides_where_a_tensor_is_read(tmp_path: Path) -> None:
    save_file({"a": np.ones(2), "extra": np.zeros(1)}, tmp_path / "1.safetensors")
    save_file({"a": np.full(2, 7.0), "b": np.ones(1)}, tmp_path / "2.safetensors")
    save_file({"unused": np.ones(1)}, tmp_path / "3.safetensors")
    write_index(tmp_path, {"b": "2.safetensors", "a": "1.safetensors"})
    index = read_directory(LocalStorage(tmp_path))
    assert list(index.key_order) == ["b", "a", "extra"]
    assert read_all(tmp_path, index)["a"].tolist() == [1.0, 1.0]


def write_index(folder: Path, weight_map: Any, name: str = "model") -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / f"{name}.safetensors.index.json").write_text(text)


def test_index_that_names_a_tensor_its_file_lacks(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "1.safetensors"})
    with pytest.raises(FormatError, match=r"'b'.*1\.safetensors.*does not have it"):
        read_directory(LocalStorage(tmp_path))


def test_index_that_names_a_missing_file(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "1.safetensors"})
    with pytest.raises(CorruptionError, match=r"1\.safetensors"):
        read_directory(LocalStorage(tmp_path))


@pytest.mark.parametrize("weight_map", [None, {}, [], "x", {"a": 1}])
def test_index_that_is_none(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(FormatError, match="weight_map"):
        read_directory(LocalStorage(tmp_path))


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b"[" * 100_000])
def test_index_that_is_no_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"index\.json"):
        read_directory(LocalStorage(tmp_path))


def test_two_indexes_are_not_guessed_between(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors"}, "one")
    write_index(tmp_path, {"a": "1.safetensors"}, "two")
    with pytest.raises(FormatError, match=r"one\.safetensors\.index\.json, two"):
        read_directory(LocalStorage(tmp_path))
    chosen = read_directory(LocalStorage(tmp_path), "two.safetensors.index.json")
    assert list(chosen.key_order) == ["a"]


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        read_directory(LocalStorage(tmp_path))
    with pytest.raises(CheckpointNotFoundError):
        read_directory(LocalStorage(tmp_path), "model.safetensors")


def test_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.ones(2)}, tmp_path / "1.safetensors")
    save_file({"a": np.ones(2)}, tmp_path / "2.safetensors")
    with pytest.raises(FormatError, match=r"'a'.*2\.safetensors.*1\.safetensors"):
        read_directory(LocalStorage(tmp_path))


def write_shard(folder: Path, name: str, array: np.ndarray[Any, Any], offsets: Any) -> None:
    info = json.dumps({"a": {"saved_offsets": offsets}})
    metadata = {"DCP_SHARDING_INFO": info, "DCP_VERSION": "1.0", "format": "pt"}
    save_file({"a": array}, folder / name, metadata)


def test_box_that_several_ranks_wrote_is_kept_once(tmp_path: Path) -> None:
    write_shard(tmp_path, "1.safetensors", np.ones(2), [0])
    write_shard(tmp_path, "2.safetensors", np.ones(2), [0])
    write_shard(tmp_path, "3.safetensors", np.ones(1), [2])
    index = read_directory(LocalStorage(tmp_path))
    assert boxes(index, "a") == {((0,), (2,)), ((2,), (1,))}
    assert len(index.chunks) == 2
    assert index.tensors.shape_of(0) == (3,)


@pytest.mark.parametrize("offsets", [[-1], [0, 0], [], None, "0", [True], [1.5], [1 << 63], [None]])
def test_offsets_that_cannot_be(tmp_path: Path, offsets: Any) -> None:
    write_shard(tmp_path, "1.safetensors", np.ones(2), offsets)
    with pytest.raises(FormatError, match=r"'a'.*1\.safetensors.*saved_offsets"):
        read_directory(LocalStorage(tmp_path))


@pytest.mark.parametrize("second", [np.ones((2, 1)), np.ones(2, np.float32)])
def test_shards_that_differ_in_kind(tmp_path: Path, second: np.ndarray[Any, Any]) -> None:
    write_shard(tmp_path, "1.safetensors", np.ones(2), [0])
    write_shard(tmp_path, "2.safetensors", second, [2] * second.ndim)
    with pytest.raises(FormatError, match=r"'a'.*2\.safetensors"):
        read_directory(LocalStorage(tmp_path))


@pytest.mark.parametrize("info", ["", "[]", "{", "3", '{"a": 3}', "[" * 100_000])
def test_sharding_info_that_is_none(tmp_path: Path, info: str) -> None:
    save_file({"a": np.ones(1)}, tmp_path / "1.safetensors", {"DCP_SHARDING_INFO": info})
    with pytest.raises(FormatError, match="DCP_SHARDING_INFO"):
        read_directory(LocalStorage(tmp_path))


def test_unknown_dtype_names_key_and_file(tmp_path: Path) -> None:
    raw = b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}'
    (tmp_path / "m.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0")
    with pytest.raises(NotSupportedError, match=r"'a'.*m\.safetensors.*F4"):
        read_directory(LocalStorage(tmp_path))


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("hf_header_length", CorruptionError, r"model-00001-of-00003\.safetensors"),
        ("hf_data_offsets", FormatError, r"model\.embed\.weight.*model-00001"),
        ("hf_index_path", UnsafePathError, r"outside\.safetensors"),
        ("hf_saved_offsets", FormatError, r"model\.embed\.weight.*shard-00002.*-1"),
        ("hf_missing_shard", FormatError, r"shard-00002.*DCP_SHARDING_INFO"),
    ],
)
def test_hostile_folders(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises((kind, CorruptionError), match=message):
        read_directory(LocalStorage(HOSTILE / name / "ckpt"))
