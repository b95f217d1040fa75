"""The order of ring 2's decision, without Envoy: doubt, certificate age, and that no input makes it raise or allow."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from hypothesis import given, settings
from hypothesis import strategies as st

from examples import examples
from saw.audit.events import EventFactory
from saw.gateway.app import read_call
from saw.gateway.config import ResolverConfig
from saw.gateway.credentials import CredentialStore
from saw.gateway.definitions import KeptDefinitions
from saw.gateway.events import event_of
from saw.gateway.judge import Call, Judge, Verdict, destination
from saw.gateway.mcp_exchange import Exchange
from saw.gateway.peer import PeerReader
from saw.gateway.releases import Release
from saw.gateway.resolve import Resolver
from saw.gateway.state import Grace, WorkspaceEntry
from saw.gateway.view import EMPTY, View, raise_floors, release_for
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher
from saw.policy.mcp_answers import Listed, definition_digest

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
DIGEST, OLDER = "aa" * 32, "bb" * 32
POLICY = b"""
version: 1
network_policies:
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "/v1/**"}}]}
    binaries: [{path: /usr/bin/curl}]
"""
GOVERNANCE = b"schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team-x}\n"


def release(digest: str = DIGEST, revision: int = 2, days: int = 1) -> Release:
    governance = load_governance(GOVERNANCE)
    matcher = Matcher.compile(load_policy(POLICY), governance)
    return Release(digest, revision, "coding", NOW + timedelta(days=days), governance, matcher)


def entry(**fields: Any) -> WorkspaceEntry:
    base = WorkspaceEntry(
        id="ws-1", number=1, state="active", sponsor="mia", blueprint="coding", ring="stable",
        lease_expires_at=NOW + timedelta(seconds=60), policy_digest=DIGEST, released_digest=DIGEST,
    )  # fmt: skip
    return msgspec.structs.replace(base, **fields)


def view(
    workspace: WorkspaceEntry, releases: Mapping[str, Release], grace: Grace | None = None, floor: int = 0
) -> View:
    return View(1, {"ws-1": workspace}, releases, {"ws-1": grace} if grace else {}, {"ws-1": floor})


class Bench:
    """A judge on one view, with a certificate to call with."""

    def __init__(self, directory: Path) -> None:
        self.now, self.doubt = NOW, ""
        self.view = view(entry(), {DIGEST: release()})
        authority = Authority.create(directory / "ca", "saw.test", NOW - timedelta(days=1))
        _, csr = new_key_and_csr("ws-1")
        certificate = authority.issue_svid(csr, "ws-1", DIGEST, NOW, 300)
        digest = load_pem_x509_certificate(certificate).fingerprint(SHA256()).hex()
        self.peer = f'Hash={digest};Cert="{quote(certificate.decode(), safe="")}"'
        self.judge = Judge(
            view=lambda: self.view, doubt=lambda _offline_s: self.doubt, offline=lambda _granted, _now: 0.0,
            now=lambda: self.now, peers=PeerReader(authority.ca_pem),
            resolver=Resolver(ResolverConfig(), lambda: 0.0, lambda _host: ["192.0.2.1"]),
            credentials=CredentialStore(directory), release_grace_s=60,
        )  # fmt: skip

    def outcome(self, **changes: Any) -> str:
        verdict = asyncio.run(self.judge.decide(msgspec.structs.replace(self.call(), **changes)))
        assert verdict.allowed == (verdict.dial is not None)
        return "allow" if verdict.allowed else verdict.reason

    def call(self) -> Call:
        return Call(
            listener="1", peer=self.peer, scheme="https", authority="api.example.com", port="443", method="GET",
            target="/v1/x", binary="/usr/bin/curl", ancestors=(), request_id="r-1", headers={}, body=b"",
            body_complete=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("judge")


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.control("ID-04")
@pytest.mark.control("DEL-01")
def test_a_retired_agent_calls_nothing_whether_or_not_delegations_are_wanted(bench: Bench) -> None:
    assert bench.outcome() == "allow"
    bench.view = view(entry(agent="agent-1", agent_retired=True), {DIGEST: release()})
    assert bench.outcome() == "agent_retired"
    bench.view = view(entry(agent="agent-2"), {DIGEST: release()})
    assert bench.outcome() == "allow"


@pytest.mark.control("POL-04")
def test_the_certificate_is_checked_on_every_call_and_not_only_at_the_handshake(bench: Bench) -> None:
    assert bench.outcome() == "allow"
    bench.now = NOW + timedelta(seconds=299)
    bench.view = view(entry(lease_expires_at=NOW + timedelta(hours=1)), {DIGEST: release()})
    assert bench.outcome() == "allow"
    bench.now = NOW + timedelta(seconds=301)
    assert bench.outcome() == "no_identity"


@pytest.mark.control("POL-04")
@pytest.mark.parametrize(
    "forge",
    [
        lambda _peer: "",
        lambda peer: peer + "," + peer,
        lambda peer: peer.replace("Hash=", "Hash=0", 1),
        lambda peer: "Hash=" + "0" * 64 + peer[69:],
        lambda peer: peer.replace("Cert=", "URI="),
        lambda peer: f"By=spiffe://saw.example/perimeter/edge;{peer},{peer}",
        lambda peer: peer[:200] + peer[210:],
    ],
)
def test_a_peer_that_is_not_one_good_certificate_is_no_identity(bench: Bench, forge: Any) -> None:
    assert bench.outcome(peer=forge(bench.peer)) == "no_identity"
    assert bench.outcome() == "allow"


@pytest.mark.control("POL-04")
def test_the_uri_of_ring_2_itself_in_the_peer_header_changes_nothing(bench: Bench) -> None:
    assert bench.outcome(peer=f"By=spiffe://saw.example/perimeter/edge;{bench.peer}") == "allow"


@pytest.mark.control("POL-05")
def test_doubt_about_state_or_clock_refuses(bench: Bench) -> None:
    bench.doubt = "the broker has not answered for 99 s"
    assert bench.outcome() == "gatekeeper_stale"
    bench.doubt = ""
    assert bench.outcome() == "allow"
    bench.view = EMPTY
    assert bench.outcome() == "no_identity"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"port": "8443"}, "host_not_allowed"),
        ({"port": "x"}, "not_canonical"),
        ({"port": "٤٤٣"}, "not_canonical"),
        ({"authority": "api.example.com:8443"}, "not_canonical"),
        ({"scheme": "ftp"}, "not_canonical"),
        ({"scheme": "http"}, "host_not_allowed"),
        ({"listener": ""}, "no_identity"),
        ({"listener": "1,1"}, "no_identity"),
        ({"method": "CONNECT"}, "method_or_path_not_allowed"),
        ({"method": "get"}, "not_canonical"),
        ({"method": "Get"}, "not_canonical"),
        ({"target": ""}, "not_canonical"),
        ({"headers": {"x-http-method-override": "DELETE"}}, "method_or_path_not_allowed"),
    ],
)
def test_forms_that_could_be_read_in_two_ways_are_refused(bench: Bench, changes: dict[str, Any], reason: str) -> None:
    assert bench.outcome(**changes) == reason


MODELS = b"""
inference:
  routes:
    - {alias: inference.local, models: ["demo-*"], upstream: "https://models.example.com/v1", aliases: {fast: demo-big}}
actions:
  - {match: {host: api.example.com, method: [POST], path: "/v1/**"}, class: review, reviewers: {group: team-x, quorum: 1}}
"""


@pytest.mark.control("INF-01")
@pytest.mark.control("POL-04")
def test_no_method_in_small_letters_goes_round_aliases_or_reviews(bench: Bench) -> None:
    governance = load_governance(GOVERNANCE + MODELS)
    matcher = Matcher.compile(load_policy(POLICY.replace(b"method: GET", b'method: "*"')), governance)
    served = Release(DIGEST, 2, "coding", NOW + timedelta(days=1), governance, matcher)
    bench.view = view(entry(), {DIGEST: served})
    asks = {
        "authority": "inference.local", "target": "/v1/chat/completions", "body": b'{"model": "fast", "messages": []}',
        "headers": {"content-type": "application/json"},
    }  # fmt: skip
    verdict = asyncio.run(bench.judge.decide(msgspec.structs.replace(bench.call(), method="POST", **asks)))
    assert verdict.dial is not None, verdict
    assert verdict.dial.edit is not None, "the model that the name stands for is written into the call"
    assert bench.outcome(method="POST") == "review_required"
    for method in ("post", "Post", "pOST"):
        assert bench.outcome(method=method, **asks) == "not_canonical"
        assert bench.outcome(method=method) == "not_canonical"
        call = msgspec.structs.replace(bench.call(), method=method)
        verdict = asyncio.run(bench.judge.decide_approved(call, "ws-1", DIGEST, "rv-1"))
        assert (verdict.allowed, verdict.reason) == (False, "not_canonical")
    assert verdict.cure == "send it as POST"


def test_authorities() -> None:
    call = Call("1", "", "https", "", "", "GET", "/", "", (), "", {}, b"", body_complete=True)

    def parsed(authority: str, port: str = "") -> tuple[str, int] | None:
        return destination(msgspec.structs.replace(call, authority=authority, port=port))

    assert parsed("API.example.com") == ("api.example.com", 443)
    assert parsed("a:8080", "8080") == ("a", 8080)
    assert parsed("[2001:db8::1]:8080") == ("[2001:db8::1]", 8080)
    for authority in ("", "a b", "a@b", "a/b", "a:0", "a:99999", "a.", "a:80:80", "[::1", "a\\b", "ä.example.com"):
        assert parsed(authority) is None, authority


@pytest.mark.control("RUN-01")
@pytest.mark.parametrize(
    ("kind", "complete"), [("application/json", True), ("application/grpc", False), ("Application/GRPC+x", False)]
)
def test_the_body_of_a_grpc_call_counts_as_not_seen(kind: str, complete: bool) -> None:
    assert read_call([(b"content-type", kind.encode())], b"").body_complete is complete
    twice = [(b"content-type", kind.encode()), (b"content-type", b"application/json")]
    assert read_call(twice, b"").body_complete is complete
    partial = (b"x-envoy-auth-partial-body", b"true")
    assert read_call([(b"content-type", kind.encode()), partial], b"").body_complete is False


@settings(max_examples=examples(200), deadline=None)
@given(
    headers=st.lists(
        st.tuples(
            st.sampled_from(
                [b"host", b"x-saw-listener", b"x-saw-target", b"x-saw-method", b"x-saw-port", b"x-saw-scheme",
                 b"x-saw-binary", b"x-forwarded-client-cert", b"x-request-id", b"x-envoy-auth-partial-body"]
            ),
            st.binary(max_size=40),
        )
    ),
    body=st.binary(max_size=40),
)  # fmt: skip
def test_no_input_is_allowed_without_a_certificate_and_each_has_an_event(
    directory: Path, headers: list[tuple[bytes, bytes]], body: bytes
) -> None:
    judge = Judge(
        view=lambda: view(entry(), {}), doubt=lambda _offline_s: "", offline=lambda _granted, _now: 0.0,
        now=lambda: NOW, peers=PeerReader(b""),
        resolver=Resolver(ResolverConfig(), lambda: 0.0, lambda _host: []),
        credentials=CredentialStore(directory), release_grace_s=60,
    )  # fmt: skip
    verdict = asyncio.run(judge.decide(read_call(headers, body)))
    assert (verdict.allowed, verdict.reason) == (False, "no_identity")
    event_of(verdict, EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u"))


def test_the_release_before_counts_within_its_grace_only() -> None:
    releases = {DIGEST: release(), OLDER: release(OLDER, 1)}
    workspace = entry(policy_digest=OLDER)
    grace = Grace(DIGEST, OLDER, NOW)

    def outcome(seconds: int, known: Grace | None = grace) -> str:
        found = release_for(view(workspace, releases, known, 2), workspace, OLDER, NOW + timedelta(seconds=seconds), 60)
        return found if isinstance(found, str) else found.digest

    assert outcome(60) == OLDER
    assert outcome(61).startswith("not_released")
    assert outcome(0, None).startswith("not_released")
    assert outcome(0, Grace(DIGEST, "cc" * 32, NOW)).startswith("not_released")


@pytest.mark.control("POL-04")
def test_a_release_that_expired_is_of_another_blueprint_or_older_than_the_floor_judges_nothing() -> None:
    workspace = entry()

    def outcome(found: Release, floor: int = 0, who: WorkspaceEntry = workspace) -> str:
        result = release_for(view(who, {DIGEST: found}, floor=floor), who, DIGEST, NOW, 60)
        return result.split(":")[0] if isinstance(result, str) else "ok"

    assert outcome(release(), 2) == "ok"
    assert outcome(release(), 3) == "not_released"
    assert outcome(release(days=-1)) == "not_released"
    assert outcome(release(), who=entry(blueprint="other")) == "not_released"
    assert outcome(release(), who=entry(policy_digest=None)) == "digest_mismatch"


@pytest.mark.control("POL-04")
def test_workspaces_of_one_ring_may_be_held_on_an_earlier_release_but_none_that_ran_the_newer_goes_back() -> None:
    older, newer = release(OLDER, 1), release(DIGEST, 2)
    releases = {OLDER: older, DIGEST: newer}
    ahead, held = entry(), entry(id="ws-2", number=2, policy_digest=OLDER, released_digest=OLDER)
    floors = raise_floors({}, {"ws-1": ahead, "ws-2": held}, releases)
    assert floors == {"ws-1": 2, "ws-2": 1}
    seen = View(1, {"ws-1": ahead, "ws-2": held}, releases, {}, floors)
    assert release_for(seen, held, OLDER, NOW, 60) == older
    back = entry(policy_digest=OLDER, released_digest=OLDER)
    assert str(release_for(seen, back, OLDER, NOW, 60)).startswith("not_released")
    # What a workspace was merely offered does not bind it: a halt may take the offer back.
    assert raise_floors({}, {"ws-2": entry(id="ws-2", policy_digest=OLDER)}, releases) == {}


TOOLS_POLICY = b"""
version: 1
network_policies:
  tools:
    endpoints:
      - {host: api.example.com, port: 443, path: /mcp, protocol: mcp, mcp: {allow_all_known_mcp_methods: true}, rules: [
          {allow: {method: tools/call, tool: search_web}}, {allow: {method: tools/call, tool: read_page}}]}
    binaries: [{path: /usr/bin/curl}]
"""
TOOLS = (
    GOVERNANCE
    + b"""
mcp:
  servers:
    web: {transport: http, url: "https://api.example.com/mcp", tools: {
      search_web: {class: auto, definition: "sha256:%s"}, read_page: {class: auto}}}
actions: [{match: {host: api.example.com, mcp: {}}, class: auto}]
"""
    % (b"ab" * 32)
)


@pytest.mark.control("POL-04")
@pytest.mark.parametrize("approved", [False, True])
def test_a_call_of_a_pinned_tool_counts_by_what_any_replica_was_told_of_it(
    bench: Bench, tmp_path: Path, approved: bool
) -> None:
    governance = load_governance(TOOLS)
    matcher = Matcher.compile(load_policy(TOOLS_POLICY), governance)
    bench.view = view(entry(), {DIGEST: Release(DIGEST, 2, "coding", NOW + timedelta(days=1), governance, matcher)})
    tools = {name: tool for server in governance.mcp.servers.values() for name, tool in server.tools.items()}

    def outcome(tool: str) -> str:
        asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": tool, "arguments": {}}}
        call = msgspec.structs.replace(
            bench.call(), method="POST", target="/mcp", body=msgspec.json.encode(asked),
            headers={"content-type": "application/json"},
        )  # fmt: skip
        deciding = bench.judge.decide_approved(call, "ws-1", DIGEST, "rv-1") if approved else bench.judge.decide(call)
        verdict = asyncio.run(deciding)
        assert verdict.allowed == (not verdict.reason), verdict.detail
        return verdict.reason

    assert outcome("search_web") == "gatekeeper_unavailable", "nothing is kept of definitions here"
    assert outcome("read_page") == ""
    here, other = (KeptDefinitions(tmp_path / "definitions.db", lambda: NOW) for _ in range(2))
    bench.judge._definitions = here
    assert outcome("search_web") == ""
    other.of("ws-1", "web").note(Listed(1, 0, frozenset(), {"search_web": "sha256:" + "cd" * 32}), tools)
    assert (outcome("search_web"), outcome("read_page")) == ("definition_changed", "")
    other.of("ws-1", "web").note(Listed(1, 1, frozenset({"search_web"}), {}), tools)
    assert outcome("search_web") == ""
    other.close()
    here.close()
    assert (outcome("search_web"), outcome("read_page")) == ("gatekeeper_unavailable", ""), "what cannot be read"


TWO_PROGRAMS = (
    TOOLS_POLICY
    + b"""
  fewer:
    endpoints:
      - {host: api.example.com, port: 443, path: /mcp, protocol: mcp, mcp: {allow_all_known_mcp_methods: true}, rules: [
          {allow: {method: tools/call, tool: read_page}}]}
    binaries: [{path: /usr/bin/wget}]
"""
)


@pytest.mark.control("POL-04")
def test_a_list_by_a_program_with_fewer_tools_does_not_let_the_others_pass(bench: Bench, tmp_path: Path) -> None:
    """Which program asks is what the workspace says, so it must not undo what was found for another one."""
    pinned = b'read_page: {class: auto, definition: "%s"}' % definition_digest({"name": "read_page"}).encode()
    governance = load_governance(TOOLS.replace(b"read_page: {class: auto}", pinned))
    matcher = Matcher.compile(load_policy(TWO_PROGRAMS), governance)
    bench.view = view(entry(), {DIGEST: Release(DIGEST, 2, "coding", NOW + timedelta(days=1), governance, matcher)})
    bench.judge._definitions = KeptDefinitions(tmp_path / "definitions.db", lambda: NOW)

    def judged(binary: str, method: str, params: dict[str, Any]) -> Verdict:
        asked = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        call = msgspec.structs.replace(
            bench.call(), method="POST", target="/mcp", body=msgspec.json.encode(asked), binary=binary,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        return asyncio.run(bench.judge.decide(call))

    def shown(binary: str) -> list[str]:
        """Have the server list both tools, one of them changed, to a program; return what it is shown."""
        verdict = judged(binary, "tools/list", {})
        exchange = Exchange({(int, 1): "tools/list"}, {}, lambda: bench.judge.rules(verdict), lambda _: None)
        tools = [{"name": "search_web", "description": "changed"}, {"name": "read_page"}]
        told = json.loads(exchange.whole(json.dumps({"jsonrpc": "2.0", "id": 1, "result": {"tools": tools}}).encode()))
        return [tool["name"] for tool in told["result"]["tools"]]

    def searching(binary: str = "/usr/bin/curl") -> str:
        return judged(binary, "tools/call", {"name": "search_web", "arguments": {}}).reason

    assert (searching("/usr/bin/wget"), searching()) == ("operation_not_allowed", "")
    assert (shown("/usr/bin/curl"), searching()) == (["read_page"], "definition_changed")
    assert (shown("/usr/bin/wget"), searching()) == (["read_page"], "definition_changed")
