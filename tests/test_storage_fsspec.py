"""Checkpoints in the file systems of fsspec."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import known_implementations
from safetensors.numpy import save_file

import shardpoint
from fixture_support import PUBLIC, assert_same_array, public_fixtures
from shardpoint.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    NotSupportedError,
    StorageError,
)
from shardpoint.storage import LocalStorage, Storage, storage_at
from shardpoint.storage.fsspec import FsspecStorage
from shardpoint.storage.spooling import MOST_IN_MEMORY
from storage_conformance import StorageConformance


@pytest.fixture
def memory_url() -> Iterator[str]:
    place = uuid.uuid4().hex
    yield f"memory://{place}/ckpt"
    files = fsspec.filesystem("memory")
    if files.exists(f"/{place}"):
        files.rm(f"/{place}", recursive=True)


class TestMemory(StorageConformance):
    @pytest.fixture
    def storage(self, memory_url: str) -> Storage:
        return storage_at(memory_url)


class TestFile(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FsspecStorage.from_url(f"file://{tmp_path / 'ckpt'}")


class TestFolderOfAnother(StorageConformance):
    @pytest.fixture
    def storage(self, memory_url: str) -> Storage:
        outer = memory_url.removeprefix("memory:/").rpartition("/")[0]
        files = MemoryFileSystem()
        files.makedirs(outer)
        return FsspecStorage(DirFileSystem(outer, files), "ckpt")


class TestRootOfAnother(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FsspecStorage(DirFileSystem(str(tmp_path / "ckpt"), fsspec.filesystem("file")), "")


def test_urls_of_local_files_are_local_storage(tmp_path: Path) -> None:
    for url in (str(tmp_path), tmp_path, f"file://{tmp_path}", f"local://{tmp_path}"):
        storage = storage_at(url)
        assert isinstance(storage, LocalStorage)
        assert storage.location == str(tmp_path)


def test_unknown_protocol_is_named(memory_url: str) -> None:
    with pytest.raises(NotSupportedError, match="nosuchthing"):
        shardpoint.open("nosuchthing://a/b")


def test_protocol_whose_package_is_missing_names_the_package(monkeypatch: Any) -> None:
    missing = {"class": "absent_package.Files", "err": "Install absent_package to use wanting"}
    monkeypatch.setitem(known_implementations, "wanting", missing)
    with pytest.raises(NotSupportedError, match="Install absent_package to use wanting"):
        shardpoint.open("wanting://a/b")


def test_large_file_goes_through_a_temporary_file(
    memory_url: str, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = storage_at(memory_url)
    storage.prepare()
    content = np.random.default_rng(0).bytes(MOST_IN_MEMORY + 3)
    half = len(content) // 2
    with storage.create("large", size=len(content)) as file:
        file.write_from(half, [memoryview(content)[half:]])
        assert len(list(tmp_path.iterdir())) == 1
        file.write_from(0, [memoryview(content)[:half]])
        assert not storage.has("large")
    assert storage.read("large") == content
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [10, MOST_IN_MEMORY + 1])
def test_unfinished_file_never_reaches_the_store(
    memory_url: str, tmp_path: Path, monkeypatch: Any, size: int
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    storage = storage_at(memory_url)
    storage.prepare()
    file = storage.create("partial", size=size)
    file.write_from(0, [memoryview(b"1234")])
    file.close()
    file.close()
    assert storage.list() == []
    assert list(tmp_path.iterdir()) == []


def test_writing_past_the_announced_size_is_refused(memory_url: str) -> None:
    storage = storage_at(memory_url)
    storage.prepare()
    with (
        storage.create("a", size=3) as file,
        pytest.raises(StorageError, match="announced with 3 bytes"),
    ):
        file.write_from(2, [memoryview(b"12")])


class _FailingFiles(MemoryFileSystem):
    """Fails as clouds do: with exceptions of its own."""

    protocol = "failing"
    cachable = False

    class RemoteError(Exception):
        pass

    def cat_file(self, path: str, start: Any = None, end: Any = None, **_: Any) -> bytes:
        raise self.RemoteError("403 Forbidden")

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:  # type: ignore[override]
        raise OSError(28, "No space left on device")


def test_errors_of_the_store_name_file_and_cause(memory_url: str) -> None:
    folder = memory_url.removeprefix("memory:/")
    MemoryFileSystem().pipe_file(f"{folder}/a", b"1")
    storage = FsspecStorage(_FailingFiles(), folder, location="failing://x")
    with pytest.raises(StorageError, match=r"cannot read 'failing://x/a'.*RemoteError: 403"):
        storage.read("a")
    with pytest.raises(StorageError, match="No space left") as caught:
        storage.replace("b", b"1", sync=True)
    assert caught.value.errno == 28


class _CountingFiles(MemoryFileSystem):
    """Counts the bytes of ranged reads."""

    protocol = "memory"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fetched = 0
        self._counting = threading.Lock()

    def cat_file(self, path: str, start: Any = None, end: Any = None, **options: Any) -> bytes:
        data = super().cat_file(path, start=start, end=end, **options)
        with self._counting:
            self.fetched += len(data)
        return data


def test_slice_fetches_only_its_ranges(memory_url: str, tmp_path: Path) -> None:
    array = np.arange(1 << 20, dtype=np.float32).reshape(1024, 1024)
    save_file({"weight": array}, tmp_path / "model.safetensors")
    files = _CountingFiles()
    folder = memory_url.removeprefix("memory:/")
    files.pipe_file(f"{folder}/model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    index, storage = shardpoint.engine.opening.open_index(FsspecStorage(files, folder))
    checkpoint = shardpoint.checkpoint.Checkpoint(
        index, storage, allowed={}, verify=True, threads=4
    )
    files.fetched = 0
    found = checkpoint.read("weight", (slice(100, 110), slice(None)))
    assert_same_array(found, array[100:110], "weight")
    assert files.fetched == 10 * 4096


def _copy(folder: Path, url: str) -> None:
    files, path = fsspec.core.url_to_fs(url)
    for source in folder.rglob("*"):
        if source.is_file():
            files.pipe_file(f"{path}/{source.relative_to(folder).as_posix()}", source.read_bytes())


@pytest.mark.parametrize("name", ["dtensor_2d_w4", "hf_consolidated_w2", "torch_save_w1"])
def test_formats_are_read_from_a_url(memory_url: str, name: str) -> None:
    fixture = next(f for f in public_fixtures() if f.directory == PUBLIC / "2.13.0" / name)
    _copy(fixture.checkpoint, memory_url)
    place = fixture.places[0].relative_to(fixture.checkpoint).as_posix()
    with shardpoint.open(memory_url if place == "." else f"{memory_url}/{place}") as checkpoint:
        assert checkpoint.location == memory_url
        for key, expected in fixture.tensors.items():
            assert_same_array(checkpoint[key], expected, key)
        assert checkpoint.verify().ok


def test_open_reads_one_file_by_its_url(memory_url: str, tmp_path: Path) -> None:
    save_file({"a": np.arange(4)}, tmp_path / "x.safetensors")
    _copy(tmp_path, memory_url)
    with shardpoint.open(f"{memory_url}/x.safetensors") as checkpoint:
        assert checkpoint["a"].tolist() == [0, 1, 2, 3]
    with shardpoint.open(f"file://{tmp_path}/x.safetensors") as checkpoint:
        assert checkpoint["a"].tolist() == [0, 1, 2, 3]


def test_nothing_at_a_url(memory_url: str) -> None:
    with pytest.raises(CheckpointNotFoundError, match="memory://"):
        shardpoint.open(memory_url)
    storage_at(memory_url).replace("__0_0.distcp", b"", sync=False)
    with pytest.raises(FormatError, match="open its folder"):
        shardpoint.open(f"{memory_url}/__0_0.distcp")


def test_file_that_vanished_is_missing(memory_url: str) -> None:
    storage = storage_at(memory_url)
    storage.replace("a", bytes(100_000), sync=False)
    with storage.open("a") as file:
        storage.remove("a")
        with pytest.raises(CorruptionError, match="'a' is missing"):
            file.read_into(0, [memoryview(bytearray(1))])


def test_renamed_file_takes_the_place_of_another(memory_url: str, tmp_path: Path) -> None:
    for storage in (
        storage_at(memory_url),
        FsspecStorage.from_url(f"file://{tmp_path}/a"),
        LocalStorage(tmp_path / "b"),
    ):
        storage.prepare()
        storage.replace("old", b"old", sync=False)
        storage.replace("new", b"new", sync=False)
        storage.rename("new", "old")
        assert storage.list() == ["old"]
        assert storage.read("old") == b"new"
        storage.rename("old", "sub/old")
        assert storage.list() == ["sub/old"]
