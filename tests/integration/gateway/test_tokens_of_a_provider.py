"""Access tokens of a real provider (npm oidc-provider) over TLS, with nothing of ours at the far end."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import RSAKey

sys.path.append(str(Path(__file__).parents[1] / "broker"))

from sso_rig import TestProvider

from saw.gateway.credentials import CredentialStore
from saw.gateway.errors import CredentialUnavailable, DestinationBlocked
from saw.gateway.oauth2 import HttpsTokenEndpoint, TokenKeeper
from saw.gateway.resolve import choose
from saw.policy.governance import Credential, Inject
from saw.policy.providers import OAuth2

SERVICE = "https://api.example.com"
SECRET = "a secret: of 100% + more"  # what has to be escaped in RFC 6749, section 2.3.1


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestProvider]:
    found = TestProvider(tmp_path_factory.mktemp("provider"), "https://localhost")
    client = {
        "client_id": "agents of us", "client_secret": SECRET, "redirect_uris": [], "response_types": [],
        "grant_types": ["client_credentials"],
    }  # fmt: skip
    found.settings = {**found.settings, "audiences": [SERVICE]}
    found.settings["clients"] = [client]
    found.start()
    yield found
    found.stop()


class Bench:
    """The tokens of a gatekeeper; ``now`` is its clock, seconds."""

    def __init__(self, directory: Path, provider: TestProvider, ca_file: Path | None = None) -> None:
        self.now = 0.0
        self.provider = provider
        self.file = directory / "crm"
        self.put(SECRET)

        async def address_of(_host: str) -> str:
            return "127.0.0.1"

        endpoint = HttpsTokenEndpoint(str(ca_file or provider.ca_file), 60.0, address_of)
        self.store = CredentialStore(directory, tokens=TokenKeeper(endpoint, lambda: self.now))

    def put(self, value: str) -> None:
        self.file.write_text(value)
        self.file.chmod(0o600)

    def token(self, url: str = "") -> str:
        wanted = OAuth2(token_url=url or f"{self.provider.issuer}/token", client_id="agents of us", resource=SERVICE)
        credential = Credential(
            id="crm", ref="file:crm", inject=Inject(header="Authorization", format="Bearer {secret}"), oauth2=wanted
        )
        found = asyncio.run(self.store.injection(credential, {"sponsor": "mia", "workspace": "ws-1"}))
        return found.headers[0][1].removeprefix("Bearer ")


@pytest.fixture(autouse=True)
def _time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saw.gateway.oauth2.DEADLINE_S", 60.0)  # this machine may be busy


@pytest.mark.control("CRED-01")
def test_a_real_provider_gives_a_token_for_the_service_and_a_new_one_before_its_end(
    tmp_path: Path, provider: TestProvider
) -> None:
    bench = Bench(tmp_path, provider)
    first = bench.token()
    claims = jwt.decode(first, RSAKey.import_key(provider.jwk.as_dict(private=False))).claims
    assert (claims["aud"], claims["client_id"]) == (SERVICE, "agents of us")
    bench.now += 269
    assert bench.token() == first, "300 seconds are its life"
    bench.now += 1
    assert bench.token() != first


@pytest.mark.control("CRED-01")
def test_a_secret_that_the_provider_does_not_know_is_refused_with_its_code(
    tmp_path: Path, provider: TestProvider
) -> None:
    bench = Bench(tmp_path, provider)
    bench.token()
    bench.put("wrong")
    with pytest.raises(CredentialUnavailable, match="answered 401 invalid_client"):
        bench.token()
    bench.put(SECRET)
    assert bench.token()


def test_a_provider_that_our_authorities_do_not_vouch_for_gets_no_secret(
    tmp_path: Path, provider: TestProvider
) -> None:
    (tmp_path / "other").mkdir()
    other = TestProvider(tmp_path / "other", "https://localhost")
    with pytest.raises(CredentialUnavailable, match="does not answer"):
        Bench(tmp_path, provider, other.ca_file).token()


def test_the_name_in_the_url_is_what_the_certificate_must_have(tmp_path: Path, provider: TestProvider) -> None:
    port = httpx.URL(provider.issuer).port
    with pytest.raises(CredentialUnavailable, match="does not answer"):
        Bench(tmp_path, provider).token(f"https://id.example.com:{port}/token")


def test_the_address_of_a_token_endpoint_is_held_to_what_destinations_are() -> None:
    with pytest.raises(DestinationBlocked):
        choose("id.example.com", ["127.0.0.1"], exact=True, allowed=())
