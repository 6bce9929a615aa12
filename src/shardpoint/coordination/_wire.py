"""Values as bytes between the ranks of one job, without saying the same thing twice.

Ranks are mostly alike: their keys, dtypes and shapes are the same, and what a rank is told
about its plan is mostly what it sent itself. `Shared` values travel as a few plain parts.
The coordinator makes one object of equal parts, however many ranks sent them, and an answer
refers by number to what its receiver sent.

Everything here is pickled: it comes from this job's own processes, never from a checkpoint.
"""

from __future__ import annotations

import io
import pickle
from abc import abstractmethod
from collections.abc import Hashable
from typing import Any, Self

__all__ = ["Shared", "WireReader", "WireWriter"]


class Shared:
    """A value that travels as its parts. Ranks that sent equal parts share one object."""

    __slots__ = ()

    @abstractmethod
    def shared_state(self) -> tuple[Hashable, ...]:
        """Return the parts: bytes, numbers, strings, tuples of them, or other `Shared` values."""

    @classmethod
    @abstractmethod
    def from_shared_state(cls, *state: Any) -> Self:
        """Make the value of its parts."""


class WireWriter:
    """Packs values for one receiver.

    Parameters
    ----------
    known
        `Shared` values that the receiver has, by number.

    Attributes
    ----------
    values
        All `Shared` values that the receiver has after reading, by number.
    """

    def __init__(self, known: dict[int, Shared] | None = None) -> None:
        self.values: dict[int, Shared] = dict(known or {})
        self._numbers = {id(value): number for number, value in self.values.items()}

    def pack(self, value: object) -> bytes:
        """Return a value as bytes."""
        buffer = io.BytesIO()
        _Pickler(buffer, self).dump(value)
        return buffer.getvalue()

    def reference(self, value: Shared) -> object:
        """Return what stands for a `Shared` value in the bytes."""
        number = self._numbers.get(id(value))
        if number is not None:
            return number
        state = value.shared_state()
        number = len(self.values)
        self.values[number] = value
        self._numbers[id(value)] = number
        return number, type(value), state


class WireReader:
    """Unpacks what one or more ranks sent.

    Parameters
    ----------
    known
        `Shared` values that this rank sent, by number.
    """

    def __init__(self, known: dict[int, Shared] | None = None) -> None:
        self._known = dict(known or {})
        self._made: dict[Hashable, Shared] = {}

    def unpack(self, payload: bytes) -> tuple[Any, dict[int, Shared]]:
        """Return the value, and the `Shared` values in it by the sender's numbers."""
        found = dict(self._known)
        return _Unpickler(io.BytesIO(payload), self, found).load(), found

    def resolve(self, reference: Any, found: dict[int, Shared]) -> Shared:
        """Return the `Shared` value that a reference stands for."""
        if isinstance(reference, int):
            return found[reference]
        number, kind, state = reference
        value = self._made.get((kind, state))
        if value is None:
            value = self._made[kind, state] = kind.from_shared_state(*state)
        found[number] = value
        return value


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO, writer: WireWriter) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self._writer = writer

    def persistent_id(self, obj: Any) -> object:
        return self._writer.reference(obj) if isinstance(obj, Shared) else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, reader: WireReader, found: dict[int, Shared]) -> None:
        super().__init__(buffer)
        self._reader = reader
        self._found = found

    def persistent_load(self, pid: Any) -> Shared:
        return self._reader.resolve(pid, self._found)
