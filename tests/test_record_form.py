"""Records finished together have the bytes and checksums of records finished one by one."""

from __future__ import annotations

import random
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.dtypes import BY_NAME
from shardpoint.formats.record_form import RecordForm, finish_records
from shardpoint.formats.torch_record import TensorRecordLayout, object_form, object_record

_EDGES = [0, 1, 9, 10, 999, 1000, 999_999, 1_000_000, 999_999_999, 1_000_000_000, 0xFFFFFFFF]


def _forms() -> list[RecordForm]:
    shapes: list[tuple[int, ...]] = [(), (0,), (1,), (3,), (16,), (17,), (100,), (5, 7), (2, 3, 4)]
    forms = [TensorRecordLayout(BY_NAME["float32"], shape).form for shape in shapes]
    forms.append(TensorRecordLayout(BY_NAME["float8_e4m3fn"], (3, 5), (1, 3)).form)
    for length in (5, 12, 60, 61, 125, 4096):
        form = object_form(length)
        assert form is not None
        forms.append(form)
    return forms


def _check(forms: list[RecordForm], payloads: list[bytes], crcs: list[int]) -> None:
    parts = [
        form.head + payload + form.template for form, payload in zip(forms, payloads, strict=True)
    ]
    data = np.frombuffer(bytearray(b"".join(parts)), np.uint8)
    ends = np.cumsum([len(part) for part in parts])
    found = finish_records(forms, np.array(crcs, np.uint32), data, ends)
    for form, payload, crc, end, checksum in zip(
        forms, payloads, crcs, ends.tolist(), found.tolist(), strict=True
    ):
        wanted = form.head + payload + form.tail(crc)
        assert data[end - form.length : end].tobytes() == wanted
        assert checksum == zlib.crc32(wanted)


@given(rows=st.lists(st.integers(0, 15), min_size=1, max_size=30), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_many_records_are_finished_as_each_alone(rows: list[int], seed: int) -> None:
    known = _forms()
    generator = random.Random(seed)
    forms = [known[row] for row in rows]
    payloads = [generator.randbytes(form.payload_length) for form in forms]
    _check(forms, payloads, [zlib.crc32(payload) for payload in payloads])


@pytest.mark.parametrize("crc", _EDGES)
def test_every_digit_of_a_checksum_counts(crc: int) -> None:
    """Payloads whose CRC-32 is a chosen one: four bytes are enough to reach any."""
    form = TensorRecordLayout(BY_NAME["float32"], (1,)).form
    register = crc ^ 0xFFFFFFFF
    for _ in range(32):  # run the CRC's shift register backwards over four zero bytes
        high = register >> 31
        register = ((register ^ (0xEDB88320 if high else 0)) << 1 | high) & 0xFFFFFFFF
    payload = (register ^ 0xFFFFFFFF).to_bytes(4, "little")
    assert zlib.crc32(payload) == crc
    _check([form], [payload], [crc])


@pytest.mark.parametrize("length", [1, 12, 63, 64, 65, 4096, 4097])
def test_objects_have_a_form_up_to_a_length(length: int) -> None:
    pickle = bytes(range(256)) * 20
    pickle = pickle[:length]
    form = object_form(length)
    if length > 4096:
        assert form is None
        return
    assert form is not None
    assert form.head + pickle + form.tail(zlib.crc32(pickle)) == object_record(pickle)
    assert object_form(0) is None
