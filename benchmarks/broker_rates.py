"""What the broker gives out and takes in: session certificates, approvals and audit events, each against its bare core.

A real broker over its own socket, one operator who asks one thing after the other. Baselines, in the same run and on the same
disk: ``ssh-keygen -s`` for a certificate, and for whatever is written one SQLite transaction with one row, durable when it
ends (``synchronous=FULL``), as many for each thing as the broker makes.
"""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter

import msgspec

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
sys.path[:0] = [
    str(Path(__file__).parent), *(str(TESTS / name) for name in ("soak", "integration/broker", "integration"))
]  # fmt: skip

from broker_rig import Lab  # noqa: E402
from results import Result, quantile, result  # noqa: E402 - the modules beside this one
from world import made  # noqa: E402 - a broker with reviewers and a perimeter lies with the tests
from writers import Perimeter, wanted  # noqa: E402

from saw.audit import Chain, EventFactory, Subject  # noqa: E402
from saw.broker.config import SessionRules  # noqa: E402
from saw.broker.context import BROKER  # noqa: E402
from saw.broker.store import Store  # noqa: E402
from saw.broker.wake import Waker  # noqa: E402
from saw.identity.ssh import SshAuthority  # noqa: E402
from saw.policy.keys import load_private_key  # noqa: E402
from saw.review.decide import decide, look  # noqa: E402

WORKSPACES = 4
EACH_WORKSPACE = 60
BATCH = 200
DURABLE = "baseline: one bare SQLite transaction with one row, synchronous=FULL"


def timed(action: Callable[[], object], count: int) -> list[float]:
    """Return the seconds of each of ``count`` actions."""
    took = []
    for _ in range(count):
        begun = perf_counter()
        action()
        took.append(perf_counter() - begun)
    return took


@contextmanager
def bare_table(directory: Path) -> Iterator[Callable[[int], None]]:
    """Yield what writes so many rows in one durable transaction."""
    with closing(sqlite3.connect(directory / "bare.db", isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute("CREATE TABLE row (one INTEGER PRIMARY KEY, content BLOB)")
        content = b"x" * 800

        def write(rows: int) -> None:
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT INTO row (content) VALUES (?)", [(content,)] * rows)
            database.execute("COMMIT")

        yield write


def certificates(lab: Lab, directory: Path, count: int) -> list[Result]:
    """A session's certificate: from the call to the answer."""
    for name in ("ca", "person"):
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(directory / name)]
        subprocess.run(line, check=True)
    public = (directory / "person.pub").read_text()
    signs = ["ssh-keygen", "-q", "-s", str(directory / "ca"), "-I", "bench", "-n", "bench", "-V", "+2m"]
    authority = SshAuthority.make()
    bare = timed(lambda: subprocess.run([*signs, str(directory / "person.pub")], check=True), count)
    library = timed(lambda: authority.issue_user(public, "bench", "bench", datetime.now(UTC), 120), count)
    body = {"workspace_id": "ws-0", "public_key": public}
    with lab.operator.session() as client:
        took = timed(lambda: client.request("POST", "/v1/sessions", body), count)
    return [
        result(
            f"session_certificate_p{share * 100:.0f}", quantile(took, share) * 1000, "ms",
            baseline=quantile(bare, share) * 1000,
            note=f"baseline: ssh-keygen -s; the library alone signs in {quantile(library, share) * 1000:.2g} ms",
        )
        for share in (0.5, 0.99)
    ]  # fmt: skip


def approvals(lab: Lab, write: Callable[[int], None], count: int) -> Result:
    """Approvals per second: look at a call, take a nonce, sign, hand in; what is opened beforehand does not count."""
    key = load_private_key(lab.directory / "ben.key")
    edge = Perimeter(lab)
    opened = [
        edge.ask("POST", "/v1/perimeter/reviews", wanted(f"ws-{number // EACH_WORKSPACE}", f"bench {number}"))["id"]
        for number in range(count)
    ]
    edge.http.close()
    with lab.operator.session() as client:
        took = sum(timed(lambda: decide(client, look(client, str(opened.pop())), key, "approve"), count))
    bare = sum(timed(lambda: (write(1), write(1)), count))
    return result(
        "approvals_per_second", count / took, "1/s", baseline=count / bare,
        note="looked at, nonce, signed, handed in, one after the other; baseline: two bare durable SQLite transactions",
    )  # fmt: skip


def appends(lab: Lab, directory: Path, write: Callable[[int], None], count: int) -> list[Result]:
    """Audit events per second: one for each transaction of the store, and shipped by a perimeter in batches."""
    store = Store.open_sqlite(directory / "store.db", Waker())
    factory = EventFactory("saw-broker", host="bench", new_uid=lambda: "0" * 8)

    def one() -> None:
        with store.write() as tx:
            entity = ("bench", "one")
            tx.record(factory.entity_management(datetime.now(UTC), BROKER.subject(), entity, activity="update"))

    took = sum(timed(one, count))
    store.close()
    bare = sum(timed(lambda: write(1), count))
    chain = Chain("edge")
    shipped = [
        [msgspec.to_builtins(chain.append(_call(batch * BATCH + number))) for number in range(BATCH)]
        for batch in range(max(1, count // 50))
    ]
    edge = Perimeter(lab)
    batches = len(shipped)
    sent = sum(
        timed(lambda: edge.ask("POST", "/v1/perimeter/events", {"source": "edge", "events": shipped.pop(0)}), batches)
    )
    edge.http.close()
    bare_batches = sum(timed(lambda: write(BATCH), batches))
    return [
        result("audit_appends_per_second", count / took, "1/s", baseline=count / bare, note=f"one at a time; {DURABLE}"),
        result(
            "audit_events_shipped_per_second", batches * BATCH / sent, "1/s", baseline=batches * BATCH / bare_batches,
            note=f"over mutual TLS, {BATCH} in a call, each hash checked; baseline: bare transactions of {BATCH} rows",
        ),
    ]  # fmt: skip


def _call(number: int) -> dict[str, object]:
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "uid")
    return factory.http_activity(
        datetime.now(UTC), Subject("workspace:ws-0", "agent-1", "ws-0", "a" * 64, f"req-{number}"), method="GET",
        scheme="https", host="git.example.com", port=443, path=f"/{number}", allowed=True,
    )  # fmt: skip


def measure(count: int) -> list[Result]:
    """Measure each with ``count`` samples; of approvals no more than the broker lets wait."""
    with tempfile.TemporaryDirectory(prefix="saw-bench-") as name:
        directory = Path(name)
        (directory / "lab").mkdir()
        lab = made(directory / "lab", WORKSPACES, sessions=SessionRules(leg_source="127.0.0.0/8"))
        try:
            with bare_table(directory) as write:
                return [
                    *certificates(lab, directory, count),
                    approvals(lab, write, min(count, WORKSPACES * EACH_WORKSPACE)),
                    *appends(lab, directory, write, count),
                ]
        finally:
            lab.stop()
