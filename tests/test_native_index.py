"""The native index: what is written is read again, and what is damaged or hostile is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardpoint
from engine_support import grid, save
from shardpoint.dtypes import BY_CODE
from shardpoint.engine import committing
from shardpoint.engine.opening import open_index
from shardpoint.errors import (
    CorruptionError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    ShardpointError,
    ShardpointWarning,
    UnsafePathError,
)
from shardpoint.formats import _index_container, _index_format, _index_reading
from shardpoint.formats._index_container import read_container, write_container
from shardpoint.formats._plain_json import from_json, to_json
from shardpoint.formats.dcp_metadata import read_metadata, write_metadata
from shardpoint.formats.native_index import (
    index_name,
    is_index_name,
    read_index,
    stamp_of,
    write_index,
)
from shardpoint.index import (
    NO_FILE,
    UNKNOWN,
    BlockChecksums,
    CheckpointIndex,
    Chunks,
    Objects,
    Payloads,
    Tensors,
)
from shardpoint.planning.validate import find_problems
from shardpoint.storage import LocalStorage

STAMP = stamp_of(b"what .metadata holds")
BLOCK = 64


def columns_of(value: Any, name: str = "") -> dict[str, Any]:
    """Return everything in an index by name, arrays with their types, for comparing."""
    if dataclasses.is_dataclass(value):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            if (
                field.name == "version_read"
            ):  # of the file that it was read from, not of the content
                continue
            found |= columns_of(getattr(value, field.name), f"{name}.{field.name}")
        return found
    if isinstance(value, np.ndarray):
        return {name: (str(value.dtype), value.shape, value.tobytes())}
    return {name: list(value) if isinstance(value, list | tuple) else value}


def assert_same_index(found: CheckpointIndex, wanted: CheckpointIndex) -> None:
    assert found.metadata_files == [".metadata", "x.index"]
    assert columns_of(dataclasses.replace(found, metadata_files=[])) == columns_of(
        dataclasses.replace(wanted, metadata_files=[])
    )


def read(data: bytes | bytearray) -> CheckpointIndex:
    return read_index(memoryview(data), STAMP, file="x.index", metadata_file=".metadata")


def make_index(
    seed: int, *, ranks: list[int], counts: list[int], object_count: int, details: bool
) -> CheckpointIndex:
    """Return an index with tensors of these numbers of axes and chunks, and random values."""
    chance = np.random.default_rng(seed)
    axes, count = max(ranks, default=0), sum(counts)
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    tensor = np.repeat(np.arange(len(ranks), dtype=np.int64), counts)
    missing = np.arange(axes) >= np.array(ranks, np.int64)[:, None].reshape(-1, 1)
    shape = np.where(missing, 1, chance.integers(0, 1 << 40, (len(ranks), axes)))
    padding = missing[tensor]
    files = [f"__{n}_0.distcp" for n in range(3)] if chance.random() < 0.7 else ["ü/\ud800.distcp"]
    transforms = [(), ("stream.zstd/1",), ("a", "b@c/2")]

    def places(n: int) -> dict[str, Any]:
        return {
            "file": chance.integers(NO_FILE, len(files), n).astype(np.int32),
            "record_offset": chance.integers(0, 1 << 50, n),
            "record_length": chance.integers(5000, 1 << 40, n),
            "transform": chance.integers(0, len(transforms), n).astype(np.int16),
        }

    def checksums(n: int) -> Any:
        return chance.integers(UNKNOWN, 1 << 32, n) if details else None

    where = places(count)
    payloads = blocks = None
    if details:
        length = chance.integers(0, 4000, count)
        known = chance.random(count) < 0.8
        payloads = Payloads(
            offset=np.where(known, where["record_offset"] + 500, UNKNOWN),
            strides=np.where(padding, 0, chance.integers(0, 1 << 30, (count, axes))),
            length=np.where(known, length, UNKNOWN),
            checksum=np.where(known, chance.integers(UNKNOWN, 1 << 32, count), UNKNOWN),
            flags=chance.integers(0, 4, count).astype(np.uint8),
        )
        has = known & (where["transform"] == 0)
        block_counts = np.where(has, -(-length // BLOCK), 0)
        blocks = BlockChecksums(
            BLOCK,
            np.concatenate([np.zeros(1, np.int64), np.cumsum(block_counts)]),
            chance.integers(0, 1 << 32, int(block_counts.sum())).astype(np.uint32),
        )
    keys = [f"model.{n}" if seed % 3 else f"schlüssel\ud801.{n}" for n in range(len(ranks))]
    names = [f"object {n}" for n in range(object_count)]
    order = [*keys, *names]
    random.Random(seed).shuffle(order)
    return CheckpointIndex(
        tensors=Tensors(
            keys=keys,
            dtype=chance.integers(0, len(BY_CODE), len(ranks)).astype(np.uint8),
            ndim=np.array(ranks, np.int16),
            shape=shape,
            first_chunk=first,
            requires_grad=chance.random(len(ranks)) < 0.5,
            pin_memory=chance.random(len(ranks)) < 0.5,
            memory_format=chance.integers(0, 4, len(ranks)).astype(np.uint8),
        ),
        chunks=Chunks(
            tensor=tensor,
            offsets=np.where(padding, 0, chance.integers(0, 1 << 40, (count, axes))),
            sizes=np.where(padding, 1, chance.integers(0, 1 << 40, (count, axes))),
            container=chance.integers(0, 3, count).astype(np.uint8),
            payloads=payloads,
            blocks=blocks,
            record_checksum=checksums(count),
            **where,
        ),
        objects=Objects(names, record_checksum=checksums(object_count), **places(object_count)),
        files=files,
        transforms=transforms,
        key_order=order,
        paths={key: ("a", seed, key) for key in order} if seed % 2 else None,
        storage_meta={"checkpoint_id": PurePosixPath("a/b"), "save_id": "x", "modules": ["m"]},
        version="1.0.0",
        source="dcp",
        planner_data={1: (2.5, {b"x"})} if seed % 5 == 0 else None,
    )


def small_index() -> CheckpointIndex:
    return make_index(7, ranks=[2, 0, 3], counts=[2, 1, 3], object_count=2, details=True)


@given(
    seed=st.integers(0, 1 << 32),
    tensors=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6),
    object_count=st.integers(0, 3),
    details=st.booleans(),
)
def test_what_is_written_is_read_again(
    seed: int, tensors: list[tuple[int, int]], object_count: int, details: bool
) -> None:
    index = make_index(
        seed,
        ranks=[rank for rank, _ in tensors],
        counts=[count for _, count in tensors],
        object_count=object_count,
        details=details,
    )
    assert_same_index(read(write_index(index, STAMP)), index)


def test_columns_are_views_that_nobody_can_change() -> None:
    data = bytearray(write_index(small_index(), STAMP))
    offsets = read(data).chunks.offsets
    assert np.shares_memory(offsets, np.frombuffer(data, np.uint8))
    assert offsets.flags.aligned
    with pytest.raises(ValueError, match="read-only"):
        offsets[0] = 1


def test_the_container_is_one_that_any_safetensors_reader_reads() -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    index = small_index()
    found = safetensors.load(write_index(index, STAMP))
    assert np.array_equal(found["chunks.offsets"], index.chunks.offsets)
    assert np.array_equal(found["blocks.values"], index.chunks.blocks.values)
    assert set(found) == {*_index_format.KINDS, "checksum"}


@settings(max_examples=50)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
        lambda part: (
            st.lists(part)
            | st.lists(part).map(tuple)
            | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers()), part)
            | st.sets(st.integers() | st.text())
            | st.frozensets(st.binary())
        ),
        max_leaves=20,
    )
)
def test_plain_values_keep_their_types_in_json(value: Any) -> None:
    again = from_json(json.loads(json.dumps(to_json(value))))
    assert _told_apart(again) == _told_apart(value)


def _told_apart(value: Any) -> Any:
    """Return a value that equals another's only where types are the same; nan equals nan."""
    if isinstance(value, dict):
        return "dict", [(_told_apart(key), _told_apart(part)) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return type(value).__name__, [_told_apart(part) for part in value]
    if isinstance(value, set | frozenset):
        return type(value).__name__, sorted(map(repr, value))
    return type(value).__name__, repr(value)


@pytest.mark.parametrize(
    "value", [[], ["set", ["list"]], ["dict", 1], ["float", "x"], ["nothing", 1], {"a": 1}, 1.5]
)
def test_other_json_is_no_plain_value(value: Any) -> None:
    with pytest.raises(FormatError):
        from_json(value)


@pytest.mark.parametrize("kind", ["set", "frozenset", "dict"])
def test_keys_of_one_hash_are_bounded(kind: str) -> None:
    numbers = [number * sys.hash_info.modulus for number in range(30_000)]
    with pytest.raises(LimitExceededError, match="same hash"):
        from_json([kind, *numbers])


def test_every_flipped_byte_is_noticed() -> None:
    data = write_index(make_index(7, ranks=[1], counts=[1], object_count=1, details=True), STAMP)
    for position in range(len(data)):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(CorruptionError, match=r"x\.index.*damaged"):
            read(damaged)
    for length in (0, 3, 11, 200, len(data) - 1):
        with pytest.raises(CorruptionError):
            read(data[:length])


def _set(name: str, row: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        columns[name] = columns[name].copy()
        columns[name][row] = value

    return change


def _document(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        document = {**json.loads(columns["document"].tobytes()), **fields}
        columns["document"] = np.frombuffer(json.dumps(document).encode(), np.uint8)

    return change


def _text(text: bytes) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update(document=np.frombuffer(text, np.uint8))


def _cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: columns[name][:-1]})


def _retyped(name: str, kind: str) -> Callable[[dict[str, Any]], None]:
    return lambda columns: columns.update({name: columns[name].astype(kind)})


def _without_axes(columns: dict[str, Any]) -> None:
    for name in ("tensors.shape", "chunks.offsets", "chunks.sizes", "payloads.strides"):
        columns[name] = columns[name][:, :0]
    columns["tensors.ndim"] = columns["tensors.ndim"] * 0
    columns["chunks.offsets"] = np.zeros((1 << 50, 0), np.int64)
    columns["tensors.first_chunk"] = np.array([0, 0, 0, 1 << 50], np.int64)


def _many_axes(columns: dict[str, Any]) -> None:
    for name in ("tensors.shape", "chunks.offsets", "chunks.sizes", "payloads.strides"):
        columns[name] = np.pad(columns[name], ((0, 0), (0, 97)), constant_values=1)


def _without(name: str) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        del columns[name]

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], type[ShardpointError], str]] = {
    "no such dtype": (_set("tensors.dtype", 0, 200), FormatError, "tensors.dtype"),
    "negative axes": (_set("tensors.ndim", 0, -1), FormatError, "tensors.ndim"),
    "more axes than columns": (_set("tensors.ndim", 0, 4), FormatError, "tensors.ndim"),
    "shape not padded": (_set("tensors.shape", (1, 0), 5), FormatError, "padded"),
    "negative shape": (_set("tensors.shape", (0, 0), -5), FormatError, "tensors.shape"),
    "memory format": (_set("tensors.memory_format", 0, 4), FormatError, "memory_format"),
    "far too many axes": (_many_axes, LimitExceededError, "axes"),
    "chunks fall": (_set("tensors.first_chunk", 1, 4), FormatError, "first_chunk"),
    "chunks begin late": (_set("tensors.first_chunk", 0, 1), FormatError, "first_chunk"),
    "too many chunks": (_set("tensors.first_chunk", 3, 1 << 50), FormatError, "first_chunk"),
    "rows without bytes": (_without_axes, FormatError, "chunks.offsets"),
    "negative offsets": (_set("chunks.offsets", (5, 0), -1), FormatError, "row 5"),
    "negative sizes": (_set("chunks.sizes", (5, 1), -1), FormatError, "chunks.sizes"),
    "boxes not padded": (_set("chunks.offsets", (2, 0), 1), FormatError, "padded"),
    "box past 64 bits": (_set("chunks.offsets", (0, 0), (1 << 63) - 1), FormatError, "64 bits"),
    "no such container": (_set("chunks.container", 0, 3), FormatError, "container"),
    "no such file": (_set("chunks.file", 0, 5), FormatError, "chunks.file"),
    "file below none": (_set("chunks.file", 0, -2), FormatError, "chunks.file"),
    "no such transform": (_set("chunks.transform", 0, 3), FormatError, "chunks.transform"),
    "negative record": (_set("chunks.record_offset", 0, -1), FormatError, "record_offset"),
    "negative length": (_set("objects.record_length", 0, -1), FormatError, "record_length"),
    "record past 64 bits": (
        _set("chunks.record_length", 0, (1 << 63) - 1),
        FormatError,
        "64 bits",
    ),
    "no record checksum": (_set("objects.record_checksum", 0, 1 << 32), FormatError, "checksum"),
    "payload outside": (
        lambda c: (
            (_set("payloads.offset", 0, 1)(c), _set("chunks.transform", 0, 0)(c))
            and _set("chunks.container", 0, 0)(c)
        ),
        FormatError,
        "outside its record",
    ),
    "payload without length": (
        lambda c: (
            _set("payloads.offset", slice(None), c["chunks.record_offset"])(c)
            or _set("payloads.length", slice(None), -1)(c)
        ),
        FormatError,
        "length",
    ),
    "payload outside, further on": (
        lambda c: (
            _set("chunks.transform", slice(None), 0)(c)
            or _set("chunks.container", slice(None), 0)(c)
            or _set("payloads.offset", -1, 1 << 52)(c)
            or _set("payloads.length", -1, 9)(c)
        ),
        FormatError,
        "row 5: a chunk's payload is outside its record",
    ),
    "negative strides": (_set("payloads.strides", (0, 0), -1), FormatError, "strides"),
    "no such flag": (_set("payloads.flags", 0, 4), FormatError, "flags"),
    "blocks fall": (_set("blocks.first", 1, 10_000), FormatError, "blocks.first"),
    "other blocks": (
        lambda c: _set("payloads.length", slice(None), 0)(c),
        FormatError,
        "other blocks",
    ),
    "a key twice": (_set("tensors.keys", slice(None), 65), FormatError, "twice"),
    "no UTF-8": (_set("files", 0, 255), FormatError, "UTF-8"),
    "text falls": (_set("files.ends", 0, 1), FormatError, "files.ends"),
    "key order": (_set("key_order", 0, 1 << 40), FormatError, "order of keys"),
    "boolean": (
        lambda c: c.update({"tensors.pin_memory": np.full(3, 7, np.uint8).view(np.bool_)}),
        FormatError,
        "pin_memory",
    ),
    "short column": (_cut("chunks.sizes"), FormatError, "chunks.sizes"),
    "other type": (_retyped("chunks.sizes", "int32"), FormatError, "chunks.sizes"),
    "column missing": (_without("chunks.file"), FormatError, "chunks.file"),
    "no JSON": (_text(b"{"), FormatError, "document"),
    "deep JSON": (_text(b"[" * 100_000), FormatError, "document"),
    "JSON of another kind": (_text(b"[]"), FormatError, "document"),
    "version": (_document(version=1), FormatError, "version"),
    "transforms": (_document(transforms=[["x"]]), FormatError, "transforms"),
    "transform names": (_document(transforms=[[], [1]]), FormatError, "transforms"),
    "paths": (_document(paths=[["a"]]), FormatError, "paths"),
    "path parts": (_document(paths=[[1.5]] * 5), FormatError, "path"),
    "storage_meta": (_document(storage_meta=["list"]), FormatError, "storage_meta"),
    "storage_meta field": (_document(storage_meta=["dict", "a", 1]), FormatError, "storage_meta"),
    "planner_data": (_document(planner_data=["set", ["list"]]), FormatError, "planner_data"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_columns_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shardpoint.formats._index_checks._SLAB", 2)
    change, kind, match = HOSTILE[name]
    container = read_container(memoryview(write_index(small_index(), STAMP)), file="x.index")
    columns = {
        name: container.column(name, found.dtype.name, *found.shape)
        for name, found in container.tensors.items()
    }
    read(write_container(columns, container.metadata))
    change(columns)
    with pytest.raises(kind, match=match) as caught:
        read(write_container(columns, container.metadata))
    assert type(caught.value) is kind
    assert "x.index" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("format", "other", FormatError),
        ("version", "2", NotSupportedError),
        ("metadata_size", "1", FormatError),
        ("metadata_checksum", "00000000", FormatError),
        ("block_size", "-1", FormatError),
        ("block_size", "0", FormatError),
        ("block_size", "x" * 10_000, FormatError),
    ],
)
def test_what_the_header_says_is_checked(name: str, value: str, kind: type[Exception]) -> None:
    container = read_container(memoryview(write_index(small_index(), STAMP)), file="x.index")
    columns = {
        name: container.column(name, found.dtype.name, *found.shape)
        for name, found in container.tensors.items()
    }
    with pytest.raises(kind, match=r"x\.index") as caught:
        read(write_container(columns, {**container.metadata, name: value}))
    assert len(str(caught.value)) < 1000


def test_what_is_too_large_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_index(small_index(), STAMP)
    for module, name in (
        (_index_container, "_MAX_HEADER_BYTES"),
        (_index_reading, "MAX_DOCUMENT_BYTES"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, 100)
            with pytest.raises(LimitExceededError):
                read(data)


def test_what_does_not_fit_into_an_index_is_not_written() -> None:
    index = small_index()
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for changes in ({"planner_data": deep}, {"planner_data": [object()]}, {"key_order": ["no"]}):
        with pytest.raises(FormatError):
            write_index(dataclasses.replace(index, **changes), STAMP)


def _checkpoint(folder: Path) -> CheckpointIndex:
    """Write a checkpoint with a native index; return what was put into that."""
    storage = LocalStorage(folder)
    arrays = {"w": np.arange(200, dtype=np.float32).reshape(10, 20), "b": np.arange(7)}
    chunks = [*grid("w", (10, 20), [[4], [10]]), *grid("b", (7,), [[]])]
    index = dataclasses.replace(save(storage, arrays, chunks), paths=None)
    checksums = np.arange(len(index.chunks), dtype=np.int64)
    index = dataclasses.replace(
        index, chunks=dataclasses.replace(index.chunks, record_checksum=checksums)
    )
    metadata = write_metadata(index)
    committing.commit(
        storage,
        ".metadata",
        metadata,
        index=committing.index_for(index, metadata),
        sync=False,
    )
    return index


def _index_file(folder: Path) -> Path:
    (found,) = (path for path in folder.iterdir() if is_index_name(path.name))
    return found


def test_opening_takes_the_index_that_belongs_to_the_metadata(tmp_path: Path) -> None:
    wanted = _checkpoint(tmp_path)
    metadata = (tmp_path / ".metadata").read_bytes()
    file = _index_file(tmp_path)
    assert file.name == index_name(stamp_of(metadata))
    index, _ = open_index(tmp_path)
    assert index.metadata_files == [".metadata", file.name]
    assert index.chunks.record_checksum is not None
    found = {**columns_of(index), ".metadata_files": []}
    assert found == {**columns_of(wanted), ".metadata_files": []}
    # Nothing but the bytes says which metadata that is: another one is read by itself.
    other = write_metadata(dataclasses.replace(wanted, version="9"))
    (tmp_path / ".metadata").write_bytes(other)
    index, _ = open_index(tmp_path)
    assert index.metadata_files == [".metadata"]
    assert index.version == "9"
    assert index.chunks.record_checksum is None


def test_a_large_index_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = _checkpoint(tmp_path)
    monkeypatch.setattr("shardpoint.engine.opening._SMALL", 100)
    index, _ = open_index(tmp_path)
    shutil.rmtree(tmp_path)
    assert index.metadata_files[1:] != []
    assert np.array_equal(index.chunks.record_offset, wanted.chunks.record_offset)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "folder"])
def test_a_damaged_index_is_passed_over_with_a_warning(tmp_path: Path, damage: str) -> None:
    _checkpoint(tmp_path)
    file = _index_file(tmp_path)
    data = bytearray(file.read_bytes())
    file.unlink()
    data[len(data) // 2] ^= 4
    if damage == "folder":  # no file of that name: as if there were none
        file.mkdir()
        assert open_index(tmp_path)[0].metadata_files == [".metadata"]
        return
    file.write_bytes({"flip": data, "cut": data[:-9], "empty": b""}[damage])
    with pytest.warns(ShardpointWarning, match="damaged"):
        checkpoint = shardpoint.open(tmp_path)
    assert checkpoint.index.metadata_files == [".metadata"]
    assert checkpoint["w"].sum() == 199 * 100


def test_an_index_that_leads_out_is_refused(tmp_path: Path) -> None:
    _checkpoint(tmp_path / "ckpt")
    file = _index_file(tmp_path / "ckpt")
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    with pytest.raises(UnsafePathError, match=r"\.index"):
        open_index(tmp_path / "ckpt")


def test_files_outside_are_refused_when_they_are_opened(tmp_path: Path) -> None:
    index = _checkpoint(tmp_path / "ckpt")
    hostile = dataclasses.replace(index, files=["../secret", *index.files[1:]])
    metadata = write_metadata(hostile)
    name, data = committing.index_for(hostile, metadata)
    committing.commit(
        LocalStorage(tmp_path / "ckpt"), ".metadata", metadata, index=(name, data), sync=False
    )
    (tmp_path / "secret").write_bytes(b"x" * 5000)
    checkpoint = shardpoint.open(tmp_path / "ckpt")
    assert checkpoint.index.metadata_files == [".metadata", name]
    with pytest.raises(UnsafePathError, match="secret"):
        checkpoint.read("w")


def test_the_metadata_says_what_the_index_says(tmp_path: Path) -> None:
    _checkpoint(tmp_path)
    index, _ = open_index(tmp_path)
    described = read_metadata((tmp_path / ".metadata").read_bytes(), file=".metadata")
    ours, theirs = columns_of(index), columns_of(described)
    differing = {name for name in ours if ours[name] != theirs.get(name)}
    assert differing <= {".metadata_files", ".chunks.payloads", ".chunks.record_checksum"} | {
        name for name in ours if name.startswith(".chunks.payloads.")
    }


@settings(max_examples=300)
@given(
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 40),
)
def test_any_bytes_with_a_right_checksum_give_an_index_or_an_error_of_ours(
    edits: list[tuple[int, int]], cut: int
) -> None:
    data = bytearray(write_index(small_index(), STAMP))
    for position, value in edits:
        data[position % len(data)] = value
    if cut > 30:
        del data[-(cut - 30) - 4 : -4]
    data[-4:] = zlib.crc32(data[:-4]).to_bytes(4, "little")
    try:
        index = read(data)
    except ShardpointError:
        return
    find_problems(index, rows=None, file_sizes=None)
