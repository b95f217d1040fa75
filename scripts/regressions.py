"""Keep the tests' marks and docs/regressions.md true to each other.

python scripts/regressions.py            writes the list of tests into the page
python scripts/regressions.py --check    exits 1 when a failure has no test, a mark no failure, or the list is not current

A test carries ``@pytest.mark.regression("CVE-…")``. Marks are read from the source of the tests, so nothing is imported or run.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/regressions.md")
BEGIN, END = "<!-- tests: begin, written by scripts/regressions.py -->", "<!-- tests: end -->"
_ROW = re.compile(r"^\| ((?:CVE|AGT)-[A-Z0-9-]+) \|", re.MULTILINE)


def marked(root: Path = ROOT) -> Iterator[tuple[str, str, str]]:
    """Yield failure, file and name of each marked test; a mark without a plain text is its own source."""
    for path in sorted((root / "tests").rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.regression" not in text:
            continue
        for node in ast.walk(ast.parse(text, str(path))):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or not node.name.startswith("test"):
                continue
            for call in node.decorator_list:
                if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.regression":
                    first = call.args[0] if call.args else None
                    failure = str(first.value) if isinstance(first, ast.Constant) else ast.unparse(call)
                    yield failure, str(path.relative_to(root)), node.name


def section(known: list[str], tests: list[tuple[str, str, str]]) -> str:
    """Return the list in Markdown, in the order of the page."""
    lines = []
    for failure in known:
        lines.append(f"- {failure}")
        lines += [f"  - [{name}](../{file})" for one, file, name in tests if one == failure]
    return "\n".join(["", *lines, ""])


def findings(page: str, tests: list[tuple[str, str, str]]) -> Iterator[str]:
    """Yield what is wrong between page and marks."""
    known = _ROW.findall(page)
    yield from (f"{PAGE}: {one} is there {known.count(one)} times" for one in set(known) if known.count(one) > 1)
    yield from (f"{PAGE}: {one} has no marked test" for one in known if one not in {failure for failure, _, _ in tests})
    yield from (f"{file}::{name}: {PAGE} has no {failure!r}" for failure, file, name in tests if failure not in known)


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(arguments)
    page, tests = (root / PAGE).read_text(encoding="utf-8"), sorted(marked(root))
    before, begin, rest = page.partition(BEGIN)
    _, end, behind = rest.partition(END)
    wrong = list(findings(page, tests)) if begin and end else [f"{PAGE}: the marks of the list are missing"]
    new = f"{before}{BEGIN}\n{section(_ROW.findall(page), tests)}\n{END}{behind}"
    if options.check and not wrong and new != page:
        wrong = [f"{PAGE} is not current: run python scripts/regressions.py"]
    if not options.check and begin and end:
        (root / PAGE).write_text(new, encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
