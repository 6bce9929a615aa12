"""torch tensors as memory that the engine can read into and write from."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from shardpoint.dtypes import BY_CODE, DType
from shardpoint.errors import NotSupportedError, PlanError

__all__ = [
    "LOWEST_ADDRESS",
    "NO_MEMORY",
    "dense_strides",
    "dtype_of",
    "dtype_of_array",
    "has_lost_memory",
    "host_memory",
    "is_narrowing",
    "put_values",
    "refuse_lost_memory",
    "torch_dtype",
    "wrap",
]

_TO_TORCH: dict[int, torch.dtype] = {
    dtype.code: getattr(torch, dtype.name) for dtype in BY_CODE if hasattr(torch, dtype.name)
}
_FROM_TORCH: dict[torch.dtype, DType] = {t: BY_CODE[code] for code, t in _TO_TORCH.items()}
NO_MEMORY = (
    "the tensor's storage has been freed, as FSDP does between uses; save and load it while it "
    "has memory"
)
"""What `has_lost_memory` means."""

_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)
_PLAIN = (torch.Tensor, torch.nn.Parameter)

LOWEST_ADDRESS = 1 << 40
"""Memory of a tensor that lies lower may be none: without a storage the address is an offset."""

_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_of(dtype: torch.dtype) -> DType:
    """Return the engine's dtype.

    Raises
    ------
    NotSupportedError
        For quantized and other types that have no plain elements.
    """
    try:
        return _FROM_TORCH[dtype]
    except KeyError:
        hint = (
            ": save its int_repr() and, as objects, its scale and zero point"
            if dtype in _QUANTIZED
            else ""
        )
        raise NotSupportedError(
            f"{dtype} has no plain elements that could be stored{hint}"
        ) from None


def torch_dtype(dtype: DType) -> torch.dtype:
    """Return torch's dtype.

    Raises
    ------
    NotSupportedError
        If this torch release does not have it.
    """
    try:
        return _TO_TORCH[dtype.code]
    except KeyError:
        raise NotSupportedError(
            f"torch {torch.__version__} has no dtype {dtype.name}; a newer release has"
        ) from None


def dtype_of_array(dtype: np.dtype[np.generic]) -> DType:
    """Return the engine's dtype of a numpy array."""
    for known in BY_CODE:
        if known.numpy == dtype:
            return known
    raise NotSupportedError(f"there is no torch dtype for numpy's {dtype}")


def host_memory(tensor: torch.Tensor) -> npt.NDArray[np.generic] | None:
    """Return a tensor's own memory as an array of opaque elements, strides and all.

    None where there is no such thing: on another device, or where the values are lazily
    conjugated or negated.
    """
    if (
        tensor.device.type != "cpu"
        or tensor.layout is not torch.strided
        or tensor.is_conj()
        or tensor.is_neg()
    ):
        return None
    raw = dtype_of(tensor.dtype).raw
    plain = tensor.detach()
    carrier = _CARRIERS.get(raw.itemsize)
    array: npt.NDArray[np.generic] = (plain if carrier is None else plain.view(carrier)).numpy()
    return array.view(raw)


def has_lost_memory(tensor: torch.Tensor) -> bool:
    """Whether a plain tensor has elements and its storage is empty: FSDP frees some so.

    To touch one ends the interpreter.
    """
    if type(tensor) not in _PLAIN or tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return (
        tensor.data_ptr() < LOWEST_ADDRESS
        and tensor.numel() > 0
        and tensor.untyped_storage().nbytes() == 0
    )


def refuse_lost_memory(key: str, tensor: torch.Tensor) -> None:
    """Raise where the tensor of a key has no memory.

    Raises
    ------
    PlanError
    """
    if has_lost_memory(tensor):
        raise PlanError(f"key {key!r}: a tensor of shape {tuple(tensor.shape)}: {NO_MEMORY}")


def wrap(array: npt.NDArray[np.generic], dtype: DType) -> torch.Tensor:
    """Return a tensor over an array's memory; `array` is writable and of `dtype`'s size."""
    carrier = {1: "u1", 2: "<i2", 4: "<i4", 8: "<i8", 16: "<c16"}[dtype.itemsize]
    tensor: torch.Tensor = torch.from_numpy(array.view(carrier))
    return tensor.view(torch_dtype(dtype))


def put_values(
    tensor: torch.Tensor, start: tuple[int, ...], values: npt.NDArray[np.generic], dtype: DType
) -> None:
    """Copy elements into the box of a tensor that begins at `start`, whatever dtype it has."""
    box = tuple(slice(a, a + n) for a, n in zip(start, values.shape, strict=True))
    tensor.detach()[box].copy_(wrap(values, dtype))


def dense_strides(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the strides of a tensor whose memory is dense in some order of its axes.

    None where there are holes or overlaps, or no elements: those are written row-major.
    """
    expected = 1
    axes = sorted(
        (axis for axis in range(tensor.dim()) if tensor.size(axis) != 1),
        key=lambda axis: (tensor.stride(axis), tensor.size(axis)),
    )
    for axis in axes:
        if tensor.stride(axis) != expected:
            return None
        expected *= tensor.size(axis)
    return tuple(tensor.stride()) if expected == tensor.numel() and expected else None


def is_narrowing(saved: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether some value of `saved` cannot be held exactly by `wanted`."""
    if saved == wanted or saved == torch.bool:
        return False
    if wanted == torch.bool or (saved.is_complex and not wanted.is_complex):
        return True
    saved_real, wanted_real = _real(saved), _real(wanted)
    if not wanted_real.is_floating_point:
        if saved_real.is_floating_point:
            return True
        old, new = torch.iinfo(saved_real), torch.iinfo(wanted_real)
        return bool(new.min > old.min or new.max < old.max)
    goal = torch.finfo(wanted_real)
    if saved_real.is_floating_point:
        have = torch.finfo(saved_real)
        return bool(
            goal.eps > have.eps
            or goal.max < have.max
            or goal.smallest_normal > have.smallest_normal
        )
    return bool(
        torch.iinfo(saved_real).max > 2 / goal.eps or torch.iinfo(saved_real).max > goal.max
    )


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype
