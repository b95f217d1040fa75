"""Options and blueprints that ``docs/blueprints.md`` and ``docs/openshell.md`` name exist; their commands are run as pages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saw.cli.main import main
from saw.image.build import main as build

ROOT = Path(__file__).parents[3]


def test_the_effects_and_options_that_the_pages_name_exist(capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") for page in ("blueprints", "openshell"))
    known = ""
    for command in ("learn", "export", "import", "explain", "prove", "openshell"):
        with pytest.raises(SystemExit):
            main(["policy", command, "--help"])
        known += capsys.readouterr().out
    with pytest.raises(SystemExit):
        build(["wheelhouse", "--help"])
    known += capsys.readouterr().out
    options = set(re.findall(r"(?<![-\w])--[a-z][a-z-]+", text)) - {"--json"}
    assert {option for option in options if option not in known} == set()


def test_every_blueprint_has_its_line() -> None:
    text = (ROOT / "docs/blueprints.md").read_text(encoding="utf-8")
    names = {path.parent.name for path in (ROOT / "policies").glob("*/policy.yaml")}
    assert {name for name in names if f"| `{name}` |" not in text} == set()
