"""Lines of what a reviewer sees of a push: each begins with what it is, so that no content passes for anything else.

``!`` warns, ``#`` and ``##`` are headings, ``@`` says where a part of a file lies, ``|`` is text that somebody wrote about the
change, ``+`` an added line, ``-`` a removed one, two blanks an unchanged one, ``=`` a line that is compared with nothing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from saw.review.escapes import escape, plain

MAX_CONTENT_LINES = 20_000
"""Most lines of files and messages that are shown of one push."""
MAX_CONTENT = 1024 * 1024
"""Most characters of them."""
MAX_LINE = 500
"""Most characters of one line."""

Sign = Literal["+", "-", " ", "=", "|"]
LineKind = Literal["warning", "ref", "part", "place", "added", "removed", "same", "plain", "said", "fact"]
_KINDS: dict[str, LineKind] = {
    "! ": "warning", "# ": "ref", "##": "part", "@ ": "place", "+ ": "added", "- ": "removed", "  ": "same", "= ": "plain",
    "| ": "said",
}  # fmt: skip


class Out:
    """Lines as they are made. Content counts against the bounds; what is beyond them is counted in ``cut``."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.cut = 0
        self._lines_left = MAX_CONTENT_LINES
        self._left = MAX_CONTENT

    def say(self, *lines: str) -> None:
        """Add lines of our own."""
        self.lines += lines

    def content(self, sign: Sign, raw: bytes) -> bool:
        """Add a line that somebody wrote; return False, and count it, when there is no room for it."""
        if self._lines_left <= 0 or self._left <= 0:
            self.cut += 1
            return False
        text = raw.decode("utf-8", "surrogateescape")
        more = len(text) - MAX_LINE
        line = f"{sign} {escape(text[:MAX_LINE])}"
        if more > 0:
            line += f" … {more} more characters of this line are NOT shown"
        self._lines_left -= 1
        self._left -= len(line)
        self.lines.append(line)
        return True


def ascii_only(raw: bytes, most: int = 1024) -> str:
    """Return the first ``most`` bytes of a name in plain ASCII (:func:`saw.review.escapes.plain`), and how many are left out."""
    shown = plain(raw[:most].decode("utf-8", "surrogateescape"))
    return shown if len(raw) <= most else f"{shown} … {len(raw) - most} more bytes of this name are NOT shown"


def quoted(path: bytes) -> str:
    """Return a path in quotation marks, escaped."""
    return '"' + ascii_only(path).replace('"', '\\"') + '"'


def counted(number: int, what: str) -> str:
    """Return a number and what it counts."""
    return f"{number} {what}" + ("" if number == 1 else "s")


class Part(msgspec.Struct):
    """Lines under a heading, each with what it is. ``level`` is 0 for those before the first one."""

    level: int
    title: str
    lines: list[tuple[LineKind, str]]


def parts(rendering: str) -> list[Part]:
    """Return the text of a push by its headings, in order and whole, for a page."""
    found = [Part(0, "", [])]
    for line in rendering.removesuffix("\n").split("\n"):
        kind = _KINDS.get(line[:2], "fact")
        if kind in {"ref", "part"}:
            found.append(Part(1 if kind == "ref" else 2, line.lstrip("#").strip(), []))
        elif line:
            found[-1].lines.append((kind, line))
    return found
