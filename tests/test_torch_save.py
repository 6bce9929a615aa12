"""Whole files that torch.save wrote."""

from __future__ import annotations

import io
import struct
import zipfile
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fixture_support import (
    Fixture,
    assert_same_array,
    assert_same_object,
    public_fixtures,
)
from fixture_support import decode_object as expected_object
from shardpoint.errors import (
    CorruptionError,
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    ShardpointError,
)
from shardpoint.formats import _legacy_save
from shardpoint.formats.checksum import crc32
from shardpoint.formats.torch_save import read_torch_save
from shardpoint.index import CONJUGATE, NEGATIVE, NO_FILE, UNKNOWN, CheckpointIndex, Container
from shardpoint.storage import LocalStorage

FIXTURES = [f for f in public_fixtures() if f.expected["format"] == "torch"]
PLACES = [(f, path) for f in FIXTURES for path in f.places]


def tensor_from(index: CheckpointIndex, key: str, data: bytes) -> np.ndarray[Any, Any]:
    """Return a tensor from the one chunk that the index gives."""
    row = list(index.tensors.keys).index(key)
    (chunk,) = range(index.tensors.first_chunk[row], index.tensors.first_chunk[row + 1])
    chunks, dtype = index.chunks, index.tensors.dtype_of(row).numpy
    shape = index.tensors.shape_of(row)
    assert chunks.container[chunk] == Container.RAW
    assert chunks.payloads is not None
    start, length = int(chunks.payloads.offset[chunk]), int(chunks.payloads.length[chunk])
    raw = data[start : start + length]
    assert len(raw) == length
    if chunks.payloads.checksum[chunk] != UNKNOWN:
        assert chunks.payloads.checksum[chunk] == crc32(raw)
    if not raw:
        return np.empty(shape, dtype)
    strides = chunks.payloads.strides[chunk, : len(shape)] * dtype.itemsize
    array = np.ndarray(shape, dtype, raw, 0, tuple(strides.tolist()))
    if chunks.payloads.flags[chunk] & CONJUGATE:
        array = np.conjugate(array)
    return -array if chunks.payloads.flags[chunk] & NEGATIVE else array


@pytest.mark.parametrize(("fixture", "path"), PLACES, ids=lambda value: getattr(value, "name", ""))
def test_files_of_every_release(fixture: Fixture, path: Path) -> None:
    index = read_torch_save(LocalStorage(path.parent), path.name)
    assert index.source == "torch"
    assert set(index.key_order) == fixture.keys
    assert index.paths == fixture.paths
    data = path.read_bytes()
    for key, expected in fixture.tensors.items():
        assert_same_array(np.asarray(tensor_from(index, key, data)), expected, key)
    for key, form in fixture.objects.items():
        assert_same_object(index.objects.values[key], expected_object(form), key)
    assert (index.objects.file == NO_FILE).all()
    assert index.chunks.payloads is not None
    known = index.chunks.payloads.checksum != UNKNOWN
    assert known.any() == (path.name == "full.pt")


torch = pytest.importorskip("torch")


def save(folder: Path, value: Any, *, legacy: bool) -> CheckpointIndex:
    torch.save(value, folder / "x.pt", _use_new_zipfile_serialization=not legacy)
    return read_torch_save(LocalStorage(folder), "x.pt")


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_views_of_all_kinds(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    state = {
        "whole": base,
        "part": base[1:3, 2:5],
        "transposed": base.t(),
        "expanded": torch.ones(2, 1).expand(2, 5),
        "conj": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "neg": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "scalar": torch.tensor(5, dtype=torch.uint16),
        "empty": torch.empty(3, 0),
        "float8": torch.ones(3).to(torch.float8_e5m2),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    index = save(tmp_path, state, legacy=legacy)
    data = (tmp_path / "x.pt").read_bytes()
    assert list(index.key_order) == list(state)
    for key, tensor in state.items():
        found = tensor_from(index, key, data)
        assert found.shape == tuple(tensor.shape)
        wanted = tensor.detach().resolve_conj().resolve_neg()
        if key == "float8":
            found, wanted = found.astype(np.float32), wanted.float()
        assert np.array_equal(found, wanted.numpy()), key
    assert index.tensors.requires_grad.tolist() == [key == "parameter" for key in state]


def test_tensors_inside_values_are_read_with_them(tmp_path: Path, legacy: bool) -> None:
    tensor = torch.arange(3)
    state = {
        "pair": (tensor, {"deep": [torch.ones(2)]}),
        "alone": tensor,
        "queue": deque([torch.zeros(1)]),
        "after": torch.full((2,), 9),
    }
    index = save(tmp_path, state, legacy=legacy)
    assert list(index.tensors.keys) == ["alone", "after"]
    assert list(index.key_order) == list(state)
    first, inner = index.objects.values["pair"]
    assert_same_array(first, np.arange(3))
    assert first.flags.writeable
    assert_same_array(inner["deep"][0], np.ones(2, np.float32))
    assert_same_array(index.objects.values["queue"][0], np.zeros(1, np.float32))
    data = (tmp_path / "x.pt").read_bytes()
    assert tensor_from(index, "alone", data).tolist() == [0, 1, 2]
    assert tensor_from(index, "after", data).tolist() == [9, 9]


@pytest.mark.parametrize("value", [3, [1, "a"], (1, 2), OrderedDict(a=1), {}, []])
def test_roots_of_all_kinds(tmp_path: Path, legacy: bool, value: Any) -> None:
    index = save(tmp_path, value, legacy=legacy)
    expected = {"a": 1} if isinstance(value, dict) and value else {"": value}
    if isinstance(value, list):
        expected = {str(position): item for position, item in enumerate(value)}
    assert index.objects.values == ({} if value == {} else expected)


def test_tensor_as_root(tmp_path: Path, legacy: bool) -> None:
    index = save(tmp_path, torch.arange(4), legacy=legacy)
    data = (tmp_path / "x.pt").read_bytes()
    assert tensor_from(index, "", data).tolist() == [0, 1, 2, 3]


def test_large_pickle_of_the_old_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pickle's end is not known before it is read: more is read until it is whole."""
    monkeypatch.setattr(_legacy_save, "_FIRST_TRY", 64)
    state = {f"key {i}": i for i in range(2000)} | {"t": torch.arange(5)}
    index = save(tmp_path, state, legacy=True)
    assert index.objects.values["key 1999"] == 1999
    data = (tmp_path / "x.pt").read_bytes()
    assert tensor_from(index, "t", data).tolist() == [0, 1, 2, 3, 4]


def test_whole_module_is_refused_with_its_class(tmp_path: Path, legacy: bool) -> None:
    with pytest.raises(ForbiddenContentError, match=r"x\.pt.*torch\.nn\.modules\.linear\.Linear"):
        save(tmp_path, torch.nn.Linear(2, 2), legacy=legacy)


class Config:
    """A class that a user might have saved."""

    def __init__(self) -> None:
        self.rate = 0.5
        self.weights = torch.ones(2)


def test_allowed_class_is_made(tmp_path: Path, legacy: bool) -> None:
    name = f"{Config.__module__}.Config"
    torch.save({"c": Config()}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
    storage = LocalStorage(tmp_path)
    with pytest.raises(ForbiddenContentError) as caught:
        read_torch_save(storage, "x.pt")
    assert caught.value.qualified_name == name
    index = read_torch_save(storage, "x.pt", allowed={name: Config})
    found = index.objects.values["c"]
    assert type(found) is Config
    assert found.rate == 0.5
    assert_same_array(found.weights, np.ones(2, np.float32))


def test_same_flat_key_twice(tmp_path: Path, legacy: bool) -> None:
    with pytest.raises(FormatError, match=r"'a\.b'"):
        save(tmp_path, {"a.b": 1, "a": {"b": 2}}, legacy=legacy)


def test_expanded_to_exabytes(tmp_path: Path, legacy: bool) -> None:
    with pytest.raises(LimitExceededError, match="more elements"):
        save(tmp_path, {"a": torch.ones(1).expand(1 << 50)}, legacy=legacy)
    with pytest.raises(LimitExceededError, match="more elements"):
        save(tmp_path, {"a": (torch.ones(1).expand(1 << 50),)}, legacy=legacy)


def test_torchscript_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(NotSupportedError, match="TorchScript"):
        read_torch_save(LocalStorage(tmp_path), "x.pt")


@pytest.mark.parametrize(
    "content", [b"", b"PK", b"hello, world", b"\x80", b"\x80\x02}.", bytes(99)]
)
def test_other_files(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises((FormatError, CorruptionError), match=r"x\.pt"):
        read_torch_save(LocalStorage(tmp_path), "x.pt")


def legacy_sample() -> bytes:
    stream = io.BytesIO()
    state = {"a": torch.arange(3), "b": (1, torch.ones(2))}
    torch.save(state, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def zip_sample() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": (1, torch.ones(2))}, stream)
    return stream.getvalue()


def read_bytes(folder: Path, content: bytes) -> CheckpointIndex:
    (folder / "x.pt").write_bytes(content)
    return read_torch_save(LocalStorage(folder), "x.pt")


@pytest.mark.parametrize("cut", [1, 8, 30, 40])
def test_old_format_cut_off(tmp_path: Path, cut: int) -> None:
    with pytest.raises(ShardpointError, match=r"x\.pt"):
        read_bytes(tmp_path, legacy_sample()[:-cut])


def test_old_format_with_another_storage_size(tmp_path: Path) -> None:
    sample = bytearray(legacy_sample())
    at = sample.index(struct.pack("<4q", 3, 0, 1, 2))
    sample[at] = 2
    with pytest.raises(CorruptionError, match="should have 3 elements"):
        read_bytes(tmp_path, bytes(sample))


def test_old_format_of_another_machine_or_version(tmp_path: Path) -> None:
    sample = legacy_sample()
    at = sample.index(b"\x88", sample.index(b"little_endian"))
    big = sample[:at] + b"\x89" + sample[at + 1 :]
    with pytest.raises(NotSupportedError, match="big-endian"):
        read_bytes(tmp_path, big)
    with pytest.raises(FormatError, match="protocol"):
        read_bytes(tmp_path, sample.replace(b"M\xe9\x03.", b"M\xea\x03."))
    with pytest.raises(FormatError, match="magic"):
        read_bytes(tmp_path, sample.replace(b"\x6c\xfc\x9c", b"\x6d\xfc\x9c"))


def test_damaged_storage_inside_a_value(tmp_path: Path) -> None:
    sample = zip_sample()
    ones = np.ones(2, np.float32).tobytes()
    with pytest.raises(CorruptionError, match=r"x\.pt.*CRC-32"):
        read_bytes(tmp_path, sample.replace(ones, np.full(2, 2, np.float32).tobytes()))


SAMPLES = {"zip": zip_sample(), "legacy": legacy_sample()}


@pytest.mark.parametrize("form", SAMPLES)
def test_changed_bytes_give_an_index_or_an_error_of_ours(tmp_path: Path, form: str) -> None:
    sample = SAMPLES[form]

    @given(st.data())
    def check(data: st.DataObject) -> None:
        content = bytearray(sample)
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
        try:
            index = read_bytes(tmp_path, bytes(content))
        except ShardpointError:
            return
        assert index.chunks.payloads is not None or not len(index.chunks)
        ends = index.chunks.record_offset + index.chunks.record_length
        assert (index.chunks.record_offset >= 0).all()
        assert (ends <= len(content)).all()

    check()
