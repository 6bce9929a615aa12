"""Chunks and places taken by the thousands are what single steps would have read."""

from __future__ import annotations

import dataclasses
import pickle
import random
import struct
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest

from fixture_support import public_fixtures
from shardpoint.errors import FormatError, LimitExceededError, ShardpointError
from shardpoint.formats import dcp_metadata
from shardpoint.formats._metadata_cursors import fetch
from shardpoint.formats._metadata_grammar import (
    ChunkColumns,
    StorageColumns,
    TensorColumns,
)
from shardpoint.formats._metadata_pickle import load_metadata_pickle
from shardpoint.formats._metadata_runs import MetadataRuns
from shardpoint.formats.dcp_metadata import (
    read_metadata,
    read_per_rank_metadata,
    write_metadata,
)

torch = pytest.importorskip("torch")
metadata = pytest.importorskip("torch.distributed.checkpoint.metadata")
filesystem = pytest.importorskip("torch.distributed.checkpoint.filesystem")

FIXTURES = [f for f in public_fixtures() if f.is_dcp]
ALWAYS, NEVER = 0, 1 << 62


def outcome(data: bytes, least: int) -> Any:
    """The index or the error, with runs taken from a certain size on."""
    with mock.patch.object(dcp_metadata, "_HAS_RUNS", least):
        try:
            return read_metadata(data, file="x")
        except ShardpointError as error:
            return type(error), str(error)


def assert_same(mine: Any, other: Any, where: str = "") -> None:
    assert type(mine) is type(other), where
    if dataclasses.is_dataclass(mine):
        for column in dataclasses.fields(mine):
            name = column.name
            assert_same(getattr(mine, name), getattr(other, name), f"{where}.{name}")
    elif isinstance(mine, np.ndarray):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape), where
        np.testing.assert_array_equal(mine, other, err_msg=where)
    else:
        assert mine == other, where


def assert_reads_the_same(data: bytes) -> None:
    assert_same(outcome(data, ALWAYS), outcome(data, NEVER))


def taken(data: bytes) -> list[int]:
    """How many chunks, places, and tensors of one chunk are taken in runs."""
    runs = MetadataRuns(data)
    load_metadata_pickle(data, source="x", runs=runs)
    counts = dict.fromkeys([ChunkColumns, StorageColumns, TensorColumns], 0)
    for table in runs.tables:
        counts[type(table.columns)] += int((table.first_slot >= 0).sum())
    return list(counts.values())


def layout(
    seed: int,
    *,
    tensors: int = 6,
    ranks: int = 5,
    share: float = 0.3,
    edit: Callable[[random.Random, Any, Any], None] | None = None,
) -> Any:
    """A ``Metadata`` of tensors of 0 to 5 axes over some ranks, each part shared or its own."""
    rng = random.Random(seed)
    sizes: dict[tuple[int, ...], Any] = {}
    texts: dict[str, str] = {}

    def size(numbers: tuple[int, ...]) -> Any:
        made = torch.Size(numbers)
        return sizes.setdefault(numbers, made) if rng.random() < share else made

    def text(value: str) -> str:
        made = value.encode().decode()
        return texts.setdefault(value, made) if rng.random() < share else made

    entries: dict[str, Any] = {}
    places: list[tuple[Any, Any]] = []
    offset = [0] * ranks
    for number in range(tensors):
        key = f"{'é' * (number % 3)}layer.{number}.weight"
        if rng.random() < 0.1:
            entries[key] = metadata.BytesStorageMetadata()
            index = metadata.MetadataIndex(text(key), index=rng.choice([None, 0]))
            places.append((index, filesystem._StorageInfo(text("__0_0.distcp"), 1, 2)))
            continue
        axes = rng.randrange(6)
        rest = tuple(rng.choice([1, 7, 300, 70_000, 2**31, 2**40]) for _ in range(axes - 1))
        step = rng.choice([1, 200, 40_000, 2**31 - 1, 2**33])
        count = ranks if axes and rng.random() < 0.9 else 1
        chunks = []
        for rank in range(count):
            start = (rank * step, *(0 for _ in rest)) if axes else ()
            box = (step, *rest) if axes else ()
            chunks.append(metadata.ChunkStorageMetadata(size(start), size(box)))
            at = chunks[-1].offsets if rng.random() < share else size(start)
            index = metadata.MetadataIndex(text(key), at, rng.choice([None, rank, rank, rank]))
            length = rng.choice([9, 999, 99_999, 2**35])
            transforms = rng.choice([None, None, [text("stream.zstd/1")], [text("a"), "b"]])
            info = filesystem._StorageInfo(
                text(f"__{rank}_0.distcp"), offset[rank], length, transforms
            )
            offset[rank] += length
            places.append((index, info))
        entries[key] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(rng.choice([torch.float32, torch.bfloat16])),
            torch.Size((step * count, *rest) if axes else ()),
            chunks,
        )
    if rng.random() < 0.5:
        places.sort(key=lambda pair: pair[1].relative_path)
    if edit is not None:
        edit(rng, entries, places)
    paths = {key: tuple(key.split(".")) for key in entries}
    return metadata.Metadata(entries, paths, dict(places), metadata.StorageMeta())


@pytest.mark.parametrize("fixture", FIXTURES, ids=str)
def test_fixtures_read_the_same(fixture: Any) -> None:
    for name in fixture.expected["metadata_files"]:
        assert_reads_the_same((fixture.checkpoint / name).read_bytes())


@pytest.mark.parametrize("ranks", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_layouts_of_torch_read_the_same(share: float, ranks: int) -> None:
    for seed in range(8):
        data = pickle.dumps(layout(seed, tensors=7, ranks=ranks, share=share))
        assert_reads_the_same(data)
        assert_reads_the_same(write_metadata(read_metadata(data, file="x")))


def regular(tensors: int, ranks: int) -> Any:
    """Like what many ranks write: a part of each tensor by each, ordered by rank."""
    entries, places = {}, {}
    for number in range(tensors):
        entries[f"layers.{number}.weight"] = metadata.TensorStorageMetadata(
            metadata.TensorProperties(torch.bfloat16),
            torch.Size([ranks * 300, 64]),
            [
                metadata.ChunkStorageMetadata(torch.Size([rank * 300, 0]), torch.Size([300, 64]))
                for rank in range(ranks)
            ],
        )
    for rank in range(ranks):
        file = f"__{rank}_0.distcp"
        for number in range(tensors):
            index = metadata.MetadataIndex(
                f"layers.{number}.weight", torch.Size([rank * 300, 0]), rank
            )
            places[index] = filesystem._StorageInfo(file, number * 40_000, 40_000)
    return metadata.Metadata(entries, None, places)


def test_large_regular_metadata_is_nearly_all_runs() -> None:
    data = pickle.dumps(regular(20, 128))
    assert len(data) > 5 * 65536  # several frames, some of which begin inside of an entry
    chunks, places, _ = taken(data)
    assert chunks >= 20 * 127
    assert places >= 20 * 128 - 2
    assert_reads_the_same(data)
    index = read_metadata(data, file="x")
    assert taken(write_metadata(index)) == [2560, 2560, 0]
    assert_same(outcome(write_metadata(index), ALWAYS), dataclasses.replace(index))


def test_many_tensors_of_one_chunk_are_nearly_all_runs() -> None:
    whole = regular(1500, 1)
    for number in range(0, 1500, 100):  # objects stand among the tensors
        whole.state_dict_metadata[f"object.{number}"] = metadata.BytesStorageMetadata()
    entries = list(whole.state_dict_metadata.items())
    random.Random(1).shuffle(entries)
    whole.state_dict_metadata = dict(entries)
    whole.planner_data = {key: tuple(key.split(".")) for key in whole.state_dict_metadata}
    data = pickle.dumps(whole)
    assert taken(data)[2] >= 1498
    assert_reads_the_same(data)
    own = write_metadata(read_metadata(data, file="x"))
    assert taken(own) == [0, 1500, 1500]
    assert_reads_the_same(own)


@pytest.mark.parametrize(
    "change", [b"0", b"00", b"2", b"22", b"\x86", b"a", b"s", b"\x940", b"b", b"1", b"N", b"NN"]
)
def test_opcodes_behind_a_run_of_tensors_have_the_effect_of_single_steps(change: bytes) -> None:
    data = pickle.dumps(regular(6, 1))
    assert taken(data)[2] == 5
    end = data.index(b"u\x8c\x0cplanner_data")
    assert_reads_the_same(b"\x80\x04" + data[11:end] + change + data[end:])


def test_key_that_is_there_twice_reads_the_same() -> None:
    data = pickle.dumps(regular(6, 1))
    for other in b"0", b"3":
        twice = data.replace(b"layers.4.weight", b"layers." + other + b".weight", 1)
        assert len(read_metadata(twice, file="x").tensors) == 5
        assert_reads_the_same(twice)


def test_frames_at_every_place_read_the_same() -> None:
    """FRAME may stand between any two opcodes."""
    data = pickle.dumps(layout(3, tensors=4, ranks=2))
    body = data[11:]
    for cut in range(600, len(body), 11):
        framed = b"".join(
            b"\x95" + struct.pack("<Q", len(part)) + part for part in (body[:cut], body[cut:])
        )
        assert_reads_the_same(data[:2] + framed)


def twice(rng: random.Random, entries: Any, places: Any) -> None:
    """Say of some chunks twice where they lie; another place each time."""
    for index, place in rng.sample(places, min(4, len(places))):
        again = metadata.MetadataIndex(index.fqn, getattr(index, "offset", None), index.index)
        places.append((again, dataclasses.replace(place, offset=1)))


def misplaced(rng: random.Random, entries: Any, places: Any) -> None:
    """Leave out some places, shuffle them, and name keys and offsets that nothing has."""
    rng.shuffle(places)
    del places[: len(places) // 4]
    for index, _ in places[:4]:
        object.__setattr__(index, "index", rng.choice([None, 0, 10_000]))
    object.__setattr__(places[5][0], "fqn", "nowhere")
    object.__setattr__(places[6][0], "offset", torch.Size([5]))


def repeated(rng: random.Random, entries: Any, places: Any) -> None:
    """List some chunks twice, and share lists and chunks between tensors."""
    tensors = [entry for entry in entries.values() if hasattr(entry, "chunks")]
    for tensor in tensors[:3]:
        tensor.chunks.extend(tensor.chunks[:2])
    tensors[-1].size, tensors[-1].chunks = tensors[0].size, tensors[0].chunks


def test_parts_of_ranks_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def part(seed: int, rank: int) -> bytes:
        def keep(rng: random.Random, entries: Any, places: Any) -> None:
            for entry in entries.values():
                if hasattr(entry, "chunks"):
                    del entry.chunks[: rank % 2], entry.chunks[rank + 1 :]

        return pickle.dumps(layout(seed, edit=keep))

    for seed in range(4):
        parts = {f"__{rank}.metadata": part(seed, rank) for rank in range(4)}
        results = []
        for least in (ALWAYS, NEVER):
            monkeypatch.setattr(dcp_metadata, "_HAS_RUNS", least)
            results.append(read_per_rank_metadata(parts))
        assert_same(*results)


@pytest.mark.parametrize("edit", [twice, misplaced, repeated])
def test_unusual_places_read_the_same(
    edit: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a dict can hold equal ones.
    monkeypatch.setattr(metadata.MetadataIndex, "__eq__", lambda self, other: self is other)
    monkeypatch.setattr(metadata.MetadataIndex, "__hash__", object.__hash__)
    for seed in range(8):
        assert_reads_the_same(pickle.dumps(layout(seed, tensors=8, edit=edit)))


def test_texts_that_look_like_opcodes_read_the_same() -> None:
    data = pickle.dumps(regular(2, 6))
    chunk = data[data.rindex(b"\x8c", 0, data.index(b"planner_data")) - 60 :][:40]
    for inside in (chunk, chunk[:12], b"h(" + chunk):
        key = inside.decode("latin-1")
        whole = regular(2, 6)
        whole.state_dict_metadata[key] = whole.state_dict_metadata["layers.0.weight"]
        for index in list(whole.storage_data)[::3]:
            object.__setattr__(index, "fqn", key)
        assert_reads_the_same(pickle.dumps(whole))


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_reads_the_same(protocol: int) -> None:
    assert_reads_the_same(pickle.dumps(regular(3, 6), protocol=protocol))


def test_damaged_metadata_reads_the_same() -> None:
    """Whatever is changed: the same index, or the same error."""
    rng = random.Random(7)
    whole = pickle.dumps(layout(1, tensors=4, ranks=4))
    single = pickle.dumps(layout(1, tensors=7, ranks=1))
    own = write_metadata(read_metadata(whole, file="x"))
    refused = 0
    for number in range(400):
        data = bytearray([own, whole, single, whole][number % 4])
        for _ in range(rng.choice([1, 1, 2])):
            position = rng.randrange(200, len(data))
            action = rng.randrange(4)
            if action == 0:
                data[position] = rng.randrange(256)
            elif action == 1:
                del data[position]
            elif action == 2:
                data.insert(position, rng.choice(data))
            else:  # a small step: another memo slot, another number, another opcode
                data[position] = (data[position] + rng.choice([-1, 1])) % 256
        result = outcome(bytes(data), ALWAYS)
        assert_same(result, outcome(bytes(data), NEVER))
        refused += type(result) is tuple
    assert 100 < refused < 390


def test_instance_that_is_changed_after_its_run_is_read_singly() -> None:
    """A slot inside of a run may be fetched, and what is there given another state."""
    data = pickle.dumps(regular(2, 6))
    runs = MetadataRuns(data)
    load_metadata_pickle(data, source="x", runs=runs)
    table = next(t for t in runs.tables if isinstance(t.columns, ChunkColumns))
    row = int(np.flatnonzero(table.first_slot >= 0)[1])
    slot = int(table.first_slot[row])
    assert slot < 256
    end = data.index(b"planner_data") - 2
    change = b"h" + bytes((slot,)) + b"}b0"  # give the chunk no fields at all, and drop it
    changed = data[:end] + change + data[end:]
    changed = b"\x80\x04" + changed[11:]
    with pytest.raises(FormatError, match="offsets of chunk"):
        read_metadata(changed, file="x")
    assert_reads_the_same(changed)


def test_list_of_chunks_that_countless_tensors_share_is_refused() -> None:
    whole = regular(1, 2000)
    entry = whole.state_dict_metadata["layers.0.weight"]
    for number in range(1, 400):
        whole.state_dict_metadata[f"layers.{number}.weight"] = dataclasses.replace(entry)
    data = pickle.dumps(whole)
    for least in (ALWAYS, NEVER):
        error, message = outcome(data, least)
        assert error is LimitExceededError
        assert "far more chunks than the size of the file can explain" in message


def test_text_that_comes_only_later_is_refused() -> None:
    """Columns are read all at once; a fetch must not see what a later row puts into the memo."""
    data = pickle.dumps(regular(4, 8))
    runs = MetadataRuns(data)
    load_metadata_pickle(data, source="x", runs=runs)
    table = next(t for t in runs.tables if isinstance(t.columns, StorageColumns))
    path = table.columns.path
    fetching = int(np.flatnonzero((path.reference >= 256) & (table.first_slot >= 0))[0])
    later = fetching + 1 + int(np.flatnonzero(path.slot[fetching + 1 :] >= 0)[0])
    wanted = int(table.first_slot[later] + path.slot[later])
    old, new = fetch(int(path.reference[fetching])), fetch(wanted)
    at = data.index(old, int(table.start[fetching]), int(table.end[fetching]))
    changed = data[:at] + new + data[at + len(old) :]
    with pytest.raises(FormatError, match=f"memo entry {wanted}, which nothing has set"):
        read_metadata(changed, file="x")
    assert_reads_the_same(changed)


def test_short_metadata_is_read_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dcp_metadata, "MetadataRuns", None)
    assert len(read_metadata(pickle.dumps(regular(2, 6)), file="x").chunks) == 12
