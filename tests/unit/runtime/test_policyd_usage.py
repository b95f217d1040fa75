"""What an agent used is read from the control groups, told now and then, and becomes an event."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from saw.audit.events import EventFactory, Subject
from saw.audit.workspace_usage import MOST_UNITS, Usage, Used, event_of
from saw.errors import SawError
from saw.runtime.policyd_usage import UsageReports, read_usage

pytestmark = pytest.mark.control("AUD-01")
BOOT = "4d0f3d0c-3a7e-4d1c-9a55-0b6f6a3f1b11"
FILES = {
    "cpu.stat": "usage_usec 12345678\nuser_usec 1\nnr_throttled 7\n",
    "memory.peak": "268435456\n",
    "memory.events": "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 0\n",
    "pids.current": "17\n",
    "pids.events": "max 0\n",
    "io.stat": "8:0 rbytes=100 wbytes=200 rios=1 wios=2 dbytes=0 dios=0\n8:16 rbytes=10 wbytes=20 rios=1 wios=1\n8:32 \n",
}


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    """The control groups of a workspace with a shell, an agent, and a session of an MCP server."""
    top = tmp_path / "sandbox.slice"
    for name in ("", "saw-shell.service", "saw-agent@triage.service", "saw-mcp-server-files@3-77-0.service"):
        (top / name).mkdir()
        for file, text in FILES.items():
            (top / name / file).write_text(text)
    (top / "saw-agent@triage.service" / "pids.events").write_text("max 5\n")
    (tmp_path / "boot_id").write_text(f"{BOOT}\n")
    return tmp_path


def read(groups: Path) -> Usage | None:
    usage = read_usage(groups, groups / "boot_id")
    if usage is not None:
        assert msgspec.json.decode(msgspec.json.encode(usage), type=Usage) == usage, "the broker would not take it"
    return usage


def test_the_kernels_counts_are_read(groups: Path) -> None:
    usage = read(groups)
    assert usage is not None
    one = Used(
        cpu_ms=12345,
        memory_peak=256 * 1024**2,
        tasks=17,
        read_bytes=110,
        written_bytes=220,
        oom_kills=2,
        refused_tasks=5,
    )
    assert usage.boot == BOOT.replace("-", "")
    assert usage.total == one
    assert usage.units == {
        "saw-agent@triage.service": one,
        "saw-shell.service": msgspec.structs.replace(one, refused_tasks=0),
    }


def test_what_is_not_counted_is_nothing_and_no_failure(groups: Path) -> None:
    for file in ("memory.peak", "memory.events", "io.stat", "pids.events"):
        (groups / "sandbox.slice" / file).unlink()
    (groups / "sandbox.slice" / "pids.current").write_text("what\n")
    usage = read(groups)
    assert usage is not None
    assert usage.total == Used(cpu_ms=12345, refused_tasks=5)
    assert read_usage(groups / "elsewhere") is None


def test_it_is_told_at_intervals_and_when_there_is_something_new(groups: Path) -> None:
    clock, told, lost = [0.0], [], [False]

    def tell(usage: Usage) -> None:
        if lost[0]:
            raise SawError("the broker is away")
        told.append(usage)

    reports = UsageReports(tell, lambda: clock[0], 60.0, read=lambda: read(groups))
    reports.report()
    assert told == [], "not before the first interval has gone by"
    clock[0] = 61.0
    reports.report()
    reports.report()
    assert len(told) == 1
    clock[0] = 130.0
    reports.report()
    assert len(told) == 1, "nothing was used since"
    (groups / "sandbox.slice" / "cpu.stat").write_text("usage_usec 99000000\n")
    lost[0] = True
    clock[0] = 200.0
    with pytest.raises(SawError):
        reports.report()
    lost[0] = False
    clock[0] = 270.0
    reports.report()
    assert [one.total.cpu_ms for one in told] == [12345, 99000]


def test_a_report_becomes_an_event_of_the_workspace() -> None:
    factory = EventFactory("broker", host="h", new_uid=lambda: "u")
    usage = Usage(boot="0" * 32, total=Used(cpu_ms=61500, memory_peak=300 * 1024**2))
    subject = Subject(principal="workspace:ws-demo", workspace="ws-demo")
    event = event_of(factory, datetime(2026, 1, 2, tzinfo=UTC), subject, usage)
    assert event["message"] == "used 61.5 s of processors since boot, at most 300 MiB"
    assert event["device"]["uid"] == "ws-demo"
    assert event["unmapped"]["saw"]["usage"]["total"]["cpu_ms"] == 61500


@pytest.mark.parametrize(
    ("refused", "taken"),
    [
        ({"boot": "x" * 32}, {"boot": "a" * 32}),
        ({"total": {"cpu_ms": -1}}, {"total": {"cpu_ms": 1}}),
        ({"total": {"cpu_ms": 2**53}}, {"total": {"cpu_ms": 2**53 - 1}}),
        ({"total": {"gpu_ms": 1}}, {"total": {"oom_kills": 1}}),
        ({"units": {"<b>": {}}}, {"units": {"saw-agent@night-watch.service": {}}}),
        ({"units": {f"a{n}": {} for n in range(MOST_UNITS + 1)}}, {"units": {f"a{n}": {} for n in range(MOST_UNITS)}}),
    ],
)
def test_what_is_no_report_is_refused(refused: dict[str, object], taken: dict[str, object]) -> None:
    whole: dict[str, object] = {"boot": "0" * 32, "total": {}}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(whole | refused, Usage)
    msgspec.convert(whole | taken, Usage)
