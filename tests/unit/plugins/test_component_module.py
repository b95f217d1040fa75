"""component: a set of files holds as a whole, or the old one stays."""

from __future__ import annotations

import grp
import os
import pwd

import pytest
from ansible_collections.secure_agent.workspace.plugins.modules import component

ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


@pytest.fixture
def files(tmp_path):
    """Make the entry of a file below the test's folder."""

    def entry(name: str, content: str, **more):
        return {"dest": str(tmp_path / name), "content": content, **ME, **more}

    return entry


@pytest.mark.control("P0-01")
def test_files_are_forecast_written_and_left_alone(files, tmp_path, run_module):
    wanted = [files("etc/one", "1\n", mode="0640"), files("etc/two", "2\n")]
    forecast = run_module(component, check=True, files=wanted)
    assert forecast["changed"]
    assert not (tmp_path / "etc").exists()
    written = run_module(component, files=wanted)
    assert written["changed_files"] == [entry["dest"] for entry in wanted]
    assert (tmp_path / "etc/one").read_text() == "1\n"
    assert (tmp_path / "etc/one").stat().st_mode & 0o7777 == 0o640
    assert not run_module(component, files=wanted)["changed"]


def test_drift_of_mode_alone_is_seen_and_mended(files, tmp_path, run_module):
    wanted = [files("one", "1\n", mode="0600")]
    run_module(component, files=wanted)
    (tmp_path / "one").chmod(0o666)
    assert run_module(component, check=True, files=wanted)["changed"]
    assert run_module(component, files=wanted)["changed"]
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600


def test_one_refused_file_keeps_all_of_them(files, tmp_path, run_module):
    run_module(component, files=[files("one", "old\n"), files("two", "old\n")])
    wanted = [files("one", "new\n"), files("two", "bad\n", validate=["grep", "-q", "good", "%s"])]
    outcome = run_module(component, files=wanted)
    assert outcome["failure"]["code"] == "content_refused"
    assert f"{tmp_path}/two: the new content does not pass `grep -q good %s`" in outcome["msg"]
    assert (tmp_path / "one").read_text() == "old\n"
    wanted[1] = files("two", "good\n", validate=["grep", "-q", "good", "%s"])
    assert run_module(component, files=wanted)["changed"]
    assert (tmp_path / "one").read_text() == "new\n"


def test_new_files_of_one_folder_are_checked_side_by_side(files, run_module):
    together = ["sh", "-c", 'grep -q partner "$(dirname "$1")/two"', "sh", "%s"]
    outcome = run_module(component, files=[files("one", "1\n", validate=together), files("two", "partner\n")])
    assert not outcome.failed, outcome


def test_a_failed_step_after_writing_brings_the_old_file_back(files, tmp_path, run_module):
    run_module(component, files=[files("one", "old\n")])
    outcome = run_module(component, files=[files("one", "new\n", apply=["false"])])
    assert outcome["failure"]["code"] == "apply_failed"
    assert (tmp_path / "one").read_text() == "old\n"
    outcome = run_module(component, files=[files("fresh", "new\n", apply=["false"])])
    assert outcome["failure"]["code"] == "apply_failed"
    assert not (tmp_path / "fresh").exists()


def test_files_are_applied_in_order(files, tmp_path, run_module):
    seen = tmp_path / "seen"
    wanted = [files(name, name, apply=["sh", "-c", f"echo {name} >> {seen}"]) for name in ("b", "a")]
    run_module(component, files=wanted)
    run_module(component, files=wanted)
    assert seen.read_text() == "b\na\n"


@pytest.mark.control("CRED-01")
def test_a_secret_is_written_and_shown_nowhere(tmp_path, run_module, capsys):
    wanted = [{"dest": str(tmp_path / "token"), "secret": "hunter2-old", "mode": "0600", **ME}]
    first = run_module(component, files=wanted)
    assert "hunter2" not in str(first)
    wanted[0]["secret"] = "hunter2-new"
    second = run_module(component, files=wanted)
    assert second["changed"]
    assert "hunter2" not in str(second)
    assert (tmp_path / "token").read_text() == "hunter2-new"


def test_an_exclusive_folder_loses_what_is_not_listed(files, tmp_path, run_module):
    keep, drop = files("box/keep", "1"), files("box/drop", "2")
    run_module(component, files=[keep, drop])
    forecast = run_module(component, check=True, files=[keep], exclusive=[str(tmp_path / "box")])
    assert forecast["changed_files"] == [drop["dest"]]
    assert (tmp_path / "box/drop").exists()
    run_module(component, files=[keep], exclusive=[str(tmp_path / "box")])
    assert sorted(path.name for path in (tmp_path / "box").iterdir()) == ["keep"]


def test_a_missing_account_is_named(files, run_module):
    outcome = run_module(component, files=[files("one", "1", owner="no-such-account")])
    assert outcome["failure"]["code"] == "account_missing"
    assert "no-such-account" in outcome["msg"]


def test_what_systemd_prints_is_read_as_unix_time():
    assert component.started_at("Sun 2026-11-22 10:00:00.250000 UTC") == pytest.approx(1795341600.25)


@pytest.mark.parametrize(
    ("state", "found", "newest", "verb"),
    [
        ("started", {"ActiveState": "inactive"}, 0, "start"),
        ("started", {"ActiveState": "active", "ActiveEnterTimestamp": "Sun 2026-11-22 10:00:00.0 UTC"}, 0, None),
        (
            "started",
            {"ActiveState": "active", "ActiveEnterTimestamp": "Sun 2026-11-22 10:00:00.0 UTC"},
            1795341601,
            "restart",
        ),
        ("started", {"ActiveState": "active", "NeedDaemonReload": "yes"}, 0, "restart"),
        (
            "reloaded",
            {"ActiveState": "active", "StateChangeTimestamp": "Sun 2026-11-22 10:00:00.0 UTC"},
            1795341601,
            "reload-or-restart",
        ),
        ("present", {"ActiveState": "inactive"}, 1795341601, None),
        ("stopped", {"ActiveState": "active"}, 0, "stop"),
        ("stopped", {"ActiveState": "inactive"}, 0, None),
    ],
)
def test_which_step_a_unit_needs(state, found, newest, verb):
    assert component.Units.wanted_verb(state, found, newest) == verb
