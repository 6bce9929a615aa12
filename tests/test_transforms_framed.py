"""Frames: any part is read on its own, damage and tampering are found, tables cannot lie."""

from __future__ import annotations

import secrets
import sys
import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TypeAlias

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import (
    CorruptionError,
    LimitExceededError,
    NotSupportedError,
    PlanError,
)
from shardpoint.formats.checksum import crc32
from shardpoint.transforms import (
    AesGcm,
    FramedStream,
    MemoryRecord,
    Origin,
    RecordBytes,
    ShuffleZstd,
    Tally,
    Transforms,
    _ciphers,
    open_record,
    read_at,
)
from shardpoint.transforms._frame_format import START, encode_end, read_table

KEY = bytes(range(32))
ORIGIN = Origin("layer.weight", "__0_0.distcp", 4096)
Codec: TypeAlias = "AesGcm | ShuffleZstd"

CHAINS: dict[str, tuple[Codec, ...]] = {
    "shuffled": (ShuffleZstd(),),
    "encrypted": (AesGcm(KEY),),
    "both": (ShuffleZstd(), AesGcm(KEY)),
}
all_chains = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())


class StrictRecord:
    """A file that says when it is asked for bytes that it has not."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.size = len(data)

    def read_into(self, offset: int, buffers: Sequence[bytearray | memoryview]) -> None:
        wanted = sum(map(len, buffers))
        assert 0 <= offset <= offset + wanted <= self.size, (offset, wanted, self.size)
        for buffer in buffers:
            buffer[:] = self._data[offset : offset + len(buffer)]
            offset += len(buffer)


def _encode(chain: Sequence[Codec], blocks: Sequence[bytes], element_size: int | None) -> bytes:
    stream: Sequence[bytes] = blocks
    for codec in chain:
        stream = list(codec.stream(element_size).encode(stream, frame_map=map))
    return b"".join(stream)


def _open(
    chain: Sequence[Codec],
    stored: bytes,
    *,
    most: int = 1 << 30,
    added: Sequence[AesGcm] = (AesGcm(KEY),),
    tally: Tally | None = None,
) -> RecordBytes:
    return open_record(
        Transforms(added),
        [codec.descriptor for codec in chain],
        StrictRecord(stored),
        most=most,
        origin=ORIGIN,
        tally=tally,
    )


def _read(chain: Sequence[Codec], stored: bytes) -> bytes:
    record = _open(chain, stored)
    return bytes(read_at(record, 0, record.size))


def _weights(nbytes: int) -> bytes:
    values = np.random.default_rng(7).standard_normal(nbytes // 4 + 1).astype(np.float32)
    return values.tobytes()[:nbytes]


def _pieces(data: bytes, ends: Sequence[int]) -> list[bytes]:
    cuts = [0, *sorted(end % (len(data) + 1) for end in ends), len(data)]
    return [data[a:b] for a, b in pairwise(cuts)]


@all_chains
@given(
    size=st.one_of(st.integers(0, 300), st.integers(8_000, 9_000), st.integers(0, 400_000)),
    ends=st.lists(st.integers(0, 400_000), max_size=4),
    element_size=st.sampled_from([None, 1, 2, 4, 8, 16, 3]),
    spans=st.lists(st.tuples(st.integers(0, 400_000), st.integers(0, 400_000)), max_size=4),
)
@settings(max_examples=25)
def test_any_part_is_what_was_written(
    chain: tuple[Codec, ...],
    size: int,
    ends: list[int],
    element_size: int | None,
    spans: list[tuple[int, int]],
) -> None:
    data = _weights(size)
    record = _open(chain, _encode(chain, _pieces(data, ends), element_size), most=size)
    assert record.size == size
    for span in spans:
        start, end = sorted(number % (size + 1) for number in span)
        middle = (start + end) // 2
        first, second = bytearray(middle - start), bytearray(end - middle)
        record.read_into(start, [first, second])
        assert first + second == data[start:end]
    assert bytes(read_at(record, 0, size)) == data


@all_chains
@pytest.mark.parametrize("size", [100_000, 200_000, 400_000, 1 << 20, 6 << 20])
def test_a_slice_decodes_less_than_twice_its_bytes(chain: tuple[Codec, ...], size: int) -> None:
    data = _weights(size)
    stored = _encode(chain, [data], 4)
    for numerator in range(8):
        start, length = size * numerator // 8, size // 8
        tally = Tally()
        record = _open(chain, stored, tally=tally)
        assert bytes(read_at(record, start, length)) == data[start : start + length]
        assert length <= tally.decoded_bytes < 2 * length


@all_chains
def test_rows_of_one_frame_decode_it_once(chain: tuple[Codec, ...]) -> None:
    data = _weights(1 << 20)
    tally = Tally()
    record = _open(chain, _encode(chain, [data], 4), tally=tally)
    for start in range(0, len(data), 1024):
        assert read_at(record, start, 100) == data[start : start + 100]
    assert tally.decoded_bytes == len(data)


@all_chains
@given(position=st.integers(min_value=0), bit=st.integers(0, 7))
@settings(max_examples=40)
def test_any_changed_bit_is_found(chain: tuple[Codec, ...], position: int, bit: int) -> None:
    changed = bytearray(_SAMPLES[chain])
    changed[position % len(changed)] ^= 1 << bit
    with pytest.raises(CorruptionError, match=r"layer\.weight.*__0_0\.distcp.*4096"):
        _read(chain, bytes(changed))


_SAMPLES = {chain: _encode(chain, [_weights(20_000)], 4) for chain in CHAINS.values()}


@all_chains
def test_any_changed_byte_of_the_table_is_found(chain: tuple[Codec, ...]) -> None:
    stored = _SAMPLES[chain]
    table = read_table(MemoryRecord(stored), most=1 << 30, origin=ORIGIN)
    frames_end = int(table.encoded[-1])
    for position in (*range(8), *range(frames_end, len(stored))):
        for bit in (1, 128):
            changed = bytearray(stored)
            changed[position] ^= bit
            with pytest.raises(CorruptionError):
                _open(chain, bytes(changed))


@all_chains
@given(length=st.integers(min_value=0))
@settings(max_examples=25)
def test_any_truncation_is_found(chain: tuple[Codec, ...], length: int) -> None:
    stored = _SAMPLES[chain]
    with pytest.raises(CorruptionError):
        _read(chain, stored[: length % len(stored)])


@all_chains
@given(data=st.binary(max_size=300))
@settings(max_examples=25)
def test_arbitrary_bytes_are_refused(chain: tuple[Codec, ...], data: bytes) -> None:
    for stored in (data, START + data + _SAMPLES[chain][-32:]):
        with pytest.raises(CorruptionError):
            _read(chain, stored)


def _taken_apart(stored: bytes) -> tuple[list[tuple[int, bytes, int]], bytes, bytes]:
    """Return frames (decoded length, bytes, checksum), header and seal."""
    table = read_table(MemoryRecord(stored), most=1 << 30, origin=ORIGIN)
    frames = [
        (
            int(table.decoded[i + 1] - table.decoded[i]),
            stored[table.encoded[i] : table.encoded[i + 1]],
            int(table.checksums[i]),
        )
        for i in range(len(table.checksums))
    ]
    return frames, table.header, table.seal


def _put_together(frames: Sequence[tuple[int, bytes, int]], header: bytes, seal: bytes) -> bytes:
    """Return a stream whose checksums are all right, as an attacker makes one."""
    rows = [(decoded, len(data), checksum) for decoded, data, checksum in frames]
    end = encode_end(rows, header, lambda sealed: seal)
    return b"".join((START, *(data for _, data, _ in frames), end))


def _forgeries() -> Iterator[tuple[str, bytes]]:
    codec = CHAINS["encrypted"]
    frames, header, seal = _taken_apart(_SAMPLES[codec])
    others, other_header, other_seal = _taken_apart(_encode(codec, [_weights(20_000)], 4))
    yield "moved", _put_together([frames[1], frames[0], *frames[2:]], header, seal)
    yield "cut off", _put_together(frames[:-1], header, seal)
    yield "repeated", _put_together([*frames, frames[-1]], header, seal)
    yield "of another record", _put_together([others[0], *frames[1:]], header, seal)
    yield "another seal", _put_together(frames, header, other_seal)
    yield "another header", _put_together(frames, other_header, seal)
    yield "no seal", _put_together(frames, header, b"")
    yield "none", _put_together([], header, seal)


@pytest.mark.parametrize("forged", [f for _, f in _forgeries()], ids=[n for n, _ in _forgeries()])
def test_frames_put_together_anew_do_not_decrypt(forged: bytes) -> None:
    chain = CHAINS["encrypted"]
    frames, header, seal = _taken_apart(_SAMPLES[chain])
    assert _read(chain, _put_together(frames, header, seal)) == _weights(20_000)
    with pytest.raises(CorruptionError):
        _read(chain, forged)


def test_frames_of_equal_checksum_in_other_places_do_not_decrypt() -> None:
    """The table stays as it is: the tag, not the CRC-32, has to tell."""
    chain = (AesGcm(KEY, frame_size=4096),)
    frames, header, seal = _taken_apart(_encode(chain, [bytes(20_000)], None))
    assert frames[0][0] == frames[1][0]
    rows = [(decoded, len(data), 0) for decoded, data, _ in frames]
    moved = [frames[1][1], frames[0][1], *(data for _, data, _ in frames[2:])]
    stored = b"".join((START, *moved, encode_end(rows, header, lambda sealed: seal)))
    with pytest.raises(CorruptionError):
        _read(chain, stored)


@pytest.mark.parametrize(
    "reader",
    [AesGcm(bytes(32)), AesGcm(bytes(16)), AesGcm(KEY, context=b"run-2")],
    ids=["key", "length", "context"],
)
def test_wrong_key_or_context_says_so(reader: AesGcm) -> None:
    with pytest.raises(CorruptionError, match=r"layer\.weight.*key or the context is not"):
        _open(CHAINS["encrypted"], _SAMPLES[CHAINS["encrypted"]], added=[reader])


def test_missing_key_says_how_to_give_one() -> None:
    with pytest.raises(NotSupportedError, match=r"transforms=\[shardpoint\.transforms\.AesGcm"):
        _open(CHAINS["encrypted"], _SAMPLES[CHAINS["encrypted"]], added=[])


@pytest.mark.parametrize("length", [16, 24, 32])
def test_key_is_found_by_its_id(length: int) -> None:
    keys = {name: secrets.token_bytes(length) for name in ("2025", "2026")}
    data = _weights(5000)
    stored = {
        name: _encode([AesGcm(keys.__getitem__, key_id=name, context=b"run")], [data], None)
        for name in keys
    }
    reader = AesGcm(keys.__getitem__, context=b"run")
    for encrypted in stored.values():
        record = _open([reader], encrypted, added=[reader])
        assert bytes(read_at(record, 0, record.size)) == data
    with pytest.raises(NotSupportedError, match=r"layer\.weight.*no key of id '2025': KeyError"):
        _open([reader], stored["2025"], added=[AesGcm({}.__getitem__)])


def test_unfit_arguments_are_refused() -> None:
    for key in (b"short", bytes(33), "a" * 32):
        with pytest.raises(PlanError, match="16, 24 or 32 bytes"):
            AesGcm(key)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="16, 24 or 32 bytes"):
        AesGcm(lambda key_id: b"short").stream(None)
    with pytest.raises(PlanError, match="key id"):
        AesGcm(KEY, key_id="x" * 256)
    for size in (0, 4095, 2 << 20):
        with pytest.raises(PlanError, match="frame size"):
            ShuffleZstd(frame_size=size)
    with pytest.raises(PlanError, match="levels"):
        ShuffleZstd(level=0)


def test_no_nonce_meets_a_key_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[tuple[bytes, int]] = []

    class Watched(_ciphers.Cipher):
        def __init__(self, key: bytes) -> None:
            super().__init__(key)
            self._watched_key = key

        def seal(self, number: int, data: bytes | bytearray, associated: bytes) -> bytes:
            used.append((self._watched_key, number))
            return super().seal(number, data, associated)

    monkeypatch.setattr(_ciphers, "Cipher", Watched)
    codec = AesGcm(KEY, frame_size=4096)
    for _ in range(20):
        _encode([codec], [_weights(30_000)], None)
    assert len(used) == len(set(used)) > 100
    assert KEY not in {key for key, _ in used}


def test_plain_bytes_are_not_in_what_is_stored() -> None:
    data = b"attention is all you need, and a secret, too!" * 1000
    assert data[:16] not in _encode(CHAINS["encrypted"], [data], None)


def _lie(rows: Sequence[tuple[int, int, int]], frames: bytes, header: bytes) -> bytes:
    return START + frames + encode_end(rows, header, lambda sealed: b"")


def test_tables_that_lie_cost_no_memory() -> None:
    frames, header, _ = _taken_apart(_SAMPLES[CHAINS["shuffled"]])
    decoded, data, checksum = frames[0]
    lies = {
        "longer": _lie([(decoded + 1, len(data), checksum)], data, header),
        "shorter": _lie([(decoded - 1, len(data), checksum)], data, header),
        "huge": _lie([(1 << 20, len(data), checksum)], data, header),
        "too huge": _lie([((1 << 32) - 1, len(data), checksum)], data, header),
        "nothing": _lie([(0, len(data), checksum)], data, header),
        "beyond": _lie([(decoded, len(data) + 1, checksum)], data, header),
        "other header": _lie([(decoded, len(data), checksum)], data, b"lz4"),
        "many": _lie([(decoded, len(data), checksum)] * 9, data, header),
        "countless": b"".join((START, data, bytes(8), b"\xff" * 4, bytes(8), b"SPFRAMES")),
    }
    tracemalloc.start()
    try:
        for stored in lies.values():
            with pytest.raises(CorruptionError):
                _read(CHAINS["shuffled"], stored)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert _read(CHAINS["shuffled"], _lie([(decoded, len(data), checksum)], data, header))


def test_planes_that_lie_are_found() -> None:
    _, header, _ = _taken_apart(_SAMPLES[CHAINS["shuffled"]])
    bomb = zstandard.ZstdCompressor().compress(bytes(64 << 20))
    stream = zstandard.ZstdCompressor().compressobj()
    unsized = stream.compress(bytes(5000)) + stream.flush()
    for plane in (bomb, unsized, b"no zstd", b""):
        for size in (b"\1", b"\0", b"\3", b"\x10"):
            frame = size + len(plane).to_bytes(4, "little") + plane
            stored = _lie([(5000, len(frame), crc32(frame))], frame, header)
            with pytest.raises(CorruptionError, match="frame 0"):
                _read(CHAINS["shuffled"], stored)


@all_chains
def test_more_than_the_limit_is_refused_by_the_table(chain: tuple[Codec, ...]) -> None:
    stored = _SAMPLES[chain]
    assert _open(chain, stored, most=20_000).size == 20_000
    with pytest.raises(LimitExceededError, match="20000 bytes, of which 19999"):
        _open(chain, stored, most=19_999)


@all_chains
def test_other_versions_are_refused(chain: tuple[Codec, ...]) -> None:
    with pytest.raises(NotSupportedError, match=r"version '2'"):
        open_record(
            Transforms([AesGcm(KEY)]),
            [f"{chain[0].name}/2"],
            MemoryRecord(_SAMPLES[chain]),
            most=1 << 20,
            origin=ORIGIN,
            tally=None,
        )


@pytest.mark.parametrize(
    ("chain", "package", "extra"),
    [("shuffled", "zstandard", "zstd"), ("encrypted", "cryptography.exceptions", "crypto")],
)
def test_missing_package_names_the_extra(
    chain: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = _SAMPLES[CHAINS[chain]]
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "shardpoint.transforms._ciphers")
    monkeypatch.delattr("shardpoint.transforms._ciphers")
    with pytest.raises(NotSupportedError, match=rf"shardpoint\[{extra}\]"):
        _open(CHAINS[chain], stored)
    with pytest.raises(NotSupportedError, match=rf"shardpoint\[{extra}\]"):
        CHAINS[chain][0].stream(None)


def test_weights_shrink_by_a_sixth_and_more() -> None:
    """Three of four bytes of a float32 weight are noise; the fourth is the exponent."""
    data = _weights(1 << 20)
    assert len(_encode(CHAINS["shuffled"], [data], 4)) < 0.88 * len(data)
    assert len(_encode(CHAINS["shuffled"], [data], None)) < 0.88 * len(data)
    noise = secrets.token_bytes(1 << 20)
    assert len(_encode(CHAINS["shuffled"], [noise], 4)) < 1.005 * len(noise)


def test_a_stream_fed_piece_by_piece_is_the_same() -> None:
    data = _weights(300_000)
    stream: FramedStream = ShuffleZstd().stream(4)
    fed = [piece for block in _pieces(data, [1, 5000, 123_456]) for piece in stream.feed(block)]
    assert b"".join([*fed, *stream.finish()]) == _encode([ShuffleZstd()], [data], 4)
