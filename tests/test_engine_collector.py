"""The pause of the cycle collector: nested, side by side, and never a program's own setting."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from shardpoint.engine.collector import collection_paused


@pytest.fixture(autouse=True)
def _enabled() -> Iterator[None]:
    gc.enable()
    yield
    gc.enable()


def test_the_collector_is_off_inside_and_on_after_the_last_block() -> None:
    with collection_paused():
        assert not gc.isenabled()
        with pytest.raises(KeyError), collection_paused():
            raise KeyError
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_the_program_turned_off_stays_off() -> None:
    gc.disable()
    with collection_paused():
        pass
    assert not gc.isenabled()


def test_the_last_of_several_threads_turns_it_on_again() -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with collection_paused():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(10)
    with collection_paused():
        pass
    assert not gc.isenabled()
    leave.set()
    thread.join()
    assert gc.isenabled()
