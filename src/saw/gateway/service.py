"""saw-gatekeeper as a process: the authorisation socket, the broker link and Envoy's files, put together."""

from __future__ import annotations

import asyncio
import contextlib
import grp
import logging
import os
import socket
import time
import uuid
from collections.abc import AsyncIterator, Collection, Iterator
from functools import partial
from pathlib import Path

import uvicorn

from saw import addressing
from saw.audit.events import EventFactory
from saw.budget.ledger import Ledger
from saw.errors import ConfigError
from saw.gateway.app import AuthorizationApp
from saw.gateway.clock import Clock
from saw.gateway.config import GatekeeperConfig
from saw.gateway.contact import Contact
from saw.gateway.credential_sources import VaultSource
from saw.gateway.credentials import CredentialStore
from saw.gateway.definitions import KeptDefinitions
from saw.gateway.judge import Judge, Verdict
from saw.gateway.link import BrokerLink
from saw.gateway.mcp_relay import McpRelay
from saw.gateway.metering import Meter
from saw.gateway.notify import notify
from saw.gateway.oauth2 import HttpsTokenEndpoint, TokenKeeper
from saw.gateway.peer import PeerReader
from saw.gateway.pg_sessions import PostgresSessions
from saw.gateway.ports import conflicts
from saw.gateway.pulse import Pulse
from saw.gateway.readable import may_read
from saw.gateway.record_desk import LONGEST_QUESTION, RecordDesk
from saw.gateway.recording import Recorder, purge_forever
from saw.gateway.records import RecordStore, load_key, purge_file
from saw.gateway.releases import TrustRoot
from saw.gateway.replicas import LEAD_EVERY_S, Lead, named, one_at_a_time
from saw.gateway.resolve import Resolver
from saw.gateway.review_link import ReviewLink
from saw.gateway.review_send import Sender
from saw.gateway.reviews import ReviewApp
from saw.gateway.spool import Spool
from saw.gateway.state import StateFile
from saw.gateway.streams import Standing, standing_streams
from saw.gateway.tickets import Tickets
from saw.gateway.view import EMPTY, View, ViewKeeper, offline_granted
from saw.gateway.xds import XdsWriter
from saw.ports import require_own_socket

LOG = logging.getLogger("saw.gateway")

LEDGER_PATIENCE_S = 5.0
"""How long a charge waits for changes of other replicas (seconds). Envoy's filter tells the end of a call three times: one
replica that was stopped in a change is ended by its watchdog meanwhile (``saw-gatekeeper@.service``)."""
EVERY_S = 1.0
"""How often what lapses with time is looked for, and the service manager is told that this process runs (seconds)."""
TOKEN_STEP_S = 3.0
"""Time for each step of fetching an access token (seconds)."""


def listen(path: Path, group: str, setting: str = "authz_socket") -> socket.socket:
    """Return a listening Unix socket at ``path`` that only this user and ``group`` can connect to (0660).

    Another gatekeeper that listens there is left alone: :class:`saw.ports.TakenError`. ``setting`` names the path.
    """
    require_own_socket("the gatekeeper", path, f"{setting} in /etc/saw/gatekeeper.json")
    path.unlink(missing_ok=True)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o117)
    try:
        server.bind(str(path))
    except OSError as error:
        server.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror}", cure="create its folder") from error
    finally:
        os.umask(mask)
    if group:
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except (KeyError, OSError) as error:
            server.close()
            raise ConfigError(f"cannot give {path} to group {group}", cure="add this user to the group") from error
    server.listen(1024)
    return server


class _Server(uvicorn.Server):
    """Says that it is ready once it accepts checks."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        notify("READY=1")


class _Quiet(uvicorn.Server):
    """A second server of the process: signals are the first one's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Gatekeeper:
    """All parts of one gatekeeper, of which a perimeter host runs one or several; ``run`` serves until it is told to stop."""

    def __init__(self, config: GatekeeperConfig, replica: int = 1) -> None:
        self._config = config
        self._replica = replica
        self._sockets = sockets = config.sockets(replica)
        config.state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lead = Lead(config.state_dir)
        self._file = file = StateFile(config.state_dir)
        cache = file.load()
        saved_at = cache.saved_at if cache else None
        contact = Contact(config.state_dir, config.stale_after_s, saved_at, replica)
        not_before = contact.not_before.timestamp() if contact.not_before else 0.0
        clock = Clock(time.time, time.monotonic, config.clock_bound_s, not_before=not_before)
        ca_pem = config.ca_file.read_bytes()
        self._keeper = ViewKeeper(
            TrustRoot.load(config.tuf_root_file),
            clock,
            file,
            time.monotonic,
            config.stale_after_s,
            ca_pem=ca_pem,
            contact=contact,
        )
        self._xds = XdsWriter(config)
        self._keeper.changed = self._publish
        # Later than the lock is held: first it has to know what the one before knew.
        self._leads = False
        self._keeper.keeps = lambda: self._leads
        self._written = False
        self._published: tuple[tuple[int, ...], frozenset[str], tuple[tuple[int, Standing], ...]] | None = None
        self._unwritten = ""
        self._pulse = Pulse(time.monotonic)
        self._clock = clock
        with one_at_a_time(config.state_dir):
            self._spool = Spool(config.state_dir, config.name, config.spool_limit)
            self._ledger = Ledger(
                config.state_dir / "budget.db", life_s=config.reservation_s, patience_s=LEDGER_PATIENCE_S
            )
            self._definitions = KeptDefinitions(config.state_dir / "definitions.db", clock.now)
        self._link = BrokerLink(config, self._keeper, self._spool)
        factory = EventFactory("saw-gatekeeper", host=config.name, new_uid=lambda: str(uuid.uuid4()))
        self._meter = Meter(self._ledger, self._spool, factory, now=clock.now, new_id=lambda: str(uuid.uuid4()))
        resolver = Resolver(config.resolver, time.monotonic, own=addressing.networks(config.numbers))
        self._vault = VaultSource(config.vault, time.monotonic) if config.vault is not None else None

        async def address_of(host: str) -> str:
            """Return where a token endpoint that policy names is dialled."""
            return await resolver.chosen(host, exact=True, allowed=())

        endpoint = HttpsTokenEndpoint(str(config.ring2.upstream_ca_file), TOKEN_STEP_S, address_of)
        self._recorder, self._records = self._keeping(factory)
        judge = Judge(
            view=lambda: self._keeper.view,
            doubt=self._keeper.doubt,
            offline=self._keeper.offline_s,
            now=clock.now,
            peers=PeerReader(ca_pem),
            resolver=resolver,
            credentials=CredentialStore(
                config.credentials_dir,
                vault=self._vault,
                tokens=TokenKeeper(endpoint, time.monotonic, several=config.replicas > 1),
            ),
            release_grace_s=config.release_grace_s,
            reviews=config.review_socket is not None,
            meter=self._meter,
            definitions=self._definitions,
            recorder=self._recorder,
        )
        relayed, sending = Tickets[Verdict](time.monotonic), Tickets[Verdict](time.monotonic)
        self._relay = McpRelay(judge.rules, relayed, sending, self._spool, factory, socket=sockets.send, now=clock.now)
        opening = Tickets[Verdict](time.monotonic)
        self._sessions = PostgresSessions(
            opening, self._spool, factory, ca_file=config.ring2.upstream_ca_file, now=clock.now, told=self._told
        )
        self._reviews: ReviewApp | None = None
        self._sender: Sender | None = None
        self._review_link = ReviewLink(config)
        waiting = None if sockets.review is None else Tickets[Verdict](time.monotonic)
        self._app = AuthorizationApp(
            judge,
            self._spool,
            factory,
            waiting=waiting,
            sending=sending,
            relayed=relayed,
            sessions=opening,
            meter=self._meter,
            recorder=self._recorder,
            services=lambda service: named(service, replica),
            health=self.health,
            stood_still=self._pulse.stood_still,
        )
        if waiting is None:
            return
        self._reviews = ReviewApp(
            waiting,
            self._review_link,
            self._spool,
            factory,
            credential_headers=self._keeper.credential_headers,
            now=clock.now,
            may_read=lambda verdict, question: may_read(
                self._keeper.view, clock.now(), config.release_grace_s, verdict, question
            ),
        )
        self._sender = Sender(
            judge,
            self._review_link,
            self._spool,
            factory,
            sending,
            socket=sockets.send,
            doubt=self._keeper.doubt,
            now=clock.now,
            wait_s=config.poll_wait_s,
        )

    def _keeping(self, factory: EventFactory) -> tuple[Recorder | None, RecordStore | None]:
        """Return what keeps calls of models and where, or nothing where the configuration names no place."""
        wanted = self._config.records
        if wanted is None:
            return None, None
        path, key = self._config.state_dir / "records.db", load_key(wanted.key_file)
        try:
            with one_at_a_time(self._config.state_dir):
                store = RecordStore(path, key, wanted.limit_mib * 1024 * 1024)
        except ConfigError as error:  # calls that must be kept are refused; all others, and kills, do not depend on it
            LOG.critical("calls cannot be kept: %s", error.message)
            return None, None
        recorder = Recorder(store, self._spool, factory, now=self._clock.now, new_id=lambda: str(uuid.uuid4()))
        return recorder, store

    def health(self) -> dict[str, object]:
        """Return how this replica is: ``doubt`` says why it refuses every call, empty where it decides."""
        view = self._keeper.view
        return {
            "replica": self._replica,
            "leads": self._leads,
            "pid": os.getpid(),
            "state": view.seq,
            "workspaces": len(view.workspaces),
            "doubt": self._keeper.doubt(self._offline_s()),
        }

    def _offline_s(self) -> float:
        """Return the longest time offline that counts for any workspace now: while there is one, calls are decided."""
        view, now = self._keeper.view, self._clock.now()
        granted = {offline_granted(view, name, entry.policy_digest or "") for name, entry in view.workspaces.items()}
        return max((self._keeper.offline_s(seconds, now) for seconds in granted if seconds), default=0.0)

    def _publish(self, view: View) -> None:
        """Have Envoy's files follow ``view``, where this replica leads; the others only know what they would write."""
        streams = self._streams(view)
        numbers = tuple(number for number in view.open_numbers() if number in self._config.numbers)
        wanted = (numbers, view.credential_headers(), tuple(sorted(streams.items())))
        leads = self._leads
        if wanted == self._published and (self._written or not leads):
            return
        if not leads:
            self._published, self._written = wanted, False
            return
        if self._published is not None and self._written:
            added = sorted(set(wanted[0]) - set(self._published[0]))
            for place, holder in conflicts(self._config, added).items():
                LOG.error(
                    "ring 2 cannot listen on %s: %s listens there; stop it and restart saw-ring2 (`ss -ltnp` as root names it)",
                    place,
                    holder,
                )
        try:
            written = self._xds.write(wanted[0], wanted[1], streams)
        except OSError as error:
            if str(error) != self._unwritten:
                LOG.critical("Envoy's files in %s cannot be written: %s", self._config.ring2.xds_dir, error)
            self._unwritten = str(error)
            return
        self._published, self._written, self._unwritten = wanted, True, ""
        if written:
            LOG.info("wrote %s for %d workspaces", ", ".join(written), len(wanted[0]))

    def _told(self, number: int) -> object:
        """Return what Envoy's listener for a workspace was made of last: where that changes, Envoy ends what is open."""
        numbers, names, streams = self._published or ((), frozenset(), ())
        return (names, dict(streams).get(number)) if number in numbers else None

    def _streams(self, view: View) -> dict[int, Standing]:
        return standing_streams(
            view,
            self._clock.now(),
            doubt=self._keeper.doubt,
            offline=self._keeper.offline_s,
            release_grace_s=self._config.release_grace_s,
        )

    async def _leading(self) -> None:
        """Wait for the lead, take over what its holder knew, and then do what only one replica may do, until cancelled."""
        if not self._lead.held:
            while not await asyncio.to_thread(self._lead.take):  # noqa: ASYNC110 - another process has it
                await asyncio.sleep(LEAD_EVERY_S)
            LOG.info("replica %d leads now", self._replica)
            known = await asyncio.to_thread(self._file.load)
            self._leads = True
            await self._keeper.succeed(known)
        async with asyncio.TaskGroup() as group:
            group.create_task(self._link.ship_forever(), name="ship")
            group.create_task(self._meter.run_forever(), name="charges")
            # Also what was kept while that was asked for.
            file = partial(purge_file, self._config.state_dir / "records.db")
            purge = file if self._records is None else self._records.purge
            group.create_task(purge_forever(purge, self._clock.now), name="records")
            group.create_task(self._definitions.purge_forever(self._workspaces), name="definitions")
            if self._sender is not None:
                group.create_task(self._sender.run_forever(), name="send")

    def _workspaces(self) -> Collection[str] | None:
        """Return the workspaces that there are, None while that is in doubt."""
        return None if self._keeper.doubt(0.0) else self._keeper.view.workspaces.keys()

    async def _watch_streams(self) -> None:
        """Have what lapses with time alone (leases, delegations, silence) end WebSockets and gRPC calls, within a second."""
        while True:
            await asyncio.sleep(EVERY_S)
            notify("WATCHDOG=1")
            if self._keeper.view is not EMPTY:  # also what could not be written the first time
                self._publish(self._keeper.view)

    @contextlib.asynccontextmanager
    async def _linked(self) -> AsyncIterator[None]:
        self._leads = await asyncio.to_thread(self._lead.take)
        # Behind the lock: until then another one may have saved more.
        cache = await asyncio.to_thread(self._file.load)
        if cache is not None:
            await self._keeper.restore(cache)
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._link.poll_forever(), name="poll"),
                group.create_task(self._watch_streams(), name="streams"),
                group.create_task(self._leading(), name="lead"),
                group.create_task(self._pulse.run_forever(), name="pulse"),
                group.create_task(self._definitions.run_forever(), name="definitions"),
            ]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
        await self._link.close()
        await self._review_link.close()

    async def run(self) -> None:
        """Serve until a signal (TERM, INT) ends it; then write what is queued and go."""
        server = _Server(_served(self._app))
        listener = listen(self._sockets.authz, self._config.authz_group)
        try:
            async with self._linked(), self._serving():
                await server.serve(sockets=[listener])
        finally:
            listener.close()
            self._sockets.authz.unlink(missing_ok=True)
            self._spool.close()
            self._ledger.close()
            self._definitions.close()
            if self._recorder is not None:
                self._recorder.close()
            if self._records is not None:
                self._records.close()
            self._lead.close()
            if self._vault is not None:
                self._vault.close()

    @contextlib.asynccontextmanager
    async def _serving(self) -> AsyncIterator[None]:
        """Serve the sockets of the other services for as long as the authorisation socket is served."""
        async with contextlib.AsyncExitStack() as stack:
            await stack.enter_async_context(self._beside(self._relay, self._sockets.mcp, "authz_socket"))
            await stack.enter_async_context(self._open_sessions())
            await stack.enter_async_context(self._open_desk())
            if self._sockets.review is not None and self._reviews is not None:
                await stack.enter_async_context(self._beside(self._reviews, self._sockets.review, "review_socket"))
            yield

    @contextlib.asynccontextmanager
    async def _open_sessions(self) -> AsyncIterator[None]:
        """Take sessions of PostgreSQL; at the end those that are open are ended, and that is recorded."""
        path = self._sockets.postgres
        listener = listen(path, self._config.authz_group)
        server = await asyncio.start_unix_server(self._sessions.serve, sock=listener)
        try:
            yield
        finally:
            server.close()
            await self._sessions.close()
            path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _open_desk(self) -> AsyncIterator[None]:
        """Let auditors of this host read what is kept of calls."""
        wanted, path = self._config.records, self._sockets.records
        if self._recorder is None or wanted is None:
            yield
            return
        listener = listen(path, wanted.readers_group, "authz_socket")
        server = await asyncio.start_unix_server(
            RecordDesk(self._recorder).serve, sock=listener, limit=LONGEST_QUESTION
        )
        try:
            yield
        finally:
            server.close()
            path.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _beside(self, app: ReviewApp | McpRelay, path: Path, setting: str) -> AsyncIterator[None]:
        listener = listen(path, self._config.authz_group, setting)
        server = _Quiet(_served(app))
        serving = asyncio.create_task(server.serve(sockets=[listener]), name=path.stem)
        try:
            yield
        finally:
            server.should_exit = True
            await serving
            listener.close()
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - nothing is served any more


def _served(app: AuthorizationApp | ReviewApp | McpRelay) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        timeout_graceful_shutdown=3,
    )


def serve(config: GatekeeperConfig, replica: int = 1) -> int:
    """Run one gatekeeper on uvloop until it is told to stop; return the exit code."""
    import uvloop

    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s %(message)s")
    logging.getLogger("tuf").setLevel(logging.WARNING)  # it reports every absent third signature of 2-of-3
    logging.getLogger("httpx").setLevel(logging.WARNING)
    uvloop.run(Gatekeeper(config, replica).run())
    return 0
