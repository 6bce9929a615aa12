"""Which rank writes what of which safetensors file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardpoint.dcp._write_items import columns_of
from shardpoint.dcp.planner import SavePlan
from shardpoint.dtypes import BY_CODE, DType
from shardpoint.errors import NotSupportedError, PlanError, Problem
from shardpoint.formats.huggingface_writing import file_name
from shardpoint.planning.save import OBJECT, WriteColumns

__all__ = ["FullFile", "HuggingFacePlan", "SaveShape", "shape_of_save"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class HuggingFacePlan:
    """What the coordinator tells each rank: how its files are called, and what goes where.

    Attributes
    ----------
    files
        Where the files are written.
    file_of
        For each item of the rank's plan, the position of its file in `files`.
    starts
        Where each item's whole tensor begins in a file that all ranks write together; None
        where the rank writes its files alone.
    is_full
        Whether the rank's own files hold whole tensors.
    """

    files: Sequence[str]
    file_of: Sequence[int]
    starts: Sequence[int] | None
    is_full: bool


@dataclass(frozen=True, slots=True)
class FullFile:
    """A file with whole tensors: number, name, and its tensors in order."""

    number: int
    name: str
    tensors: Sequence[tuple[str, DType, Shape]]


@dataclass(frozen=True, slots=True)
class SaveShape:
    """What is to be written, of all ranks.

    Attributes
    ----------
    tables
        Each rank's items.
    tensors
        Key to dtype and whole shape.
    numbers
        Key to the number of its file.
    count
        How many files there are, by their numbers.
    """

    tables: Sequence[WriteColumns]
    tensors: Mapping[str, tuple[DType, Shape]]
    numbers: Mapping[str, int]
    count: int

    def full_files(self) -> list[FullFile]:
        """Return the files, in the order of their numbers."""
        by_number: dict[int, list[tuple[str, DType, Shape]]] = {}
        for key, (dtype, shape) in self.tensors.items():
            by_number.setdefault(self.numbers[key], []).append((key, dtype, shape))
        return [
            FullFile(number, file_name(number, self.count), by_number[number])
            for number in sorted(by_number)
        ]

    def shard_files(self, folder: str) -> list[str]:
        """Return the names of all ranks' own files; `folder` is what they begin with."""
        return [
            folder + file_name(number, self.count, rank)
            for rank, table in enumerate(self.tables, start=1)
            for number in dict.fromkeys(self.numbers[key] for key in table.keys)
        ]

    def have_one_owner_each(self) -> bool:
        """Whether each file's tensors are whole, and on one rank."""
        owner: dict[int, int] = {}
        for rank, table in enumerate(self.tables):
            for row, key in enumerate(table.keys):
                is_whole = bool((table.sizes[row] == table.shape[row]).all())
                if not is_whole or owner.setdefault(self.numbers[key], rank) != rank:
                    return False
        return True

    def total_size(self) -> int:
        """Return the bytes of all tensors."""
        total = 0
        for dtype, shape in self.tensors.values():
            nbytes = dtype.itemsize
            for size in shape:
                nbytes *= size
            total += nbytes
        return total


def shape_of_save(plans: Iterable[SavePlan], mapping: Mapping[str, int] | None) -> SaveShape:
    """Look at all ranks' plans.

    Raises
    ------
    NotSupportedError
        If there are objects, or dtypes that safetensors does not have; names them.
    PlanError
        If `mapping` has no (valid) file number for a tensor; names all of them.
    """
    tables = [columns_of(plan.items) for plan in plans]
    tensors: dict[str, tuple[DType, Shape]] = {}
    unsuited: list[Problem] = []
    for table in tables:
        for row, key in enumerate(table.keys):
            dtype = BY_CODE[int(table.dtype[row])]
            if table.kind[row] == OBJECT:
                unsuited.append(Problem("is an object", key))
            elif dtype.safetensors_name is None:
                unsuited.append(Problem(f"is of dtype {dtype.name}", key))
            else:
                axes = int(table.ndim[row])
                tensors.setdefault(key, (dtype, tuple(table.shape[row, :axes].tolist())))
    if unsuited:
        lines = "\n".join(f"  - {problem}" for problem in dict.fromkeys(unsuited))
        raise NotSupportedError(f"safetensors files cannot hold these values:\n{lines}")
    numbers = dict.fromkeys(tensors, 1) if mapping is None else dict(mapping)
    problems = [
        Problem(f"has the file number {numbers.get(key)}: wanted is one from 1 on", key)
        for key in tensors
        if numbers.get(key, 0) < 1
    ]
    if problems:
        raise PlanError("fqn_to_index_mapping does not fit the state dict", problems)
    return SaveShape(tables, tensors, numbers, max(numbers.values(), default=1))
