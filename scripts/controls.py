"""Keep docs/controls.yml, the tests' marks and the matrix in README.md true to each other.

python scripts/controls.py --check                      every mark names a control, every enforced control has marked tests,
                                                        every listed test exists and carries the mark, the matrix is current
python scripts/controls.py --write                      write the matrix into README.md
python scripts/controls.py --results REPORT.xml …       every enforced control has a test that passed, and none that failed,
                                                        in these JUnit files

Exit code 1 with one line for each finding. Marks are read from the source of the tests, so nothing is imported or run.
"""

from __future__ import annotations

import argparse
import ast
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

ROOT = Path(__file__).resolve().parents[1]
TEST_ROOTS = ("tests", "molecule")
BEGIN, END = "<!-- controls: begin, written by scripts/controls.py -->", "<!-- controls: end -->"
PHASES = {"0": "Phase 0: the managed VM", "I": "Phase I: outside the VM", "II": "Phase II: signed policy at run time"}


class Control(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of docs/controls.yml."""

    id: str
    title: str
    phase: Literal["0", "I", "II"]
    state: Literal["enforced", "partial", "planned"]
    tests: tuple[str, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class MarkedTest:
    """A test function that carries a control mark. ``file`` is relative to the repository."""

    file: str
    name: str
    control: str


def load(root: Path = ROOT) -> list[Control]:
    """Read docs/controls.yml; raises ``msgspec.ValidationError`` when it does not fit."""
    return msgspec.yaml.decode((root / "docs/controls.yml").read_bytes(), type=list[Control])


def marks_in(node: ast.AST) -> Iterator[str]:
    """Yield the id of every ``pytest.mark.control("ID")`` below ``node``, decorators and parameters included."""
    for call in ast.walk(node):
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.control":
            first = call.args[0] if call.args else None
            yield str(first.value) if isinstance(first, ast.Constant) else ast.unparse(call)


def marked_tests(root: Path = ROOT) -> list[MarkedTest]:
    """Return every test that pytest would collect and that carries a mark of its own, its class's or its module's."""
    found = []
    for top in TEST_ROOTS:
        for path in sorted((root / top).rglob("test_*.py")):
            tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
            shared = [
                mark
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
                for mark in marks_in(node.value)
            ]
            file = str(path.relative_to(root))
            for function, inherited in functions_of(tree.body, shared):
                own = [mark for decorator in function.decorator_list for mark in marks_in(decorator)]
                found += [MarkedTest(file, function.name, mark) for mark in dict.fromkeys([*inherited, *own])]
    return found


def functions_of(
    body: Iterable[ast.stmt], inherited: list[str]
) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, list[str]]]:
    """Yield the test functions of a module's or class's body with the marks they inherit."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test"):
            yield node, inherited
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            own = [mark for decorator in node.decorator_list for mark in marks_in(decorator)]
            yield from functions_of(node.body, [*inherited, *own])


def findings(controls: Sequence[Control], marked: Sequence[MarkedTest]) -> Iterator[str]:
    """Yield what is wrong between the list and the marks."""
    known = {control.id for control in controls}
    for name, count in Counter(control.id for control in controls).items():
        if count > 1:
            yield f"docs/controls.yml: {name} is listed {count} times"
    for test in marked:
        if test.control not in known:
            yield f"{test.file}::{test.name}: there is no control {test.control!r} in docs/controls.yml"
    for control in controls:
        own = [test for test in marked if test.control == control.id]
        if control.state == "enforced" and not (own and control.tests):
            yield f"docs/controls.yml: {control.id} is called enforced without a marked test"
        if control.state == "planned" and control.tests:
            yield f"docs/controls.yml: {control.id} is called planned and lists tests"
        if control.state == "partial" and not control.note:
            yield f"docs/controls.yml: {control.id} is partial; its note must say what is missing"
        for entry in control.tests:
            file, _, name = entry.partition("::")
            if not any(test.file == file and name in {"", test.name} for test in own):
                yield f"docs/controls.yml: {control.id} lists {entry}, which does not exist or lacks the mark"


def matrix(controls: Sequence[Control]) -> str:
    """Return the matrix in Markdown."""
    states = Counter(control.state for control in controls)
    count = ", ".join(f"{states[state]} {state}" for state in ("enforced", "partial", "planned"))
    meaning = (
        "*Enforced*: tests show the bad case refused for the intended reason. *Partial*: the note says what is missing."
    )
    lines = [f"{count}. {meaning}"]
    for phase, title in PHASES.items():
        lines += ["", f"**{title}**", "", "| control | | state | proof |", "|---|---|---|---|"]
        for control in controls:
            if control.phase != phase:
                continue
            files = dict.fromkeys(entry.partition("::")[0] for entry in control.tests)
            proof = ", ".join(f"[{Path(file).stem.removeprefix('test_')}]({file})" for file in files)
            text = f"{control.title}." + (f" *{control.note}*" if control.note else "")
            lines.append(f"| {control.id} | {text} | {control.state} | {proof} |")
    return "\n".join(lines)


def with_matrix(readme: str, controls: Sequence[Control]) -> str:
    """Return ``readme`` with the matrix between its markers."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"README.md lacks the lines {BEGIN!r} and {END!r}")
    return f"{head}{BEGIN}\n\n{matrix(controls)}\n\n{END}{tail}"


def outcomes(reports: Iterable[Path]) -> Iterator[tuple[str, str, bool]]:
    """Yield ``(module name, test name, passed)`` for each test that ran; skipped ones did not run."""
    for report in reports:
        for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - written by our own pytest run
            if case.find("skipped") is not None:
                continue
            modules = [part for part in case.get("classname", "").split(".") if part.startswith("test_")]
            passed = case.find("failure") is None and case.find("error") is None
            yield (modules[-1] if modules else ""), case.get("name", "").partition("[")[0], passed


def result_findings(
    controls: Sequence[Control], marked: Sequence[MarkedTest], reports: Iterable[Path]
) -> Iterator[str]:
    """Yield each enforced control without a passing test, and each whose marked test failed, in ``reports``."""
    ran: dict[tuple[str, str], list[bool]] = {}
    for module, name, passed in outcomes(reports):
        ran.setdefault((module, name), []).append(passed)
    for control in controls:
        if control.state != "enforced":
            continue
        own = {(Path(test.file).stem, test.name) for test in marked if test.control == control.id}
        failed = sorted(f"{module}::{name}" for module, name in own if not all(ran.get((module, name), [])))
        if failed:
            yield f"{control.id} is called enforced and its tests failed: {', '.join(failed)}"
        elif not any(ran.get(test) for test in own):
            yield f"{control.id} is called enforced and none of its tests ran and passed"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Controls, their tests and the matrix in README.md.")
    parser.add_argument("--check", action="store_true", help="check list, marks and matrix")
    parser.add_argument("--write", action="store_true", help="write the matrix into README.md")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="XML", help="JUnit files that must show them passing"
    )
    options = parser.parse_args(argv)
    if not (options.check or options.write or options.results):
        parser.error("say --check, --write or --results")
    controls, marked = load(root), marked_tests(root)
    readme = root / "README.md"
    problems = []
    if options.write:
        readme.write_text(with_matrix(readme.read_text(encoding="utf-8"), controls), encoding="utf-8")
    if options.check:
        problems += findings(controls, marked)
        text = readme.read_text(encoding="utf-8")
        if with_matrix(text, controls) != text:
            problems.append("README.md: the control matrix is not current: python scripts/controls.py --write")
    if options.results:
        absent = [str(path) for path in options.results if not path.is_file()]
        problems += [f"{path}: no such file" for path in absent] or result_findings(controls, marked, options.results)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
