"""The commands of ``docs/blueprints.md`` and ``docs/openshell.md`` do what the pages say, as they are written."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from saw.cli.main import main

ROOT = Path(__file__).parents[3]
DENIAL = (
    '{"error": "policy_denied", "layer": "ring1", "protocol": "https", "reason": "host_not_allowed", "port": 443, '
    '"host": "jobs.example.com", "method": "GET", "path": "/v1/jobs", "binary": "/usr/bin/curl"}\n'
)
REFUSES = {"explain"}


@pytest.mark.parametrize("page", ["blueprints", "openshell"])
def test_every_command_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "policies", tmp_path / "policies")
    (tmp_path / "denials.jsonl").write_text(DENIAL)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ saw (.+)$", text, re.MULTILINE)
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command)
        assert main(words) == (1 if words[1] in REFUSES else 0), command


def test_the_effects_and_options_that_the_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("blueprints", "openshell"))
    known = ""
    for command in ("learn", "export", "import", "explain"):
        with pytest.raises(SystemExit):
            main(["policy", command, "--help"])
        known += capsys.readouterr().out
    options = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", text)) - {"--json"}
    assert {option for option in options if option not in known} == set()


def test_every_blueprint_has_its_line() -> None:
    text = (ROOT / "docs/blueprints.md").read_text(encoding="utf-8")
    names = {path.parent.name for path in (ROOT / "policies").glob("*/policy.yaml")}
    assert {name for name in names if f"| `{name}` |" not in text} == set()
