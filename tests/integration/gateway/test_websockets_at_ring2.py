"""WebSockets through ring 2, opened as ring 1 would or as root in the VM could: decided, held to their frames, ended in time."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import websocket_ends
from ring2_policy import STREAMS, STREAMS_GOVERNANCE
from ring2_rig import ENVOY, FAR, SECRET, Rig, wait_for
from websocket_ends import BINARY, CLOSE, TEXT, VIOLATION, Service, Stream, frame

from saw.identity.statement import sign_statement
from saw.identity.x509 import new_key_and_csr
from saw.policy.delegation import STATEMENT_TYPE, Approval, Delegation, Resource
from saw.runtime.attestd_svid import secret_discovery
from saw.runtime.ring1_clusters import clusters
from saw.runtime.ring1_settings import API, Ring1

HELLO = frame(TEXT, b"hello", masked=False)
HOST = "api.example.com:9443"


class Streams:
    """Workspace ``ws-4``, which alone runs a policy with WebSockets, and the service that it may open them at."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        rig.namespace.ip("link", "add", "sawbr4", "type", "bridge")
        rig.namespace.ip("addr", "add", "10.210.4.1/30", "dev", "sawbr4")
        rig.namespace.ip("link", "set", "sawbr4", "up")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(rig.directory / "far.pem", rig.directory / "far.key")
        self.service = Service(rig.listen(FAR, 9443), context)
        token = rig.directory / "credentials" / "room-token"
        token.touch(0o600)
        token.write_text(SECRET["api-token"])
        self.digest, self.bundle = rig.signer.release(1, policy=STREAMS, governance=STREAMS_GOVERNANCE)

    def reset(self, **fields: Any) -> None:
        """Have ``ws-4`` active under a lease, but for ``fields``, and wait until ring 2 knows it."""
        self.rig.broker.releases = {self.rig.digest: self.rig.bundle, self.digest: self.bundle}
        given = {"number": 4, "state": "active", "sponsor": "mia@example.com", "blueprint": "coding", "ring": "stable",
                 "lease_expires_at": 120, "policy_digest": self.digest, "released_digest": self.digest, "svid_sha256": None,
                 "agent": "agent-4", "delegations": [], "delegation_required": False,
                 "agent_retired": False}  # fmt: skip
        self.rig.broker.put("ws-4", **{**given, **fields})
        self.rig.settled()

    def open(
        self, path: str = "/rooms/1", *headers: str, number: int = 4, workspace: str = "ws-4", host: str = HOST
    ) -> tuple[socket.socket, str, bytes]:
        """Ask ring 2 for a WebSocket; return the connection, the status and what came behind the answer's head."""
        digest = self.digest if workspace == "ws-4" else self.rig.digest
        context = self.rig.svid(workspace, digest=digest)
        raw = self.rig.connect(f"10.210.{number}.1", 8443)
        sock = context.wrap_socket(raw, server_hostname="ring2.saw.internal")
        sock.settimeout(20)
        common = ("x-saw-ring1: allow", "x-saw-binary: /usr/bin/curl", *headers)
        sock.sendall(websocket_ends.request(path, host, *common))
        head, rest = websocket_ends.read_head(sock)
        return sock, head.split(b" ")[1].decode(), rest

    def accepted(self, path: str = "/rooms/1", *headers: str) -> tuple[socket.socket, Stream]:
        """Open a WebSocket, take the greeting, and return the connection and the service's side of it."""
        before = len(self.service.streams)
        sock, status, rest = self.open(path, *headers)
        assert status == "101"
        while len(rest) < len(HELLO):
            rest += sock.recv(65536)
        assert rest == HELLO
        wait_for(lambda: len(self.service.streams) > before, "the WebSocket at the service")
        return sock, self.service.streams[-1]


def ended(sock: socket.socket) -> bool:
    """Return whether the connection ends, however, before its bound."""
    try:
        while sock.recv(65536):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.fixture(scope="module")
def made(ring2: Rig) -> Iterator[Streams]:
    streams = Streams(ring2)
    yield streams
    streams.service.close()
    streams.reset(state="stopped")
    wait_for(lambda: not ring2.listens("10.210.4.1", 8443), "the end of the listener")
    ring2.broker.workspaces.pop("ws-4")
    ring2.namespace.ip("link", "del", "sawbr4")


@pytest.fixture
def streams(rig: Rig, made: Streams) -> Streams:
    """Return the rig with ``ws-4`` as new, and ring 2 ready for its WebSockets."""
    made.reset()

    def ready() -> bool:
        try:
            sock, status, _ = made.open()
        except OSError:
            return False
        sock.close()
        return status == "101"

    wait_for(ready, "ring 2 takes WebSockets of ws-4")
    return made


@pytest.mark.control("CRED-01")
@pytest.mark.control("POL-04")
def test_an_allowed_websocket_is_opened_with_the_credential_and_carries_text(streams: Streams) -> None:
    before = len(opening_events(streams.rig))
    sock, stream = streams.accepted("/rooms/1", "sec-websocket-extensions: permessage-deflate")
    sent = frame(TEXT, b"a" * 200_000)
    sock.sendall(sent)
    wait_for(lambda: stream.data == sent, "the message at the service")
    assert stream.header("x-api-key") == SECRET["api-token"]
    assert stream.header("sec-websocket-extensions") is None
    assert [line for line in stream.head.lower().split("\r\n") if line.startswith(("x-saw-", "x-envoy-"))] == []
    sock.close()
    wait_for(lambda: stream.ended, "the end at the service")
    wait_for(lambda: opening_events(streams.rig)[before:], "the event at the broker")
    detail = opening_events(streams.rig)[-1]
    assert (detail["upgrade"], detail["frames"], detail["verdict"]) == ("websocket", "text", "allow")


def opening_events(rig: Rig) -> list[dict[str, Any]]:
    """Return what the broker was told about requests that asked for a WebSocket."""
    details = [item.event["unmapped"]["saw"] for item in rig.broker.events if "http_request" in item.event]
    return [detail for detail in details if detail.get("upgrade")]


@pytest.mark.control("CRED-01")
def test_a_credential_that_comes_back_in_a_message_is_starred_and_no_message_is_held_back(streams: Streams) -> None:
    secret = SECRET["api-token"]
    streams.service.greeting = lambda stream: f"{stream.header('x-api-key')} ends with {secret[:4]}"
    try:
        sock, status, rest = streams.open()
        wanted = frame(TEXT, f"{'*' * len(secret)} ends with {secret[:4]}".encode(), masked=False)
        while len(rest) < len(wanted):
            rest += sock.recv(65536)
    finally:
        streams.service.greeting = lambda _: "hello"
    sock.close()
    assert (status, rest) == ("101", wanted)


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    ("path", "passes", "refused"),
    [
        ("/rooms/1", frame(TEXT, b"in"), frame(BINARY, b"out")),
        ("/rooms/1", b"", b"GET /rooms/../admin HTTP/1.1\r\nhost: api.example.com\r\n\r\n"),
        ("/feed", b"", frame(TEXT, b"out")),
    ],
    ids=["binary", "second request", "text where none may be sent"],
)
def test_a_broken_ring_1_cannot_send_what_policy_does_not_let_it(
    streams: Streams, path: str, passes: bytes, refused: bytes
) -> None:
    sock, stream = streams.accepted(path, "x-saw-frames: any")
    sock.sendall(passes + refused + frame(TEXT, b"later"))
    assert sock.recv(65536) == frame(CLOSE, b"\x03\xf0", masked=False)
    assert ended(sock)
    assert stream.data == passes + VIOLATION


@pytest.mark.control("POL-04")
def test_no_other_websocket_is_opened(streams: Streams) -> None:
    before = len(streams.service.streams)
    for path, host in (
        ("/v1/things", "api.example.com"),
        ("/rooms/../feed", HOST),
        ("/feed", "unlisted.example.com:9443"),
    ):
        sock, status, _ = streams.open(path, host=host)
        sock.close()
        assert (path, status) == (path, "403")
    for workspace, number in (("ws-1", 1), ("ws-1", 4)):
        sock, status, _ = streams.open(workspace=workspace, number=number)
        sock.close()
        assert (workspace, number, status) == (workspace, number, "403")
    assert len(streams.service.streams) == before
    assert streams.rig.call(target="/feed", host=HOST, context=streams.rig.svid("ws-4", digest=streams.digest), number=4
                            ).outcome == (403, "method_or_path_not_allowed")  # fmt: skip


@pytest.mark.control("POL-04")
def test_nothing_is_sent_to_a_service_that_does_not_open_the_websocket(streams: Streams) -> None:
    before = len(streams.service.streams)
    sock, status, _ = streams.open("/plain/1")
    assert status == "502"
    assert ended(sock)
    wait_for(
        lambda: len(streams.service.streams) > before and streams.service.streams[-1].ended, "the end at the service"
    )
    assert streams.service.streams[-1].data == b""


@pytest.mark.control("POL-04")
def test_over_http_2_as_ring_1_sends_it_all_of_this_holds(streams: Streams, tmp_path: Path) -> None:
    with http_2(streams, tmp_path) as connect:
        before = len(streams.service.streams)
        sock, status, rest = connect("/rooms/1")
        assert status == "101"
        while len(rest) < len(HELLO):
            rest += sock.recv(65536)
        passes = frame(TEXT, b"in")
        sock.sendall(passes + frame(BINARY, b"out"))
        assert sock.recv(65536) == frame(CLOSE, b"\x03\xf0", masked=False)
        assert ended(sock)
        assert streams.service.streams[before].data == passes + VIOLATION
        sock, status, _ = connect("/plain/1")
        assert (status, ended(sock), streams.service.streams[before + 1].data) == ("502", True, b"")
        for path in ("/rooms/../feed", "/elsewhere/../plain"):
            sock, status, _ = connect(path)
            sock.close()
            assert status == "403"


@contextlib.contextmanager
def http_2(streams: Streams, directory: Path) -> Iterator[Callable[[str], tuple[socket.socket, str, bytes]]]:
    """Run an Envoy that brings WebSockets to ring 2 the way ring 1's does, and yield how to open one through it."""
    rig = streams.rig
    certificate, key = rig.svid_files("ws-4", digest=streams.digest)
    (directory / "sds.json").write_bytes(secret_discovery(certificate.read_text(), key.read_text()))
    settings = Ring1(
        ring2_address="10.210.4.1",
        ring2_port=8443,
        sds_file=directory / "sds.json",
        ca_file=rig.directory / "ca" / "ca.pem",
    )
    manager = {
        "@type": f"{API}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "client",
        "upgrade_configs": [{"upgrade_type": "websocket"}],
        "normalize_path": False,
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "ring2", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "envoy.filters.http.router",
                "typed_config": {"@type": f"{API}.extensions.filters.http.router.v3.Router"},
            }
        ],
    }
    listener = {
        "name": "client",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": 7000}},
        "filter_chains": [
            {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}]}
        ],
    }
    ring2 = next(cluster for cluster in clusters(settings, "test") if cluster["name"] == "ring2")
    config = {"node": {"id": "c", "cluster": "c"}, "static_resources": {"listeners": [listener], "clusters": [ring2]}}
    (directory / "client.json").write_text(json.dumps(config))
    with (directory / "client.log").open("wb") as log:
        command = [str(ENVOY), "-c", str(directory / "client.json"), "--disable-hot-restart", "--concurrency", "1"]
        envoy = rig.namespace.popen(*command, "-l", "warning", stdout=log, stderr=log)

    def connect(path: str) -> tuple[socket.socket, str, bytes]:
        sock = rig.connect("127.0.0.1", 7000)
        sock.settimeout(20)
        sock.sendall(websocket_ends.request(path, HOST, "x-saw-ring1: allow", "x-saw-binary: /usr/bin/curl"))
        head, rest = websocket_ends.read_head(sock)
        return sock, head.split(b" ")[1].decode() if head else "none", rest

    def ready() -> bool:
        try:
            sock, status, _ = connect("/rooms/1")
        except OSError:
            return False
        sock.close()
        return status == "101"

    try:
        wait_for(ready, "the way through HTTP/2")
        yield connect
    finally:
        envoy.terminate()
        envoy.wait(10)


@pytest.mark.thorough
@pytest.mark.control("POL-05")
@pytest.mark.control("LIF-02")
@pytest.mark.parametrize(
    "change",
    [
        {"lease_expires_at": -1},
        {"lease_expires_at": 2},
        {"state": "quarantined"},
        {"agent_retired": True},
        {"policy_digest": "ab" * 32, "released_digest": "ab" * 32},
    ],
)
def test_a_websocket_ends_with_what_allowed_it(streams: Streams, change: dict[str, Any]) -> None:
    sock, stream = streams.accepted()
    streams.rig.broker.put("ws-4", **change)
    assert ended(sock)
    wait_for(lambda: stream.ended, "the end at the service")


def handed(rig: Rig, approval: Approval, *methods: str) -> str:
    now = datetime.now(UTC)
    key, csr = new_key_and_csr("broker statements")
    record = Delegation(
        format="saw-delegation/1", id="dlg-4", parent="", sponsor="mia@example.com", workspace="ws-4", agent="agent-4",
        task="chat", not_before=now - timedelta(minutes=1), expires=now + timedelta(hours=1), approval=approval,
        resources=(Resource(host="api.example.com", ports=(9443,), methods=methods, paths=("/**",)),),
    )  # fmt: skip
    certificate = rig.authority.issue_signer(csr, "broker", now, timedelta(days=20))
    return sign_statement(msgspec.json.encode(record), STATEMENT_TYPE, key, certificate)


@pytest.mark.control("DEL-01")
@pytest.mark.parametrize(
    ("approval", "methods", "path", "status"),
    [
        ("policy", (), "/rooms/1", "101"),
        ("policy", ("GET", "WEBSOCKET_TEXT"), "/rooms/1", "101"),
        ("policy", ("GET",), "/rooms/1", "403"),
        ("review", (), "/rooms/1", "403"),
        ("read-only", (), "/rooms/1", "403"),
        ("read-only", ("GET",), "/feed", "101"),
    ],
)
def test_a_delegation_covers_opening_it_and_what_may_be_sent(
    streams: Streams, approval: Approval, methods: tuple[str, ...], path: str, status: str
) -> None:
    streams.reset(delegations=[handed(streams.rig, approval, *methods)], delegation_required=True)
    outcome: list[str] = []

    def settled() -> bool:
        try:
            sock, found, _ = streams.open(path)
        except OSError:
            return False
        sock.close()
        outcome.append(found)
        return found == status

    wait_for(settled, f"{status} in place of {outcome}")


@pytest.mark.thorough
@pytest.mark.control("DEL-01")
def test_a_websocket_ends_when_its_delegation_is_taken_back(streams: Streams) -> None:
    before, _ = streams.accepted()
    streams.reset(delegations=[handed(streams.rig, "policy")], delegation_required=True)
    assert ended(before), "the listener that knew of no delegation is gone"
    sock, stream = streams.accepted()
    streams.rig.broker.put("ws-4", delegations=[])
    assert ended(sock)
    wait_for(lambda: stream.ended, "the end at the service")
