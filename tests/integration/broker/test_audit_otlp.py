"""The trail leaves as OpenTelemetry logs: nothing is lost, what arrived proves itself, and only the named receiver gets it."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime

import msgspec
import pytest
from broker_rig import cli_here, running_broker
from otlp_rig import TOKEN, Collector
from siem_rig import Certificates
from test_audit_ship import Once, feed, keys, log, made
from test_audit_trail import chained

from saw.audit.ship import Cursor, ShipSettings, ShipState
from saw.audit.ship import Forwarder as ShipForwarder
from saw.cli.audit_ship import AuditSocket

pytestmark = pytest.mark.control("P0-05")


@pytest.fixture(scope="module")
def lab():
    with running_broker() as lab:
        feed(lab, "edge-logs", chained("edge-logs", 150))
        yield lab


@pytest.fixture
def collector(tmp_path):
    collector = Collector(tmp_path / "collector")
    collector.start()
    try:
        yield collector
    finally:
        collector.stop()


def arrived(forwarder, lab):
    wanted = log(lab)
    forwarder.until(lambda: forwarder.cursor()["position"] >= wanted[-1]["position"], "not everything is acknowledged")
    return keys(wanted)


def received(collector):
    return [(event.source, event.seq, event.hash) for event in collector.events()]


def test_every_event_arrives_in_order_and_the_receivers_copy_proves_itself(lab, collector, tmp_path) -> None:
    with made(collector.settings(lab, tmp_path / "ship")) as forwarder:
        forwarder.start()
        wanted = arrived(forwarder, lab)
        assert received(collector) == wanted
        code, status = forwarder.status()
        assert TOKEN not in forwarder.state.with_suffix(".log").read_text()
    assert (code, status["state"], status["lag"], status["error"]) == (0, "shipping", 0, None)
    record = collector.records()[0]
    event = json.loads(record["body"]["stringValue"])
    assert int(record["timeUnixNano"]) == event["time"] * 10**6
    assert record["severityText"] == event["severity"]
    whole = cli_here("audit", "verify", "--otlp", "--file", str(collector.file))
    assert whole.returncode == 0, whole.stderr
    lines = collector.lines()
    copy = tmp_path / "copy.json"
    assert len(lines) > 1
    for changed, said in (
        (lines[1:], "removed"),
        ([lines[0].replace('\\"activity_id\\":', '\\"activity_id\\":1', 1), *lines[1:]], "changed"),
    ):
        assert changed != lines
        copy.write_text("\n".join(changed) + "\n")
        found = cli_here("audit", "verify", "--otlp", "--file", str(copy), "--json")
        assert found.returncode == 1
        assert said in {item["code"] for item in json.loads(found.stdout)["error"]["details"]["findings"]}
    copy.write_text("\n".join([*reversed(lines), lines[0]]) + "\n")
    assert cli_here("audit", "verify", "--otlp", "--file", str(copy)).returncode == 0, (
        "order and duplicates are no matter"
    )


def test_a_receiver_that_is_away_busy_or_rejects_records_misses_none(lab, collector, tmp_path) -> None:
    rejects = b'{"partialSuccess": {"rejectedLogRecords": "3", "errorMessage": "no room"}}'
    collector.answers = [(503, {"retry-after": "0"}, b""), (429, {}, b""), (200, {}, rejects)]
    with made(collector.settings(lab, tmp_path / "ship")) as forwarder:
        collector.stop()
        forwarder.start()
        forwarder.until(lambda: forwarder.health()["state"] == "failing", "the receiver that is away is not noticed")
        assert "cannot be reached" in forwarder.health()["error"]["message"]
        collector.start()
        forwarder.until(lambda: len(collector.refused) == 3, "it is not tried again")
        forwarder.until(lambda: "rejects 3 of" in forwarder.health()["error"]["message"], "the rejection is not told")
        assert forwarder.cursor()["position"] == 0, "a rejected record counts as shipped"
        forwarder.kill()  # it would leave the receiver alone for half a minute
        forwarder.start()
        wanted = arrived(forwarder, lab)
        forwarder.kill()
        feed(lab, "edge-later", chained("edge-later", 5))
        forwarder.start()
        wanted = arrived(forwarder, lab)
        assert received(collector) == wanted


def test_only_the_named_receiver_gets_anything_and_health_says_why_another_does_not(lab, collector, tmp_path) -> None:
    other = Certificates(tmp_path / "other")
    stranger = other.issue("control.example.com")
    (tmp_path / "wrong").write_text("another-token")
    (tmp_path / "two").write_text("two\nlines")
    for wrong, answer, said in (
        ({"ca_file": str(other.folder / "ca.pem")}, None, "not the receiver that was named"),
        ({"name": "other.example.com"}, None, "not the receiver that was named"),
        ({"certificate_file": None, "key_file": None}, None, "needs certificate_file"),
        ({"certificate_file": str(stranger[0]), "key_file": str(stranger[1])}, None, "needs certificate_file"),
        ({"token_file": None}, None, "401 who are you?"),
        ({"token_file": str(tmp_path / "wrong")}, None, "check receiver.token_file"),
        ({"token_file": str(tmp_path / "two")}, None, "holds no token"),
        ({"token_file": "/nowhere/token"}, None, "/nowhere/token"),
        ({"path": "/elsewhere"}, None, "check receiver.path"),
        ({}, (302, {"location": "/v1/logs"}, b""), "302"),
        ({}, (200, {}, b"<html>welcome</html>"), "does not answer as OTLP does"),
        ({}, (413, {}, b""), "max_message_bytes"),
    ):
        collector.answers = [answer] if answer else []
        state = tmp_path / "refused"
        state.mkdir(exist_ok=True)
        settings = msgspec.convert(collector.settings(lab, state, **wrong), ShipSettings)
        with contextlib.ExitStack() as stack:
            trail = AuditSocket.open(settings.socket, stack)
            ShipForwarder(settings, trail, lambda: datetime.now(UTC), Once()).run()
        health = ShipState(state).health()
        assert health.state == "failing", wrong
        assert said in f"{health.error['message']} {health.error['cure']}", health.error
        assert ShipState(state).cursor() == Cursor()
    assert collector.lines() == []
