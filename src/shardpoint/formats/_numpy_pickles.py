"""numpy's arrays, scalars and dtypes in a pickle, rebuilt from their parts.

Source: what ``numpy.ndarray.__reduce__``, ``__reduce_ex__`` and ``numpy.dtype.__reduce__`` of
numpy 1.26 and 2 give. Only plain numbers, bools and fixed-width text; no objects, no records.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from shardpoint.errors import FormatError, NotSupportedError
from shardpoint.formats._pickle_guards import DEFAULT_LIMITS, WorkBudget, describe

__all__ = ["NDARRAY", "NUMPY_FUNCTIONS", "RECONSTRUCT", "PendingDType", "build_array"]


class PendingDType:
    """A dtype between the call that names it and the state that gives its byte order."""

    __slots__ = ("value",)

    def __init__(self, value: np.dtype[Any]) -> None:
        self.value = value

    def build(self, state: Any) -> None:
        """Take the state of a plain dtype; (version, byte order, ...)."""
        if (
            type(state) is not tuple
            or len(state) < 5
            or type(state[1]) is not str
            or state[1] not in ("<", ">", "|", "=")
            or any(part is not None for part in state[2:5])
        ):
            raise NotSupportedError("a numpy dtype with subarrays, fields or an unknown state")
        if state[1] == ">":
            self.value = self.value.newbyteorder(">")
        elif state[1] == "<":
            self.value = self.value.newbyteorder("<")


def build_array(array: np.ndarray[Any, np.dtype[Any]], state: Any, budget: WorkBudget) -> None:
    """Give an array that `_reconstruct` made its contents, in place, as others may refer to it.

    `state` is (version, shape, dtype, Fortran order, bytes).
    """
    match state:
        case (int(), tuple() as shape, PendingDType() as dtype, bool() as fortran, data):
            contents = _array(shape, dtype.value, "F" if fortran else "C", data, budget)
            # Checked above: this only copies plain numbers or text of the right size.
            set_state: Any = array.__setstate__
            set_state((1, shape, dtype.value, fortran, contents.tobytes("A")))
            return
    raise FormatError("a numpy array with an unknown state")


def _array(
    shape: tuple[Any, ...], dtype: np.dtype[Any], order: str, data: Any, budget: WorkBudget
) -> np.ndarray[Any, np.dtype[Any]]:
    if isinstance(data, str):  # Python 2 and protocol 2 may give text
        data = data.encode("latin-1")
    if type(data) not in (bytes, bytearray):
        raise FormatError(f"a numpy array whose contents are {describe(data)}, not bytes")
    if len(shape) > min(DEFAULT_LIMITS.max_axes, 32) or not all(
        type(size) is int and size >= 0 for size in shape
    ):
        raise FormatError("a numpy array whose shape is no short tuple of counts")
    if math.prod(shape) * dtype.itemsize != len(data) or (
        dtype.itemsize == 0 and math.prod(shape) > 1  # numpy makes room for a character each
    ):
        raise FormatError(f"a numpy array of shape {shape} and type {dtype} with {len(data)} bytes")
    budget.spend(len(data))
    flat = np.frombuffer(bytearray(data), dtype) if data else np.zeros(math.prod(shape), dtype)
    if dtype.kind == "U" and (flat.view(dtype.str[0] + "u4") > sys.maxunicode).any():
        raise FormatError("a numpy array of text with characters that there are not")
    return flat.reshape(shape, order="F" if order == "F" else "C")


def _dtype(arguments: tuple[Any, ...], budget: WorkBudget) -> PendingDType:
    match arguments:
        case (str() as name, *_) if len(name) <= 16 and name[:1] in tuple("biufcSU?"):
            dtype = np.dtype(name)
            if dtype.kind in "biufcSU" and dtype.names is None and dtype.itemsize <= 1 << 20:
                return PendingDType(dtype)
    shown = ", ".join(map(describe, arguments[:3]))
    raise NotSupportedError(f"numpy.dtype({shown}) is not supported inside objects")


def _reconstruct(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
    # The shape given here is a placeholder: the state has the true one.
    if not arguments or arguments[0] is not NDARRAY:
        raise FormatError("numpy's _reconstruct is called with something else than ndarray")
    return np.ndarray((0,), np.uint8)


def _scalar(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
    match arguments:
        case (PendingDType() as dtype, bytes() | str() as data):
            return _array((), dtype.value, "C", data, budget)[()]
    raise FormatError("numpy's scalar is called with something else than a dtype and bytes")


def _frombuffer(arguments: tuple[Any, ...], budget: WorkBudget) -> Any:
    match arguments:
        case (bytes() | bytearray() as data, PendingDType() as dtype, tuple() as shape, str(order)):
            return _array(shape, dtype.value, order, data, budget)
    raise FormatError("numpy's _frombuffer is called with unknown arguments")


class _NDArray:
    """The class ``numpy.ndarray`` itself, as an argument."""


NDARRAY = _NDArray()
RECONSTRUCT = _reconstruct

NUMPY_FUNCTIONS: Mapping[str, Callable[[tuple[Any, ...], WorkBudget], Any]] = {
    "numpy.dtype": _dtype,
    **{
        f"{core}.{name}": function
        for core in ("numpy.core", "numpy._core")
        for name, function in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}
