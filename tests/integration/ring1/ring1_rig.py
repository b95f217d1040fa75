"""Ring 1 as it runs in a workspace, in two private network namespaces: VM and sandbox, joined like the real ones."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
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
import websocket_ends

from saw.files import write_atomic
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.loader import load_members
from saw.policy.matcher import Matcher
from saw.runtime import generation, ring1
from saw.runtime.attestd_svid import secret_discovery
from saw.runtime.leaf import LeafAuthority

ENVOY = Path(sys.executable).with_name("envoy")
PROXY = "http://10.200.0.1:3128"
RING2_PORT = 18443
RENEWED_EVERY_S = 120.0
"""An SVID lasts ten minutes; a rig that serves several modules outlives it, so it renews it as a workspace does."""

POLICY = """
version: 1
landlock: {compatibility: hard_requirement}
network_policies:
  git:
    endpoints:
      - {host: git.example.com, port: 443, protocol: rest, rules: [
          {allow: {method: GET, path: "/team/**"}}, {allow: {method: POST, path: "/team/**/git-upload-pack"}}]}
    binaries: [{path: /usr/bin/git}]
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, rules: [
          {allow: {method: GET, path: "/v1/**"}}, {allow: {method: POST, path: /v1/notes}},
          {allow: {method: POST, path: /v1/items}}, {allow: {method: POST, path: /v1/never}}]}
      - {host: other.example.com, port: 8443, protocol: rest, access: read-only}
      - {host: plain.example.com, port: 80, protocol: rest, access: read-only}
    binaries: [{path: /usr/bin/curl}]
  python:
    endpoints:
      - {host: python.example.com, port: 443, protocol: rest, access: read-only}
      - {host: news.example.com, port: 443, protocol: websocket, access: read-only}
      - {host: chat.example.com, port: 443, protocol: websocket, rules: [
          {allow: {method: GET, path: "/rooms/**"}}, {allow: {method: WEBSOCKET_TEXT, path: "/rooms/**"}}]}
      - {host: raw.example.com, port: 443, protocol: websocket, access: full}
      - {host: asks.example.com, port: 443, protocol: websocket, access: read-write}
    binaries: [{path: "/**/python3*"}]
"""
GOVERNANCE = """
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
plaintext: ["plain.example.com:80"]
inference:
  routes: [{alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1"}]
actions:
  - {match: {host: api.example.com, method: [POST], path: /v1/notes}, class: auto}
  - {match: {host: api.example.com, method: [POST], path: /v1/never}, class: deny}
  - {match: {host: chat.example.com, method: [WEBSOCKET_TEXT]}, class: auto}
  - {match: {host: raw.example.com, method: [WEBSOCKET_TEXT]}, class: auto}
"""


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


def until(condition, what: str, seconds: float = 60.0):
    """Return the first true result of ``condition``; fail after ``seconds``."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        result = condition()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s: {what}")


def boottime() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Rig:
    """One workspace's ring 1 with a far end behind a real mutual-TLS HTTP/2 ring 2."""

    def __init__(self, directory: Path, name: str) -> None:
        self.directory = directory
        self.vm, self.sandbox = f"sawv{name}", f"saws{name}"
        self.generations = directory / "generations"
        self.svid = directory / "svid"
        self.base = ""
        self.processes: dict[str, subprocess.Popen] = {}
        self.service: websocket_ends.Service | None = None
        self.stopping = threading.Event()
        self.renewal: threading.Thread | None = None
        self.digest = "0" * 64
        self.settings = ring1.Ring1(
            ring2_address="127.0.0.1",
            ring2_port=RING2_PORT,
            decide_socket=directory / "decide" / "authz.sock",
            sds_file=self.svid / "sds.json",
            ca_file=directory / "ca.pem",
            generations=self.generations,
        )
        self.authority = LeafAuthority.ensure(directory / "ring1-ca", datetime.now(UTC))
        self.ca_bundle = directory / "ring1-ca" / "ca.pem"

    def start(self) -> None:
        for namespace in (self.vm, self.sandbox):
            run("ip", "netns", "add", namespace)
            run("ip", "-n", namespace, "link", "set", "lo", "up")
        run(
            "ip",
            "-n",
            self.vm,
            "link",
            "add",
            "sawveth0",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            self.sandbox,
        )
        run("ip", "-n", self.vm, "addr", "add", "10.200.0.1/30", "dev", "sawveth0")
        run("ip", "-n", self.vm, "link", "set", "sawveth0", "up")
        run("ip", "-n", self.sandbox, "addr", "add", "10.200.0.2/30", "dev", "eth0")
        run("ip", "-n", self.sandbox, "link", "set", "eth0", "up")
        self.svid.mkdir()
        self.generations.mkdir()
        self.identity = Authority.create(self.directory / "ca", "saw.example", datetime.now(UTC))
        (self.directory / "ca.pem").write_bytes(self.identity.ca_pem)
        self.lease(timedelta(hours=1))
        self.heartbeat()
        self.start_ring2()
        self.start_decide()
        (self.svid / "sds.json").write_text('{"resources": []}')
        generation.write_closed(self.generations, self.settings, group=None)
        (self.directory / "bootstrap.json").write_text(json.dumps(ring1.bootstrap(self.settings)))
        self.start_envoy()

    def start_envoy(self) -> None:
        self.spawn(
            "ring1",
            *(str(ENVOY), "-c", str(self.directory / "bootstrap.json"), "--disable-hot-restart", "--concurrency", "1"),
            *("--drain-time-s", "1", "--drain-strategy", "immediate", "-l", "warning"),
        )
        until(lambda: self.served() is not None, "ring 1 answers")

    def start_decide(self, callers: str = "") -> None:
        """Start saw-decide; ``callers`` is the namespace in which it looks for callers (default: the sandbox's)."""
        config = {
            "socket": str(self.settings.decide_socket),
            "generations": str(self.generations),
            "lease": str(self.svid / "lease.json"),
            "heartbeat": str(self.directory / "heartbeat"),
            "heartbeat_limit_s": 3600.0,
            "ask_socket": str(self.directory / "ask" / "policy.sock"),
            "netns": f"/run/netns/{callers or self.sandbox}",
        }
        (self.directory / "decide.json").write_text(json.dumps(config))
        self.spawn(
            "decide",
            sys.executable,
            "-m",
            "saw.cli.main",
            "decide",
            "serve",
            "--config",
            str(self.directory / "decide.json"),
        )
        until(lambda: self.decide_status() is not None, "saw-decide answers")

    def start_ring2(self) -> None:
        now = datetime.now(UTC)
        key, csr = new_key_and_csr("ring2")
        (self.directory / "ring2.key").write_bytes(key)
        (self.directory / "ring2.pem").write_bytes(self.identity.issue_server(csr, ["ring2.saw.internal"], now))
        (self.directory / "repositories").mkdir()
        (self.directory / "ring2.json").write_text(json.dumps(far_end(self.directory)))
        self.spawn(
            "far-end",
            *(sys.executable, "-m", "uvicorn", "--app-dir", str(Path(__file__).parent), "ring1_far_end:app"),
            *("--uds", str(self.directory / "far-end.sock"), "--log-level", "warning"),
            environment={
                "FAR_END_REPOSITORIES": str(self.directory / "repositories"),
                "FAR_END_LOG": os.environ.get("FAR_END_LOG", str(self.directory / "arrived")),
            },
        )
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.directory / "streams.sock"))
        listener.listen(64)
        self.service = websocket_ends.Service(listener)
        self.start_ring2_proxy()

    def start_ring2_proxy(self) -> None:
        self.spawn(
            "ring2",
            *(str(ENVOY), "-c", str(self.directory / "ring2.json"), "--disable-hot-restart", "--concurrency", "1"),
            *("-l", "warning"),
        )

    def issue_svid(self, digest: str = "0" * 64) -> None:
        """Give the workspace its identity, now and again for as long as the rig runs."""
        self.digest = digest
        self.renew_svid()
        if self.renewal is None:
            self.renewal = threading.Thread(target=self._keep_renewing, daemon=True)
            self.renewal.start()

    def _keep_renewing(self) -> None:
        while not self.stopping.wait(RENEWED_EVERY_S):
            self.renew_svid()

    def renew_svid(self, age: timedelta = timedelta(0)) -> None:
        """Write an SVID that was issued ``age`` ago."""
        key, csr = new_key_and_csr("workspace")
        svid = self.identity.issue_svid(csr, "ws-demo", self.digest, datetime.now(UTC) - age)
        write_atomic(self.svid / "sds.json", secret_discovery(svid.decode(), key.decode()))

    def lease(self, length: timedelta) -> None:
        raw = json.dumps({"expires_at": (datetime.now(UTC) + length).isoformat(), "ttl_s": 60.0, "policy_digest": ""})
        write_atomic(self.svid / "lease.json", raw)

    def heartbeat(self, age: float = 0.0) -> None:
        write_atomic(self.directory / "heartbeat", json.dumps({"boottime": boottime() - age}))

    def activate(self, policy: str = POLICY, governance: str = GOVERNANCE, *, revision: int = 1) -> str:
        """Compile and switch to a generation and wait until both parts enforce it; return its digest."""
        digest = self.compile(policy, governance, revision=revision)
        generation.switch(self.generations, digest)
        until(lambda: (self.decide_status() or {}).get("policy_digest") == digest, "saw-decide follows")
        until(lambda: self.served() == digest, "ring 1 follows")
        return digest

    def compile(self, policy: str, governance: str, *, revision: int = 1) -> str:
        members = {"policy.yaml": policy.encode(), "governance.yaml": governance.encode()}
        bundle = load_members(members)
        listed = {
            name: {"sha256": hashlib.sha256(raw).hexdigest(), "length": len(raw)} for name, raw in members.items()
        }
        manifest = json.dumps({"members": listed, "revision": revision}, sort_keys=True).encode()
        content = generation.Content(
            digest=hashlib.sha256(manifest).hexdigest(),
            revision=revision,
            blueprint="coding",
            manifest=manifest,
            members=members,
            matcher=Matcher.compile(bundle.policy, bundle.governance),
        )
        directory = generation.compile_generation(
            content, self.generations, self.settings, self.authority, datetime.now(UTC), group=None
        )
        generation.place(self.generations, directory, content.digest)
        return content.digest

    def served(self) -> str | None:
        done = self.inside("curl", "-s", "-m", "2", "-x", PROXY, "http://ring1.saw.internal/generation", check=False)
        return done.stdout if done.returncode == 0 else None

    def decide_status(self) -> dict | None:
        try:
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.settings.decide_socket))) as client:
                return client.get("http://decide/status").json()
        except httpx.HTTPError:
            return None

    def inside(self, *command: str, check: bool = True, **options) -> subprocess.CompletedProcess:
        """Run a command in the sandbox's namespace."""
        environment = {
            **os.environ,
            "http_proxy": PROXY,
            "https_proxy": PROXY,
            "no_proxy": "",
            "SSL_CERT_FILE": str(self.ca_bundle),
            "CURL_CA_BUNDLE": str(self.ca_bundle),
            "GIT_SSL_CAINFO": str(self.ca_bundle),
        }
        return subprocess.run(
            ["ip", "netns", "exec", self.sandbox, *command],
            check=check,
            capture_output=True,
            text=True,
            timeout=30,
            env=environment,
            **options,
        )

    def curl(self, *arguments: str) -> Reply:
        """Run curl through ring 1 and return the status and body of the last answer, a refused CONNECT included."""
        body = self.directory / "curl-body"
        body.unlink(missing_ok=True)
        done = self.inside(
            *(
                "curl",
                "-s",
                "-m",
                "10",
                "-o",
                str(body),
                "-w",
                "%{http_code} %{http_connect}",
                "--suppress-connect-headers",
            ),
            *arguments,
            check=False,
        )
        final, connect = done.stdout.split()
        status = int(final) or int(connect)
        return Reply(status, body.read_bytes() if body.exists() else b"", done.returncode, int(connect))

    def spawn(self, name: str, *command: str, environment: dict[str, str] | None = None) -> None:
        log = (self.directory / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            ["ip", "netns", "exec", self.vm, *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        log.close()

    def stop_process(self, name: str) -> None:
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop(self) -> None:
        self.stopping.set()
        if self.renewal is not None:
            self.renewal.join()
        for name in list(self.processes):
            self.stop_process(name)
        if self.service is not None:
            self.service.close()
        for namespace in (self.sandbox, self.vm):
            with contextlib.suppress(subprocess.CalledProcessError):
                run("ip", "netns", "del", namespace)
        shutil.rmtree(self.directory, ignore_errors=True)

    def arrived(self) -> list[list]:
        """Return what reached the far end: method, path, headers and body of each request."""
        log = self.directory / "arrived"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text(errors="replace")


class Reply:
    """What curl saw: the HTTP status (that of a refused CONNECT when no more came), body, and curl's own exit code."""

    def __init__(self, status: int, body: bytes, code: int, connect: int) -> None:
        self.status = status
        self.body = body
        self.code = code
        self.connect = connect

    def json(self) -> dict:
        return json.loads(self.body)

    def __repr__(self) -> str:
        return f"<{self.status} (connect {self.connect}, curl {self.code}) {self.body[:400]!r}>"


def start_rig(suffix: str) -> Rig:
    # Unix socket paths are short; pytest's own directories are not.
    rig = Rig(Path(tempfile.mkdtemp(prefix="saw-r1-")), f"{os.getpid()}{suffix}")
    try:
        rig.start()
    except BaseException:
        for log in rig.directory.glob("*.log"):
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-4000:]}")
        rig.stop()
        raise
    return rig


def far_end(directory: Path) -> dict:
    """Envoy as ring 2: a client certificate of our authority is required; what arrives is passed on unchanged."""
    api = "type.googleapis.com/envoy"
    hcm = {
        "@type": f"{api}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "ring2",
        "codec_type": "HTTP2",
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "stream_idle_timeout": "0s",
        "http2_protocol_options": {"allow_connect": True},
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [
                        {
                            "match": {"prefix": "/", "headers": [{"name": "upgrade", "present_match": True}]},
                            "route": {"cluster": "streams", "timeout": "0s"},
                        },
                        {"match": {"prefix": "/"}, "route": {"cluster": "far-end", "timeout": "0s"}},
                    ],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{api}.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    tls = {
        "@type": f"{api}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": {
            "alpn_protocols": ["h2"],
            "tls_certificates": [
                {
                    "certificate_chain": {"filename": str(directory / "ring2.pem")},
                    "private_key": {"filename": str(directory / "ring2.key")},
                }
            ],
            "validation_context": {"trusted_ca": {"filename": str(directory / "ca.pem")}},
        },
    }
    return {
        "static_resources": {
            "listeners": [
                {
                    "name": "ring2",
                    "address": {"socket_address": {"address": "127.0.0.1", "port_value": RING2_PORT}},
                    "filter_chains": [
                        {
                            "filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": hcm}],
                            "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": tls},
                        }
                    ],
                }
            ],
            "clusters": [
                {
                    "name": name,
                    "type": "STATIC",
                    "load_assignment": {
                        "cluster_name": name,
                        "endpoints": [
                            {
                                "lb_endpoints": [
                                    {"endpoint": {"address": {"pipe": {"path": str(directory / f"{name}.sock")}}}}
                                ]
                            }
                        ],
                    },
                }
                for name in ("far-end", "streams")
            ],
        }
    }
