"""Has a call of a model service kept where its route says so, before it leaves, and its answer while it streams by."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import TypeVar

import msgspec

from saw.audit.events import EventFactory, Subject
from saw.gateway.record_filter import ID_HEADER, PIECE_HEADER, PIECES_HEADER, STATUS_HEADER
from saw.gateway.records import Facts, Listed, RecordStore, RecordUnavailable, Whole
from saw.gateway.spool import Spool
from saw.gateway.state import WorkspaceEntry
from saw.policy.governance import InferenceRoute
from saw.policy.inference import requested_model
from saw.policy.model import Decision, Request

T = TypeVar("T")
LOG = logging.getLogger("saw.gateway")
WAITING = 32 * 1024 * 1024
"""Most bytes of answers that wait to be written; what comes beyond is not kept, and its answer is cut."""
EVERY_S = 60.0
"""How often records are looked through for those that were kept long enough (seconds)."""


class Told(msgspec.Struct, frozen=True, kw_only=True):
    """What ring 2's Envoy tells of an answer: one piece of it, or (``piece`` below 0) in how many it came."""

    record: str
    piece: int
    pieces: int
    status: int
    text: bytes


class Recorder:
    """Keeps calls in ``store``. ``new_id`` makes up the name of each record; no part of a call has a say in it."""

    def __init__(
        self,
        store: RecordStore,
        spool: Spool,
        factory: EventFactory,
        *,
        now: Callable[[], datetime],
        new_id: Callable[[], str],
    ) -> None:
        self._store = store
        self._spool = spool
        self._factory = factory
        self._now = now
        self._new_id = new_id
        # Threads of their own: what is copied must not hold up ledger, names and state, which every call needs.
        self._threads = ThreadPoolExecutor(2, "saw-records")
        self._waiting = 0

    async def _apart(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """Write what waits."""
        self._threads.shutdown()

    async def keep(
        self,
        request: Request,
        decision: Decision,
        route: InferenceRoute,
        entry: WorkspaceEntry,
        *,
        policy_digest: str,
        delegation: str,
        review: str,
        request_id: str,
    ) -> str:
        """Write what the route says of an allowed call; return the record's id. Raises :class:`RecordUnavailable`.

        Only the body is kept of what was sent, as the workspace sent it: no header, and so no credential.
        """
        wanted = route.record
        if wanted is None:
            raise RecordUnavailable("nothing is to be kept of this call")
        record, now, body = self._new_id(), self._now(), request.body or b""
        facts = Facts(
            time=now.isoformat(timespec="milliseconds"),
            workspace=entry.id,
            sponsor=entry.sponsor,
            agent=entry.agent or "",
            delegation=delegation,
            review=review,
            policy_digest=policy_digest,
            request_id=request_id[:256],
            route=f"{route.alias}:{route.port}",
            service=route.upstream,
            path=decision.canonical_path[:2048],
            model=requested_model(body, complete=request.body_complete)[:256],
            model_sent=decision.model[:256],
            data_classes=decision.data_classes,
            content=wanted.content,
            size=len(body),
        )
        at = now.timestamp()
        await asyncio.to_thread(
            self._store.keep,
            record,
            at,
            at + wanted.keep_s,
            facts,
            None if wanted.content == "metadata" else body,
            answer=wanted.content == "prompts-and-responses",
        )
        return record

    async def forget(self, record: str) -> None:
        """Remove the record of a call that is certainly not sent."""
        await asyncio.to_thread(self._store.forget, record)

    async def take(self, told: Told) -> bool:
        """Keep what Envoy tells of an answer; return whether it is on disk."""
        if told.piece < 0:
            await self._apart(lambda: self._store.end(told.record, told.pieces, told.status))
            return True
        if self._waiting + len(told.text) > WAITING:
            raise RecordUnavailable(
                "more of answers waits to be written than may", cure="a faster disk, or less to keep"
            )
        self._waiting += len(told.text)
        try:
            came = self._now().timestamp()
            return await self._apart(lambda: self._store.add(told.record, told.piece, told.text, came))
        finally:
            self._waiting -= len(told.text)

    async def listed(self, reader: str, *, workspace: str, before: float | None, limit: int) -> list[Listed]:
        """Return records for ``reader``, a user of this host, once the reading is in the audit trail."""
        await self._read(reader, "list", {"workspace": workspace, "limit": limit})
        return await asyncio.to_thread(self._store.listed, workspace=workspace, before=before, limit=limit)

    async def read(self, reader: str, record: str) -> Whole:
        """Return what was said in a record, once the reading is in the audit trail."""
        await self._read(reader, record[:64], {})
        return await asyncio.to_thread(self._store.read, record)

    async def _read(self, reader: str, what: str, detail: dict[str, object]) -> None:
        await self._spool.record(
            self._factory.api_activity(
                self._now(),
                Subject(principal=f"local:{reader}"),
                "inference.record.read",
                activity="read",
                message=f"{reader} reads what is kept of calls of models",
                resource=("inference_record", what),
                detail={"layer": "ring2", **detail},
            )
        )


async def purge_forever(purge: Callable[[float], int], now: Callable[[], datetime]) -> None:
    """Remove what was kept long enough by ``purge``, which is told the time, until cancelled."""
    while True:
        try:
            gone = await asyncio.to_thread(purge, now().timestamp())
            if gone:
                LOG.info("%d records of calls were kept long enough and are removed", gone)
        except RecordUnavailable as error:
            LOG.error("records of calls cannot be removed: %s", error.message)  # noqa: TRY400 - the message says it
        await asyncio.sleep(EVERY_S)


def read_told(headers: Iterable[tuple[bytes, bytes]], body: bytes) -> Told:
    """Return what Envoy's filter tells in a request."""
    values = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
    return Told(
        record=values.get(ID_HEADER, ""),
        piece=_number(values.get(PIECE_HEADER, ""), -1),
        pieces=_number(values.get(PIECES_HEADER, ""), 0),
        status=_number(values.get(STATUS_HEADER, ""), 0),
        text=body,
    )


def _number(text: str, otherwise: int) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else otherwise
