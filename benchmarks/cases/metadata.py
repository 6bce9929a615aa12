"""The `.metadata` file of 512 ranks: made out of what is known, and taken apart again.

In memory, so that the file system has no part in it. torch pickles objects that are there
already; shardpoint writes the same bytes out of its columns.
"""

from __future__ import annotations

import pickle
from typing import Any

from measuring import Measurement, measure
from synthetic import index_of_many, metadata_of_many

from cases import Case, Job
from shardpoint.formats.dcp_metadata import read_metadata, write_metadata

__all__ = ["CASES"]

_RANKS = 512


def _run(job: Job) -> dict[str, Measurement]:
    tensors = job.settings.tensors
    results: list[Any] = []
    if job.contender == "torch":
        metadata = metadata_of_many(_RANKS, tensors)
        writing = measure(lambda: results.append(pickle.dumps(metadata)))
        data = results.pop()
        reading = measure(lambda: results.append(pickle.loads(data)))
        if results.pop().storage_data != metadata.storage_data:
            raise ValueError("other places came back than were written")
        return {"write": writing, "read": reading}
    index = index_of_many(_RANKS, tensors)
    writing = measure(lambda: results.append(write_metadata(index)))
    data = results.pop()
    reading = measure(lambda: results.append(read_metadata(data, file=".metadata")))
    found = results.pop()
    for name in ("tensor", "offsets", "sizes", "record_offset", "record_length"):
        if (getattr(found.chunks, name) != getattr(index.chunks, name)).any():
            raise ValueError(f"another {name} came back than was written")
    return {"write": writing, "read": reading}


CASES = [
    Case(
        "metadata",
        f".metadata of {_RANKS} ranks, in memory",
        ("torch", "shardpoint"),
        _run,
    )
]
