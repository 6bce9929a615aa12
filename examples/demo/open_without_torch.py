"""Opens the demo's checkpoint where torch cannot be imported; fails if a value is not as saved."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

# As if it were not installed: from here on `import torch` raises ImportError.
sys.modules["torch"] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
from digests import differences, digest  # noqa: E402

import shardpoint  # noqa: E402

_KEY = "model.blocks.0.feed_forward.0.weight"


def main(folder: str, expected_file: str) -> None:
    """Print what is in the checkpoint; compare every tensor with its fingerprint."""
    expected = json.loads(Path(expected_file).read_text())
    started = time.perf_counter()
    checkpoint = shardpoint.open(folder)
    print(f"shardpoint.open: {1e3 * (time.perf_counter() - started):.1f} ms, {checkpoint!r}")
    print(f"keys: {', '.join([*checkpoint.keys()][:3])}, ... {len(checkpoint)} in all")

    info = checkpoint.info(_KEY)
    assert isinstance(info, shardpoint.TensorInfo)
    print(f"{_KEY}: {info.dtype} {info.shape}, {info.nbytes:,} bytes, stored in")
    for chunk in info.chunks:
        last = tuple(o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True))
        print(f"    {chunk.file}: {chunk.offsets} up to {last}")

    rows, columns = slice(60, 66), slice(0, 3)
    part = checkpoint.read(_KEY, (rows, columns))
    if not np.array_equal(part, checkpoint[_KEY][rows, columns]):
        raise SystemExit(f"a slice of {_KEY} is not the same part of the whole")
    print(f"rows 60 to 65, across two files, first columns: {part[0]} ... {part[-1]}")
    print(
        f"objects: step = {checkpoint['step']!r}, data.position = "
        f"{checkpoint['data.position']!r}, schedule.last_epoch = "
        f"{checkpoint['schedule.last_epoch']!r}"
    )
    if checkpoint["step"] != expected["step"]:
        raise SystemExit(f"step is {checkpoint['step']!r}, saved was {expected['step']!r}")

    report = checkpoint.verify()
    print(f"verify: {report}")
    if not report.ok:
        raise SystemExit("verify found problems in a checkpoint that is whole")
    found = {key: digest(checkpoint[key]) for key in expected["digests"] if key in checkpoint}
    if wrong := differences(expected["digests"], found):
        raise SystemExit("read without torch: " + "; ".join(wrong[:5]))
    print(f"{len(found)} tensors of model and optimizer: bit for bit as they were in training")
    if any(name.split(".")[0] == "torch" and module for name, module in sys.modules.items()):
        raise SystemExit("torch has been imported after all")


if __name__ == "__main__":
    main(*sys.argv[1:])
