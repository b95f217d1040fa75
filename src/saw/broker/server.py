"""Runs the broker: one process, one event loop, a TLS listener and the operator socket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import uvicorn
import uvloop

from saw.broker.apps import audit_app, operator_app, operator_gid, public_app, worker_app
from saw.broker.clock import Clock, utc_now
from saw.broker.config import BrokerConfig
from saw.broker.core import Broker
from saw.broker.notify import notify
from saw.broker.peer import PeerProtocol
from saw.broker.secret_place import SERVER
from saw.broker.setup import authority_certificate, renew_server_certificate, renew_signer
from saw.broker.sso.pages import pages_app
from saw.errors import ConfigError, SawError, UnavailableError
from saw.ports import listen_tcp, require_own_socket
from saw.secrets.tls import load_cert_chain

logger = logging.getLogger("saw.broker")

#: How often certificates and the TUF timestamp are looked at.
UPKEEP = timedelta(minutes=1)
GRACE_S = 3
MAX_MESSAGE = 64 * 1024
"""Most bytes of one message of a WebSocket; more ends it."""


class _Server(uvicorn.Server):
    """A server whose signals are handled once for all servers of the process."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(config: BrokerConfig, clock: Clock = utc_now, ready: Callable[[int], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT. ``ready`` is called with the TLS port once both sides listen."""
    broker = Broker.open(config, clock, secrets.token_bytes)
    try:
        uvloop.run(_serve(broker, clock, ready))
    finally:
        broker.close()


async def _serve(broker: Broker, clock: Clock, ready: Callable[[int], None] | None) -> None:
    config = broker.config
    context = tls_context(broker, clock)
    host, port = config.listen.host, config.listen.port
    tls_socket = listen_tcp("the broker", host, port, backlog=512, setting="broker_listen_port")
    operator_socket = listen_unix(Path(config.operator_socket), operator_gid(config.operator_group))
    public = _Server(_uvicorn_config(public_app(broker), context))
    operator = _Server(_uvicorn_config(operator_app(broker), None))
    serving = [(public, tls_socket), (operator, operator_socket)]
    if config.audit_socket is not None:
        audit_socket = listen_unix(Path(config.audit_socket), operator_gid(config.audit_group), "audit_socket")
        serving.append((_Server(_uvicorn_config(audit_app(broker), None)), audit_socket))
    if config.jobs is not None and config.jobs.worker_socket is not None:
        worker_socket = listen_unix(
            Path(config.jobs.worker_socket), operator_gid(config.jobs.worker_group), "jobs.worker_socket"
        )
        serving.append((_Server(_uvicorn_config(worker_app(broker), None)), worker_socket))
    pages = pages_context(broker)
    if broker.sso is not None and pages is not None:
        listen = broker.sso.settings.listen
        place = listen_tcp("the broker's pages", listen.host, listen.port, backlog=512, setting="broker_sso.listen")
        app = pages_app(broker.sso, broker)
        sockets = config.terminal is not None and config.terminal.bastion is not None
        serving.append((_Server(_uvicorn_config(app, pages, sockets=sockets)), place))
    servers = [server for server, _ in serving]

    def stop() -> None:
        broker.waker.close()
        for server in servers:
            server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    upkeep = asyncio.create_task(_upkeep(broker, context, pages, clock))
    courier = asyncio.create_task(broker.courier.run())
    tasks = [asyncio.create_task(server.serve(sockets=[place])) for server, place in serving]
    try:
        while not all(server.started for server in servers):
            if any(task.done() for task in tasks):
                break
            await asyncio.sleep(0.005)  # uvicorn offers no event for "started"
        else:
            port = int(tls_socket.getsockname()[1])
            logger.info("serving on port %d and %s", port, config.operator_socket)
            notify(f"READY=1\nSTATUS=serving on port {port}", os.environ.get("NOTIFY_SOCKET"))
            if ready is not None:
                ready(port)
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        stop()
        await asyncio.gather(*tasks)
    finally:
        upkeep.cancel()
        courier.cancel()
        await asyncio.gather(courier, return_exceptions=True)
        worker_path = None if config.jobs is None else config.jobs.worker_socket
        for path in filter(None, (config.operator_socket, config.audit_socket, worker_path)):
            _remove(Path(path))


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def tls_context(broker: Broker, clock: Clock) -> ssl.SSLContext:
    """Return the TLS side's context: our server certificate, TLS 1.2 or later, client certificates of our CA welcome."""
    secrets = broker.services.secrets
    renew_server_certificate(broker.config, secrets, broker.authority, clock())
    renew_signer(secrets, broker.authority, clock())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_cert_chain(context, secrets.read(SERVER))
    context.load_verify_locations(authority_certificate(broker.config))
    context.verify_mode = ssl.CERT_OPTIONAL
    return context


def pages_context(broker: Broker) -> ssl.SSLContext | None:
    """Return the TLS context of the pages, None without single sign-on. Browsers are asked for no client certificate."""
    if broker.sso is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    load_pages_certificate(broker, context)
    return context


def load_pages_certificate(broker: Broker, context: ssl.SSLContext) -> None:
    """Load the certificate of the pages as its files are now; raise :class:`ConfigError` when they cannot be used.

    They are tried on a context of their own first, so that files that do not fit leave the old certificate in use.
    """
    settings = broker.config.sso
    certificate, key = (None, None) if settings is None else (settings.certificate_file, settings.key_file)
    try:
        for one in (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), context):
            if certificate is None:
                load_cert_chain(one, broker.services.secrets.read(SERVER))
            else:
                one.load_cert_chain(certificate, key)
    except OSError as error:
        raise ConfigError(
            f"the certificate of the pages cannot be used: {error.strerror or error}",
            cure="check sso.certificate_file and sso.key_file",
        ) from error


def listen_unix(path: Path, group: int | None, setting: str = "operator_socket") -> socket.socket:
    """Return a listening Unix socket at ``path``, mode 0660; a socket left by a dead process is replaced, a live one refused."""
    require_own_socket("the broker", path, f"{setting} in /etc/saw/broker.json")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise UnavailableError(f"{path} exists and is no socket", cure="remove it")
        path.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    old = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        raise UnavailableError(f"cannot listen on {path}: {error.strerror}", cure="create its directory") from error
    finally:
        os.umask(old)
    if group is not None:
        try:
            os.chown(path, -1, group)
        except PermissionError:
            logger.warning("cannot give %s to group %d: only root can use it; add the group to the unit", path, group)
    listener.listen(128)
    listener.setblocking(False)
    return listener


def _uvicorn_config(app: object, context: ssl.SSLContext | None, *, sockets: bool = False) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=PeerProtocol,
        ws="wsproto" if sockets else "none",
        ws_max_size=MAX_MESSAGE,
        # What is small when it comes must not be large when it is read.
        ws_per_message_deflate=False,
        ws_ping_interval=20,
        ws_ping_timeout=20,
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=4096,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=GRACE_S,
        ssl_context_factory=None if context is None else lambda _config, _default: context,
    )


async def _upkeep(broker: Broker, context: ssl.SSLContext, pages: ssl.SSLContext | None, clock: Clock) -> None:
    """Keep the server certificate and the TUF timestamp fresh; a failure is logged and tried again."""
    while True:
        try:
            await asyncio.to_thread(upkeep_once, broker, context, clock, pages)
        except Exception:
            logger.exception("upkeep failed; trying again in %s", UPKEEP)
        await asyncio.sleep(UPKEEP.total_seconds())


def upkeep_once(broker: Broker, context: ssl.SSLContext, clock: Clock, pages: ssl.SSLContext | None = None) -> None:
    """Renew what ends soon (new handshakes use a new certificate at once), judge rollouts and reviews by the time that passed.

    Of several replicas one does so; the others take the certificate that it renewed.
    """
    try:
        _renew(broker, context, clock)
    except SawError as error:  # their place is away; there are days left, and all else goes on
        logger.warning("certificates cannot be renewed: %s; trying again in %s", error, UPKEEP)
    broker.services.store.set_room_aside()
    broker.releases.catch_up()  # of what this one took in, whichever of them does the rest
    if broker.upkeep.mine:
        broker.repository.refresh(clock())
        broker.rollouts.tick()
        broker.reviews.tick()
        broker.jobs.tick()
        broker.forwards.tick()
        broker.sessions.tick()
        broker.recordings.tick()
        broker.retention.catch_up()
        broker.resource_retention.tick()
        broker.notifications.tick()
        broker.policy_requests.tick()
        if broker.sso is not None:
            broker.sso.sessions.tick()
    if pages is not None:
        load_pages_certificate(broker, pages)


def _renew(broker: Broker, context: ssl.SSLContext, clock: Clock) -> None:
    """Renew what ends soon, or take what another replica has renewed."""
    secrets, signer = broker.services.secrets, broker.services.signer
    if not broker.upkeep.mine:
        load_cert_chain(context, secrets.read(SERVER))
        signer.look_again()
        return
    if renew_server_certificate(broker.config, secrets, broker.authority, clock()):
        load_cert_chain(context, secrets.read(SERVER))
        logger.info("server certificate renewed")
    if renew_signer(secrets, broker.authority, clock()):
        signer.look_again()
        logger.info("signer of statements renewed")
