"""The tensors of a state dict as the memory that a read fills, without an object for each."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dcp._layouts import find_local
from shardpoint.dcp._read_items import LocalRegions
from shardpoint.dcp._tensors import (
    LOWEST_ADDRESS,
    dtype_of,
    host_memory,
    put_values,
    refuse_lost_memory,
    torch_dtype,
)
from shardpoint.dtypes import BY_CODE, DType
from shardpoint.errors import PlanError
from shardpoint.index import Tensors
from shardpoint.storage import Buffer

__all__ = ["StateTargets"]

_PLAIN = (torch.Tensor, torch.nn.Parameter)


class StateTargets:
    """The local tensors that regions name; implements `shardpoint.engine.reading.Targets`.

    A tensor whose own memory cannot take the stored elements (another dtype, another device,
    lazily conjugated) gets them piece by piece.

    Parameters
    ----------
    state_dict
        Flat keys to values; kept alive.
    regions
        What is wanted, one row a local tensor.
    tensors
        The index's columns.

    Raises
    ------
    PlanError
        If a local tensor has not its region's shape, or no memory.
    """

    def __init__(
        self, state_dict: Mapping[str, Any], regions: LocalRegions, tensors: Tensors
    ) -> None:
        codes: list[int] = tensors.dtype[regions.tensor].tolist()
        wanted = {code: torch_dtype(BY_CODE[code]) for code in set(codes)}
        self._codes = codes
        self._tensors: list[torch.Tensor] = []
        self._addresses: list[int] = []
        self._sizes: list[int] = []
        dense = []
        for number, (key, code) in enumerate(zip(regions.keys, codes, strict=True)):
            value = state_dict[key]
            tensor = value if type(value) in _PLAIN else _local(key, value, regions, number)
            self._tensors.append(tensor)
            is_dense = (
                tensor.is_cpu
                and tensor.dtype is wanted[code]
                and type(tensor) in _PLAIN
                and tensor.layout is torch.strided
                and tensor.is_contiguous()
                and not tensor.is_conj()
                and not tensor.is_neg()
            )
            address = tensor.data_ptr() if is_dense else 0
            dense.append(is_dense)
            if address < LOWEST_ADDRESS:
                refuse_lost_memory(key, tensor)
            self._addresses.append(address)
            self._sizes.append(tensor.nbytes if is_dense else 0)
        self._dense = np.array(dense, np.bool_)
        self._arrays = {size: ctypes.c_ubyte * size for size in set(self._sizes)}

    def dense(self) -> npt.NDArray[np.bool_]:
        """Return which tensors are row-major host memory of the stored dtype."""
        return self._dense

    def buffers(self, numbers: Sequence[int]) -> list[Buffer]:
        """Return the memory of such tensors."""
        addresses, sizes, arrays = self._addresses, self._sizes, self._arrays
        return [
            memoryview(arrays[sizes[number]].from_address(addresses[number])).cast("B")
            for number in numbers
        ]

    def memory(self, number: int) -> npt.NDArray[Any] | None:
        """Return a tensor's own memory, strides and all, if it can take stored elements."""
        tensor = self._tensors[number].detach()
        return host_memory(tensor) if dtype_of(tensor.dtype) == self._dtype(number) else None

    def put(self, number: int, start: tuple[int, ...], values: npt.NDArray[Any]) -> None:
        """Convert elements to the tensor's dtype and copy them to its device."""
        put_values(self._tensors[number], start, values, self._dtype(number))

    def commit(self, numbers: Sequence[int]) -> None:
        """Tell autograd that tensors have changed: it may have saved one."""
        torch.autograd.graph.increment_version([self._tensors[number] for number in numbers])

    def _dtype(self, number: int) -> DType:
        return BY_CODE[self._codes[number]]


def _local(key: str, value: Any, regions: LocalRegions, number: int) -> torch.Tensor:
    rank = int(regions.ndim[number])
    offsets = torch.Size(regions.offsets[number, :rank].tolist())
    tensor = find_local(key, value, offsets, int(regions.hint[number]))
    sizes = tuple(regions.sizes[number, :rank].tolist())
    if tuple(tensor.shape) != sizes:
        raise PlanError(
            f"key {key!r}: the local tensor at {tuple(offsets)} has shape "
            f"{tuple(tensor.shape)}, it should have {sizes}"
        )
    return tensor
