"""gRPC calls through ring 2, brought to it as ring 1 brings them: they end with what allowed them, and give nothing back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ring2_policy import GOVERNANCE, POLICY
from ring2_rig import ENVOY, FAR, SECRET, Rig, wait_for

from saw.runtime.attestd_svid import secret_discovery
from saw.runtime.ring1_clusters import clusters
from saw.runtime.ring1_settings import API, Ring1

SERVICE = Path(__file__).with_name("grpc_reflector.py")
VALUE = SECRET["api-token"]
ENDED = ("INTERNAL ", "UNAVAILABLE ")
"""How the client begins to say that the other side ended a call, by its stream or by its connection."""
GRPC_POLICY = (
    POLICY
    + """
  calls:
    endpoints:
      - {host: api.example.com, port: 9444, protocol: rest, rules: [{allow: {method: POST, path: "/demo.Echo/*"}}]}
    binaries: [{path: /usr/bin/curl}]
"""
)
GRPC_GOVERNANCE = GOVERNANCE.replace(
    "inference:",
    """  - {id: echo-token, ref: "local:echo-token", hosts: ["api.example.com:9444"], paths: ["/demo.Echo/*"],
     inject: {header: X-Api-Key, format: "{secret}"}}
inference:""",
).replace(
    "actions:",
    """actions:
  - {match: {host: api.example.com, port: 9444, method: [POST]}, class: auto}""",
)
CLIENT = """
import sys, grpc
shape, method = sys.argv[1:3]
channel = grpc.insecure_channel("127.0.0.1:7005", options=[("grpc.default_authority", "api.example.com:9444")])
said = [("x-saw-ring1", "allow"), ("x-saw-binary", "/usr/bin/curl")]
asked = iter(lambda: sys.stdin.buffer.readline().rstrip(b"\\n") or None, None)
try:
    if shape == "unary":
        answer, call = channel.unary_unary("/demo.Echo/" + method).with_call(b"ann", timeout=60, metadata=said)
        print(answer.decode(), flush=True)
    else:
        for answer in channel.stream_stream("/demo.Echo/" + method)(asked, timeout=60, metadata=said):
            print(answer.decode(), flush=True)
        print("the end", flush=True)
except grpc.RpcError as error:
    print(error.code().name, error.details(), flush=True)
"""


class Calls:
    """Workspace ``ws-5``, whose policy alone has a gRPC service, and that service."""

    def __init__(self, rig: Rig, directory: Path) -> None:
        self.rig, self.directory = rig, directory
        rig.namespace.ip("link", "add", "sawbr5", "type", "bridge")
        rig.namespace.ip("addr", "add", "10.210.5.1/30", "dev", "sawbr5")
        rig.namespace.ip("link", "set", "sawbr5", "up")
        token = rig.directory / "credentials" / "echo-token"
        token.touch(0o600)
        token.write_text(VALUE)
        pair = str(rig.directory / "far.pem"), str(rig.directory / "far.key")
        self.service = rig.namespace.popen(sys.executable, str(SERVICE), f"{FAR}:9444", *pair)
        wait_for(lambda: rig.listens(FAR, 9444), "the gRPC service")
        self.digest, self.bundle = rig.signer.release(1, policy=GRPC_POLICY, governance=GRPC_GOVERNANCE)
        self.way = self._way()
        wait_for(lambda: rig.listens("127.0.0.1", 7005), "the way to ring 2")

    def _way(self) -> subprocess.Popen[bytes]:
        """Start an Envoy that brings HTTP/2 to ring 2 with the certificate of ``ws-5``."""
        certificate, key = self.rig.svid_files("ws-5", digest=self.digest)
        (self.directory / "sds.json").write_bytes(secret_discovery(certificate.read_text(), key.read_text()))
        settings = Ring1(
            ring2_address="10.210.5.1",
            ring2_port=8443,
            sds_file=self.directory / "sds.json",
            ca_file=self.rig.directory / "ca" / "ca.pem",
        )
        router = {
            "name": "envoy.filters.http.router",
            "typed_config": {"@type": f"{API}.extensions.filters.http.router.v3.Router"},
        }
        route = {"match": {"prefix": "/"}, "route": {"cluster": "ring2", "timeout": "0s"}}
        manager = {
            "@type": f"{API}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": "client",
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
            "http_filters": [router],
        }
        listener = {
            "name": "client",
            "address": {"socket_address": {"address": "127.0.0.1", "port_value": 7005}},
            "filter_chains": [
                {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
            ],
        }
        ring2 = next(cluster for cluster in clusters(settings, "test") if cluster["name"] == "ring2")
        config = {
            "node": {"id": "c", "cluster": "c"},
            "static_resources": {"listeners": [listener], "clusters": [ring2]},
        }
        (self.directory / "client.json").write_text(json.dumps(config))
        command = (str(ENVOY), "-c", str(self.directory / "client.json"), "--disable-hot-restart", "--concurrency", "1")
        with (self.directory / "client.log").open("wb") as log:
            return self.rig.namespace.popen(*command, "-l", "warning", stdout=log, stderr=log)

    def reset(self, **fields: Any) -> None:
        """Have ``ws-5`` active under a lease, but for ``fields``, and wait until ring 2 knows it."""
        self.rig.broker.releases = {self.rig.digest: self.rig.bundle, self.digest: self.bundle}
        given = {"number": 5, "state": "active", "sponsor": "mia@example.com", "blueprint": "coding", "ring": "stable",
                 "lease_expires_at": 120, "policy_digest": self.digest, "released_digest": self.digest, "svid_sha256": None,
                 "agent": "agent-5", "delegations": [], "delegation_required": False,
                 "agent_retired": False}  # fmt: skip
        self.rig.broker.put("ws-5", **{**given, **fields})
        self.rig.settled()

    def listener(self) -> dict[str, Any]:
        """Return what Envoy is told of the listener of ``ws-5``."""
        resources = json.loads((self.rig.directory / "xds" / "lds.json").read_text())["resources"]
        return next(item for item in resources if item["name"] == "ring2-5")

    def client(self, shape: str, method: str) -> subprocess.Popen[bytes]:
        """Start a client; what is written to it, line by line, are its messages, and its lines are the answers."""
        command = (sys.executable, "-c", CLIENT, shape, method)
        return self.rig.namespace.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def once(self, method: str) -> str:
        """Return what one call of one message says."""
        return self.client("unary", method).communicate(timeout=90)[0].decode().strip()


class Talk:
    """A call in which each message is answered when it comes."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def says(self, message: str) -> str:
        """Send a message and return the next line."""
        assert self.process.stdin is not None
        self.process.stdin.write(message.encode() + b"\n")
        self.process.stdin.flush()
        return self.hears()

    def hears(self) -> str:
        """Return the next line of the client, empty at its end."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().rstrip("\n")


@pytest.fixture(scope="module")
def made(ring2: Rig, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Calls]:
    calls = Calls(ring2, tmp_path_factory.mktemp("grpc"))
    yield calls
    for process in (calls.way, calls.service):
        process.terminate()
        process.wait(30)
    calls.reset(state="stopped")
    wait_for(lambda: not ring2.listens("10.210.5.1", 8443), "the end of the listener")
    ring2.broker.workspaces.pop("ws-5")
    ring2.namespace.ip("link", "del", "sawbr5")


@pytest.fixture
def calls(rig: Rig, made: Calls) -> Calls:
    """Return the rig with ``ws-5`` as new, and ring 2 ready for its calls."""
    made.reset()
    wait_for(lambda: made.once("Hello") == "hello ann", "ring 2 takes gRPC calls of ws-5")
    return made


@pytest.fixture
def talk(calls: Calls) -> Iterator[Callable[[], Talk]]:
    """Return how to open a call that goes on; every one is ended with the test."""
    opened: list[subprocess.Popen[bytes]] = []

    def begin() -> Talk:
        opened.append(calls.client("talk", "Talk"))
        talking = Talk(opened[-1])
        assert talking.says("one") == "hello one"
        return talking

    yield begin
    for process in opened:
        process.kill()
        process.communicate()


@pytest.mark.thorough
@pytest.mark.control("POL-05")
@pytest.mark.control("LIF-02")
@pytest.mark.parametrize(
    "change",
    [
        {"lease_expires_at": -1},
        {"lease_expires_at": 2},
        {"agent_retired": True},
        {"policy_digest": "ab" * 32, "released_digest": "ab" * 32},
        {"delegation_required": True},
    ],
    ids=["lease taken", "lease ends", "agent retired", "release withdrawn", "delegation missing"],
)
def test_an_open_grpc_call_ends_with_what_allowed_it(
    calls: Calls, talk: Callable[[], Talk], change: dict[str, Any]
) -> None:
    talking = talk()
    calls.reset(**change)
    assert talking.hears().startswith(ENDED)


@pytest.mark.control("POL-05")
def test_an_open_grpc_call_goes_on_while_the_lease_is_renewed(calls: Calls, talk: Callable[[], Talk]) -> None:
    talking, other = talk(), talk()
    before = calls.listener()
    calls.reset(lease_expires_at=100)
    calls.rig.settle(lease_expires_at=-1)  # of ws-1, another workspace
    assert calls.listener() == before
    assert (talking.says("two"), other.says("two")) == ("hello two", "hello two")
    calls.reset(lease_expires_at=-1)
    assert talking.hears().startswith(ENDED)
    assert other.hears().startswith(ENDED)


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("method", ["Trailers", "Refused", "Message"])
def test_a_credential_does_not_come_back_in_a_grpc_answer(calls: Calls, method: str) -> None:
    answer = calls.once(method)
    assert VALUE not in answer
    assert "*" * len(VALUE) in answer, answer


@pytest.mark.control("CRED-01")
def test_no_message_of_a_grpc_call_with_a_credential_is_held_back(calls: Calls, talk: Callable[[], Talk]) -> None:
    talking = talk()
    for end in (VALUE[:1], VALUE[:-1], "x"):
        assert talking.says(f"ends with {end}") == f"hello ends with {end}"
