"""Name each failed test of some JUnit files on one line, with what it said last: the end of a long log tells the whole story.

    python scripts/failures.py FILE [FILE ...]

A file that is missing or cut off (its program was ended) is named too. Always ends with 0: who calls this knows of the failure.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

WIDTH = 300
MOST = 20


def short(text: str) -> str:
    """Return ``text`` on one line of at most ``WIDTH`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 1]}…"


def failures(report: Path) -> Iterator[str]:
    """Yield ``module::test: message`` for each failure and error in a JUnit file.

    The file is our own test runner's, so it is read with the standard parser.
    """
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))  # noqa: S314
    except (OSError, ElementTree.ParseError) as problem:
        yield short(f"{report}: no whole report of this lane ({problem})")
        return
    for case in cases:
        for trouble in (*case.findall("failure"), *case.findall("error")):
            name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name', '')}"
            yield f"{name}: {short(trouble.get('message') or trouble.text or 'no message')}"


def main(reports: list[str]) -> int:
    """Print them all, at most ``MOST``."""
    told = [line for report in reports for line in failures(Path(report))]
    for line in told[:MOST]:
        print(f"    {line}")
    if len(told) > MOST:
        print(f"    and {len(told) - MOST} more")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
