"""Transforms: bounded, complete, by a closed list of names."""

from __future__ import annotations

import contextlib
import sys
import tracemalloc

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import CorruptionError, LimitExceededError, NotSupportedError
from shardpoint.transforms import Transforms, decode

ZSTD = "stream.zstd/1"


def _compress(data: bytes, **options: bool) -> bytes:
    """One frame, made as a stream: without content size unless told otherwise."""
    compressor = zstandard.ZstdCompressor(**options).compressobj()
    return compressor.compress(data) + compressor.flush()


def _decode(descriptors: tuple[str, ...], data: bytes, max_size: int) -> bytes:
    return bytes(
        decode(
            descriptors,
            data,
            finder=Transforms(),
            max_size=max_size,
            key="some.key",
            file="__0_0.distcp",
        )
    )


@pytest.mark.parametrize("size", [0, 1, 100, 128 << 10, 5 << 20])
@pytest.mark.parametrize("checksum", [False, True])
def test_content_comes_back(size: int, checksum: bool) -> None:
    data = bytes(i * i % 253 for i in range(min(size, 1000))) * max(1, size // 1000)
    packed = _compress(data, write_checksum=checksum)
    assert _decode((ZSTD,), packed, len(data)) == data
    sized = zstandard.ZstdCompressor(write_checksum=checksum).compress(data)
    assert _decode((ZSTD,), sized, len(data)) == data


def test_no_transform_changes_nothing() -> None:
    assert _decode((), b"abc", 0) == b"abc"


def test_two_transforms_are_both_undone() -> None:
    assert _decode((ZSTD, ZSTD), _compress(_compress(b"x" * 1000)), 1000) == b"x" * 1000


def test_more_than_the_limit_is_refused() -> None:
    data = b"x" * 1000
    assert _decode((ZSTD,), _compress(data), 1000) == data
    with pytest.raises(LimitExceededError, match=r"some\.key.*__0_0\.distcp.*999"):
        _decode((ZSTD,), _compress(data), 999)


def test_bomb_is_refused_in_bounded_memory() -> None:
    inner = zstandard.ZstdCompressor().compressobj()
    pieces = [inner.compress(bytes(1 << 20)) for _ in range(2048)] + [inner.flush()]
    once = b"".join(pieces)
    twice = _compress(once)
    assert len(twice) < 2000
    tracemalloc.start()
    try:
        for descriptors, data in (((ZSTD,), once), ((ZSTD, ZSTD), twice)):
            with pytest.raises(LimitExceededError):
                _decode(descriptors, data, 10_000)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()


@given(cut=st.integers(0, 10_000), position=st.integers(0, 10_000), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_cut_or_changed_frames_never_crash(cut: int, position: int, bit: int) -> None:
    data = bytes(i * 7 % 251 for i in range(3000))
    packed = _compress(data)
    with pytest.raises(CorruptionError):
        _decode((ZSTD,), packed[: cut % len(packed)], 10_000)
    with pytest.raises(CorruptionError):
        _decode((ZSTD,), packed + b"\0", 10_000)
    changed = bytearray(packed)
    changed[position % len(packed)] ^= 1 << bit
    with contextlib.suppress(CorruptionError, LimitExceededError):
        assert len(_decode((ZSTD,), bytes(changed), 10_000)) <= 10_000


def test_other_bytes_are_no_frame() -> None:
    with pytest.raises(CorruptionError, match="zstd frame"):
        _decode((ZSTD,), b"PK\3\4" + bytes(100), 1000)


def test_unknown_transform_is_named() -> None:
    with pytest.raises(NotSupportedError, match=r"stream\.zstd/2.*stream\.zstd/1"):
        _decode(("stream.zstd/2",), b"", 10)
    with pytest.raises(LimitExceededError):
        _decode((ZSTD,) * 50, b"", 10)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(NotSupportedError, match=r"shardpoint\[zstd\]"):
        _decode((ZSTD,), _compress(b"x"), 10)
