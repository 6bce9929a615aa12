"""Extensions: torch's and ours, one or several, whole and in parts, and those of programs."""

from __future__ import annotations

import gzip
import io
import pickle
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import _extension as theirs

import shardpoint
import shardpoint.dcp as dcp
from shardpoint.cli import main as cli
from shardpoint.dcp import extension as ours
from shardpoint.dcp.api import CheckpointException
from shardpoint.engine import _chunks as chunk_reading
from shardpoint.engine import _parts as part_reading
from shardpoint.engine.opening import open_index
from shardpoint.engine.reading import ArraySink, ReadRequest, read_tensors
from shardpoint.errors import (
    NotSupportedError,
    PlanError,
    UnknownExtensionError,
)
from shardpoint.formats.checksum import crc32
from shardpoint.index import BLOCK_BYTES
from shardpoint.transforms import AesGcm as Decryption
from shardpoint.transforms import (
    MemoryRecord,
    Origin,
    RecordBytes,
    ShuffleZstd,
    Tally,
    Transforms,
    read_at,
)

KEY = bytes(range(16))
State: TypeAlias = dict[str, Any]


_XOR = bytes(byte ^ 7 for byte in range(256))


class _XorOut(io.RawIOBase):
    def __init__(self, output: IO[bytes]) -> None:
        self._output = output

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return self._output.write(bytes(data).translate(_XOR))

    def close(self) -> None:
        if not self.closed:
            self._output.close()
            super().close()


class Xor(theirs.StreamTransformExtension):
    """A program's own extension, of torch's classes. No compressor: sizes stay."""

    @staticmethod
    def registry_name() -> str:
        return "stream.xor@tests"

    @staticmethod
    def from_descriptor(version: str) -> Xor:
        assert version == "3"
        return Xor()

    def get_descriptor(self) -> str:
        return "stream.xor@tests/3"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", _XorOut(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return io.BytesIO(input.read().translate(_XOR))


class Gzip(ours.StreamTransformExtension):
    """A program's own extension, of our classes; it knows no version."""

    @staticmethod
    def registry_name() -> str:
        return "stream.gzip"

    @staticmethod
    def from_descriptor(version: str) -> Gzip:
        assert version == ""
        return Gzip()

    def get_descriptor(self) -> str:
        return "stream.gzip"

    def transform_to(self, output: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", _GzipOut(output))

    def transform_from(self, input: IO[bytes]) -> IO[bytes]:
        return cast("IO[bytes]", gzip.GzipFile(fileobj=input, mode="rb"))


class _GzipOut(gzip.GzipFile):
    def __init__(self, output: IO[bytes]) -> None:
        super().__init__(fileobj=output, mode="wb", mtime=0)
        self._output = output

    def close(self) -> None:
        super().close()
        self._output.close()


def _state() -> State:
    generator = torch.Generator().manual_seed(1)
    return {
        "w": torch.randn(700, 600, generator=generator).to(torch.bfloat16),
        "transposed": torch.randn(30, 20, generator=generator).t(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(2.5),
        "config": {"name": "small", "step": 7},
    }


def _blank() -> State:
    state = {
        key: torch.full_like(value, 9) if isinstance(value, torch.Tensor) else value
        for key, value in _state().items()
    }
    return state | {"config": {"name": "", "step": 0}}


def _check(state: State) -> None:
    for key, value in _state().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(state[key], value), key
        else:
            assert state[key] == value


def _save(package: Any, path: Path, extensions: Sequence[Any], **options: Any) -> None:
    writer = package.FileSystemWriter(path, _extensions=extensions, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's: no process group
        package.save(_state(), storage_writer=writer)


def _load(package: Any, path: Path, registry: Any) -> State:
    state = _blank()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package.load(
            state, storage_reader=package.FileSystemReader(path, _extension_registry=registry)
        )
    return state


def _registry(package: Any) -> Any:
    registry = package.ExtensionRegistry()
    for extension in (Xor, Gzip, ours.ShuffleZstd, ours.AesGcm(KEY)):
        registry.register(extension)
    return registry


def _descriptors(path: Path) -> set[tuple[str, ...]]:
    metadata = torch_dcp.FileSystemReader(path).read_metadata()
    return {tuple(info.transform_descriptors) for info in metadata.storage_data.values()}


CHAINS: dict[str, list[Any]] = {
    "our zstd": [ours.ZStandard()],
    "torch's zstd": [theirs.ZStandard()],
    "xor": [Xor()],
    "gzip": [Gzip()],
    "xor of gzip": [Xor(), Gzip()],
    "gzip of zstd of xor": [Gzip(), ours.ZStandard(), Xor()],
    "shuffled": [ours.ShuffleZstd()],
    "encrypted": [ours.AesGcm(KEY)],
    "encrypted shuffled": [ours.AesGcm(KEY), ours.ShuffleZstd()],
    "gzip of encrypted": [Gzip(), ours.AesGcm(KEY)],
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("writer", [torch_dcp, dcp], ids=["torch", "ours"])
def test_what_either_writes_we_read(writer: Any, chain: list[Any], tmp_path: Path) -> None:
    _save(writer, tmp_path, chain)
    assert _descriptors(tmp_path) == {tuple(e.get_descriptor() for e in reversed(chain))}
    for package in (ours, theirs):
        _check(_load(dcp, tmp_path, _registry(package)))


@pytest.mark.parametrize("name", ["our zstd", "torch's zstd", "xor", "gzip", "encrypted"])
def test_torch_reads_what_we_write(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One extension: torch 2.13 itself undoes several in the wrong order."""
    for kind in (Gzip, ours.AesGcm):
        theirs.StreamTransformExtension.register(kind)  # torch's reader asks isinstance
    _save(dcp, tmp_path, CHAINS[name])
    _check(_load(torch_dcp, tmp_path, _registry(theirs)))


def test_same_entries_as_torchs(tmp_path: Path) -> None:
    """Of extensions that give the same bytes for the same bytes, in pieces of any size."""
    sizes = []
    for package, name in ((torch_dcp, "torch"), (dcp, "ours")):
        _save(package, tmp_path / name, [Xor()])
        metadata = torch_dcp.FileSystemReader(tmp_path / name).read_metadata()
        sizes.append(
            {index: (info.offset, info.length) for index, info in metadata.storage_data.items()}
        )
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("options", [{"thread_count": 3}, {"single_file_per_rank": False}])
def test_several_files(options: dict[str, Any], tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS["encrypted shuffled"], **options)
    _check(_load(dcp, tmp_path, _registry(ours)))


def _tensor_bytes_decoded(path: Path, box: tuple[slice, ...], added: Any) -> tuple[int, int]:
    """Read a box of "w"; return its bytes, and how many were decoded for it."""
    index, storage = open_index(path)
    row = list(index.tensors.keys).index("w")
    expected = _state()["w"].view(torch.uint16).numpy()[box]
    into = np.zeros(expected.shape, np.uint16)
    tally = Tally()
    read_tensors(
        index,
        storage,
        [ReadRequest(row, tuple(s.start for s in box), into.shape, ArraySink(into))],
        threads=2,
        verify=True,
        finder=Transforms(added),
        tally=tally,
    )
    assert np.array_equal(into, expected)
    return into.nbytes, tally.decoded_bytes


@pytest.mark.parametrize("writer", [torch_dcp, dcp], ids=["torch", "ours"])
@pytest.mark.parametrize("name", ["shuffled", "encrypted", "encrypted shuffled"])
def test_a_slice_decodes_less_than_twice_its_bytes(name: str, writer: Any, tmp_path: Path) -> None:
    _save(writer, tmp_path, CHAINS[name])
    for start in range(0, 700, 100):
        box = (slice(start, start + 100), slice(0, 600))
        wanted, decoded = _tensor_bytes_decoded(tmp_path, box, [Decryption(KEY)])
        assert wanted <= decoded < 2 * wanted
    # A column needs every row's frames, but each of them once.
    box = (slice(0, 700), slice(100, 500))
    wanted, decoded = _tensor_bytes_decoded(tmp_path, box, [Decryption(KEY)])
    assert decoded < 2 * wanted


@pytest.mark.parametrize("name", ["shuffled", "encrypted", "encrypted shuffled"])
def test_open_reads_verifies_and_pickles(name: str, tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS[name])
    checkpoint = shardpoint.open(tmp_path, transforms=[Decryption(KEY)])
    assert checkpoint.verify().ok
    for again in (checkpoint, pickle.loads(pickle.dumps(checkpoint))):
        assert again["config.step"] == 7
        w = again.read("w", (slice(3, 5), slice(None))).view(np.uint16)
        assert np.array_equal(w, _state()["w"][3:5].view(torch.uint16).numpy())
    info = checkpoint.info("w")
    assert info.chunks[0].transforms == tuple(e.get_descriptor() for e in reversed(CHAINS[name]))


@pytest.mark.parametrize("name", ["xor", "shuffled", "encrypted", "encrypted shuffled"])
def test_verify_finds_damage_behind_extensions(name: str, tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS[name])
    checkpoint = shardpoint.open(tmp_path, transforms=[Decryption(KEY), Xored()])
    chunk = checkpoint.info("w").chunks[0]
    file = tmp_path / chunk.file
    data = bytearray(file.read_bytes())
    data[chunk.record_offset + 300_000] ^= 1
    file.write_bytes(data)
    (problem,) = checkpoint.verify().problems
    assert (problem.key, problem.file) == ("w", chunk.file)
    with pytest.raises(CheckpointException, match=f"CorruptionError: key 'w'.*{chunk.file}"):
        _load(dcp, tmp_path, _registry(ours))


def test_encrypted_without_key_says_how_to_give_one(tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS["encrypted"])
    assert not any(b"small" in file.read_bytes() for file in tmp_path.glob("*.distcp"))
    with pytest.raises(NotSupportedError, match=r"transforms=\["):
        shardpoint.open(tmp_path)["w"]
    with pytest.raises(CheckpointException, match=r"registry\.register\(AesGcm\(key\)\)"):
        _load(dcp, tmp_path, None)
    registry = ours.ExtensionRegistry()
    registry.register(ours.AesGcm(bytes(16)))
    with pytest.raises(CheckpointException, match="the key or the context is not"):
        _load(dcp, tmp_path, registry)


@pytest.mark.parametrize("package", [ours, theirs], ids=["our registry", "torch's registry"])
def test_unknown_extension_is_named(package: Any, tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS["xor"])
    with pytest.raises(CheckpointException, match=r"NotSupportedError.*stream\.xor@tests.*regist"):
        _load(dcp, tmp_path, package.ExtensionRegistry())
    with pytest.raises(NotSupportedError, match=r"stream\.xor@tests/3.*transforms=\["):
        shardpoint.open(tmp_path)["w"]


def test_registry_finds_extensions_as_torchs_does() -> None:
    for package in (ours, theirs):
        registry = _registry(package)
        found = registry.from_descriptor_list(["stream.gzip", "stream.xor@tests/3"])
        assert [type(extension) for extension in found] == [Gzip, Xor]
        (zstd,) = registry.from_descriptor_list(["stream.zstd/1.2"])
        assert isinstance(zstd, package.ZStandard)
        for descriptor in ("nobody/1", "stream.zstd/2", "stream.zstd"):
            with pytest.raises(ValueError, match=r"nobody|version"):
                registry.from_descriptor_list([descriptor])
    with pytest.raises(UnknownExtensionError, match=r"nobody.*ExtensionRegistry\.register"):
        _registry(ours).from_descriptor_list(["nobody"])


def test_failing_extension_names_the_entry(tmp_path: Path) -> None:
    _save(torch_dcp, tmp_path, CHAINS["gzip"])  # which has no index with checksums
    checkpoint = shardpoint.open(tmp_path)
    for file in tmp_path.glob("*.distcp"):
        file.write_bytes(file.read_bytes().replace(b"\x1f\x8b", b"PK"))
    assert checkpoint.keys()
    with pytest.raises(CheckpointException, match=r"CorruptionError.*config.*distcp.*BadGzipFile"):
        _load(dcp, tmp_path, _registry(ours))


class _Endless(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return len(buffer)


def test_extension_that_never_ends_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _save(dcp, tmp_path, CHAINS["xor"])
    monkeypatch.setattr(Xor, "transform_from", lambda self, input: io.BufferedReader(_Endless()))
    with pytest.raises(CheckpointException, match=r"LimitExceededError.*xor@tests gives more"):
        _load(dcp, tmp_path, _registry(ours))


def test_failing_extension_leaves_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, data: Any) -> int:
        raise OSError("no more ink")

    monkeypatch.setattr(_XorOut, "write", fail)
    with pytest.raises(CheckpointException, match="no more ink"):
        _save(dcp, tmp_path, [Xor()])
    assert not list(tmp_path.iterdir())


def test_what_is_no_extension_is_refused() -> None:
    for wrong in (Xor, object(), "stream.zstd"):
        with pytest.raises(PlanError, match="StreamTransformExtension"):
            dcp.FileSystemWriter("nowhere", _extensions=[wrong])


class Xored:
    """A reader's own transform, without torch: any object with a name and `undo`."""

    name = "stream.xor@tests"

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        return MemoryRecord(read_at(stored, 0, stored.size).translate(_XOR))


def test_open_takes_a_programs_own_transforms(tmp_path: Path) -> None:
    _save(dcp, tmp_path, CHAINS["xor"])
    checkpoint = shardpoint.open(tmp_path, transforms=[Xored()])
    assert checkpoint["scalar"] == 2.5
    assert checkpoint.verify().ok
    for wrong in (Xored, [object()], "stream.zstd"):
        with pytest.raises(TypeError, match="transform"):
            shardpoint.open(tmp_path, transforms=wrong)  # type: ignore[arg-type]


def test_streams_of_ours_serve_torchs_interface() -> None:
    """As torch's writer and reader call them: in pieces, closed to the end, read anywhere."""
    data = bytes(range(256)) * 500
    for extension in (ours.ZStandard(), ours.ShuffleZstd(), ours.AesGcm(KEY)):
        output = _Kept()
        stream = extension.transform_to(cast("IO[bytes]", output))
        for start in range(0, len(data), 1000):
            stream.write(data[start : start + 1000])
        stream.close()
        assert output.closings == 1
        assert extension.transform_from(io.BytesIO(output.getvalue())).read() == data
    source = extension.transform_from(io.BytesIO(output.getvalue()))
    assert source.seekable()
    source.seek(-100, io.SEEK_END)
    assert source.read() == data[-100:]


class _Kept(io.BytesIO):
    closings = 0

    def close(self) -> None:
        self.closings += 1


def _chunks(path: Path) -> Iterator[Any]:
    checkpoint = shardpoint.open(path)
    for key in checkpoint:
        yield from getattr(checkpoint.info(key), "chunks", ())


def test_compression_of_weights_pays(tmp_path: Path) -> None:
    _save(dcp, tmp_path, [ours.ShuffleZstd()])
    (chunk,) = [chunk for chunk in _chunks(tmp_path) if chunk.record_length > 100_000]
    assert chunk.record_length < 0.75 * _state()["w"].nbytes


def test_key_of_a_file_opens_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, key = tmp_path / "checkpoint", tmp_path / "key"
    _save(dcp, place, CHAINS["encrypted shuffled"])
    assert cli(["verify", str(place), "--json"]) == 1
    for content in (KEY, KEY.hex().encode() + b"\n"):
        key.write_bytes(content)
        assert cli(["verify", str(place), "--json", "--key-file", str(key)]) == 0
    assert cli(["info", str(place), "w", "--json", "--key-file", str(key)]) == 0
    assert "stream.aes-gcm@shardpoint/1" in capsys.readouterr().out
    key.write_bytes(b"short")
    assert cli(["verify", str(place), "--json", "--key-file", str(key)]) == 2
    assert "16, 24 or 32 bytes" in capsys.readouterr().err


def test_extensions_can_be_sent_to_another_process() -> None:
    """As an asynchronous save in a process of its own does."""
    data = bytes(range(256)) * 100
    for extension in (ours.AesGcm(KEY, key_id="one"), ours.ShuffleZstd(level=3)):
        copied = pickle.loads(pickle.dumps(extension))
        output = _Kept()
        stream = copied.transform_to(cast("IO[bytes]", output))
        stream.write(data)
        stream.close()
        assert extension.transform_from(io.BytesIO(output.getvalue())).read() == data
        assert copied.get_descriptor() == extension.get_descriptor()


class _Meeting:
    """A record whose readers go on when two of them are there."""

    def __init__(self, record: RecordBytes, barrier: threading.Barrier) -> None:
        self._record = record
        self._barrier = barrier
        self.size = record.size

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> None:
        if sum(map(len, buffers)) > 100_000:  # not a header
            self._barrier.wait(timeout=30)
        self._record.read_into(offset, buffers)


class _MeetingShuffle(ShuffleZstd):
    barrier = threading.Barrier(2)

    def undo(
        self, stored: RecordBytes, version: str, *, most: int, origin: Origin, tally: Tally | None
    ) -> RecordBytes:
        record = super().undo(stored, version, most=most, origin=origin, tally=tally)
        return _Meeting(record, self.barrier) if origin.key == "w" else record


def test_a_large_chunk_is_decoded_by_several_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (chunk_reading, part_reading):
        monkeypatch.setattr(module, "PIECE", 210_000)  # four pieces of "w"
    _save(dcp, tmp_path, CHAINS["shuffled"])
    box = (slice(0, 700), slice(0, 600))
    wanted, decoded = _tensor_bytes_decoded(tmp_path, box, [_MeetingShuffle()])
    assert decoded < 1.5 * wanted


def test_no_checksum_tells_what_is_encrypted(tmp_path: Path) -> None:
    """The CRC-32 of a number of four bytes is as good as the number."""
    _save(dcp, tmp_path, CHAINS["encrypted"])
    secrets = [
        value.t().contiguous().view(torch.uint8).numpy().tobytes()
        if key == "transposed"
        else value.reshape(-1).view(torch.uint8).numpy().tobytes()
        for key, value in _state().items()
        if isinstance(value, torch.Tensor) and value.numel()
    ]
    checksums = [crc32(secret[: BLOCK_BYTES * n or None]) for secret in secrets for n in (0, 1)]
    plain = [file.read_bytes() for file in tmp_path.iterdir()]
    assert len(plain) == 3  # data, metadata, index
    for checksum in checksums:
        assert not any(checksum.to_bytes(4, "little") in content for content in plain)
    _save(dcp, tmp_path / "open", [])
    (index,) = (tmp_path / "open").glob("*.index")
    assert all(c.to_bytes(4, "little") in index.read_bytes() for c in checksums)
