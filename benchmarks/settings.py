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
    llama_mb
        MiB of model and optimizer in the case of a Llama-shaped model.
    tensors
        Of the synthetic checkpoints of many ranks, whose metadata is opened and planned.
    cold
        Ask the kernel to drop the files' pages before they are read.
    """

    size_mb: int
    small: int
    llama_mb: int
    tensors: int
    cold: bool
