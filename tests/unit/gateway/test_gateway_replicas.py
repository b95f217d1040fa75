"""Several gatekeepers on one host: what they share stays whole, whoever dies, and only one does what one may do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from saw.audit.chain import verify_chain
from saw.audit.events import EventFactory
from saw.budget.errors import LedgerError
from saw.budget.ledger import Ledger, Limit
from saw.cli.gateway import main
from saw.errors import ConfigError
from saw.gateway.app import LATEST_S, AuthorizationApp
from saw.gateway.clock import Clock
from saw.gateway.config import GatekeeperConfig, load_config
from saw.gateway.contact import Contact
from saw.gateway.envoy_parts import HEALTH_PATH
from saw.gateway.errors import SpoolError
from saw.gateway.judge import Call, Dial, Verdict
from saw.gateway.releases import TrustRoot
from saw.gateway.replicas import Lead, home
from saw.gateway.spool import Spool
from saw.gateway.state import Cache, PerimeterState, StateFile, WorkspaceEntry
from saw.gateway.streams import Standing
from saw.gateway.view import ViewKeeper
from saw.gateway.xds import XdsWriter, validate

NOW = datetime(2026, 11, 30, 12, 0, tzinfo=UTC)

_RECORDS = """
import asyncio, sys
from pathlib import Path
from saw.gateway.spool import Spool

async def run(count):
    spool = Spool(Path(sys.argv[1]), "edge", 100_000)
    print("ready", flush=True)
    sys.stdin.readline()
    number = 0
    while number < count:
        done = await asyncio.gather(*(spool.record({"by": sys.argv[2], "n": n}) for n in range(number, number + 20)))
        number += 20
        print(*done, flush=True)

asyncio.run(run(int(sys.argv[3])))
"""
_HOLDS = """
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("BEGIN IMMEDIATE")
print("held", flush=True)
time.sleep(600)
"""
_LEADS = """
import sys, time
from pathlib import Path
from saw.gateway.replicas import Lead
print(Lead(Path(sys.argv[1])).take(), flush=True)
time.sleep(600)
"""


@contextmanager
def process(source: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Run a program and end it, however the block ends."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as found:
        try:
            yield found
        finally:
            found.kill()


def line(found: subprocess.Popen[str]) -> str:
    assert found.stdout is not None
    return found.stdout.readline().strip()


def go(*found: subprocess.Popen[str]) -> None:
    for one in found:
        assert line(one) == "ready"
    for one in found:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()


@pytest.mark.control("AUD-01")
def test_two_processes_write_one_dense_chain(tmp_path: Path) -> None:
    Spool(tmp_path, "edge", 100_000).close()
    with process(_RECORDS, tmp_path, "a", 400) as first, process(_RECORDS, tmp_path, "b", 400) as second:
        go(first, second)
        said = [int(number) for one in (first, second) for _ in range(20) for number in line(one).split()]
    spool = Spool(tmp_path, "edge", 100_000)
    events = spool.pending(2000)
    assert verify_chain(events, spool.head).complete
    assert sorted(said) == [event.seq for event in events] == list(range(1, 801))
    assert {event.event["by"] for event in events} == {"a", "b"}
    spool.close()


@pytest.mark.control("AUD-01")
def test_what_a_killed_process_was_told_is_on_disk_and_the_other_goes_on(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 100_000)
    with process(_RECORDS, tmp_path, "a", 10**9) as other:
        go(other)
        said = {int(number) for _ in range(5) for number in line(other).split()}
        asyncio.run(spool.record({"by": "us"}))
        other.send_signal(signal.SIGKILL)
        assert other.stdout is not None
        rest = [text for text in other.stdout.read().splitlines(keepends=True) if text.endswith("\n")]
        said |= {int(number) for text in rest for number in text.split()}
    last = asyncio.run(spool.record({"by": "us"}))
    events = spool.pending(10**6)
    assert verify_chain(events, spool.head).complete
    assert events[-1].seq == last
    by = {event.seq: event.event["by"] for event in events}
    assert said and {by[number] for number in said} == {"a"}
    spool.close()


@pytest.mark.control("AUD-01")
def test_one_that_stands_still_in_a_change_has_calls_refused_until_it_is_ended(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 100)
    ledger = Ledger(tmp_path / "budget.db", patience_s=0.1)
    limit = Limit("coding/spend", "ws-1", "USD", "day", 100)
    assert asyncio.run(spool.record({"n": 1})) == 1
    with process(_HOLDS, tmp_path / "spool.db") as events, process(_HOLDS, tmp_path / "budget.db") as charges:
        assert (line(events), line(charges)) == ("held", "held")
        for one in (events, charges):
            one.send_signal(signal.SIGSTOP)
        with pytest.raises(SpoolError, match="cannot be written"):
            asyncio.run(spool.record({"n": 2}))
        with pytest.raises(SpoolError):
            spool.acknowledge(1)
        assert [event.seq for event in spool.pending()] == [1], "reading goes on"
        with pytest.raises(LedgerError, match="cannot be written"):
            ledger.reserve(limit, 10, "c1", NOW)
    assert asyncio.run(spool.record({"n": 3})) == 2
    assert ledger.reserve(limit, 100, "c2", NOW).left == 0
    spool.acknowledge(1)
    assert [event.seq for event in spool.pending()] == [2]
    ledger.close()
    spool.close()


@pytest.mark.control("AUD-01")
def test_a_full_spool_counts_what_others_wrote_and_what_the_broker_has_by_them(tmp_path: Path) -> None:
    one, other = Spool(tmp_path, "edge", 2), Spool(tmp_path, "edge", 2)
    assert [asyncio.run(spool.record({})) for spool in (one, other)] == [1, 2]
    with pytest.raises(SpoolError, match="full"):
        asyncio.run(one.record({}))
    other.acknowledge(1)
    assert one.acknowledged == 1
    assert asyncio.run(one.record({})) == 3
    one.close()
    other.close()


def test_one_leads_until_it_ends_however_it_ends(tmp_path: Path) -> None:
    lead = Lead(tmp_path)
    with process(_LEADS, tmp_path) as other:
        assert line(other) == "True"
        assert not lead.take()
        other.send_signal(signal.SIGSTOP)
        assert not lead.take(), "who stands still may go on, so nobody else may do the same"
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert lead.take() and lead.held
    second = Lead(tmp_path)
    assert (second.take(), second.held) == (False, False)
    lead.close()
    assert second.take()
    assert (tmp_path / "lead").stat().st_mode & 0o777 == 0o600
    second.close()


def entry(number: int) -> WorkspaceEntry:
    return WorkspaceEntry(id=f"ws-{number}", number=number, state="active")


class Keeper:
    """A keeper of the broker's state that leads or does not."""

    def __init__(self, directory: Path, *, leads: bool) -> None:
        self.file = StateFile(directory)
        clock = Clock(NOW.timestamp, lambda: 0.0, 5.0)
        self.keeper = ViewKeeper(
            TrustRoot({}, 1), clock, self.file, lambda: 0.0, 90.0, ca_pem=b"", contact=Contact(directory, 90.0, None, 2)
        )
        self.published: list[tuple[int, ...]] = []
        self.keeper.changed = lambda view: self.published.append(view.open_numbers())
        self.keeper.keeps = lambda: leads

    def take(self, seq: int, *numbers: int) -> None:
        asyncio.run(self.keeper.take(PerimeterState(seq=seq, now=NOW, workspaces=tuple(map(entry, numbers)))))

    def succeed(self, seq: int, *numbers: int, **floors: int) -> None:
        state = PerimeterState(seq=seq, now=NOW, workspaces=tuple(map(entry, numbers)))
        asyncio.run(self.keeper.succeed(Cache(saved_at=NOW, state=state, floors=floors)))


def test_only_who_leads_saves_the_state(tmp_path: Path) -> None:
    Keeper(tmp_path, leads=False).take(7, 1)
    assert StateFile(tmp_path).load() is None
    Keeper(tmp_path, leads=True).take(7, 1)
    saved = StateFile(tmp_path).load()
    assert saved is not None
    assert saved.state.seq == 7


@pytest.mark.control("LIF-02")
def test_who_takes_over_writes_nothing_older_than_what_was_known(tmp_path: Path) -> None:
    behind = Keeper(tmp_path, leads=True)
    behind.take(7, 1, 2)
    behind.succeed(8, 1, **{"ws-1": 5})
    assert behind.published[-1] == (1,), "workspace 2 was cut off by state 8"
    assert behind.keeper.after is None, "the broker is asked anew"
    behind.take(7, 1)
    saved = behind.file.load()
    assert saved is not None
    assert (saved.state.seq, saved.floors) == (7, {"ws-1": 5}), "what the broker says counts; what ran is not forgotten"
    ahead = Keeper(tmp_path, leads=True)
    ahead.take(9, 1, 2)
    ahead.succeed(8, 1, **{"ws-1": 6})
    assert (ahead.published[-1], ahead.keeper.after) == ((1, 2), 9)
    assert ahead.keeper.view.floors == {"ws-1": 6}


class Judged:
    """Stands where the judge does; ``before`` happens while it decides."""

    def __init__(self, verdict: Verdict) -> None:
        self.verdict = verdict
        self.returned: list[str] = []

    async def decide(self, _call: Call) -> Verdict:
        await asyncio.sleep(0)
        return self.verdict

    async def give_back(self, _verdict: Verdict, why: str) -> None:
        self.returned.append(why)


CALL = Call("1", "", "https", "api.example.com", "443", "GET", "/x", "", (), "r", {}, b"", body_complete=True)
ALLOWED = Verdict(
    call=CALL, time=NOW, allowed=True, host="api.example.com", port=443, workspace_id="ws-1",
    dial=Dial("192.0.2.1:443", "api.example.com", "tls", "/x", None, ()),
)  # fmt: skip
REFUSED = msgspec.structs.replace(ALLOWED, allowed=False, dial=None, reason="host_not_allowed")


class App:
    def __init__(self, directory: Path, verdict: Verdict, **options: Any) -> None:
        self.judge, self.spool = Judged(verdict), Spool(directory, "edge", 100)
        factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")
        self.app = AuthorizationApp(self.judge, self.spool, factory, **options)  # type: ignore[arg-type]

    def ask(self, path: str = "/x", *, listener: str = "1", gone: bool = False) -> tuple[int, dict[str, Any]]:
        """Put one question as Envoy does; ``gone``: it hangs up right behind it."""
        headers = [(b"host", b"api.example.com")] + ([(b"x-saw-listener", listener.encode())] if listener else [])
        sent: list[Any] = []

        async def put() -> None:
            messages = [{"type": "http.request", "body": b""}] + ([{"type": "http.disconnect"}] if gone else [])
            never = asyncio.Event()

            async def receive() -> Any:
                if not messages:
                    await never.wait()
                return messages.pop(0)

            async def send(message: Any) -> None:
                sent.append(message)

            await self.app({"type": "http", "path": path, "headers": headers}, receive, send)

        asyncio.run(put())
        body = sent[1]["body"]
        return sent[0]["status"], json.loads(body) if body else {}


@pytest.mark.control("AUD-01")
def test_a_call_that_was_given_up_is_not_recorded_as_allowed(tmp_path: Path) -> None:
    app = App(tmp_path, ALLOWED)
    status, told = app.ask(gone=True)
    assert (status, told["reason"]) == (403, "gatekeeper_unavailable")
    assert (app.spool.pending(), app.judge.returned) == ([], ["the call could not be recorded"])
    assert app.ask()[0] == 200
    assert len(app.spool.pending()) == 1
    app.judge.verdict = REFUSED
    assert app.ask(gone=True)[0] == 403
    assert len(app.spool.pending()) == 2, "a refusal is recorded, whoever waits for it"
    app.spool.close()


@pytest.mark.control("AUD-01")
@pytest.mark.parametrize(("seconds", "status"), [(LATEST_S - 0.5, 200), (LATEST_S + 0.5, 403)])
def test_a_decision_that_comes_too_late_is_a_refusal(tmp_path: Path, seconds: float, status: int) -> None:
    times = iter([0.0, seconds])
    app = App(tmp_path, ALLOWED, monotonic=lambda: next(times))
    assert app.ask()[0] == status
    assert len(app.spool.pending()) == (1 if status == 200 else 0)
    app.spool.close()


def test_a_gatekeeper_in_doubt_says_so_and_no_call_of_a_workspace_asks_it(tmp_path: Path) -> None:
    doubt = {"doubt": ""}
    app = App(tmp_path, REFUSED, health=lambda: {"replica": 2, **doubt})
    assert app.ask(HEALTH_PATH, listener="") == (200, {"replica": 2, "doubt": "", "decided": 0})
    assert app.ask(HEALTH_PATH, listener="1")[1]["reason"] == "host_not_allowed"
    doubt["doubt"] = "the broker has not answered for 91 s"
    assert app.ask(HEALTH_PATH, listener="") == (503, {"replica": 2, **doubt, "decided": 1})
    app.spool.close()


def configured(directory: Path, replicas: int, /, **changes: Any) -> GatekeeperConfig:
    fields = {
        "name": "edge", "broker_url": "https://10.77.0.10:8443", "ca_file": "/a", "cert_file": "/b", "key_file": "/c",
        "tuf_root_file": "/d", "replicas": replicas, "state_dir": str(directory / "state"),
        "authz_socket": f"{directory}/{{replica}}/authz.sock", "review_socket": f"{directory}/{{replica}}/review.sock",
        "ring2": {
            "broker_address": "10.77.0.10:8443", "xds_dir": str(directory / "xds"), "tls_dir": str(directory),
            "send_socket": f"{directory}/send-{{replica}}.sock", "envoy": str(Path(sys.executable).with_name("envoy")),
        },
        **changes,
    }  # fmt: skip
    path = directory / "gatekeeper.json"
    path.write_text(json.dumps(fields))
    return load_config(path)


@pytest.mark.parametrize(
    "changes",
    [{"replicas": 0}, {"replicas": 9}, {"authz_socket": "/run/authz.sock"}, {"authz_socket": "/run/a-{replica}.sock"},
     {"review_socket": "/run/review.sock"}, {"ring2": {"broker_address": "10.0.0.1:1", "send_socket": "/run/send"}}],
)  # fmt: skip
def test_replicas_that_would_share_a_socket_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    configured(tmp_path, 2)
    with pytest.raises(ConfigError):
        configured(tmp_path, 2, **changes)


def test_one_gatekeeper_needs_no_numbers(tmp_path: Path) -> None:
    config = configured(tmp_path, 1, authz_socket="/run/x/authz.sock", review_socket=None)
    assert msgspec.structs.asdict(config.sockets()) == {
        "authz": Path("/run/x/authz.sock"), "mcp": Path("/run/x/mcp.sock"), "postgres": Path("/run/x/postgres.sock"),
        "records": Path("/run/x/records.sock"), "review": None, "send": tmp_path / "send-1.sock",
    }  # fmt: skip


def resources(text: str) -> dict[str, dict[str, Any]]:
    return {item["name"]: item for item in json.loads(text)["resources"]}


def filters(listener: dict[str, Any]) -> dict[str, Any]:
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return {item["name"]: item["typed_config"] for item in manager["http_filters"]}


def asked(listener: dict[str, Any]) -> dict[str, Any]:
    return dict(filters(listener)["envoy.filters.http.ext_authz"]["http_service"])


def test_a_workspace_has_a_replica_of_its_own_and_the_others_stand_by(tmp_path: Path) -> None:
    assert [home(number, 3) for number in (1, 2, 3, 4)] == [1, 2, 3, 1]
    files = XdsWriter(configured(tmp_path, 3)).render((1, 2, 3), ())
    clusters, listeners = resources(files["cds.json"]), resources(files["lds.json"])
    for number, order in ((1, (1, 2, 3)), (2, (2, 3, 1)), (3, (3, 1, 2))):
        name = asked(listeners[f"ring2-{number}"])["server_uri"]["cluster"]
        places = clusters[name]["load_assignment"]["endpoints"]
        assert [place["priority"] for place in places] == [0, 1, 2]
        paths = [place["lb_endpoints"][0]["endpoint"]["address"]["pipe"]["path"] for place in places]
        assert paths == [f"{tmp_path}/{replica}/authz.sock" for replica in order]
        assert clusters[name]["health_checks"][0]["http_health_check"]["path"] == HEALTH_PATH
        first = ", ".join(f'"{part}"' for part in ("gatekeeper", "gatekeeper-2", "gatekeeper-3"))
        if number == 1:
            assert f"local GATEKEEPERS = {{{first}}}" in files["lds.json"].replace('\\"', '"')


@pytest.mark.control("BUD-01")
def test_a_question_is_put_to_another_replica_only_when_nobody_had_it(tmp_path: Path) -> None:
    several = asked(resources(XdsWriter(configured(tmp_path, 2)).render((1,), ())["lds.json"])["ring2-1"])
    assert several["retry_policy"]["retry_on"].split(",") == ["connect-failure", "reset-before-request"]
    one = asked(resources(XdsWriter(configured(tmp_path, 1)).render((1,), ())["lds.json"])["ring2-1"])
    assert "retry_policy" not in one


@pytest.mark.control("REV-01")
def test_what_one_replica_decided_goes_on_with_it_alone(tmp_path: Path) -> None:
    standing = {1: Standing("x", websockets=False, sessions=True)}
    files = XdsWriter(configured(tmp_path, 2)).render((1,), (), standing)
    clusters, listeners = resources(files["cds.json"]), resources(files["lds.json"])
    for replica, name in ((1, "ring2-approved"), (2, "ring2-approved-2")):
        assert listeners[name]["address"]["pipe"]["path"] == f"{tmp_path}/send-{replica}.sock"
        service = asked(listeners[name])
        assert "retry_policy" not in service
        (place,) = clusters[service["server_uri"]["cluster"]]["load_assignment"]["endpoints"]
        assert place["lb_endpoints"][0]["endpoint"]["address"]["pipe"]["path"] == f"{tmp_path}/{replica}/authz.sock"
    manager = listeners["ring2-1"]["filter_chains"][0]["filters"][0]["typed_config"]
    routes = {
        route["match"]["headers"][0]["string_match"]["exact"]: route["route"]["cluster"]
        for route in manager["route_config"]["virtual_hosts"][0]["routes"]
        if "route" in route
    }
    for service in ("mcp", "review", "postgres"):
        for replica, name in ((1, service), (2, f"{service}-2")):
            assert routes[name] == name
            (place,) = clusters[name]["load_assignment"]["endpoints"]
            path = place["lb_endpoints"][0]["endpoint"]["address"]["pipe"]["path"]
            assert path == f"{tmp_path}/{replica}/{service}.sock"


def test_envoy_takes_what_is_written_for_several_and_clusters_are_there_before_who_needs_them(tmp_path: Path) -> None:
    several, one = configured(tmp_path, 2), configured(tmp_path, 1)
    (tmp_path / "xds").mkdir()
    XdsWriter(several).write((), ())
    validate(several, XdsWriter(several).render((1, 2), (), {2: Standing("x", websockets=True, sessions=True)}))
    written = [XdsWriter(config).write((1, 2), ()) for config in (one, several, one)]
    assert [[name for name in names if not name.startswith("sds")] for names in written] == [
        ["cds.json", "lds.json"], ["cds.json", "lds.json"], ["lds.json", "cds.json"],
    ]  # fmt: skip


def test_only_replicas_that_are_configured_serve_and_none_that_is_away_decides(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configured(tmp_path, 2)
    path = str(tmp_path / "gatekeeper.json")
    for number in ("0", "3"):
        with pytest.raises(ConfigError, match=f"no replica {number}"):
            main(["serve", "--replica", number, "--config", path])
    assert main(["status", "--json", "--config", path]) == 1
    told = json.loads(capsys.readouterr().out)
    assert [replica["problem"] for replica in told["replicas"]] == ["it is not there: No such file or directory"] * 2
    assert (told["ok"], told["events_waiting"], told["reservations_open"]) == (False, None, None)
    assert main(["status", "--config", path]) == 1
    assert "replica 2: it is not there" in capsys.readouterr().out


def test_a_reservation_of_a_replica_that_died_expires_at_the_other(tmp_path: Path) -> None:
    """As after a crash of the only one: nobody tells the end, so it counts as spent in full."""
    limit = Limit("coding/spend", "ws-1", "USD", "day", 100)
    reserves = (
        "import sys; from datetime import datetime; from pathlib import Path; from saw.budget.ledger import *;"
        "Ledger(Path(sys.argv[1]), life_s=600).reserve("
        "Limit('coding/spend', 'ws-1', 'USD', 'day', 100), 60, 'c1', datetime.fromisoformat(sys.argv[2]));"
        "print('ready', flush=True); sys.stdin.readline()"
    )
    with process(reserves, tmp_path / "budget.db", NOW.isoformat()) as other:
        assert line(other) == "ready"
        os.kill(other.pid, signal.SIGKILL)
    with closing(Ledger(tmp_path / "budget.db", life_s=600)) as ledger:
        assert ledger.balance(limit, NOW).held == 60
        assert ledger.expire(NOW + timedelta(seconds=601)) == 1
        assert ledger.balance(limit, NOW).spent == 60
    with closing(sqlite3.connect(tmp_path / "budget.db")) as database:
        assert database.execute("SELECT state FROM charge").fetchall() == [("expired",)]
