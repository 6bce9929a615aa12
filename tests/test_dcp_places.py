"""Saving to and loading from URLs, and file systems that programs bring."""

from __future__ import annotations

import io
import os
import pickle
import uuid
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed.checkpoint as theirs
from fsspec.implementations.memory import MemoryFileSystem
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader as TheirReader
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter as TheirWriter
from torch.distributed.checkpoint.filesystem import FileSystem as TheirFileSystem

import shardpoint
import shardpoint.dcp as ours
from shardpoint.dcp._file_system_storage import FileSystemStorage
from shardpoint.dcp.extension import ZStandard
from shardpoint.dcp.filesystem import FileSystem, FileSystemBase
from shardpoint.dcp.format_utils import dcp_to_torch_save
from shardpoint.errors import CheckpointExistsError, PlanError, ShardpointError, StorageError
from shardpoint.storage import LocalStorage, Storage, storage_at
from storage_conformance import StorageConformance


@pytest.fixture
def memory_url() -> Iterator[str]:
    place = uuid.uuid4().hex
    yield f"memory://{place}/ckpt"
    files = fsspec.filesystem("memory")
    if files.exists(f"/{place}"):
        files.rm(f"/{place}", recursive=True)


@pytest.fixture(params=["memory", "file"])
def url(request: Any, memory_url: str, tmp_path: Path) -> str:
    return memory_url if request.param == "memory" else f"file://{tmp_path}/ckpt"


def state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {
            "weight": torch.randn(40, 30, generator=generator),
            "bias": torch.randn(30, generator=generator).to(torch.bfloat16),
        },
        "step": seed,
        "names": ["a", "b"],
    }


def empty() -> dict[str, Any]:
    return {
        "model": {"weight": torch.zeros(40, 30), "bias": torch.zeros(30, dtype=torch.bfloat16)},
        "step": -1,
        "names": [],
    }


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("weight", "bias"):
        assert torch.equal(found["model"][name], wanted["model"][name])
    assert (found["step"], found["names"]) == (wanted["step"], wanted["names"])


def their_load(target: dict[str, Any], reader: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.load(target, storage_reader=reader, no_dist=True)


def their_save(saved: dict[str, Any], writer: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save(saved, storage_writer=writer, no_dist=True)


def test_save_and_load_by_url(url: str) -> None:
    metadata = ours.save(state(1), checkpoint_id=url)
    assert metadata.storage_meta is not None
    assert metadata.storage_meta.checkpoint_id == url
    target = empty()
    report = ours.load(target, checkpoint_id=url)
    assert_same(target, state(1))
    assert report.bytes_read > 0
    with shardpoint.open(url) as checkpoint:
        assert checkpoint["step"] == 1
        assert checkpoint.verify().ok


def test_torch_reads_what_we_wrote_through_fsspec(url: str) -> None:
    ours.save(state(1), storage_writer=ours.FsspecWriter(url, thread_count=2))
    target = empty()
    their_load(target, TheirReader(url))
    assert_same(target, state(1))


def test_we_read_what_torch_wrote_through_fsspec(url: str) -> None:
    their_save(state(1), TheirWriter(url))
    for reader in (ours.FsspecReader(url), ours.FileSystemReader(url)):
        target = empty()
        ours.load(target, storage_reader=reader)
        assert_same(target, state(1))


@pytest.mark.parametrize("package", ["torch", "shardpoint"])
def test_compressed_checkpoints_by_url(url: str, package: str) -> None:
    # the lengths of compressed records are not known before they are written
    writer = ours.FsspecWriter(url, _extensions=[ZStandard()])
    ours.save(state(1), storage_writer=writer)
    target = empty()
    if package == "torch":
        their_load(target, TheirReader(url))
    else:
        ours.load(target, storage_reader=ours.FsspecReader(url))
    assert_same(target, state(1))


def test_overwriting_by_url_leaves_only_the_new_checkpoint(url: str) -> None:
    ours.save(state(1), checkpoint_id=url)
    first = storage_at(url).list()
    ours.save(state(2), checkpoint_id=url)
    second = storage_at(url).list()
    assert len(first) == len(second)
    assert set(first) & set(second) <= {".metadata", ".shardpoint"}
    target = empty()
    ours.load(target, checkpoint_id=url)
    assert_same(target, state(2))
    with pytest.raises(ours.CheckpointException) as caught:
        ours.save(state(3), storage_writer=ours.FsspecWriter(url, overwrite=False))
    assert isinstance(caught.value.failures[0][0], CheckpointExistsError)


class _Breaking(MemoryFileSystem):
    """A memory store whose puts fail from some number on."""

    protocol = "breaking"
    cachable = False

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.allowed = allowed

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:  # type: ignore[override]
        self.allowed -= 1
        if self.allowed < 0:
            raise OSError("no more puts")
        super().pipe_file(path, value, **options)


def test_failed_save_to_a_store_keeps_the_old_checkpoint(memory_url: str, monkeypatch: Any) -> None:
    ours.save(state(1), checkpoint_id=memory_url)
    before = storage_at(memory_url).list()
    puts = 0
    for allowed in range(10):
        writer = ours.FsspecWriter(memory_url)
        storage: Any = writer.storage
        storage._files = _Breaking(allowed)
        try:
            ours.save(state(2), storage_writer=writer)
            break
        except ours.CheckpointException as error:
            assert "no more puts" in str(error)  # noqa: PT017  the loop ends with a success
        puts += 1
        assert storage_at(memory_url).list() == before
        target = empty()
        ours.load(target, checkpoint_id=memory_url)
        assert_same(target, state(1))
    assert puts >= 2  # the data, the metadata
    target = empty()
    ours.load(target, checkpoint_id=memory_url)
    assert_same(target, state(2))


class ObjectStore(MemoryFileSystem):
    """A store as clouds have them: no folders, only names with slashes in them."""

    protocol = "objects"

    def mkdir(self, path: str, *_: Any, **__: Any) -> None:
        pass

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        pass

    def isdir(self, path: str) -> bool:
        return any(name.startswith(path.rstrip("/") + "/") for name in self.store)


def test_stores_without_folders(memory_url: str) -> None:
    fsspec.register_implementation("objects", ObjectStore, clobber=True)
    url = memory_url.replace("memory://", "objects:///")
    assert not storage_at(url).exists()
    for seed in (1, 2):
        ours.save(state(seed), checkpoint_id=url)
        target = empty()
        ours.load(target, checkpoint_id=url)
        assert_same(target, state(seed))
        dcp_to_torch_save(url, f"{url}-files/state.pt")
        with shardpoint.open(f"{url}-files/state.pt") as checkpoint:
            assert checkpoint["step"] == seed
    assert storage_at(f"{url}-files").list() == ["state.pt"]
    assert len(storage_at(url).list()) == 3  # data, index, metadata


def test_unknown_protocol_is_said_when_saving_and_loading() -> None:
    with pytest.raises(ours.CheckpointException, match="nosuchthing"):
        ours.save(state(), checkpoint_id="nosuchthing://a")
    with pytest.raises(ours.CheckpointException, match="nosuchthing"):
        ours.load(empty(), checkpoint_id="nosuchthing://a")


def test_options_reach_the_file_system_and_outlive_reset(memory_url: str) -> None:
    writer = ours.FsspecWriter(memory_url, skip_instance_cache=True, global_store=False)
    ours.save(state(1), storage_writer=writer)
    assert ".metadata" in writer.storage.list()
    ours.save(state(1), storage_writer=writer, checkpoint_id=f"{memory_url}/other")
    assert ".metadata" in writer.storage.list()
    assert not storage_at(memory_url).exists()  # that is in the store that all others share


def test_places_are_validated_as_torch_does(tmp_path: Path) -> None:
    for kind in (ours.FsspecReader, ours.FsspecWriter):
        assert kind.validate_checkpoint_id("memory://x")
        assert kind.validate_checkpoint_id(str(tmp_path))
        assert not kind.validate_checkpoint_id(tmp_path)
        assert not kind.validate_checkpoint_id("nosuchthing://x")
    for ours_kind, theirs_kind in ((FileSystem, TheirFileSystem),):
        for place in (tmp_path, str(tmp_path / "a" / "b"), "memory://x"):
            assert ours_kind.validate_checkpoint_id(place) == theirs_kind.validate_checkpoint_id(
                place
            )


class Drawers(FileSystemBase):
    """A program's own file system: bytes in a dictionary, without rename over a file."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[io.IOBase]:
        if mode == "rb":
            yield io.BytesIO(self.files[path])
            return
        stream = io.BytesIO()
        yield stream
        self.files[path] = stream.getvalue()

    def concat_path(self, path: Any, suffix: str) -> str:
        return f"{path}|{suffix}"

    def rename(self, path: Any, new_path: Any) -> None:
        if new_path in self.files:
            raise FileExistsError(new_path)
        self.files[new_path] = self.files.pop(path)

    def init_path(self, path: Any) -> str:
        return f"drawer {path}"

    def mkdir(self, path: Any) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def exists(self, path: Any) -> bool:
        return path in self.files

    def rm_file(self, path: Any) -> None:
        del self.files[path]


class DrawerWriter(ours.FileSystemWriter):
    def __init__(self, drawers: Drawers, path: str, **options: Any) -> None:
        super().__init__(path, **options)
        self.fs = drawers
        self.path = self.fs.init_path(path)


class DrawerReader(ours.FileSystemReader):
    def __init__(self, drawers: Drawers, path: str) -> None:
        super().__init__(path)
        self.fs = drawers
        self.path = self.fs.init_path(path)


def test_a_programs_own_file_system_is_written_and_read() -> None:
    drawers = Drawers()
    for seed in (1, 2):  # the second save replaces the first
        ours.save(state(seed), storage_writer=DrawerWriter(drawers, "x", thread_count=2))
        target = empty()
        ours.load(target, storage_reader=DrawerReader(drawers, "x"))
        assert_same(target, state(seed))
        written = {name.removeprefix("drawer x|") for name in drawers.files}
        assert ".metadata" in written
        assert all(name.startswith(("__0_", ".")) for name in written)
        count = len(written)
    assert count == len(drawers.files)
    assert not any(name.endswith(".tmp") for name in drawers.files)


class CountingLocal(TheirFileSystem):
    """torch's own local file system, with a call overridden: it must not be bypassed."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        self.opened.append(f"{mode} {Path(path).name}")
        with super().create_stream(path, mode) as stream:
            yield stream


def test_torchs_own_file_system_class_serves_too(tmp_path: Path) -> None:
    writer = ours.FileSystemWriter(tmp_path)
    files = CountingLocal()
    writer.fs = files
    ours.save(state(1), storage_writer=writer)
    assert "wb __0_0.distcp" in files.opened
    reader = ours.FileSystemReader(tmp_path)
    reader.fs = files
    target = empty()
    ours.load(target, storage_reader=reader)
    assert_same(target, state(1))
    assert "rb __0_0.distcp" in files.opened
    their_load(empty(), theirs.FileSystemReader(tmp_path))


def test_plain_file_system_is_the_local_storage(tmp_path: Path) -> None:
    assert isinstance(ours.FileSystemWriter(tmp_path).storage, LocalStorage)
    writer = ours.FileSystemWriter(tmp_path / "a")
    assert writer.storage.location == str(tmp_path / "a")
    writer.path = tmp_path / "b"
    assert writer.storage.location == str(tmp_path / "b")


def test_writers_and_readers_travel_to_other_processes(memory_url: str, tmp_path: Path) -> None:
    for place in (memory_url, str(tmp_path)):
        for made in (ours.FsspecWriter(place), ours.FileSystemWriter(place)):
            assert made.storage is not None
            again = pickle.loads(pickle.dumps(made))
            ours.save(state(1), storage_writer=again)
            reader = pickle.loads(pickle.dumps(ours.FsspecReader(place)))
            target = empty()
            ours.load(target, storage_reader=reader)
            assert_same(target, state(1))


class TestFileSystemStorage(StorageConformance):
    # These need files to be told from folders, for which the interface has no call. Data files
    # of checkpoints have no folders.
    test_one_folder_is_listed_without_what_is_below = None
    test_written_bytes_are_read_back = None
    test_replace_is_whole_and_leaves_nothing_else = None
    test_names_of_other_scripts = None

    def test_files_at_the_top_are_written_listed_and_replaced(self, ready: Storage) -> None:
        with ready.create("größe", size=6) as file:
            file.write_from(3, [memoryview(b"def")])
            file.write_from(0, [memoryview(b"abc")])
        with ready.open("größe") as before:
            ready.replace("größe", b"new", sync=True)
            kept = bytearray(6)
            before.read_into(0, [memoryview(kept)])
        assert bytes(kept) == b"abcdef"
        assert ready.list() == ["größe"]
        assert ready.read("größe") == b"new"

    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return FileSystemStorage(TheirFileSystem(), tmp_path / "ckpt")


@pytest.mark.parametrize("place", ["a\0b", "\ud800"])
def test_a_place_that_no_file_can_have_is_an_error_of_ours(place: str) -> None:
    for act in (ours.save, ours.load):
        with pytest.raises(ours.CheckpointException, match="can be no file's name") as caught:
            act({"a": torch.ones(1)}, checkpoint_id=place)
        assert isinstance(caught.value.causes[0], StorageError)
    with pytest.raises(ShardpointError):
        shardpoint.open(place)


@pytest.mark.parametrize("place", [b"folder", 5, 0, ["a"], Path])
def test_what_is_no_place_is_said_clearly(place: Any) -> None:
    future: Any = ours.async_save({"a": torch.ones(1)}, checkpoint_id=place)
    for act in (
        lambda: ours.save({"a": torch.ones(1)}, checkpoint_id=place),
        lambda: ours.load({"a": torch.ones(1)}, checkpoint_id=place),
        future.result,
    ):
        with pytest.raises(ours.CheckpointException, match="lies at a path or URL") as caught:
            act()
        assert isinstance(caught.value.causes[0], PlanError)
    for make in (ours.FileSystemReader, ours.FileSystemWriter):
        with pytest.raises(PlanError, match="lies at a path or URL"):
            make(place)
    assert os.listdir() == []


class ByNumber(ours.StorageReader):
    """Storage whose checkpoints have numbers, as torch's documentation allows."""

    def __init__(self, folder: Path) -> None:
        self.reader = ours.FileSystemReader(folder)
        self.folder = folder

    def reset(self, checkpoint_id: Any = None) -> None:
        if checkpoint_id is not None:
            self.reader.reset(self.folder / str(checkpoint_id))

    def read_metadata(self, *args: Any, **kwargs: Any) -> ours.Metadata:
        return self.reader.read_metadata(*args, **kwargs)

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        self.reader.set_up_storage_reader(*args, **kwargs)

    def prepare_local_plan(self, plan: ours.LoadPlan) -> ours.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[ours.LoadPlan]) -> list[ours.LoadPlan]:
        return plans

    def read_data(self, plan: ours.LoadPlan, planner: ours.LoadPlanner) -> Any:
        return self.reader.read_data(plan, planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return isinstance(checkpoint_id, int)


def test_storage_of_a_programs_own_has_keys_of_any_kind(tmp_path: Path) -> None:
    ours.async_save({"a": torch.ones(1)}, checkpoint_id=tmp_path / "7").result()  # type: ignore[union-attr]
    target: dict[str, Any] = {"a": torch.zeros(1)}
    ours.load(target, storage_reader=ByNumber(tmp_path), checkpoint_id=7)  # type: ignore[arg-type]
    assert target["a"] == 1


def test_dots_in_a_url_are_the_stores_own_matter(memory_url: str) -> None:
    """As with torch and fsspec, whose memory keeps them as they are, and so do object stores."""
    url = memory_url
    their_save({"a": torch.ones(1)}, TheirWriter(f"{url}/a/../b"))
    target = {"a": torch.zeros(1)}
    ours.load(target, checkpoint_id=f"{url}/a/../b")
    assert target["a"] == 1
    with pytest.raises(ours.CheckpointException, match="no checkpoint"):
        ours.load(target, checkpoint_id=f"{url}/b")
    ours.save({"a": torch.full((1,), 2.0)}, checkpoint_id=f"{url}/c/../b")
    their_load(target, TheirReader(f"{url}/c/../b"))
    assert target["a"] == 2


def test_dots_in_a_path_are_the_file_systems_matter(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    ours.save({"a": torch.ones(1)}, checkpoint_id=f"file://{tmp_path}/a/../b")
    target = {"a": torch.zeros(1)}
    ours.load(target, checkpoint_id=tmp_path / "b")
    assert target["a"] == 1
