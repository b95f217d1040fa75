"""Time offline: what signed policy grants a workspace while the perimeter cannot reach the broker, and what ends it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import pytest
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509 import load_pem_x509_certificate
from hypothesis import given, settings
from hypothesis import strategies as st

from saw.audit.events import EventFactory
from saw.gateway.clock import Clock
from saw.gateway.config import GatekeeperConfig, ResolverConfig, Ring2Config
from saw.gateway.contact import Contact
from saw.gateway.credentials import CredentialStore
from saw.gateway.errors import StateRefused
from saw.gateway.events import event_of
from saw.gateway.judge import Call, Judge, Verdict
from saw.gateway.link import BrokerLink
from saw.gateway.peer import PeerReader
from saw.gateway.releases import Release, TrustRoot
from saw.gateway.resolve import Resolver
from saw.gateway.spool import Spool
from saw.gateway.state import PerimeterState, StateFile, WorkspaceEntry
from saw.gateway.view import View, ViewKeeper, offline_granted
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.loader import load_governance, load_policy
from saw.policy.matcher import Matcher

START = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
GRANTING, PLAIN, OLDER = "aa" * 32, "bb" * 32, "cc" * 32
STALE_S, LEASE_S, OFFLINE_S = 90, 120, 300
POLICY = b"""
version: 1
network_policies:
  api:
    endpoints:
      - {host: api.example.com, port: 443, protocol: rest, rules: [{allow: {method: GET, path: "/v1/**"}}]}
    binaries: [{path: /usr/bin/curl}]
"""


def release(digest: str, offline: str) -> Release:
    text = f"schema: 1\nblueprint: {{name: coding, version: 1.0.0, owner: team-x}}\nlease: {{offline_ttl: {offline}}}\n"
    governance = load_governance(text.encode())
    return Release(
        digest, 2, "coding", START + timedelta(days=1), governance, Matcher.compile(load_policy(POLICY), governance)
    )


RELEASES = {GRANTING: release(GRANTING, f"{OFFLINE_S}s"), PLAIN: release(PLAIN, "0s"), OLDER: release(OLDER, "480s")}


def entry(number: int, digest: str, lease_s: float = LEASE_S, **fields: Any) -> WorkspaceEntry:
    base = WorkspaceEntry(
        id=f"ws-{number}", number=number, state="active", sponsor="mia", blueprint="coding", ring="stable",
        lease_expires_at=START + timedelta(seconds=lease_s), policy_digest=digest, released_digest=digest,
    )  # fmt: skip
    return msgspec.structs.replace(base, **fields)


class Perimeter:
    """A judge, the keeper of the broker's state and the contact, on clocks that a test moves."""

    def __init__(self, directory: Path, workspaces: Mapping[int, WorkspaceEntry]) -> None:
        self.directory = directory
        self.wall, self.running = START.timestamp(), 1000.0
        self.authority = Authority.create(directory / "ca", "saw.test", START - timedelta(days=1))
        self.workspaces = dict(workspaces)
        self.peers = {number: self._certificate(f"ws-{number}", one) for number, one in workspaces.items()}
        self.start()
        self.hear()

    def start(self) -> None:
        """Start the gatekeeper's parts anew, as after a restart; what is on disk is there."""
        cache = StateFile(self.directory).load()
        self.contact = Contact(self.directory, STALE_S, cache.saved_at if cache else None)
        not_before = self.contact.not_before.timestamp() if self.contact.not_before else 0.0
        self.clock = Clock(lambda: self.wall, lambda: self.running, 5.0, not_before=not_before)
        self.keeper = ViewKeeper(
            TrustRoot({}, 1), self.clock, StateFile(self.directory), lambda: self.running, STALE_S,
            ca_pem=self.authority.ca_pem, contact=self.contact,
        )  # fmt: skip
        if cache is not None:
            asyncio.run(self.keeper.restore(cache))
            self.keeper.view = msgspec.structs.replace(self.keeper.view, releases=RELEASES)
        self.judge = Judge(
            view=lambda: self.keeper.view, doubt=self.keeper.doubt, offline=self.keeper.offline_s, now=self.clock.now,
            peers=PeerReader(self.authority.ca_pem),
            resolver=Resolver(ResolverConfig(), lambda: 0.0, lambda _host: ["192.0.2.1"]),
            credentials=CredentialStore(self.directory), release_grace_s=600,
        )  # fmt: skip

    def _certificate(self, name: str, workspace: WorkspaceEntry) -> str:
        _, csr = new_key_and_csr(name)
        certificate = self.authority.issue_svid(csr, name, workspace.policy_digest or "", START, 600)
        digest = load_pem_x509_certificate(certificate).fingerprint(SHA256()).hex()
        return f'Hash={digest};Cert="{quote(certificate.decode(), safe="")}"'

    def hear(self) -> None:
        """Take in what the broker states now."""
        now = datetime.fromtimestamp(self.wall, UTC)
        state = PerimeterState(seq=self.keeper.view.seq + 2, now=now, workspaces=tuple(self.workspaces.values()))
        asyncio.run(self.keeper.take(state))
        self.keeper.view = msgspec.structs.replace(self.keeper.view, releases=RELEASES)

    def lose(self) -> None:
        """Ask the broker and find nobody."""
        asyncio.run(self.keeper.lost())

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.running += seconds

    def verdict(self, number: int = 1, path: str = "/v1/x") -> Verdict:
        call = Call(
            listener=str(number), peer=self.peers[number], scheme="https", authority="api.example.com", port="443",
            method="GET", target=path, binary="/usr/bin/curl", ancestors=(), request_id="r-1", headers={}, body=b"",
            body_complete=True,
        )  # fmt: skip
        return asyncio.run(self.judge.decide(call))

    def outcome(self, number: int = 1, path: str = "/v1/x") -> str:
        verdict = self.verdict(number, path)
        return "allow" if verdict.allowed else verdict.reason


@pytest.fixture
def perimeter(tmp_path: Path) -> Perimeter:
    return Perimeter(tmp_path, {1: entry(1, GRANTING), 2: entry(2, PLAIN), 3: entry(3, GRANTING)})


@pytest.mark.control("POL-05")
def test_a_granting_policy_goes_on_in_an_outage_for_its_time_and_another_one_ends_as_ever(perimeter: Perimeter) -> None:
    perimeter.pass_(STALE_S)
    perimeter.lose()
    assert [perimeter.outcome(number) for number in (1, 2)] == ["allow", "allow"]
    perimeter.pass_(1)
    assert [perimeter.outcome(number) for number in (1, 2)] == ["allow", "gatekeeper_stale"]
    perimeter.pass_(LEASE_S - STALE_S)
    assert [perimeter.outcome(number) for number in (1, 2)] == ["allow", "gatekeeper_stale"]
    perimeter.pass_(OFFLINE_S - LEASE_S + STALE_S - 1)
    assert perimeter.outcome() == "allow"
    perimeter.pass_(1)
    assert perimeter.outcome() == "gatekeeper_stale"


@pytest.mark.control("POL-05")
def test_a_lease_is_prolonged_by_no_more_than_the_grant(tmp_path: Path) -> None:
    perimeter = Perimeter(tmp_path, {1: entry(1, GRANTING, 10), 2: entry(2, PLAIN, 10)})
    perimeter.pass_(10)
    perimeter.lose()
    assert [perimeter.outcome(number) for number in (1, 2)] == ["allow", "lease_expired"]
    perimeter.pass_(OFFLINE_S - 1)
    assert perimeter.outcome() == "allow"
    perimeter.pass_(1)
    assert perimeter.outcome() == "lease_expired"


@pytest.mark.control("POL-05")
def test_while_the_broker_answers_a_lapsed_lease_denies_whatever_policy_grants(perimeter: Perimeter) -> None:
    perimeter.pass_(LEASE_S)
    perimeter.hear()
    assert perimeter.outcome() == "lease_expired"
    perimeter.lose()
    assert perimeter.outcome() == "allow"
    perimeter.contact.reached()
    assert perimeter.outcome() == "lease_expired", "an answer, whatever it is, is no outage"


@pytest.mark.control("LIF-02")
@pytest.mark.parametrize("state", ["quarantined", "stopped", "decommissioned", "attesting"])
def test_time_offline_never_overrides_a_kill(perimeter: Perimeter, state: Any) -> None:
    perimeter.workspaces[3] = entry(3, GRANTING, state=state)
    perimeter.hear()
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert [perimeter.outcome(number) for number in (1, 3)] == ["allow", "workspace_not_active"]
    perimeter.start()
    perimeter.lose()
    assert [perimeter.outcome(number) for number in (1, 3)] == ["allow", "workspace_not_active"]


@pytest.mark.control("LIF-02")
def test_a_kill_that_the_perimeter_could_not_hear_counts_with_the_first_answer(perimeter: Perimeter) -> None:
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert perimeter.outcome() == "allow"
    perimeter.workspaces[1] = entry(1, GRANTING, state="quarantined", lease_expires_at=None)
    perimeter.hear()
    assert perimeter.outcome() == "workspace_not_active"
    perimeter.lose()
    assert perimeter.outcome() == "workspace_not_active"


@pytest.mark.control("POL-05")
def test_a_lease_that_was_taken_away_is_not_prolonged(tmp_path: Path) -> None:
    perimeter = Perimeter(tmp_path, {1: entry(1, GRANTING), 2: entry(2, GRANTING, lease_expires_at=None)})
    perimeter.lose()
    assert [perimeter.outcome(number) for number in (1, 2)] == ["allow", "lease_expired"]


@pytest.mark.control("POL-05")
def test_a_clock_set_back_in_an_outage_ends_every_call_and_gains_no_second(perimeter: Perimeter) -> None:
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert perimeter.outcome() == "allow"
    perimeter.wall -= 3600
    assert perimeter.outcome() == "gatekeeper_stale"
    perimeter.wall += 3600 - 4  # within what a clock may be off
    assert perimeter.outcome() == "allow"
    perimeter.pass_(OFFLINE_S)
    assert perimeter.outcome() != "allow"


@pytest.mark.control("POL-05")
def test_a_restart_in_an_outage_neither_ends_time_offline_nor_starts_it_anew(perimeter: Perimeter) -> None:
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    perimeter.start()
    assert perimeter.outcome() == "lease_expired", "not asked yet: no outage is known"
    perimeter.lose()
    assert perimeter.outcome() == "allow"
    perimeter.pass_(OFFLINE_S - 60)
    perimeter.lose()
    assert perimeter.outcome() == "allow"
    perimeter.wall -= 200  # together with the restart: the moments of the outage that were seen are known
    perimeter.start()
    perimeter.lose()
    assert perimeter.outcome() == "gatekeeper_stale"
    perimeter.wall += 200
    assert perimeter.outcome() == "allow"
    perimeter.pass_(31)
    assert perimeter.outcome() != "allow"


@pytest.mark.control("POL-05")
def test_an_outage_that_cannot_be_kept_on_disk_grants_nothing(
    perimeter: Perimeter, caplog: pytest.LogCaptureFixture
) -> None:
    (perimeter.directory / "contact.json").mkdir()
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert perimeter.outcome() == "gatekeeper_stale"
    assert "cannot be kept" in caplog.text
    (perimeter.directory / "contact.json").rmdir()
    perimeter.lose()
    assert perimeter.outcome() == "allow"


def test_without_any_state_there_is_nothing_to_go_on_with(tmp_path: Path) -> None:
    contact = Contact(tmp_path, STALE_S, None)
    contact.lost(START)
    assert contact.offline_s(OFFLINE_S, START) == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.control("POL-05")
def test_only_the_release_that_is_given_now_and_runs_grants_time(perimeter: Perimeter) -> None:
    def granted(workspace: WorkspaceEntry, digest: str = GRANTING) -> int:
        view = View(1, {"ws-1": workspace}, RELEASES, {}, {})
        return offline_granted(view, "ws-1", digest)

    assert granted(entry(1, GRANTING)) == OFFLINE_S
    assert granted(entry(1, PLAIN), PLAIN) == 0
    assert granted(entry(1, GRANTING, released_digest=PLAIN)) == 0, "taken back by a newer release"
    assert granted(entry(1, PLAIN, released_digest=GRANTING)) == 0, "released, and not loaded"
    assert granted(entry(1, GRANTING), OLDER) == 0, "another one is attested"
    assert granted(entry(1, "dd" * 32), "dd" * 32) == 0, "not verified"
    assert offline_granted(View(1, {}, RELEASES, {}, {}), "ws-1", GRANTING) == 0
    perimeter.workspaces[1] = entry(1, GRANTING, released_digest=PLAIN, released_at=START)
    perimeter.hear()
    assert perimeter.outcome() == "allow", "the release before, for its own grace"
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert perimeter.outcome() == "gatekeeper_stale"


@pytest.mark.control("POL-04")
def test_offline_everything_else_is_judged_as_ever_and_the_event_says_so(perimeter: Perimeter) -> None:
    factory = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "u")

    def said(verdict: Verdict) -> object:
        return event_of(verdict, factory)["unmapped"]["saw"].get("offline")

    assert said(perimeter.verdict()) is None
    perimeter.pass_(LEASE_S)
    perimeter.lose()
    assert said(perimeter.verdict()) is True
    assert perimeter.outcome(path="/v2/x") == "method_or_path_not_allowed"
    approved = asyncio.run(perimeter.judge.decide_approved(perimeter.verdict().call, "ws-1", GRANTING, "rv-1"))
    assert (approved.allowed, approved.reason) == (False, "gatekeeper_stale"), "what people approved is not sent blind"
    perimeter.pass_(600 - LEASE_S)
    assert perimeter.outcome() == "no_identity", "the certificate's end is the last word"


@pytest.mark.control("POL-05")
@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["pass", "lose", "answer", "restart", "back"]), st.integers(1, 120)), max_size=12
    )
)
def test_whatever_happens_no_call_is_allowed_after_lease_and_grant(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    perimeter = Perimeter(tmp_path_factory.mktemp("any"), {1: entry(1, GRANTING), 2: entry(2, PLAIN)})
    passed = 0
    for what, seconds in steps:
        if what == "pass":
            perimeter.pass_(seconds)
            passed += seconds
        elif what == "lose":
            perimeter.lose()
        elif what == "answer":
            perimeter.contact.reached()
        elif what == "restart":
            perimeter.start()
        else:
            perimeter.wall -= seconds
        if passed >= LEASE_S + OFFLINE_S:
            assert perimeter.outcome(1) != "allow"
        if passed >= LEASE_S and not any(one == "restart" for one, _ in steps):
            assert perimeter.outcome(2) != "allow"


class Answers(httpx.AsyncBaseTransport):
    """The far end of the link: it answers, or is not there."""

    def __init__(self) -> None:
        self.status = 0
        self.content = b"{}"
        self.asked: list[tuple[str, str]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not self.status:
            raise httpx.ConnectError("nobody", request=request)
        self.asked.append((request.url.params["after"], request.url.params["wait"]))
        return httpx.Response(self.status, request=request, content=self.content)


def linked(perimeter: Perimeter, monkeypatch: pytest.MonkeyPatch) -> tuple[BrokerLink, Answers]:
    """Return a link of the perimeter, and its far end."""
    directory = perimeter.directory
    config = GatekeeperConfig(
        name="edge", broker_url="https://192.0.2.9:8443", ca_file=directory, cert_file=directory, key_file=directory,
        tuf_root_file=directory, ring2=Ring2Config(broker_address="192.0.2.9:8443"),
    )  # fmt: skip
    link = BrokerLink(config, perimeter.keeper, Spool(directory, "edge", 10))
    far = Answers()

    async def connected() -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=far, base_url=config.broker_url)

    monkeypatch.setattr(link, "_connected", connected)
    return link, far


@pytest.mark.control("POL-05")
def test_only_a_broker_that_is_not_there_is_an_outage(perimeter: Perimeter, monkeypatch: pytest.MonkeyPatch) -> None:
    link, far = linked(perimeter, monkeypatch)
    perimeter.pass_(LEASE_S)
    with pytest.raises(httpx.ConnectError):
        asyncio.run(link.poll_once())
    assert perimeter.outcome() == "allow"
    for status in (403, 500, 503):
        far.status = status
        with pytest.raises(StateRefused):
            asyncio.run(link.poll_once())
        assert perimeter.outcome() != "allow", status


def test_the_first_answer_after_a_restart_counts_even_where_nothing_has_changed(
    perimeter: Perimeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a raised band: what was kept is of fewer numbers, and the broker's register is as it was."""
    perimeter.hear()
    seq = perimeter.keeper.view.seq
    perimeter.start()
    link, far = linked(perimeter, monkeypatch)
    published: list[View] = []
    perimeter.keeper.changed = published.append
    perimeter.workspaces[251] = entry(251, PLAIN)
    stated = PerimeterState(
        seq=seq, now=datetime.fromtimestamp(perimeter.wall, UTC), workspaces=tuple(perimeter.workspaces.values())
    )
    far.status, far.content = 503, b""
    with pytest.raises(StateRefused):
        asyncio.run(link.poll_once())
    far.status, far.content = 200, msgspec.json.encode(stated)
    asyncio.run(link.poll_once())
    assert 251 in perimeter.keeper.view.open_numbers()
    assert [view.open_numbers() for view in published] == [(1, 2, 3, 251)]
    kept = StateFile(perimeter.directory).load()
    assert kept is not None
    assert "ws-251" in {one.id for one in kept.state.workspaces}
    asyncio.run(link.poll_once())
    assert far.asked == [("0", "0"), ("0", "0"), (str(seq), "10")]
    assert len(published) == 1, "nothing new"
