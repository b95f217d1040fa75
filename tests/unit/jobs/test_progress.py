"""What leaves a worker about a run: progress from events, and lines without what looks like a secret."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.cli.main import main as saw
from saw.errors import ConfigError
from saw.jobs import processes
from saw.jobs.ansible_run import without_own
from saw.jobs.config import load_config
from saw.jobs.executor import MAX_KEPT_EVENTS, Gathered
from saw.jobs.messages import MAX_HOSTS, MAX_LINE, MAX_LINES, Progress
from saw.jobs.redact import HIDDEN, redact


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("login with password=hunter2 failed", "hunter2"),
        ('{"client_secret": "abc def"}', "abc def"),
        ("API-Key: 12345", "12345"),
        ("curl --token t0ps3cret https://x", "t0ps3cret"),
        ("Authorization: Bearer abcdef123456", "abcdef123456"),
        ("git clone https://ada:pa55@git.example.com/x", "pa55"),
        ("eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ4In0.c2ln", "eyJzdWIiOiJ4In0"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNza\n-----END OPENSSH PRIVATE KEY-----", "b3BlbnNza"),
        ("-----BEGIN EC PRIVATE KEY-----\nMHcCAQ", "MHcCAQ"),
        ("ghp_0123456789abcdef", "0123456789abcdef"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text: str, secret: str) -> None:
    assert secret not in redact(text)
    assert HIDDEN in redact(text)


def test_plain_words_stay_as_they_are() -> None:
    for text in ("the VM ws-a is stopped", "no route to host 10.77.0.20", "task: Take its lease away"):
        assert redact(text) == text


@settings(max_examples=100)
@given(st.text(max_size=500))
def test_every_line_is_short_and_printable(text: str) -> None:
    line = redact(text)
    assert len(line) <= MAX_LINE
    assert line.isprintable()


def test_results_are_counted_and_only_failures_have_words() -> None:
    gathered = Gathered()
    gathered.take({"event": "playbook_on_play_start", "event_data": {"name": "Stop"}})
    gathered.take({"event": "playbook_on_task_start", "event_data": {"name": "Look"}})
    for kind, res in (
        ("runner_on_ok", {"changed": False, "stdout": "what was read"}),
        ("runner_on_ok", {"changed": True}),
        ("runner_on_skipped", {}),
        ("runner_on_failed", {"msg": "no", "stdout": "what was read"}),
        ("runner_on_failed", {"censored": "the output has been hidden", "msg": "the secret"}),
        ("runner_on_unreachable", {"msg": "no route"}),
    ):
        gathered.take({"event": kind, "event_data": {"host": "edge", "task": "Look", "res": res}})
    gathered.take({"event": "runner_on_failed", "event_data": {"host": "edge", "ignore_errors": True, "res": {}}})
    gathered.take({"event": "runner_on_ok", "event_data": None})
    progress, events = gathered.told()
    counts = progress.hosts["edge"]
    assert (counts.ok, counts.changed, counts.skipped, counts.failed, counts.unreachable) == (3, 1, 1, 2, 1)
    text = str([progress, events, gathered.failures])
    assert "what was read" not in text
    assert "the secret" not in text
    assert "no_log" in text
    assert [event.result for event in events if event.kind == "host"] == ["changed", "failed", "failed", "unreachable"]
    assert gathered.told()[1] == []


def test_progress_is_bounded_and_what_is_left_out_is_said() -> None:
    gathered = Gathered()
    for number in range(MAX_KEPT_EVENTS + 5):
        gathered.take({"event": "playbook_on_task_start", "event_data": {"name": f"task {number}"}})
        gathered.take({"event": "runner_on_ok", "event_data": {"host": f"h{number}", "res": {}}})
    progress, events = gathered.told()
    assert len(progress.hosts) == MAX_HOSTS
    assert len(progress.lines) == MAX_LINES
    assert events[-1].text == "5 more events are not shown"
    assert msgspec.convert(msgspec.to_builtins(progress), Progress) == progress


def test_every_process_of_a_run_is_found_and_ended_also_in_a_session_of_its_own() -> None:
    value = os.urandom(8).hex()
    code = "import subprocess; subprocess.Popen(['sleep', '600'], start_new_session=True).wait()"
    environ = {**os.environ, processes.JOB_MARK: value}
    stubborn = ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"]
    runs = [subprocess.Popen(command, env=environ) for command in ([sys.executable, "-c", code], stubborn)]
    other = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.JOB_MARK: f"{value}0"})
    try:
        deadline = time.monotonic() + 120
        while len(processes.marked(processes.JOB_MARK, value)) < 4:
            assert all(run.poll() is None for run in runs)
            assert time.monotonic() < deadline
        assert processes.end(processes.JOB_MARK, value, grace_s=0.2)
        assert processes.marked(processes.JOB_MARK, value) == []
        assert other.poll() is None
    finally:
        other.kill()
        for run in (*runs, other):
            run.wait()


def test_the_guard_ends_the_runs_when_the_pipe_does() -> None:
    value = os.urandom(8).hex()
    run = subprocess.Popen(["sleep", "600"], env={**os.environ, processes.WORKER_MARK: value})
    guard = subprocess.Popen([sys.executable, "-m", "saw.jobs.processes", value], stdin=subprocess.PIPE)
    assert guard.stdin is not None
    guard.stdin.write(b"x")
    guard.stdin.flush()
    assert run.poll() is None
    guard.stdin.close()
    assert guard.wait(120) == 0
    assert run.wait(120) in {-signal.SIGTERM, -signal.SIGKILL}


ANSIBLE = {"inventory": "/etc/saw/fleet"}
BASE = {"state_dir": "/var/lib/saw/worker", "broker_socket": "/run/saw/broker/worker.sock", "ansible": ANSIBLE}
AWX = {"url": "https://awx.example.com", "token_file": "/etc/saw/awx.token"}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"broker_context": "/etc/saw/context.json"}, "one of the two"),
        ({"broker_socket": None}, "one of the two"),
        ({"awx": AWX}, "ansible or awx"),
        ({"ansible": None}, "ansible or awx"),
        ({"ansible": {"inventory": "fleet"}}, "inventory must be an absolute path"),
        ({"ansible": {**ANSIBLE, "extra_vars": {}}}, "extra_vars"),
        ({"ansible": None, "awx": {**AWX, "url": "http://awx.example.com"}}, "awx.url"),
        ({"ansible": None, "awx": {**AWX, "token": "x"}}, "token"),
        ({"ansible": None, "awx": {**AWX, "templates": {"reboot": "x"}}}, "templates"),
        ({"slots": 0}, "slots"),
    ],
)
def test_a_wrong_configuration_of_the_worker_is_refused_and_its_field_named(
    tmp_path: Path, change: dict[str, object], named: str
) -> None:
    file = tmp_path / "worker.json"
    file.write_bytes(msgspec.json.encode(BASE))
    assert load_config(file).ansible is not None
    file.write_bytes(msgspec.json.encode({**BASE, "ansible": None, "awx": AWX}))
    assert load_config(file).awx is not None
    file.write_bytes(msgspec.json.encode({**BASE, **change}))
    with pytest.raises(ConfigError, match=named):
        load_config(file)


def test_what_the_worker_needs_and_the_host_does_not_have_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "worker.json"
    (tmp_path / "fleet").mkdir()
    good = {**BASE, "ansible": {"inventory": str(tmp_path / "fleet")}}
    file.write_bytes(msgspec.json.encode(good))
    assert saw(["worker", "check", "--config", str(file)]) == 0
    for field in ("key_file", "known_hosts", "context", "collections", "playbooks"):
        settings = {"inventory": str(tmp_path / "fleet"), field: str(tmp_path / "missing")}
        file.write_bytes(msgspec.json.encode({**BASE, "ansible": settings}))
        assert saw(["worker", "check", "--config", str(file)]) == 1
        assert f"ansible.{field}: there is no" in capsys.readouterr().err


def test_a_run_gets_nothing_of_its_workers_environment_but_all_that_it_was_given() -> None:
    own = {"HOME": "/root", "PATH": "/bin", "SAW_CONTEXT": "/etc/saw/context.json", "TOKEN": "secret"}
    added = {"PATH": "/opt/saw-worker/bin:/bin", "SAW_CONTEXT": "/etc/saw/context.json"}
    assert without_own({**own, "RUNNER": "1", **added}, own, added) == {"HOME": "/root", "RUNNER": "1", **added}
