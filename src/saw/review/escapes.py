"""Text of an agent or a far end as people may see it: nothing steers a terminal, hides, or passes for something else."""

from __future__ import annotations


def escape(text: str) -> str:
    """Return ``text`` with backslashes and what is not printable written as escapes; a tabulator is ``\\t``."""
    return "".join(
        "\\\\" if character == "\\" else character if character.isprintable() else _code(character)
        for character in text
    )


def plain(text: str) -> str:
    """Return ``text`` like :func:`escape`, and everything beyond ASCII too: names must not pass for other names."""
    return "".join(character if character.isascii() else _code(character) for character in escape(text))


def _code(character: str) -> str:
    return "\\t" if character == "\t" else f"\\u{{{ord(character):x}}}"
