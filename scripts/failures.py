"""Name each failure of a lane on one line, with what it said last: the end of a long log tells the whole story.

    python scripts/failures.py FILE [FILE ...]

A file is a JUnit report, of which each failed test is told, or molecule's output (``*.log``), of which each failed task and test
is told with its scenario and stage. A file that is missing or cut off (its program was ended) is named too. Always ends with 0:
who calls this knows of the failure.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

WIDTH = 300
MOST = 20
STAGE = re.compile(r"^INFO\s+(\[\S+ > \S+\]) Executing")
TASK = re.compile(r"^TASK \[(.+?)\] \*")
TROUBLE = re.compile(r"^(fatal: |failed: |FAILED |ERROR |ERROR! )")
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
RESCUED = re.compile(r"^\.\.\.ignoring$")


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


def troubles(log: Path) -> Iterator[str]:
    """Yield ``[scenario > stage] task: message`` for each trouble in molecule's output, but for failures that were ignored."""
    try:
        lines = ESCAPES.sub("", log.read_text(encoding="utf-8", errors="replace")).splitlines()
    except OSError as problem:
        yield short(f"{log}: no log of this lane ({problem})")
        return
    stage = task = ""
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if found := STAGE.match(line):
            stage, task = found[1], ""
        elif found := TASK.match(line):
            task = found[1]
        elif TROUBLE.match(line) and not RESCUED.match(following):
            yield short(f"{stage} {task}: {line}" if line.startswith(("fatal: ", "failed: ")) else f"{stage} {line}")


def main(reports: list[str]) -> int:
    """Print them all, at most ``MOST``."""
    files = [Path(report) for report in reports]
    told = [line for file in files for line in (troubles(file) if file.suffix == ".log" else failures(file))]
    for line in told[:MOST]:
        print(f"    {line}")
    if len(told) > MOST:
        print(f"    and {len(told) - MOST} more")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
