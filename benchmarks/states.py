"""The states that are saved, and the comparison of what comes back."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

__all__ = ["buffer_of", "buffers_of", "check_equal", "empty_like", "large", "small", "tensor_bytes"]

_LARGE = 16 << 20


def large(size_mb: int, *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of 16 MiB with 1024 columns, float32 and bfloat16 by turns."""
    count = max(1, (size_mb << 20) // _LARGE)
    generator = np.random.default_rng(seed)
    state = {}
    for number in range(count):
        # Random bits: not compressible, and some are NaN, which is why bytes are compared.
        bits = torch.from_numpy(
            generator.integers(0, 1 << 64, _LARGE // 8, np.uint64).view(np.int64)
        )
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        state[f"layers.{number}.weight"] = bits.view(dtype).view(-1, 1024)
    return state


def small(count: int, *, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return tensors of 4 KiB, and as many scalars."""
    generator = np.random.default_rng(seed)
    tensors = {
        f"tensors.{number}": torch.from_numpy(generator.standard_normal(1024, np.float32))
        for number in range(count)
    }
    return tensors, {f"steps.{number}": number + 0.5 for number in range(count)}


def empty_like(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state of the same form with other values, its memory touched."""
    return {
        key: torch.zeros_like(value) if isinstance(value, torch.Tensor) else -1.0
        for key, value in state.items()
    }


def buffer_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor."""
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())


def buffers_of(state: dict[str, torch.Tensor]) -> list[memoryview]:
    """Return the memory of all tensors."""
    return [buffer_of(tensor) for tensor in state.values()]


def tensor_bytes(state: dict[str, Any]) -> int:
    """Return the bytes of all tensors."""
    return sum(value.nbytes for value in state.values() if isinstance(value, torch.Tensor))


def check_equal(loaded: dict[str, Any], saved: dict[str, Any]) -> None:
    """Compare every value, tensors bit by bit.

    Raises
    ------
    ValueError
        If a key is missing or a value differs.
    """
    if loaded.keys() != saved.keys():
        raise ValueError("other keys came back than were saved")
    for key, value in saved.items():
        found = loaded[key]
        if isinstance(value, torch.Tensor):
            same = found.dtype == value.dtype and torch.equal(_bits(found), _bits(value))
        else:
            same = type(found) is type(value) and found == value
        if not same:
            raise ValueError(f"key {key!r}: another value came back than was saved")


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
