"""Signed statements: exactly one form is accepted, and its signer's certificate is checked."""

from __future__ import annotations

import base64
import hmac
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from joserfc import jws
from joserfc.jwk import ECKey

from saw.identity.names import IdentityError
from saw.identity.statement import sign_statement, verify_statement
from saw.identity.x509 import Authority, new_key_and_csr

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TYP = "saw-delegation+jws"


class Signer:
    """An authority, and a key with a certificate of ``kind``."""

    def __init__(self, directory: Path, domain: str = "saw.test") -> None:
        self.authority = Authority.create(directory, domain, NOW - timedelta(days=1))
        self.key, csr = new_key_and_csr("broker statements")
        self.certificate = self.authority.issue_signer(csr, "broker", NOW, timedelta(days=20))
        self.perimeter = self.authority.issue_perimeter(csr, "edge", NOW, timedelta(days=20))

    def sign(self, payload: bytes = b'{"a":1}', typ: str = TYP) -> str:
        return sign_statement(payload, typ, self.key, self.certificate)

    def header(self, **changes: object) -> dict[str, object]:
        head = json.loads(base64.urlsafe_b64decode(self.sign().partition(".")[0] + "=="))
        return {name: value for name, value in {**head, **changes}.items() if value is not None}

    def forged(self, **changes: object) -> str:
        """A token with another header, well signed by the same key where the algorithm allows."""
        key = ECKey.import_key(self.key)
        registry = jws.JWSRegistry(algorithms=["ES256"], strict_check_header=False)
        registry.max_header_length = 1 << 20
        return jws.serialize_compact(self.header(**changes), b"{}", key, registry=registry)


@pytest.fixture
def signer(tmp_path: Path) -> Signer:
    return Signer(tmp_path / "ca")


@pytest.mark.control("DEL-01")
def test_a_statement_is_verified_with_its_signer(signer: Signer) -> None:
    found = verify_statement(signer.sign(), TYP, signer.authority.ca_pem, NOW)
    assert (found.payload, found.signer) == (b'{"a":1}', "spiffe://saw.test/signer/broker")
    assert found.not_after == NOW + timedelta(days=20)


@pytest.mark.control("DEL-01")
def test_changed_expired_or_foreign_statements_are_refused(signer: Signer, tmp_path: Path) -> None:
    token = signer.sign()
    head, payload, signature = token.split(".")
    other = base64.urlsafe_b64encode(b'{"a":2}').decode().rstrip("=")
    stranger = Signer(tmp_path / "stranger")
    ca = signer.authority.ca_pem
    for bad in (
        f"{head}.{other}.{signature}",
        f"{head}.{payload}.{signature[:-4]}AAAA",
        f"{head}.{payload}.",
        f"{head}..{signature}",
        "",
        "é.é.é",
        stranger.sign(),
        signer.sign(typ="saw-receipt+jws"),
    ):
        with pytest.raises(IdentityError):
            verify_statement(bad, TYP, ca, NOW)
    for when in (NOW + timedelta(days=21), NOW - timedelta(days=2)):
        with pytest.raises(IdentityError):
            verify_statement(token, TYP, ca, when)
    assert verify_statement(token, TYP, ca, NOW).payload


@pytest.mark.control("DEL-01")
def test_no_other_header_is_accepted_even_when_the_key_signed_it(signer: Signer) -> None:
    own = base64.b64encode(b"not a certificate").decode()
    ca = signer.authority.ca_pem
    assert verify_statement(signer.forged(), TYP, ca, NOW).payload == b"{}"
    for changes in (
        {"typ": None},
        {"typ": "JWT"},
        {"kid": "x"},
        {"jku": "https://evil.example.com"},
        {"x5c": None},
        {"x5c": [own]},
        {"x5c": [*signer.header()["x5c"], *signer.header()["x5c"]]},  # type: ignore[misc]
    ):
        with pytest.raises(IdentityError):
            verify_statement(signer.forged(**changes), TYP, ca, NOW)


@pytest.mark.control("DEL-01")
def test_algorithm_none_and_a_public_key_as_secret_are_refused(signer: Signer) -> None:
    ca = signer.authority.ca_pem

    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    none = f"{part(signer.header(alg='none'))}.{part({})}."
    signed = f"{part(signer.header(alg='HS256'))}.{part({})}"
    digest = hmac.digest(signer.certificate, signed.encode(), "sha256")
    confused = f"{signed}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"
    for bad in (none, confused):
        with pytest.raises(IdentityError):
            verify_statement(bad, TYP, ca, NOW)


@pytest.mark.control("DEL-01")
def test_only_a_signer_may_sign(signer: Signer) -> None:
    token = sign_statement(b"{}", TYP, signer.key, signer.perimeter)
    with pytest.raises(IdentityError, match="may not sign statements"):
        verify_statement(token, TYP, signer.authority.ca_pem, NOW)
