"""One fingerprint for tensors, whoever holds them: training, numpy alone, or torch's own loader."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["differences", "digest"]


def digest(array: npt.NDArray[Any]) -> str:
    """Return a fingerprint of an array: its dtype, its shape and every bit of its values."""
    fingerprint = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    fingerprint.update(np.ascontiguousarray(array).tobytes())
    return fingerprint.hexdigest()


def differences(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """Name the keys that only one side has, or whose fingerprints are not the same."""
    return [
        f"{key}: {'not there' if key not in found else 'not the saved bits'}"
        for key in sorted(wanted.keys() | found.keys())
        if wanted.get(key) != found.get(key)
    ]
