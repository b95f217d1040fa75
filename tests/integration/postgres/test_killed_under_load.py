"""The proofs under load of ``tests/soak`` in a small size: a broker that is killed while it works, and perimeters that race."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from postgres_rig import Server

sys.path[:0] = [str(Path(__file__).parents[2] / "soak")]

import broker_kill  # noqa: E402
import race  # noqa: E402
from audit_marks import Forged, Lost  # noqa: E402
from broker_rig import Lab  # noqa: E402
from ledger import Ledger  # noqa: E402
from world import arrived, made, reopened, run  # noqa: E402

pytestmark = [pytest.mark.control("FLT-01"), pytest.mark.control("REV-03")]
DATABASES = [pytest.param("sqlite", marks=pytest.mark.sqlite("it is one of both")), "postgresql"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: sockets lie in it."""
    found = Path(tempfile.mkdtemp(prefix="saw-soak-"))
    yield found
    shutil.rmtree(found)


def settings(database: str, request: pytest.FixtureRequest) -> dict[str, str]:
    if database == "sqlite":
        return {}
    server: Server = request.getfixturevalue("postgres")
    return {"postgresql": server.database()}


@pytest.mark.control("AUD-02")
@pytest.mark.parametrize("database", DATABASES)
def test_a_broker_killed_under_load_loses_forges_and_repeats_nothing(
    database: str, directory: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab = made(directory, broker_kill.WORKSPACES, **settings(database, request))
    lab.stop()
    journal = directory / "journal"
    first = broker_kill.soak(lab, journal, 3, cold=100, seed=1, say=False, every=100)
    assert first["kills"] == 3
    # A later run goes on where it was: with the journal alone, and what it acknowledged still counts.
    # Killed while it starts, and as a whole process, too. Senders are killed in the long run alone: their claims have to lapse.
    monkeypatch.setattr(broker_kill, "START_KILLED_EVERY", 2)
    found = broker_kill.soak(reopened(directory), journal, 6, cold=2, seed=2, say=False, every=100)
    assert int(str(found["kills"])) >= 6
    assert int(str(found["acknowledged"])) > int(str(first["acknowledged"]))
    assert int(str(found["arrived"])) > 0


def spoilt(directory: Path, kind: str) -> Lab:
    """A settled run with one thing wrong in it."""
    lab = reopened(directory)
    review = run(lab, "SELECT id FROM reviews WHERE state = 'done'")[0][0]
    if kind == "sent twice":
        with (directory / "arrived").open("a") as file:
            [body] = [body for key, body in arrived(lab) if key == review]
            file.write(f"{review} {body}\n")
    elif kind == "another body":
        text = (directory / "arrived").read_text().splitlines()
        text = [
            f"{review} {hashlib.sha256(b'other').hexdigest()}" if line.startswith(review) else line for line in text
        ]
        (directory / "arrived").write_text("\n".join(text) + "\n")
    elif kind == "lost decision":
        run(lab, f"DELETE FROM review_decisions WHERE review_id = '{review}'")  # noqa: S608
    elif kind == "forged workspace":
        run(
            lab,
            "UPDATE workspaces SET id = 'forged' WHERE id = (SELECT max(id) FROM workspaces WHERE id LIKE 'soak-%')",
        )
    elif kind == "lost event":
        run(lab, "DELETE FROM audit_events WHERE seq = (SELECT max(seq) - 3 FROM audit_events WHERE source = 'broker')")
    return lab


@pytest.fixture(scope="module")
def settled() -> Iterator[Path]:
    """A run of two kills that has ended well."""
    found = Path(tempfile.mkdtemp(prefix="saw-soak-"))
    lab = made(found, broker_kill.WORKSPACES)
    lab.stop()
    broker_kill.soak(lab, found / "journal", 2, cold=100, seed=3, say=False)
    yield found
    shutil.rmtree(found)


@pytest.mark.thorough
@pytest.mark.sqlite("copies the register's file")
@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("sent twice", broker_kill.SentTwice),
        ("another body", Forged),
        ("lost decision", Lost),
        ("forged workspace", Forged),
        ("lost event", Forged),
    ],
)
def test_the_proof_sees_what_is_wrong(settled: Path, directory: Path, kind: str, error: type[Exception]) -> None:
    place = directory / "copy"
    shutil.copytree(settled, place, ignore=shutil.ignore_patterns("*.sock"))
    config = (place / "broker.json").read_text().replace(str(settled), str(place))
    (place / "broker.json").write_text(config)
    lab = spoilt(place, kind)
    whole = broker_kill.Soak(lab, Ledger(place / "journal"), cold=100, seed=1)
    try:
        whole.brokers.start()
        with pytest.raises(error):
            whole.settled()
    finally:
        whole.close()


@pytest.mark.thorough
@pytest.mark.parametrize("database", DATABASES)
def test_sixteen_perimeters_that_race_send_each_approved_call_once(
    database: str, directory: Path, request: pytest.FixtureRequest
) -> None:
    lab = made(directory, 2, **settings(database, request))
    try:
        found = race.race(lab, 16, 60, 2 if database == "postgresql" else 1)
    finally:
        lab.stop()
    assert (found["arrived"], found["approvals"]) == (60, 60)
