"""Records found by comparison: the same answers as the full parser, and never an error less."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from shardpoint.dtypes import BY_NAME
from shardpoint.errors import ShardpointError
from shardpoint.formats import _known_records, torch_record
from shardpoint.formats._known_records import Template, known_object_pickle
from shardpoint.formats.torch_record import (
    TensorRecordLayout,
    object_record,
    read_object_pickle,
    tensor_payload_from_bytes,
)


@pytest.fixture(autouse=True)
def _forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known_records, "_known_tensors", {})


def _outcome(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ShardpointError as error:
        return type(error), str(error)


def _pickle_of(record: bytes) -> bytes:
    return read_object_pickle(record, file="f", key="k")[0]


def _tensor_record(shape: tuple[int, ...] = (3, 5), crc: int = 7) -> bytes:
    layout = TensorRecordLayout(BY_NAME["float32"], shape)
    return layout.head + bytes(layout.payload_length) + layout.tail(crc)


def _flipped(record: bytes) -> list[bytes]:
    """Return copies with one bit changed, at every byte."""
    return [
        record[:at] + bytes([record[at] ^ (1 << at % 8)]) + record[at + 1 :]
        for at in range(len(record))
    ]


def test_template_gives_fields_and_refuses_other_constants() -> None:
    template = Template.of(b"abXXcdYe", [(6, 1), (2, 2)])
    assert template.match(b"ab12cd3e") == (b"12", b"3")
    assert template.match(b"ab12cx3e") is None


def test_template_takes_fields_at_both_ends() -> None:
    assert Template.of(b"XabY", [(0, 1), (3, 1)]).match(b"1ab2") == (b"1", b"2")


@pytest.mark.parametrize("value", [None, True, 3, 2.5, "text" * 9, [1, {"a": 2}]])
def test_framed_object_record_is_the_one_that_was_built(
    value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pickle.dumps(value, protocol=2)
    framed = object_record(data)
    monkeypatch.setattr("shardpoint.formats._object_layout._MOST_FRAMED", 0)
    assert object_record(data) == framed
    assert known_object_pickle(memoryview(framed)) == data


def test_object_records_of_torch_are_known() -> None:
    torch = pytest.importorskip("torch")
    stream = io.BytesIO()
    torch.save({"lr": 0.1, "betas": (0.9, 0.999)}, stream)
    record = stream.getvalue()
    assert known_object_pickle(memoryview(record)) == _pickle_of(record)


def test_object_record_with_a_storage_is_left_to_the_parser() -> None:
    data = pickle.dumps("x", protocol=2)
    assert known_object_pickle(memoryview(object_record(data, [b"bytes"]))) is None


def test_known_object_record_has_no_storages() -> None:
    record = object_record(pickle.dumps(1, protocol=2))
    _, load_storage = read_object_pickle(record, file="f", key="k")
    with pytest.raises(ShardpointError, match=r"no member 'data/0'"):
        load_storage(None, "0", "cpu", 4)


def test_damaged_object_records_read_as_without_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    records = _flipped(object_record(pickle.dumps(2.5, protocol=2)))
    found = [_outcome(lambda r=record: _pickle_of(r)) for record in records]
    monkeypatch.setattr(torch_record, "known_object_pickle", lambda record: None)
    assert found == [_outcome(lambda r=record: _pickle_of(r)) for record in records]
    assert any(isinstance(outcome, tuple) for outcome in found)


@pytest.mark.parametrize("length", [0, 1, 100, 700])
def test_cut_object_records_are_not_known(length: int) -> None:
    record = object_record(pickle.dumps(2.5, protocol=2))
    assert known_object_pickle(memoryview(record)[:length]) is None


def test_second_tensor_of_a_form_is_known_and_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    second = _tensor_record(crc=8)
    parsed = tensor_payload_from_bytes(second, 4096, file="f", key="k")
    monkeypatch.setattr(_known_records, "_known_tensors", {})
    tensor_payload_from_bytes(_tensor_record(crc=7), file="f", key="k")
    known = tensor_payload_from_bytes(second, 4096, file="f", key="k")
    assert known == parsed
    assert known.checksum == 8
    assert known.payload_offset > 4096


def test_known_tensor_is_answered_without_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor_payload_from_bytes(_tensor_record(), file="f", key="k")

    def refuse(*arguments: object, **keywords: object) -> None:
        raise AssertionError("parsed in full")

    monkeypatch.setattr(torch_record, "Members", refuse)
    assert tensor_payload_from_bytes(_tensor_record(crc=9), file="f", key="k").checksum == 9


def test_tensor_records_of_torch_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    records = []
    for fill in (1.0, 2.0):
        stream = io.BytesIO()
        torch.save(torch.full((4, 6), fill), stream)
        records.append(stream.getvalue())
    expected = tensor_payload_from_bytes(records[1], file="f", key="k")
    monkeypatch.setattr(_known_records, "_known_tensors", {})
    tensor_payload_from_bytes(records[0], file="f", key="k")
    monkeypatch.setattr(torch_record, "Members", None)
    assert tensor_payload_from_bytes(records[1], file="f", key="k") == expected


def test_damaged_tensor_records_read_as_without_the_comparison(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def read(record: bytes) -> Any:
        return _outcome(lambda: tensor_payload_from_bytes(record, file="f", key="k"))

    read(_tensor_record())
    records = _flipped(_tensor_record())
    found = [read(record) for record in records]
    monkeypatch.setattr(torch_record, "find_known_payload", lambda *arguments: None)
    assert found == [read(record) for record in records]
    assert any(isinstance(outcome, tuple) for outcome in found)


def test_remembered_forms_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_known_records, "_MOST_LENGTHS", 5)
    for size in range(1, 2000, 50):
        tensor_payload_from_bytes(_tensor_record((size,)), file="f", key="k")
        assert len(_known_records._known_tensors) <= 5


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, float("inf"), 0, 7, 255, 256, -1, True, None])
def test_numbers_come_back_through_the_torch_face(value: Any) -> None:
    pytest.importorskip("torch")
    from shardpoint.dcp._objects import read_object, write_object

    found = read_object(write_object(value), key="k", allowed={})
    assert type(found) is type(value)
    assert repr(found) == repr(value)
