"""Searching and following the trail over the operator's socket."""

from __future__ import annotations

import argparse
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest
from broker_rig import cli, cli_here
from test_audit_trail import chained, ship

from saw.audit.choose import Choice
from saw.broker import trail
from saw.broker.client import BrokerRefusal
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.cli import audit_search
from saw.errors import ConfigError

pytestmark = pytest.mark.control("AUD-01")


def context_of(broker) -> str:
    context = broker.directory / "context.json"
    context.write_text(json.dumps({"broker": {"socket": broker.config.operator_socket, "ssh": None}}))
    return str(context)


def found(broker, *arguments):
    done = cli_here("audit", "search", "--json", "--context", context_of(broker), *arguments)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_search_pages_through_everything_and_finds_what_is_asked_for(broker, monkeypatch) -> None:
    with broker.tls("perimeter", "edge-search") as edge:
        assert ship(edge, "edge-search", chained("edge-search", 450)).status_code == 200
    broker.workspace("searched")
    mine = found(broker, "--source", "edge-search", "--limit", "1000")
    assert [event["seq"] for event in mine] == list(range(1, 451)), "over several pages, in order"
    assert [event["position"] for event in mine] == sorted({event["position"] for event in mine})
    assert found(broker, "--source", "edge-search", "--limit", "3") == mine[:3]
    behind = ("--after", str(mine[2]["position"]))
    assert found(broker, "--source", "edge-search", "--limit", "3", *behind) == mine[3:6]
    [one] = found(broker, "--text", '"path":"/449"', "--verdict", "allowed", "--class", "http activity")
    assert one == mine[449]
    assert found(broker, "--text", '"path":"/449"', "--verdict", "refused") == []
    assert found(broker, "--workspace", "searched", "--activity", "Create", "--principal", "operator:root")
    assert found(broker, "--source", "edge-search", "--until", "1h") == []
    assert found(broker, "--source", "edge-search", "--since", "1h", "--limit", "5") == mine[:5]
    shown = cli(broker, "audit", "search", "--source", "edge-search", "--limit", "2").stdout.splitlines()
    assert len(shown) == 2
    assert "edge-search:1  HTTP Activity: Get  allowed  workspace:ws  ws" in shown[0]


def test_a_call_looks_at_so_many_events_and_bytes_and_no_more(broker, monkeypatch) -> None:
    with broker.tls("perimeter", "edge-bound") as edge:
        ship(edge, "edge-bound", chained("edge-bound", 20))
    own = trail.Trail(_Services(broker))
    try:
        monkeypatch.setattr(trail, "MAX_SCAN", 7)
        page = own.log(0, 100, Choice(source="none"))
        assert (page["events"], page["next"]) == ([], 7)
        monkeypatch.setattr(trail, "MAX_SCAN", 5000)
        monkeypatch.setattr(trail, "MAX_BYTES", 1)
        assert len(own.log(0, 100, Choice())["events"]) == 1
    finally:
        own._s.store.close()


class _Services:
    """The database of a running broker, read beside it."""

    def __init__(self, broker) -> None:
        self.store = Store.open(broker.config, Waker())


@pytest.mark.thorough
def test_a_follower_sees_each_event_once_across_a_restart_of_the_broker(own_broker, capsys) -> None:
    lab = own_broker
    context = lab.directory / "context.json"
    context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
    parser = argparse.ArgumentParser()
    audit_search.add_search(parser.add_subparsers())
    options = parser.parse_args(["tail", "--context", str(context), "--source", "edge-tail", "--lines", "1000"])
    events = chained("edge-tail", 30)
    seen: list[int] = []
    reached = {count: threading.Event() for count in (10, 20, 30)}
    stop = threading.Event()

    def run() -> None:
        for event in audit_search.follow(options, stop):
            seen.append(event["seq"])
            if len(seen) in reached:
                reached[len(seen)].set()
            if len(seen) == 30:
                stop.set()

    def arrive(part) -> None:
        with lab.tls("perimeter", "edge-tail") as edge:
            assert ship(edge, "edge-tail", part).status_code == 200

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run)
        try:
            arrive(events[:10])
            assert reached[10].wait(30)
            arrive(events[10:20])
            assert reached[20].wait(30)
            lab.stop()
            lab.start()
            arrive(events[20:])
            assert reached[30].wait(30)
        finally:
            stop.set()
        running.result(60)
    assert seen == list(range(1, 31))
    told = capsys.readouterr().err
    assert "waiting for the broker" in told
    assert "the broker is back" in told


def test_a_wrong_filter_is_refused_by_name(broker) -> None:
    with pytest.raises(BrokerRefusal, match="verdict"):
        broker.operator.request("GET", "/v1/audit/log?verdict=maybe")
    with pytest.raises(BrokerRefusal, match="colour"):
        broker.operator.request("GET", "/v1/audit/log?colour=red")
    with pytest.raises(BrokerRefusal, match="since"):
        broker.operator.request("GET", "/v1/audit/log?since=yesterday")
    assert broker.operator.request("GET", "/v1/audit/log?verdict=allowed&limit=1")["end"] > 0
    now = datetime(2026, 11, 29, 12, tzinfo=UTC)
    with pytest.raises(ConfigError, match="is no time"):
        audit_search.moment("yesterday", now)
    assert audit_search.moment("2h", now) == datetime(2026, 11, 29, 10, tzinfo=UTC)
    assert audit_search.moment("2026-11-29T10:00:00", now) == audit_search.moment("2026-11-29T11:00:00+01:00", now)
