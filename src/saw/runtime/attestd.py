"""The attestation agent as a service: a Unix socket for policyd, and a loop that keeps the identity fresh.

Protocol: one JSON object per line. ``{"op": "measure", "policy_digest": hex, "revision": n}`` records a loaded policy and
attests at once; ``{"op": "status"}`` tells the present state. The answer is ``{"ok": true, "lease": {…}, "policy_digest": …}``
or ``{"ok": false, "failures": [{code, component, detail}]}``.
"""

from __future__ import annotations

import logging
import os
import signal
import socketserver
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import msgspec

from saw import jsontext
from saw.attest.messages import Digest, RefusalFailure
from saw.attest.tpm import Tpm
from saw.files import load_json
from saw.runtime.attestd_agent import Agent, Clock, Outcome
from saw.runtime.attestd_broker import BrokerClient
from saw.runtime.attestd_config import AttestdConfig, WorkspaceIdentity
from saw.runtime.notify import notify

log = logging.getLogger("saw.attestd")

MAX_LINE = 4096
IDLE_SECONDS = 30.0


class Measure(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="measure"):
    """Record a loaded policy."""

    policy_digest: Digest
    revision: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Status(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="op", tag="status"):
    """Ask for the present state."""


SYSTEM_CLOCK = Clock(now=lambda: datetime.now(UTC), boottime=lambda: time.clock_gettime(time.CLOCK_BOOTTIME))


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 16

    def __init__(self, path: Path, agent: Agent, wake: threading.Event) -> None:
        self.agent = agent
        self.wake = wake
        path.unlink(missing_ok=True)
        super().__init__(str(path), _Handler, bind_and_activate=False)
        # The socket is private from its first moment; root alone may measure.
        previous = os.umask(0o177)
        try:
            self.server_bind()
        finally:
            os.umask(previous)
        self.server_activate()


class _Handler(socketserver.StreamRequestHandler):
    timeout = IDLE_SECONDS
    server: _Server

    def handle(self) -> None:
        try:
            while line := self.rfile.readline(MAX_LINE + 1):
                self.wfile.write(msgspec.json.encode(self._answer(line)) + b"\n")
                if len(line) > MAX_LINE:
                    return
        except OSError:
            return  # the peer went away or stayed silent

    def _answer(self, line: bytes) -> Outcome:
        try:
            if len(line) > MAX_LINE:
                raise msgspec.DecodeError(f"a line may have {MAX_LINE} bytes")
            request = jsontext.decode(line, Measure | Status)
        except msgspec.DecodeError as error:
            return Outcome(ok=False, failures=(RefusalFailure("request_malformed", "attestd", str(error)),))
        if isinstance(request, Status):
            return self.server.agent.status()
        outcome = self.server.agent.measure(request.policy_digest, request.revision)
        self.server.wake.set()
        return outcome


class Service:
    """The running agent; :meth:`run` serves until :meth:`stop`."""

    def __init__(self, config: AttestdConfig, clock: Clock = SYSTEM_CLOCK) -> None:
        self._config = config
        self._clock = clock
        self._wake = threading.Event()
        self._stopped = threading.Event()
        self.ready = threading.Event()

    def stop(self) -> None:
        """Ask the service to end; it does so after the operation under way."""
        self._stopped.set()
        self._wake.set()

    def run(self) -> None:
        """Serve. Raises :class:`saw.errors.SawError` when configuration, TPM or files are not usable at the start."""
        config = self._config
        workspace = load_json(config.run / "workspace.json", WorkspaceIdentity)
        directory = config.socket.parent
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        tpm = Tpm(directory / "tpm", config.tcti)
        ca_file = config.run / "ca.pem"
        url = config.broker_url or workspace.broker_url
        with BrokerClient(url, workspace.broker_name, ca_file, config.broker_timeout_seconds) as broker:
            agent = Agent(config, workspace, tpm=tpm, broker=broker, clock=self._clock)
            agent.start()
            with _Server(config.socket, agent, self._wake) as server:
                thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
                thread.start()
                self.ready.set()
                notify("READY=1")
                try:
                    self._loop(agent)
                finally:
                    notify("STOPPING=1")
                    server.shutdown()
                    thread.join()
                    config.socket.unlink(missing_ok=True)

    def _loop(self, agent: Agent) -> None:
        previous: Outcome | None = None
        while not self._stopped.is_set():
            self._wake.clear()
            wait = agent.step()
            state = agent.status()
            if previous is None or (state.ok, state.failures) != (previous.ok, previous.failures):
                log.info(
                    "attested=%s failures=%s",
                    state.ok,
                    [f"{failure.component}/{failure.code}: {failure.detail}" for failure in state.failures],
                )
                previous = state
            if not self._stopped.is_set():
                self._wake.wait(wait)


def serve(config: AttestdConfig) -> None:
    """Run the service until SIGTERM or SIGINT."""
    service = Service(config)
    # A handler that sets an event could meet the main thread inside that event's lock; a waiting thread cannot.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)

    def wait_for_end() -> None:
        signal.sigwait(signals)
        service.stop()

    threading.Thread(target=wait_for_end, daemon=True).start()
    service.run()
