"""Keep docs/controls.yml, the tests' marks and the matrix in README.md true to each other.

python scripts/controls.py --check                      every mark names a control, every enforced control has marked tests,
                                                        every listed test exists and carries the mark, the matrix is current
python scripts/controls.py --write                      write the matrix into README.md
python scripts/controls.py --results REPORT.xml …       each test that the list names for an enforced control passed in these
                                                        JUnit files; none was skipped, and no other marked one failed
python scripts/controls.py --some --results REPORT.xml  the same for the reports of some lanes: tests of others are not judged

Exit code 1 with one line for each finding. Marks are read from the source of the tests, so nothing is imported or run.
"""

from __future__ import annotations

import argparse
import ast
import gc
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
    """A test function that carries a control mark. ``file`` is relative to the repository; a thorough one is not always run."""

    file: str
    name: str
    control: str
    thorough: bool = False


def load(root: Path = ROOT) -> list[Control]:
    """Read docs/controls.yml; raises ``msgspec.ValidationError`` when it does not fit."""
    return msgspec.yaml.decode((root / "docs/controls.yml").read_bytes(), type=list[Control])


def parsed(path: Path) -> ast.Module:
    """Return the syntax tree of a file. Nothing is collected meanwhile: what runs within the parser breaks it (gh-106905)."""
    collects = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"), str(path))
    finally:
        if collects:
            gc.enable()


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
            tree = parsed(path)
            shared = [
                mark
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
                for mark in marks_in(node.value)
            ]
            file = str(path.relative_to(root))
            for function, inherited in functions_of(tree.body, shared):
                own = [mark for decorator in function.decorator_list for mark in marks_in(decorator)]
                deep = any(ast.unparse(decorator) == "pytest.mark.thorough" for decorator in function.decorator_list)
                found += [MarkedTest(file, function.name, mark, deep) for mark in dict.fromkeys([*inherited, *own])]
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
            meant = [test for test in own if test.file == file and name in {"", test.name}]
            if not meant:
                yield f"docs/controls.yml: {control.id} lists {entry}, which does not exist or lacks the mark"
            elif control.state == "enforced" and all(test.thorough for test in meant):
                yield f"docs/controls.yml: {control.id} is called enforced and lists {entry}, which `make test` leaves out"


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


@dataclass(frozen=True)
class Outcome:
    """How one test ended over all reports: its cases are the parameters it ran with."""

    failed: frozenset[str] = frozenset()
    passed: frozenset[str] = frozenset()
    skipped: frozenset[str] = frozenset()

    @property
    def word(self) -> str:
        """What keeps the test from being proof: ``failed``, ``was skipped`` or ``did not run``; empty when it passed.

        A case that was skipped in one report and passed in another (a second Python, say) has passed.
        """
        if self.failed:
            return "failed"
        if self.skipped - self.passed:
            return "was skipped"
        return "" if self.passed else "did not run"


def outcomes(reports: Iterable[Path]) -> dict[tuple[str, str], Outcome]:
    """Return the outcome of each ``(module name, test name)`` over JUnit files."""
    cases: dict[tuple[str, str], dict[str, set[str]]] = {}
    for report in reports:
        for case in ET.parse(report).getroot().iter("testcase"):  # noqa: S314 - written by our own pytest run
            modules = [part for part in case.get("classname", "").split(".") if part.startswith("test_")]
            name = case.get("name", "")
            if case.find("failure") is not None or case.find("error") is not None:
                word = "failed"
            else:
                word = "passed" if case.find("skipped") is None else "skipped"
            key = (modules[-1] if modules else "", name.partition("[")[0])
            cases.setdefault(key, {"failed": set(), "passed": set(), "skipped": set()})[word].add(name)
    return {key: Outcome(**{word: frozenset(names) for word, names in found.items()}) for key, found in cases.items()}


def result_findings(
    controls: Sequence[Control], marked: Sequence[MarkedTest], reports: Iterable[Path], *, some: bool = False
) -> Iterator[str]:
    """Yield each enforced control with a test that is no proof in ``reports``.

    Every test that the list names must have passed, but for thorough ones beside others of its file, which `make test` leaves
    out; of the other marked ones none may have failed. ``some`` says that these are the reports of some lanes only: what did
    not run in them is not judged.
    """
    ran = outcomes(reports)
    for control in controls:
        if control.state != "enforced":
            continue
        for test in marked:
            if test.control != control.id:
                continue
            listed = {test.file, f"{test.file}::{test.name}"}.intersection(control.tests)
            word = ran.get((Path(test.file).stem, test.name), Outcome()).word
            if word == "did not run" and (some or test.thorough):
                continue
            if word == "failed" or (word and listed):
                yield f"{control.id} is called enforced and {test.file}::{test.name} {word}"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description="Controls, their tests and the matrix in README.md.")
    parser.add_argument("--check", action="store_true", help="check list, marks and matrix")
    parser.add_argument("--write", action="store_true", help="write the matrix into README.md")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="XML", help="JUnit files that must show them passing"
    )
    parser.add_argument("--some", action="store_true", help="the JUnit files are those of some lanes only")
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
        problems += [f"{path}: no such file" for path in absent] or result_findings(
            controls, marked, options.results, some=options.some
        )
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
