"""An event as a syslog message comes back as the same chained event; what is wrong with it is marked; settings are strict."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import pytest
from alembic import command
from alembic.config import Config
from google.protobuf import json_format
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest
from sqlalchemy import create_engine

from saw.audit import ChainedEvent, EventFactory, Head, Subject, link
from saw.audit.choose import Choice
from saw.audit.otlp import OtlpError, Records, parse_export
from saw.audit.ship import load_settings
from saw.audit.syslog import SyslogError, mark_of, message, parse
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError

FACTORY = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "uid")
NOW = datetime(2026, 11, 29, 7, 0, tzinfo=UTC)
ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.control("AUD-02")
@settings(max_examples=80, deadline=None)
@given(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), min_size=1, max_size=30),
    st.dictionaries(st.text(max_size=10), ANY, max_size=4),
    st.integers(0, 10**12),
    st.text(max_size=20),
)
def test_a_message_comes_back_as_the_same_event(source, content, seq, host) -> None:
    item = link(source, Head(seq, "a" * 64), content | {"time": 1764399600123, "severity_id": 4, "type_uid": 400201})
    raw = message(item, 7, "gap", host, 1_000_000)
    assert b"\n" not in raw
    assert raw.startswith(b"<107>1 2025-11-29T07:00:00.123Z ")
    assert parse(raw.decode()) == item


@pytest.mark.parametrize("field", ["time", "severity_id", "type_uid"])
@pytest.mark.parametrize("value", [None, "x", 10**17, -(10**17), [1]])
def test_a_changed_event_still_makes_a_message_and_a_record(field, value) -> None:
    item = ChainedEvent("edge", 3, "b" * 64, {"time": 1, "severity_id": 1, "type_uid": 1, field: value}, "c" * 64)
    assert parse(message(item, 1, "changed", "h", 10_000).decode()) == item
    export = b'{"resourceLogs":[' + Records().message(item, 1, "changed", "h", 10_000) + b"]}"
    assert list(parse_export(export.decode())) == [item]
    json_format.Parse(export, ExportLogsServiceRequest())


def test_an_event_that_is_too_long_is_left_out_of_a_record_and_its_size_is_said() -> None:
    item = link("edge", Head(), {"message": "ü" * 9000})
    raw = Records().message(item, 1, "", "h", 8192).decode()
    assert len(raw) < 2000
    assert "18014" in raw
    with pytest.raises(OtlpError, match="event 1 of edge was too long"):
        list(parse_export(f'{{"resourceLogs":[{raw}]}}'))


def test_an_export_of_others_is_passed_over_and_what_is_none_is_refused() -> None:
    other = '{"resourceLogs":[{"scopeLogs":[{"scope":{"name":"x"},"logRecords":[{"body":{"stringValue":"x"}}]}]}]}'
    assert list(parse_export(other)) == []
    assert list(parse_export("{}")) == []
    item = link("edge", Head(), {"message": "m"})
    good = '{"resourceLogs":[' + Records().message(item, 1, "", "h", 8192).decode() + "]}"
    for bad in ("", "[]", "null", '{"resourceLogs":7}', '{"resourceLogs":[7]}', good.replace("saw.hash", "saw.hush"),
                good.replace('"intValue":"1"', '"intValue":"x"'), good.replace('{\\"message', "{")):  # fmt: skip
        with pytest.raises(OtlpError):
            list(parse_export(bad))


def test_an_event_that_is_too_long_is_said_to_be_and_its_twin_is_whole() -> None:
    item = link("edge", Head(), {"time": 1, "message": "x" * 5000})
    whole = message(item, 1, "", "h", 10_000)
    assert message(item, 1, "", "h", len(whole)) == whole
    cut = message(item, 1, "", "h", len(whole) - 1)
    assert len(cut) < 400
    with pytest.raises(SyslogError, match="event 1 of edge was too long"):
        parse(cut.decode())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("saw@32473", "saw@1"),
        ('seq="1"', 'seq="one"'),
        (' hash="', ' hush="'),
        ('"time":1', '"time":'),
        (">1 ", ">2 "),
        ("] ", "]x "),
    ],
)
def test_a_line_that_is_no_message_of_ours_is_refused(old, new) -> None:
    line = message(link("edge", Head(), {"time": 1}), 1, "", "h", 10_000).decode()
    assert parse(line).seq == 1
    assert old in line
    with pytest.raises(SyslogError):
        parse(line.replace(old, new, 1))


def test_each_thing_that_can_be_wrong_has_its_mark() -> None:
    first = link("edge", Head(), {"n": 1})
    second = link("edge", Head(1, first.hash), {"n": 2})
    assert mark_of(Head(), first) == ""
    assert mark_of(Head(1, first.hash), second) == ""
    assert mark_of(Head(), second) == "gap"
    assert mark_of(Head(1, "d" * 64), second) == "relinked"
    assert mark_of(Head(2, second.hash), first) == "late"
    changed = ChainedEvent("edge", 1, first.prev, {"n": 3}, first.hash)
    assert mark_of(Head(), changed) == "changed"
    assert mark_of(Head(), ChainedEvent("edge", 1, first.prev, {"n": 2**60}, first.hash)) == "changed"


GOOD = {
    "socket": "/run/a.sock",
    "state_dir": "/var/lib/a",
    "receiver": {"host": "siem.example.com", "port": 20514, "ca_file": "/etc/ca.pem"},
}


def test_settings_are_read_strictly(tmp_path) -> None:
    file = tmp_path / "audit.json"
    file.write_text(json.dumps(GOOD))
    assert load_settings(file).max_message_bytes == 1024 * 1024
    for change, said in (
        ({"socket": "a.sock"}, "socket must be"),
        ({"state_dir": "state"}, "state_dir must be"),
        ({"max_message_bytes": 100}, "max_message_bytes must be"),
        ({"receiver": {**GOOD["receiver"], "port": 0}}, "receiver.port must be"),
        ({"receiver": {**GOOD["receiver"], "host": ""}}, "receiver.host must"),
        ({"receiver": {**GOOD["receiver"], "timeout_s": 0}}, "receiver.timeout_s must be"),
        ({"receiver": {**GOOD["receiver"], "ca_file": "ca.pem"}}, "files of receiver"),
        ({"receiver": {**GOOD["receiver"], "key_file": "/k"}}, "go together"),
        ({"receiver": {**GOOD["receiver"], "plain": True}}, "plain"),
        ({"receiver": {**GOOD["receiver"], "token_file": "/t"}}, "are for protocol otlp"),
        ({"receiver": {**GOOD["receiver"], "path": "/logs"}}, "are for protocol otlp"),
        ({"receiver": {**GOOD["receiver"], "protocol": "otlp", "path": "//host?x"}}, "must be the path"),
        ({"receiver": {**GOOD["receiver"], "protocol": "otlp", "token_file": "t"}}, "files of receiver"),
        ({"receiver": {**GOOD["receiver"], "protocol": "http"}}, "protocol"),
        ({"tls": False}, "tls"),
    ):
        file.write_text(json.dumps(GOOD | change))
        with pytest.raises(ConfigError, match=said):
            load_settings(file)


def call(allowed: bool):
    subject = Subject("workspace:ws-a", "agent-7", "ws-a", "a" * 64, "req-1")
    return FACTORY.http_activity(
        NOW, subject, method="GET", scheme="https", host="git.example.com", port=443, path="/a", allowed=allowed
    )


def test_every_filter_lets_its_own_through_and_nothing_else() -> None:
    event = call(allowed=True)
    raw = json.dumps(event)
    time = event["time"]
    for name, good, bad in (
        ("since", time, time + 1),
        ("until", time + 1, time),
        ("source", "edge", "broker"),
        ("workspace", "ws-a", "ws"),
        ("agent", "agent-7", "agent-8"),
        ("principal", "workspace:ws-a", "ws-a"),
        ("kind", "http activity", "API Activity"),
        ("kind", "4002", "400"),
        ("activity", "GET", "Post"),
        ("verdict", "allowed", "refused"),
        ("text", "GIT.example", "git.example.org"),
    ):
        assert Choice(**{name: good}).takes("edge", event, raw), name
        assert not Choice(**{name: bad}).takes("edge", event, raw), name
    assert Choice(verdict="refused").takes("edge", call(allowed=False), "")
    finding = FACTORY.detection_finding(NOW, Subject(), kind="chain_gap", title="gap")
    assert not Choice(verdict="allowed").takes("broker", finding, "")
    assert Choice().takes("broker", finding, "")


def test_a_database_of_before_gets_its_positions_in_the_order_of_arrival(tmp_path) -> None:
    file = tmp_path / "broker.db"
    migrations = Config()
    migrations.set_main_option("script_location", "saw.broker:migrations")
    migrations.set_main_option("path_separator", "os")
    with create_engine(f"sqlite:///{file}").begin() as connection:
        migrations.attributes["connection"] = connection
        command.upgrade(migrations, "0007")
    with closing(sqlite3.connect(file)) as old, old:
        rows = [("edge", 1), ("broker", 1), ("edge", 3), ("broker", 2), ("edge", 2)]
        said = ['{"time": 7}', "{}", '{"time": "7"}', '{"time": 1.5}', '{"time": 9}']
        told = [(*row, event) for row, event in zip(rows, said, strict=True)]
        old.executemany("INSERT INTO audit_events VALUES (?, ?, '', '', ?)", told)
    Store.open_sqlite(file, Waker()).close()
    with closing(sqlite3.connect(file)) as new:
        found = new.execute("SELECT source, seq, position FROM audit_events ORDER BY position").fetchall()
        arrived = [at for (at,) in new.execute("SELECT at FROM audit_events ORDER BY position")]
    assert found == [(source, seq, place) for place, (source, seq) in enumerate(rows, 1)]
    # When it arrived is when it says that it happened; what says nothing clear arrived now, and is kept from here on.
    assert (arrived[0], arrived[4]) == (7, 9)
    assert all(at > 1_700_000_000_000 for at in arrived[1:4])
