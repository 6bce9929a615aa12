"""Records with a payload that is aligned in the file: torch and our own parser read them."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from shardpoint.dtypes import BY_NAME
from shardpoint.engine.writing import FormedRecord, write_files
from shardpoint.formats.checksum import crc32
from shardpoint.formats.payload_shift import PAGE, PAGED_FROM, aligned_form
from shardpoint.formats.torch_record import TensorRecordLayout, tensor_payload_from_bytes
from shardpoint.storage import LocalStorage


@pytest.mark.parametrize("offset", [0, 1, 17, 63, 64, 1261, 40 << 30])
@pytest.mark.parametrize(
    ("dtype", "shape", "alignment"),
    [
        ("float32", (33, 5), 64),
        ("uint16", (7,), 64),
        ("bool", (), 64),
        ("uint8", (1 << 20,), PAGE),
    ],
)
def test_a_payload_is_aligned_in_its_file(
    offset: int, dtype: str, shape: tuple[int, ...], alignment: int
) -> None:
    torch = pytest.importorskip("torch")
    form = TensorRecordLayout(BY_NAME[dtype], shape).form
    moved = aligned_form(form, offset)
    assert (offset + len(moved.head)) % alignment == 0
    assert moved.length - form.length == -(offset + len(form.head)) % alignment
    payload = (np.arange(form.payload_length) % 2).astype(np.uint8).tobytes()
    record = moved.head + payload + moved.tail(crc32(payload))
    assert len(record) == moved.length
    found = tensor_payload_from_bytes(record, offset, file="f", key="k")
    assert found.payload_offset == offset + len(moved.head)
    assert found.checksum == crc32(payload)
    loaded = torch.load(io.BytesIO(record), weights_only=True)
    assert str(loaded.dtype) == f"torch.{dtype}"
    assert tuple(loaded.shape) == shape
    assert loaded.reshape(-1).view(torch.uint8).numpy().tobytes() == payload


def test_large_records_of_a_file_are_aligned(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    storage = LocalStorage(tmp_path)
    arrays = [np.full(size, size, np.float32) for size in (5, 100_000, 7, 300_001, 90_001, 80_000)]
    records = [
        FormedRecord(TensorRecordLayout(BY_NAME["float32"], a.shape).form, a.data, a)
        for a in arrays
    ]
    written = write_files(storage, {"f": records}, threads=2, sync=False)["f"]
    data = storage.read("f")
    assert int(written.length.sum()) == len(data)
    for row, (array, (start, length)) in enumerate(zip(arrays, written.spans(), strict=True)):
        record = data[start : start + length]
        assert torch.equal(torch.load(io.BytesIO(record)), torch.from_numpy(array))
        assert int(written.record_checksum[row]) == crc32(record)
        if array.nbytes > 1 << 18:
            assert written.payload_offset[row] % (PAGE if length > PAGED_FROM else 64) == 0
