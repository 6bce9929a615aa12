"""What a save says of its files agrees with their bytes, whichever way the bytes were made."""

from __future__ import annotations

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import shardpoint.dcp as dcp
from shardpoint.dcp._records import record_of
from shardpoint.dcp._write_results import written_by
from shardpoint.dcp.default_planner import DefaultSavePlanner
from shardpoint.engine.writing import write_file
from shardpoint.formats.torch_record import tensor_payload_from_bytes
from shardpoint.index import UNKNOWN
from shardpoint.planning.placing import Written
from shardpoint.storage import LocalStorage

_DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8),
    *(torch.complex64, torch.complex128, torch.float8_e4m3fn, torch.uint16),
]


class _ObjectPlanner(DefaultSavePlanner):
    """Does what the default does, by overriding: everything goes the way of write items."""

    def resolve_data(self, write_item: Any) -> Any:
        return super().resolve_data(write_item)


class _Writer(dcp.FileSystemWriter):
    """Keeps what was written."""

    written: Written

    def finish(self, metadata: Any, results: Any) -> None:
        self.written = written_by(results)
        super().finish(metadata, results)


def _save(state: dict[str, Any], folder: Path, planner: Any, **options: Any) -> Written:
    writer = _Writer(folder, sync_files=False, **options)
    dcp.save(state, storage_writer=writer, planner=planner, no_dist=True)
    return writer.written


def _filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    count = int(np.prod(shape)) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, np.uint8)
    if dtype == torch.bool:
        raw &= 1
    return (
        torch.frombuffer(raw, dtype=dtype).reshape(shape)
        if count
        else torch.empty(shape, dtype=dtype)
    )


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(_DTYPES))
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    if draw(st.integers(0, 9)) == 0:
        shape = (draw(st.integers(0, 2)), 40_000)  # several blocks, and large records
    tensor = _filled(shape, dtype, draw(st.integers(0, 99)))
    form = draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "lazy", "leaf"]))
    if form == "transposed":
        tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
    elif form == "strided" and tensor.dim():
        tensor = tensor[..., ::2]
    elif form == "expanded":
        tensor = tensor.expand(3, *shape)
    elif form == "lazy" and dtype.is_complex:
        tensor = draw(st.sampled_from([tensor.conj(), tensor.conj().imag]))
    elif form == "leaf" and dtype in (torch.float32, torch.bfloat16):
        tensor = torch.nn.Parameter(tensor)
    return tensor


_VALUES = st.one_of(
    _tensors(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(allow_nan=False),
    st.sampled_from([None, True, "text", b"raw", (1, 2), "x" * 5000, {1, 2}, torch.Size([2])]),
)


def _check_rows(folder: Path, written: Written, state: dict[str, Any]) -> None:
    payloads, blocks, records = written.payloads, written.blocks, written.record_checksum
    assert payloads is not None
    assert blocks is not None
    assert records is not None
    assert int(blocks.first[-1]) == len(blocks.values)
    assert sorted(written.keys) == sorted(state)
    for row, key in enumerate(written.keys):
        data = (folder / written.file[row]).read_bytes()
        start, length = int(written.offset[row]), int(written.length[row])
        record = data[start : start + length]
        assert len(record) == length
        assert records[row] == zlib.crc32(record)
        found = blocks.values[blocks.first[row] : blocks.first[row + 1]].tolist()
        if written.is_object[row]:
            assert (payloads.offset[row], payloads.length[row]) == (UNKNOWN, UNKNOWN)
            assert payloads.checksum[row] == UNKNOWN
            assert found == []
            continue
        known = tensor_payload_from_bytes(record, start, file="", key=key)
        ndim = len(known.shape)
        assert written.ndim[row] == ndim
        assert payloads.offset[row] == known.payload_offset
        assert payloads.length[row] == known.payload_length
        assert payloads.flags[row] == known.flags == 0
        if 0 not in known.shape:
            assert tuple(payloads.strides[row, :ndim].tolist()) == known.strides
        assert not payloads.strides[row, ndim:].any()
        payload = data[known.payload_offset :][: known.payload_length]
        assert payloads.checksum[row] == zlib.crc32(payload)
        size = blocks.block_size
        assert found == [zlib.crc32(payload[at : at + size]) for at in range(0, len(payload), size)]
        assert _bits(torch.load(io.BytesIO(record), weights_only=True)) == _bits(state[key])


def _bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    plain = (
        tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    )
    raw = plain.view(-1).view(torch.uint8) if plain.numel() else torch.empty(0)
    return tensor.dtype, tuple(tensor.shape), raw.numpy().tobytes()


@given(
    values=st.lists(_VALUES, min_size=1, max_size=12),
    threads=st.sampled_from([1, 1, 3]),
    single=st.booleans(),
)
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_columns_agree_with_the_files_and_both_ways_write_the_same(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], threads: int, single: bool
) -> None:
    folder = tmp_path_factory.mktemp("save")
    state = {f"key{number}": value for number, value in enumerate(values)}
    options = {"thread_count": threads, "single_file_per_rank": single}
    _check_rows(folder / "a", _save(state, folder / "a", None, **options), state)
    _check_rows(folder / "b", _save(state, folder / "b", _ObjectPlanner(), **options), state)
    files = sorted(p.name for p in (folder / "a").glob("*.distcp"))
    assert files == sorted(p.name for p in (folder / "b").glob("*.distcp"))
    sizes = [v.nbytes for v in values if isinstance(v, torch.Tensor)]
    # The payloads of large records are aligned to the file, whose place only the writer knows.
    if threads == 1 and single and max(sizes, default=0) < 200_000:
        assert (folder / "a" / files[0]).read_bytes() == _from_items(folder / "c", state)


def _from_items(folder: Path, state: dict[str, Any]) -> bytes:
    """Write the records that single items give, each with the general kind of source."""
    planner = DefaultSavePlanner()
    planner.set_up_planner(state)
    items = planner.create_local_plan().items
    ordered = sorted(items, key=lambda item: item.tensor_data is not None)
    records = [record_of(planner, item, keep=True)[0] for item in ordered]
    storage = LocalStorage(folder)
    storage.prepare()
    write_file(storage, "file", records, sync=False)
    return (folder / "file").read_bytes()
