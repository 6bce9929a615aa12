"""Text that is safe and readable on a terminal."""

from __future__ import annotations

__all__ = ["counted", "one_line", "printable", "sizes_text", "with_unit"]

_UNITS = ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB")


def printable(text: str) -> str:
    """Escape everything that does not print as itself, as Python's string literals do.

    A checkpoint's author chooses its keys and file names: they may hold sequences that move
    the cursor, change the window's title or turn the direction of writing.
    """
    if text.isprintable() and "\\" not in text:
        return text
    return "".join(
        character
        if character.isprintable() and character != "\\"
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def one_line(text: str) -> str:
    """Return a message of ours without line ends, and with everything else escaped.

    Backslashes stay: messages have keys as Python literals already.
    """
    joined = " ".join(line.strip() for line in text.split("\n") if line.strip())
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in joined
    )


def counted(number: int, noun: str) -> str:
    """Return ``"1 file"``, ``"2,000 files"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def with_unit(nbytes: int) -> str:
    """Return ``"1,234,567 bytes (1.2 MiB)"``."""
    exact = counted(nbytes, "byte")
    # Integer arithmetic: a damaged index may claim more than a float can hold.
    power = min((max(nbytes, 1).bit_length() - 1) // 10, len(_UNITS))
    if power == 0:
        return exact
    tenths = nbytes * 10 >> 10 * power
    return f"{exact} ({tenths // 10:,}.{tenths % 10} {_UNITS[power - 1]})"


def sizes_text(sizes: tuple[int, ...]) -> str:
    """Return ``"[8, 16]"``."""
    return f"[{', '.join(map(str, sizes))}]"
