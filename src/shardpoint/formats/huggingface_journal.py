"""The journal of a save of safetensors files, which makes several files appear as one.

Names of such files are fixed (``model-00001-of-00003.safetensors``), so new ones take the place
of old ones, one after the other. While that goes on, and if it is broken off, the folder has a
small file ``.shardpoint-replacing.json``, put there and taken away atomically:

``committed``
    True: the files in ``files``, all temporary names, are complete and count under the names
    that they get; those in ``remove`` count no more. False: ``files`` are final names, in a
    store where renaming copies, and none of them counts yet.
``save``
    Which save it is; any text.

A temporary name is ``.NAME.<16 hexadecimal digits>.tmp`` in the folder where NAME is to be, so
it says by itself what becomes of it. Whoever wrote a journal, it can only speak of files with
names that a save gives.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NoReturn

from shardpoint.errors import FormatError, LimitExceededError
from shardpoint.formats.huggingface_writing import INDEX_NAME

__all__ = [
    "JOURNAL_NAME",
    "MAX_JOURNAL_BYTES",
    "Journal",
    "decode_journal",
    "final_name",
    "is_full_file",
    "is_shard",
    "is_temporary",
    "temporary_name",
]

JOURNAL_NAME = ".shardpoint-replacing.json"
MAX_JOURNAL_BYTES = 32 << 20
"""Room for some 400,000 files."""

_VERSION = 1
_FULL = r"model-\d{5,9}-of-\d{5,9}\.safetensors"
_FULL_FILE = re.compile(rf"{_FULL}|model\.safetensors")
_SHARD = re.compile(rf"(?:sharded/)?shard-\d{{5,9}}-{_FULL}|sharded/{_FULL}")
_TEMPORARY = re.compile(
    rf"(?P<folder>(?:sharded/)?)\."
    rf"(?P<base>(?:shard-\d{{5,9}}-)?{_FULL}|{re.escape(INDEX_NAME)})\.[0-9a-f]{{16}}\.tmp"
)
_OF_JOURNAL = re.compile(rf"\.{re.escape(JOURNAL_NAME)}\.[0-9a-f]{{16}}\.tmp")


@dataclass(frozen=True, slots=True)
class Journal:
    """What a journal says; see the module.

    Attributes
    ----------
    is_committed
        Whether the save counts.
    files
        The new files: by their temporary names if it counts, else by their final ones.
    removed
        The files that count no more.
    save_id
        Which save it is.
    """

    is_committed: bool
    files: tuple[str, ...]
    removed: tuple[str, ...]
    save_id: str

    def encode(self) -> bytes:
        """Return the file's content.

        Raises
        ------
        LimitExceededError
            If it is more than is ever read.
        """
        content = {
            "format": "shardpoint-replacing",
            "version": _VERSION,
            "committed": self.is_committed,
            "save": self.save_id,
            "files": self.files,
            "remove": self.removed,
        }
        data = json.dumps(content, separators=(",", ":")).encode()
        _check_size(data)
        return data

    @property
    def finals(self) -> dict[str, str]:
        """Final name to temporary name; of a save that counts."""
        return {final_name(name): name for name in self.files}


def temporary_name(name: str, token: str) -> str:
    """Return where a file is written until it counts; `token` is 16 hexadecimal digits."""
    folder, slash, base = name.rpartition("/")
    return f"{folder}{slash}.{base}.{token}.tmp"


def final_name(temporary: str) -> str:
    """Return what a file with a temporary name is to be called.

    Raises
    ------
    FormatError
        If this is no such name.
    """
    match = _TEMPORARY.fullmatch(temporary)
    if match is None:
        raise FormatError(f"{temporary!r:.200} is no temporary name of a safetensors file")
    return match["folder"] + match["base"]


def is_temporary(name: str) -> bool:
    """Whether a save gives a file this name until it counts; the journal's own included."""
    return bool(_TEMPORARY.fullmatch(name) or _OF_JOURNAL.fullmatch(name))


def is_full_file(name: str) -> bool:
    """Whether this is the name of a file of whole tensors; others than this package write them."""
    return _FULL_FILE.fullmatch(name) is not None


def is_shard(name: str) -> bool:
    """Whether this is the name of one rank's file."""
    return _SHARD.fullmatch(name) is not None


def decode_journal(data: bytes) -> Journal:
    """Return what a journal says; nothing in it is trusted.

    Raises
    ------
    LimitExceededError
        If it is larger than any that a save writes.
    FormatError
        If it is not what its format says, or names a file that no save writes.
    """
    _check_size(data)
    if data.count(b"[") > 2 or data.count(b"{") > 1:
        _fail("holds more than two lists")  # which may take many times their bytes of memory
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        _fail(f"is not JSON: {error}")
    if not isinstance(content, dict) or content.get("format") != "shardpoint-replacing":
        _fail("is no journal of a save")
    if content.get("version") != _VERSION:
        _fail(f"has version {content.get('version')!r:.50}: wanted is {_VERSION}")
    is_committed, save_id = content.get("committed"), content.get("save")
    if not isinstance(is_committed, bool) or not isinstance(save_id, str):
        _fail("does not say which save it is, or whether that counts")
    files = _names(content, "files")
    removed = _names(content, "remove")
    finals = [final_name(name) for name in files] if is_committed else files
    for name in {*finals, *removed}:
        if not (is_full_file(name) or is_shard(name) or name == INDEX_NAME):
            _fail(f"names {name!r:.200}, which is no file that a save writes")
    if len({*finals, *removed}) != len(finals) + len(removed):
        _fail("names a file twice")
    return Journal(is_committed, files, removed, save_id)


def _check_size(data: bytes) -> None:
    if len(data) > MAX_JOURNAL_BYTES:
        raise LimitExceededError(
            f"file {JOURNAL_NAME!r} has {len(data)} bytes: at most {MAX_JOURNAL_BYTES} are read"
        )


def _names(content: dict[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        _fail(f"has no list of names {key!r}")
    return tuple(names)


def _fail(what: str) -> NoReturn:
    raise FormatError(
        f"file {JOURNAL_NAME!r} {what}; if no save is to be finished here, remove that file"
    )
