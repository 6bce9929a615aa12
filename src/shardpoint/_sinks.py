"""Where the engine puts elements when nobody else has memory for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from shardpoint.dtypes import DType
from shardpoint.errors import LimitExceededError

__all__ = ["NewArraySink"]


class NewArraySink:
    """A new array, allocated when the engine asks for it (so, after the index was checked)."""

    def __init__(self, dtype: DType, sizes: tuple[int, ...], *, key: str) -> None:
        self._dtype = dtype
        self._sizes = sizes
        self._key = key
        self._raw: npt.NDArray[Any] | None = None

    @property
    def is_dense(self) -> bool:
        """Always: new arrays are row-major."""
        return True

    def memory(self) -> npt.NDArray[Any]:
        """Return the array as opaque elements.

        Raises
        ------
        LimitExceededError
            If there is no memory for an array of that size, or numpy has no such arrays: the
            axes that are not 0 must have less than 2**63 bytes, also of an empty array. torch
            has empty tensors of such shapes, so the checkpoint is not wrong.
        """
        if self._raw is None:
            try:
                self._raw = np.empty(self._sizes, self._dtype.raw)
            except (MemoryError, ValueError) as error:
                reason = "numpy has no" if 0 in self._sizes else "no memory for an"
                raise LimitExceededError(
                    f"key {self._key!r}: {reason} array of {self._dtype.name} with sizes "
                    f"{self._sizes}"
                ) from error
        return self._raw

    def commit(self) -> None:
        """Nothing is left to do: the array is the result."""

    def array(self) -> npt.NDArray[Any]:
        """Return the array with its own dtype."""
        return self.memory().view(self._dtype.numpy)
