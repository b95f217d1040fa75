"""broker_config: what the broker's own loader refuses never takes the place of what it has."""

from __future__ import annotations

import grp
import json
import os
import pwd
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import broker_config

pytestmark = pytest.mark.control("P0-01")

WHOLE = {
    "trust_domain": "saw.example",
    "state_dir": "/var/lib/saw/broker",
    "operator_socket": "/run/saw/broker/operator.sock",
    "server_names": ["broker.saw.internal"],
    "rollout": {"first_wave": 1, "soak_s": 60},
}


@pytest.fixture
def ensure(tmp_path, run_module):
    """Run the module on a file of this test's own, with the real command."""
    how = {
        "path": str(tmp_path / "broker.json"),
        "owner": pwd.getpwuid(os.getuid()).pw_name,
        "group": grp.getgrgid(os.getgid()).gr_name,
        "saw": str(Path(sys.executable).with_name("saw")),
    }
    return lambda settings, **more: run_module(broker_config, settings=settings, **{**how, **more})


@pytest.fixture
def file(tmp_path) -> Path:
    """The file, as somebody wrote it."""
    found = tmp_path / "broker.json"
    found.write_text(json.dumps(WHOLE))
    found.chmod(0o640)
    return found


def test_it_is_forecast_written_and_left_alone(ensure, tmp_path):
    file = tmp_path / "broker.json"
    forecast = ensure(WHOLE, check=True)
    assert (forecast["changed"], forecast["restart_needed"], file.exists()) == (True, True, False)
    written = ensure(WHOLE)
    assert (written["changed"], written["restart_needed"]) == (True, True)
    assert written["diff"][0]["after"] == file.read_text()
    assert (json.loads(file.read_text()), file.stat().st_mode & 0o777) == (WHOLE, 0o640)
    again = ensure(WHOLE)
    assert (again["changed"], again["restart_needed"], again["changed_settings"], again["diff"]) == (
        False,
        False,
        [],
        [],
    )


def test_a_part_is_laid_over_the_rest_and_null_takes_away(ensure, file):
    told = ensure({"rollout": {"soak_s": 90, "first_wave": None}, "operator_group": "ops"}, merge=True)
    assert told["changed_settings"] == ["operator_group", "rollout.first_wave", "rollout.soak_s"]
    assert json.loads(file.read_text()) == {**WHOLE, "rollout": {"soak_s": 90}, "operator_group": "ops"}
    # mode alone is mended without a word about a restart, and what says the same is not written in another form
    raw = file.read_bytes()
    file.chmod(0o666)
    told = ensure({"operator_group": "ops"}, merge=True)
    assert (told["changed"], told["restart_needed"], file.stat().st_mode & 0o777) == (True, False, 0o640)
    assert file.read_bytes() == raw


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rollout": {"soak_s": -1}}, "rollout.soak_s must be 0 to"),
        ({"rollout": {"soak": 1}}, "unknown field `soak`"),
        ({"trust_domain": None}, "trust_domain"),
    ],
)
def test_what_the_loader_refuses_is_named_and_nothing_is_written(ensure, file, settings, words):
    before = file.read_bytes()
    told = ensure(settings, merge=True, check="soak_s" in words)
    assert (told.failed, told["failure"]["code"]) == (True, "config_invalid")
    assert words in told["msg"]
    assert (str(file) in told["msg"], "saw-config" in told["msg"]) == (True, False)
    assert told["failure"]["cure"]
    assert file.read_bytes() == before
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_a_broker_that_runs_since_before_the_file_was_written_has_yet_to_read_it(ensure, file, tmp_path, monkeypatch):
    # systemd's words, in its place: no unit runs where these tests do
    systemctl = tmp_path / "bin" / "systemctl"
    systemctl.parent.mkdir()

    def started(state: str, at: float) -> None:
        stamp = datetime.fromtimestamp(at, UTC).strftime("%a %Y-%m-%d %H:%M:%S.%f UTC")
        words = f"ActiveState={state}\\nActiveEnterTimestamp={stamp}\\n"
        systemctl.write_text(f"#!/bin/sh\n[ \"$4\" = mine.service ] && printf '{words}'\n")
        systemctl.chmod(0o755)

    monkeypatch.setenv("PATH", f"{systemctl.parent}:{os.environ['PATH']}")
    written = file.stat().st_mtime
    for state, at, needed in (
        ("active", written - 5, True),
        ("active", written + 5, False),
        ("inactive", written - 5, False),
    ):
        started(state, at)
        told = ensure(WHOLE, unit="mine.service")
        assert (told["changed"], told["restart_needed"]) == (False, needed), (state, at)


@pytest.mark.control("CRED-01")
def test_a_password_in_the_settings_is_refused_and_not_repeated(ensure, file):
    told = ensure({"database": "postgresql://saw:hunter2@db/saw"}, merge=True)
    assert "it holds a password" in told["msg"]
    told.pop("invocation", None)  # what the caller gave; newer releases of Ansible leave it out
    assert "hunter2" not in json.dumps(told)
    assert "hunter2" not in file.read_text()


def test_without_the_broker_nothing_is_written(ensure, file):
    told = ensure({"operator_group": "ops"}, merge=True, saw="/nowhere/saw")
    assert (told["failure"]["code"], json.loads(file.read_text())) == ("needs_missing", WHOLE)


def test_a_file_that_is_none_is_merged_into_never_and_written_whole(ensure, file):
    file.write_text("{")
    assert ensure({"operator_group": "ops"}, merge=True)["failure"]["code"] == "not_json"
    assert ensure(WHOLE)["changed"]
    assert json.loads(file.read_text()) == WHOLE
