"""The local file system: confinement, special files, short transfers, atomic replacement."""

from __future__ import annotations

import errno
import os
import stat
import threading
from pathlib import Path

import pytest

from shardpoint.errors import ShardpointError, StorageError, UnsafePathError
from shardpoint.storage import LocalStorage, Storage
from shardpoint.storage.testing import CountingStorage
from storage_conformance import StorageConformance


class TestLocalStorage(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return LocalStorage(tmp_path / "deep" / "place")


class TestCountingStorageConforms(StorageConformance):
    @pytest.fixture
    def storage(self, tmp_path: Path) -> Storage:
        return CountingStorage(LocalStorage(tmp_path / "place"))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    folder.mkdir()
    (tmp_path / "outside").write_bytes(b"secret")
    return folder


def test_link_to_a_file_outside_is_refused(place: Path) -> None:
    (place / "link").symlink_to(place.parent / "outside")
    storage = LocalStorage(place)
    for call in (storage.open, storage.has, storage.size):
        with pytest.raises(UnsafePathError, match="link"):
            call("link")


def test_link_to_a_folder_outside_is_refused_for_reading_and_writing(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    (place / "sub").symlink_to(place.parent / "elsewhere")
    storage = LocalStorage(place)
    (place.parent / "elsewhere" / "x").write_bytes(b"1")
    with pytest.raises(UnsafePathError):
        storage.open("sub/x")
    with pytest.raises(UnsafePathError):
        storage.create("sub/y", size=1)
    with pytest.raises(UnsafePathError):
        storage.replace("sub/x", b"2", sync=False)
    with pytest.raises(UnsafePathError):
        storage.remove("sub/x")
    assert (place.parent / "elsewhere" / "x").read_bytes() == b"1"
    assert not (place.parent / "elsewhere" / "y").exists()


def test_link_inside_the_folder_is_followed(place: Path) -> None:
    (place / "real").write_bytes(b"12")
    (place / "link").symlink_to("real")
    assert LocalStorage(place).read("link") == b"12"


def test_the_folder_itself_may_be_a_link(place: Path) -> None:
    (place / "file").write_bytes(b"12")
    (place.parent / "alias").symlink_to(place)
    storage = LocalStorage(place.parent / "alias")
    assert storage.read("file") == b"12"
    storage.replace("file", b"34", sync=True)
    assert (place / "file").read_bytes() == b"34"


def test_link_to_the_folder_itself_is_no_file(place: Path) -> None:
    (place / "self").symlink_to(".")
    with pytest.raises(UnsafePathError):
        LocalStorage(place).open("self")


def test_circular_link_is_an_error_of_ours(place: Path) -> None:
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    with pytest.raises(ShardpointError):
        LocalStorage(place).open("a")


def test_pipe_is_refused_without_waiting(place: Path) -> None:
    os.mkfifo(place / "pipe")
    failure: list[BaseException] = []

    def attempt() -> None:
        try:
            LocalStorage(place).open("pipe")
        except BaseException as error:  # noqa: BLE001  handed to the test
            failure.append(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert isinstance(failure[0], StorageError)
    assert "pipe" in str(failure[0])


def test_folder_is_refused(place: Path) -> None:
    (place / "sub").mkdir()
    storage = LocalStorage(place)
    with pytest.raises(StorageError, match="sub"):
        storage.open("sub")
    with pytest.raises(StorageError, match="sub"):
        storage.create("sub", size=1)
    with pytest.raises(StorageError, match="sub"):
        storage.remove("sub")


def test_place_that_is_a_file_is_refused(place: Path) -> None:
    storage = LocalStorage(place.parent / "outside")
    assert not storage.exists()
    assert storage.list() == []
    with pytest.raises(StorageError, match="outside': a file has that name"):
        storage.prepare()
    (place.parent / "dangling").symlink_to("nowhere")
    with pytest.raises(StorageError, match="a link that leads nowhere has that name"):
        LocalStorage(place.parent / "dangling").prepare()


def test_create_does_not_write_through_a_link(place: Path) -> None:
    (place / "link").symlink_to(place.parent / "outside")
    with pytest.raises(StorageError):
        LocalStorage(place).create("link", size=1)
    assert (place.parent / "outside").read_bytes() == b"secret"


def test_short_transfers_are_continued(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may move fewer bytes than asked for, ending within any buffer."""
    real_write, real_read = os.pwritev, os.preadv

    def short_write(descriptor, buffers, offset):  # type: ignore[no-untyped-def]
        return real_write(descriptor, [b"".join(buffers)[:7]], offset)

    def short_read(descriptor, buffers, offset):  # type: ignore[no-untyped-def]
        return real_read(descriptor, [buffers[0][:5]], offset)

    data = bytes(range(256))
    monkeypatch.setattr(os, "pwritev", short_write)
    monkeypatch.setattr(os, "preadv", short_read)
    storage = LocalStorage(place)
    with storage.create("x", size=256) as file:
        file.write_from(0, [memoryview(data)[i : i + 10] for i in range(0, 256, 10)])
    assert (place / "x").read_bytes() == data
    into = bytearray(256)
    with storage.open("x") as opened:
        opened.read_into(0, [memoryview(into)[:100], memoryview(into)[100:]])
    assert bytes(into) == data


def test_failed_write_keeps_the_cause(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor, buffers, offset):  # type: ignore[no-untyped-def]
        raise OSError(errno.ENOSPC, "No space left on device")

    storage = LocalStorage(place)
    file = storage.create("full", size=None)
    monkeypatch.setattr(os, "pwritev", no_space)
    with file, pytest.raises(StorageError, match=r"full.*No space") as caught:
        file.write_from(0, [memoryview(b"1")])
    assert caught.value.errno == errno.ENOSPC
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no preallocation here")
def test_reservation_that_fails_leaves_no_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(descriptor, offset, length):  # type: ignore[no-untyped-def]
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    storage = LocalStorage(place)
    with pytest.raises(StorageError, match="reserve"):
        storage.create("big", size=1000)
    assert storage.list() == []


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no preallocation here")
def test_file_systems_without_reservation_are_fine(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(descriptor, offset, length):  # type: ignore[no-untyped-def]
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    storage = LocalStorage(place)
    storage.create("big", size=1000).close()
    assert storage.list() == ["big"]


def test_replace_that_fails_keeps_the_old_file(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(place)
    storage.replace("index", b"old", sync=False)

    def broken(*arguments: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    for function in ("replace", "pwritev", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, broken)
            with pytest.raises(StorageError):
                storage.replace("index", b"new", sync=True)
        assert storage.list() == ["index"]
        assert storage.read("index") == b"old"


def test_replace_syncs_the_file_before_and_the_folder_after(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("sync folder" if is_folder else "sync file")
        real_sync(descriptor)

    def replace(source: str, target: str) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    LocalStorage(place).replace("index", b"new", sync=True)
    assert events[:2] == ["sync file", "rename"]
    assert events[2:]
    assert set(events[2:]) == {"sync folder"}


def test_closing_twice_does_not_close_someone_elses_descriptor(place: Path) -> None:
    (place / "a").write_bytes(b"1")
    storage = LocalStorage(place)
    file = storage.open("a")
    file.close()
    with storage.open("a") as other:
        file.close()
        other.read_into(0, [memoryview(bytearray(1))])
    with pytest.raises(StorageError):
        file.read_into(0, [memoryview(bytearray(1))])


def test_counting_storage_counts_and_fails_where_told(place: Path) -> None:
    storage = CountingStorage(
        LocalStorage(place), fail_at=1, fail_kinds=frozenset({"read", "write"})
    )
    with storage.create("a", size=4) as file:
        file.write_from(0, [memoryview(b"12"), memoryview(b"34")])
        assert storage.open_files == 1
        with pytest.raises(StorageError, match="injected"):
            file.write_from(0, [memoryview(b"5")])
    assert storage.read("a") == b"1234"
    assert storage.open_files == 0
    assert storage.bytes_read == 4
    assert storage.bytes_written == 5
    assert storage.calls["write"] == 2
    storage.reset()
    assert storage.bytes_read == 0


def test_the_folder_is_resolved_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "sub").mkdir()
    (place / "sub" / "data").write_bytes(b"12345")
    storage = LocalStorage(place)
    assert storage.size("sub/data") == 5
    resolved: list[str] = []
    realpath = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: resolved.append(path) or realpath(path))
    for _ in range(3):
        assert storage.size("sub/data") == 5
        assert storage.read("sub/data") == b"12345"
    assert resolved == []


def test_a_folder_that_is_made_later_is_resolved_then(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "link" / "ckpt")
    assert storage.size("data") is None
    (tmp_path / "real" / "ckpt").mkdir(parents=True)
    (tmp_path / "real" / "ckpt" / "data").write_bytes(b"123")
    (tmp_path / "link").symlink_to("real")
    assert storage.read("data") == b"123"


def test_a_file_the_caller_trusts_may_be_a_link_out(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"123")
    (tmp_path / "ckpt").mkdir()
    for name in ("chosen", "other"):
        (tmp_path / "ckpt" / name).symlink_to("../outside")
    storage = LocalStorage(tmp_path / "ckpt", trusted="chosen")
    assert storage.read("chosen") == b"123"
    with pytest.raises(UnsafePathError):
        storage.read("other")
