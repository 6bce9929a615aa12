"""Reading with an index that knows payloads and blocks: no headers, and parts are checked too."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_support import Array, Sink, grid, request, save, sink_of, with_payloads
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.errors import CorruptionError
from shardpoint.index import CheckpointIndex
from shardpoint.storage import LocalStorage
from shardpoint.storage.testing import CountingStorage
from shardpoint.transforms import ShuffleZstd, Tally

_SPARE = 128 << 10  # what may be read beside a part to check all of it


def _numbers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 3) -> Array:
    wanted = next(d for d in BY_CODE if d.name == dtype)
    count = prod(shape) * wanted.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, count, dtype=np.uint8)
    return raw.view(wanted.numpy).reshape(shape)


def _same(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes()


def _flip(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        value = file.read(1)[0]
        file.seek(position)
        file.write(bytes([value ^ 0x40]))


def _slices(box: tuple[tuple[int, ...], tuple[int, ...]]) -> Any:
    return (*(slice(o, o + n) for o, n in zip(*box, strict=True)), ...)


@st.composite
def _layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)))
    cuts = [draw(st.lists(st.integers(1, max(n - 1, 1)), max_size=2)) for n in shape]
    order = tuple(draw(st.permutations(range(len(shape)))))
    return shape, [[c for c in cut if c < n] for cut, n in zip(cuts, shape, strict=True)], order


@given(data=st.data(), layout=_layouts(), block=st.sampled_from([1, 7, 16, 64, 1 << 20]))
@settings(max_examples=60, deadline=None)
def test_any_flipped_byte_that_is_delivered_is_found(
    tmp_path_factory: pytest.TempPathFactory, data: Any, layout: Any, block: int
) -> None:
    """And before the flip, any region is as numpy has it, with no byte but payload read."""
    shape, cuts, order = layout
    dtype = data.draw(st.sampled_from(["uint8", "float32", "complex128"]))
    array = _numbers(shape, dtype)
    folder = tmp_path_factory.mktemp("place")
    place = LocalStorage(folder)
    index = with_payloads(
        save(place, {"x": array}, grid("x", shape, cuts, order=order)), place, block=block
    )
    spans = [sorted(data.draw(st.tuples(st.integers(0, n - 1), st.integers(1, n)))) for n in shape]
    offsets = tuple(a for a, _ in spans)
    sizes = tuple(max(b - a, 1) for a, b in spans)
    turned = data.draw(st.booleans())

    def read(*, verify: bool) -> Array:
        memory = np.empty(sizes[::-1] if turned else sizes, array.dtype)
        view = memory.T if turned else memory
        storage = CountingStorage(place)
        wanted = ReadRequest(0, offsets, sizes, Sink(view))
        done = read_tensors(index, storage, [wanted], threads=1, verify=verify)
        assert done.bytes_read == storage.bytes_read
        assert done.bytes_read - done.metadata_bytes <= array.nbytes
        return view

    part = array[_slices((offsets, sizes))]
    _same(read(verify=True), part)
    # The element to change: any of the region's, found by where it lies in its chunk.
    at = [data.draw(st.integers(o, o + n - 1)) for o, n in zip(offsets, sizes, strict=True)]
    axes = len(shape)
    low = index.chunks.offsets[:, :axes]
    inside = ((low <= at) & (np.array(at) < low + index.chunks.sizes[:, :axes])).all(axis=1)
    (chunk,) = np.flatnonzero(inside).tolist()
    payloads = index.chunks.payloads
    assert payloads is not None
    element = int(((np.array(at) - low[chunk]) * payloads.strides[chunk, :axes]).sum())
    byte = data.draw(st.integers(0, array.itemsize - 1))
    position = int(payloads.offset[chunk]) + element * array.itemsize + byte
    name = index.files[index.chunks.file[chunk]]
    _flip(folder / name, position)
    with pytest.raises(CorruptionError, match=r"key 'x', file '__._0\.distcp'.*CRC-32") as caught:
        read(verify=True)
    first, last = map(int, str(caught.value).split("bytes ")[1].split(" are")[0].split(" to "))
    assert first <= position < last
    assert read(verify=False).tobytes() != part.tobytes()


@pytest.mark.parametrize("block", [4096, 64 << 10, 3 << 20, 1 << 30])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_regions_in_pieces(tmp_path: Path, block: int, threads: int) -> None:
    """More than one piece, with blocks smaller and larger than what is read at once."""
    array = _numbers((5, 1000, 1001), "float32")
    place = LocalStorage(tmp_path)
    saved = save(place, {"x": array}, grid("x", array.shape, [[3], [], []], files=["f"]))
    index = with_payloads(saved, place, block=block)
    boxes = [
        ((0, 0, 0), (5, 1000, 1001)),
        ((2, 7, 0), (1, 990, 1001)),
        ((0, 0, 0), (4, 1000, 1001)),
        ((1, 3, 5), (3, 900, 901)),
    ]
    reads = [request(index, "x", box) for box in boxes]
    read_tensors(index, place, reads, threads=threads, verify=True)
    for read, box in zip(reads, boxes, strict=True):
        _same(sink_of(read).array, array[_slices(box)])
        assert sink_of(read).commits == 1
    payloads = index.chunks.payloads
    assert payloads is not None
    # In the last byte that the second box takes; with huge blocks nothing covers that alone.
    position = int(payloads.offset[0]) + ((2 * 1000 + 997) * 1001) * 4 - 1
    _flip(tmp_path / "f", position)
    for read in [request(index, "x", boxes[0]), request(index, "x", boxes[1])]:
        if block > 1 << 20 and read.sizes[0] == 1:
            continue
        with pytest.raises(CorruptionError, match="key 'x', file 'f'"):
            read_tensors(index, place, [read], threads=threads, verify=True)
        assert sink_of(read).commits == 0


def test_rows_are_checked_for_a_few_percent_more(tmp_path: Path) -> None:
    """Every byte of an eighth of the rows, by blocks of the length that is written."""
    array = _numbers((4096, 1000), "float32")
    place = LocalStorage(tmp_path)
    saved = save(place, {"x": array}, grid("x", array.shape, [[], []], files=["f"]))
    index = with_payloads(saved, place, block=64 << 10)
    payloads = index.chunks.payloads
    assert payloads is not None
    for part in (0, 3, 7):
        storage = CountingStorage(place)
        box = ((part * 512, 0), (512, 1000))
        done = read_tensors(index, storage, [request(index, "x", box)], threads=1, verify=True)
        assert storage.bytes_read <= 512 * 4000 + _SPARE
        assert done.metadata_bytes == 0
        for byte in (0, 512 * 4000 - 1):
            position = int(payloads.offset[0]) + part * 512 * 4000 + byte
            _flip(tmp_path / "f", position)
            with pytest.raises(CorruptionError, match="'x'"):
                read_tensors(index, place, [request(index, "x", box)], threads=1, verify=True)
            _flip(tmp_path / "f", position)


def test_small_neighbours_are_read_together_without_their_headers_being_looked_at(
    tmp_path: Path,
) -> None:
    arrays = {f"k{i}": _numbers((10, i % 7 + 1), seed=i) for i in range(500)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[], []], files=["f"])]
    place = LocalStorage(tmp_path)
    index = with_payloads(save(place, arrays, chunks), place, block=64 << 10)
    storage = CountingStorage(place)
    reads = [request(index, key) for key in arrays]
    done = read_tensors(index, storage, reads, threads=2, verify=True)
    for read, wanted in zip(reads, arrays.values(), strict=True):
        _same(sink_of(read).array, wanted)
        assert sink_of(read).commits == 1
    assert storage.calls["read"] < 5
    assert done.metadata_bytes == done.bytes_read - done.payload_bytes
    payloads = index.chunks.payloads
    assert payloads is not None
    _flip(tmp_path / "f", int(payloads.offset[123]))
    with pytest.raises(CorruptionError, match="'k123'"):
        read_tensors(index, place, reads, threads=2, verify=True)


def test_half_of_the_neighbours(tmp_path: Path) -> None:
    """What nobody wants is not read to save calls."""
    arrays = {f"k{i}": _numbers((1000,), seed=i) for i in range(60)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[]], files=["f"])]
    place = LocalStorage(tmp_path)
    index = with_payloads(save(place, arrays, chunks), place, block=64 << 10)
    storage = CountingStorage(place)
    reads = [request(index, f"k{i}") for i in range(0, 60, 2)]
    read_tensors(index, storage, reads, threads=1, verify=True)
    assert storage.bytes_read == 30 * 4000
    assert storage.calls["read"] == 30
    for read, i in zip(reads, range(0, 60, 2), strict=True):
        _same(sink_of(read).array, arrays[f"k{i}"])


def _encoded(place: LocalStorage, index: CheckpointIndex, transform: ShuffleZstd) -> Any:
    """Rewrite the one record of an index in independent frames."""
    data = place.read(index.files[0])
    pieces = transform.stream(4).encode([data], frame_map=map)
    place.remove(index.files[0])
    place.replace(index.files[0], encoded := b"".join(pieces), sync=False)
    chunks = replace(
        index.chunks,
        transform=np.array([1], np.int16),
        record_length=np.array([len(encoded)], np.int64),
    )
    return replace(index, chunks=chunks, transforms=[(), ("stream.shuffle-zstd@shardpoint/1",)])


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("box", [((512, 0), (128, 1000)), ((0, 0), (1024, 1000))])
def test_a_slice_of_a_framed_chunk_decodes_the_frames_it_needs(
    tmp_path: Path, known: bool, box: Any
) -> None:
    array = np.arange(1024 * 1000, dtype=np.float32).reshape(1024, 1000)
    place = LocalStorage(tmp_path)
    saved = save(place, {"x": array}, grid("x", array.shape, [[], []], files=["f"]))
    index = _encoded(place, with_payloads(saved, place, block=64 << 10), ShuffleZstd())
    if not known:
        index = replace(index, chunks=replace(index.chunks, payloads=None))
    storage, tally = CountingStorage(place), Tally()
    read = request(index, "x", box)
    read_tensors(index, storage, [read], threads=2, verify=True, tally=tally)
    _same(sink_of(read).array, array[_slices(box)])
    needed = prod(box[1]) * 4
    assert tally.decoded_bytes < 2 * needed
    if box[1] != array.shape:
        assert storage.bytes_read < int(index.chunks.record_length[0]) / 2
    largest = max((o for o in storage.operations if o.kind == "read"), key=lambda o: o.nbytes)
    _flip(tmp_path / "f", largest.offset + largest.nbytes // 2)
    with pytest.raises(CorruptionError, match="'x'"):
        read_tensors(index, place, [read], threads=1, verify=True)
