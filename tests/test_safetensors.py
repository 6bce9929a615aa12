"""Headers of safetensors files."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load as safetensors_load
from safetensors.numpy import save as safetensors_save

from fixture_support import PUBLIC, public_fixtures
from shardpoint.dtypes import BY_NAME, BY_SAFETENSORS_NAME
from shardpoint.errors import (
    CorruptionError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    ShardpointError,
)
from shardpoint.formats.safetensors import (
    MAX_HEADER_BYTES,
    SafetensorsHeader,
    encode_header,
    read_header,
)


def read(image: bytes, *, offset: int = 0) -> SafetensorsHeader:
    def read_at(start: int, length: int) -> bytes:
        return image[start : start + length]

    return read_header(read_at, len(image), offset=offset, file="a.safetensors")


def image_of(header: Any, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


@pytest.mark.parametrize("path", sorted(PUBLIC.glob("*/hf_*/ckpt/**/*.safetensors")), ids=str)
def test_reads_what_torch_and_safetensors_wrote(path: Path) -> None:
    image = path.read_bytes()
    header = read(image)
    folder = path
    while folder.name != "ckpt":
        folder = folder.parent
    described = json.loads((folder.parent / "expected.json").read_text("utf-8"))
    expected = described["safetensors_files"][path.relative_to(folder).as_posix()]
    assert header.data_start == expected["header_bytes"]
    wanted = dict(expected["header"])
    assert header.metadata == wanted.pop("__metadata__", {})
    assert list(header.tensors) == list(wanted)
    for name, tensor in header.tensors.items():
        assert tensor.dtype.safetensors_name == wanted[name]["dtype"]
        assert list(tensor.shape) == wanted[name]["shape"]
        relative = [tensor.start - header.data_start, tensor.end - header.data_start]
        assert relative == wanted[name]["data_offsets"]


def test_reads_every_expected_file() -> None:
    for fixture in public_fixtures():
        image = (fixture.directory / "expected.safetensors").read_bytes()
        assert read(image).tensors.keys() == set(fixture.expected["tensors"])


def test_header_that_is_written_reads_back_and_the_package_reads_it() -> None:
    arrays = {
        "ä.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
        "none": np.zeros((0, 4), np.int64),
        "scalar": np.array(7, np.uint16),
    }
    tensors = [(name, BY_NAME[array.dtype.name], array.shape) for name, array in arrays.items()]
    header, spans = encode_header(tensors, metadata={"format": "pt", "note": '\n"'})
    assert len(header) % 8 == 0
    image = header + b"".join(array.tobytes() for array in arrays.values())
    found = read(image)
    assert found.metadata == {"format": "pt", "note": '\n"'}
    for name, dtype, shape in tensors:
        tensor = found.tensors[name]
        assert (tensor.dtype, tensor.shape, (tensor.start, tensor.end)) == (
            dtype,
            shape,
            spans[name],
        )
    for name, array in safetensors_load(image).items():
        assert np.array_equal(array, arrays[name])


def test_image_inside_a_file_is_read_at_its_offset() -> None:
    image = safetensors_save({"a": np.arange(3.0)})
    found = read(b"before it" + image, offset=9)
    tensor = found.tensors["a"]
    assert (b"before it" + image)[tensor.start : tensor.end] == np.arange(3.0).tobytes()


@pytest.mark.parametrize("name", BY_SAFETENSORS_NAME)
def test_every_dtype_of_the_format(name: str) -> None:
    dtype = BY_SAFETENSORS_NAME[name]
    header, _ = encode_header([("x", dtype, (3,))])
    assert read(header + bytes(3 * dtype.itemsize)).tensors["x"].dtype is dtype


def test_dtype_without_a_name_cannot_be_written() -> None:
    with pytest.raises(NotSupportedError, match=r"'x'.*complex128"):
        encode_header([("x", BY_NAME["complex128"], (3,))])


@pytest.mark.parametrize("name", ["__metadata__", "twice"])
def test_names_that_cannot_be_written(name: str) -> None:
    tensor = ("twice", BY_NAME["int8"], (1,))
    with pytest.raises(FormatError, match=name):
        encode_header([tensor, (name, BY_NAME["int8"], (1,))])


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        (b"", CorruptionError, "0 bytes are too few"),
        (b"1234567", CorruptionError, "7 bytes are too few"),
        (struct.pack("<Q", 1 << 62) + b"{}", CorruptionError, "2 are left"),
        (image_of(b""), FormatError, "begins with"),
        (image_of(b"[1]"), FormatError, "begins with"),
        (image_of(b" {}"), FormatError, "begins with"),
        (image_of(b"{"), FormatError, "not JSON"),
        (image_of(b'{"a":\xff}'), FormatError, "not JSON"),
        (image_of(b'{"a":' + b"[" * 100_000), FormatError, "not JSON"),
        (image_of(b'{"a":' + b"9" * 10_000 + b"}"), FormatError, "not JSON"),
        (image_of(b'{"a":NaN}'), FormatError, "not JSON"),
        (image_of(b'{"a":1,"a":2}'), FormatError, "'a' occurs twice"),
        (image_of({"__metadata__": {"a": 1}}), FormatError, "__metadata__"),
        (image_of({"__metadata__": "x"}), FormatError, "__metadata__"),
        (image_of({"a": 3}), FormatError, "'a'.*fields"),
        (image_of({"a": {"dtype": "F32"}}), FormatError, "'a'.*fields"),
        (image_of({"a": {**entry(), "more": 1}}, bytes(8)), FormatError, "'a'.*fields"),
        (image_of({"a": entry(shape=[-2])}, bytes(8)), FormatError, "'a'.*shape"),
        (image_of({"a": entry(shape=[True])}, bytes(8)), FormatError, "'a'.*shape"),
        (image_of({"a": entry(shape=[2.0])}, bytes(8)), FormatError, "'a'.*shape"),
        (image_of({"a": entry(shape="2")}, bytes(8)), FormatError, "'a'.*shape"),
        (image_of({"a": entry(shape=[1 << 63])}, bytes(8)), FormatError, "'a'.*shape"),
        (image_of({"a": entry(shape=[1 << 60] * 3)}, bytes(8)), FormatError, "'a'.*takes"),
        (image_of({"a": entry(shape=[3])}, bytes(8)), FormatError, "'a'.*takes 12 bytes"),
        (image_of({"a": entry(data_offsets=[8, 0])}, bytes(8)), FormatError, "'a'"),
        (image_of({"a": entry(data_offsets=[0])}, bytes(8)), FormatError, "'a'.*data_offsets"),
        (image_of({"a": entry(data_offsets=[-8, 0])}, bytes(8)), FormatError, "'a'"),
        (image_of({"a": entry(dtype="F31")}, bytes(8)), NotSupportedError, "'a'.*F31"),
        (image_of({"a": entry(dtype=["F32"])}, bytes(8)), NotSupportedError, "'a'"),
        (image_of({"a": entry()}, bytes(7)), CorruptionError, "'a'.*file at"),
        (image_of({"a": entry()}, bytes(9)), FormatError, "data end at"),
        (image_of({"a": entry(data_offsets=[8, 16])}, bytes(16)), FormatError, "'a'.*hole"),
        (image_of({"a": entry(), "b": entry()}, bytes(8)), FormatError, "overlap"),
    ],
)
def test_damaged_header_is_refused(image: bytes, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        read(image)
    assert "a.safetensors" in str(caught.value)


def test_header_past_the_limit_is_refused_before_it_is_read() -> None:
    asked = []

    def read_at(offset: int, length: int) -> bytes:
        asked.append(length)
        return struct.pack("<Q", MAX_HEADER_BYTES + 1)

    with pytest.raises(LimitExceededError):
        read_header(read_at, 1 << 40, file="a.safetensors")
    assert asked == [8]


SAMPLE = safetensors_save({"a": np.arange(3.0), "b": np.ones((2, 2), np.int8)}, {"k": "v"})


@given(st.data())
def test_changed_bytes_give_a_header_or_an_error_of_ours(data: st.DataObject) -> None:
    image = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(0, len(image) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(image), data.draw(st.integers(0, len(image)))]))
    try:
        header = read(bytes(image[:cut]))
    except ShardpointError:
        return
    assert all(0 <= t.start <= t.end <= cut for t in header.tensors.values())


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.fixed_dictionaries(
        {
            "dtype": JSON_VALUES | st.sampled_from(sorted(BY_SAFETENSORS_NAME)),
            "shape": JSON_VALUES | st.lists(st.integers(-1, 1 << 65), max_size=3),
            "data_offsets": JSON_VALUES | st.lists(st.integers(-1, 1 << 65), max_size=3),
        }
    )
    | JSON_VALUES
)
def test_any_json_is_a_header_or_an_error_of_ours(content: Any) -> None:
    with contextlib.suppress(ShardpointError):
        read(image_of({"a": content}))
