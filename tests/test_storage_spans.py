"""Short spans of a file: the right bytes, by any way, and no crash when the file is cut off."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardpoint.errors import CorruptionError
from shardpoint.storage import LocalStorage, SpanReadable, _gathering

_SIZE = 3 << 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    data = np.random.default_rng(1).integers(0, 256, _SIZE, dtype=np.uint8)
    (folder / "f").write_bytes(data.tobytes())
    return folder


@given(
    length=st.one_of(st.integers(1, 1500), st.integers(1501, 9000)),
    count=st.sampled_from([1, 63, 64, 500, 1024, 1025]),
    step=st.one_of(st.integers(0, 2000), st.integers(2001, 70_000)),
    first=st.integers(0, 9000),
    is_plain=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_spans_are_those_of_the_file(
    place: Path, length: int, count: int, step: int, first: int, is_plain: bool
) -> None:
    count = max(1, min(count, (_SIZE - first - length) // max(step, 1)))
    starts = first + np.arange(count, dtype=np.int64) * step
    into = bytearray(count * length)
    with pytest.MonkeyPatch.context() as patch, LocalStorage(place).open("f") as file:
        if is_plain:
            patch.setattr(_gathering, "_process_vm_writev", None)
        assert isinstance(file, SpanReadable)
        file.read_spans(starts, length, memoryview(into))
    data = (place / "f").read_bytes()
    assert into == b"".join(data[start : start + length] for start in starts.tolist())


def test_many_spans_take_few_calls(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, calls = _gathering._process_vm_writev, []
    assert copy is not None

    def counting(*arguments: Any) -> int:
        calls.append(arguments)
        return int(copy(*arguments))

    monkeypatch.setattr(_gathering, "_process_vm_writev", counting)
    monkeypatch.setattr(os, "preadv", None)  # not called at all
    into = memoryview(bytearray(3000 * 100))
    with LocalStorage(place).open("f") as file:
        assert isinstance(file, SpanReadable)
        file.read_spans(np.arange(3000, dtype=np.int64) * 1000, 100, into)
    assert len(calls) == 3


def test_where_the_system_refuses_the_spans_are_read_one_by_one(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_gathering, "_process_vm_writev", lambda *arguments: -1)
    starts, into = np.arange(100, dtype=np.int64) * 1000, bytearray(100 * 100)
    with LocalStorage(place).open("f") as file:
        assert isinstance(file, SpanReadable)
        file.read_spans(starts, 100, memoryview(into))
    data = (place / "f").read_bytes()
    assert into == b"".join(data[start : start + 100] for start in starts.tolist())


@pytest.mark.parametrize("is_mapped", [False, True])
def test_a_file_that_is_cut_off_meanwhile_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_mapped: bool
) -> None:
    """Before it is mapped, or after, when touching it would end the process."""
    (tmp_path / "f").write_bytes(bytes(1 << 20))
    if is_mapped:
        copy = _gathering._copy

        def cutting(*arguments: Any) -> int:
            os.truncate(tmp_path / "f", 1 << 19)
            return copy(*arguments)

        monkeypatch.setattr(_gathering, "_copy", cutting)
    starts = np.arange(1000, dtype=np.int64) * 1000
    descriptors = len(os.listdir("/proc/self/fd"))
    with LocalStorage(tmp_path).open("f") as file:
        if not is_mapped:
            os.truncate(tmp_path / "f", 1 << 19)
        assert isinstance(file, SpanReadable)
        with pytest.raises(CorruptionError, match=r"f' ends at byte 52(4288|5000)"):
            file.read_spans(starts, 100, memoryview(bytearray(100_000)))
    assert len(os.listdir("/proc/self/fd")) == descriptors
