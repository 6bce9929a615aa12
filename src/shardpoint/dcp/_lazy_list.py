"""A list whose items are made when they are looked at, and that may be changed like a list."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, MutableSequence, Sequence
from typing import Any, Generic, Self, TypeVar, overload

__all__ = ["LazyList"]

Item = TypeVar("Item")
Columns = TypeVar("Columns")


class LazyList(MutableSequence[Item], Generic[Item, Columns]):
    """Columns that look and behave like a list of items.

    An item that was handed out is kept: programs may change it, so it counts more than its
    row. Once the list itself is changed, all of it is items.
    """

    def __init__(self, columns: Columns) -> None:
        self._columns = columns
        self._kept: dict[int, Item] = {}
        self._items: list[Item] | None = None

    @abstractmethod
    def _count(self) -> int:
        """Return the number of rows."""

    @abstractmethod
    def _make(self, row: int) -> Item:
        """Make the item of one row."""

    @abstractmethod
    def _columns_from(self, items: Iterable[Item]) -> Columns:
        """Make columns of items."""

    @property
    def columns(self) -> Columns:
        """The columns, with what was changed in the items or the list."""
        if self._items is not None:
            return self._columns_from(self._items)
        if any(item != self._make(row) for row, item in self._kept.items()):
            return self._columns_from(self)
        return self._columns

    def _all(self) -> list[Item]:
        if self._items is None:
            self._items = list(self)
        return self._items

    def __len__(self) -> int:
        return self._count() if self._items is None else len(self._items)

    @overload
    def __getitem__(self, position: int) -> Item: ...
    @overload
    def __getitem__(self, position: slice) -> list[Item]: ...
    def __getitem__(self, position: int | slice) -> Item | list[Item]:
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        if self._items is not None:
            return self._items[position]
        row = range(self._count())[position]
        if row not in self._kept:
            self._kept[row] = self._make(row)
        return self._kept[row]

    def __setitem__(self, position: Any, value: Any) -> None:
        self._all()[position] = value

    def __delitem__(self, position: int | slice) -> None:
        del self._all()[position]

    def insert(self, index: int, value: Item) -> None:
        self._all().insert(index, value)

    def sort(self, *, key: Any = None, reverse: bool = False) -> None:
        """Sort in place, as a list does."""
        self._all().sort(key=key, reverse=reverse)

    def copy(self) -> list[Item]:
        """Return the items as a plain list."""
        return list(self)

    def __iter__(self) -> Iterator[Item]:
        return (self[row] for row in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Iterable[Item]) -> list[Item]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Item]) -> list[Item]:
        return [*other, *self]

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)}>"

    def __reduce__(self) -> tuple[type[Self], tuple[Columns]]:
        return type(self), (self.columns,)
