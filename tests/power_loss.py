"""A model of what a disk holds after the power has gone, at every system call of a save."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crash_support import LOOKS, Call, files_of

__all__ = ["PowerLoss"]


class PowerLoss:
    """Models what a disk may hold if the power goes: only what was synced is sure to be there.

    Between two syncs of a folder any of its changes may have become durable without the
    others; of a file that was not synced, all or nothing may be there. After each call
    `states` has what may be found: names with contents.

    Parameters
    ----------
    folder
        The checkpoint; what it holds now is durable.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = os.path.realpath(folder)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._synced: dict[int, bytes] = {}
        self._durable: dict[str, int] = {}
        for name, content in files_of(folder).items():
            number = next(self._numbers)
            self._durable[name] = number
            self._synced[number] = content
        self._names = dict(self._durable)
        self._pending: list[Call] = []
        self._numbers_of: list[int] = []
        self._folder_pending = False
        self.states: dict[frozenset[tuple[str, bytes]], str] = {}
        self.last: list[dict[str, bytes]] = []
        self.calls = 0

    @property
    def folder_is_durable(self) -> bool:
        """Whether the folder's own name is sure to be there."""
        return not self._folder_pending

    def __call__(self, call: Call, do: Callable[[], Any]) -> Any:
        with self._lock:
            result = do()
            self._note(call)
            if call.kind not in LOOKS:
                self.calls += 1
                self.last = list(self._possible())
                for state in self.last:
                    self.states.setdefault(frozenset(state.items()), f"{call.kind} {call.path}")
            return result

    def _note(self, call: Call) -> None:
        name = os.path.basename(call.path)
        if call.kind == "make folder":
            self._folder_pending = True
        elif call.kind == "sync folder":
            if call.path == os.path.dirname(self._folder):
                self._folder_pending = False
            elif call.path == self._folder:
                self._durable = dict(self._names)
                self._pending, self._numbers_of = [], []
        elif call.kind == "sync":
            self._synced[self._names[name]] = Path(call.path).read_bytes()
        elif call.kind in ("create", "rename", "remove"):
            if call.kind == "create":
                number = self._names[name] = next(self._numbers)
            else:
                number = self._names.pop(name)
            if call.kind == "rename":
                self._names[os.path.basename(call.target)] = number
            self._pending.append(call)
            self._numbers_of.append(number)

    def _possible(self) -> Iterator[dict[str, bytes]]:
        size = len(self._pending)
        for chosen in itertools.product((False, True), repeat=size):
            names = dict(self._durable)
            for call, number, done in zip(self._pending, self._numbers_of, chosen, strict=True):
                if not done:
                    continue
                name = os.path.basename(call.path)
                names.pop(name, None)
                if call.kind == "create":
                    names[name] = number
                elif call.kind == "rename":
                    names[os.path.basename(call.target)] = number
            for kept in (False, True):
                yield {name: self._content(number, kept) for name, number in names.items()}

    def _content(self, number: int, kept: bool) -> bytes:
        if number in self._synced:
            return self._synced[number]
        if kept:
            for name, other in self._names.items():
                if other == number:
                    return Path(self._folder, name).read_bytes()
        return b""
