"""The playbook ``conformance`` gives the command everything that it takes, and fails with what the report says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from saw.cli import conformance as command

ROOT = Path(__file__).resolve().parents[3]
PLAYBOOK = ROOT / "playbooks/conformance.yml"
SEVERAL = {"--suite": "suites", "--case": "cases"}
"""Options that may be repeated, whose variables are lists with names of their own."""
PROGRAM = """#!{python}
import json, pathlib, sys
pathlib.Path({told!r}).write_text(json.dumps(sys.argv[1:]))
print(pathlib.Path({report!r}).read_text())
"""
CASE = {"id": "net.tcp.direct", "result": "refused", "twin": {"result": "works"}}


def variables() -> dict[str, Any]:
    return dict(yaml.safe_load(PLAYBOOK.read_text(encoding="utf-8"))[0]["vars"])


def options(capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    return sorted(set(re.findall(r"(?m)^  (--[a-z-]+)", capsys.readouterr().out)) - {"--json"})


def test_every_option_of_the_command_has_a_variable(capsys: pytest.CaptureFixture[str]) -> None:
    names = {f"conformance_{SEVERAL.get(one, one.removeprefix('--').replace('-', '_'))}" for one in options(capsys)}
    assert len(names) >= 15
    assert names <= set(variables())


def play(folder: Path, case: dict[str, Any], **given: Any) -> tuple[int, str, list[str]]:
    """Run the playbook with a program that says what it was asked; return exit code, words, and what that was."""
    told, report, program = folder / "told", folder / "report", folder / "saw"
    report.write_text(json.dumps({"ok": case == CASE, "problems": [], "summary": {"score": 1.0}, "cases": [case]}))
    program.write_text(PROGRAM.format(python=sys.executable, told=str(told), report=str(report)))
    program.chmod(0o755)
    words = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", str(PLAYBOOK), "-e",
             json.dumps({"conformance_saw": str(program), **given})]  # fmt: skip
    environment = {**os.environ, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_LOCAL_TEMP": str(folder / "local")}
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=environment, cwd=folder)
    return done.returncode, done.stdout + done.stderr, json.loads(told.read_text()) if told.exists() else []


def test_what_is_said_reaches_the_command_and_what_is_not_stays_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    several = {f"conformance_{name}": ["a", "b"] for name in ("suites", "cases", "recorder", "arrivals")}
    one = {
        f"conformance_{name.removeprefix('--').replace('-', '_')}": f"of {name}"
        for name in options(capsys)
        if name not in {*SEVERAL, "--recorder", "--arrivals", "--ours"}
    }
    code, text, told = play(tmp_path, CASE, **several, **one, conformance_ours=True)
    assert code == 0, text
    assert told[:3] == ["conformance", "run", "--json"]
    given = [told[place : place + 2] for place in range(3, len(told)) if told[place].startswith("--")]
    assert sorted(name for name, *_ in given) == sorted(
        [*options(capsys), "--suite", "--case", "--recorder", "--arrivals"]
    )
    assert all(value == [f"of {name}"] for name, *value in given if f"conformance_{name[2:].replace('-', '_')}" in one)
    _, _, plain = play(tmp_path, CASE)
    assert {word for word in plain if word.startswith("--")} == {"--json", "--target", "--output", "--python"}


def test_a_finding_fails_the_play_with_its_name(tmp_path: Path) -> None:
    code, text, _ = play(tmp_path, {**CASE, "result": "allowed"})
    assert code != 0
    assert "net.tcp.direct" in text
