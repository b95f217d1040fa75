"""The trail leaves for a real rsyslog over RELP and TLS: nothing is lost, whichever end dies; only the named receiver gets it."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import httpx
import msgspec
import pytest
from broker_rig import cli_here, running_broker
from siem_rig import SERVER, Certificates, Forwarder, Siem
from test_audit_trail import call_event, chained, ship

from databases import back_up, beside, put_back
from saw.audit import Chain
from saw.audit.receiver import WINDOW
from saw.audit.ship import Cursor, ShipSettings, ShipState
from saw.audit.ship import Forwarder as ShipForwarder
from saw.cli.audit_ship import AuditSocket

pytestmark = pytest.mark.control("P0-05")


@pytest.fixture(scope="module")
def lab():
    with running_broker() as lab:
        yield lab


@pytest.fixture
def siem(tmp_path):
    siem = Siem(tmp_path / "siem")
    siem.start()
    try:
        yield siem
    finally:
        if siem.process is not None:
            siem.kill()


@pytest.fixture
def forwarder(lab, siem, tmp_path):
    """A forwarder behind what other tests wrote."""
    with made(siem.settings(lab, tmp_path / "ship")) as forwarder:
        skip(lab, forwarder)
        yield forwarder


@contextlib.contextmanager
def made(settings):
    forwarder = Forwarder(settings)
    try:
        yield forwarder
    finally:
        forwarder.stop()


class Once(threading.Event):
    """Is set as soon as the forwarder would pause after a failure."""

    def wait(self, timeout=None):
        del timeout
        self.set()
        return True


def log(lab, after=0):
    """Every event of the broker behind a position, in the order of arrival."""
    found = []
    with lab.operator.session() as client:
        while True:
            page = client.request("GET", f"/v1/audit/log?after={after}&limit=1000")
            found += page["events"]
            after = page["next"]
            if after == page["end"]:
                return found


def skip(lab, forwarder) -> None:
    """Set the cursor behind everything that is there."""
    events = log(lab)
    if events:
        last = {name: events[-1][name] for name in ("source", "seq", "hash")}
        heads = {event["source"]: {"seq": event["seq"], "hash": event["hash"]} for event in events}
        cursor = {"position": events[-1]["position"], "last": last, "sources": heads}
        (forwarder.state / "cursor.json").write_text(json.dumps(cursor))


def feed(lab, source, events, step=20) -> None:
    """Events of a perimeter host arrive at the broker."""
    with lab.tls("perimeter", source) as edge:
        for start in range(0, len(events), step):
            assert ship(edge, source, events[start : start + step]).status_code == 200


def keys(events):
    return [(event["source"], event["seq"], event["hash"]) for event in events]


def received(siem):
    return [(event.source, event.seq, event.hash) for event in siem.events()]


def arrived(forwarder, lab, after) -> list[tuple[str, int, str]]:
    """Wait until all that is in the broker behind ``after`` is acknowledged; return it."""
    wanted = log(lab, after)
    forwarder.until(lambda: forwarder.cursor()["position"] >= wanted[-1]["position"], "not everything is acknowledged")
    return keys(wanted)


def test_every_event_arrives_in_order_and_the_receivers_copy_proves_itself(lab, siem, tmp_path) -> None:
    feed(lab, "edge-order", chained("edge-order", 150))
    lab.register_image()
    with made(siem.settings(lab, tmp_path / "ship")) as forwarder:
        forwarder.start()
        wanted = arrived(forwarder, lab, 0)
        assert received(siem) == wanted
        code, status = forwarder.status()
    assert (code, status["state"], status["lag"], status["error"]) == (0, "shipping", 0, None)
    assert all(chain["acknowledged"] == chain["head"] > 0 for chain in status["sources"])
    assert {chain["source"] for chain in status["sources"]} >= {"broker", "edge-order"}
    whole = cli_here("audit", "verify", "--syslog", "--file", str(siem.file))
    assert whole.returncode == 0, whole.stderr
    lines = siem.lines()
    copy = tmp_path / "copy.log"
    middle = len(lines) // 2
    for changed, code in (
        (lines[:middle] + lines[middle + 1 :], "removed"),
        (
            [*lines[:middle], lines[middle].replace('"activity_id":', '"activity_id":1'), *lines[middle + 1 :]],
            "changed",
        ),
    ):
        copy.write_text("\n".join(changed) + "\n")
        found = cli_here("audit", "verify", "--syslog", "--file", str(copy), "--json")
        assert found.returncode == 1
        assert code in {item["code"] for item in json.loads(found.stdout)["error"]["details"]["findings"]}
    copy.write_text("\n".join([*reversed(lines), lines[0]]) + "\n")
    assert cli_here("audit", "verify", "--syslog", "--file", str(copy)).returncode == 0, (
        "order and duplicates are no matter"
    )


def test_a_receiver_that_is_killed_and_away_while_events_are_written_misses_none(lab, siem, forwarder) -> None:
    after = forwarder.cursor()["position"]
    events = chained("edge-away", 500)
    feed(lab, "edge-away", events[:20])
    forwarder.start()
    with ThreadPoolExecutor(1) as pool:
        fed = pool.submit(feed, lab, "edge-away", events[20:400])
        for target in (60, 140):
            forwarder.until(lambda target=target: len(siem.lines()) >= target, "nothing arrives")
            siem.kill()
            forwarder.until(lambda: forwarder.health()["state"] == "failing", "the dead receiver is not noticed")
            siem.start()
            forwarder.until(lambda: forwarder.health()["state"] == "shipping", "the receiver that is back gets nothing")
        fed.result(60)
    siem.kill()
    feed(lab, "edge-away", events[400:])
    forwarder.until(lambda: forwarder.health()["state"] == "failing", "the dead receiver is not noticed")
    code, status = forwarder.status()
    assert (code, status["state"], status["error"]["code"]) == (1, "failing", "delivery_failed")
    assert status["lag"] >= 100
    siem.start()
    wanted = arrived(forwarder, lab, after)
    got = received(siem)
    assert set(got) == set(wanted), "every event, and nothing else"
    assert list(dict.fromkeys(got)) == wanted, "first arrivals are in order"
    assert {path.name for path in forwarder.state.iterdir()} == {"cursor.json", "health.json"}


def test_a_forwarder_that_is_killed_at_random_points_leaves_no_gap(lab, siem, forwarder) -> None:
    after = forwarder.cursor()["position"]
    chance = random.Random(5)  # noqa: S311
    kills = 4
    with ThreadPoolExecutor(1) as pool:
        fed = pool.submit(feed, lab, "edge-kill", chained("edge-kill", 600), 10)
        for _ in range(kills):
            forwarder.start()
            target = len(siem.lines()) + chance.randrange(1, 120)
            forwarder.until(lambda target=target: len(siem.lines()) >= target, "nothing arrives")
            forwarder.kill()
        fed.result(60)
    (forwarder.state / ".cursor.json.left").write_text("what a killed write leaves")
    forwarder.start()
    wanted = arrived(forwarder, lab, after)
    got = received(siem)
    assert set(got) == set(wanted)
    assert list(dict.fromkeys(got)) == wanted
    assert len(got) - len(wanted) <= kills * WINDOW, "duplicates are those of one window for each crash"
    assert {path.name for path in forwarder.state.iterdir()} == {"cursor.json", "health.json"}


def test_only_the_named_receiver_gets_anything_and_health_says_why_another_does_not(lab, siem, tmp_path) -> None:
    lab.register_image()
    other = Certificates(tmp_path / "other")
    stranger = other.issue("control.example.com")
    for wrong, said in (
        ({"ca_file": str(other.folder / "ca.pem")}, "not the receiver that was named"),
        ({"name": "other.example.com"}, "not the receiver that was named"),
        ({"port": siem.plain_port}, "cannot be reached over TLS"),
        ({"certificate_file": None, "key_file": None}, "needs certificate_file"),
        ({"certificate_file": str(stranger[0]), "key_file": str(stranger[1])}, "needs certificate_file"),
        ({"ca_file": "/nowhere/ca.pem"}, "/nowhere/ca.pem"),
    ):
        stopped = Once()
        state = tmp_path / "refused"
        state.mkdir()
        settings = msgspec.convert(siem.settings(lab, state, **wrong), ShipSettings)
        with contextlib.ExitStack() as stack:
            ShipForwarder(settings, AuditSocket.open(settings.socket, stack), lambda: datetime.now(UTC), stopped).run()
        health = ShipState(state).health()
        assert health.state == "failing", wrong
        assert said in f"{health.error['message']} {health.error['cure']}"
        assert ShipState(state).cursor() == Cursor()
        shutil.rmtree(state)
    assert siem.lines() == []
    with made(siem.settings(lab, tmp_path / "ship", name=SERVER)) as forwarder:
        forwarder.start()
        wanted = arrived(forwarder, lab, 0)
        assert received(siem) == wanted


@pytest.mark.control("AUD-02")
def test_what_cannot_be_trusted_is_shipped_and_marked(lab, siem, forwarder) -> None:
    after = forwarder.cursor()["position"]
    events = chained("edge-marks", 12)
    long = Chain("edge-long").append(call_event(1) | {"message": "x" * 8000})
    settings = json.loads(forwarder.config.read_text()) | {"max_message_bytes": 8192}
    forwarder.config.write_text(json.dumps(settings))
    feed(lab, "edge-marks", [*events[:3], *events[5:8], *events[3:5]], step=3)
    feed(lab, "edge-marks", events[8:])
    feed(
        lab, "edge-long", [{"source": long.source, "seq": 1, "prev": long.prev, "event": long.event, "hash": long.hash}]
    )
    with beside(lab.config) as store:
        change = "UPDATE audit_events SET event = replace(event, '/9', '/0') WHERE source = 'edge-marks' AND seq = 10"
        assert store.execute(change).rowcount == 1
    forwarder.start()
    wanted = arrived(forwarder, lab, after)
    lines = siem.lines()
    assert len(lines) == len(wanted)
    seen = [(seq, line) for line in lines for seq in range(1, 13) if f'source="edge-marks" seq="{seq}"' in line]
    marks = [(seq, line.partition('mark="')[2].partition('"')[0]) for seq, line in seen]
    assert marks == [
        (1, ""), (2, ""), (3, ""), (6, "gap"), (7, ""), (8, ""), (4, "late"), (5, "late"),
        (9, ""), (10, "changed"), (11, ""), (12, ""),
    ]  # fmt: skip
    assert sum("chain_gap" in line for line in lines) == 1, "the broker's finding goes the same way"
    [cut] = [line for line in lines if 'source="edge-long"' in line]
    assert 'omitted="' in cut
    assert cut.endswith("]")
    found = cli_here("audit", "verify", "--syslog", "--file", str(siem.file))
    assert (found.returncode, "was too long to be sent" in found.stderr) == (1, True)


@pytest.mark.thorough
def test_a_broker_that_restarts_is_followed_and_a_trail_that_went_back_is_shipped_again_and_marked(
    siem, tmp_path
) -> None:
    with running_broker() as lab:
        feed(lab, "edge-one", chained("edge-one", 5))
        with made(siem.settings(lab, tmp_path / "ship")) as forwarder:
            forwarder.start()
            arrived(forwarder, lab, 0)
            lab.stop()
            forwarder.until(lambda: forwarder.health()["state"] == "failing", "the broker's end is not noticed")
            code, status = forwarder.status()
            assert (code, status["lag"], status["broker"]["code"]) == (1, None, "unavailable")
            assert "the broker does not answer" in status["error"]["message"]
            backup = tmp_path / "backup.db"
            back_up(lab.config, backup)
            lab.start()
            feed(lab, "edge-two", chained("edge-two", 5))
            wanted = arrived(forwarder, lab, 0)
            assert received(siem) == wanted, "a restart alone sends nothing again"
            lab.stop()
            put_back(lab.config, backup)
            lab.start()
            feed(lab, "edge-three", chained("edge-three", 20))
            forwarder.until(lambda: forwarder.cursor().get("restarts") == 1, "the other trail is not noticed")
            before = len(wanted)
            wanted = arrived(forwarder, lab, 0)
            assert "is not the one that was shipped" in forwarder.health()["error"]["message"]
        assert received(siem)[before:] == wanted
        assert [number for number, line in enumerate(siem.lines()) if 'mark="restarted"' in line] == [before]


@pytest.mark.control("AUD-02")
def test_the_audit_socket_serves_the_trail_and_nothing_else(lab) -> None:
    with httpx.Client(transport=httpx.HTTPTransport(uds=lab.config.audit_socket), base_url="http://broker") as client:
        for path in ("/v1/audit/log", "/v1/audit/events", "/v1/audit/verify"):
            assert client.get(path).status_code == 200
        assert client.get("/v1/workspaces").status_code == 404
        assert client.post("/v1/workspaces/x/kill", json={"reason": "no"}).status_code == 404
        assert client.get("/v1/audit/log?colour=red").json()["code"] == "malformed"
        assert client.get("/v1/audit/log?source=a&source=b").json()["code"] == "malformed"
    code = (
        "import sys, os, socket; os.setgid(65534); os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    refused = subprocess.run([sys.executable, "-c", code, lab.config.audit_socket], capture_output=True, check=False)
    assert b"PermissionError" in refused.stderr
