"""Alerts of Falco and Wazuh as findings: the formats as their makers document them, and a file that is read as it grows."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from saw.audit import validate
from saw.audit.events import EventFactory
from saw.edr.alerts import AT_ONCE, STILL_LOOKS, Tail, falco, wazuh
from saw.edr.config import Alerts, EdrConfig, Vendor, read_config
from saw.edr.detection import Detection, event_of
from saw.edr.store import Store
from saw.edr.watcher import Watcher
from saw.errors import ConfigError

pytestmark = pytest.mark.control("P0-03")
NOW = datetime(2026, 11, 30, 8, tzinfo=UTC)
SECRET = "hunter2-is-secret"
FALCO: dict[str, Any] = {
    "hostname": "edge-1",
    "output": f"08:00:01.000000001: Warning Sensitive file opened (file=/etc/shadow command=cat --token {SECRET})",
    "output_fields": {
        "container.id": "host", "evt.time": 1796025601000000001, "evt.type": "openat", "fd.name": "/etc/shadow",
        "proc.cmdline": f"cat --token {SECRET}", "proc.exepath": "/usr/bin/cat", "proc.name": "cat", "proc.pid": 4711,
        "user.name": "ann", "user.uid": 1000,
    },
    "priority": "Warning",
    "rule": "Read sensitive file untrusted",
    "source": "syscall",
    "tags": ["T1555", "container", "filesystem", "host", "mitre_credential_access"],
    "time": "2026-11-30T08:00:01.000000001Z",
}  # fmt: skip
WAZUH: dict[str, Any] = {
    "timestamp": "2026-11-30T08:00:01.123+0000",
    "rule": {
        "level": 10, "description": "sshd: brute force trying to get access to the system.", "id": "5712", "frequency": 8,
        "firedtimes": 1, "mail": False, "groups": ["syslog", "sshd", "authentication_failures"],
        "mitre": {"id": ["T1110"], "tactic": ["Credential Access"], "technique": ["Brute Force"]},
    },
    "agent": {"id": "001", "name": "edge-1", "ip": "10.0.0.7"},
    "manager": {"name": "siem-1"},
    "id": "1796025601.12345",
    "full_log": f"sshd[1]: Failed password for ann {SECRET}",
    "decoder": {"parent": "sshd", "name": "sshd"},
    "data": {"srcip": "192.0.2.7", "password": SECRET},
    "location": "/var/log/auth.log",
}  # fmt: skip


def line(event: dict[str, Any], **changed: Any) -> bytes:
    return json.dumps({**event, **changed}).encode() + b"\n"


def as_event(found: Detection) -> dict[str, Any]:
    """The OCSF event, held against the schema."""
    event = event_of(found, EventFactory("saw-edr", host="edge-1", new_uid=lambda: "1"), NOW)
    validate(event)
    return event


def test_an_alert_of_falco_is_a_finding_without_what_may_hold_a_secret() -> None:
    event = as_event(falco(line(FALCO)))
    assert (event["class_uid"], event["severity"]) == (2004, "Medium")
    assert event["message"] == "Falco: Read sensitive file untrusted: /etc/shadow"
    told = json.dumps(event)
    assert SECRET not in told and "cmdline" not in told
    for text in ("/usr/bin/cat", "4711", "T1555", "openat"):
        assert text in told


def test_an_alert_of_wazuh_is_a_finding_without_what_may_hold_a_secret() -> None:
    event = as_event(wazuh(line(WAZUH)))
    assert (event["class_uid"], event["severity"]) == (2004, "Medium")
    assert event["message"] == "Wazuh: sshd: brute force trying to get access to the system.: edge-1"
    told = json.dumps(event)
    assert SECRET not in told and "full_log" not in told
    for text in ("5712", "T1110", "001", "/var/log/auth.log", "1796025601.12345"):
        assert text in told
    changed = wazuh(line(WAZUH, syscheck={"path": "/etc/passwd", "event": "modified", "diff": SECRET}))
    assert (changed.subject, changed.evidence["change"]) == ("/etc/passwd", "modified")
    assert SECRET not in json.dumps(as_event(changed))


@pytest.mark.parametrize(
    ("priority", "severity"),
    [
        ("Emergency", "critical"), ("Alert", "critical"), ("Critical", "critical"), ("Error", "high"), ("WARNING", "medium"),
        ("Notice", "low"), ("Informational", "informational"), ("Debug", "informational"), ("Unheard", "high"),
    ],
)  # fmt: skip
def test_priorities_of_falco(priority: str, severity: str) -> None:
    assert falco(line(FALCO, priority=priority)).severity == severity


@pytest.mark.parametrize(
    ("level", "severity"),
    [
        (0, "low"),
        (6, "low"),
        (7, "medium"),
        (11, "medium"),
        (12, "high"),
        (14, "high"),
        (15, "critical"),
        (16, "critical"),
    ],
)
def test_levels_of_wazuh(level: int, severity: str) -> None:
    assert wazuh(line(WAZUH, rule={"level": level, "id": "1"})).severity == severity


def test_the_subject_is_the_best_that_an_alert_has() -> None:
    for fields, subject in (
        ({"fd.name": "", "proc.exepath": "/usr/bin/cat"}, "/usr/bin/cat"),
        ({"fd.name": None, "proc.name": "cat"}, "cat"),
        ({}, "Read sensitive file untrusted"),
        ({"fd.name": "10.0.0.1:4->10.0.0.2:5"}, "10.0.0.1:4->10.0.0.2:5"),
    ):
        assert falco(line(FALCO, output_fields=fields)).subject == subject
    assert (
        falco(line(FALCO, output_fields={"proc.pid": "x", "user.uid": True})).evidence.keys().isdisjoint({"pid", "uid"})
    )


# --- the file ------------------------------------------------------------------------------------------------------------------


def followed(file: Path, minimum: Any = "informational") -> Tail:
    return Tail(Alerts("falco", str(file), minimum))


def rules(tail: Tail, place: str | None) -> tuple[list[str], str | None, int]:
    read = tail.look(place)
    if read is None:
        return [], place, 0
    return [str(one.evidence["rule"]) for one in read.detections], read.place, read.unreadable


def looked(tail: Tail, place: str | None) -> tuple[list[str], str | None]:
    """What so many looks find that a replaced file is let go of."""
    every = []
    for _ in range(STILL_LOOKS + 2):
        found, place, _ = rules(tail, place)
        every += found
    return every, place


def test_a_file_is_read_on_from_where_reading_stands(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    tail = followed(file)
    assert tail.look(None) is None
    file.write_bytes(line(FALCO, rule="one") + line(FALCO, rule="two")[:-5])
    found, place, _ = rules(tail, None)
    assert found == ["one"], "a line that is being written is left"
    assert rules(tail, place) == ([], place, 0)
    with file.open("ab") as stream:
        stream.write(line(FALCO, rule="two")[-5:] + line(FALCO, rule="three"))
    assert rules(followed(file), place)[0] == ["two", "three"], "after a restart too"
    found, place, _ = rules(tail, place)
    assert found == ["two", "three"]
    assert rules(tail, "nonsense")[0] == ["one", "two", "three"]


def test_a_file_that_is_put_in_its_place_is_begun_after_the_old_one_is_read(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    file.write_bytes(line(FALCO, rule="one"))
    tail = followed(file)
    found, place, _ = rules(tail, None)
    with file.open("ab") as stream:
        stream.write(line(FALCO, rule="last of the old"))
    file.rename(tmp_path / "alerts.json.1")
    file.write_bytes(line(FALCO, rule="first of the new"))
    found, place, _ = rules(tail, place)
    assert found == ["last of the old"]
    found, place = looked(tail, place)
    assert found == ["first of the new"]
    file.write_bytes(line(FALCO, rule="x"))  # cut in place
    assert rules(tail, place)[0] == ["x"]
    tail.close()


def test_what_the_engine_writes_before_it_opens_the_new_file_arrives(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    file.write_bytes(line(FALCO, rule="r1"))
    tail = followed(file)
    with file.open("ab", buffering=0) as engine:
        found, place, _ = rules(tail, None)
        assert found == ["r1"]
        file.rename(tmp_path / "alerts.json.1")
        file.touch()
        for _ in range(STILL_LOOKS - 1):
            assert rules(tail, place) == ([], place, 0)
        engine.write(line(FALCO, rule="r2") + line(FALCO, rule="r2 too")[:-9])
        found, place, _ = rules(tail, place)
        assert found == ["r2"]
        for _ in range(STILL_LOOKS - 1):
            assert rules(tail, place) == ([], place, 0), "a line that is being written is left"
        engine.write(line(FALCO, rule="r2 too")[-9:])
    file.write_bytes(line(FALCO, rule="r3"))
    found, place = looked(tail, place)
    assert found == ["r2 too", "r3"]
    tail.close()


def test_a_replaced_file_is_not_let_go_of_before_all_of_it_is_written_down(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    file.write_bytes(line(FALCO, rule="r1"))
    tail = followed(file)
    _, place, _ = rules(tail, None)
    with file.open("ab") as stream:
        stream.write(line(FALCO, rule="r2") + line(FALCO, rule="cut off")[:-9])
    file.rename(tmp_path / "alerts.json.1")
    file.write_bytes(line(FALCO, rule="r3"))
    for _ in range(STILL_LOOKS):
        assert rules(tail, place)[0] == ["r2"], "the spool is full, and the place stays"
    found, place, bad = rules(tail, place)
    assert (found, bad) == (["r2"], 0)
    found, place, bad = rules(tail, place)
    assert (found, bad) == ([], 1), "nobody ends that line any more"
    assert looked(tail, place)[0] == ["r3"]
    tail.close()


def test_what_is_no_alert_is_counted_and_does_not_end_reading(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    deep = b"[" * 100_000 + b"\n"
    file.write_bytes(b"no json\n" + line({"rule": "x"}) + b"\n" + deep + line(WAZUH) + line(FALCO, rule="good"))
    assert (rules(followed(file), None)[0], rules(followed(file), None)[2]) == (["good"], 4)
    file.write_bytes(b"x" * (AT_ONCE + 10) + b"\n" + line(FALCO, rule="after"))
    tail = followed(file)
    found, place, bad = rules(tail, None)
    assert (found, bad) == ([], 1)
    found, place, bad = rules(tail, place)
    assert (found, bad) == (["after"], 1)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(line(FALCO))
    (tmp_path / "alerts.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic"):
        followed(tmp_path / "alerts.json").look(None)


def test_what_is_below_the_minimum_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "alerts.json"
    file.write_bytes(
        b"".join(line(FALCO, rule=one, priority=one) for one in ("Debug", "Notice", "Warning", "Critical"))
    )
    assert rules(followed(file, "low"), None)[0] == ["Notice", "Warning", "Critical"]
    assert rules(followed(file, "high"), None)[0] == ["Critical"]


def config(tmp_path: Path, **changed: Any) -> EdrConfig:
    told = {
        "provider": "falco", "state_dir": str(tmp_path / "state"), "run_dir": str(tmp_path / "run"),
        "workspace": str(tmp_path / "none.json"), "vendor": Vendor("falco.service", ("true",)),
        "alerts": Alerts("falco", str(tmp_path / "alerts.json")), **changed,
    }  # fmt: skip
    return EdrConfig(**told)


def watched(settings: EdrConfig, store: Store) -> Watcher:
    factory = EventFactory("saw-edr", host="edge-1", new_uid=lambda: "1")
    return Watcher(settings, store, factory, lambda: NOW, Path("/etc/saw/edr.json"))


def test_findings_and_the_place_are_written_together_and_a_full_spool_reads_no_further(tmp_path: Path) -> None:
    settings = config(tmp_path, spool_limit=2)
    store = Store(settings.state, settings.spool_limit)
    watcher = watched(settings, store)
    assert watcher.look_at_alerts() == []
    assert "is not there: no alert of falco is read" in watcher.problems["alerts"]
    file = tmp_path / "alerts.json"
    file.write_bytes(line(FALCO, rule="one"))
    assert len(watcher.look_at_alerts()) == 1
    assert "alerts" not in watcher.problems
    assert watcher.look_at_alerts() == []
    assert watched(settings, store).look_at_alerts() == [], "a watcher that starts again tells nothing twice"
    place = store.note("alerts_place")
    with file.open("ab") as stream:
        stream.write(b"".join(line(FALCO, rule=str(number)) for number in range(3)))
    with pytest.raises(Exception, match="findings wait"):
        watcher.look_at_alerts()
    assert store.note("alerts_place") == place
    roomy = Store(settings.state, 100)
    # and that there was no room is told with them
    assert len(watched(settings, roomy).look_at_alerts()) >= 3
    roomy.close()
    store.close()


def test_lines_that_are_no_alerts_are_a_finding_that_tells_nothing_of_them(tmp_path: Path) -> None:
    settings = config(tmp_path)
    store = Store(settings.state, settings.spool_limit)
    watcher = watched(settings, store)
    file = tmp_path / "alerts.json"
    bad = [f"no json {SECRET}".encode(), f'{{"rule": "{SECRET}"}}'.encode()]
    file.write_bytes(bad[0] + b"\n" + line(FALCO, rule="good") + bad[1] + b"\n")
    assert len(watcher.look_at_alerts()) == 2
    assert "are no alerts of falco" in watcher.problems["alerts"]
    with file.open("ab") as stream:
        stream.write(line(FALCO, rule="next"))
    assert len(watcher.look_at_alerts()) == 1
    assert "alerts" not in watcher.problems, "the finding stays where the health is good again"
    told = [one.event for one in store.newest()]
    [event] = [one for one in told if "are no alerts" in one["message"]]
    validate(event)
    assert (event["severity"], event["message"]) == ("Medium", f"Lines are no alerts of falco: {file}")
    assert SECRET not in json.dumps(told)
    assert hashlib.sha256(b"\n".join(bad)).hexdigest() in json.dumps(event)
    assert watched(settings, store).look_at_alerts() == []
    for _ in range(2):
        with file.open("ab") as stream:
            stream.write(bad[0] + b"\n")
        assert len(watcher.look_at_alerts()) == 1, "the same line a second time is a second finding"
    store.close()


def test_an_unreadable_line_and_the_place_are_written_together(tmp_path: Path) -> None:
    settings = config(tmp_path, spool_limit=1)
    store = Store(settings.state, settings.spool_limit)
    watcher = watched(settings, store)
    (tmp_path / "alerts.json").write_bytes(line(FALCO))
    watcher.look_at_alerts()
    place = store.note("alerts_place")
    with (tmp_path / "alerts.json").open("ab") as stream:
        stream.write(b"no json\n")
    with pytest.raises(Exception, match="findings wait"):
        watcher.look_at_alerts()
    assert store.note("alerts_place") == place
    store.close()


def test_an_ignored_rule_is_left_out(tmp_path: Path) -> None:
    ignore = [{"kind": "engine_alert", "subject": "/etc/shadow", "reason": "our backup reads it"}]
    place = tmp_path / "edr.json"
    told = {
        "provider": "falco", "state_dir": str(tmp_path / "state"), "workspace": str(tmp_path / "none.json"),
        "vendor": {"service": "falco.service", "health": ["true"]},
        "alerts": {"format": "falco", "file": str(tmp_path / "alerts.json")}, "ignore": ignore,
    }  # fmt: skip
    place.write_text(json.dumps(told))
    settings = read_config(place)
    store = Store(settings.state, settings.spool_limit)
    (tmp_path / "alerts.json").write_bytes(line(FALCO) + line(FALCO, output_fields={"fd.name": "/etc/gshadow"}))
    assert len(watched(settings, store).look_at_alerts()) == 1
    store.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"alerts": None}, "falco needs alerts"),
        ({"vendor": None}, "vendor belongs to providers other than embedded"),
        ({"alerts": {"format": "wazuh", "file": "/a"}}, "alerts are those of wazuh"),
        ({"alerts": {"format": "falco", "file": "a"}}, "file"),
        ({"alerts": {"format": "falco", "file": "/a", "minimum": "Warning"}}, "minimum"),
        ({"provider": "embedded", "vendor": None}, "alerts are those of falco"),
        ({"provider": "unheard"}, "provider"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    good = {
        "provider": "falco", "vendor": {"service": "falco.service", "health": ["true"]},
        "alerts": {"format": "falco", "file": "/a"},
    }  # fmt: skip
    place = tmp_path / "edr.json"
    place.write_text(json.dumps(good))
    assert read_config(place).provider == "falco"
    place.write_text(json.dumps({**good, **change}))
    with pytest.raises(ConfigError, match=words):
        read_config(place)
    wazuh_agent = {"provider": "wazuh", "vendor": {"service": "wazuh-agent.service", "health": ["true"]}}
    place.write_text(json.dumps(wazuh_agent))
    assert read_config(place).alerts is None, "its manager has the alerts"
