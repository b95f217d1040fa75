"""Runs the ``sh`` blocks of a page in order, as a reader would copy them: each must end well and print what the page shows.

A ``text`` block right behind an ``sh`` block is what it prints: every line of it occurs there, with ``…`` for any run of
characters. Blocks in other languages (``console``, ``yaml``, ``json``) are not run.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec

ROOT = Path(__file__).resolve().parents[3]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(msgspec.Struct, frozen=True):
    """One block: the line on which it begins, its text, and the lines that it is said to print."""

    line: int
    text: str
    shown: tuple[str, ...] = ()


def blocks(page: str) -> Iterator[Block]:
    """Yield the ``sh`` blocks of a page."""
    found = list(_FENCE.finditer(page))
    for place, match in enumerate(found):
        if match[1] != "sh":
            continue
        follower = found[place + 1] if place + 1 < len(found) else None
        shown: tuple[str, ...] = ()
        if follower is not None and follower[1] == "text" and not page[match.end() : follower.start()].strip():
            shown = tuple(line.strip() for line in follower[2].splitlines() if line.strip())
        yield Block(page[: match.start()].count("\n") + 1, match[2], shown)


def files(page: str) -> dict[str, str]:
    """Return the blocks of a page that begin with the name of a file in a comment (``# inside.yml``), by that name."""
    found = {
        re.match(r"# ([\w./-]+\.\w+)\b", match[2]): match[2] for match in _FENCE.finditer(page) if match[1] != "sh"
    }
    return {name[1]: text for name, text in found.items() if name is not None}


def lacks(shown: str, printed: str) -> bool:
    """Tell whether a shown line occurs nowhere in what was printed."""
    return re.search(".*".join(re.escape(part) for part in shown.split("…")), printed) is None


def _placed(text: str, places: Mapping[str, str]) -> str:
    """Return ``text`` with the places of a real host where they lie here."""
    for place, here in places.items():
        text = text.replace(place, here)
    return text


def run_page(
    name: str,
    folder: Path,
    environment: Mapping[str, str],
    read: Callable[[str], Mapping[str, str]] = lambda _: {},
    places: Mapping[str, str] | None = None,
) -> list[str]:
    """Run every block of the page ``name`` in ``folder``; return what each printed.

    ``read`` is the reader: from what a block printed, variables that the next ones use. ``places`` says where directories and
    addresses of a real host lie here, in commands and in what they print. Blocks that begin with a comment alone (``# name``)
    are parts of files and have tests of their own.
    """
    page = (ROOT / name).read_text(encoding="utf-8")
    printed: list[str] = []
    told = {**os.environ, **environment}
    for block in blocks(page):
        if re.match(r"(#!/bin/sh\n)?# [a-z-]+\n", block.text):
            continue
        text, *shown = (_placed(one, places or {}) for one in (block.text, *block.shown))
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=folder,
            env=told,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        where = f"{name}:{block.line}\n{block.text}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == 0, where
        missing = [line for line in shown if lacks(line, done.stdout + done.stderr)]
        assert not missing, f"not printed: {missing}\n{where}"
        printed.append(done.stdout)
        told |= read(done.stdout)
    return printed
