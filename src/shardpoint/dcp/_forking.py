"""torch in processes that were forked."""

from __future__ import annotations

import os

import torch

__all__ = ["make_ready_for_threads"]

_ready_in = -1


def make_ready_for_threads() -> None:
    """Let torch make its own pool of threads now, once in a process.

    Threads of a forked process that need the pool at the same moment, and are the first to, can
    find none: torch 2.13 then fails with "Invalid thread pool!", in about one of 150 loads that
    convert values.
    """
    global _ready_in
    if _ready_in != os.getpid():
        torch.set_num_threads(torch.get_num_threads())
        _ready_in = os.getpid()
