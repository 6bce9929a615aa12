"""What a run of the benchmarks is asked to do."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """Sizes of the cases.

    Attributes
    ----------
    size_mb
        MiB of tensors in the cases of large tensors.
    small
        Tensors of 4 KiB, and as many scalars, in the cases of small values.
    ranks, tensors
        Of the synthetic checkpoint whose metadata is opened and planned.
    cold
        Ask the kernel to drop the files' pages before they are read.
    """

    size_mb: int
    small: int
    ranks: int
    tensors: int
    cold: bool
