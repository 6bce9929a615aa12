"""How folders of safetensors files are read and written while, and after, a save is broken off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import FileSystem as TheirFileSystem
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

import shardpoint
import shardpoint.dcp as dcp
from crash_hugging_face import MAPPINGS, TENSORS, HuggingFaceJob, found_in
from crash_support import NOTHING, Call, interposed
from ranks import RankPool
from shardpoint.cli import main
from shardpoint.convert import to_checkpoint
from shardpoint.dcp._file_system_storage import FileSystemStorage
from shardpoint.dcp.hf_storage import consolidate_safetensors_files_on_every_rank
from shardpoint.errors import (
    CheckpointExistsError,
    ConcurrentSaveError,
    CorruptionError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    ShardpointError,
    StorageError,
    UnsafePathError,
)
from shardpoint.formats.huggingface_journal import JOURNAL_NAME, Journal, decode_journal
from shardpoint.storage import LocalStorage, Storage, storage_at
from shardpoint.storage.base import NoClaim
from shardpoint.storage.renamed import RenamedStorage
from shardpoint.storage.testing import CountingStorage

FULL = HuggingFaceJob("full")
TOKEN = "0123456789abcdef"
ALL = "SHARDPOINT_ALL_FAULTS" in os.environ


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def break_off(folder: Path, name: str, at: Callable[[Call], bool]) -> None:
    """Save, and let everything fail from one call on."""
    is_over = False

    def through(call: Call, do: Callable[[], Any]) -> Any:
        nonlocal is_over
        is_over = is_over or at(call)
        if is_over and call.kind != "close":
            raise OSError(5, "the disk is gone")
        return do()

    with interposed(through), pytest.raises(dcp.CheckpointException):
        FULL.save(folder, name, {})


def broken_off_after_commit(folder: Path) -> None:
    """Leave a folder with old files and a journal that says that new ones count."""
    FULL.save(folder, "old", {})
    break_off(folder, "new", lambda call: call.kind == "remove")
    assert (folder / JOURNAL_NAME).exists()
    assert len(list(folder.glob(".model*.tmp"))) == 3


def test_every_way_of_reading_goes_by_the_journal_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "model"
    broken_off_after_commit(folder)
    before = contents(folder)
    assert found_in(folder) == "new"
    index = folder / "model.safetensors.index.json"
    assert found_in(index) == "new"
    with shardpoint.open(folder / "model-00002-of-00002.safetensors") as one:
        assert one["ids"].tolist() == TENSORS["new"]["ids"].tolist()
    assert main(["verify", str(folder)]) == 0
    assert main(["ls", str(folder)]) == 0
    assert "large" in capsys.readouterr().out
    to_checkpoint(folder, tmp_path / "native")
    with shardpoint.open(tmp_path / "native") as converted:
        assert np.array_equal(converted["large"], TENSORS["new"]["large"].numpy())
    assert contents(folder) == before


def test_what_is_read_stays_readable_while_the_files_get_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    broken_off_after_commit(folder)
    with shardpoint.open(folder) as checkpoint:
        assert checkpoint["half"].tolist() == TENSORS["new"]["half"].tolist()
        for path in sorted(folder.glob(".model*.tmp")):
            path.rename(folder / path.name[1 : -len(f".{TOKEN}.tmp")])
        (folder / JOURNAL_NAME).unlink()
        assert checkpoint["large"].tolist() == TENSORS["new"]["large"].tolist()
        assert checkpoint.verify().ok


def test_a_single_save_finishes_the_last_one_even_if_it_fails_itself(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    broken_off_after_commit(folder)
    break_off(folder, "next", lambda call: call.kind == "create")
    assert not (folder / JOURNAL_NAME).exists()
    assert found_in(folder) == "new"
    assert FULL.garbage(folder) == ()


def test_an_error_after_the_commit_says_what_counts(tmp_path: Path) -> None:
    FULL.save(tmp_path, "old", {})

    def through(call: Call, do: Callable[[], Any]) -> Any:
        if call.kind == "rename" and not call.target.endswith(JOURNAL_NAME):
            raise OSError(5, "no")
        return do()

    with interposed(through), pytest.raises(dcp.CheckpointException, match="new files count"):
        FULL.save(tmp_path, "new", {})
    assert found_in(tmp_path) == "new"


def test_other_softwares_full_files_are_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    save_file(TENSORS["old"], tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    assert load_file(tmp_path / "model.safetensors").keys() == TENSORS["old"].keys()
    FULL.save(tmp_path, "new", {})
    assert found_in(tmp_path) == "new"
    assert sorted(contents(tmp_path)) == [
        "adapter_model.safetensors",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


def test_an_existing_checkpoint_stays_if_overwriting_is_not_wanted(tmp_path: Path) -> None:
    FULL.save(tmp_path, "old", {})
    before = contents(tmp_path)
    writer = FULL.writer(tmp_path, "new")
    writer.overwrite = False
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.save(TENSORS["new"], storage_writer=writer)
    assert isinstance(raised.value.causes[0], CheckpointExistsError)
    assert contents(tmp_path) == before


def journal(**changes: Any) -> bytes:
    content = {
        "format": "shardpoint-replacing",
        "version": 1,
        "committed": True,
        "save": "x",
        "files": [f".model-00001-of-00001.safetensors.{TOKEN}.tmp"],
        "remove": ["model.safetensors"],
    }
    return json.dumps({**content, **changes}).encode()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[" * 200_000,
        b"[]",
        b"\xff\xfe",
        journal(format="x"),
        journal(version=2),
        journal(committed=1),
        journal(save=None),
        journal(files=None),
        journal(files=[1]),
        journal(files={}),
        journal(remove=[["model.safetensors"]]),
        journal(remove=["config.json"]),
        journal(remove=["../model.safetensors"]),
        journal(remove=["/model.safetensors"]),
        journal(remove=["sub/model.safetensors"]),
        journal(remove=["sharded/../model.safetensors"]),
        journal(remove=["model.safetensors", "model.safetensors"]),
        journal(remove=["model-00001-of-00001.safetensors"]),
        journal(files=[f"../.model-00001-of-00001.safetensors.{TOKEN}.tmp"]),
        journal(files=[f"/.model-00001-of-00001.safetensors.{TOKEN}.tmp"]),
        journal(files=[f".config.json.{TOKEN}.tmp"]),
        journal(files=["model-00001-of-00001.safetensors"]),
        journal(files=[f".model-00001-of-00001.safetensors.{TOKEN}.tmp\n"]),
        journal(files=[f".model-00001-of-00001.safetensors.{TOKEN[::s]}.tmp" for s in (1, -1)]),
        journal(committed=False, files=["config.json"]),
        journal(committed=False, files=["../model.safetensors"]),
    ],
)
def test_a_journal_that_no_save_wrote_is_refused(tmp_path: Path, data: bytes) -> None:
    FULL.save(tmp_path, "old", {})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / JOURNAL_NAME).write_bytes(data)
    before = contents(tmp_path)
    with pytest.raises(FormatError):
        decode_journal(data)
    with pytest.raises(FormatError):
        shardpoint.open(tmp_path)
    with pytest.raises(dcp.CheckpointException) as raised:
        FULL.save(tmp_path, "new", {})
    assert isinstance(raised.value.causes[0], FormatError)
    assert contents(tmp_path) == before


def test_a_journal_that_leads_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    FULL.save(folder, "old", {})
    outside = tmp_path / "outside"
    outside.write_bytes(journal())
    (folder / JOURNAL_NAME).symlink_to(outside)
    with pytest.raises(UnsafePathError):
        shardpoint.open(folder)
    (folder / JOURNAL_NAME).unlink()
    (folder / JOURNAL_NAME).write_bytes(journal())
    temporary = folder / f".model-00001-of-00001.safetensors.{TOKEN}.tmp"
    temporary.symlink_to(outside)
    before = contents(folder)
    for action in (lambda: shardpoint.open(folder), lambda: FULL.save(folder, "new", {})):
        with pytest.raises((ShardpointError, dcp.CheckpointException), match="leads out"):
            action()
    assert contents(folder) == before
    assert outside.read_bytes() == journal()


def test_a_journal_larger_than_any_is_not_read(tmp_path: Path) -> None:
    FULL.save(tmp_path, "old", {})
    with (tmp_path / JOURNAL_NAME).open("wb") as file:
        os.truncate(file.fileno(), 1 << 40)
    with pytest.raises(LimitExceededError, match="1099511627776 bytes"):
        shardpoint.open(tmp_path)


def test_a_journal_without_its_files_is_named(tmp_path: Path) -> None:
    FULL.save(tmp_path, "old", {})
    (tmp_path / JOURNAL_NAME).write_bytes(
        journal(files=[f".shard-00001-model-00009-of-00009.safetensors.{TOKEN}.tmp"], remove=[])
    )
    with pytest.raises(dcp.CheckpointException, match=JOURNAL_NAME) as raised:
        FULL.save(tmp_path, "new", {})
    assert isinstance(raised.value.causes[0], CorruptionError)


def test_a_journal_is_read_as_it_was_written() -> None:
    written = Journal(True, (f"sharded/.model-00001-of-00001.safetensors.{TOKEN}.tmp",), (), "x")
    assert decode_journal(written.encode()) == written
    assert written.finals == {"sharded/model-00001-of-00001.safetensors": written.files[0]}


def test_renamed_files_are_read_under_their_other_names(tmp_path: Path) -> None:
    plain = LocalStorage(tmp_path)
    for name in ("a", "b", "c", "folder/d"):
        plain.replace(name, name.encode(), sync=False)
    seen = RenamedStorage(plain, {"b": ("missing", "a"), "x/y": ("folder/d",)}, hidden=["a", "c"])
    assert seen.list() == ["b", "folder/d", "x/y"]
    assert seen.list_folder() == ["b", "folder/", "x/"]
    assert seen.list_folder("x") == ["x/y"]
    assert seen.read("b") == b"a"
    assert seen.size("x/y") == 8
    assert seen.version("b") == plain.version("a")
    for name in ("a", "c", "missing"):
        assert not seen.has(name)
        with pytest.raises(CorruptionError, match=name):
            seen.open(name)
    only = RenamedStorage(plain, {"b": ("a",)}, hidden=None)
    assert only.list() == only.list_folder() == ["b"]
    assert not only.has("c")
    for refused in (seen.prepare, lambda: seen.remove("b"), lambda: seen.create("n", size=1)):
        with pytest.raises(NotSupportedError, match="reading only"):
            refused()
    with pytest.raises(NotSupportedError, match="reading only"):
        seen.replace("b", b"", sync=False)


class Gone(CountingStorage):
    """A storage whose process is gone after some operations: all that follow fail.

    Where a rename copies, it may be gone between the copy and the removal.
    """

    def __init__(self, storage: Storage, *, after: int) -> None:
        super().__init__(storage)
        self._left = after
        self.is_gone = False

    def note(self, kind: str, name: str, offset: int, nbytes: int) -> None:
        super().note(kind, name, offset, nbytes)
        self._left -= 1
        if self._left < 0:
            self.is_gone = True
            raise StorageError("the process is gone")

    def rename(self, name: str, new_name: str) -> None:
        if not self.rename_copies:
            super().rename(name, new_name)
            return
        self.note("copy", name, 0, 0)
        self.replace(new_name, self.read(name), sync=False)
        self.remove(name)


@pytest.fixture
def bucket() -> str:
    system = fsspec.filesystem("memory")
    if system.exists("/journal"):
        system.rm("/journal", recursive=True)
    return "memory://journal"


def _files_at(url: str) -> list[str]:
    return storage_at(url).list()


@pytest.mark.parametrize("kind", ["full", "shards"])
@pytest.mark.parametrize("overwrite", [False, True], ids=["first", "overwrite"])
def test_a_process_that_is_gone_leaves_old_or_new_files_in_a_store(
    bucket: str, kind: str, overwrite: bool
) -> None:
    job = HuggingFaceJob(kind)
    found = []
    for after in range(0, 1000, 1 if ALL else 6):
        url = f"{bucket}/{after}"
        if overwrite:
            dcp.save(TENSORS["old"], storage_writer=job.writer(url, "old"))
        writer = job.writer(url, "new")
        storage = writer.storage = Gone(writer.storage, after=after)
        try:
            dcp.save(TENSORS["new"], storage_writer=writer)
        except dcp.CheckpointException:
            assert storage.is_gone
        found.append(found_in(url))
        dcp.save(TENSORS["next"], storage_writer=job.writer(url, "next"))
        assert found_in(url) == "next"
        assert len(_files_at(url)) == (3 if kind == "shards" else 4)
        if not storage.is_gone:
            break
    print(f"\n{kind}: the process was gone after each of {after} operations")
    turn = found.index("new")
    assert found == ["old" if overwrite else NOTHING] * turn + ["new"] * (len(found) - turn)
    assert min(turn, len(found) - turn) >= 1
    copies = [operation.name for operation in storage.operations if operation.kind == "copy"]
    assert bool(copies) == overwrite  # a first save moves nothing


def test_a_failed_save_to_a_store_leaves_nothing(bucket: str) -> None:
    writer = FULL.writer(bucket, "new")
    kinds = frozenset({"write"})
    writer.storage = CountingStorage(writer.storage, fail_at=2, fail_kinds=kinds)
    with pytest.raises(dcp.CheckpointException, match="injected"):
        dcp.save(TENSORS["new"], storage_writer=writer)
    assert _files_at(bucket) == []


def test_of_two_savers_without_locks_the_first_to_commit_wins(bucket: str) -> None:
    first = FULL.writer(bucket, "old")

    class Interrupted(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            dcp.save(TENSORS[name], storage_writer=FULL.writer(bucket, name))
            return super().finish_plan(new_plan)

    for name in ("new", "next"):  # into an empty place, and over what is there
        with pytest.raises(dcp.CheckpointException) as raised:
            dcp.save(TENSORS["old"], storage_writer=first, planner=Interrupted())
        assert isinstance(raised.value.causes[0], (ConcurrentSaveError, StorageError))
        assert found_in(bucket) == name
    dcp.save(TENSORS["next"], storage_writer=first)
    assert len(_files_at(bucket)) == 4


def test_the_second_of_two_savers_is_told(tmp_path: Path) -> None:
    first, second = FULL.writer(tmp_path, "old"), FULL.writer(tmp_path, "new")
    messages = []

    class Interrupted(dcp.DefaultSavePlanner):
        def finish_plan(self, new_plan: dcp.SavePlan) -> dcp.SavePlan:
            with pytest.raises(dcp.CheckpointException) as raised:
                dcp.save(TENSORS["new"], storage_writer=second)
            messages.append(raised.value.causes[0])
            return super().finish_plan(new_plan)

    dcp.save(TENSORS["old"], storage_writer=first, planner=Interrupted())
    assert isinstance(messages[0], ConcurrentSaveError)
    assert found_in(tmp_path) == "old"
    assert FULL.garbage(tmp_path) == ()


def test_a_reader_never_gets_values_of_the_save_that_overtook_it(tmp_path: Path) -> None:
    for kind in ("full", "shards"):
        folder, job = tmp_path / kind, HuggingFaceJob(kind)
        job.save(folder, "old", {})
        names = sorted(contents(folder))
        with shardpoint.open(folder) as checkpoint:
            job.save(folder, "next", {})  # every file has the name and the size that it had
            assert sorted(contents(folder)) == names
            with pytest.raises(ConcurrentSaveError, match="open it again"):
                _ = checkpoint["large"]


def test_a_reader_that_is_overtaken_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for kind in ("full", "shards", "others"):
        folder, job = tmp_path / kind, HuggingFaceJob(kind)
        job.save(folder, "old", {})
        with shardpoint.open(folder) as checkpoint:
            assert checkpoint["small"].tolist() == TENSORS["old"]["small"].tolist()
            job.save(folder, "new", {})
            with pytest.raises(ConcurrentSaveError, match="open it again"):
                _ = checkpoint["large"]
        assert found_in(folder) == "new"
        with shardpoint.open(folder) as checkpoint:
            shutil.copytree(folder, tmp_path / "kept")
            shutil.rmtree(folder)
            with pytest.raises(ConcurrentSaveError, match="was removed while it was read"):
                _ = checkpoint["large"]
        (tmp_path / "kept").rename(folder)
    # A file that merely has another number, as mounted object stores give them, is the same one.
    index = tmp_path / "full" / "model.safetensors.index.json"
    with shardpoint.open(tmp_path / "full") as checkpoint:
        shutil.copy2(index, tmp_path / "copy")
        (tmp_path / "copy").replace(index)
        assert checkpoint["large"].tolist() == TENSORS["new"]["large"].tolist()
    # While it opens the files, too: the headers of one save would be read with another's index.
    job, folder = FULL, tmp_path / "full"
    opened = LocalStorage.open
    is_first = True

    def late(self: LocalStorage, name: str) -> Any:
        nonlocal is_first
        if name.startswith("model-") and is_first:
            is_first = False
            job.save(folder, "next", {})
        return opened(self, name)

    monkeypatch.setattr(LocalStorage, "open", late)
    assert found_in(folder) == "next"


class PlainFiles(TheirFileSystem):
    """Local files through a program's own file system, which cannot share them."""


def _sharded(name: str) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = {**TENSORS[name]}
    for key in ("large", "half"):
        values[key] = distribute_tensor(values[key], mesh, [Shard(0)])
    return values


def _second_pass(folder: str, name: str, after: int, victim: int) -> bool:
    """Save through a second pass on two ranks; one's storage fails after some operations."""
    writer = dcp.HuggingFaceStorageWriter(
        folder,
        save_distributed=True,
        enable_consolidation=True,
        fqn_to_index_mapping=MAPPINGS[name],
    )
    writer.fs = PlainFiles()
    left = after if dist.get_rank() == victim else 1 << 30
    storage = Gone(FileSystemStorage(writer.fs, writer.path), after=left)
    writer.storage = storage
    try:
        dcp.save(_sharded(name), storage_writer=writer)
    except dcp.CheckpointException:
        return True
    return False


def test_a_save_in_two_passes_counts_as_a_whole(pool: RankPool, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    tried = [*(range(100) if ALL else (20, 26)), 1 << 30]
    for overwrite in (False, True):
        before = "next" if overwrite else NOTHING
        found = []
        for after in tried:
            failed = pool.run(2, _second_pass, folder, "new", after, 0)
            found.append(found_in(folder))
            assert failed == [failed[0]] * 2
            if found[-1] == "new":
                break
            assert found[-1] == before, after
            assert failed[0]
        assert found[-1] == "new"
        print(f"\nrank 0 of 2 was gone after each of {len(found) - 1} numbers of operations")
        assert pool.run(2, _second_pass, folder, "next", 1 << 30, 0) == [False, False]
        assert found_in(folder) == "next"
        left = sorted(contents(Path(folder)))
        assert [n for n in left if "/" not in n] == [
            *(f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)),
            "model.safetensors.index.json",
        ]
        assert all(n.startswith("sharded/shard-") for n in left if "/" in n)


def _consolidate(source: str, target: str, breaks: bool) -> str:
    if breaks and dist.get_rank() == 1:
        LocalStorage.create = _no_room  # type: ignore[method-assign]
    try:
        consolidate_safetensors_files_on_every_rank(source, target, MAPPINGS["new"])
    except ShardpointError as error:
        return str(error)
    finally:
        if breaks and dist.get_rank() == 1:
            LocalStorage.create = _create  # type: ignore[method-assign]
    return ""


_create = LocalStorage.create


def _no_room(self: LocalStorage, name: str, *, size: int | None) -> Any:
    raise StorageError("no room")


def test_a_consolidation_by_all_ranks_counts_as_a_whole(pool: RankPool, tmp_path: Path) -> None:
    source, target = tmp_path / "shards", tmp_path / "model"
    HuggingFaceJob("shards").save(source, "new", {})
    FULL.save(target, "old", {})
    save_file(TENSORS["old"], target / "model.safetensors")
    before = contents(target)
    for message in pool.run(2, _consolidate, str(source), str(target), True):
        assert "no room" in message
    assert contents(target) == before
    assert pool.run(2, _consolidate, str(source), str(target), False) == ["", ""]
    assert found_in(target) == "new"
    assert FULL.garbage(target) == ()
    # In the place where the shards are, they stay.
    assert pool.run(2, _consolidate, str(source), str(source), False) == ["", ""]
    assert found_in(source) == "new"
    assert len(list(source.glob("shard-*"))) == 2


def test_a_store_without_locks_is_looked_at_again_before_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStorage, "claim", lambda self, *, shared: NoClaim())
    test_of_two_savers_without_locks_the_first_to_commit_wins(str(tmp_path))
