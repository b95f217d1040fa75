"""What tests start from: registers that are copied, interpreters that are forked, and examples that are counted."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import settings

import databases
from examples import ORDINARY, examples
from warm import programs

ASK = """import json, os, sys
print(json.dumps([os.environ.get("WARM"), os.getcwd(), sys.argv, "saw.policy.loader" in sys.modules, __name__]))
print("aside", file=sys.stderr)
sys.exit(7)
"""


def run(*command: str, text: str = "", **how: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(programs() / command[0]), *command[1:]],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        **how,
    )


def test_what_is_sent_runs_with_its_own_environment_folder_streams_and_status(tmp_path: Path) -> None:
    done = run("python", text=ASK, cwd=tmp_path, env={**os.environ, "WARM": "yes"})
    assert done.stdout == f'["yes", "{tmp_path}", ["-"], true, "__main__"]\n'
    assert (done.stderr, done.returncode) == ("aside\n", 7)
    again = run("python", text=ASK.replace("sys.exit(7)", "raise ValueError(3)"), cwd="/")
    assert again.stdout == '[null, "/", ["-"], true, "__main__"]\n', "nothing of the one before is left"
    assert again.returncode == 1
    assert "ValueError: 3" in again.stderr


def test_what_else_an_interpreter_is_asked_for_is_done_by_itself(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(ASK)
    done = run("python", str(tmp_path / "file.py"), cwd=tmp_path)
    assert done.stdout == f'[null, "{tmp_path}", ["{tmp_path / "file.py"}"], false, "__main__"]\n'
    assert done.returncode == 7


def test_the_command_says_what_it_says_and_fails_as_it_fails(tmp_path: Path) -> None:
    assert run("saw", "policy", "--help").stdout.startswith("usage: saw policy")
    refused = run("saw", "policy", "test", str(tmp_path))
    assert refused.returncode != 0
    assert refused.stdout + refused.stderr


def test_a_module_takes_itself_for_no_part_of_the_controller() -> None:
    asked = "from ansible.module_utils import _internal\nprint(_internal.is_controller)\n"
    assert run("python", text=asked).stdout == "False\n"


@pytest.mark.parametrize(("word", "chosen"), [("sqlite", False), ("postgresql", True)])
def test_the_database_is_chosen_by_its_name(monkeypatch: pytest.MonkeyPatch, word: str, chosen: bool) -> None:
    monkeypatch.setenv(databases.VARIABLE, word)
    assert databases.on_postgresql() == chosen


def test_another_database_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(databases.VARIABLE, "postgres")
    with pytest.raises(AssertionError, match="one of sqlite, postgresql"):
        databases.on_postgresql()


@pytest.mark.parametrize(
    ("profile", "many", "few"), [("ci", ORDINARY, 25), ("thorough", 400, 25), ("default", 400, 25)]
)
def test_a_property_draws_fifty_and_all_where_all_are_asked_for(profile: str, many: int, few: int) -> None:
    before = settings.get_current_profile_name()
    settings.load_profile(profile)
    try:
        assert (examples(400), examples(25)) == (many, few)
    finally:
        settings.load_profile(before)
    assert ORDINARY == 50
