"""scripts/failures.py: the last lines of a failed run name what failed and why."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts/failures.py"
SPEC = importlib.util.spec_from_file_location("failures", SCRIPT)
assert SPEC is not None
assert SPEC.loader is not None
failures = importlib.util.module_from_spec(SPEC)
sys.modules["failures"] = failures
SPEC.loader.exec_module(failures)


def test_failures_and_errors_are_named_with_their_message_and_what_passed_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "unit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.unit.test_a" name="test_good"/>'
        '<testcase classname="tests.unit.test_a" name="test_bad[x]"><failure message="Error: 1&#10;  is not 2"/></testcase>'
        '<testcase classname="tests.unit.test_b" name="test_setup"><error>no host</error></testcase></testsuite></testsuites>',
        encoding="utf-8",
    )
    assert failures.main([str(report)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "    tests/unit/test_a.py::test_bad[x]: Error: 1 is not 2",
        "    tests/unit/test_b.py::test_setup: no host",
    ]


@pytest.mark.parametrize("content", [None, "<testsuites><testcase"], ids=["missing", "cut off"])
def test_a_report_that_was_never_finished_is_named(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "e2e.xml"
    if content is not None:
        report.write_text(content, encoding="utf-8")
    assert failures.main([str(report)]) == 0
    assert "e2e.xml: no whole report of this lane" in capsys.readouterr().out


def test_long_messages_and_many_failures_are_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = f'<testcase classname="tests.t" name="t"><failure message="{"long " * 400}"/></testcase>'
    report = tmp_path / "unit.xml"
    report.write_text(f"<testsuite>{case * 23}</testsuite>", encoding="utf-8")
    failures.main([str(report)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == failures.MOST + 1
    assert lines[-1] == "    and 3 more"
    assert all(len(line) < failures.WIDTH + 40 for line in lines)


MOLECULE = """\
INFO     [edr > check] Executing
TASK [saw.core.edr : A program is tried] ***************************************
[ERROR]: Task failed: Module failed: not there
fatal: [host]: FAILED! => {"msg": "not there"}
...ignoring
INFO     [edr > converge] Executing
TASK [saw.core.edr : Rules are loaded] *****************************************
changed: [other]
fatal: [host]: FAILED! => {"msg": "no room"}
ERROR    [edr > converge] \x1b[31mExecuted: Failed\x1b[0m
INFO     [edr > verify] Executing
FAILED molecule/edr/tests/test_edr.py::test_rules - AssertionError
"""


def test_failed_tasks_and_tests_of_molecule_are_named_with_scenario_and_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "roles.log"
    log.write_text(MOLECULE, encoding="utf-8")
    assert failures.main([str(log), str(tmp_path / "gone.log")]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[:3] == [
        '    [edr > converge] saw.core.edr : Rules are loaded: fatal: [host]: FAILED! => {"msg": "no room"}',
        "    [edr > converge] ERROR [edr > converge] Executed: Failed",
        "    [edr > verify] FAILED molecule/edr/tests/test_edr.py::test_rules - AssertionError",
    ]
    assert "no log of this lane" in told[3]
