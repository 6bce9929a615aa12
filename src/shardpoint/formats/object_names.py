"""Which names an object's record holds that nothing decodes unless it is allowed.

To tell who saves, while there is time; what decides at reading is the decoder alone.
"""

from __future__ import annotations

import pickletools
import re
from collections.abc import Iterator
from itertools import islice

from shardpoint.errors import ShardpointError
from shardpoint.formats._object_resolver import is_listed
from shardpoint.formats.torch_record import read_object_pickle

__all__ = ["is_listed", "likely_names", "unlisted_names"]

# GLOBAL, by which protocol 2, torch.save's, names things. Text may look like it.
_GLOBAL = re.compile(rb"c([\w.\x80-\xff]+)\n([\w.\x80-\xff]+)\n")
_MOST_SEARCHED = 1 << 16
_MOST_OPCODES = 50_000


def unlisted_names(record: bytes) -> list[str]:
    """Return names in a torch.save record that are on no closed list, each once.

    What is no such record, or names things in other ways, gives none.
    """
    # Most records have none: those are not even taken apart, unless tensors make them large.
    if len(record) <= _MOST_SEARCHED and not any(_unlisted(record)):
        return []
    try:
        pickle, _ = read_object_pickle(record, file="(object)", key="", verify=False)
    except ShardpointError:
        return []
    if not any(_unlisted(pickle)):
        return []
    try:
        # As many as take a tenth of a second.
        named = [
            str(argument).replace(" ", ".")
            for opcode, argument, _ in islice(pickletools.genops(pickle), _MOST_OPCODES)
            if opcode.name == "GLOBAL"
        ]
    except ValueError:
        return []
    return [name for name in dict.fromkeys(named) if not is_listed(name)]


def likely_names(record: bytes) -> frozenset[tuple[bytes, bytes]]:
    """Return what look like names in a record of moderate size; others are not looked at."""
    return frozenset(_GLOBAL.findall(record) if len(record) <= _MOST_SEARCHED else ())


def _unlisted(data: bytes) -> Iterator[bool]:
    for match in _GLOBAL.finditer(data):
        yield not is_listed(b".".join(match.groups()).decode(errors="replace"))
