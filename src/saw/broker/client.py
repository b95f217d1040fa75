"""The operator's client: HTTP over the broker's Unix socket, directly or through an SSH stream forwarding.

The context file says where the broker is; ``SAW_CONTEXT`` names it when no path is given. Without either, the socket of
this machine is used.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec

from saw.errors import SawError, UnavailableError
from saw.files import load_json

DEFAULT_SOCKET = "/run/saw/broker/operator.sock"
CONTEXT_VARIABLE = "SAW_CONTEXT"
FORWARD_TIMEOUT_S = 30


class SshJump(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How to reach the control host. ``key`` and ``known_hosts`` are paths; host keys are always checked."""

    host: str
    port: int = 22
    user: str = "root"
    key: str | None = None
    known_hosts: str | None = None


class BrokerContext(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The operator socket's path on the control host, and how to get there (None: it is on this machine)."""

    socket: str = DEFAULT_SOCKET
    ssh: SshJump | None = None


class Ingress(msgspec.Struct, frozen=True):
    """The perimeter host that passes SSH to workspaces: workspace number N is at ``base_port`` + N, user ``user``."""

    host: str = "127.0.0.1"
    base_port: int = 22000
    user: str = "agent"


class Context(msgspec.Struct, frozen=True):
    """The context file. Unknown fields are left to later commands."""

    broker: BrokerContext = BrokerContext()
    ingress: Ingress = Ingress()


class BrokerRefusal(SawError):
    """The broker refused a call; ``code``, message and cure are the broker's, ``status`` the HTTP status."""

    def __init__(self, status: int, body: Mapping[str, Any]) -> None:
        super().__init__(
            str(body.get("message") or f"the broker answered {status}"),
            cure=str(body.get("cure") or ""),
            details=body["details"] if isinstance(body.get("details"), dict) else None,
        )
        self.code = str(body.get("code") or "refused")
        self.status = status


def load_context(path: Path | str | None, environ: Mapping[str, str] = os.environ) -> Context:
    """Read the context from ``path``, else from the file that ``SAW_CONTEXT`` names, else use this machine's socket."""
    name = path or environ.get(CONTEXT_VARIABLE)
    return load_json(name, Context) if name else Context()


class OperatorClient:
    """Calls of the operator API. Each :meth:`request` opens and closes its own way to the broker; use :meth:`session`
    around several calls to share one."""

    def __init__(self, context: Context, *, timeout_s: float = 60.0) -> None:
        self.context = context
        self._timeout = timeout_s
        self._http: httpx.Client | None = None

    @classmethod
    def from_context(cls, path: Path | str | None = None) -> Self:
        """Return a client for the context file ``path`` (default: ``SAW_CONTEXT``, then this machine)."""
        return cls(load_context(path))

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call the broker and return its answer; raise :class:`BrokerRefusal` or :class:`UnavailableError`."""
        if self._http is None:
            with self.session():
                return self.request(method, path, json)
        content = None if json is None else msgspec.json.encode(json)
        headers = {"content-type": "application/json"} if content is not None else {}
        try:
            response = self._http.request(method, f"http://broker{path}", content=content, headers=headers)
        except httpx.HTTPError as error:
            raise UnavailableError(
                f"the broker does not answer: {error or type(error).__name__}",
                cure="check that saw-broker runs and the context",
            ) from error
        try:
            body = msgspec.json.decode(response.content)
        except msgspec.DecodeError as error:
            raise UnavailableError(
                f"the broker answered {response.status_code} without JSON", cure="see its log"
            ) from error
        if response.is_error or not isinstance(body, dict):
            raise BrokerRefusal(response.status_code, body if isinstance(body, dict) else {})
        return body

    @contextmanager
    def session(self) -> Iterator[Self]:
        """Keep one way to the broker open for several calls."""
        with _socket_path(self.context.broker) as path:
            transport = httpx.HTTPTransport(uds=path)
            with httpx.Client(transport=transport, timeout=self._timeout, trust_env=False) as http:
                self._http = http
                try:
                    yield self
                finally:
                    self._http = None


@contextmanager
def _socket_path(broker: BrokerContext) -> Iterator[str]:
    """Give the path of a local socket that leads to the broker; an SSH forwarding lives as long as the block."""
    if broker.ssh is None:
        yield broker.socket
        return
    with tempfile.TemporaryDirectory(prefix="saw-") as directory:
        local = Path(directory) / "operator.sock"
        process = subprocess.Popen(
            forward_command(broker.ssh, local, broker.socket),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        try:
            _await_forward(process, local)
            yield str(local)
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def forward_command(jump: SshJump, local: Path, remote: str) -> list[str]:
    """Return the ssh command that forwards ``local`` to the socket ``remote`` and runs nothing on the far side."""
    options = {
        "BatchMode": "yes",
        "ExitOnForwardFailure": "yes",
        "StreamLocalBindMask": "0177",
        "StrictHostKeyChecking": "yes",
        "ControlMaster": "no",
        "ControlPath": "none",
        "ConnectTimeout": "15",
        "ServerAliveInterval": "15",
    }
    if jump.known_hosts:
        options |= {"UserKnownHostsFile": jump.known_hosts, "GlobalKnownHostsFile": "/dev/null"}
    command = ["ssh", "-F", "/dev/null", "-N", "-T", "-p", str(jump.port), "-L", f"{local}:{remote}"]
    if jump.key:
        command += ["-i", jump.key, "-o", "IdentitiesOnly=yes"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    return [*command, "--", f"{jump.user}@{jump.host}"]


def _await_forward(process: subprocess.Popen[bytes], local: Path) -> None:
    """Wait until ssh has bound the local socket; raise :class:`UnavailableError` with ssh's own words when it gives up."""
    assert process.stderr is not None  # noqa: S101 - Popen was asked for a pipe
    deadline = time.monotonic() + FORWARD_TIMEOUT_S
    while not local.exists():
        if process.poll() is not None:
            words = process.stderr.read().decode(errors="replace").strip()[-500:]
            raise UnavailableError(
                f"ssh cannot reach the control host: {words}", cure="check broker.ssh in the context file"
            )
        if time.monotonic() > deadline:
            raise UnavailableError("ssh did not connect in time", cure="check broker.ssh in the context file")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
