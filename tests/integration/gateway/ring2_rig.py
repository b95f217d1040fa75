"""Ring 2 with real parts: Envoy, the gatekeeper's process, certificates, and a far end, in one network namespace."""

from __future__ import annotations

import http.client
import json
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from netns import Namespace
from ring2_broker import Broker, FarEnd, Uvicorn, mutual_tls
from ring2_policy import Signer

from saw.addressing import gateway
from saw.gateway.config import load_config
from saw.gateway.replica_status import Replica, ask
from saw.gateway.xds import envoy_arguments
from saw.identity.x509 import Authority, new_key_and_csr

FAR, TRAP, BROKER = "10.99.0.1", "10.99.0.2", "10.99.0.3"
HOSTS = ("api.example.com", "git.example.com", "models.example.com")
SECRET = {"api-token": "s3cret-api-value", "git-token": "s3cret-git-value", "model-key": "s3cret-model-value"}
DRAIN_S = 5
"""How long a test's Envoy leaves open what is on a listener that it replaces (seconds): a slow call comes to its end."""
PIECE_SECONDS = 1
"""How long an answer may come after a piece of a body, before the next one is sent."""
ENVOY = Path(sys.executable).with_name("envoy")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    """Wait until ``condition`` holds; fail with ``what`` after ``seconds``.

    A call that ends without an answer does not hold yet: Envoy replaces a listener whose workspace changed, and ends after a
    second what is open on it.
    """
    end = time.monotonic() + seconds
    while not _holds(condition):
        assert time.monotonic() < end, f"{what} did not happen within {seconds} s"
        time.sleep(0.01)


def _holds(condition: Callable[[], object]) -> bool:
    try:
        return bool(condition())
    except (http.client.RemoteDisconnected, ConnectionResetError):
        return False


class Answer:
    """What came back from ring 2."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}
        self.body = response.read()

    @property
    def json(self) -> dict[str, Any]:
        """Return the body as JSON."""
        return dict(json.loads(self.body))

    @property
    def outcome(self) -> tuple[int, str]:
        """Return the status, and the reason of a refusal."""
        return self.status, self.json["reason"] if self.status in {403, 429} else ""


class Rig:
    """Everything, ready to be called; ``ws-1`` (number 1) is active and may be changed through ``broker``.

    With ``replicas`` gatekeepers, ``gatekeepers`` has those that run, by their number. ``disk``: where state and Envoy's files
    lie, as the processes see it and as this one does, when it is another one. ``drain_s``: seconds that Envoy leaves open what is
    on a listener that it replaces, where that is to be another time than the product's.
    """

    def __init__(
        self,
        stack: ExitStack,
        directory: Path,
        replicas: int = 1,
        *,
        namespace: Namespace | None = None,
        disk: tuple[Path, Path] | None = None,
        drain_s: int | None = None,
    ) -> None:
        self.directory = directory
        self.disk, self.seen = disk or (directory, directory)
        self.replicas = replicas
        self.gatekeepers: dict[int, subprocess.Popen[bytes]] = {}
        self.namespace = namespace or Namespace("ring2")
        stack.callback(self.namespace.close)
        self._stack = stack
        self._network()
        now = datetime.now(UTC)
        self.authority = Authority.create(directory / "ca", "saw.test", now)
        self.stranger = Authority.create(directory / "stranger", "saw.test", now)
        self.corporate = Authority.create(directory / "corporate", "corp.test", now)
        self._counter = 0
        self.signer = Signer(directory / "officers", now)
        self.digest, self.bundle = self.signer.release(1)
        self.broker, self.far, self.trap = Broker(), FarEnd(), FarEnd()
        self.hosts = directory / "hosts"
        self.name_hosts()
        self.reset()
        self._servers()
        self.config_path = self._configure()
        self.config = load_config(self.config_path)
        self.log = (directory / "gatekeeper.log").open("wb")
        self.envoy_log = (directory / "envoy.log").open("wb")
        stack.callback(self.log.close)
        stack.callback(self.envoy_log.close)
        self.start_gatekeeper()
        command = [*envoy_arguments(self.config), "--concurrency", "1", "-l", "warning"]
        if drain_s is not None:
            command[command.index("--drain-time-s") + 1] = str(drain_s)
        self.envoy = self.namespace.popen(*command, stdout=self.envoy_log, stderr=self.envoy_log)
        stack.callback(self._stop, self.envoy)
        stack.callback(self.stop_gatekeeper)
        wait_for(lambda: self.listens("10.210.1.1", 8443), "ring 2's listener")
        wait_for(lambda: self.call().status == 200, "the first allowed call")

    def _network(self) -> None:
        ip = self.namespace.ip
        ip("link", "add", "far0", "type", "bridge")
        for address in (FAR, TRAP, BROKER):
            ip("addr", "add", f"{address}/24", "dev", "far0")
        ip("link", "set", "far0", "up")
        for number in (1, 2):
            ip("link", "add", f"sawbr{number}", "type", "bridge")
            ip("addr", "add", f"10.210.{number}.1/30", "dev", f"sawbr{number}")
            ip("addr", "add", f"10.210.{number}.2/30", "dev", f"sawbr{number}")
            ip("link", "set", f"sawbr{number}", "up")

    def _pair(self, authority: Authority, names: tuple[str, ...], label: str) -> tuple[Path, Path]:
        key, csr = new_key_and_csr(names[0], names)
        certificate = authority.issue_server(csr, list(names), datetime.now(UTC))
        return self._store(label, certificate, key)

    def _store(self, label: str, certificate: bytes, key: bytes) -> tuple[Path, Path]:
        paths = self.directory / f"{label}.pem", self.directory / f"{label}.key"
        paths[0].write_bytes(certificate)
        paths[1].write_bytes(key)
        paths[1].chmod(0o600)
        return paths

    def listen(self, address: str, port: int) -> socket.socket:
        """Return a listening socket inside the namespace."""
        return self.namespace.run(lambda: socket.create_server((address, port), backlog=64))

    def _servers(self) -> None:
        corporate = self._pair(self.corporate, HOSTS, "far")
        broker = self._pair(self.authority, ("broker.saw.internal",), "broker")
        impostor = self._pair(self.corporate, ("impostor.example.com",), "impostor")
        for app, address, port, options in (
            (self.far, FAR, 443, {"ssl_certfile": str(corporate[0]), "ssl_keyfile": str(corporate[1])}),
            (self.far, FAR, 8080, {}),
            (self.trap, TRAP, 443, {"ssl_certfile": str(impostor[0]), "ssl_keyfile": str(impostor[1])}),
            (self.broker, BROKER, 8443, mutual_tls(*broker, self.directory / "ca" / "ca.pem")),
        ):
            if app is self.broker:
                self._broker_options = options
                self.join_broker()
                continue
            server = Uvicorn(app, self.listen(address, port), **options)
            self._stack.callback(server.close)
        self._stack.callback(self.part_broker)
        self._stack.callback(self.broker.close)

    def part_broker(self) -> None:
        """End the broker's server: nobody listens there, and connections to it end."""
        self.broker.part()
        self._broker_server.close(force=False)

    def join_broker(self) -> None:
        """Let the broker be reached (again)."""
        self.broker.parted = False
        self._broker_server = Uvicorn(self.broker, self.listen(BROKER, 8443), **self._broker_options)

    def _configure(self) -> Path:
        directory = self.directory
        tls, xds, credentials = directory / "tls", self.disk / "xds", directory / "credentials"
        for folder in (tls, self.seen / "xds", credentials):
            folder.mkdir()
        for name, value in SECRET.items():
            (credentials / name).write_text(value + "\n")
            (credentials / name).chmod(0o600)
        shutil.copy(directory / "ca" / "ca.pem", tls / "ca.pem")
        server = self._pair(self.authority, ("ring2.saw.internal",), "ring2")
        shutil.copy(server[0], tls / "server.pem")
        shutil.copy(server[1], tls / "server.key")
        key, csr = new_key_and_csr("edge")
        client = self._store("edge", self.authority.issue_perimeter(csr, "edge", datetime.now(UTC)), key)
        config = {
            "name": "edge",
            "broker_url": f"https://{BROKER}:8443",
            "ca_file": str(directory / "ca" / "ca.pem"),
            "cert_file": str(client[0]),
            "key_file": str(client[1]),
            "tuf_root_file": str(self.signer.root_file),
            "state_dir": str(self.disk / "state"),
            "authz_socket": str(self._place("authz.sock")),
            "review_socket": str(self._place("review.sock")),
            "replicas": self.replicas,
            "credentials_dir": str(credentials),
            "records": {"key_file": str(directory / "records.key"), "limit_mib": 64},
            "ring2": {
                "xds_dir": str(xds),
                "tls_dir": str(tls),
                "upstream_ca_file": str(directory / "corporate" / "ca.pem"),
                "ingress_address": FAR,
                "broker_address": f"{BROKER}:8443",
                "envoy": str(ENVOY),
                "send_socket": str(self._place("send.sock")),
            },
            "poll_wait_s": 5,
            "resolver": {"hosts_file": str(self.hosts)},
        }
        path = directory / "gatekeeper.json"
        path.write_text(json.dumps(config))
        self.saw("gateway", "init", "--config", str(path))
        return path

    def saw(self, *arguments: str) -> str:
        """Run the command line."""
        return self.namespace.sh(sys.executable, "-m", "saw.cli.main", *arguments)

    def name_hosts(self, **changes: str) -> None:
        """Write the hosts file: every host at the far end, except those given (dots as underscores)."""
        table = {name: [FAR] for name in HOSTS}
        table |= {name.replace("_", "."): value.split() for name, value in changes.items()}
        lines = [f"{address} {name}" for name, addresses in table.items() for address in addresses]
        temporary = self.hosts.with_suffix(".new")
        temporary.write_text("\n".join(lines) + "\n")
        self._counter += 1
        os.utime(temporary, (self._counter, self._counter))
        temporary.replace(self.hosts)

    def reset(self) -> None:
        """Bring ``ws-1`` and ``ws-2`` back to active with a lease, and the one release."""
        self.broker.releases = {self.digest: self.bundle}
        for number in (1, 2):
            self.broker.put(
                f"ws-{number}", number=number, state="active", sponsor="mia@example.com", blueprint="coding",
                ring="stable", lease_expires_at=120, policy_digest=self.digest, released_digest=self.digest,
                svid_sha256=None, agent=f"agent-{number}",
            )  # fmt: skip

    def settle(self, **fields: Any) -> None:
        """Change ``ws-1`` and wait until the gatekeeper has that state."""
        self.broker.put("ws-1", **fields)
        self.settled()

    def settled(self) -> None:
        """Wait until the gatekeeper holds the broker's newest state."""
        seq = self.broker.seq
        state = self.seen / "state" / "state.json"
        wait_for(lambda: state.exists() and json.loads(state.read_text())["state"]["seq"] >= seq, f"state {seq}")
        for replica in self.gatekeepers:
            wait_for(lambda place=replica: self.told(place).state >= seq, f"state {seq} at replica {replica}")

    def told(self, replica: int) -> Replica:
        """Return how one gatekeeper says it is."""
        return ask(self.config.sockets(replica).authz, replica)

    def _place(self, name: str) -> Path:
        """Return where a socket is configured: with several gatekeepers, each has a folder."""
        return self.directory / name if self.replicas == 1 else self.directory / "{replica}" / name

    @property
    def gatekeeper(self) -> subprocess.Popen[bytes] | None:
        """Return the process of the first gatekeeper, None where it does not run."""
        return self.gatekeepers.get(1)

    def start_gatekeeper(self) -> None:
        """Start the processes of the gatekeepers that do not run and wait for their sockets."""
        for replica in range(1, self.replicas + 1):
            if replica not in self.gatekeepers:
                self._start(replica)
        for replica in self.gatekeepers:
            self._started(replica)

    def start_replica(self, replica: int) -> None:
        """Start one gatekeeper and wait for its sockets."""
        self._start(replica)
        self._started(replica)

    def _start(self, replica: int) -> None:
        sockets = self.config.sockets(replica)
        sockets.authz.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "saw.cli.main", "gateway", "serve", "--config", str(self.config_path)]
        self.gatekeepers[replica] = self.namespace.popen(
            *command, "--replica", str(replica), stdout=self.log, stderr=self.log
        )

    def _started(self, replica: int) -> None:
        sockets = self.config.sockets(replica)
        for path in (sockets.authz, sockets.review):
            assert path is not None
            wait_for(path.exists, str(path))

    def stop_gatekeeper(self, number: int = signal.SIGTERM) -> None:
        """End the processes of all gatekeepers."""
        for replica in list(self.gatekeepers):
            self.stop_replica(replica, number)

    def stop_replica(self, replica: int, number: int = signal.SIGTERM) -> None:
        """End the process of one gatekeeper."""
        self._stop(self.gatekeepers.pop(replica), number)
        sockets = self.config.sockets(replica)
        for path in (sockets.authz, sockets.review):
            assert path is not None
            path.unlink(missing_ok=True)

    @staticmethod
    def _stop(process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> None:
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def svid_files(
        self, workspace: str = "ws-1", *, digest: str = "", authority: Authority | None = None, age: int = 0
    ) -> tuple[Path, Path]:
        """Return certificate and key of an SVID issued ``age`` seconds ago for ten minutes."""
        key, csr = new_key_and_csr(workspace)
        issued = datetime.now(UTC) - timedelta(seconds=age)
        certificate = (authority or self.authority).issue_svid(csr, workspace, digest or self.digest, issued, 600)
        self._counter += 1
        return self._store(f"svid-{self._counter}", certificate, key)

    def svid(self, workspace: str = "ws-1", **options: Any) -> ssl.SSLContext:
        """Return a client context with an SVID (see :meth:`svid_files`)."""
        return self.context(*self.svid_files(workspace, **options))

    def context(self, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
        """Return a client context that trusts our authority, with a client certificate when given."""
        context = ssl.create_default_context(cafile=str(self.directory / "ca" / "ca.pem"))
        if certificate is not None:
            context.load_cert_chain(certificate, key)
        return context

    def connect(self, address: str, port: int) -> socket.socket:
        """Return a TCP connection made inside the namespace."""
        return self.namespace.run(lambda: socket.create_connection((address, port), timeout=20))

    def listens(self, address: str, port: int) -> bool:
        """Return whether something accepts connections there."""
        try:
            self.connect(address, port).close()
        except OSError:
            return False
        return True

    def call(
        self,
        method: str = "GET",
        target: str = "/v1/things",
        *,
        host: str = "api.example.com",
        binary: str = "/usr/bin/curl",
        headers: dict[str, str] | list[tuple[str, str]] | None = None,
        body: bytes | None = None,
        pieces: Sequence[bytes] = (),
        context: ssl.SSLContext | None = None,
        number: int = 1,
    ) -> Answer:
        """Call ring 2 as ring 1 would, or as root in the VM would with headers of its own.

        ``pieces`` are a body of which each part is sent after ring 2 had time to answer to those before it.
        """
        raw = self.connect(gateway(number), 8443)
        sock = (context or self.svid()).wrap_socket(raw, server_hostname="ring2.saw.internal")
        connection = http.client.HTTPConnection("ring2", timeout=20)
        connection.sock = sock
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            connection.putheader("host", host)
            connection.putheader("x-saw-ring1", "allow")
            if binary:
                connection.putheader("x-saw-binary", binary)
            extra = headers.items() if isinstance(headers, dict) else headers or []
            for name, value in extra:
                connection.putheader(name, value)
            if body is not None:
                connection.putheader("content-length", str(len(body)))
            elif pieces:
                connection.putheader("content-length", str(sum(map(len, pieces))))
            connection.endheaders(body)
            for piece in pieces:
                connection.send(piece)
                if select.select([sock], [], [], PIECE_SECONDS)[0]:
                    break
            return Answer(connection.getresponse())
        finally:
            connection.close()
