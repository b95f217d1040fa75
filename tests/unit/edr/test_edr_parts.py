"""Parts of endpoint detection by themselves: configuration, events, spool, signatures, health."""

from __future__ import annotations

import json
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from saw.audit import EventFactory, validate
from saw.audit.events import Severity
from saw.edr.clamav import signatures_of
from saw.edr.config import EdrConfig, Ignore, Integrity, Malware, Vendor, read_config
from saw.edr.detection import AT_ONCE, WORST_AT_ONCE, Detection, bounded, event_of, printable
from saw.edr.forward import BrokerDestination, rfc5424
from saw.edr.health import Beat, health_of
from saw.edr.store import Found, SpoolFull, Store, iso
from saw.edr.trees import (
    Change,
    Marks,
    always,
    follow_mounts,
    persistence_of,
    setuid_of,
    starts_something,
    tampering_of,
)
from saw.errors import ConfigError, SawError

NOW = datetime(2026, 11, 29, 12, tzinfo=UTC)
pytestmark = pytest.mark.control("P0-03")


def factory() -> EventFactory:
    numbers = iter(range(10**6))
    return EventFactory("saw-edr", host="host", new_uid=lambda: f"uid-{next(numbers)}")


def detection(
    number: int = 0, kind: str = "setuid_file", subject: str = "/x", severity: Severity = "high"
) -> Detection:
    return Detection(kind, subject, "A file", f"{kind}|{number}", severity)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({}, ""),
        ({"provider": "vendor_package", "vendor": {"service": "agent.service", "health": ["/bin/true"]}}, ""),
        ({"provider": "falco"}, "provider"),
        ({"provider": "vendor_package"}, "vendor"),
        ({"vendor": {"service": "agent.service", "health": ["/bin/true"]}}, "vendor"),
        ({"provider": "vendor_package", "vendor": {"service": "agent", "health": ["/bin/true"]}}, "service"),
        ({"provider": "vendor_package", "vendor": {"service": "agent.service", "health": []}}, "health"),
        ({"shells_s": 0}, "shells_s"),
        ({"setuid_roots": ["relative"]}, "setuid_roots"),
        ({"ignore": [{"kind": "setuid_file", "subject": "*", "reason": ""}]}, "reason"),
        ({"ignore": [{"kind": "setuid", "subject": "*", "reason": "because"}]}, "kind"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_a_configuration_is_read_strictly(tmp_path: Path, values: dict, word: str) -> None:
    path = tmp_path / "edr.json"
    path.write_text(json.dumps(values))
    if not word:
        assert read_config(path).provider == values.get("provider", "embedded")
        return
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    assert word in refused.value.message
    assert refused.value.cure


@given(st.text(), st.text())
def test_any_name_of_a_file_makes_a_valid_event_in_one_line(subject: str, title: str) -> None:
    odd = os.fsdecode(subject.encode("utf-8", "surrogatepass"))
    event = event_of(Detection("malware", odd, "Malware", "key"), factory(), NOW, "ws-a")
    validate(event)
    line = rfc5424(event, "host", 1)
    assert b"\n" not in line
    assert printable(odd + title).isprintable()


def test_a_flood_is_cut_and_counted_for_each_kind_alone() -> None:
    many = [detection(number, severity="low") for number in range(AT_ONCE + 30)] + [detection(0, "persistence")]
    kept = bounded(many)
    assert len(kept) == AT_ONCE + 2
    assert [one.evidence["count"] for one in kept if "count" in one.evidence] == [30]
    assert len(bounded(many[:AT_ONCE])) == AT_ONCE


@pytest.mark.control("P0-03")
def test_what_is_grave_is_never_hidden_behind_a_flood_of_what_is_not(tmp_path: Path) -> None:
    low = [detection(number, severity="low") for number in range(3 * AT_ONCE)]
    mixed = [*low, detection(1000, severity="critical"), detection(1001, severity="medium")]
    kept = bounded(mixed)
    assert len(kept) == AT_ONCE + 1
    assert [one.severity for one in kept[-3:]] == ["critical", "medium", "low"], (
        "the order of those that are kept stays"
    )
    assert (kept[-1].evidence["count"], kept[-1].severity) == (2 * AT_ONCE + 2, "low")

    grave = [detection(2000 + number, severity="high") for number in range(AT_ONCE + 20)]
    kept = bounded([*low, *grave])
    assert [one for one in kept if one.severity == "high"] == grave
    assert [one.evidence["count"] for one in kept if "count" in one.evidence] == [3 * AT_ONCE]
    medium = [*low, *(detection(number, severity="medium") for number in range(3000, 3000 + AT_ONCE + 7))]
    assert [(one.severity, one.evidence["count"]) for one in bounded(medium) if one.evidence] == [
        ("medium", 3 * AT_ONCE + 7)
    ]
    many = [detection(number, severity="critical") for number in range(WORST_AT_ONCE + 3)]
    assert [(one.severity, one.evidence["count"]) for one in bounded([*low, *many]) if one.evidence] == [
        ("critical", 3 * AT_ONCE + 3)
    ]
    assert bounded(many[:WORST_AT_ONCE]) == many[:WORST_AT_ONCE]
    small = Store(tmp_path, 3 * AT_ONCE)
    numbers = small.record(many, factory(), NOW)
    assert len(numbers) == 3 * AT_ONCE // 2 + 1, "a look that is larger than the spool would never be written"
    small.close()


def test_the_spool_takes_a_thing_once_and_refuses_whole_when_it_is_full(tmp_path: Path) -> None:
    store = Store(tmp_path, 2)
    assert store.record([detection(1)], factory(), NOW) == [1]
    assert store.record([detection(1)], factory(), NOW) == []
    known = {"setuid": {"/x": "mark"}}
    with pytest.raises(SpoolFull) as refused:
        store.record([detection(2), detection(3)], factory(), NOW, known=known, notes={"note": "value"})
    assert refused.value.cure
    assert (len(store.newest()), store.known("setuid"), store.note("note")) == (1, {}, None)
    store.delivered("syslog", 1)
    store.record([detection(2), detection(3)], factory(), NOW, known=known)
    assert (store.waiting(), store.known("setuid")) == (3, {"/x": "mark"}), "with the finding about the gap"
    store.close()


def test_a_time_without_room_is_told_once_there_is_room_and_told_once(tmp_path: Path) -> None:
    store = Store(tmp_path, 1)
    store.record([detection(1)], factory(), NOW)
    for number in (2, 3):
        with pytest.raises(SpoolFull):
            store.record([detection(number)], factory(), NOW + timedelta(hours=number))
    assert store.record([], factory(), NOW + timedelta(hours=4)) == [], "there is no room yet"
    store.delivered("syslog", 1)
    store.record([], factory(), NOW + timedelta(hours=5))
    (gap,) = store.pending("syslog")
    said = gap.event["unmapped"]["saw"]
    assert (said["kind"], said["since"], said["until"]) == (
        "agent_unhealthy", iso(NOW + timedelta(hours=2)), iso(NOW + timedelta(hours=5)),
    )  # fmt: skip
    store.delivered("syslog", gap.seq)
    assert store.record([detection(4)], factory(), NOW + timedelta(hours=6)) != []
    assert [one.event["unmapped"]["saw"]["kind"] for one in store.pending("syslog")] == [detection(4).kind]
    store.close()
    other = Store(tmp_path / "other", 1, tells_gaps=False)
    other.record([detection(1)], factory(), NOW)
    with pytest.raises(SpoolFull):
        other.record([detection(2)], factory(), NOW)
    other.delivered("syslog", 1)
    other.record([detection(2)], factory(), NOW)
    assert other.waiting() == 1, "other parts have kinds of their own"
    other.close()


def test_delivered_findings_are_kept_up_to_the_limit_and_undelivered_ones_are_never_dropped(tmp_path: Path) -> None:
    store = Store(tmp_path, 3)
    store.record([detection(0)], factory(), NOW)
    for number in range(1, 8):
        store.record([detection(number)], factory(), NOW)
        store.delivered("syslog", number + 1)
    assert [one.seq for one in store.newest()] == [1, 6, 7, 8]
    store.use(("broker", "syslog"))
    assert store.waiting() == 4
    store.close()


def test_a_large_event_reaches_the_broker_as_its_title() -> None:
    sent: list[dict] = []

    class Far:
        def report(self, kind: str, _state: str, *, reason: str, detail: dict) -> None:
            sent.append({"kind": kind, "reason": reason, "detail": detail})

        def close(self) -> None:
            pass

    small = event_of(detection(), factory(), NOW)
    big = event_of(Detection("malware", "/x", "Malware", "key", evidence={"text": "x" * 9000}), factory(), NOW)
    for event in (small, big):
        BrokerDestination(Far()).send(Found(1, event, broker=False, syslog=False))
    assert sent[0]["detail"] == {"event": small}
    assert sent[1]["detail"]["cut"]["title"] == "Malware: /x"
    assert {one["kind"] for one in sent} == {"finding"}


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("/etc/systemd/system/door.service", True),
        ("/etc/systemd/system/multi-user.target.wants/door.service", True),
        ("/etc/systemd/system/ssh.service.d/override.conf", True),
        ("/etc/systemd/system/notes.txt", False),
        ("/etc/systemd/system/.door.service.swp", False),
        ("/etc/cron.d/job", True),
        ("/etc/cron.d/job.disabled", False),
        ("/etc/cron.daily/.placeholder", False),
        ("/etc/crontab", True),
        ("/var/spool/cron/crontabs/root", True),
        ("/etc/ld.so.preload", True),
    ],
)
def test_what_starts_something_is_told_by_folder_and_name(path: str, *, counts: bool) -> None:
    assert starts_something(path) is counts


def test_a_folder_with_too_many_files_is_told_and_hides_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saw.edr.trees.MOST_BELOW", 3)
    for folder, count in (("a", 5), ("b", 3)):
        (tmp_path / folder).mkdir()
        for number in range(count):
            (tmp_path / folder / f"{number}.service").write_text("")
    look = Marks().look((f"{tmp_path}/a", f"{tmp_path}/b"), starts_something)
    assert look.cut_off
    assert sum(path.startswith(f"{tmp_path}/b/") for path in look.marks) == 3
    assert not Marks().look((f"{tmp_path}/b",), always).cut_off


def test_file_systems_where_setuid_means_nothing_are_not_followed(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 0:21 / / rw - ext4 /dev/vda rw\n"
        "23 22 0:22 / /home rw,nosuid - ext4 /dev/vdb rw\n"
        "24 22 0:23 / /proc rw - proc proc rw\n"
        "25 22 0:24 / /mnt/with\\040space rw - xfs /dev/vdc rw\n"
    )
    assert follow_mounts(table) == {"/": True, "/home": False, "/proc": False, "/mnt/with space": True}


def test_official_signatures_are_as_old_as_their_header_says(tmp_path: Path) -> None:
    assert signatures_of(tmp_path / "nowhere").newest is None
    (tmp_path / "readme").write_text("no signatures")
    assert signatures_of(tmp_path).files == 0
    (tmp_path / "daily.cvd").write_bytes(b"ClamAV-VDB:07 Sep 2026 12-30 +0200:27390:" + b" " * 500)
    assert signatures_of(tmp_path).newest == datetime(2026, 9, 7, 10, 30, tzinfo=UTC)
    (tmp_path / "own.hdb").write_text("")
    os.utime(tmp_path / "own.hdb", (NOW.timestamp(), NOW.timestamp()))
    assert signatures_of(tmp_path).newest == NOW


class Rig:
    """A host on which everything is well, until a test changes something."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "signatures").mkdir()
        self.signatures = folder / "signatures/own.hdb"
        self.signatures.write_text("")
        self.database = folder / "aide.db"
        self.database.write_text("")
        self.config = EdrConfig(
            state_dir=str(folder / "state"),
            run_dir=str(folder),
            workspace=str(folder / "workspace.json"),
            malware=Malware(("/home",), str(folder / "signatures"), 86400.0, "/bin/true"),
            integrity=Integrity(str(folder / "aide.conf"), str(self.database), "/bin/true"),
        )
        self.times(NOW, NOW, NOW)

    def times(self, beat: datetime, scan: datetime, signatures: datetime) -> None:
        self.config.beat.write_text(json.dumps({"time": beat.timestamp()}))
        store = Store(self.config.state, 10)
        store.notes(
            {"malware_scan": scan.isoformat(), "integrity_scan": scan.isoformat(), "integrity_differences": "0"}
        )
        store.close()
        os.utime(self.signatures, (signatures.timestamp(), signatures.timestamp()))

    def problems(self) -> list[str]:
        return list(health_of(self.config, NOW).problems)


def test_a_host_on_which_all_is_well_has_no_problem(tmp_path: Path) -> None:
    assert Rig(tmp_path).problems() == []


@pytest.mark.parametrize(
    ("ago", "words"),
    [
        ((timedelta(minutes=5), timedelta(), timedelta()), "the watcher has shown no life for 300 s"),
        ((timedelta(), timedelta(hours=4), timedelta()), "the last malware scan was 4 hours ago"),
        ((timedelta(), timedelta(hours=4), timedelta()), "the last integrity scan was 4 hours ago"),
        ((timedelta(), timedelta(), timedelta(days=3)), "are 3 days old, more than 24 hours"),
    ],
)
def test_what_is_too_old_is_a_problem(tmp_path: Path, ago: tuple[timedelta, ...], words: str) -> None:
    rig = Rig(tmp_path)
    rig.times(*(NOW - span for span in ago))
    assert any(words in problem for problem in rig.problems()), rig.problems()


@pytest.mark.parametrize(("name", "words"), [("signatures/own.hdb", "no signatures"), ("aide.db", "no integrity database"),
                                             ("beat.json", "no sign of life")])  # fmt: skip
def test_what_is_missing_is_a_problem(tmp_path: Path, name: str, words: str) -> None:
    rig = Rig(tmp_path)
    (tmp_path / name).unlink()
    (problem,) = rig.problems()
    assert words in problem


def test_what_the_watcher_could_not_do_is_a_problem(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    beat = Beat(NOW.timestamp(), ("setuid: more files than can be watched",))
    rig.config.beat.write_text(json.dumps({"time": beat.time, "problems": beat.problems}))
    assert rig.problems() == ["setuid: more files than can be watched"]


def test_a_vendors_agent_that_does_not_run_is_a_problem(tmp_path: Path) -> None:
    vendor = Vendor("no-such-agent.service", ("/bin/true",))
    rig = Rig(tmp_path)
    config = EdrConfig(
        provider="vendor_package",
        state_dir=str(tmp_path / "state"),
        run_dir=str(tmp_path),
        workspace=rig.config.workspace,
        vendor=vendor,
    )
    assert any("no-such-agent.service does not run" in problem for problem in health_of(config, NOW).problems)


def test_a_spool_that_cannot_be_opened_says_so(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    with pytest.raises(SawError, match="cannot be opened"):
        Store(tmp_path / "state", 1)


def test_what_a_package_explains_is_low_but_a_setuid_file_stays_high() -> None:
    change = Change("/usr/lib/systemd/system/x.service", "new", "mark")
    for judge, alone in ((persistence_of, "high"), (tampering_of, "critical")):
        assert judge(change, "").severity == alone
        assert judge(change, "coreutils").severity == "low"
        assert judge(change, "coreutils").evidence["package"] == "coreutils"
    assert setuid_of(change, "coreutils").severity == "high"
    gone = Change("/x", "gone", None)
    assert (persistence_of(gone, ""), setuid_of(gone, "")) == (None, None)
    assert tampering_of(gone, "").severity == "critical"


def test_the_page_states_the_intervals_that_the_watcher_has() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/edr.md").read_text(encoding="utf-8")
    config = EdrConfig()
    for kind, seconds in (
        ("reverse_shell", config.shells_s),
        ("persistence", config.watch_s),
        ("tampering", config.watch_s),
        ("setuid_file", config.setuid_s),
    ):
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{kind}` |")]
        assert f"| {seconds:.0f} s" in row
    assert f"`edr_scan_minutes` ({config.scan_s / 60:.0f})" in page


def test_the_examples_of_the_page_are_what_the_role_takes() -> None:
    root = Path(__file__).resolve().parents[3]
    options = yaml.safe_load((root / "roles/edr/meta/argument_specs.yml").read_text())["argument_specs"]["main"][
        "options"
    ]
    blocks = re.findall(
        r"^```yaml\n(.*?)^```$", (root / "docs/edr.md").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    said = {name: value for block in blocks for name, value in yaml.safe_load(block).items()}
    assert {"edr_provider", "edr_vendor", "edr_vendor_token", "edr_ignore"} <= said.keys() <= options.keys()
    assert said["edr_vendor"].keys() <= options["edr_vendor"]["options"].keys()
    ignored = [msgspec.convert(one, Ignore) for one in said["edr_ignore"]]
    assert ignored[0].covers("setuid_file", "/srv/build/7/sandbox")
    assert not ignored[0].covers("setuid_file", "/srv/other/sandbox")
