"""Several brokers on one database: who they are, that they share their files, what one of them does for all.

Each holds a session of its own on the database, with an advisory lock that says it lives and, in one of them, the lock of
upkeep (retention, rollouts, renewals). A session that is lost is opened again; until then this replica does no upkeep and its
long-polls look by themselves. Files that all need lie in one ``state_dir`` that all of them see: a broker leaves a beacon there,
and starts when every other one that lives has said that it sees it. A copy of the directory is not enough.
"""

from __future__ import annotations

import hashlib
import logging
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from sqlalchemy import select

from saw.broker import postgres, schema
from saw.broker.config import BrokerConfig
from saw.broker.database_settings import PostgresPlace, parse_database
from saw.broker.register_place import require_copied
from saw.broker.replica_wake import CHANNEL, hear
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError, SawError, UnavailableError
from saw.files import write_private

logger = logging.getLogger("saw.broker")

#: How long one wait for notifications lasts, and how long until a lost session is tried again, seconds.
LOOK_S = 2.0
AGAIN_S = 1.0
#: How long a broker that starts waits for the others, seconds.
SEEN_S = 15.0
#: Where it asks them, and they answer.
BEACONS = "saw_broker_beacons"

_NOTIFY = "SELECT pg_notify(%s, %s)"

_LIVE = """\
SELECT objid::bigint FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 2 AND classid = %s
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""


def bind_installation(store: Store, config: BrokerConfig, *, copied: bool = False) -> bool:
    """Note whose database this is; return whether it was nobody's.

    Raise :class:`ConfigError` when it is another's, or nobody's while the register is in a file that was not ``copied``.
    """
    certificate = x509.load_pem_x509_certificate((config.keys / "x509" / "ca.pem").read_bytes())
    mine = hashlib.sha256(certificate.public_bytes(Encoding.DER)).hexdigest()
    column = schema.registry.c.installation
    with store.read() as connection:
        known = connection.execute(select(column)).scalar_one()
    if known is None:
        if not copied:
            require_copied(config)
        with store.write() as tx:
            known = tx.connection.execute(select(column)).scalar_one()
            if known is None:
                tx.connection.execute(schema.registry.update().values(installation=mine))
                return True
    if known != mine:
        raise ConfigError(
            f"the database belongs to another authority than the one in {config.keys / 'x509'}",
            cure="brokers of one database share one state_dir; name another database for this one",
            details={"database": known, "state_dir": mine},
        )
    return False


def living(store: Store) -> int:
    """Return how many brokers serve on the database of ``store``; 0 for a file, which only those of its host use."""
    with store.read() as connection:
        if connection.dialect.name != "postgresql":
            return 0
        return len(connection.exec_driver_sql(_LIVE, (postgres.REPLICAS,)).all())


class Upkeep:
    """A broker with a database of its own: it does everything itself."""

    @property
    def mine(self) -> bool:
        """Whether this broker does what one of several does for all."""
        return True

    def close(self) -> None:
        """Nothing is held."""


class Replica(Upkeep):
    """This broker among those of its database."""

    def __init__(self, config: BrokerConfig, store: Store, waker: Waker) -> None:
        self._place: PostgresPlace = parse_database(config.postgresql or "")
        self._store = store
        self._waker = waker
        self._number = store.replica
        self._beacons = config.state / "replicas"
        self._beacon = self._beacons / f"{self._number:08x}"
        self._ending = threading.Event()
        self._again = threading.Event()
        self._leads = False
        self._session: psycopg.Connection[Any] | None = self._enter()
        self._thread = threading.Thread(target=self._run, name="saw-replica", daemon=True)

    def start(self) -> None:
        """Hear what other replicas change, from now on."""
        self._thread.start()

    @property
    def mine(self) -> bool:
        """Whether this replica holds the lock of upkeep. Two may think so for a moment: each step is a transaction."""
        return self._leads

    def close(self) -> None:
        """Leave: another replica takes upkeep over."""
        self._ending.set()
        self._again.set()
        with suppress(SawError):
            self._store.tell()
        if self._thread.is_alive():
            self._thread.join(30)
        self._leave()
        self._beacon.unlink(missing_ok=True)

    def _enter(self) -> psycopg.Connection[Any]:
        """Open the session and show that this replica lives, once every other one sees its beacon; or raise."""
        session = postgres.connect(self._place, application_name="saw-broker-replica")
        try:
            session.execute(f"SELECT pg_advisory_lock({postgres.LOCKS}, {postgres.ENTRY})".encode())
            session.execute(f"LISTEN {CHANNEL}".encode())
            session.execute(f"LISTEN {BEACONS}".encode())
            self._beacons.mkdir(mode=0o700, exist_ok=True)
            write_private(self._beacon, socket.gethostname().encode())
            alive = {int(row[0]) for row in session.execute(_LIVE, (postgres.REPLICAS,))} - {self._number}
            self._be_seen(session, set(alive))
            for path in self._beacons.iterdir():
                if not _is_alive(path, alive | {self._number}):
                    path.unlink(missing_ok=True)
            session.execute(f"SELECT pg_advisory_lock({postgres.REPLICAS}, {self._number})".encode())
            session.execute(f"SELECT pg_advisory_unlock({postgres.LOCKS}, {postgres.ENTRY})".encode())
            self._lead(session)
        except (SawError, OSError, psycopg.Error) as error:
            session.close()
            if isinstance(error, psycopg.Error):
                with postgres.translated():
                    raise
            self._beacon.unlink(missing_ok=True)
            raise
        return session

    def _be_seen(self, session: psycopg.Connection[Any], others: set[int]) -> None:
        """Return when each of ``others`` has said that it sees this beacon: then its files are ours."""
        if not others:
            return
        session.execute(_NOTIFY, (BEACONS, f"see {self._number:08x}"))
        for told in session.notifies(timeout=SEEN_S):
            if told.channel != BEACONS:
                continue  # what others change before this one serves, it reads anyway
            words = told.payload.split()
            if len(words) != 3 or words[1] != f"{self._number:08x}":
                continue
            if words[0] == "unseen":
                raise ConfigError(
                    f"another broker serves on this database and does not share {self._beacons.parent}",
                    cure="put state_dir on a file system that all brokers of the database mount, or stop the other one",
                )
            others.discard(int(words[2], 16))
            if not others:
                return
        raise UnavailableError(
            f"another broker on this database did not say within {SEEN_S:.0f} s that it shares {self._beacons.parent}",
            cure="see its log; start again when it has ended or answers",
        )

    def _look(self, session: psycopg.Connection[Any], payload: str) -> None:
        """Answer a broker that asks whether its beacon is seen here."""
        words = payload.split()
        if len(words) == 2 and words[0] == "see" and words[1] != f"{self._number:08x}":
            # A directory is read anew, where a name that was not there a moment ago may be remembered as absent.
            seen = words[1] in {path.name for path in self._beacons.iterdir()}
            answer = f"{'seen' if seen else 'unseen'} {words[1]} {self._number:08x}"
            session.execute(_NOTIFY, (BEACONS, answer))

    def _lead(self, session: psycopg.Connection[Any]) -> None:
        if not self._leads:
            row = session.execute(
                f"SELECT pg_try_advisory_lock({postgres.LOCKS}, {postgres.UPKEEP})".encode()
            ).fetchone()
            self._leads = row is not None and bool(row[0])
            if self._leads:
                logger.info("this replica does the upkeep")

    def _leave(self) -> None:
        self._leads = False
        session, self._session = self._session, None
        if session is not None:
            with suppress(psycopg.Error):
                session.close()

    def _run(self) -> None:
        away = False
        while not self._ending.is_set():
            try:
                if self._session is None:
                    self._session = self._enter()
                    logger.info("this replica has its session on the database again")
                    away = False
                    self._waker.wake_all()
                self._listen(self._session)
            except (SawError, OSError, psycopg.Error) as error:
                self._leave()
                if isinstance(error, ConfigError):  # somebody else came while nobody could see this one
                    logger.critical("this broker refuses every call: %s", error)
                    self._store.shut(error)
                    return
                if not away:
                    logger.warning("this replica lost its session on the database: %s", str(error).strip())
                away = True
                # Nobody tells what others change: whoever waits looks by itself.
                self._waker.wake_all()
                self._again.wait(AGAIN_S)

    def _listen(self, session: psycopg.Connection[Any]) -> None:
        tried = 0.0
        while not self._ending.is_set():
            # All that came at once is taken; leaving earlier would lose the rest of it.
            for told in list(session.notifies(timeout=LOOK_S, stop_after=1)):
                if told.channel == CHANNEL:
                    hear(self._waker, self._number, told.payload)
                else:
                    self._look(session, told.payload)
            if time.monotonic() - tried >= LOOK_S:
                self._lead(session)
                tried = time.monotonic()


def _is_alive(path: Path, alive: set[int]) -> bool:
    try:
        return int(path.name, 16) in alive
    except ValueError:
        return False


def join(config: BrokerConfig, store: Store, waker: Waker) -> Upkeep:
    """Return this broker's place among those of its database, which is already taken."""
    if config.postgresql is None:
        return Upkeep()
    bind_installation(store, config)
    replica = Replica(config, store, waker)
    replica.start()
    return replica
