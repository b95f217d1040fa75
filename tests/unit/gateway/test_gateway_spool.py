"""The audit spool: no row, no answer; one chain over restarts; nothing lost, nothing twice."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import pytest

from saw.audit.chain import verify_chain
from saw.gateway.errors import SpoolError
from saw.gateway.spool import Spool


def record(spool: Spool, count: int) -> list[int]:
    async def all_at_once() -> list[int]:
        return list(await asyncio.gather(*(spool.record({"n": n}) for n in range(count))))

    return asyncio.run(all_at_once())


@pytest.mark.control("AUD-01")
def test_concurrent_events_form_one_dense_chain(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 10_000)
    assert sorted(record(spool, 700)) == list(range(1, 701))
    report = verify_chain(spool.pending(1000), spool.head)
    assert (report.complete, report.count) == (True, 700)
    spool.close()


@pytest.mark.control("AUD-01")
def test_the_chain_goes_on_after_a_restart_and_after_rows_were_shipped(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 100)
    record(spool, 10)
    first = spool.pending()
    spool.acknowledge(8)
    spool.close()
    spool = Spool(tmp_path, "edge", 100)
    assert [event.seq for event in spool.pending()] == [9, 10]
    record(spool, 2)
    assert verify_chain([*first[:8], *spool.pending()], spool.head).complete
    spool.acknowledge(3)
    spool.acknowledge(99)
    assert spool.acknowledged == 8
    spool.close()


@pytest.mark.control("AUD-01")
def test_a_full_spool_refuses_until_the_broker_catches_up(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 3)
    record(spool, 3)
    with pytest.raises(SpoolError, match="full"):
        record(spool, 1)
    spool.acknowledge(1)
    assert record(spool, 1) == [4]
    spool.close()


@pytest.mark.control("AUD-01")
def test_what_cannot_be_written_is_refused_and_leaves_no_gap(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "edge", 100)
    record(spool, 1)
    with sqlite3.connect(tmp_path / "spool.db") as other:
        other.execute("CREATE TRIGGER no BEFORE INSERT ON event BEGIN SELECT RAISE(FAIL, 'disk full'); END")
    with pytest.raises(SpoolError, match="cannot be written"):
        record(spool, 1)
    other.execute("DROP TRIGGER no")
    other.commit()
    other.close()
    assert record(spool, 1) == [2]
    assert verify_chain(spool.pending(), spool.head).complete
    with pytest.raises(SpoolError, match="canonical"):
        asyncio.run(spool.record({"n": float("nan")}))
    spool.close()


def test_a_spool_of_another_gatekeeper_is_not_continued(tmp_path: Path) -> None:
    Spool(tmp_path, "edge", 3).close()
    with pytest.raises(SpoolError, match="belongs to edge"):
        Spool(tmp_path, "other", 3)
