"""The operator's client: HTTP over the broker's Unix socket, directly or through an SSH stream forwarding.

The context file says where the broker is; ``SAW_CONTEXT`` names it when no path is given. Without either, the socket of
this machine is used.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import urlencode

import httpx
import msgspec

from saw import jsontext
from saw.addressing import INGRESS_BASE, ingress
from saw.broker.lifecycle import State, check_step
from saw.broker.signed_in import signed_in_client
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
    """The operator socket's path on the control host, and how to get there (None: it is on this machine).

    ``sign_in``: not by the socket, but as whoever ``saw login`` signed in, as far as the roles go.
    """

    socket: str = DEFAULT_SOCKET
    ssh: SshJump | None = None
    sign_in: bool = False


class Ingress(msgspec.Struct, frozen=True):
    """The perimeter host that passes SSH to workspaces: workspace number N is at ``base_port`` + N, user ``user``.

    ``blocks``: hosts for numbers above 10,000, by the number of their block (:func:`saw.addressing.ingress`).
    """

    host: str = "127.0.0.1"
    base_port: int = INGRESS_BASE
    user: str = "agent"
    blocks: dict[str, str] = {}

    def of(self, number: int) -> tuple[str, int]:
        """Return host and port for workspace ``number``; raise :class:`ConfigError` where none is known."""
        return ingress(number, self.host, self.base_port, self.blocks)


class Bastion(msgspec.Struct, frozen=True):
    """The SSH server through which sessions go, each recorded. ``sign_in``: sessions are opened by whoever ``saw login`` signed
    in, not by the operator. ``source_address``: from where the bastion sees this machine, when that is known; the certificate
    then counts from there alone."""

    host: str
    port: int = 2222
    user: str = "saw-session"
    sign_in: bool = False
    source_address: str | None = None


class TokenSource(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where a machine gets tokens: the provider's token endpoint, its client there, and a file with the client's secret.

    ``parameters`` are sent besides, such as ``scope``, ``audience`` or ``resource``, as the provider wants them.
    """

    url: str
    client_id: str
    client_secret_file: str
    ca_file: str | None = None
    parameters: dict[str, str] = {}


class MachineAccess(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a machine reaches the broker's TLS port: with a certificate and its key, or with tokens. ``server_name`` is the name
    in the broker's certificate, when the one in ``url`` is another."""

    url: str
    ca_file: str
    server_name: str | None = None
    certificate_file: str | None = None
    key_file: str | None = None
    token: TokenSource | None = None


class Context(msgspec.Struct, frozen=True):
    """The context file. Unknown fields are left to later commands."""

    broker: BrokerContext = BrokerContext()
    ingress: Ingress = Ingress()
    bastion: Bastion | None = None
    machine: MachineAccess | None = None


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
    """Calls of the operator API. Each :meth:`request` opens and closes its own way to the broker, so that several threads may
    call; use :meth:`session` around several calls of one thread to share a way."""

    def __init__(self, context: Context, *, timeout_s: float = 60.0) -> None:
        self.context = context
        self._timeout = timeout_s
        self._shared: httpx.Client | None = None

    @classmethod
    def from_context(cls, path: Path | str | None = None) -> Self:
        """Return a client for the context file ``path`` (default: ``SAW_CONTEXT``, then this machine)."""
        return cls(load_context(path))

    def request(self, method: str, path: str, json: object | None = None) -> dict[str, Any]:
        """Call the broker and return its answer; raise :class:`BrokerRefusal` or :class:`UnavailableError`."""
        content = None if json is None else msgspec.json.encode(json)
        headers = {"content-type": "application/json"} if content is not None else {}
        with self._way() as http:
            try:
                response = http.request(method, path, content=content, headers=headers)
            except httpx.HTTPError as error:
                raise silent(error) from error
            return answer_of(response)

    def download(self, path: str, file: BinaryIO) -> None:
        """Write what the broker keeps under ``path`` into ``file``; raises as :meth:`request`."""
        with self._way() as http:
            try:
                with http.stream("GET", path) as response:
                    if response.is_error:
                        response.read()
                        answer_of(response)
                    file.writelines(response.iter_bytes())
            except httpx.HTTPError as error:
                raise silent(error) from error

    @contextmanager
    def session(self) -> Iterator[Self]:
        """Keep one way to the broker open for several calls."""
        with self._way() as http:
            before, self._shared = self._shared, http
            try:
                yield self
            finally:
                self._shared = before

    def _way(self) -> AbstractContextManager[httpx.Client]:
        return self._opened() if (shared := self._shared) is None else nullcontext(shared)

    @contextmanager
    def _opened(self) -> Iterator[httpx.Client]:
        if self.context.broker.sign_in:
            with signed_in_client(self._timeout) as http:
                yield http
            return
        with _socket_path(self.context.broker) as path:
            # No TLS on a Unix socket; without a context of ours httpx reads all root certificates, which takes 0.15 s.
            transport = httpx.HTTPTransport(uds=path, verify=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
            with httpx.Client(
                transport=transport, base_url="http://broker", timeout=self._timeout, trust_env=False
            ) as http:
                yield http


def answer_of(response: httpx.Response) -> dict[str, Any]:
    """Return the broker's answer; raise :class:`BrokerRefusal` when it is one, :class:`UnavailableError` when it is none."""
    try:
        body = jsontext.decode(response.content)
    except msgspec.DecodeError as error:
        raise UnavailableError(
            f"the broker answered {response.status_code} without JSON", cure="see its log"
        ) from error
    if response.is_error or not isinstance(body, dict):
        raise BrokerRefusal(response.status_code, body if isinstance(body, dict) else {})
    return body


def silent(error: httpx.HTTPError, cure: str = "check that saw-broker runs and the context") -> UnavailableError:
    """Return what is said of a broker that cannot be reached."""
    return UnavailableError(f"the broker does not answer: {error or type(error).__name__}", cure=cure)


def listed_workspaces(client: OperatorClient, page: int = 10_000, **filters: Sequence[str]) -> list[dict[str, Any]]:
    """Return the workspaces that meet ``filters`` (name → values, as ``GET /v1/workspaces`` takes them) in the order of ids.

    They are read in pages of ``page``; put :meth:`OperatorClient.session` around the call to share one way to the broker.
    """
    return _listed(client, "workspaces", page, filters)


def listed_agents(client: OperatorClient, page: int = 10_000, **filters: Sequence[str]) -> list[dict[str, Any]]:
    """Return the agents that meet ``filters``, as :func:`listed_workspaces` does, in the order in which they were registered."""
    return sorted(_listed(client, "agents", page, filters), key=lambda one: (len(one["id"]), one["id"]))


def listed_delegations(client: OperatorClient, page: int = 1000, **filters: Sequence[str]) -> list[dict[str, Any]]:
    """Return the delegations that meet ``filters``, as :func:`listed_workspaces` does, the newest first.

    A broker of before knows neither pages nor the filter ``state``, so that one is applied here as well.
    """
    states = filters.get("state")
    found = _listed(client, "delegations", page, filters)
    return [one for one in found if not states or one["state"] in states]


def _listed(client: OperatorClient, what: str, page: int, filters: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    query = [(name, value) for name, values in filters.items() for value in values] + [("limit", str(page))]
    after: str | None = ""
    while after is not None:
        answer = client.request("GET", f"/v1/{what}?{urlencode([*query, ('after', after)])}")
        found += answer[what]
        after = answer.get("next")
    return found


def forecast_step(workspace: Mapping[str, Any], to: str) -> None:
    """Raise what the broker would answer when ``workspace`` were to be taken to the state ``to`` now, without asking it."""
    check_step(str(workspace["id"]), State(workspace["state"]), State(to))


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


def _listens(path: Path) -> bool:
    """Tell whether somebody takes connections on the Unix socket ``path``."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return probe.connect_ex(str(path)) == 0


def _await_forward(process: subprocess.Popen[bytes], local: Path) -> None:
    """Wait until ssh listens on the local socket; raise :class:`UnavailableError` with ssh's own words when it gives up.

    The socket is there a moment before anything can connect to it, so that being there does not count.
    """
    assert process.stderr is not None  # noqa: S101 - Popen was asked for a pipe
    deadline = time.monotonic() + FORWARD_TIMEOUT_S
    while not _listens(local):
        if process.poll() is not None:
            words = process.stderr.read().decode(errors="replace").strip()[-500:]
            raise UnavailableError(
                f"ssh cannot reach the control host: {words}", cure="check broker.ssh in the context file"
            )
        if time.monotonic() > deadline:
            raise UnavailableError("ssh did not connect in time", cure="check broker.ssh in the context file")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.02)
