"""What every storage has to do. A back end's test class derives from `StorageConformance`."""

from __future__ import annotations

import threading

import pytest

from shardpoint.errors import CorruptionError, StorageError, UnsafePathError
from shardpoint.storage import Storage

UNSAFE_NAMES = [
    "",
    "/etc/passwd",
    "..",
    "../x",
    "a/../../x",
    "a/..",
    "a//b",
    "a/",
    "./a",
    "a/.",
    "a\0b",
    "lone-surrogate-\ud800",
]


class StorageConformance:
    """Tests of the `Storage` interface; `storage` must be an empty place that does not exist."""

    @pytest.fixture
    def storage(self) -> Storage:
        raise NotImplementedError

    @pytest.fixture
    def ready(self, storage: Storage) -> Storage:
        storage.prepare()
        return storage

    def test_place_exists_only_after_prepare(self, storage: Storage) -> None:
        assert storage.location
        assert not storage.exists()
        assert storage.list() == []
        assert not storage.has("a")
        storage.prepare()
        storage.prepare()
        assert storage.exists()
        assert storage.list() == []

    def test_what_changes_with_a_file_stays_the_same_without(self, ready: Storage) -> None:
        for look in (ready.version, ready.written):
            assert look("a") is None
            ready.replace("a", b"one", sync=False)
            before = look("a")
            assert before is not None
            assert look("a") == before
            ready.replace("a", b"longer", sync=False)
            assert look("a") != before
            ready.remove("a")

    def test_one_folder_is_listed_without_what_is_below(self, storage: Storage) -> None:
        assert storage.list_folder() == []
        assert storage.list_folder("a") == []
        storage.prepare()
        for name in ("top", "a/one", "a/two", "a/b/three"):
            storage.replace(name, b"", sync=False)
        assert storage.list_folder() == ["a/", "top"]
        assert storage.list_folder("a") == ["a/b/", "a/one", "a/two"]
        assert Storage.list_folder(storage, "a") == ["a/b/", "a/one", "a/two"]
        assert Storage.list_folder(storage) == ["a/", "top"]
        with pytest.raises(UnsafePathError):
            storage.list_folder("../a")

    def test_written_bytes_are_read_back(self, ready: Storage) -> None:
        with ready.create("a/b.bin", size=10) as file:
            file.write_from(4, [memoryview(b"456"), memoryview(b""), memoryview(b"789")])
            file.write_from(0, [memoryview(b"01"), memoryview(b"23")])
            file.sync()
        ready.sync()
        assert ready.list() == ["a/b.bin"]
        assert ready.has("a/b.bin")
        assert ready.size("a/b.bin") == 10
        assert not ready.has("a")
        assert ready.size("a/c.bin") is None
        assert ready.read("a/b.bin") == b"0123456789"
        first, second = bytearray(3), bytearray(2)
        with ready.open("a/b.bin") as opened:
            assert opened.size == 10
            opened.read_into(5, [memoryview(first), memoryview(b""), memoryview(second)])
        assert (bytes(first), bytes(second)) == (b"567", b"89")

    def test_size_unknown_and_empty_files(self, ready: Storage) -> None:
        with ready.create("unknown", size=None) as file:
            file.write_from(0, [memoryview(b"x" * 1000)])
        ready.create("empty", size=0).close()
        assert ready.list() == ["empty", "unknown"]
        assert ready.size("empty") == 0
        assert ready.read("empty") == b""
        assert ready.read("unknown") == b"x" * 1000

    def test_many_buffers_in_one_call(self, ready: Storage) -> None:
        pieces = [bytes([i % 251]) * (i % 7) for i in range(5000)]
        with ready.create("many", size=sum(map(len, pieces))) as file:
            file.write_from(0, [memoryview(piece) for piece in pieces])
        assert ready.read("many") == b"".join(pieces)
        into = [bytearray(len(piece)) for piece in pieces]
        with ready.open("many") as opened:
            opened.read_into(0, [memoryview(buffer) for buffer in into])
        assert [bytes(buffer) for buffer in into] == pieces

    def test_reading_past_the_end_names_the_file(self, ready: Storage) -> None:
        ready.replace("short", b"12345", sync=False)
        with ready.open("short") as file, pytest.raises(CorruptionError, match="short"):
            file.read_into(3, [memoryview(bytearray(3))])

    def test_missing_file_is_named(self, ready: Storage) -> None:
        with pytest.raises(CorruptionError, match="absent"):
            ready.open("absent")

    def test_create_never_overwrites(self, ready: Storage) -> None:
        ready.replace("taken", b"old", sync=False)
        with pytest.raises(StorageError, match="taken"):
            ready.create("taken", size=3)
        assert ready.read("taken") == b"old"

    @pytest.mark.parametrize("sync", [False, True])
    def test_replace_is_whole_and_leaves_nothing_else(self, ready: Storage, sync: bool) -> None:
        ready.replace("sub/index", b"one", sync=sync)
        with ready.open("sub/index") as before:
            ready.replace("sub/index", b"three", sync=sync)
            kept = bytearray(3)
            before.read_into(0, [memoryview(kept)])
        assert bytes(kept) == b"one"
        assert ready.read("sub/index") == b"three"
        assert ready.list() == ["sub/index"]

    def test_remove_and_remove_again(self, ready: Storage) -> None:
        ready.replace("a", b"1", sync=False)
        ready.remove("a")
        ready.remove("a")
        ready.remove("never/was")
        ready.sync()
        assert ready.list() == []

    @pytest.mark.parametrize("name", UNSAFE_NAMES)
    def test_unsafe_names_are_refused(self, ready: Storage, name: str) -> None:
        calls = [
            lambda: ready.open(name),
            lambda: ready.has(name),
            lambda: ready.size(name),
            lambda: ready.create(name, size=1),
            lambda: ready.replace(name, b"", sync=False),
            lambda: ready.remove(name),
        ]
        for call in calls:
            with pytest.raises(UnsafePathError):
                call()
        assert ready.list() == []

    def test_names_of_other_scripts(self, ready: Storage) -> None:
        ready.replace("größe/重み", b"1", sync=False)
        assert ready.list() == ["größe/重み"]
        assert ready.read("größe/重み") == b"1"

    def test_positioned_calls_side_by_side(self, ready: Storage) -> None:
        block, count = 4096, 64
        with ready.create("parallel", size=block * count) as file:

            def write(i: int) -> None:
                file.write_from(i * block, [memoryview(bytes([i]) * block)])

            _in_threads(write, count)
        results: list[bytes] = [b""] * count
        with ready.open("parallel") as opened:

            def read(i: int) -> None:
                buffer = bytearray(block)
                opened.read_into(i * block, [memoryview(buffer)])
                results[i] = bytes(buffer)

            _in_threads(read, count)
        assert results == [bytes([i]) * block for i in range(count)]


def _in_threads(function, count: int) -> None:  # type: ignore[no-untyped-def]
    threads = [threading.Thread(target=function, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
