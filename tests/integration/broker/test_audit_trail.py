"""The trail: gatekeepers' chains, tampering, exports, and a broker that is killed while it writes."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime

import httpx
import msgspec
import pytest
from broker_rig import cli, ready_socket

from databases import beside
from saw.audit import Chain, EventFactory, Head, Subject
from saw.broker.client import OperatorClient
from saw.cli import audit
from saw.errors import SawError

FACTORY = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "uid")


def call_event(number: int):
    return FACTORY.http_activity(
        datetime.now(UTC),
        Subject("workspace:ws", "agent-1", "ws", "a" * 64, f"req-{number}"),
        method="GET",
        scheme="https",
        host="git.example.com",
        port=443,
        path=f"/{number}",
        allowed=True,
    )


def chained(source: str, count: int, head: Head | None = None):
    chain = Chain(source, head)
    return [msgspec.to_builtins(chain.append(call_event(number))) for number in range(count)]


def ship(edge: httpx.Client, source: str, events):
    return edge.post("/v1/perimeter/events", json={"source": source, "events": events})


@pytest.mark.control("AUD-02")
def test_shipping_is_at_least_once_and_a_gap_is_a_finding_that_late_events_close(broker) -> None:
    events = chained("edge-ship", 10)
    with broker.tls("perimeter", "edge-ship") as edge:
        assert ship(edge, "edge-ship", events[:3]).json() == {"accepted": 3}
        assert ship(edge, "edge-ship", events[1:5]).json() == {"accepted": 5}
        assert len(broker.events("edge-ship")) == 5
        assert ship(edge, "edge-ship", events[7:]).json() == {"accepted": 10}
        finding = broker.events()[-1]["event"]
        assert (finding["class_uid"], finding["finding_info"]["types"]) == (2004, ["chain_gap"])
        report = broker.operator.request("GET", "/v1/audit/verify")
        assert [(item["code"], item["source"], item["seq"]) for item in report["findings"]] == [
            ("removed", "edge-ship", 8)
        ]
        assert ship(edge, "edge-ship", events[5:7]).json() == {"accepted": 10}
    assert broker.operator.request("GET", "/v1/audit/verify")["complete"]


@pytest.mark.control("AUD-02")
def test_a_changed_foreign_or_contradicting_event_is_refused_and_the_true_one_is_taken(broker) -> None:
    events = chained("edge-lies", 4)
    with broker.tls("perimeter", "edge-lies") as edge:
        changed = [{**events[0], "event": {**events[0]["event"], "message": "other"}}]
        assert ship(edge, "edge-lies", changed).json()["code"] == "event_changed"
        for source in ("broker", "edge-else"):
            assert ship(edge, source, chained(source, 1)).json()["code"] == "foreign_source"
        assert ship(edge, "edge-lies", events[:2]).status_code == 200
        assert (
            ship(edge, "edge-lies", chained("edge-lies", 2, Head(1, events[0]["hash"]))).json()["code"]
            == "chain_conflict"
        )
        assert ship(edge, "edge-lies", chained("edge-lies", 1, Head(2, "0" * 64))).json()["code"] == "chain_conflict"
        assert broker.events()[-1]["event"]["finding_info"]["types"] == ["chain_conflict"]
        assert ship(edge, "edge-lies", events).json() == {"accepted": 4}


@pytest.mark.control("AUD-02")
def test_an_export_without_a_source_holds_every_chain(broker, tmp_path) -> None:
    known = {chain["source"] for chain in broker.operator.request("GET", "/v1/audit/verify")["chains"]}
    copy = tmp_path / "export.jsonl"
    copy.write_text(cli(broker, "audit", "export").stdout)
    assert {json.loads(line)["source"] for line in copy.read_text().splitlines()} == known
    assert cli(broker, "audit", "verify", "--file", str(copy)).returncode == 0
    assert "name the chain" in cli(broker, "audit", "export", "--after", "3").stderr


@pytest.mark.control("AUD-02")
def test_an_export_reads_pages_alone_and_holds_a_chain_whose_head_was_removed(own_broker, monkeypatch, capsys) -> None:
    with own_broker.tls("perimeter", "edge-headless") as edge:
        ship(edge, "edge-headless", chained("edge-headless", 3))
    with beside(own_broker.config) as store:
        assert store.execute("DELETE FROM audit_heads WHERE source = 'edge-headless'").rowcount == 1
    asked = []

    class Recording(OperatorClient):
        def request(self, method, path, json=None):
            asked.append(path.partition("?")[0])
            return super().request(method, path, json)

    monkeypatch.setattr(audit, "OperatorClient", Recording)
    context = own_broker.directory / "context.json"
    context.write_text(json.dumps({"broker": {"socket": own_broker.config.operator_socket, "ssh": None}}))
    assert audit.main(["export", "--context", str(context)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {line["source"] for line in lines} == {"broker", "edge-headless"}
    assert set(asked) == {"/v1/audit/events"}, "an export makes the broker verify nothing"


@pytest.mark.control("AUD-02")
def test_an_export_proves_itself_and_a_changed_or_cut_copy_is_found(broker, tmp_path) -> None:
    broker.workspace("export")
    copy = tmp_path / "export.jsonl"
    copy.write_text(cli(broker, "audit", "export", "--source", "broker").stdout)
    lines = copy.read_text().splitlines(keepends=True)
    last = json.loads(lines[-1])
    head = f"{last['seq']}:{last['hash']}"
    whole = cli(broker, "audit", "verify", "--file", str(copy), "--expect-head", head)
    assert whole.returncode == 0, whole.stderr
    for changed, code in (
        (lines[:-1], "truncated"),
        (lines[:1] + lines[2:], "removed"),
        ([lines[0].replace("operator:root", "operator:ruth"), *lines[1:]], "changed"),
        ([lines[1], lines[0], *lines[2:]], "reordered"),
    ):
        copy.write_text("".join(changed))
        found = cli(broker, "audit", "verify", "--file", str(copy), "--expect-head", head, "--json")
        assert found.returncode == 1, code
        assert code in {finding["code"] for finding in json.loads(found.stdout)["error"]["details"]["findings"]}


@pytest.mark.control("AUD-01")
@pytest.mark.control("AUD-02")
def test_every_step_is_an_event_and_an_edited_database_is_found(own_broker) -> None:
    lab = own_broker
    lab.workspace("steps", to="attesting")
    lab.operator.request("POST", "/v1/workspaces/steps/kill", {"reason": "drill"})
    events = [item["event"] for item in lab.events()]
    mine = [event for event in events if event["unmapped"]["saw"].get("workspace") == "steps"]
    assert [event["activity_name"] for event in mine] == ["Create", "Enroll", "Update", "Update", "Suspend", "Update"]
    for event in mine:
        assert event["unmapped"]["saw"]["principal"] == "operator:root"
        assert event["unmapped"]["saw"]["agent"] == "agent-1"
        assert event["metadata"]["correlation_uid"]
    assert lab.operator.request("GET", "/v1/audit/verify")["complete"]
    with beside(lab.config) as database:
        database.execute("UPDATE audit_events SET event = replace(event, 'drill', 'other') WHERE event LIKE '%drill%'")
        database.execute("DELETE FROM audit_events WHERE seq = 3")
    report = lab.operator.request("GET", "/v1/audit/verify")
    assert not report["complete"]
    assert {item["code"] for item in report["findings"]} >= {"changed", "removed"}


SERVE_OFTEN = """
import os, sys
from saw.broker import migrations
from saw.broker.config import load_config
from saw.broker.server import run
config = load_config(sys.argv[1])
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        run(config)
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("ended", flush=True)
"""


@pytest.mark.thorough
@pytest.mark.control("AUD-02")
@pytest.mark.control("AUD-01")
def test_a_broker_killed_under_load_loses_no_answered_row_and_its_chain_stays_whole(own_broker) -> None:
    lab = own_broker
    lab.workspace("crash", to="attesting")
    lab.stop()
    answered: set[str] = set()
    with subprocess.Popen(
        [sys.executable, "-c", SERVE_OFTEN, str(lab.config_file)],
        env={**os.environ, "NOTIFY_SOCKET": str(lab.directory / "run" / "notify.sock")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        for number in range(20):
            with ready_socket(lab.directory / "run" / "notify.sock") as (name, wait):
                del name
                server.stdin.write("start\n")
                server.stdin.flush()
                child = int(server.stdout.readline())
                wait(server)
            with concurrent.futures.ThreadPoolExecutor(4) as pool:
                writers = [
                    pool.submit(kill_until_refused, lab, f"r{number}-w{writer}", answered) for writer in range(4)
                ]
                target = len(answered) + 8 + number % 5
                while len(answered) < target:
                    concurrent.futures.wait(writers, timeout=0.002)
                os.kill(child, signal.SIGKILL)
                for writer in writers:
                    writer.result(20)
            assert server.stdout.readline() == "ended\n"
        server.stdin.close()
    lab.start()
    stored = {event["event"].get("message") for event in lab.events()}
    assert len(answered) >= 20 * 8
    assert answered <= stored
    assert lab.operator.request("GET", "/v1/audit/verify")["complete"]


def kill_until_refused(lab, prefix: str, answered: set[str]) -> None:
    """Make audited calls until the broker is gone; remember each that was answered."""
    try:
        with httpx.Client(transport=httpx.HTTPTransport(uds=lab.config.operator_socket), timeout=20) as client:
            for number in range(10_000):
                reason = f"{prefix}-{number}"
                answer = client.post("http://broker/v1/workspaces/crash/kill", json={"reason": reason})
                assert answer.status_code == 200, answer.text
                answered.add(reason)
    except (httpx.HTTPError, SawError):
        return
    raise AssertionError("the broker was never killed")
