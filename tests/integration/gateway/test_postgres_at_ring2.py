"""Sessions of PostgreSQL through ring 2, with the real server, psql and psycopg: opened for whom policy names, ended in time."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest
from pg_ends import DATABASE, PASSWORD, ROLE, Database, Door, database
from ring2_policy import GOVERNANCE, POLICY
from ring2_rig import Rig, wait_for

from saw.gateway.pg_wire import CancelKey, cancel_packet, negotiation, startup_packet

HOST, ADDRESS, NUMBER, NAME = "db.example.com", "10.99.0.7", 6, "ws-6"
SESSIONS = (
    POLICY
    + f"""
  db:
    endpoints: [{{host: {HOST}, port: 5432, protocol: tcp}}]
    binaries: [{{path: /usr/bin/psql}}]
"""
)
SESSIONS_GOVERNANCE = GOVERNANCE.replace(
    "inference:",
    f"""  - {{id: orders-db, ref: "local:orders-db", hosts: ["{HOST}:5432"], postgres: {{user: {ROLE}, databases: [{DATABASE}]}}}}
inference:""",
    1,
).replace("actions:", f"actions:\n  - {{match: {{host: {HOST}, method: [POSTGRES]}}, class: auto}}", 1)

_marks = count(1)


class Sessions:
    """Workspace ``ws-6``, which alone may open sessions, and the server behind ring 2."""

    def __init__(self, rig: Rig, stack: ExitStack) -> None:
        self.rig = rig
        rig.namespace.ip("link", "add", "sawbr6", "type", "bridge")
        rig.namespace.ip("addr", "add", f"10.210.{NUMBER}.1/30", "dev", "sawbr6")
        rig.namespace.ip("link", "set", "sawbr6", "up")
        rig.namespace.ip("addr", "add", f"{ADDRESS}/24", "dev", "far0")
        certificate, key = rig._pair(rig.corporate, (HOST,), "db")
        self.database: Database = stack.enter_context(database(rig.namespace.run, ADDRESS, certificate, key))
        self.secret = rig.directory / "credentials" / "orders-db"
        self.digest, self.bundle = rig.signer.release(1, policy=SESSIONS, governance=SESSIONS_GOVERNANCE)
        self.doors = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="saw-door-")))

    def reset(self, **fields: Any) -> None:
        """Have ``ws-6`` active under a lease, but for ``fields``, and wait until ring 2 knows it."""
        self.secret.touch(0o600)
        self.secret.write_text(PASSWORD + "\n")
        self.database.asks("scram-sha-256")
        self.rig.name_hosts(db_example_com=ADDRESS)
        self.rig.broker.releases = {self.rig.digest: self.rig.bundle, self.digest: self.bundle}
        given = {"number": NUMBER, "state": "active", "sponsor": "mia@example.com", "blueprint": "coding", "ring": "stable",
                 "lease_expires_at": 600, "policy_digest": self.digest, "released_digest": self.digest, "svid_sha256": None,
                 "agent": "agent-6", "delegations": [], "delegation_required": False,
                 "agent_retired": False}  # fmt: skip
        self.rig.broker.put(NAME, **{**given, **fields})
        self.rig.settled()

    def connect(self) -> socket.socket:
        """Return a connection to ring 2 with the identity of the workspace."""
        context = self.rig.svid(NAME, digest=self.digest)
        raw = self.rig.connect(f"10.210.{NUMBER}.1", 8443)
        return context.wrap_socket(raw, server_hostname="ring2.saw.internal")

    def door(self, host: str = f"{HOST}:5432", binary: str = "/usr/bin/psql") -> Door:
        """Return a new way in for clients."""
        return Door(Path(tempfile.mkdtemp(dir=self.doors)), self.connect, host, binary)

    def rows(self, step: str) -> list[dict[str, Any]]:
        """Return what the broker was told of one step of sessions."""
        rows = [item.event for item in self.rig.broker.events]
        return [row for row in rows if row.get("api", {}).get("operation") == f"postgres.{step}"]

    def told(self) -> None:
        """Wait until the broker knows all that happened so far: events come in order, and each session has its end."""
        mark = f"/mark-{next(_marks)}"
        context = self.rig.svid(NAME, digest=self.digest)
        self.rig.call("GET", mark, host=f"{HOST}:5432", context=context, number=NUMBER)
        wait_for(lambda: any(mark in repr(item.event) for item in self.rig.broker.events), "what was recorded before")

        def ended() -> bool:
            opened = [row for row in self.rows("connect") if row["status"] == "Success"]
            return len(opened) == len(self.rows("end"))

        wait_for(ended, "the ends of all sessions")


def connected(door: Door, **words: Any) -> psycopg.Connection[Any]:
    """Connect as a client that knows no password."""
    given = {"host": str(door.directory), "user": ROLE, "dbname": DATABASE, "connect_timeout": 60, **words}
    return psycopg.connect(**given, autocommit=True)


@pytest.fixture(scope="module")
def made(ring2: Rig) -> Iterator[Sessions]:
    with ExitStack() as stack:
        sessions = Sessions(ring2, stack)
        yield sessions
        sessions.reset(state="stopped")
        wait_for(lambda: not ring2.listens(f"10.210.{NUMBER}.1", 8443), "the end of the listener")
        ring2.broker.workspaces.pop(NAME)
    ring2.namespace.ip("link", "del", "sawbr6")


@pytest.fixture
def sessions(rig: Rig, made: Sessions) -> Sessions:
    """Return the rig with ``ws-6`` as new, and ring 2 ready for its sessions."""
    made.reset()
    door = made.door()

    def ready() -> bool:
        try:
            far, status, _ = door.opened()
        except OSError:
            return False
        far.close()
        return status == b"101"

    wait_for(ready, "ring 2 takes sessions of ws-6")
    door.close()
    made.told()
    rig.broker.events.clear()
    return made


@pytest.mark.control("CRED-01")
@pytest.mark.control("POL-04")
@pytest.mark.control("AUD-01")
def test_psql_and_psycopg_work_without_a_password_and_never_hear_it(sessions: Sessions) -> None:
    door = sessions.door()
    with connected(door, application_name="report", options="") as session:
        session.execute("CREATE TABLE IF NOT EXISTS thing (name text)")
        session.execute("INSERT INTO thing VALUES (%s)", ["a" * 200_000])
        with session.cursor() as cursor:
            [(name, user, binding)] = cursor.execute(
                "SELECT name, current_user, (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) FROM thing LIMIT 1"
            ).fetchall()
    assert (len(name), user, binding) == (200_000, ROLE, True)
    environment = {**os.environ, "PGPASSWORD": "openshell:resolve:env:PGPASSWORD"}
    words = ["psql", "-X", "-h", str(door.directory), "-U", ROLE, "-d", DATABASE, "-Atc", "SELECT 6 * 7"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "42\n"), done.stderr
    wait_for(lambda: len(sessions.rows("end")) == 2, "the ends of both sessions at the broker")
    connects, end = sessions.rows("connect"), sessions.rows("end")[0]["unmapped"]["saw"]
    assert [row["status"] for row in connects] == ["Success", "Success"]
    told = connects[0]["unmapped"]["saw"]
    assert (told["user"], told["database"], told["application"], told["credential"]) == (
        ROLE, DATABASE, "report", "orders-db",
    )  # fmt: skip
    # A client says that it ends, and the server closes then: whichever is seen first.
    assert (end["end"] in {"client", "server"}, end["sent"] > 200_000, end["received"] > 200_000) == (True, True, True)
    opened = [item.event for item in sessions.rig.broker.events if "http_request" in item.event]
    assert {row["unmapped"]["saw"]["upgrade"] for row in opened} == {"postgres"}
    everything = door.heard + door.spoken
    for name in ("gatekeeper.log", "envoy.log"):
        everything += (sessions.rig.directory / name).read_bytes()
    everything += repr([item.event for item in sessions.rig.broker.events]).encode()
    assert PASSWORD.encode() not in everything
    assert b"SCRAM" not in door.heard
    door.close()


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    ("words", "state", "says"),
    [
        ({"user": "postgres"}, "28000", "as agent only"),
        ({"dbname": "other"}, "3D000", "opens orders here"),
        ({"dbname": "postgres"}, "3D000", "opens orders here"),
        ({"options": "-c session_replication_role=replica"}, "0A000", "'options' may not be set"),
        ({"replication": "database"}, "0A000", "'replication' may not be set"),
    ],
    ids=["another user", "another database", "the first database", "options", "replication"],
)
def test_what_policy_does_not_name_is_refused_and_recorded(
    sessions: Sessions, words: dict[str, str], state: str, says: str
) -> None:
    door = sessions.door()
    with pytest.raises(psycopg.OperationalError, match=re.escape(says)):
        connected(door, **words)
    wait_for(lambda: sessions.rows("connect"), "the refusal at the broker")
    row = sessions.rows("connect")[0]
    assert (row["status"], row["unmapped"]["saw"]["sqlstate"]) == ("Failure", state)
    assert sessions.rows("end") == []
    with connected(door) as session:
        assert session.execute("SELECT 1").fetchone() == (1,)
    door.close()


@pytest.mark.control("POL-04")
@pytest.mark.control("NET-01")
def test_no_session_is_opened_elsewhere_or_by_others(sessions: Sessions) -> None:
    for host, binary, reason in (
        ("api.example.com", "/usr/bin/curl", "method_or_path_not_allowed"),
        ("db.example.com:5433", "/usr/bin/psql", "host_not_allowed"),
        (f"{HOST}:5432", "/usr/bin/curl", "binary_not_allowed"),
    ):
        door = sessions.door(host, binary)
        far, status, rest = door.opened()
        while not rest.endswith(b"}") and (data := far.recv(65536)):
            rest += data
        assert (status, reason in rest.decode()) == (b"403", True), (host, binary, rest)
        far.close()
        door.close()
    context = sessions.rig.svid(NAME, digest=sessions.digest)
    for method in ("GET", "POST"):
        answer = sessions.rig.call(
            method, "/", host=f"{HOST}:5432", context=context, number=NUMBER, binary="/usr/bin/psql"
        )
        assert answer.outcome == (403, "method_or_path_not_allowed"), method
    # No client can send the method that stands for a session: Envoy knows no such method.
    assert sessions.rig.call("POSTGRES", "/", host=f"{HOST}:5432", context=context, number=NUMBER).status == 400


@pytest.mark.control("CRED-01")
def test_a_revoked_credential_opens_no_further_session(sessions: Sessions) -> None:
    door = sessions.door()
    with connected(door) as session:
        sessions.secret.unlink()
        assert session.execute("SELECT 1").fetchone() == (1,)
    with pytest.raises(psycopg.OperationalError):
        connected(door)
    assert b"credential_unavailable" in door.refused, (door.heard[-300:], door.refused)
    sessions.secret.touch(0o600)
    sessions.secret.write_text("another password")
    with pytest.raises(psycopg.OperationalError, match="the server refuses the session \\(28P01\\)"):
        connected(door)
    wait_for(lambda: len(sessions.rows("end")) == 2, "both ends at the broker")
    good, bad = sessions.rows("end")
    assert (good["status"], bad["status"], bad["unmapped"]["saw"]["sqlstate"]) == ("Success", "Failure", "28P01")
    assert "28P01" in bad["unmapped"]["saw"]["end"]
    door.close()


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("how", "kind", "says"),
    [
        ("md5", "hostssl", ""),
        ("password", "hostssl", "asks for the password itself"),
        ("trust", "hostssl", "lets us in before it has proved"),
        ("scram-sha-256", "hostnossl", "refuses the session \\(28000\\)"),
    ],
    ids=["md5 with a secret of SCRAM", "cleartext", "trust", "no TLS"],
)
def test_a_server_that_asks_in_another_way_gets_nothing(sessions: Sessions, how: str, kind: str, says: str) -> None:
    sessions.database.asks(how, kind)
    door = sessions.door()
    if says:
        with pytest.raises(psycopg.OperationalError, match=says):
            connected(door)
    else:  # the server itself asks by SCRAM where it holds a secret of it, whatever its settings say
        connected(door).close()
    door.close()


@pytest.mark.control("ID-03")
def test_a_session_ends_with_what_allowed_it(sessions: Sessions) -> None:
    door = sessions.door()
    session = connected(door)
    assert session.execute("SELECT 1").fetchone() == (1,)
    sessions.rig.settle()  # another workspace's news ends nothing
    assert session.execute("SELECT 2").fetchone() == (2,)
    sessions.rig.broker.put(NAME, state="stopped")
    sessions.rig.settled()

    def ended() -> bool:
        try:
            session.execute("SELECT 3")
        except psycopg.OperationalError:
            return True
        return False

    wait_for(ended, "the end of the session")
    wait_for(lambda: sessions.rows("end"), "its end at the broker")
    row = sessions.rows("end")[0]
    assert (row["status"], row["unmapped"]["saw"]["end"]) == ("Success", "withdrawn")
    door.close()


@pytest.mark.skipif(psycopg.pq.version() < 180000, reason="this libpq asks for no version but 3.0")
def test_a_client_that_asks_for_a_newer_version_is_told_the_one_that_is_spoken(sessions: Sessions) -> None:
    door = sessions.door()
    with connected(door, max_protocol_version="latest") as session:
        assert session.execute("SELECT 1").fetchone() == (1,)
    assert negotiation(()) in door.heard
    door.close()
    plain = sessions.door()
    with connected(plain, max_protocol_version="3.0") as session:
        assert session.execute("SELECT 1").fetchone() == (1,)
    assert negotiation(()) not in plain.heard
    plain.close()


def _send(door: Door, key: CancelKey) -> None:
    """Ask for a statement to be cancelled, as libpq does: by a connection of its own, which says nothing back."""
    far, _, _ = door.opened()
    far.sendall(cancel_packet(key))
    with contextlib.suppress(TimeoutError):
        assert far.recv(1) == b""
    far.close()


@pytest.mark.control("POL-04")
def test_a_statement_is_cancelled_with_the_key_of_its_session_alone(sessions: Sessions) -> None:
    door = sessions.door()
    with connected(door) as session:
        real = session.execute("SELECT pg_backend_pid()").fetchone()
        shown = session.pgconn.backend_pid
        assert real is not None and real[0] != shown
        key = CancelKey(*struct.unpack("!II", door.heard.partition(b"K\0\0\0\x0c")[2][:8]))
        assert key.process == shown
        asked = threading.Event()

        def cancel() -> None:
            with sessions.database.admin() as watching:
                while not watching.execute("SELECT 1 FROM pg_stat_activity WHERE query LIKE '%pg_sleep(120)%' "
                                           "AND usename = 'agent' AND state = 'active'").fetchone():  # fmt: skip
                    asked.wait(0.05)
            _send(door, key)

        threading.Thread(target=cancel, daemon=True).start()
        with pytest.raises(psycopg.errors.QueryCanceled):
            session.execute("SELECT pg_sleep(120)")
        _send(door, CancelKey(shown, key.secret ^ 1))
        assert session.execute("SELECT 1").fetchone() == (1,)
    wait_for(lambda: len(sessions.rows("cancel")) == 2, "both at the broker")
    assert [row["status"] for row in sessions.rows("cancel")] == ["Success", "Failure"]
    door.close()


@pytest.mark.thorough
@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        struct.pack("!ii", 4, 196608),
        struct.pack("!ii", 10_001, 196608) + b"\0" * 9993,
        startup_packet(ROLE, DATABASE, [("user", "postgres")]),
        startup_packet(ROLE, DATABASE, [("DATABASE", "other")]),
        struct.pack("!ii", 8, 80877103) * 2,
        struct.pack("!ii", 9, 80877103) + b"x",
        struct.pack("!ii", 8, 131072),
    ],
    ids=["http", "short", "long", "two users", "two databases", "TLS twice", "TLS with more", "version 2"],
)
def test_what_is_no_start_of_a_session_ends_it(sessions: Sessions, sent: bytes) -> None:
    door = sessions.door()
    far, status, got = door.opened()
    assert status == b"101"
    far.sendall(sent)
    while data := far.recv(65536):
        got += data
    assert b"FATAL" in got and b"ring 2: " in got
    far.close()
    door.close()
