"""Block-scaled weights to plain ones, for any box of them.

Two layouts, as Hugging Face's checkpoints of large models have them:

- a matrix of 8-bit elements (``x.weight``) with one scale for each square block
  (``x.weight_scale_inv``): the value is the element times the scale;
- MXFP4 (``x_blocks`` with ``x_scales``; source: the OCP Microscaling Formats specification,
  and gpt-oss's checkpoints): bytes ``[..., groups, bytes]`` of two 4-bit floats each, the low
  half first, and for each group a power of two with the bias 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from shardpoint.errors import NotSupportedError, PlanError, Problem

__all__ = ["Pairs", "block_boxes", "dequantize_blocks", "dequantize_mxfp4", "find_pairs"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""

_SCALES = (".weight_scale_inv", ".weight"), ("_scales", "_blocks")
_BAND = 4 << 20  # elements that are converted at a time
_BIAS = 127
_HALVES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = torch.tensor([*_HALVES, *(-value for value in _HALVES)])

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Pairs:
    """Quantised weights with their scales.

    Attributes
    ----------
    scales
        Key of the weight to key of its scales.
    shapes
        Key of the weight to its shape once dequantised.
    """

    scales: dict[str, str]
    shapes: dict[str, tuple[int, ...]]


def find_pairs(stored: Shapes, block_size: int) -> Pairs:
    """Find the quantised weights among all tensors, by their names.

    Raises
    ------
    NotSupportedError
        If a weight has another number of axes than its layout; names all of them.
    PlanError
        If scales do not fit their weights; names all of them.
    """
    scales: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    unknown: list[Problem] = []
    misfits: list[Problem] = []
    for key, shape in stored.items():
        for end, weight_end in _SCALES:
            weight = key.removesuffix(end) + weight_end
            if not key.endswith(end) or weight not in stored:
                continue
            found = stored[weight]
            if weight_end == ".weight":
                if len(found) != 2:
                    unknown.append(Problem(f"is quantised and has shape {found}", weight))
                    continue
                wanted: tuple[int, ...] = tuple(-(-size // block_size) for size in found)
                dequantised: tuple[int, ...] = found
            else:
                if len(found) < 2:
                    unknown.append(Problem(f"is quantised and has shape {found}", weight))
                    continue
                wanted = found[:-1]
                dequantised = (*found[:-2], found[-2] * found[-1] * 2)
            if shape != wanted:
                misfits.append(Problem(f"has shape {shape}, wanted is {wanted}", key))
            scales[weight] = key
            shapes[weight] = dequantised
    if unknown:
        lines = "\n".join(f"  - {problem}" for problem in unknown)
        raise NotSupportedError(f"these weights cannot be dequantised:\n{lines}")
    if misfits:
        raise PlanError(f"scales do not fit blocks of {block_size}", misfits)
    return Pairs(scales, shapes)


def block_boxes(box: Box, block_size: int) -> Box:
    """Return the box of scales that a box of a matrix needs."""
    offsets, sizes = box
    first = tuple(offset // block_size for offset in offsets)
    last = tuple(
        -(-(offset + size) // block_size) if size else start
        for offset, size, start in zip(offsets, sizes, first, strict=True)
    )
    return first, tuple(b - a for a, b in zip(first, last, strict=True))


def dequantize_blocks(
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: tuple[int, ...],
    block_size: int,
    into: torch.Tensor,
    through: torch.dtype,
) -> None:
    """Fill `into` with a box of a matrix.

    Parameters
    ----------
    weight
        The box's elements.
    scales
        Those of `block_boxes`.
    offsets
        Where the box begins.
    through
        The dtype that values are rounded to before they are converted to `into`'s.
    """
    rows, columns = weight.shape
    if not rows or not columns:
        return
    scales = scales.to(torch.float32)
    column_blocks = _blocks(offsets[1], columns, block_size)
    row_blocks = _blocks(offsets[0], rows, block_size)
    step = max(1, _BAND // columns)
    for start in range(0, rows, step):
        band = weight[start : start + step].to(torch.float32)
        band *= scales[row_blocks[start : start + step]][:, column_blocks]
        into[start : start + step].copy_(band.to(through))


def _blocks(offset: int, count: int, block_size: int) -> torch.Tensor:
    """Return for each of `count` rows from `offset` on which row of the scales it has."""
    positions = torch.arange(offset, offset + count)
    return positions // block_size - offset // block_size


def dequantize_mxfp4(
    blocks: torch.Tensor,
    scales: torch.Tensor,
    skipped: int,
    into: torch.Tensor,
    through: torch.dtype,
) -> None:
    """Fill `into` with a box of an MXFP4 tensor.

    Parameters
    ----------
    blocks
        ``uint8[..., groups, bytes]``, the groups that the box touches.
    scales
        ``uint8[..., groups]``.
    skipped
        How many values of the first group are before the box.
    """
    if not into.numel():
        return
    *outer, groups, width = blocks.shape
    count = into.shape[-1]
    flat = blocks.reshape(-1, groups, width)
    powers = scales.reshape(-1, groups)
    target = into.reshape(-1, count) if into.is_contiguous() else None
    filled = target if target is not None else torch.empty(len(flat), count, dtype=into.dtype)
    step = max(1, _BAND // (groups * width * 2))
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        values = torch.empty(*part.shape, 2)
        values[..., 0] = _VALUES[(part & 15).long()]
        values[..., 1] = _VALUES[(part >> 4).long()]
        exponents = powers[start : start + step].to(torch.int32) - _BIAS
        values = torch.ldexp(values, exponents[..., None, None])
        row = values.reshape(len(part), groups * width * 2)[:, skipped : skipped + count]
        filled[start : start + step].copy_(row.to(through))
    if target is None:
        into.copy_(filled.reshape(*outer, count))
