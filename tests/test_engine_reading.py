"""Reading: the right elements by the fewest bytes, checked, and only into the right memory."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_support import (
    Array,
    Sink,
    grid,
    request,
    save,
    sink_of,
    with_chunk_column,
)
from shardpoint.dtypes import BY_CODE
from shardpoint.engine.reading import ReadRequest, read_tensors
from shardpoint.errors import (
    CorruptionError,
    DamagedCheckpointError,
    FormatError,
    NotSupportedError,
    PlanError,
    ShardpointError,
    StorageError,
)
from shardpoint.index import CONJUGATE, NEGATIVE, NO_FILE, Container, Payloads
from shardpoint.storage import LocalStorage
from shardpoint.storage.testing import CountingStorage


def _numbers(shape: tuple[int, ...], dtype: str = "float32", seed: int = 3) -> Array:
    wanted = next(d for d in BY_CODE if d.name == dtype)
    count = int(np.prod(shape))
    raw = np.random.default_rng(seed).integers(0, 256, count * wanted.itemsize, dtype=np.uint8)
    if dtype == "bool":
        raw &= 1
    return raw.view(wanted.numpy).reshape(shape)


def _same(found: Array, wanted: Array) -> None:
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    assert found.tobytes() == wanted.tobytes()


def test_records_are_read_by_torch_and_by_us(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = {
        "small": _numbers((3, 4)),
        "scalar": _numbers((), "int64"),
        "empty": _numbers((0, 3), "float64"),
        "large": np.arange(3_000_000, dtype=np.float32).reshape(1000, 3000),
        "bf16": _numbers((64, 9), "bfloat16"),
        "wide": _numbers((7, 5), "uint16"),
        "turned": np.arange(60_000, dtype=np.int32).reshape(100, 20, 30),
    }
    chunks = [
        c for k, a in arrays.items() if k != "turned" for c in grid(k, a.shape, [[]] * a.ndim)
    ]
    chunks += grid("turned", (100, 20, 30), [[30], [], []], order=(2, 0, 1))
    storage = LocalStorage(tmp_path)
    index = save(storage, arrays, chunks)
    for row, key in enumerate(index.tensors.keys):
        for chunk in range(*index.tensors.first_chunk[row : row + 2].tolist()):
            data = storage.read(index.files[index.chunks.file[chunk]])
            start = index.chunks.record_offset[chunk]
            record = data[start : start + index.chunks.record_length[chunk]]
            tensor = torch.load(io.BytesIO(record), weights_only=True)
            axes = int(index.tensors.ndim[row])
            box = tuple(
                slice(o, o + n)
                for o, n in zip(
                    index.chunks.offsets[chunk, :axes].tolist(),
                    index.chunks.sizes[chunk, :axes].tolist(),
                    strict=True,
                )
            )
            assert str(tensor.dtype) == f"torch.{index.tensors.dtype_of(row).name}"
            found = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
            assert found.tobytes() == arrays[key][(*box, ...)].tobytes(), key
    reads = [request(index, key) for key in arrays]
    read_tensors(index, storage, reads, threads=3, verify=True)
    for read, wanted in zip(reads, arrays.values(), strict=True):
        _same(sink_of(read).array, wanted)
        assert sink_of(read).commits == 1
        assert sink_of(read).asked == (1 if wanted.size else 0)


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_regions_are_those_of_numpy(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Any tiling, axis order, dtype, region and target strides, with and without bad luck."""
    shape = tuple(data.draw(st.lists(st.integers(0, 9), max_size=4), label="shape"))
    dtype = data.draw(st.sampled_from(["uint8", "float32", "bfloat16", "complex128", "uint16"]))
    array = _numbers(shape, dtype)
    cuts = [data.draw(st.lists(st.integers(1, max(n - 1, 1)), max_size=2)) for n in shape]
    cuts = [[c for c in cut if c < n] for cut, n in zip(cuts, shape, strict=True)]
    order = tuple(data.draw(st.permutations(range(len(shape))), label="order"))
    chunks = grid("x", shape, cuts, order=order)
    storage = LocalStorage(tmp_path_factory.mktemp("place"))
    index = save(storage, {"x": array}, chunks)
    reads, wanted = [], []
    for _ in range(data.draw(st.integers(1, 3))):
        spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
        offsets = tuple(a for a, _ in spans)
        sizes = tuple(b - a for a, b in spans)
        turned = data.draw(st.permutations(range(len(shape))))
        step = data.draw(st.sampled_from([1, 2]))
        memory = np.zeros([sizes[axis] * step for axis in turned], array.dtype)
        back = np.argsort(turned) if shape else []
        view = memory[(*(slice(None, None, step) for _ in shape), ...)].transpose(back)
        assert view.shape == sizes
        reads.append(ReadRequest(0, offsets, sizes, Sink(view)))
        wanted.append(array[(*(slice(a, b) for a, b in spans), ...)])
    threads = data.draw(st.sampled_from([1, 2]))
    ratio = data.draw(st.sampled_from([0.0, 0.05, 10.0]))
    read_tensors(index, storage, reads, threads=threads, verify=True, gap_ratio=ratio)
    for read, part in zip(reads, wanted, strict=True):
        _same(sink_of(read).array, part)
        assert sink_of(read).commits == 1


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_large_regions_into_any_memory(tmp_path: Path, order: tuple[int, ...]) -> None:
    """Pieces, blocks and buffers: larger than each of them."""
    array = _numbers((24, 1024, 200), "float32")
    storage = LocalStorage(tmp_path)
    index = save(storage, {"x": array}, grid("x", array.shape, [[9], [], [60]], order=order))
    regions = [
        ((0, 0, 0), (24, 1024, 200)),
        ((5, 100, 20), (15, 900, 100)),
        ((0, 0, 7), (24, 1024, 2)),
    ]
    for offsets, sizes in regions:
        box = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
        for turn in [(0, 1, 2), (2, 0, 1)]:
            memory = np.empty([sizes[axis] for axis in turn], np.float32)
            sink = Sink(memory.transpose(np.argsort(turn)))
            read = ReadRequest(0, offsets, sizes, sink)
            read_tensors(index, storage, [read], threads=2, verify=True)
            assert np.array_equal(sink.array.view(np.uint32), array[box].view(np.uint32))


def _eighths() -> list[tuple[str, Callable[[int], Any]]]:
    return [
        ("rows", lambda i: (slice(i * 128, (i + 1) * 128), slice(None))),
        ("columns", lambda i: (slice(None), slice(i * 512, (i + 1) * 512))),
    ]


@pytest.mark.parametrize(("name", "part"), _eighths())
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("cuts", [[[], []], [[300, 700], []], [[], [1000]], [[512], [2048]]])
def test_an_eighth_is_read_with_little_more_than_its_bytes(
    tmp_path: Path, name: str, part: Callable[[int], Any], order: tuple[int, ...], cuts: Any
) -> None:
    array = _numbers((1024, 4096), "float32")
    place = LocalStorage(tmp_path)
    chunks = grid("x", array.shape, cuts, order=order)
    index = save(place, {"x": array}, chunks)
    for i in (0, 3, 7):
        storage = CountingStorage(place)
        box = tuple(slice(*s.indices(n)) for s, n in zip(part(i), array.shape, strict=True))
        read = request(
            index, "x", (tuple(s.start for s in box), tuple(s.stop - s.start for s in box))
        )
        statistics = read_tensors(index, storage, [read], threads=2, verify=True)
        assert np.array_equal(sink_of(read).array.view(np.uint32), array[box].view(np.uint32))
        needed = array[box].nbytes
        assert statistics.payload_bytes == needed
        assert statistics.bytes_read == storage.bytes_read
        assert statistics.metadata_bytes <= 2048 * len(chunks)
        assert storage.bytes_read - statistics.metadata_bytes <= 1.05 * needed
        assert storage.open_files == 0


def test_gaps_are_crossed_only_as_far_as_allowed(tmp_path: Path) -> None:
    array = np.arange(100_000, dtype=np.int32).reshape(1000, 100)
    place = LocalStorage(tmp_path)
    index = save(place, {"x": array}, grid("x", array.shape, [[], []]))
    counts = {}
    for ratio in (0.0, 0.05, 1.0):
        storage = CountingStorage(place)
        read = request(index, "x", ((0, 2), (1000, 96)))
        done = read_tensors(index, storage, [read], threads=1, verify=True, gap_ratio=ratio)
        _same(sink_of(read).array, array[:, 2:98])
        payload = done.bytes_read - done.metadata_bytes
        assert payload <= (1 + ratio) * 1000 * 96 * 4
        counts[ratio] = storage.calls["read"]
    assert counts[0.0] > 1000
    assert counts[1.0] < 20


def test_small_neighbours_are_read_together(tmp_path: Path) -> None:
    arrays = {f"k{i}": _numbers((10, i % 7 + 1), seed=i) for i in range(2000)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[], []], files=["f"])]
    place = LocalStorage(tmp_path)
    index = save(place, arrays, chunks)
    storage = CountingStorage(place)
    reads = [request(index, key) for key in arrays]
    statistics = read_tensors(index, storage, reads, threads=2, verify=True)
    for read, wanted in zip(reads, arrays.values(), strict=True):
        _same(sink_of(read).array, wanted)
    assert storage.calls["read"] < 10
    assert storage.bytes_read <= place.size("f")  # type: ignore[operator]
    assert statistics.metadata_bytes == statistics.bytes_read - statistics.payload_bytes


@pytest.mark.parametrize("ratio", [0.0, 0.05, 3.0])
def test_small_records_that_are_not_wanted_are_skipped(tmp_path: Path, ratio: float) -> None:
    arrays = {f"k{i}": _numbers((100,), seed=i) for i in range(90)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[]], files=["f"])]
    place = LocalStorage(tmp_path)
    index = save(place, arrays, chunks)
    storage = CountingStorage(place)
    reads = [request(index, f"k{i}") for i in range(0, 90, 3)]
    read_tensors(index, storage, reads, threads=1, verify=True, gap_ratio=ratio)
    wanted = int(index.chunks.record_length[::3].sum())
    assert wanted <= storage.bytes_read <= (1 + ratio) * wanted
    assert storage.calls["read"] == (1 if ratio == 3.0 else 30)
    for read, i in zip(reads, range(0, 90, 3), strict=True):
        _same(sink_of(read).array, arrays[f"k{i}"])


def test_headers_of_neighbours_are_read_together(tmp_path: Path) -> None:
    arrays = {f"k{i}": _numbers((30_000,), seed=i) for i in range(40)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[]], files=["f"])]
    place = LocalStorage(tmp_path)
    index = save(place, arrays, chunks)
    storage = CountingStorage(place)
    reads = [request(index, key) for key in arrays]
    read_tensors(index, storage, reads, threads=1, verify=False)
    assert storage.calls["read"] <= 41 + 40


def _flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize("shape", [(5, 7), (300, 700), (1500, 3000)])
@pytest.mark.parametrize("strided", [False, True])
def test_changed_bytes_are_found_and_named(
    tmp_path: Path, shape: tuple[int, int], strided: bool
) -> None:
    array = _numbers(shape)
    storage = LocalStorage(tmp_path)
    index = save(storage, {"some.key": array}, grid("some.key", shape, [[], []]))
    data = (tmp_path / "__0_0.distcp").read_bytes()
    start = data.index(array.tobytes()[:64])
    _flip(tmp_path / "__0_0.distcp", start + array.nbytes - 3)
    read = request(index, "some.key")
    if strided:
        turned = np.empty(shape[::-1], array.dtype).T
        read = ReadRequest(0, (0, 0), shape, Sink(turned))
    with pytest.raises(CorruptionError) as caught:
        read_tensors(index, storage, [read], threads=2, verify=True)
    message = str(caught.value)
    for part in ("some.key", "__0_0.distcp", str(start), str(start + array.nbytes), "CRC-32"):
        assert part in message
    assert message.count("0x") == 2
    assert sink_of(read).commits == 0
    read = request(index, "some.key")
    read_tensors(index, storage, [read], threads=2, verify=False)
    assert sink_of(read).commits == 1


def test_record_of_another_tensor_is_refused_before_any_sink_is_touched(tmp_path: Path) -> None:
    arrays = {"a": _numbers((200, 300)), "b": _numbers((300, 200)), "c": _numbers((200, 300))}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[], []], files=["f"])]
    storage = LocalStorage(tmp_path)
    index = save(storage, arrays, chunks)
    swapped = index.chunks.record_offset[[1, 0, 2]]
    index = with_chunk_column(index, "record_offset", swapped)
    reads = [request(index, key) for key in arrays]
    with pytest.raises(FormatError, match=r"key '[ab]', file 'f'.*wanted.*found") as caught:
        read_tensors(index, storage, reads, threads=1, verify=True)
    assert "[200, 300]" in str(caught.value)
    assert "[300, 200]" in str(caught.value)
    assert all(sink_of(read).asked == 0 for read in reads)


def _outside(index: Any) -> Any:
    offsets = index.chunks.offsets.copy()
    offsets[1] += 1
    return with_chunk_column(index, "offsets", offsets)


def _hole(index: Any) -> Any:
    sizes = index.chunks.sizes.copy()
    sizes[1, 0] -= 1
    return with_chunk_column(index, "sizes", sizes)


def _overlap(index: Any) -> Any:
    offsets = index.chunks.offsets.copy()
    offsets[1] = offsets[0]
    return with_chunk_column(index, "offsets", offsets)


def _without_file(index: Any) -> Any:
    file = index.chunks.file.copy()
    file[1] = NO_FILE
    return with_chunk_column(index, "file", file)


def _past_the_end(index: Any) -> Any:
    length = index.chunks.record_length.copy()
    length[1] += 1 << 40
    return with_chunk_column(index, "record_length", length)


def _negative(index: Any) -> Any:
    offset = index.chunks.record_offset.copy()
    offset[1] = -100
    return with_chunk_column(index, "record_offset", offset)


def _missing(index: Any) -> Any:
    return replace(index, files=["__0_0.distcp", "gone.distcp"])


def _metadata_as_data(index: Any) -> Any:
    return replace(index, metadata_files=["__1_0.distcp"])


@pytest.mark.parametrize(
    "damage",
    [
        _outside,
        _hole,
        _overlap,
        _without_file,
        _past_the_end,
        _negative,
        _missing,
        _metadata_as_data,
    ],
)
def test_no_sink_is_touched_when_the_index_is_wrong(tmp_path: Path, damage: Any) -> None:
    arrays = {"good": _numbers((4, 4)), "bad": _numbers((10, 4))}
    storage = LocalStorage(tmp_path)
    chunks = grid("bad", (10, 4), [[5], []]) + grid("good", (4, 4), [[], []])
    chunks.sort(key=lambda chunk: list(arrays).index(chunk.key), reverse=True)
    index = save(storage, dict(reversed(arrays.items())), chunks)
    broken = damage(index)
    counting = CountingStorage(storage)
    reads = [request(broken, key) for key in arrays]
    with pytest.raises(PlanError) as caught:
        read_tensors(broken, counting, reads, threads=2, verify=True)
    assert caught.value.problems
    assert "bad" in str(caught.value) or "distcp" in str(caught.value)
    assert all(sink_of(read).asked == sink_of(read).commits == 0 for read in reads)
    assert counting.bytes_read == 0
    good = request(broken, "good")
    read_tensors(broken, storage, [good], threads=1, verify=True)
    _same(sink_of(good).array, arrays["good"])


def test_regions_outside_the_tensor_are_refused_all_at_once(tmp_path: Path) -> None:
    array = _numbers((4, 5))
    index = save(LocalStorage(tmp_path), {"x": array}, grid("x", (4, 5), [[], []]))
    boxes = [((0, 0), (5, 5)), ((-1, 0), (1, 1)), ((0,), (4,)), ((2, 3), (1, -1))]
    reads = [ReadRequest(0, offsets, sizes, Sink(array)) for offsets, sizes in boxes]
    reads.append(ReadRequest(7, (), (), Sink(array)))
    with pytest.raises(PlanError) as caught:
        read_tensors(index, LocalStorage(tmp_path), reads, threads=1, verify=True)
    assert len(caught.value.problems) == 5


def test_a_sink_with_other_memory_is_refused(tmp_path: Path) -> None:
    array = _numbers((4, 5))
    storage = LocalStorage(tmp_path)
    index = save(storage, {"x": array}, grid("x", (4, 5), [[], []]))
    for memory in (np.empty((5, 4), np.float32), np.empty((4, 5), np.float64)):
        with pytest.raises(PlanError, match="sink"):
            read_tensors(
                index,
                storage,
                [ReadRequest(0, (0, 0), (4, 5), Sink(memory))],
                threads=1,
                verify=True,
            )


def test_nothing_wanted_reads_nothing(tmp_path: Path) -> None:
    array = _numbers((4, 5))
    index = save(LocalStorage(tmp_path), {"x": array}, grid("x", (4, 5), [[], []]))
    storage = CountingStorage(LocalStorage(tmp_path))
    empty = request(index, "x", ((1, 2), (0, 3)))
    read_tensors(index, storage, [empty], threads=2, verify=True)
    assert sink_of(empty).commits == 1
    read_tensors(index, storage, [], threads=2, verify=True)
    assert storage.bytes_read == 0


@pytest.mark.parametrize("threads", [1, 3])
def test_failing_storage_and_failing_sinks_end_the_read(tmp_path: Path, threads: int) -> None:
    arrays = {f"k{i}": _numbers((300, 400), seed=i) for i in range(8)}
    chunks = [c for k, a in arrays.items() for c in grid(k, a.shape, [[100], []])]
    place = LocalStorage(tmp_path)
    index = save(place, arrays, chunks)
    for number in range(0, 40, 7):
        storage = CountingStorage(place, fail_at=number, fail_kinds=frozenset({"open", "read"}))
        reads = [request(index, key) for key in arrays]
        with pytest.raises(StorageError, match="injected"):
            read_tensors(index, storage, reads, threads=threads, verify=True)
        assert storage.open_files == 0

    class Failing(Sink):
        def memory(self) -> Array:
            raise RuntimeError("device lost")

    reads = [ReadRequest(2, (0, 0), (300, 400), Failing(arrays["k2"]))]
    with pytest.raises(RuntimeError, match="device lost"):
        read_tensors(index, place, reads, threads=threads, verify=True)
    assert not [t for t in threading.enumerate() if t.name.startswith("shardpoint")]


def _flagged(index: Any, array: Array, flags: int) -> Any:
    """Give the index the payload that its one record has, with flags."""
    axes = max(array.ndim, 1)
    strides = np.zeros((1, axes), np.int64)
    strides[0, : array.ndim] = [s // array.itemsize for s in array.strides]
    return replace(
        index,
        chunks=replace(
            index.chunks,
            payloads=Payloads(
                offset=np.array([0], np.int64),
                strides=strides,
                length=np.array([array.nbytes], np.int64),
                checksum=np.array([-1], np.int64),
                flags=np.array([flags], np.uint8),
            ),
            container=np.array([Container.RAW], np.uint8),
            record_offset=np.array([0], np.int64),
            record_length=np.array([array.nbytes], np.int64),
        ),
    )


_REAL = ["float16", "bfloat16", "float32", "float64", "int32"]
_FLAGGED = [(dtype, NEGATIVE) for dtype in _REAL] + [
    (dtype, flags)
    for dtype in ("complex64", "complex128")
    for flags in (CONJUGATE, NEGATIVE, CONJUGATE | NEGATIVE)
]


@pytest.mark.parametrize(("dtype", "flags"), _FLAGGED)
@pytest.mark.parametrize("shape", [(6, 5), (300, 301)])
def test_lazy_conjugate_and_negative_are_applied(
    tmp_path: Path, dtype: str, shape: tuple[int, int], flags: int
) -> None:
    numpy_dtype = next(d for d in BY_CODE if d.name == dtype).numpy
    array = (np.arange(np.prod(shape)) % 50 - 20).astype(numpy_dtype).reshape(shape)
    if dtype.startswith("complex"):
        array = (array + 2j * array[::-1]).astype(numpy_dtype)
    (tmp_path / "__0_0.distcp").write_bytes(array.tobytes())
    scratch = LocalStorage(tmp_path / "scratch")
    index = _flagged(save(scratch, {"x": array}, grid("x", shape, [[], []])), array, flags)
    wanted = array
    wanted = np.conjugate(wanted) if flags & CONJUGATE else wanted
    wanted = np.negative(wanted) if flags & NEGATIVE else wanted
    for box in (((0, 0), shape), ((1, 2), (4, 3))):
        read = request(index, "x", box)
        read_tensors(index, LocalStorage(tmp_path), [read], threads=1, verify=True)
        cut = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
        _same(sink_of(read).array, np.ascontiguousarray(wanted[cut]).astype(numpy_dtype))


def test_flags_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    for dtype, flags in (("float32", CONJUGATE), ("bool", NEGATIVE)):
        array = _numbers((3, 3), dtype)
        folder = tmp_path / dtype
        scratch = LocalStorage(folder / "scratch")
        index = _flagged(save(scratch, {"x": array}, grid("x", (3, 3), [[], []])), array, flags)
        (folder / "__0_0.distcp").write_bytes(array.tobytes())
        with pytest.raises(NotSupportedError, match="'x'"):
            read_tensors(index, LocalStorage(folder), [request(index, "x")], threads=1, verify=True)


@pytest.mark.parametrize("shape", [(4, 3), (400, 300)])
@pytest.mark.parametrize("strides", [(2, 8), (1, 1), (0, 1), (3, 0), (5, 2), (700, 2)])
def test_payloads_with_any_strides(
    tmp_path: Path, shape: tuple[int, int], strides: tuple[int, int]
) -> None:
    """Shared, overlapping, interleaved and spread elements, as ``torch.save`` of views gives."""
    memory = np.arange(1_000_000, dtype=np.int32)
    array = np.lib.stride_tricks.as_strided(memory, shape, [4 * s for s in strides])
    (tmp_path / "__0_0.distcp").write_bytes(memory.tobytes())
    scratch = LocalStorage(tmp_path / "scratch")
    index = save(scratch, {"x": array}, grid("x", shape, [[], []]))
    index = _flagged(index, array, 0)
    payloads = index.chunks.payloads
    assert payloads is not None
    payloads.length[0] = memory.nbytes
    index.chunks.record_length[0] = memory.nbytes
    for box in (((0, 0), shape), ((1, 1), (2, 2))):
        read = request(index, "x", box)
        read_tensors(index, LocalStorage(tmp_path), [read], threads=2, verify=True)
        cut = tuple(slice(o, o + n) for o, n in zip(*box, strict=True))
        _same(sink_of(read).array, np.ascontiguousarray(array[cut]))


def test_known_payload_outside_its_record_is_refused(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    (tmp_path / "__0_0.distcp").write_bytes(array.tobytes())
    scratch = LocalStorage(tmp_path / "scratch")
    saved = save(scratch, {"x": array}, grid("x", (3, 4), [[], []]))
    for name, value in (("offset", 8), ("length", 10_000), ("strides", 9)):
        index = _flagged(saved, array, 0)
        getattr(index.chunks.payloads, name)[0] = value
        with pytest.raises(ShardpointError, match="'x'"):
            read_tensors(
                index, LocalStorage(tmp_path), [request(index, "x")], threads=1, verify=True
            )


def test_a_slice_needs_only_the_files_it_lies_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = _numbers((40, 3))
    storage = LocalStorage(tmp_path)
    files = [f"__{rank}_0.distcp" for rank in range(4)]
    chunks = grid("x", (40, 3), [[10, 20, 30], []], files=files)
    index = save(storage, {"x": array}, chunks)
    (tmp_path / files[3]).unlink()
    asked: list[str] = []
    size = LocalStorage.size
    monkeypatch.setattr(
        LocalStorage, "size", lambda self, name: asked.append(name) or size(self, name)
    )
    part = request(index, "x", ((12, 0), (10, 3)))
    read_tensors(index, storage, [part], threads=1, verify=True)
    _same(sink_of(part).array, array[12:22])
    assert sorted(asked) == files[1:3]
    part = request(index, "x", ((25, 0), (10, 3)))
    with pytest.raises(PlanError, match=r"__3_0\.distcp.*missing"):
        read_tensors(index, storage, [part], threads=1, verify=True)
    assert sink_of(part).asked == 0


def test_a_hole_matters_to_those_who_want_it(tmp_path: Path) -> None:
    array = _numbers((40, 3))
    storage = LocalStorage(tmp_path)
    index = save(storage, {"x": array}, grid("x", (40, 3), [[10, 20, 30], []]))
    broken = _hole(index)
    part = request(broken, "x", ((30, 0), (5, 3)))
    read_tensors(broken, storage, [part], threads=1, verify=True)
    _same(sink_of(part).array, array[30:35])
    wanted = [request(broken, "x", ((30, 0), (5, 3))), request(broken, "x", ((15, 0), (5, 3)))]
    with pytest.raises(DamagedCheckpointError, match=r"no chunk covers 3 of 120.*19:20"):
        read_tensors(broken, storage, wanted, threads=1, verify=True)
    assert [sink_of(one).asked for one in wanted] == [0, 0]
