"""torch.save records: read and written by byte layout."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fixture_support import (
    HOSTILE,
    Fixture,
    assert_same_array,
    assert_same_object,
    public_fixtures,
)
from fixture_support import decode_object as expected_object
from shardpoint.dtypes import BY_NAME, DType
from shardpoint.errors import (
    CorruptionError,
    ForbiddenContentError,
    FormatError,
    LimitExceededError,
    NotSupportedError,
    PlanError,
    ShardpointError,
)
from shardpoint.formats.checksum import crc32
from shardpoint.formats.object_decoder import NumpyFactory, TensorSize, decode_object
from shardpoint.formats.torch_record import (
    SMALL_RECORD_BYTES,
    TensorPayload,
    TensorRecordLayout,
    object_record,
    parse_record,
    read_object_pickle,
    read_tensor_payload,
    tensor_payload_from_bytes,
)
from shardpoint.index import CONJUGATE, NEGATIVE

torch = pytest.importorskip("torch")

DCP_FIXTURES = [f for f in public_fixtures() if f.expected["format"] == "fs"]
PLAIN_FIXTURES = [f for f in DCP_FIXTURES if not f.case.startswith("zstd")]


class Counted:
    """Reads pieces of bytes, and counts."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.reads: list[int] = []

    def __call__(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= len(self.data), "reads outside the file"
        self.reads.append(length)
        return self.data[offset : offset + length]


def value_of(payload: TensorPayload, data: bytes) -> np.ndarray[Any, Any]:
    """Return the tensor that a payload describes."""
    dtype = payload.dtype.numpy
    raw = data[payload.payload_offset : payload.payload_offset + payload.payload_length]
    steps = tuple(stride * dtype.itemsize for stride in payload.strides)
    array = (
        np.ndarray(payload.shape, dtype, raw, 0, steps) if raw else np.empty(payload.shape, dtype)
    )
    if payload.flags & CONJUGATE:
        array = np.conjugate(array)
    return -array if payload.flags & NEGATIVE else array


def record_of(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


@pytest.mark.parametrize("fixture", PLAIN_FIXTURES, ids=str)
def test_every_tensor_record_of_every_release(fixture: Fixture) -> None:
    for key, entry in fixture.expected["tensors"].items():
        for chunk in entry["chunks"]:
            place = chunk["storage"]
            data = (fixture.checkpoint / place["relative_path"]).read_bytes()
            read_at = Counted(data)
            payload = read_tensor_payload(
                read_at, place["offset"], place["length"], file=place["relative_path"], key=key
            )
            assert len(read_at.reads) <= 3
            assert sum(read_at.reads) <= SMALL_RECORD_BYTES
            assert payload.dtype.name == entry["dtype"]
            assert payload.shape == tuple(chunk["sizes"])
            box = tuple(
                slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True)
            )
            # [()] gives a scalar for 0-d; asarray makes it an array again
            assert_same_array(
                np.asarray(value_of(payload, data)),
                np.asarray(fixture.tensors[key][box]),
                (key, chunk),
            )
            raw = data[payload.payload_offset :][: payload.payload_length]
            if fixture.case.startswith("crc_off"):
                assert payload.checksum is None
            else:
                assert payload.checksum == crc32(raw)


@pytest.mark.parametrize("fixture", PLAIN_FIXTURES, ids=str)
def test_every_object_record_of_every_release(fixture: Fixture) -> None:
    for key, entry in fixture.expected["objects"].items():
        place = entry["storage"]
        data = (fixture.checkpoint / place["relative_path"]).read_bytes()
        record = data[place["offset"] :][: place["length"]]
        content, load_storage = read_object_pickle(record, file=place["relative_path"], key=key)
        found = decode_object(
            content, load_storage=load_storage, source=key, factory=NumpyFactory(), allowed={}
        )
        expected = expected_object(
            entry["value"],
            size=TensorSize,
            dtype=NumpyFactory().dtype,
            device=NumpyFactory().device,
        )
        assert_same_object(found, expected, key)


@pytest.mark.parametrize("fixture", PLAIN_FIXTURES, ids=str)
def test_members_are_those_that_zipfile_finds(fixture: Fixture) -> None:
    entries = [c for e in fixture.expected["tensors"].values() for c in e["chunks"]]
    for entry in [*entries, *fixture.expected["objects"].values()]:
        place = entry["storage"]
        data = (fixture.checkpoint / place["relative_path"]).read_bytes()
        offset, length = place["offset"], place["length"]
        found = parse_record(Counted(data), offset, length, file="f", key="k")
        assert found.byteorder == "little"
        with zipfile.ZipFile(io.BytesIO(data[offset : offset + length])) as archive:
            assert [f"archive/{name}" for name in found.members] == archive.namelist()
            for name, member in found.members.items():
                content = data[member.offset : member.offset + member.size]
                if fixture.case.startswith("crc_off"):
                    assert member.crc is None
                else:
                    assert content == archive.read(f"archive/{name}")
                    assert member.crc == crc32(content)


def tensor_of(dtype: DType, shape: tuple[int, ...]) -> Any:
    kind = getattr(torch, dtype.name)
    count = int(np.prod(shape)) * dtype.itemsize
    if dtype.name == "bool":
        return (torch.arange(count) % 3 == 0).reshape(shape)
    return (torch.arange(count) % 120).to(torch.uint8).view(kind).reshape(shape)


def raw_storage(tensor: Any) -> bytes:
    storage = tensor.untyped_storage()
    if not len(storage):
        return b""
    return bytes(torch.empty(0, dtype=torch.uint8).set_(storage).numpy())


def written(tensor: Any) -> bytes:
    layout = TensorRecordLayout(
        BY_NAME[str(tensor.dtype).removeprefix("torch.")],
        tuple(tensor.shape),
        tuple(tensor.stride()),
        tensor.requires_grad,
    )
    payload = raw_storage(tensor)
    assert len(payload) == layout.payload_length
    assert len(layout.head) % 64 == 0
    tail = layout.tail(crc32(payload))
    assert len(tail) == layout.tail_length
    record = layout.head + payload + tail
    assert len(record) == layout.length
    return record


def without_fingerprint(record: bytes) -> bytes:
    """Blank the 40 digits of the serialization id and its two CRC-32 fields."""
    blank = bytearray(record)
    name = b"archive/.data/serialization_id"
    header = record.index(name) - 30
    extra = int.from_bytes(record[header + 28 : header + 30], "little")
    start = header + 30 + len(name) + extra
    blank[start : start + 40] = bytes(40)
    blank[start + 44 : start + 48] = bytes(4)
    central = record.rindex(name) - 46
    blank[central + 16 : central + 20] = bytes(4)
    return bytes(blank)


TENSORS = {
    **{f"dtype {name}": lambda d=dtype: tensor_of(d, (3, 2)) for name, dtype in BY_NAME.items()},
    "0-d": lambda: torch.tensor(3.5),
    "one element": lambda: torch.ones(1),
    "empty": lambda: torch.empty(0, 3),
    "empty in the middle": lambda: torch.empty(2, 0, 4, dtype=torch.int16),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "permuted": lambda: torch.arange(24).reshape(2, 3, 4).permute(1, 2, 0),
    "channels last": lambda: torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    "eight axes": lambda: torch.ones((1, 2) * 4),
    "many axes": lambda: torch.ones((1,) * 40 + (300,)),
    "two-byte numbers": lambda: torch.ones(300, 500),
    "four-byte numbers": lambda: torch.ones(1 << 16, dtype=torch.int8),
    "requires_grad": lambda: torch.ones(2, requires_grad=True),
}


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("case", TENSORS)
def test_written_record_is_what_torch_writes_and_reads(case: str) -> None:
    tensor = TENSORS[case]()
    record = written(tensor)
    if torch.__version__ >= "2.7":
        assert without_fingerprint(record) == without_fingerprint(record_of(tensor))
    found = torch.load(io.BytesIO(record), weights_only=True)
    assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
    assert found.stride() == tensor.stride()
    assert found.requires_grad == tensor.requires_grad
    assert raw_storage(found) == raw_storage(tensor)
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        assert archive.testzip() is None
    payload = tensor_payload_from_bytes(record, file="f", key="k")
    assert payload.shape == tuple(tensor.shape)
    assert payload.strides == tuple(tensor.stride())
    assert payload.requires_grad == tensor.requires_grad
    assert payload.checksum == crc32(raw_storage(tensor))
    assert record[payload.payload_offset :][: payload.payload_length] == raw_storage(tensor)


@given(
    shape=st.lists(st.integers(0, 5), max_size=5),
    order=st.randoms(use_true_random=False),
    name=st.sampled_from(["float32", "uint16", "int8", "complex128", "float8_e5m2"]),
)
def test_written_record_reads_back_whatever_its_shape(
    shape: list[int], order: Any, name: str
) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    tensor = tensor_of(BY_NAME[name], tuple(shape)).permute(axes)
    if tensor.numel() == 0:
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
    record = written(tensor)
    assert without_fingerprint(record) == without_fingerprint(record_of(tensor))
    payload = tensor_payload_from_bytes(record, 1000, file="f", key="k")
    start = payload.payload_offset - 1000
    assert record[start : start + payload.payload_length] == raw_storage(tensor)
    assert (payload.dtype.name, payload.shape) == (name, tuple(tensor.shape))


def test_strides_are_row_major_by_default() -> None:
    shape = (2, 0, 3)
    given_strides = TensorRecordLayout(BY_NAME["int8"], shape, (3, 3, 1))
    assert TensorRecordLayout(BY_NAME["int8"], shape).head == given_strides.head


@pytest.mark.parametrize(("shape", "strides"), [((-1,), None), ((2,), (-1,)), ((2,), (1, 1))])
def test_shapes_that_cannot_be(shape: Any, strides: Any) -> None:
    with pytest.raises(PlanError, match="shape"):
        TensorRecordLayout(BY_NAME["int8"], shape, strides)


@pytest.mark.parametrize(
    ("length", "checksum", "record_length"),
    [  # lengths of torch 2.13's own records of uint8 zeros
        ((1 << 32) - 800, 0x14F3E0A2, 4294968061),
        ((1 << 32) - 2, 0x0F6A7026, 4294968905),
        ((1 << 32) - 1, 0, 4294968925),
        ((1 << 32) + 100, 0xA92A4CE5, 4294968989),
    ],
)
def test_payload_of_four_gibibytes(
    tmp_path: Path, length: int, checksum: int, record_length: int
) -> None:
    layout = TensorRecordLayout(BY_NAME["uint8"], (length,))
    assert layout.length == record_length
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write(layout.head)
        file.seek(layout.payload_length, os.SEEK_CUR)
        file.write(layout.tail(checksum))
    assert path.stat().st_size == record_length
    with zipfile.ZipFile(path) as archive:
        found = {info.filename: info for info in archive.infolist()}
        assert found["archive/data/0"].file_size == length
        assert checksum == found["archive/data/0"].CRC
        assert archive.read("archive/version") == b"3\n"
        assert len(archive.read("archive/.data/serialization_id")) == 40
    tensor = torch.load(path, weights_only=True, mmap=True)
    assert tensor.shape == (length,)
    assert int(tensor[-1]) == 0
    with path.open("rb") as file:

        def read_at(offset: int, size: int) -> bytes:
            return os.pread(file.fileno(), size, offset)

        payload = read_tensor_payload(read_at, 0, record_length, file="sparse", key="k")
    assert payload.payload_offset == len(layout.head)
    assert (payload.payload_length, payload.checksum) == (length, checksum)


@pytest.mark.parametrize("value", [1, None, "text" * 5000, [1, {"a": (2.5, True)}], b"bytes"])
def test_object_record_is_what_torch_writes_and_reads(value: Any) -> None:
    record = object_record(pickle.dumps(value, protocol=2))
    assert torch.load(io.BytesIO(record), weights_only=True) == value
    with zipfile.ZipFile(io.BytesIO(record)) as archive:
        assert archive.testzip() is None
    if torch.__version__ >= "2.7":
        assert without_fingerprint(record) == without_fingerprint(record_of(value))


def test_object_record_with_storages_is_what_torch_writes() -> None:
    value = [torch.arange(3), torch.ones(5, dtype=torch.bfloat16), torch.empty(0)]
    expected = record_of(value)
    with zipfile.ZipFile(io.BytesIO(expected)) as archive:
        content = archive.read("archive/data.pkl")
    record = object_record(content, [raw_storage(tensor) for tensor in value])
    if torch.__version__ >= "2.7":
        assert without_fingerprint(record) == without_fingerprint(expected)
    for found, tensor in zip(torch.load(io.BytesIO(record)), value, strict=True):
        assert torch.equal(found, tensor)


# What is damaged, or was made to harm.


def hostile_payload(name: str) -> TensorPayload:
    """Read the record that a hostile fixture is about, by its own metadata."""
    folder = HOSTILE / name / "ckpt"
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    described = json.loads((HOSTILE / "hostile.json").read_text("utf-8"))["fixtures"][name]
    (key,) = described["keys"]
    (place,) = [v for k, v in metadata.storage_data.items() if k.fqn == key]
    data = (folder / place.relative_path).read_bytes()

    def read_at(offset: int, length: int) -> bytes:
        assert offset >= 0
        found = data[offset : offset + length]
        if len(found) < length:
            raise CorruptionError(f"key {key!r}: the file ends at {len(data)}")
        return found

    payload = read_tensor_payload(
        read_at, place.offset, place.length, file=place.relative_path, key=key
    )
    raw = data[payload.payload_offset :][: payload.payload_length]
    if payload.checksum is not None and crc32(raw) != payload.checksum:
        raise CorruptionError(f"key {key!r}: damaged")
    return payload


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("blob_reduce", ForbiddenContentError, "posix.system"),
        ("blob_strides", FormatError, "strides"),
        ("blob_storage_short", CorruptionError, "should have"),
        ("blob_persid_path", FormatError, "no member"),
        ("blob_deflate", FormatError, "compressed"),
        ("blob_big_endian", NotSupportedError, "big-endian"),
        ("blob_zip_outside", FormatError, "data/0"),
        ("blob_duplicate_record", FormatError, "two members"),
        ("bitflip_pickle", CorruptionError, "CRC-32"),
        ("bitflip_data", CorruptionError, "damaged"),
        ("bitflip_zip", CorruptionError, "end record"),
        ("offset_beyond", CorruptionError, "ends at"),
        ("length_beyond", CorruptionError, "ends at"),
        ("negative_offset", FormatError, "offset -100"),
        ("truncated_distcp", CorruptionError, "ends at"),
    ],
)
def test_hostile_records_are_refused(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as caught:
        hostile_payload(name)
    assert any(key in str(caught.value) for key in ("'ema'", "'model.norm'"))


def test_shape_of_the_record_is_told_whatever_the_index_says() -> None:
    """Comparing the two is the engine's part."""
    expected = json.loads((HOSTILE / "_base/async_w2/expected.json").read_text("utf-8"))
    (chunk,) = expected["tensors"]["ema"]["chunks"]
    assert list(hostile_payload("blob_mismatch").shape) == chunk["sizes"][::-1] != chunk["sizes"]


def test_objects_with_code_are_refused() -> None:
    record = record_of({"a": 1})
    for content in (b"cposix\nsystem\n(X\x01\x00\x00\x00ltR.", b"\x80\x04cacme\nThing\n)\x81."):
        forged = object_record(content)
        data, load_storage = read_object_pickle(forged, file="f", key="k")
        with pytest.raises(ForbiddenContentError):
            decode_object(
                data, load_storage=load_storage, source="k", factory=NumpyFactory(), allowed={}
            )
    with pytest.raises(FormatError, match=r"'k'.*'f'.*holds"):
        tensor_payload_from_bytes(record, file="f", key="k")


def test_compressed_record_says_so() -> None:
    with pytest.raises(FormatError, match="zstd"):
        tensor_payload_from_bytes(b"\x28\xb5\x2f\xfd" + bytes(200), file="f", key="k")
    with pytest.raises(FormatError, match=r"not a torch\.save record"):
        tensor_payload_from_bytes(bytes(200), file="f", key="k")


def make_zip(members: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "empty"),
        ({"data.pkl": b""}, "folder"),
        ({"a/data.pkl": b"", "b/data/0": b""}, "folder"),
        ({"a/other": b""}, "data.pkl"),
        ({"a/data.pkl": b"", "a/byteorder": b"middle"}, "byte order"),
        ({"a/data.pkl": b"."}, "pickle"),
    ],
)
def test_zips_that_are_no_record(members: dict[str, bytes], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        tensor_payload_from_bytes(make_zip(members), file="f", key="k")


def test_zip_that_another_program_wrote_is_read() -> None:
    """No padding, no descriptors, no zip64: a record that was unpacked and packed again."""
    tensor = torch.arange(5.0)
    with zipfile.ZipFile(io.BytesIO(record_of(tensor))) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    record = make_zip(members)
    payload = tensor_payload_from_bytes(record, file="f", key="k")
    assert record[payload.payload_offset :][: payload.payload_length] == raw_storage(tensor)


def test_too_many_members_are_refused_before_they_are_read() -> None:
    record = make_zip({f"a/{i}": b"" for i in range(100)})
    with pytest.raises(LimitExceededError, match="100 members"):
        tensor_payload_from_bytes(record, file="f", key="k")


def test_view_with_more_elements_than_its_storage_is_refused() -> None:
    record = record_of(torch.ones(1).expand(1 << 40))
    with pytest.raises(LimitExceededError, match="more elements"):
        tensor_payload_from_bytes(record, file="f", key="k")


def test_part_of_a_storage_has_no_checksum() -> None:
    base = torch.arange(10)
    record = record_of(base[2:5])
    payload = tensor_payload_from_bytes(record, file="f", key="k")
    assert payload.checksum is None
    assert value_of(payload, record).tolist() == [2, 3, 4]


def test_damaged_storage_of_an_object_is_found() -> None:
    record = bytearray(record_of((torch.full((3,), 77, dtype=torch.uint8),)))
    record[record.index(b"MMM")] ^= 1
    content, load_storage = read_object_pickle(record, file="f", key="k")
    with pytest.raises(CorruptionError, match=r"'k'.*data/0.*CRC-32"):
        load_storage(None, "0", "cpu", 3)
    with pytest.raises(FormatError, match="data/9"):
        load_storage(None, "9", "cpu", 3)
    with pytest.raises(CorruptionError, match="should have 4"):
        load_storage(None, "0", "cpu", 4)
    _, unverified = read_object_pickle(record, file="f", key="k", verify=False)
    assert bytes(unverified(None, "0", "cpu", 3)) == b"LMM"
    assert content[:2] == b"\x80\x02"


SAMPLE = record_of(torch.arange(12, dtype=torch.int32).reshape(3, 4))
SAMPLE_PAYLOAD = tensor_payload_from_bytes(SAMPLE, file="f", key="k")


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_changed_bytes_give_the_tensor_or_an_error_of_ours(data: st.DataObject) -> None:
    record = bytearray(SAMPLE)
    for _ in range(data.draw(st.integers(1, 3))):
        record[data.draw(st.integers(0, len(record) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([len(record), data.draw(st.integers(0, len(record)))]))
    found = bytes(record[:cut])
    try:
        payload = tensor_payload_from_bytes(found, file="f", key="k")
    except ShardpointError:
        return
    end = payload.payload_offset + payload.payload_length
    assert 0 <= payload.payload_offset <= end <= cut
    # The pickle has a checksum, so what it says is right; where it says it lies is checked.
    assert (payload.dtype, payload.shape) == (SAMPLE_PAYLOAD.dtype, SAMPLE_PAYLOAD.shape)


def test_every_flipped_bit_is_harmless_or_found() -> None:
    """Of 8 x 1,577 bits: none gives other values, none an error that is not ours."""
    expected = SAMPLE[SAMPLE_PAYLOAD.payload_offset :][: SAMPLE_PAYLOAD.payload_length]
    record = bytearray(SAMPLE)
    for position in range(len(record)):
        for bit in range(8):
            record[position] ^= 1 << bit
            try:
                payload = tensor_payload_from_bytes(record, file="f", key="k")
                raw = bytes(record[payload.payload_offset :][: payload.payload_length])
                assert raw == expected or crc32(raw) != payload.checksum, (position, bit)
                assert payload.strides == SAMPLE_PAYLOAD.strides
            except ShardpointError:
                pass
            record[position] ^= 1 << bit


def test_directory_that_claims_to_be_huge_is_not_allocated() -> None:
    record = bytearray(SAMPLE)
    at = record.rindex(b"PK\x06\x06")
    struct.pack_into("<2Q", record, at + 24, 1 << 40, 1 << 40)
    struct.pack_into("<2Q", record, at + 40, 1 << 46, 0)
    with pytest.raises(ShardpointError):
        tensor_payload_from_bytes(record, file="f", key="k")
