"""A list whose items are made when they are looked at, and that may be changed like a list."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Self, TypeVar

__all__ = ["LazyList"]

Item = TypeVar("Item")
Columns = TypeVar("Columns")


class LazyList(list[Item], Generic[Item, Columns]):
    """Columns that look and behave like a list of items.

    An item that was handed out is kept: programs may change it, so it counts more than its
    row. Once the list itself is changed, all of it is items, and they are in the list's own
    memory, which is empty before.

    Parameters
    ----------
    items
        What a plain list would be made of, as ``dataclasses.asdict`` makes one; see
        `from_columns`.
    """

    def __init__(self, items: Iterable[Item] = ()) -> None:
        super().__init__(items)
        self._columns: Columns | None = None
        self._kept: dict[int, Item] = {}

    @classmethod
    def from_columns(cls, columns: Columns) -> Self:
        """Return columns as a list."""
        made = cls()
        made._columns = columns
        return made

    @abstractmethod
    def _count(self, columns: Columns) -> int:
        """Return the number of rows."""

    @abstractmethod
    def _make(self, columns: Columns, row: int) -> Item:
        """Make the item of one row."""

    @abstractmethod
    def _columns_from(self, items: Iterable[Item]) -> Columns:
        """Make columns of items."""

    @property
    def columns(self) -> Columns:
        """The columns, with what was changed in the items or the list."""
        columns = self._columns
        if columns is None or any(
            item != self._make(columns, row) for row, item in self._kept.items()
        ):
            return self._columns_from(self)
        return columns

    def _fill(self) -> None:
        """Make all items, and let the list be one like any other."""
        if self._columns is not None:
            items = list(iter(self))
            self._columns, self._kept = None, {}
            super().extend(items)

    def __len__(self) -> int:
        return super().__len__() if self._columns is None else self._count(self._columns)

    def __getitem__(self, position: Any) -> Any:
        columns = self._columns
        if columns is None:
            return super().__getitem__(position)
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        row = range(self._count(columns))[position]
        if row not in self._kept:
            self._kept[row] = self._make(columns, row)
        return self._kept[row]

    def __iter__(self) -> Iterator[Item]:
        return super().__iter__() if self._columns is None else self._rows()

    def _rows(self) -> Iterator[Item]:
        # Not `range`: what is filled while it is gone through goes on as a list.
        row = 0
        while row < len(self):
            yield self[row]
            row += 1

    def copy(self) -> list[Item]:
        """Return the items as a plain list."""
        return list(iter(self))

    def __add__(self, other: Any) -> Any:
        return [*self, *other]

    def __radd__(self, other: Any) -> Any:
        return [*other, *self]

    def __copy__(self) -> list[Item]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Item]:
        if self._columns is None or self._kept:
            return copy.deepcopy(self.copy(), memo)
        return type(self).from_columns(self._columns)  # which nobody changes

    def __reduce_ex__(self, protocol: Any) -> Any:  # a list's own would ask for its memory
        return self.__reduce__()

    def __reduce__(self) -> Any:
        return type(self).from_columns, (self.columns,)

    __hash__ = None


def _filling(name: str) -> Any:
    method = getattr(list, name)

    def call(self: LazyList[Any, Any], *arguments: Any, **keywords: Any) -> Any:
        for one in (self, *arguments):  # a list looks into the memory of the other one, too
            if isinstance(one, LazyList):
                one._fill()
        return method(self, *arguments, **keywords)

    call.__name__ = name
    return call


_METHODS = (
    *("__setitem__", "__delitem__", "__contains__", "__eq__", "__ne__", "__lt__", "__le__"),
    *("__gt__", "__ge__", "__repr__", "__reversed__", "__iadd__", "__mul__", "__rmul__"),
    *("__imul__", "append", "clear", "count", "extend", "index", "insert", "pop", "remove"),
    *("reverse", "sort"),
)
for _name in _METHODS:
    setattr(LazyList, _name, _filling(_name))
