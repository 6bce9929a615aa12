"""Conversions without torch."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import shardpoint
from fixture_support import (
    PUBLIC,
    Fixture,
    assert_same_array,
    assert_same_object,
    decode_object,
    public_fixtures,
)
from shardpoint.convert import to_checkpoint, to_safetensors, to_torch_save
from shardpoint.errors import CorruptionError, NotSupportedError, PlanError
from shardpoint.formats.torch_record import TensorRecordLayout
from shardpoint.formats.value_pickling import pickle_value

FIXTURES = [f for f in public_fixtures() if f.release in ("2.3.1", "2.13.0", "2.15.0")]
# torch 2.13 cannot read these, and fsspec and the local writer give the same files.
CASES = [f for f in FIXTURES if f.case not in ("fsspec_w2", "async_w2")]


def assert_holds(place: Path, fixture: Fixture) -> None:
    with shardpoint.open(place) as checkpoint:
        assert set(checkpoint.keys()) == fixture.keys
        for key, expected in fixture.tensors.items():
            assert_same_array(checkpoint[key], expected, key)
        for key, entry in fixture.expected["objects"].items():
            if "value" in entry:
                assert_same_object(_plain(checkpoint[key]), decode_object(entry["value"]), key)
        assert checkpoint.verify().ok


def _plain(value: Any) -> Any:
    """Turn the stand-ins for torch's values into what the fixtures' forms give."""
    if type(value).__name__ == "DTypeValue":
        return value.name
    if type(value).__name__ == "DeviceValue":
        return str(value)
    if type(value).__name__ == "TensorSize":
        return tuple(value)
    if isinstance(value, dict):
        return type(value)((_plain(k), _plain(v)) for k, v in value.items())
    if type(value) in (list, tuple):
        return type(value)(_plain(item) for item in value)
    return value


@pytest.mark.parametrize("fixture", CASES, ids=str)
def test_every_checkpoint_survives_both_conversions(fixture: Fixture, tmp_path: Path) -> None:
    to_torch_save(fixture.places[0], tmp_path / "new" / "state.pt")
    if fixture.planner_data_is_none or fixture.release == "2.3.1":
        with shardpoint.open(tmp_path / "new" / "state.pt") as checkpoint:
            for key, expected in fixture.tensors.items():
                if key in checkpoint:
                    assert_same_array(checkpoint[key], expected, key)
        return
    assert_holds(tmp_path / "new" / "state.pt", fixture)
    to_checkpoint(tmp_path / "new" / "state.pt", tmp_path / "ckpt")
    assert_holds(tmp_path / "ckpt", fixture)


@pytest.mark.parametrize("fixture", CASES, ids=str)
def test_chunks_stay_as_they_are(fixture: Fixture, tmp_path: Path) -> None:
    to_checkpoint(fixture.places[0], tmp_path / "ckpt")
    with shardpoint.open(fixture.places[0]) as old, shardpoint.open(tmp_path / "ckpt") as new:
        assert list(new.keys()) == list(old.keys())
        assert new.index.paths == old.index.paths
        assert np.array_equal(new.index.chunks.offsets, old.index.chunks.offsets)
        assert np.array_equal(new.index.chunks.sizes, old.index.chunks.sizes)
    assert_holds(tmp_path / "ckpt", fixture)


SOURCE = PUBLIC / "2.13.0" / "plain_w1" / "ckpt"


def test_conversion_by_url(tmp_path: Path) -> None:
    to_torch_save(f"file://{SOURCE}", "memory://test-convert/state.pt")
    to_checkpoint("memory://test-convert/state.pt", "memory://test-convert/ckpt")
    with (
        shardpoint.open(SOURCE) as old,
        shardpoint.open("memory://test-convert/ckpt") as new,
    ):
        assert list(new.keys()) == list(old.keys())
        assert new.verify().ok


def test_encrypted_checkpoint_is_converted_with_its_key(tmp_path: Path) -> None:
    dcp = pytest.importorskip("shardpoint.dcp")
    torch = pytest.importorskip("torch")
    from shardpoint.dcp.extension import AesGcm as Extension
    from shardpoint.transforms import AesGcm

    key = bytes(range(32))
    state = {"a": torch.arange(5), "step": 3}
    writer = dcp.FileSystemWriter(tmp_path / "ckpt", _extensions=[Extension(key)])
    dcp.save(state, storage_writer=writer)
    to_torch_save(tmp_path / "ckpt", tmp_path / "x.pt", transforms=[AesGcm(key)])
    with shardpoint.open(tmp_path / "x.pt") as checkpoint:
        assert checkpoint["a"].tolist() == [0, 1, 2, 3, 4]
        assert checkpoint["step"] == 3


def test_failed_conversion_keeps_what_was_there(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in SOURCE.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    data = bytearray((broken / "__0_0.distcp").read_bytes())
    index = shardpoint.open(SOURCE).index
    last = int(np.argmax(index.chunks.record_offset))
    dtype = index.tensors.dtype_of(int(index.chunks.tensor[last]))
    shape = index.tensors.shape_of(int(index.chunks.tensor[last]))
    assert 0 not in shape
    head = TensorRecordLayout(dtype, shape).head
    data[int(index.chunks.record_offset[last]) + len(head)] ^= 1
    (broken / "__0_0.distcp").write_bytes(data)
    to_torch_save(SOURCE, tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(CorruptionError):
        to_torch_save(broken, tmp_path / "state.pt")
    assert (tmp_path / "state.pt").read_bytes() == before
    to_checkpoint(SOURCE, tmp_path / "ckpt")
    names = sorted(p.name for p in (tmp_path / "ckpt").iterdir())
    with pytest.raises(CorruptionError):
        to_checkpoint(broken, tmp_path / "ckpt")
    assert sorted(p.name for p in (tmp_path / "ckpt").iterdir()) == names
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "ckpt", "state.pt"]
    to_checkpoint(SOURCE, tmp_path / "ckpt")  # replaces the one that is there
    assert len(list((tmp_path / "ckpt").iterdir())) == len(names)


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Give a function that tells the most bytes that were allocated at a time."""
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_no_more_than_the_largest_tensor_is_in_memory(tmp_path: Path) -> None:
    largest = 8 << 20
    arrays = {f"t{i}": np.full((1024, largest // 4096), i, np.float32) for i in range(8)}
    save_file(arrays, tmp_path / "model.safetensors")
    del arrays
    slack = 6 << 20  # blocks of a few threads, and everything that is small
    with peak_memory() as peak:
        to_torch_save(tmp_path / "model.safetensors", tmp_path / "state.pt")
        assert largest < peak() < largest + slack
    with peak_memory() as peak:
        to_checkpoint(tmp_path / "state.pt", tmp_path / "ckpt")
        assert largest < peak() < largest + slack
    with shardpoint.open(tmp_path / "ckpt") as checkpoint:
        assert checkpoint.read("t5", (slice(3, 4), slice(0, 2))).tolist() == [[5.0, 5.0]]


def test_shards_become_full_safetensors_files(tmp_path: Path) -> None:
    fixture = next(f for f in CASES if f.directory == PUBLIC / "2.13.0" / "hf_dist_mapped_w2")
    numbers = {key: 1 + (key == "ids") for key in fixture.keys}
    to_safetensors(fixture.checkpoint, tmp_path, file_numbers=numbers)
    to_safetensors(fixture.checkpoint, tmp_path, file_numbers=numbers)  # over what is there
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    assert load_file(tmp_path / "model-00002-of-00002.safetensors").keys() == {"ids"}
    assert_holds(tmp_path, fixture)


def test_safetensors_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="objects"):
        to_safetensors(SOURCE, tmp_path / "a")
    save_file({"a": np.ones(1), "b": np.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PlanError, match=r"'b'.*no file number(.|\n)*'c'.*not in the checkpoint"):
        to_safetensors(tmp_path / "x.safetensors", tmp_path / "a", file_numbers={"a": 1, "c": 2})
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(NotSupportedError, match="lambda"):
        pickle_value({"a": lambda: None})
