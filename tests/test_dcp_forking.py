"""torch's pool of threads is made in each process once, before threads of ours need it."""

from __future__ import annotations

import os

import pytest
import torch

from shardpoint.dcp import _forking


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the numbers of threads that torch is told, in a process that is not ready yet."""
    told: list[int] = []
    monkeypatch.setattr(_forking, "_ready_in", -1)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


def test_a_process_makes_it_once_and_keeps_its_size(calls: list[int]) -> None:
    for _ in range(3):
        _forking.make_ready_for_threads()
    assert calls == [torch.get_num_threads()]


def test_a_forked_process_makes_it_again(calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    _forking.make_ready_for_threads()
    # What a fork changes: the memory is the same, the process is another.
    child = os.getpid() + 1
    monkeypatch.setattr(_forking.os, "getpid", lambda: child)
    for _ in range(2):
        _forking.make_ready_for_threads()
    assert len(calls) == 2
