"""Credentials out of a vault: each call's own, those of now, and nothing while the vault is away."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "secrets"))

from vault_far_end import ROOT_TOKEN, Contract

from saw.errors import ConfigError
from saw.gateway import credential_sources
from saw.gateway.config import CredentialVault, load_config
from saw.gateway.credential_sources import READS_AT_ONCE, READS_WAITING, VaultSource
from saw.gateway.credentials import CredentialStore
from saw.gateway.errors import CredentialUnavailable
from saw.policy.governance import Credential, Inject
from saw.secrets.vault_settings import AppRole

SECRET = "s3cret-of-mia"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Contract]:
    far = Contract(tmp_path_factory.mktemp("vault"))
    yield far
    far.close()


@pytest.fixture
def far(server: Contract) -> Contract:
    server.clear()
    put(server, "git/mia", {"value": SECRET, "other": "another entry"})
    return server


def put(far: Contract, name: str, data: dict[str, Any]) -> None:
    far.held[name] = [*far.held.get(name, []), data]


class Bench:
    """A gatekeeper's credentials with a vault; ``now`` is its clock, seconds."""

    def __init__(self, far: Contract, directory: Path, **more: Any) -> None:
        self.now = 1000.0
        self.token = directory / "token"
        self.token.write_text(f"{ROOT_TOKEN}\n")
        self.token.chmod(0o600)
        told = {"url": far.url, "ca_file": str(far.ca_file), "token_file": str(self.token), "timeout_s": 5.0} | more
        self.source = VaultSource(CredentialVault(**told), lambda: self.now)
        self.store = CredentialStore(directory, vault=self.source)

    def sent(self, ref: str = "vault:secret/git/{sponsor}", sponsor: str = "mia") -> str:
        wanted = Credential(id="git-token", ref=ref, inject=Inject(header="Authorization", format="Bearer {secret}"))
        found = asyncio.run(self.store.injection(wanted, {"sponsor": sponsor, "workspace": "ws-1"}))
        return found.headers[0][1].removeprefix("Bearer ")

    def refused(self, **more: str) -> str:
        with pytest.raises(CredentialUnavailable) as caught:
            self.sent(**more)
        assert SECRET not in str(caught.value)
        return caught.value.message


Make = Callable[..., Bench]


@pytest.fixture
def bench(far: Contract, tmp_path: Path) -> Iterator[Make]:
    made: list[Bench] = []

    def make(**more: Any) -> Bench:
        made.append(Bench(far, tmp_path, **more))
        return made[-1]

    yield make
    for one in made:
        one.source.close()


@pytest.mark.control("CRED-01")
def test_a_secret_of_the_callers_sponsor_is_read_from_the_vault(bench: Make) -> None:
    assert bench().sent() == SECRET
    assert bench().sent(ref="vault:secret/git/{sponsor}#other") == "another entry"


def test_what_lies_beside_the_wanted_entry_may_be_no_text(bench: Make, far: Contract) -> None:
    put(far, "git/mia", {"value": SECRET, "port": 5432, "tags": ["a"], "none": None})
    assert bench().sent() == SECRET
    assert "has no entry none" in bench().refused(ref="vault:secret/git/{sponsor}#none")


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize("sponsor", ["noa", "mia/../mia", "../git/mia", "mia%2F", "mia?version=1", "mia#", "", "Mia"])
def test_no_name_of_a_sponsor_leads_to_the_secret_of_another(bench: Make, sponsor: str) -> None:
    assert "git-token" in bench().refused(sponsor=sponsor)


def test_a_name_with_signs_of_its_own_has_a_secret_under_its_escaped_name(bench: Make, far: Contract) -> None:
    put(far, "git/mia%252F..", {"value": "of the strange one"})
    assert bench().sent(sponsor="mia/..") == "of the strange one"


@pytest.mark.control("CRED-01")
def test_an_exchanged_secret_is_sent_by_the_next_call_and_a_removed_one_by_none(bench: Make, far: Contract) -> None:
    held = bench()
    assert held.sent() == SECRET
    put(far, "git/mia", {"value": "exchanged"})
    assert held.sent() == "exchanged"
    far.held["git/mia"][-1] = None
    assert "the vault has no secret" in held.refused()
    del far.held["git/mia"]
    assert "the vault has no secret" in held.refused()


@pytest.mark.control("CRED-01")
def test_a_value_is_used_for_its_stated_time_and_no_longer_when_the_vault_is_away(bench: Make, far: Contract) -> None:
    held = bench(cache_s=30.0)
    assert held.sent() == SECRET
    far.before = lambda _method, _path: (503, {"errors": []})
    held.now += 29.9
    assert held.sent() == SECRET
    held.now += 0.1
    assert "the vault does not answer" in held.refused()
    held.now -= 20
    assert "the vault does not answer" in held.refused(), "what has ended stays ended"
    far.before = lambda _method, _path: None
    assert held.sent() == SECRET


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((503, {"errors": ["Vault is sealed"]}), "does not answer"),
        ((403, {"errors": ["permission denied"]}), "refuses this perimeter host"),
        ((404, {"errors": ["no handler"]}), "answers something else"),
        ((307, {}), "answers something else"),
        ((200, {"data": {"data": {"value": 7}, "metadata": {"version": 1}}}), "entry value of the vault's secret"),
        ((200, {"data": {"data": {"value": {"a": "b"}}, "metadata": {"version": 1}}}), "is no text"),
        ((200, {"data": {"data": {"else": "x"}, "metadata": {"version": 1}}}), "has no entry value"),
        ((200, {"data": {"data": {"value": "a\r\nx-evil: 1"}, "metadata": {"version": 1}}}), "not printable ASCII"),
        ((200, {"data": {"data": {"value": ""}, "metadata": {"version": 1}}}), "empty"),
    ],
)
def test_nothing_is_sent_when_the_vault_gives_no_usable_value(
    bench: Make, far: Contract, answer: tuple[int, Any], words: str
) -> None:
    far.before = lambda _method, _path: answer
    assert words in bench().refused()


@pytest.mark.control("CRED-01")
def test_a_vault_that_hangs_ends_in_a_refusal(bench: Make, far: Contract, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credential_sources, "VAULT_DEADLINE_S", 0.2)
    held = bench()

    def slowly(_method: str, _path: str) -> None:
        time.sleep(2)

    far.before = slowly
    assert "the vault does not answer" in held.refused()
    assert far.url not in held.refused(), "the caller is told no address"


def test_who_we_are_there_must_be_private(bench: Make) -> None:
    held = bench()
    held.token.chmod(0o640)
    assert "open to others" in held.refused()
    held.token.unlink()
    assert "cannot be asked" in held.refused()


def test_a_role_logs_in_again_when_its_token_has_ended(bench: Make, far: Contract, tmp_path: Path) -> None:
    secret = tmp_path / "secret-id"
    secret.write_text(far.new_secret_id())
    secret.chmod(0o600)
    held = bench(token_file=None, approle=AppRole(far.role_id, str(secret)))
    assert held.sent() == SECRET
    far.forget_tokens()
    assert held.sent() == SECRET
    far.forget_tokens()
    far.secret_ids.clear()
    assert "refuses this perimeter host" in held.refused()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "http://vault.example"}, "vault.url"),
        ({"token_file": None}, "one of token_file and approle"),
        ({"timeout_s": 30.0}, "vault.timeout_s"),
        ({"cache_s": 301.0}, "vault.cache_s"),
        ({"cache_s": -1.0}, "vault.cache_s"),
        ({"token_file": "token"}, "absolute"),
        ({"token": "x"}, "token"),
    ],
)
def test_a_vault_that_cannot_be_used_is_refused_at_the_start(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    vault = {"url": "https://vault.example", "token_file": "/etc/saw/vault-token"}
    base = {
        "name": "edge", "broker_url": "https://10.0.0.1:8443", "ca_file": "/a", "cert_file": "/b", "key_file": "/c",
        "tuf_root_file": "/d", "ring2": {"broker_address": "10.0.0.1:8443"},
    }  # fmt: skip
    file = tmp_path / "gatekeeper.json"
    file.write_text(json.dumps({**base, "vault": vault}))
    found = load_config(file).vault
    assert found is not None
    assert found.cache_s == 0
    file.write_text(json.dumps({**base, "vault": vault | change}))
    with pytest.raises(ConfigError, match=words):
        load_config(file)


@pytest.mark.control("CRED-01")
def test_a_path_that_is_refused_costs_one_login_and_no_call_each_time(
    bench: Make, far: Contract, tmp_path: Path
) -> None:
    secret = tmp_path / "secret-id"
    secret.write_text(far.new_secret_id())
    secret.chmod(0o600)
    held = bench(token_file=None, approle=AppRole(far.role_id, str(secret)))
    assert held.sent() == SECRET
    far.calls.clear()
    far.before = lambda _method, path: (403, {"errors": ["denied"]}) if path.endswith("/noa") else None
    for _ in range(20):
        assert "refuses this perimeter host" in held.refused(sponsor="noa")
    assert [call.rpartition("/")[2] for call in far.calls] == ["noa", "login", "noa"]
    assert held.sent() == SECRET, "others are not held up"
    far.calls.clear()
    for _ in range(5):
        held.now += credential_sources.REFUSED_S
        held.refused(sponsor="noa")
    assert [call.rpartition("/")[2] for call in far.calls] == ["noa"] * 5, "it is asked again, without a login"
    far.before = lambda _method, _path: None
    put(far, "git/noa", {"value": "of noa"})
    held.now += credential_sources.REFUSED_S
    assert held.sent(sponsor="noa") == "of noa"
    far.forget_tokens()
    held.now += 30
    assert held.sent() == SECRET


@pytest.mark.control("CRED-01")
def test_a_workspace_with_many_calls_does_not_take_the_vault_away_from_others(bench: Make, far: Contract) -> None:
    put(far, "git/noa", {"value": "of noa"})
    held, go = bench(), threading.Event()

    def slowly(_method: str, path: str) -> None:
        if path.endswith("/mia"):
            go.wait(60)

    far.before = slowly
    wanted = Credential(id="git", ref="vault:secret/git/{sponsor}", inject=Inject(header="A", format="{secret}"))

    async def flood() -> tuple[str, list[str]]:
        mia = {"sponsor": "mia", "workspace": "ws-1"}
        calls = [asyncio.create_task(held.store.injection(wanted, mia)) for _ in range(200)]
        async with asyncio.timeout(60):
            while sum(call.endswith("/mia") for call in far.calls) < READS_AT_ONCE:  # noqa: ASYNC110 - of threads
                await asyncio.sleep(0.01)
        try:
            other = await held.store.injection(wanted, {"sponsor": "noa", "workspace": "ws-2"})
            at_once = sum(call.endswith("/mia") for call in far.calls)
        finally:
            go.set()
        assert at_once == READS_AT_ONCE
        ended = await asyncio.gather(*calls, return_exceptions=True)
        return other.headers[0][1], [one.message for one in ended if isinstance(one, CredentialUnavailable)]

    value, refused = asyncio.run(flood())
    assert value == "of noa"
    assert sum("too many calls of this workspace" in one for one in refused) == 200 - READS_AT_ONCE - READS_WAITING
    assert held.sent() == SECRET, "its turn comes again"


def test_a_read_under_way_keeps_its_connection_when_the_gatekeeper_ends(bench: Make, far: Contract) -> None:
    held, go, arrived = bench(), threading.Event(), threading.Event()

    def slowly(_method: str, _path: str) -> None:
        arrived.set()
        go.wait(60)

    far.before = slowly
    said: list[str] = []
    under_way = threading.Thread(target=lambda: said.append(held.sent()))
    under_way.start()
    try:
        assert arrived.wait(60)
        held.source.close()
        assert "is not asked any more" in held.refused()
    finally:
        go.set()
        under_way.join(60)
    assert said == [SECRET]
    assert held.source._calls._http.is_closed, "the last one lets the connections go"
