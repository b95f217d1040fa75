"""Reports of ended sessions: many end at once, few processes send, each report once, and none is forgotten."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.errors import UnavailableError
from saw.sessions import report
from saw.sessions.config import BastionConfig
from saw.sessions.messages import Closing
from saw.sessions.report import SUFFIX, send_forgotten, send_reports

COUNT = 40


class Broker:
    """Takes ends, each after ``hold`` lets it, and counts how many come at a time."""

    def __init__(self, *, answers: bool = True) -> None:
        self.answers = answers
        self.hold = threading.Event()
        self.hold.set()
        self.told: list[str] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()

    def tell(self, _config: BastionConfig, session: str, _said: Closing) -> None:
        with self._lock:
            self._now += 1
            self.most = max(self.most, self._now)
        assert self.hold.wait(60)
        with self._lock:
            self._now -= 1
            if not self.answers:
                raise UnavailableError("gone", cure="wait")
            self.told.append(session)


@pytest.fixture
def config(tmp_path: Path) -> BastionConfig:
    return BastionConfig(
        broker_url="https://b",
        broker_name="b",
        ca_file="ca",
        cert_file="cert",
        key_file="key",
        recordings_dir=str(tmp_path),
    )


def leave(config: BastionConfig, session: str) -> None:
    (config.recordings / f"{session}{SUFFIX}").write_bytes(msgspec.json.encode(Closing("closed")))


def until(condition: Any) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)


def test_many_that_end_at_once_are_told_once_each_by_few(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker()
    monkeypatch.setattr(report, "_tell", broker.tell)
    monkeypatch.setattr(report, "_LOOK_S", 0.01)
    broker.hold.clear()
    senders = []
    for number in range(COUNT):
        leave(config, f"ses-{number}")
        senders.append(threading.Thread(target=send_reports, args=(config,)))
        senders[-1].start()
    # All places are taken, one waits, and everybody else has gone before anything was told.
    until(lambda: sum(one.is_alive() for one in senders) <= report._SENDING + 1)
    assert broker.told == []
    broker.hold.set()
    for one in senders:
        one.join(60)
    assert sorted(broker.told) == sorted(f"ses-{number}" for number in range(COUNT))
    assert broker.most <= report._SENDING
    assert list(config.recordings.glob(f"*{SUFFIX}")) == []


def test_a_report_left_while_all_send_is_found_by_the_one_that_waits(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker()
    monkeypatch.setattr(report, "_tell", broker.tell)
    taken = [(config.recordings / f".sending-{number}").open("w") for number in range(report._SENDING)]
    for file in taken:
        fcntl.flock(file, fcntl.LOCK_EX)
    looks: list[float] = []

    def pause(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 1:
            leave(config, "ses-late")
            assert send_reports(config) == 0, "somebody waits: nothing to do here"
            assert broker.told == []
        taken[2].close()

    assert send_reports(config, pause) == 0
    assert looks == [report._LOOK_S]
    assert broker.told == ["ses-late"]
    for file in taken:
        file.close()


def test_what_cannot_be_told_is_tried_again_stays_and_is_counted(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(answers=False)
    monkeypatch.setattr(report, "_tell", broker.tell)
    leave(config, "ses-a")
    pauses: list[float] = []
    assert send_reports(config, pauses.append) == 1
    assert pauses == [report._PAUSE_S] * (report._TRIES - 1)
    assert (config.recordings / f"ses-a{SUFFIX}").exists()
    broker.answers = True
    assert send_reports(config, pauses.append) == 0
    assert broker.told == ["ses-a"]


def test_what_another_one_sends_is_tried_when_that_one_gives_up(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker()
    monkeypatch.setattr(report, "_tell", broker.tell)
    leave(config, "ses-a")
    other = (config.recordings / f"ses-a{SUFFIX}").open()
    fcntl.flock(other, fcntl.LOCK_EX)
    pauses: list[float] = []

    def pause(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            other.close()

    assert send_reports(config, pause) == 0
    assert pauses == [report._PAUSE_S] * 2
    assert broker.told == ["ses-a"]


def test_what_another_one_sends_to_the_end_is_not_counted_here(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker(answers=False)
    monkeypatch.setattr(report, "_tell", broker.tell)
    leave(config, "ses-a")
    leave(config, "ses-b")
    with (config.recordings / f"ses-a{SUFFIX}").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert send_reports(config, lambda _seconds: None) == 1


@pytest.mark.parametrize(("age_s", "started"), [(3600, 1), (0, 0)])
def test_a_report_that_nobody_sends_any_more_is_sent_with_the_next_session(
    config: BastionConfig, monkeypatch: pytest.MonkeyPatch, age_s: int, started: int
) -> None:
    lines: list[list[str]] = []
    monkeypatch.setattr("subprocess.Popen", lambda line, **_more: lines.append(line))
    send_forgotten(config)
    assert lines == []
    leave(config, "ses-a")
    left = time.time() - age_s
    os.utime(config.recordings / f"ses-a{SUFFIX}", (left, left))
    send_forgotten(config)
    assert len(lines) == started
    assert all(line[-1] == config.recordings_dir for line in lines)
