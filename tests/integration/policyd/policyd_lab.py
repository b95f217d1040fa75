"""A workspace's policy agent between a far end that serves a real TUF repository and a real decision service."""

from __future__ import annotations

import asyncio
import base64
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.cli.decide import boottime
from saw.cli.policyd import build, main
from saw.files import load_json
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.bundle import build_manifest, sign
from saw.policy.loader import load_members
from saw.policy.tuf_reach import bundle_diff
from saw.policy.tuf_repository import accept_publication, init_repository, stage_publication
from saw.policy.tuf_statements import state_reach
from saw.runtime.attribution import Attribution
from saw.runtime.decide import Decider, DecideService
from saw.runtime.decide_counts import Counts
from saw.runtime.decide_state import Generations, Heartbeat, Lease
from saw.runtime.decision_log import DecisionLog
from saw.runtime.policy_local import PolicyLocal
from saw.runtime.policyd import Policyd
from saw.runtime.policyd_config import PolicydConfig

ENVOY = Path(sys.executable).with_name("envoy")
TARGET = "rings/stable/coding.bundle.json"
POLICY = """
version: 1
landlock: {compatibility: hard_requirement}
filesystem_policy: {read_only: [/usr], read_write: [/srv/work]}
process: {run_as_user: nobody, run_as_group: nogroup}
network_policies:
  api:
    endpoints: [{host: api.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "PATH"}}]}]
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"


def until(condition, what: str, seconds: float = 60.0):
    """Return the first true result of ``condition``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s: {what}")


class FarBroker:
    """The broker's three workspace calls: TUF files, the long-poll and reports, over TLS."""

    def __init__(self, store: Path, identity: Authority, directory: Path) -> None:
        self.store = store
        self.reports: list[dict] = []
        self.sequence = 1
        #: The digest that the workspace is given; empty for the newest, None for none.
        self.gives: str | None = ""
        #: What the broker hands out when asked for the release that is given.
        self.bundle: bytes = b""
        self._identity = identity
        self._directory = directory
        self.port = 0
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if not self.port:
            key, csr = new_key_and_csr("broker")
            (self._directory / "broker.key").write_bytes(key)
            certificate = self._identity.issue_server(csr, ["broker.saw.internal"], datetime.now(UTC))
            (self._directory / "broker.pem").write_bytes(certificate)
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self,
            ssl_keyfile=str(self._directory / "broker.key"),
            ssl_certfile=str(self._directory / "broker.pem"),
            log_level="error",
            lifespan="off",
            loop="asyncio",
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        until(lambda: self._server.started, "the far broker listens")
        self._listener = listener

    def stop(self) -> None:
        if self._server is not None:
            self._server.should_exit = self._server.force_exit = True
            self._thread.join(10)
            self._listener.close()
            self._server = None

    def _waits(self, after: int, end: float) -> bool:
        return self.sequence == after and time.monotonic() < end and not self._server.should_exit

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        path = scope["path"]
        status, body = 404, b""
        if path.startswith("/tuf/"):
            file = self.store / path.removeprefix("/tuf/")
            if file.is_file():
                status, body = 200, file.read_bytes()
        elif path == "/v1/workspace/watch":
            asked = dict(pair.split("=") for pair in scope["query_string"].decode().split("&"))
            end = time.monotonic() + int(asked["wait"])
            while self._waits(int(asked["after"]), end):  # noqa: ASYNC110 - it changes in another thread
                await asyncio.sleep(0.01)
            status, body = (
                200,
                json.dumps({"seq": self.sequence, "policy_digest": self.gives, "revision": 0, "state": ""}).encode(),
            )
        elif path == "/v1/workspace/bundle":
            status, body = 200, json.dumps({"bundle": base64.b64encode(self.bundle).decode()}).encode()
        elif path == "/v1/workspace/report":
            raw = b""
            more = True
            while more:
                message = await receive()
                raw += message.get("body", b"")
                more = message.get("more_body", False)
            self.reports.append(json.loads(raw))
            status, body = 200, b"{}"
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


class FarAttestd:
    """The attestation agent's socket: records what was measured and answers as told."""

    def __init__(self, path: Path) -> None:
        self.measured: list[dict] = []
        self.answer: dict = {"ok": True}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(str(path))
        self._socket.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                channel, _ = self._socket.accept()
            except OSError:
                return
            with channel, channel.makefile("rwb") as stream:
                self.measured.append(json.loads(stream.readline()))
                stream.write(json.dumps(self.answer).encode() + b"\n")

    def stop(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


class Lab:
    netns = Path("/proc/self/ns/net")
    """Where those are who call ring 1."""

    def __init__(self, run: Path | None = None, state: Path | None = None, netns: Path | None = None) -> None:
        """``run`` and ``state``: directories of the agent that lie elsewhere; ``netns``: another one than that of the class."""
        self.netns = netns or self.netns
        self.directory = Path(tempfile.mkdtemp(prefix="saw-pd-"))
        self.run = run or self.directory / "run"
        self.state = state or self.directory / "state"
        self.store = self.directory / "store"
        self.journal = self.directory / "journal"
        for path in (self.run / "attest", self.run / "decide", self.run / "svid", self.run / "policy"):
            path.mkdir(parents=True)
        self.store.mkdir()
        self.journal.mkdir()
        now = datetime.now(UTC)
        self.officers = [Ed25519PrivateKey.generate() for _ in range(3)]
        self.online = Ed25519PrivateKey.generate()
        self.root = init_repository(self.store, self.officers, self.online, 2, now=now)
        self.identity = Authority.create(self.directory / "ca", "saw.example", now)
        (self.run / "ca.pem").write_bytes(self.identity.ca_pem)
        self.broker = FarBroker(self.store, self.identity, self.directory)
        self.broker.start()
        self.attestd = FarAttestd(self.run / "attest" / "attest.sock")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.proxy_port = free.getsockname()[1]
        self.revision = 0
        self.processes: list[subprocess.Popen] = []
        self.agents: list[Policyd] = []
        self._write_config()
        self._start_decide()

    def _write_config(self) -> None:
        workspace = {
            "workspace_id": "ws-demo",
            "number": 1,
            "trust_domain": "saw.example",
            "broker_url": f"https://127.0.0.1:{self.broker.port}",
            "broker_name": "broker.saw.internal",
            "ring2": "127.0.0.1:1",
            "ring2_name": "ring2.saw.internal",
            "ca_pem": self.identity.ca_pem.decode(),
            "tuf_root": json.loads(self.root),
            "blueprint": "coding",
            "ring": "stable",
        }
        (self.run / "workspace.json").write_text(json.dumps(workspace))
        self.configure()

    def configure(self, **changes: object) -> None:
        config = {
            "run_dir": str(self.run),
            "state_dir": str(self.state),
            "attest_socket": str(self.run / "attest" / "attest.sock"),
            "decide_socket": str(self.run / "decide" / "authz.sock"),
            "system_bundle": str(self.run / "ca.pem"),
            "envoy": str(ENVOY),
            "egress_group": None,
            "listen_address": "127.0.0.1",
            "listen_port": self.proxy_port,
            "poll_s": 5.0,
            "heartbeat_s": 0.2,
            "readback_s": 5.0,
            "proxy_start_s": 20.0,
            "journal_dir": str(self.journal),
            **changes,
        }
        (self.directory / "policyd.json").write_text(json.dumps(config))

    def config(self) -> PolicydConfig:
        return load_json(self.directory / "policyd.json", PolicydConfig)

    def agent(self, step=lambda _: None, *, proxy: bool = True) -> Policyd:
        """Return an agent of this workspace; ``proxy`` starts ring 1's Envoy with the first one."""
        agent = build(self.config(), step)
        self.agents.append(agent)
        if proxy and not self.processes:
            self.start_envoy()
        return agent

    def _start_decide(self) -> None:
        """Serve the real decision service, in a thread of this process."""
        self.heartbeat = Heartbeat(self.run / "policy" / "heartbeat", 15.0, boottime)
        decider = Decider(
            Generations(self.run / "generations", time.monotonic),
            Lease(self.run / "svid" / "lease.json", lambda: datetime.now(UTC), boottime),
            self.heartbeat,
            Attribution(self.netns),
            Counts(time.monotonic()),
        )
        self.decisions = (self.directory / "decisions.log").open("w+", encoding="utf-8")
        local = PolicyLocal(decider, self.run / "ask" / "policy.sock", time.monotonic)
        service = DecideService(decider, DecisionLog(self.decisions, journal=True), local)
        path = str(self.run / "decide" / "authz.sock")
        config = uvicorn.Config(service, uds=path, log_level="error", lifespan="off", loop="asyncio")
        self._decide = uvicorn.Server(config)
        self._decide_thread = threading.Thread(target=self._decide.run, daemon=True)
        self._decide_thread.start()
        until(lambda: self._decide.started, "saw-decide listens")

    def start_envoy(self) -> None:
        bootstrap = self.directory / "bootstrap.json"
        main(["render-bootstrap", "--config", str(self.directory / "policyd.json"), "--output", str(bootstrap)])
        self.processes.append(
            subprocess.Popen(
                [ENVOY, "-c", bootstrap, "--disable-hot-restart", "--concurrency", "1", "-l", "error"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )

    def end_envoy(self) -> None:
        """Kill ring 1's Envoy; nothing starts it again by itself."""
        while self.processes:
            process = self.processes.pop()
            process.send_signal(signal.SIGKILL)
            process.wait(10)

    def stop(self) -> None:
        for agent in self.agents:
            agent.close()
        self.end_envoy()
        self.attestd.stop()
        self.broker.stop()
        self._decide.should_exit = self._decide.force_exit = True
        self.decisions.close()
        self._decide_thread.join(10)
        shutil.rmtree(self.directory, ignore_errors=True)

    def bundle(
        self,
        path: str = "/v1/**",
        *,
        signers: int = 2,
        revision: int | None = None,
        policy: str = POLICY,
        governance: str = GOVERNANCE,
        **window,
    ) -> bytes:
        if revision is None:
            self.revision += 1
            revision = self.revision
        now = datetime.now(UTC)
        members = {"policy.yaml": policy.replace("PATH", path).encode(), "governance.yaml": governance.encode()}
        loaded = load_members(members)
        start, end = window.get("start", now - timedelta(hours=3)), window.get("end", now + timedelta(days=30))
        manifest = build_manifest(loaded, revision, start, end)
        return sign(manifest, members, self.officers[:signers])

    def publish(self, raw: bytes | None = None, *, now: datetime | None = None, **options) -> bytes:
        raw = raw or self.bundle()
        now = now or datetime.now(UTC)
        reach = state_reach(self.store, TARGET, raw, bundle_diff())[1]
        staged = stage_publication(self.store, TARGET, raw, self.officers[:2], now, reach=reach)
        accept_publication(self.store, staged.metadata, staged.targets, self.online, now, **options)
        self.broker.sequence += 1
        return raw

    def decided(self) -> dict | None:
        path = str(self.run / "decide" / "authz.sock")
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=path)) as client:
                return client.get("http://decide/status").json()
        except httpx.HTTPError:
            return None

    def told(self) -> dict:
        return json.loads((self.run / "policy" / "state.json").read_text())

    def current(self) -> str:
        return str((self.run / "generations" / "current").readlink())

    def reported(self, kind: str = "policy_state") -> list[tuple[str, str]]:
        return [(r["state"], r["reason"]) for r in self.broker.reports if r["kind"] == kind]

    def words(self) -> list[tuple[str, str]]:
        """What was said about policies: state and digest, in order."""
        return [(r["state"], r["policy_digest"]) for r in self.broker.reports if r["kind"] == "policy_state"]
