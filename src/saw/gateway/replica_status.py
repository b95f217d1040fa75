"""How the gatekeepers of this host are, asked from each of them over its own socket."""

from __future__ import annotations

import http.client
import json
import socket
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec

from saw import jsontext
from saw.gateway.config import GatekeeperConfig
from saw.gateway.envoy_parts import HEALTH_PATH

PATIENCE_S = 5.0
"""How long an answer of one replica is waited for (seconds)."""


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """One replica: ``problem`` says why it decides nothing, empty where it decides. The rest is what it said, if it did.

    ``state`` is the number of the broker's state that it has, ``decided`` how many calls it decided on since it started.
    """

    replica: int
    problem: str = ""
    leads: bool = False
    pid: int = 0
    state: int = -1
    workspaces: int = 0
    decided: int = 0


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """All replicas of a host; how many events wait for the broker and how many reservations for the end of their call, None
    where that cannot be read."""

    replicas: tuple[Replica, ...]
    events_waiting: int | None
    reservations_open: int | None


class _Told(msgspec.Struct, frozen=True):
    replica: int
    leads: bool
    pid: int
    state: int
    workspaces: int
    doubt: str
    decided: int


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("gatekeeper", timeout=PATIENCE_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def ask(path: Path, replica: int) -> Replica:
    """Return how the replica that listens at ``path`` is."""
    try:
        with closing(_Connection(path)) as connection:
            connection.request("GET", HEALTH_PATH)
            told = jsontext.decode(connection.getresponse().read(65536), kind=_Told)
    except TimeoutError:
        return Replica(replica=replica, problem=f"it does not answer within {PATIENCE_S:.0f} s")
    except OSError as error:
        return Replica(replica=replica, problem=f"it is not there: {error.strerror or error}")
    except (http.client.HTTPException, msgspec.DecodeError) as error:
        return Replica(replica=replica, problem=f"its answer cannot be read: {type(error).__name__}")
    return Replica(
        replica=replica,
        problem=told.doubt,
        leads=told.leads,
        pid=told.pid,
        state=told.state,
        workspaces=told.workspaces,
        decided=told.decided,
    )


def status(config: GatekeeperConfig) -> Status:
    """Return how every configured replica is, and what they have before them together."""
    return Status(
        replicas=tuple(ask(sockets.authz, number) for number, sockets in enumerate(config.all_sockets(), 1)),
        events_waiting=_count(config.state_dir / "spool.db", "SELECT seq - acknowledged FROM head"),
        reservations_open=_count(
            config.state_dir / "budget.db", "SELECT count(*) FROM charge WHERE state = 'open' AND account != ''"
        ),
    )


def print_status(config: GatekeeperConfig, *, as_json: bool) -> int:
    """Print :func:`status`; return 0 when at least one replica decides, else 1."""
    found = status(config)
    decides = any(not replica.problem for replica in found.replicas)
    if as_json:
        print(json.dumps({"ok": decides, **msgspec.to_builtins(found)}))
        return 0 if decides else 1
    for replica in found.replicas:
        said = (
            replica.problem
            or f"knows {replica.workspaces} workspaces (state {replica.state}), decided {replica.decided} calls"
        )
        pid = f" (pid {replica.pid})" if replica.pid else ""
        print(f"replica {replica.replica}{pid}{', leads' if replica.leads else ''}: {said}")
    for count, what in (
        (found.events_waiting, "events wait for the broker"),
        (found.reservations_open, "reservations wait for the end of their call"),
    ):
        print(f"{'?' if count is None else count} {what}")
    return 0 if decides else 1


def _count(path: Path, question: str) -> int | None:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=PATIENCE_S)) as database:
            row = database.execute(question).fetchone()
    except sqlite3.Error:
        return None
    return int(row[0]) if row else None
