"""Several processes write to one database at once, and some are killed: one chain without a gap, nothing answered is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from postgres_rig import Server, end
from sqlalchemy import select

from saw.audit import verify_chain
from saw.broker.database_settings import parse_database
from saw.broker.schema import audit_events, registry
from saw.broker.store import Store, chained_rows, read_head
from saw.broker.wake import Waker

pytestmark = [pytest.mark.control("FLT-01"), pytest.mark.control("AUD-01")]
EACH = 80


class Writer:
    def __init__(self, url: str, name: str, count: int) -> None:
        self.name = name
        command = [sys.executable, str(Path(__file__).with_name("writer.py")), url, name, str(count)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.answered: list[tuple[int, int]] = []

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def read(self, most: int) -> None:
        while len(self.answered) < most and (line := self.line()):
            seq, number = line.split()
            self.answered.append((int(seq), int(number)))


def test_processes_that_write_at_once_make_one_chain_and_a_killed_one_loses_nothing_answered(postgres: Server) -> None:
    url = postgres.database()
    writers = [Writer(url, name, count) for name, count in (("one", EACH), ("two", EACH), ("killed", 10**6))]
    try:
        for writer in writers:
            assert writer.line() == "ready"
        for writer in writers:
            writer.go()
        writers[2].read(40)
        end(writers[2].process)
        for writer in writers:
            writer.read(10**6)
        assert [writer.process.wait(60) for writer in writers] == [0, 0, -9]
    finally:
        for writer in writers:
            if writer.process.poll() is None:
                end(writer.process)
            for pipe in (writer.process.stdin, writer.process.stdout):
                assert pipe is not None
                pipe.close()
    store = Store.open_postgresql(parse_database(url), Waker())
    with store.read() as connection:
        rows = connection.execute(select(audit_events).order_by(audit_events.c.seq)).all()
        head = read_head(connection, "broker")
        last = connection.execute(select(registry.c.seq)).scalar_one()
    store.close()
    chain = list(chained_rows(rows))
    assert [item.seq for item in chain] == list(range(1, len(chain) + 1))
    assert [row.position for row in rows] == list(range(1, len(rows) + 1))
    report = verify_chain(chain, head)
    assert (report.complete, report.findings) == (True, ())
    assert last == len(chain) == head.seq, "a registry number for each event, and none for what was undone"
    stored = {(item.seq, item.event["entity"]["type"], item.event["entity"]["uid"]) for item in chain}
    answered = {(seq, writer.name, str(number)) for writer in writers for seq, number in writer.answered}
    assert len(answered) >= 2 * EACH + 40
    assert answered <= stored
    assert len(stored) <= len(answered) + 1, "of the killed one a last row may be there that nobody was told of"
