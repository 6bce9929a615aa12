"""Any byte of a saved checkpoint may change: `verify` and a load that reads it say so.

``HYPOTHESIS_PROFILE=thorough`` tries twenty times as many positions.
"""

from __future__ import annotations

import io
import random
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as torch_dcp
from hypothesis import settings
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardpoint
import shardpoint.dcp as dcp
from dcp_states import differences
from ranks import RankPool
from shardpoint.dcp.extension import AesGcm, ExtensionRegistry, ShuffleZstd
from shardpoint.errors import CorruptionError, ShardpointError
from shardpoint.index import BLOCK_BYTES, NO_FILE, CheckpointIndex, Container
from shardpoint.transforms import AesGcm as Decryption

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*single process:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*damaged.*:shardpoint.errors.ShardpointWarning"),
]

FLIPS = settings.default.max_examples * 2 // 5
KEY = bytes(range(32))
Span = tuple[int, int]


def _values(seed: int, *shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def _everything() -> dict[str, Any]:
    """Return one of each kind of value, none of them large."""
    base = _values(1, 40, 60)
    return {
        "small": _values(2, 5, 3),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "turned": base.t(),
        "part": base[3:20, 5:30],
        "half": _values(3, 33).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "parameter": torch.nn.Parameter(_values(4, 3)),
        "number": 5,
        "text": "hello",
        "object": {"a": [1, 2.5, None, "x" * 50], "b": (1, 2), "t": _values(5, 7)},
    }


def _blocks() -> dict[str, Any]:
    """Return tensors of several blocks with a checksum each, the last of them not full."""
    count = 4 * BLOCK_BYTES // 4 + 1001
    return {
        "large": _values(6, count),
        "half": _values(7, count).bfloat16(),
        "turned": _values(8, 300, 200).t(),
        "number": 2.5,
    }


def _sharded() -> dict[str, Any]:
    """Return what two ranks save parts of, as it is when put together."""
    whole = {"rows": _values(9, 300, 200), "columns": _values(10, 50, 301), "all": _values(11, 9)}
    return {**whole, "number0": 0, "number1": 1}


def _save_sharded(folder: str) -> None:
    mesh, rank, whole = init_device_mesh("cpu", (2,)), dist.get_rank(), _sharded()
    state = {
        "rows": distribute_tensor(whole["rows"], mesh, [Shard(0)]),
        "columns": distribute_tensor(whole["columns"], mesh, [Shard(1)]),
        "all": whole["all"],
        f"number{rank}": rank,
    }
    dcp.save(state, checkpoint_id=folder)


def _save(state: dict[str, Any], folder: Path, **options: Any) -> None:
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, **options), planner=planner)


KINDS: dict[str, tuple[Callable[[], dict[str, Any]], dict[str, Any]]] = {
    "everything": (_everything, {}),
    "blocks": (_blocks, {}),
    "two files": (_everything, {"thread_count": 2}),
    "two ranks": (_sharded, {}),
    "compressed": (_everything, {"_extensions": [ShuffleZstd()]}),
    "encrypted": (_everything, {"_extensions": [AesGcm(KEY)]}),
    "images": (
        lambda: {key: value for key, value in _everything().items() if key != "parameter"},
        {"serialization_format": dcp.filesystem.SerializationFormat.SAFETENSORS},
    ),
}


@dataclass(frozen=True, eq=False)
class Saved:
    """A checkpoint, what is in it, and its data files as they should be."""

    folder: Path
    state: dict[str, Any]
    files: dict[str, bytes]
    index: CheckpointIndex
    reader: Callable[[], dcp.FileSystemReader]

    def open(self, *, verify: bool = True) -> shardpoint.Checkpoint:
        return shardpoint.open(self.folder, verify=verify, transforms=[Decryption(KEY)])

    def problems(self) -> tuple[Any, ...]:
        return self.open().verify().problems

    def load(self, *, verify: bool = True) -> list[str]:
        """Load all of it, and return the keys that are not as saved."""
        target = {key: _blank(value) for key, value in self.state.items()}
        reader = self.reader()
        reader.verify = verify
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False)
        dcp.load(target, storage_reader=reader, planner=planner)
        return differences(self.state, target)

    def refusal(self) -> BaseException | None:
        """Load all of it: return why that was refused, None where every value is right."""
        try:
            changed = self.load()
        except dcp.CheckpointException as error:
            return error.causes[0]
        assert changed == []
        return None

    def records(self) -> Iterator[tuple[str, str, Span, Span]]:
        """Yield key, file, span of the record, and of what a load needs of it: all of an
        object's, a tensor's elements.
        """
        chunks, objects = self.index.chunks, self.index.objects
        payloads = chunks.payloads
        assert payloads is not None
        for row in range(len(chunks)):
            start = int(chunks.record_offset[row])
            record = (start, start + int(chunks.record_length[row]))
            at = int(payloads.offset[row])
            needed = (at, at + int(payloads.length[row]))
            if int(chunks.transform[row]):
                needed = record if chunks.sizes[row].all() else (start, start)
            if int(chunks.container[row]) == Container.SAFETENSORS_IMAGE:
                record = needed  # all have one header, which is found another way
            key = self.index.tensors.keys[int(chunks.tensor[row])]
            yield key, self.index.files[int(chunks.file[row])], record, needed
        for row in np.flatnonzero(objects.file != NO_FILE).tolist():
            start = int(objects.record_offset[row])
            record = (start, start + int(objects.record_length[row]))
            yield objects.keys[row], self.index.files[int(objects.file[row])], record, record

    def flips(self, seed: int, count: int = FLIPS) -> Iterator[tuple[str, int]]:
        """Change one byte of one file at a time; yield the file's name and the position."""
        chance = random.Random(seed)
        names = sorted(self.files)
        ends = [(name, at) for name in names for at in (0, len(self.files[name]) - 1)]
        for number in range(count):
            if number < len(ends):
                name, position = ends[number]
            else:
                name = chance.choice(names)
                position = chance.randrange(len(self.files[name]))
            changed = bytearray(self.files[name])
            changed[position] ^= chance.randint(1, 255)
            (self.folder / name).write_bytes(changed)
            yield name, position
            (self.folder / name).write_bytes(self.files[name])


def _blank(value: Any) -> Any:
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def _reader(folder: Path) -> dcp.FileSystemReader:
    registry = ExtensionRegistry()
    registry.register(AesGcm(KEY))
    return dcp.FileSystemReader(folder, registry)


@pytest.fixture(scope="module", params=KINDS)
def saved(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    folder = tmp_path_factory.mktemp("integrity") / "ckpt"
    make, options = KINDS[request.param]
    if request.param == "two ranks":
        pool.run(2, _save_sharded, str(folder))
    else:
        _save(make(), folder, **options)
    files = {file.name: file.read_bytes() for file in folder.glob("*.distcp")}
    assert len(files) == (2 if request.param.startswith("two") else 1)
    made = Saved(folder, make(), files, shardpoint.open(folder).index, partial(_reader, folder))
    assert made.problems() == ()
    assert made.load() == []
    return made


def _range_in(message: str, record: Span) -> Span:
    """Return the byte range that a message names; it must say what was wanted and found.

    Encrypted frames have tags in place of checksums, and neither is printed.
    """
    found = re.search(r"bytes (\d+) to (\d+)", message)
    if "frame" in message or "authentication" in message:
        if found is None:
            return record
        return record[0] + int(found[1]), record[0] + int(found[2])
    assert found, message
    assert re.search(r"wanted CRC-32 0x[0-9a-f]{8}, found 0x[0-9a-f]{8}", message), message
    return int(found[1]), int(found[2])


def _read_all(checkpoint: shardpoint.Checkpoint) -> dict[str, ShardpointError]:
    """Read every key by itself; return the errors."""
    errors = {}
    for key in checkpoint.keys():  # noqa: SIM118  no dict
        try:
            checkpoint[key]
        except ShardpointError as error:
            errors[key] = error
    return errors


def test_every_flip_is_found_and_placed(saved: Saved) -> None:
    needed = 0
    for name, position in saved.flips(seed=1):
        at = [
            found
            for found in saved.records()
            if found[1] == name and found[2][0] <= position < found[2][1]
        ]
        if not at:  # in the header of a safetensors image: the index has what it says
            assert {problem.file for problem in saved.problems()} == {name}
            assert _read_all(saved.open()) == {}
            continue
        ((key, _, record, wanted),) = at
        (problem,) = saved.problems()
        start, end = _range_in(problem.message, record)
        assert (problem.key, problem.file, problem.offset) == (key, name, start)
        assert record[0] <= start <= position < end <= record[1]
        errors = _read_all(saved.open())
        if not wanted[0] <= position < wanted[1]:
            # No load takes this byte for anything: the index says where elements lie.
            assert errors == {}
            assert saved.load() == []
            continue
        needed += 1
        assert list(errors) == [key]
        assert isinstance(errors[key], CorruptionError)
        with pytest.raises(dcp.CheckpointException) as raised:
            saved.load()
        assert isinstance(raised.value.causes[0], CorruptionError)
        for error in (errors[key], raised.value.causes[0]):
            assert f"key {key!r}, file {name!r}" in str(error)
            start, end = _range_in(str(error), record)
            assert start <= position < end
    assert needed


@pytest.mark.parametrize("saved", ["everything", "blocks", "two ranks", "images"], indirect=True)
def test_without_verify_a_flip_comes_through(saved: Saved) -> None:
    rows = [
        (key, name, needed)
        for key, name, _, needed in saved.records()
        if key in saved.index.tensors.keys and needed[1] > needed[0]
    ]
    for key, name, (start, end) in rows[:3]:
        changed = bytearray(saved.files[name])
        changed[(start + end) // 2] ^= 1
        (saved.folder / name).write_bytes(changed)
        with pytest.raises(dcp.CheckpointException, match="CRC-32"):
            saved.load()
        with pytest.raises(CorruptionError, match="CRC-32"):
            saved.open()[key]
        assert [text.split(":")[0] for text in saved.load(verify=False)] == [key]
        assert list(saved.open(verify=False)[key].shape) == list(saved.state[key].shape)
        (saved.folder / name).write_bytes(saved.files[name])


@pytest.mark.parametrize("saved", ["blocks"], indirect=True)
def test_a_slice_is_checked_by_the_blocks_that_it_covers(saved: Saved) -> None:
    (start, _) = next(needed for key, _, _, needed in saved.records() if key == "large")
    chance = random.Random(3)
    for name, position in saved.flips(seed=2):
        if not start <= position < start + saved.state["large"].nbytes:
            continue
        element = (position - start) // 4
        low = max(0, element - chance.randrange(100))
        high = element + 1 + chance.randrange(100)
        with pytest.raises(CorruptionError, match=f"'large', file {name!r}") as raised:
            saved.open().read("large", slice(low, high))
        found = _range_in(str(raised.value), (0, 0))
        assert found[0] <= position < found[1] <= found[0] + BLOCK_BYTES
        # Another block is as it was.
        block = (element * 4 // BLOCK_BYTES + 2) % 4 * BLOCK_BYTES // 4
        part = saved.open().read("large", slice(block, block + 10))
        assert part.tolist() == saved.state["large"][block : block + 10].tolist()


@pytest.fixture(scope="module", params=["index removed", "torch", "torch, two ranks"])
def unindexed(
    request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> Saved:
    folder = tmp_path_factory.mktemp("unindexed") / "ckpt"
    state = _everything()
    if request.param == "torch, two ranks":
        state = _sharded()
        pool.run(2, _save_sharded_by_torch, str(folder))
    elif request.param == "torch":
        planner = torch_dcp.DefaultSavePlanner(flatten_state_dict=False)
        torch_dcp.save(state, checkpoint_id=folder, planner=planner)
    else:
        _save(state, folder)
        for file in folder.glob(".shardpoint-*.index"):
            file.unlink()
    index = shardpoint.open(folder).index
    assert index.chunks.record_checksum is None
    files = {file.name: file.read_bytes() for file in folder.glob("*.distcp")}
    made = Saved(folder, state, files, index, partial(dcp.FileSystemReader, folder))
    assert made.problems() == ()
    assert made.load() == []
    return made


def _save_sharded_by_torch(folder: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dcp, "save", torch_dcp.save)
        _save_sharded(folder)


def _records_of(index: CheckpointIndex) -> Iterator[tuple[str, str, int, int]]:
    """Yield key, file, offset and length of all records."""
    for places, keys in (
        (index.chunks, [index.tensors.keys[row] for row in index.chunks.tensor]),
        (index.objects, index.objects.keys),
    ):
        for row in range(len(places)):
            yield (
                *(keys[row], index.files[int(places.file[row])]),
                *(int(places.record_offset[row]), int(places.record_length[row])),
            )


def _covered(saved: Saved) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Return the bytes that torch's CRC-32 values cover, and those of them that loads read.

    They are found with Python's own module for zips. torch writes the values into the zip's
    directory: each covers the content of one member. Loads read the pickle, the byte order and
    the storages.
    """
    covered, read = set(), set()
    for _, name, offset, length in _records_of(saved.index):
        record = saved.files[name][offset : offset + length]
        for member in zipfile.ZipFile(io.BytesIO(record)).infolist():
            at = member.header_offset
            head = int.from_bytes(record[at + 26 : at + 28], "little")
            extra = int.from_bytes(record[at + 28 : at + 30], "little")
            start = offset + at + 30 + head + extra
            content = {(name, start + number) for number in range(member.file_size)}
            covered |= content
            if member.filename.split("/", 1)[1].startswith(("data.pkl", "byteorder", "data/")):
                read |= content
    return covered, read


def test_without_an_index_all_that_torchs_checksums_cover_is_found(unindexed: Saved) -> None:
    saved = unindexed
    covered, read = _covered(saved)
    total = sum(map(len, saved.files.values()))
    print(f"\n{len(covered)} of {total} bytes are covered by CRC-32 values, {len(read)} are read")
    found = harmless = 0
    for name, position in saved.flips(seed=4, count=4 * FLIPS):
        problems = saved.problems()
        assert problems or (name, position) not in covered
        assert all(problem.file == name for problem in problems)
        refusal = saved.refusal()  # what is not found changes nothing: no value is ever wrong
        if refusal is None:
            assert (name, position) not in read
            harmless += 1
            continue
        assert isinstance(refusal, ShardpointError)
        assert repr(name) in str(refusal)
        found += 1
    assert found
    assert harmless


def _swap(one: Path, other: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


def test_cut_files_and_added_bytes_are_found(saved: Saved) -> None:
    chance = random.Random(5)
    for name, whole in saved.files.items():
        cuts = [0, 1, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(5))]
        for length in cuts:
            (saved.folder / name).write_bytes(whole[:length])
            problems = saved.problems()
            assert any(problem.file == name for problem in problems)
            assert saved.open().verify(quick=True).problems
            refusal = saved.refusal()
            if refusal is None:  # only bytes that belong to no element are gone
                assert all(
                    needed[1] <= length for _, file, _, needed in saved.records() if file == name
                )
                continue
            assert isinstance(refusal, CorruptionError)
            assert name in str(refusal)
        for extra in (b"\0", chance.randbytes(1000)):
            (saved.folder / name).write_bytes(whole + extra)
            assert {problem.file for problem in saved.problems()} == {name}
            assert saved.load() == []  # every value is still there
        (saved.folder / name).unlink()
        assert any(problem.file == name for problem in saved.open().verify(quick=True).problems)
        with pytest.raises(dcp.CheckpointException, match=re.escape(name)):
            saved.load()
        (saved.folder / name).write_bytes(whole)


def test_swapped_files_are_found(pool: RankPool, tmp_path: Path) -> None:
    folder = tmp_path / "ckpt"
    pool.run(2, _save_sharded, str(folder))
    one, other = sorted(folder.glob("*.distcp"))
    _swap(one, other)
    assert {problem.file for problem in shardpoint.open(folder).verify().problems} == {
        one.name,
        other.name,
    }
    target = {key: _blank(value) for key, value in _sharded().items()}
    with pytest.raises(dcp.CheckpointException) as raised:
        dcp.load(target, checkpoint_id=folder)
    assert isinstance(raised.value.causes[0], CorruptionError)


def test_a_file_of_another_save_of_the_same_layout_is_found(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        dcp.save({"w": torch.full((50, 50), value), "n": value}, checkpoint_id=tmp_path / name)
    (one,) = (tmp_path / "a").glob("*.distcp")
    shutil.copy(tmp_path / "b" / one.name, one)
    problems = shardpoint.open(tmp_path / "a").verify().problems
    assert {problem.key for problem in problems} == {"w", "n"}
    target = {"w": torch.zeros(50, 50), "n": 0.0}
    with pytest.raises(dcp.CheckpointException, match="wanted CRC-32"):
        dcp.load(target, checkpoint_id=tmp_path / "a")


def test_flips_of_metadata_and_index_are_told_of_and_never_give_wrong_values(saved: Saved) -> None:
    chance = random.Random(6)
    for file in (*saved.folder.glob(".metadata"), *saved.folder.glob("*.index")):
        whole = file.read_bytes()
        for _ in range(FLIPS // 2):
            changed = bytearray(whole)
            changed[chance.randrange(len(whole))] ^= chance.randint(1, 255)
            file.write_bytes(changed)
            try:
                report = saved.open().verify()
            except ShardpointError:
                pass  # it does not even open
            else:
                assert report.problems
            assert isinstance(saved.refusal(), ShardpointError | None)
        file.write_bytes(whole)
