"""component: a set of files holds as a whole, or the old one stays."""

from __future__ import annotations

import base64
import grp
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible_collections.secure_agent.workspace.plugins.module_utils import systemd_time
from ansible_collections.secure_agent.workspace.plugins.modules import component


def encoded(secret: str) -> str:
    return base64.b64encode(secret.encode()).decode()


ME = {"owner": pwd.getpwuid(os.getuid()).pw_name, "group": grp.getgrgid(os.getgid()).gr_name}


@pytest.fixture(autouse=True)
def notes(tmp_path_factory, monkeypatch):
    """The module's notes of what it owes, in a folder of this test's own."""
    monkeypatch.setattr(component, "STATE", str(tmp_path_factory.mktemp("state") / "component"))


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


def test_a_line_of_no_form_keeps_all_files(files, tmp_path, run_module):
    forms = [r"server [a-z.]+ iburst", r"\[Time\]"]
    assert run_module(component, files=[files("one", "old\n"), files("two", "# why\n\n[Time]\n", lines=forms)])[
        "changed"
    ]
    for bad in (
        "server a iburst\nserver b; rm\n",
        "server a iburst more",
        " server a iburst\n",
        "server a\riburst\n",
        "[Time]x",
    ):
        for check in (True, False):
            outcome = run_module(component, check=check, files=[files("one", "new\n"), files("two", bad, lines=forms)])
            assert outcome["failure"]["code"] == "content_refused", bad
            assert (
                f"{tmp_path}/two: line {bad.count(chr(10)) or 1} has none of the forms allowed there: "
                in outcome["msg"]
            )
            assert (tmp_path / "one").read_text() == "old\n"
    outcome = run_module(component, files=[files("one", "new\n"), files("two", "server a iburst\n", lines=forms)])
    assert outcome["changed_files"] == [f"{tmp_path}/one", f"{tmp_path}/two"]


def test_a_form_that_is_no_expression_is_named_and_keeps_all_files(files, tmp_path, run_module):
    run_module(component, files=[files("one", "old\n")])
    outcome = run_module(component, files=[files("one", "new\n"), files("two", "a\n", lines=["a", "b("])])
    assert outcome["failure"]["code"] == "lines_malformed"
    assert f"{tmp_path}/two: lines has 'b(', which is no regular expression: " in outcome["msg"]
    assert (tmp_path / "one").read_text() == "old\n"


def test_a_secret_is_not_shown_by_the_line_that_is_refused(tmp_path, run_module):
    secret = {
        "dest": str(tmp_path / "one"),
        "secret_base64": base64.b64encode(b"hunter2").decode(),
        "lines": ["[0-9]+"],
    }
    outcome = run_module(component, files=[secret])
    assert "line 1 has none of the forms allowed there: (secret)" in outcome["msg"]
    assert "hunter2" not in outcome["msg"]


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


def test_folders_can_be_entered_whatever_the_umask_of_the_session(files, tmp_path, run_module):
    session = os.umask(0o027)  # what hardening gives people
    try:
        run_module(component, files=[files("etc/saw/one", "1\n")])
    finally:
        os.umask(session)
    assert [(tmp_path / folder).stat().st_mode & 0o777 for folder in ("etc", "etc/saw")] == [0o755, 0o755]


@pytest.mark.control("CRED-01")
def test_a_secret_is_written_and_shown_nowhere(tmp_path, run_module, capsys):
    wanted = [{"dest": str(tmp_path / "token"), "secret_base64": encoded("hunter2-old"), "mode": "0600", **ME}]
    first = run_module(component, files=wanted)
    assert "hunter2" not in str(first)
    wanted[0]["secret_base64"] = encoded("hunter2-new")
    second = run_module(component, files=wanted)
    assert second["changed"]
    assert "hunter2" not in str(second)
    assert (tmp_path / "token").read_text() == "hunter2-new"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("secret", ["one\ntwo", "back\\slash", 'it\'s "both"', "t\u00e4b\t"])
def test_a_secret_of_any_characters_is_written_and_not_what_ansible_logs(tmp_path, run_module, monkeypatch, secret):
    logged = []
    monkeypatch.setattr(AnsibleModule, "log", lambda _self, message, **_how: logged.append(str(message)))
    wanted = {"dest": str(tmp_path / "token"), "mode": "0600", "secret_base64": encoded(secret), **ME}
    taken = run_module(component, files=[wanted])
    assert taken["changed"]
    assert (tmp_path / "token").read_text() == secret
    assert not run_module(component, files=[wanted])["changed"]
    assert wanted["dest"] in "".join(logged), "the call is in the log"
    shown = "".join(logged) + str(taken)
    assert [form for form in (secret, repr(secret)[1:-1], encoded(secret)) if form in shown] == []


def test_a_secret_in_the_clear_is_refused_before_ansible_logs_it(tmp_path, run_module, monkeypatch):
    logged = []
    monkeypatch.setattr(AnsibleModule, "log", lambda _self, message, **_how: logged.append(str(message)))
    wanted = {"dest": str(tmp_path / "token"), **ME}
    assert run_module(component, files=[{**wanted, "secret": "hunter2"}]).failed
    assert logged == []
    assert run_module(component, files=[{**wanted, "secret_base64": "?"}])["failure"]["code"] == "secret_malformed"
    assert not (tmp_path / "token").exists()


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
    assert systemd_time.started_at("Sun 2026-11-22 10:00:00.250000 UTC") == pytest.approx(1795341600.25)


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


# --- what an interrupted run owes --------------------------------------------------------------------------------------

KILLED = """
import json, os, signal, sys
sys.path.insert(0, {path!r})
from ansible.module_utils.testing import patch_module_args
from ansible_collections.secure_agent.workspace.plugins.modules import component
component.STATE, component.BOOTED = {state!r}, {booted!r}
real = component.AnsibleModule.run_command
def killed(self, command, *rest, **more):
    if command == {apply!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, command, *rest, **more)
component.AnsibleModule.run_command = killed
with patch_module_args({arguments!r}):
    component.main()
"""


def run_and_kill(arguments, apply):
    """Run the module in a process of its own that is killed right before it calls ``apply``."""
    path = next(entry for entry in sys.path if Path(entry, "ansible_collections").is_dir())
    script = KILLED.format(path=path, state=component.STATE, booted=component.BOOTED, apply=apply, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr


@pytest.mark.control("P0-01")
def test_a_run_that_was_killed_between_writing_and_applying_is_not_taken_for_done(files, tmp_path, run_module):
    apply = ["sh", "-c", f"cp {tmp_path}/one {tmp_path}/applied"]
    wanted = [files("one", "new\n", apply=apply)]
    run_and_kill({"files": wanted}, apply)
    assert (tmp_path / "one").read_text() == "new\n"
    assert not (tmp_path / "applied").exists()
    forecast = run_module(component, check=True, files=wanted)
    assert forecast["changed_files"] == [wanted[0]["dest"]]
    assert not (tmp_path / "applied").exists()
    assert run_module(component, files=wanted)["changed"]
    assert (tmp_path / "applied").read_text() == "new\n"
    assert not run_module(component, files=wanted)["changed"]
    assert not Path(component.STATE).exists(), "a note stayed"


def test_after_a_failed_step_the_old_content_is_applied_again(files, tmp_path, run_module):
    """The failing command may have done half of its work; whoever goes back to the old content gets all of that."""
    apply = ["sh", "-c", f'cp {tmp_path}/one {tmp_path}/applied; ! grep -q bad "{tmp_path}/one"']
    old, bad = [files("one", "old\n", apply=apply)], [files("one", "bad\n", apply=apply)]
    run_module(component, files=old)
    assert run_module(component, files=bad)["failure"]["code"] == "apply_failed"
    assert (tmp_path / "one").read_text() == "old\n"
    assert (tmp_path / "applied").read_text() == "bad\n"
    assert run_module(component, files=old)["changed"]
    assert (tmp_path / "applied").read_text() == "old\n"
    assert not run_module(component, files=old)["changed"]


def test_a_step_that_still_fails_stays_owed(files, tmp_path, run_module):
    apply = ["test", "-e", str(tmp_path / "ready")]
    wanted = [files("one", "new\n", apply=apply)]
    run_and_kill({"files": wanted}, apply)
    for _ in range(2):
        assert run_module(component, files=wanted)["failure"]["code"] == "apply_failed"
        assert (tmp_path / "one").read_text() == "new\n"
    (tmp_path / "ready").touch()
    assert run_module(component, files=wanted)["changed"]
    assert not run_module(component, files=wanted)["changed"]


SYSTEMCTL = """#!/bin/sh
echo "$@" >> {log}
[ "$1" != "daemon-reload" ] || [ ! -e {fuse} ] || kill -9 $PPID
"""


@pytest.mark.control("P0-01")
def test_a_run_that_was_killed_before_systemd_read_the_new_unit_is_not_taken_for_done(
    files, tmp_path, run_module, monkeypatch
):
    """The service manager at the far end is a program that notes what it is told, and once ends who tells it."""
    log, fuse = tmp_path / "log", tmp_path / "fuse"
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin/systemctl"
    program.write_text(SYSTEMCTL.format(log=log, fuse=fuse))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(component, "BOOTED", str(tmp_path))
    wanted = [files("saw-x@.service", "[Service]\n")]
    fuse.touch()
    run_and_kill({"files": wanted}, None)
    fuse.unlink()
    assert log.read_text() == "daemon-reload\n"
    assert run_module(component, check=True, files=wanted)["changed"]
    assert run_module(component, files=wanted)["changed"]
    assert log.read_text() == "daemon-reload\n" * 2
    assert not run_module(component, files=wanted)["changed"]
    assert log.read_text() == "daemon-reload\n" * 2


# --- checks of new content -----------------------------------------------------------------------------------------------


@pytest.mark.control("P0-01")
def test_check_mode_refuses_content_that_a_run_would_refuse(files, tmp_path, run_module):
    for content, refused in (("bad\n", True), ("good\n", False)):
        wanted = [files("one", content, validate=["grep", "-q", "good", "%s"])]
        outcome = run_module(component, check=True, files=wanted)
        assert outcome.failed == refused
        assert not (tmp_path / "one").exists()
    assert outcome["unchecked"] == []


def test_what_the_checks_need_is_named_when_it_is_missing(files, tmp_path, run_module):
    program = tmp_path / "program"
    wanted = [files("one", "bad\n", validate=["grep", "-q", "good", "%s"]), files("two", "2\n")]
    forecast = run_module(component, check=True, files=wanted, needs=[str(program)])
    assert forecast["unchecked"] == [wanted[0]["dest"]]
    outcome = run_module(component, files=wanted, needs=[str(program)])
    assert outcome["failure"]["code"] == "needs_missing"
    assert str(program) in outcome["msg"]
    assert not (tmp_path / "two").exists()
    program.touch()
    for check in (True, False):
        outcome = run_module(component, check=check, files=wanted, needs=[str(program)])
        assert outcome["failure"]["code"] == "content_refused"
    wanted[0]["content"] = "good\n"
    assert run_module(component, files=wanted, needs=[str(program)])["unchecked"] == []


# --- units, through the real systemctl on a tree that is not booted ---------------------------------------------------------


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty root tree; ``systemctl --root`` works on it as in an image build."""
    monkeypatch.setattr(component, "ROOT", str(tmp_path))
    folder = tmp_path / "etc/systemd/system"
    folder.mkdir(parents=True)

    def unit(name: str, install: str = ""):
        (folder / name).write_text(f"[Service]\nExecStart=/bin/true\n{install}")
        return {"name": name, "enabled": True}

    return unit


INSTALL = "[Install]\nWantedBy=multi-user.target\n"


def test_a_unit_is_enabled_once(tree, run_module):
    unit = tree("one.service", INSTALL)
    assert run_module(component, check=True, units=[unit])["units"][0]["actions"] == ["enable"]
    assert run_module(component, units=[unit])["changed"]
    assert not run_module(component, units=[unit])["changed"]
    assert run_module(component, units=[{**unit, "enabled": False}])["units"][0]["actions"] == ["disable"]


@pytest.mark.parametrize(("install", "state"), [("", "static"), ("[Install]\nAlso=two.service\n", "indirect")])
def test_a_unit_that_cannot_be_enabled_is_an_error_and_not_a_change_for_ever(tree, run_module, install, state):
    tree("two.service", INSTALL)
    unit = tree("one.service", install)
    for check in (True, False):
        outcome = run_module(component, check=check, units=[unit])
        assert outcome["failure"]["code"] == "unit_not_enableable"
        assert f"one.service cannot be enabled: it is {state}" in outcome["msg"]
    del unit["enabled"]
    assert not run_module(component, units=[unit])["changed"]


def test_a_linked_unit_is_not_taken_for_an_enabled_one(tree, tmp_path, run_module):
    unit = tree("one.service", INSTALL)
    place = tmp_path / "etc/systemd/system/one.service"
    (tmp_path / "opt").mkdir()
    place.rename(tmp_path / "opt/one.service")
    place.symlink_to("/opt/one.service")
    outcome = run_module(component, units=[unit])
    assert outcome["units"][0]["actions"] == ["enable"]
    assert (tmp_path / "etc/systemd/system/multi-user.target.wants/one.service").is_symlink()
    assert not run_module(component, units=[unit])["changed"]
