"""Tokens of an OpenID provider: each way in which one does not count, beside the one that does."""

from __future__ import annotations

import base64
import hmac
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, RSAKey

from saw.identity.oidc import (
    ALGORITHMS,
    LOGOUT_EVENT,
    Expected,
    TokenRefused,
    import_keys,
    key_id_of,
    verify_access_token,
    verify_id_token,
    verify_logout_token,
)

NOW = 1_800_000_000
KEY = RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
OTHER = RSAKey.generate_key(2048, {"kid": "one", "use": "sig"})
CURVE = ECKey.generate_key("P-256", {"kid": "two", "use": "sig"})
KEYS = import_keys({"keys": [KEY.as_dict(private=False), CURVE.as_dict(private=False)]})
WANTED = Expected(
    issuer="https://idp.example", client_id="saw", algorithms=frozenset({"RS256", "ES256"}), now=NOW, nonce="n-1", max_age_s=3600,
    acr=frozenset({"phr"}),
)  # fmt: skip
CLAIMS: dict[str, Any] = {
    "iss": "https://idp.example", "aud": "saw", "sub": "u-1", "iat": NOW - 5, "exp": NOW + 300, "nonce": "n-1",
    "auth_time": NOW - 60, "acr": "phr", "email": "ben@example.com",
}  # fmt: skip


def token(key: Any = KEY, alg: str = "RS256", kid: str = "one", **changes: Any) -> str:
    claims = {name: value for name, value in (CLAIMS | changes).items() if value is not None}
    return jwt.encode({"alg": alg, "kid": kid}, claims, key, algorithms=[alg])


def raw(header: dict[str, Any], claims: dict[str, Any], signature: bytes = b"") -> str:
    parts = [json.dumps(header).encode(), json.dumps(claims).encode(), signature]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def refused(text: str, expected: Expected = WANTED, keys: KeySet = KEYS) -> str:
    with pytest.raises(TokenRefused) as error:
        verify_id_token(text, keys, expected)
    return error.value.code


@pytest.mark.control("ID-01")
def test_a_good_token_counts_under_each_kind_of_key() -> None:
    for text in (token(), token(CURVE, "ES256", "two"), token(aud=["saw", "other"], azp="saw")):
        found = verify_id_token(text, KEYS, WANTED)
        assert (found.sub, found.acr, found.claims["email"]) == ("u-1", "phr", "ben@example.com")


@pytest.mark.control("ID-01")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iss": "https://evil.example"}, "wrong_issuer"),
        ({"iss": "https://idp.example/"}, "wrong_issuer"),
        ({"iss": None}, "wrong_issuer"),
        ({"aud": "other"}, "wrong_audience"),
        ({"aud": ["other"]}, "wrong_audience"),
        ({"aud": None}, "wrong_audience"),
        ({"aud": ["saw", "other"]}, "wrong_audience"),
        ({"azp": "other"}, "wrong_audience"),
        ({"nonce": "n-2"}, "wrong_nonce"),
        ({"nonce": None}, "wrong_nonce"),
        ({"nonce": 1}, "wrong_nonce"),
        ({"exp": NOW - 61}, "token_expired"),
        ({"exp": None}, "malformed_token"),
        ({"exp": "soon"}, "malformed_token"),
        ({"iat": None}, "malformed_token"),
        ({"iat": NOW + 61}, "token_from_future"),
        ({"nbf": NOW + 61}, "token_from_future"),
        ({"auth_time": NOW - 3661}, "sign_in_too_old"),
        ({"auth_time": NOW + 61}, "token_from_future"),
        ({"auth_time": None}, "auth_time_missing"),
        ({"acr": "pwd"}, "acr_missing"),
        ({"acr": None}, "acr_missing"),
        ({"sub": ""}, "malformed_token"),
        ({"sub": "u" * 256}, "malformed_token"),
        ({"sub": None}, "malformed_token"),
    ],
)
def test_a_wrong_claim_is_refused(changes: dict[str, Any], code: str) -> None:
    assert refused(token(**changes)) == code


def test_the_skew_of_clocks_is_bounded() -> None:
    assert verify_id_token(token(exp=NOW - 59), KEYS, WANTED).sub == "u-1"
    wide = msgspec.structs.replace(WANTED, skew_s=86_400)
    assert refused(token(exp=NOW - 121), wide) == "token_expired"


@pytest.mark.control("ID-01")
def test_none_and_shared_secrets_are_no_signatures() -> None:
    for alg in ("none", "None", "NONE", ""):
        assert refused(raw({"alg": alg, "kid": "one"}, CLAIMS)) in {"wrong_signature", "algorithm_refused"}
    # the provider's public key taken as the secret of an HMAC
    unsigned = raw({"alg": "HS256", "kid": "one"}, CLAIMS).rpartition(".")[0]
    mac = hmac.new(KEY.as_pem(private=False), unsigned.encode(), "sha256").digest()
    forged = f"{unsigned}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    assert refused(forged) in {"wrong_signature", "algorithm_refused"}
    assert not any(name.startswith("HS") or name == "none" for name in ALGORITHMS)
    # nor does a configuration that names them change that
    loose = msgspec.structs.replace(WANTED, algorithms=frozenset({"HS256", "none", "RS256"}))
    assert refused(forged, loose) in {"wrong_signature", "algorithm_refused"}
    assert verify_id_token(token(), KEYS, loose).sub == "u-1"


@pytest.mark.control("ID-01")
def test_only_the_providers_keys_and_the_allowed_algorithms_sign() -> None:
    assert refused(token(OTHER)) == "wrong_signature"
    assert refused(token(kid="three")) == "wrong_signature"
    assert refused(token(alg="PS256")) in {"wrong_signature", "algorithm_refused"}
    # a key that the token brings along is nobody's
    header = {"alg": "RS256", "kid": "one", "jwk": OTHER.as_dict(private=False)}
    assert refused(jwt.encode(header, CLAIMS, OTHER, algorithms=["RS256"])) == "wrong_signature"


def test_short_keys_keys_for_encryption_and_private_halves_are_not_taken() -> None:
    with pytest.raises(TokenRefused, match="no key"):
        import_keys({"keys": []})
    for bad in (
        {"kty": "oct", "k": "c2VjcmV0"},
        {**KEY.as_dict(private=False), "use": "enc"},
        {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
    ):
        with pytest.raises(TokenRefused):
            import_keys({"keys": [bad]})
        assert len(import_keys({"keys": [bad, KEY.as_dict(private=False)]}).keys) == 1
    assert not import_keys({"keys": [KEY.as_dict(private=True)]}).keys[0].is_private
    assert key_id_of(token()) == "one"
    assert key_id_of("no.token") == ""


@given(st.data())
def test_a_token_that_was_changed_anywhere_does_not_count(data: st.DataObject) -> None:
    text = _GOOD
    at = data.draw(st.integers(0, len(text) - 2))
    letter = data.draw(st.sampled_from([item for item in "AZaz09-_." if item != text[at]]))
    changed = text[:at] + letter + text[at + 1 :]
    assert refused(changed)


_GOOD = token()


def logout(**changes: Any) -> str:
    base = {
        "iss": "https://idp.example", "aud": "saw", "iat": NOW, "exp": NOW + 120, "jti": "j-1", "sid": "s-1",
        "events": {LOGOUT_EVENT: {}},
    }  # fmt: skip
    claims = {name: value for name, value in (base | changes).items() if value is not None}
    return jwt.encode({"alg": "RS256", "kid": "one", "typ": "logout+jwt"}, claims, KEY, algorithms=["RS256"])


@pytest.mark.control("ID-01")
def test_a_logout_token_names_a_session_or_a_person() -> None:
    wanted = msgspec.structs.replace(WANTED, nonce=None, max_age_s=None, acr=frozenset())
    assert verify_logout_token(logout(), KEYS, wanted).sid == "s-1"
    assert verify_logout_token(logout(sid=None, sub="u-1"), KEYS, wanted).sub == "u-1"
    for changes in (
        {"sid": None},
        {"events": {}},
        {"events": None},
        {"nonce": "n-1"},
        {"jti": None},
        {"iat": NOW - 700, "exp": NOW + 10},
        {"iss": "https://evil.example"},
        {"aud": "other"},
    ):
        with pytest.raises(TokenRefused):
            verify_logout_token(logout(**changes), KEYS, wanted)
    # an ID token is no logout token
    with pytest.raises(TokenRefused):
        verify_logout_token(token(), KEYS, wanted)


# --- access tokens of machines ---------------------------------------------------------------------------------------------

MACHINE = Expected(
    issuer="https://idp.example", client_id="https://saw.example", algorithms=frozenset({"RS256"}), now=NOW
)
ACCESS: dict[str, Any] = {
    "iss": "https://idp.example", "aud": "https://saw.example", "sub": "awx", "client_id": "awx", "iat": NOW - 5,
    "exp": NOW + 300,
}  # fmt: skip


def access(key: Any = KEY, alg: str = "RS256", typ: str | None = "at+jwt", **changes: Any) -> str:
    claims = {name: value for name, value in (ACCESS | changes).items() if value is not None}
    header = {"alg": alg, "kid": "one", **({} if typ is None else {"typ": typ})}
    return jwt.encode(header, claims, key, algorithms=[alg])


@pytest.mark.parametrize(
    ("changes", "client"),
    [
        ({}, "awx"),
        ({"typ": "application/at+jwt"}, "awx"),
        ({"typ": "JWT", "client_id": None, "azp": "awx"}, "awx"),
        ({"azp": "awx"}, "awx"),
        ({"aud": ["other", "https://saw.example"]}, "awx"),
        ({"exp": NOW - 59}, "awx"),
    ],
)
def test_an_access_token_of_a_machine_names_its_client(changes: dict[str, Any], client: str) -> None:
    assert verify_access_token(access(**changes), KEYS, MACHINE) == client


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"iss": "https://idp.example/"}, "wrong_issuer"),
        ({"aud": "saw"}, "wrong_audience"),
        ({"aud": None}, "wrong_audience"),
        ({"aud": []}, "wrong_audience"),
        ({"exp": NOW - 60}, "token_expired"),
        ({"exp": None}, "malformed_token"),
        ({"iat": NOW + 61}, "token_from_future"),
        ({"nbf": NOW + 61}, "token_from_future"),
        ({"typ": "logout+jwt"}, "no_access_token"),
        ({"typ": "JWT", "nonce": "n-1"}, "no_access_token"),
        ({"auth_time": NOW - 60}, "no_access_token"),
        ({"client_id": None}, "no_client"),
        ({"azp": "other"}, "no_client"),
        ({"client_id": ""}, "no_client"),
        ({"client_id": 7}, "no_client"),
        ({"key": OTHER}, "wrong_signature"),
        ({"key": CURVE, "alg": "ES256"}, "algorithm_refused"),
    ],
)
def test_a_token_that_is_no_machines_or_not_for_us_does_not_count(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(TokenRefused) as error:
        verify_access_token(access(**changes), KEYS, MACHINE)
    assert error.value.code == code


def test_an_unsigned_access_token_or_one_with_a_shared_secret_does_not_count() -> None:
    signing = f"{raw({'alg': 'HS256', 'typ': 'at+jwt'}, ACCESS).rpartition('.')[0]}"
    mac = hmac.digest(json.dumps(KEY.as_dict(private=False)).encode(), signing.encode(), "sha256")
    forged = f"{signing}.{base64.urlsafe_b64encode(mac).rstrip(b'=').decode()}"
    for text in (raw({"alg": "none", "typ": "at+jwt"}, ACCESS), forged):
        with pytest.raises(TokenRefused):
            verify_access_token(text, KEYS, MACHINE)
