"""Recordings that bastions hand in: kept as they came, encrypted, when their chain ends where the trail says; removed in time.

The broker reads none of them. It checks the chain of hashes, which takes no key, against the digest that came with the
session's end.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Literal

from sqlalchemy import Row, select
from starlette.concurrency import run_in_threadpool

from saw.broker.clock import iso
from saw.broker.context import BROKER, Caller, Services
from saw.broker.errors import BrokerError, ConflictError, NotFoundError, TooLargeError
from saw.broker.holds import holds_in_force
from saw.broker.schema import sessions
from saw.broker.session_views import get_session, own_session
from saw.broker.store import Transaction
from saw.sessions.recording import RecordingBroken, digest_of

_INCOMING = ".incoming-"
_ACTIVITIES: dict[str, Literal["create", "update", "delete"]] = {
    "session.recording.store": "create",
    "session.recording.hold": "update",
    "session.recording.release": "update",
    "session.recording.remove": "delete",
}


class NoRoomError(BrokerError):
    """A recording does not fit on the disk; the bastion keeps it and tries again."""

    code = "no_room"
    status = 507


class Recordings:
    """The recordings of this broker, one file each under ``place``."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._rules = services.config.sessions
        self.place = services.config.state / "recordings"
        # A broker that was killed while a recording came in left a part of it; the bastion hands it in again.
        for part in self.place.glob(f"{_INCOMING}*"):
            _remove_abandoned(part)

    async def receive(self, caller: Caller, identifier: str, body: AsyncIterator[bytes]) -> dict[str, Any]:
        """Take the recording of a session that ``caller`` has closed; the same one again changes nothing."""
        if not await run_in_threadpool(self._awaits, caller, identifier):
            return {"changed": False}
        try:
            self.place.mkdir(mode=0o700, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.place, prefix=_INCOMING) as file:
                fcntl.flock(file.fileno(), fcntl.LOCK_EX)  # until it is closed it is not abandoned
                await self._write(file.file, body)
                await run_in_threadpool(self._keep, caller, identifier, Path(file.name))
        except OSError as error:
            raise NoRoomError(
                f"the recording cannot be stored: {error.strerror}", cure=f"make room in {self.place}"
            ) from error
        return {"changed": True}

    def file(self, identifier: str) -> Path:
        """Return the file of a recording that is here."""
        with self._s.store.read() as connection:
            row = get_session(connection, identifier)
        if row.recording_removed_at is not None:
            raise NotFoundError(
                f"the recording of {identifier} was removed at {row.recording_removed_at}",
                cure=f"recordings are kept for {self._rules.keep_recordings_days} days (sessions.keep_recordings_days)",
                code="recording_removed",
            )
        if row.recording_stored_at is None:
            raise NotFoundError(
                f"the recording of {identifier} is not here yet",
                cure="the bastion hands it in when the session has ended; until then name its file with --from",
                code="recording_not_here",
            )
        return self._path(identifier)

    def hold(self, caller: Caller, identifier: str, reason: str) -> bool:
        """Keep a recording past its time, until :meth:`release`; return whether it was not held before."""
        with self._s.store.write() as tx:
            row = get_session(tx.connection, identifier)
            if row.recording_removed_at is not None or row.redeemed_at is None:
                raise ConflictError(
                    f"{identifier} has no recording", cure="saw sessions lists them", code="session_not_recorded"
                )
            if row.recording_held_at is not None:
                return False
            self._set_hold(tx, caller, row, "session.recording.hold", reason, held=True)
        return True

    def release(self, caller: Caller, identifier: str, reason: str) -> bool:
        """End a hold; what is past its time goes at the next look. Return whether there was one."""
        with self._s.store.write() as tx:
            row = get_session(tx.connection, identifier)
            if row.recording_held_at is None:
                return False
            self._set_hold(tx, caller, row, "session.recording.release", reason, held=False)
        return True

    def tick(self) -> None:
        """Remove recordings, and their keys, whose time is over and which nobody holds."""
        days = self._rules.keep_recordings_days
        if not days:
            return
        before = iso(self._s.clock() - timedelta(days=days))
        due = sessions.c.recording_key.is_not(None) & (sessions.c.closed_at <= before)
        due &= sessions.c.recording_held_at.is_(None)
        with self._s.store.write() as tx:
            held = holds_in_force(tx.connection)
            for row in tx.connection.execute(select(sessions).where(due)).all():
                if held.takes(row.workspace_id, row.issued_at, row.closed_at):
                    continue
                # Without its key no copy of it can be read either.
                self._path(row.id).unlink(missing_ok=True)
                tx.connection.execute(
                    sessions.update()
                    .where(sessions.c.id == row.id)
                    .values(recording_key=None, recording_removed_at=iso(self._s.clock()))
                )
                self._record(tx, BROKER, row, "session.recording.remove", f"kept for {days} days")

    def _set_hold(
        self, tx: Transaction, caller: Caller, row: Row[Any], operation: str, reason: str, *, held: bool
    ) -> None:
        now = iso(self._s.clock())
        tx.connection.execute(
            sessions.update()
            .where(sessions.c.id == row.id)
            .values(
                recording_held_at=now if held else None,
                recording_held_by=caller.principal if held else None,
                recording_held_reason=reason if held else None,
            )
        )
        self._record(tx, caller, row, operation, reason)

    def _path(self, identifier: str) -> Path:
        return self.place / f"{identifier}.sawrec"

    def _awaits(self, caller: Caller, identifier: str) -> bool:
        with self._s.store.read() as connection:
            row = own_session(connection, caller, identifier)
        if row.recording_stored_at is not None or row.recording_removed_at is not None:
            return False
        if row.recording_digest is None:
            raise ConflictError(
                f"{identifier} has no recording that is finished",
                cure="report the end of the session first",
                code="session_not_recorded",
            )
        return True

    async def _write(self, file: IO[bytes], body: AsyncIterator[bytes]) -> None:
        size, most = 0, self._rules.max_recording_bytes
        async for piece in body:
            size += len(piece)
            if size > most:
                raise TooLargeError(
                    f"the recording exceeds {most} bytes", cure="raise sessions.max_recording_bytes at the broker"
                )
            await run_in_threadpool(file.write, piece)
        await run_in_threadpool(_flush, file)

    def _keep(self, caller: Caller, identifier: str, incoming: Path) -> None:
        """Give ``incoming`` its name once it is what was announced."""
        try:
            # One that ended with a full disk has a part of a chunk behind its end.
            found = digest_of(incoming, identifier, unfinished=True)
        except RecordingBroken as error:
            found = error.message
        with self._s.store.write() as tx:
            row = own_session(tx.connection, caller, identifier)
            right = found == row.recording_digest
            if right:
                _link(incoming, self._path(identifier))
                tx.connection.execute(
                    sessions.update()
                    .where(sessions.c.id == identifier)
                    .values(recording_stored_at=iso(self._s.clock()))
                )
            self._record(tx, caller, row, "session.recording.store", "" if right else found, right=right)
        if not right:
            raise ConflictError(
                f"this is not the recording of {identifier} that was announced",
                cure="the audit trail has its digest; look at the bastion",
                code="recording_differs",
                details={"announced": row.recording_digest, "found": found},
            )

    def _record(
        self, tx: Transaction, caller: Caller, row: Row[Any], operation: str, why: str, *, right: bool = True
    ) -> None:
        tx.record(
            self._s.events.api_activity(
                self._s.clock(),
                caller.subject(row.workspace_id),
                operation,
                activity=_ACTIVITIES[operation],
                outcome="success" if right else "failure",
                resource=("session", row.id),
                status_detail=why,
                detail={"session": row.id, "recording_sha256": row.recording_digest or ""},
            )
        )


def _remove_abandoned(part: Path) -> None:
    """Remove what came in for a broker that was killed; another replica's is locked by it."""
    with suppress(OSError), part.open("rb") as file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _link(incoming: Path, path: Path) -> None:
    """Give a file its lasting name; a name left by a broker that was killed before it had noted it is taken over."""
    path.unlink(missing_ok=True)
    os.link(incoming, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
