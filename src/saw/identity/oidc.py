"""Checks of the tokens that an OpenID provider signs (OpenID Connect Core 1.0; Back-Channel Logout 1.0; RFC 8725).

No network and no clock here: keys, time and what is expected come in as arguments. A signature counts under an algorithm of
the allowlist and a key of the provider alone; ``none`` and everything with a shared secret is never allowed.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec
from joserfc import jws
from joserfc.errors import JoseError
from joserfc.jwk import ECKey, KeySet, RSAKey

from saw import jsontext
from saw.errors import SawError

ALGORITHMS = frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512"})
"""What a configuration may allow: signatures by a private key, none of the forms with a shared secret."""
MAX_TOKEN = 32 * 1024
"""Longest token that is read (characters)."""
MAX_SKEW_S = 120
"""Most seconds by which two clocks may differ."""
MIN_RSA_BITS = 2048
LOGOUT_EVENT = "http://schemas.openid.net/event/backchannel-logout"
MAX_LOGOUT_AGE_S = 600
"""Oldest logout token that is taken (seconds since it was issued)."""

T = TypeVar("T")
Text = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=2**53)]


class TokenRefused(SawError):
    """A token of the provider does not count; ``code`` says why."""

    code = "token_refused"

    def __init__(self, code: str, message: str, cure: str = "sign in again") -> None:
        super().__init__(message, cure=cure)
        self.code = code


class Expected(msgspec.Struct, frozen=True, kw_only=True):
    """What an ID token must be. ``now`` in seconds since 1970; ``nonce`` is None where none was sent (device flow, refresh).

    ``max_age_s``: oldest sign-in that counts; with ``auth_time_needed`` a token that does not tell is refused. ``acr``: values of
    which one is wanted; empty wants none.
    """

    issuer: str
    client_id: str
    algorithms: frozenset[str]
    now: float
    nonce: str | None = None
    max_age_s: int | None = None
    auth_time_needed: bool = True
    acr: frozenset[str] = frozenset()
    skew_s: int = 60


class IdToken(msgspec.Struct, frozen=True):
    """The claims of a verified ID token that are used; ``claims`` are all of them."""

    sub: Text
    iat: Seconds
    exp: Seconds
    auth_time: Seconds | None = None
    acr: Annotated[str, msgspec.Meta(max_length=255)] = ""
    sid: Annotated[str, msgspec.Meta(max_length=255)] = ""
    claims: dict[str, Any] = {}


class LogoutToken(msgspec.Struct, frozen=True):
    """A verified logout token: who, or which session at the provider, has signed out; ``jti`` may be used once."""

    jti: Text
    iat: Seconds
    exp: Seconds
    sub: Annotated[str, msgspec.Meta(max_length=255)] = ""
    sid: Annotated[str, msgspec.Meta(max_length=255)] = ""


def import_keys(document: Mapping[str, Any]) -> KeySet:
    """Return the keys of a JWK Set (RFC 7517) that can verify: RSA of 2048 bits or more and elliptic curves, not for encryption.

    Raises :class:`TokenRefused` when none is left.
    """
    found: list[RSAKey | ECKey] = []
    keys = document.get("keys")
    for item in keys if isinstance(keys, list) else []:
        if not isinstance(item, dict) or item.get("use", "sig") != "sig":
            continue
        kind = str(item.get("kty"))
        public = {name: value for name, value in item.items() if name not in {"d", "p", "q", "dp", "dq", "qi", "oth"}}
        try:
            if kind == "RSA" and len(str(item.get("n", ""))) * 6 >= MIN_RSA_BITS - 8:
                found.append(RSAKey.import_key(public))
            elif kind == "EC":
                found.append(ECKey.import_key(public))
        except (JoseError, ValueError, TypeError, KeyError):
            continue
    if not found:
        raise TokenRefused("no_keys", "the provider publishes no key that can verify its tokens", "see its jwks_uri")
    return KeySet(found)  # type: ignore[arg-type]


def key_id_of(token: str) -> str:
    """Return the ``kid`` that a token names, empty when it names none; nothing is verified."""
    try:
        found = jws.extract_compact(token.encode(), registry=_registry(ALGORITHMS)).headers().get("kid", "")
    except (JoseError, ValueError, TypeError, KeyError):
        return ""
    return found if isinstance(found, str) else ""


def verify_id_token(token: str, keys: KeySet, expected: Expected) -> IdToken:
    """Return the ID token (OpenID Connect Core, section 3.1.3.7); raise :class:`TokenRefused` with the reason."""
    claims = _verified(token, keys, expected)
    found = _convert(claims, IdToken)
    if expected.nonce is not None:
        given = claims.get("nonce")
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), expected.nonce.encode()):
            raise TokenRefused("wrong_nonce", "the token does not carry the nonce of this sign-in")
    if expected.max_age_s is not None:
        if found.auth_time is None and expected.auth_time_needed:
            raise TokenRefused(
                "auth_time_missing",
                "the token does not say when the person signed in",
                "have the provider send auth_time",
            )
        if found.auth_time is not None and found.auth_time + expected.max_age_s + expected.skew_s < expected.now:
            raise TokenRefused("sign_in_too_old", "the person signed in at the provider too long ago")
        if found.auth_time is not None and found.auth_time > expected.now + expected.skew_s:
            raise TokenRefused("token_from_future", "the sign-in of the token is in the future", "check the clocks")
    if expected.acr and found.acr not in expected.acr:
        raise TokenRefused(
            "acr_missing", "the sign-in was not as strong as this broker wants", "sign in with the stronger way"
        )
    return msgspec.structs.replace(found, claims=dict(claims))


def verify_logout_token(token: str, keys: KeySet, expected: Expected) -> LogoutToken:
    """Return the logout token (Back-Channel Logout 1.0, section 2.6); raise :class:`TokenRefused` with the reason."""
    claims = _verified(token, keys, expected)
    events = claims.get("events")
    if not isinstance(events, dict) or not isinstance(events.get(LOGOUT_EVENT), dict):
        raise TokenRefused("no_logout_token", "the token says nothing of a logout")
    if "nonce" in claims:
        raise TokenRefused("no_logout_token", "a logout token carries no nonce")
    found = _convert(claims, LogoutToken)
    if not found.sub and not found.sid:
        raise TokenRefused("no_logout_token", "the token names neither a person nor a session")
    if found.iat + MAX_LOGOUT_AGE_S < expected.now:
        raise TokenRefused("token_expired", "the logout token is too old")
    return found


def verify_access_token(token: str, keys: KeySet, expected: Expected) -> str:
    """Return the client that the access token of a machine was issued to (RFC 9068, section 4); raise :class:`TokenRefused`.

    ``expected.client_id`` is the audience here: what the token is for. A token of a person, or one that is no access token, is
    refused.
    """
    header, claims = _signed(token, keys, expected.algorithms & ALGORITHMS)
    _check_issuer(claims, expected)
    _check_audience(claims, expected, "something else", "check machine_audience")
    _check_times(claims, expected)
    kind = str(header.get("typ", "")).lower().removeprefix("application/")
    person = {"nonce", "at_hash", "c_hash", "auth_time"} & claims.keys()
    if kind not in {"at+jwt", "jwt", ""} or claims.get("typ", "Bearer") != "Bearer" or person:
        raise TokenRefused(
            "no_access_token", "this is no access token of a machine", "use the client credentials grant"
        )
    given = [claims[name] for name in ("client_id", "azp") if name in claims]
    if not given or not all(isinstance(item, str) and item and item == given[0] for item in given):
        raise TokenRefused("no_client", "the token does not say which client it was issued to", "see the provider")
    return str(given[0])


def _check_audience(claims: dict[str, Any], expected: Expected, other: str, cure: str) -> list[Any]:
    """Return whom the token is for; raise :class:`TokenRefused` unless it is for what is expected."""
    audience = claims.get("aud")
    names = [audience] if isinstance(audience, str) else audience
    if not isinstance(names, list) or expected.client_id not in names:
        raise TokenRefused("wrong_audience", f"the token is for {other}", cure)
    return names


def _verified(token: str, keys: KeySet, expected: Expected) -> dict[str, Any]:
    """Return the claims of ``token`` with signature, issuer, audience and times checked."""
    _, claims = _signed(token, keys, expected.algorithms & ALGORITHMS)
    _check_issuer(claims, expected)
    names = _check_audience(claims, expected, "another client", "check sso.provider.client_id")
    if (len(names) > 1 or "azp" in claims) and claims.get("azp") != expected.client_id:
        raise TokenRefused("wrong_audience", "the token was issued to another client", "check sso.provider.client_id")
    _check_times(claims, expected)
    return claims


def _signed(token: str, keys: KeySet, allowed: frozenset[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return header and claims of ``token`` with its signature checked."""
    if len(token) > MAX_TOKEN or not token.isascii() or token.count(".") != 2:
        raise TokenRefused("malformed_token", "this is no signed token")
    registry = _registry(allowed)
    try:
        signed = jws.extract_compact(token.encode(), registry=registry)
        header = signed.headers()
        if header.get("alg") not in allowed:
            raise TokenRefused(
                "algorithm_refused",
                "the token is signed in a way that is not allowed",
                "let the provider sign with one of sso.provider.algorithms",
            )
        if not jws.validate_compact(signed, keys, registry=registry):
            raise TokenRefused("wrong_signature", "the signature of the token is not the provider's")
        claims = jsontext.decode(signed.payload, kind=dict[str, Any])
    except (JoseError, msgspec.DecodeError, ValueError, TypeError, KeyError) as error:
        raise TokenRefused("wrong_signature", "the signature of the token is not the provider's") from error
    return header, claims


def _check_issuer(claims: Mapping[str, Any], expected: Expected) -> None:
    if claims.get("iss") != expected.issuer:
        raise TokenRefused("wrong_issuer", "the token is another issuer's", "check sso.provider.issuer")


def _check_times(claims: Mapping[str, Any], expected: Expected) -> None:
    skew = min(expected.skew_s, MAX_SKEW_S)
    numbers = {
        name: value
        for name in ("exp", "iat", "nbf")
        if isinstance(value := claims.get(name), int | float) and not isinstance(value, bool)
    }
    if "exp" not in numbers or "iat" not in numbers:
        raise TokenRefused("malformed_token", "the token does not say when it was issued and when it ends")
    if numbers["exp"] + skew <= expected.now:
        raise TokenRefused("token_expired", "the token has ended", "sign in again; if it repeats, check the clocks")
    if max(numbers["iat"], numbers.get("nbf", 0)) > expected.now + skew:
        raise TokenRefused("token_from_future", "the token is from the future", "check the clocks")


def _convert(claims: Mapping[str, Any], kind: type[T]) -> T:
    wanted = {name: claims[name] for name in get_type_hints(kind) if name in claims and name != "claims"}
    try:
        return msgspec.convert(wanted, kind, strict=True)
    except msgspec.ValidationError as error:
        raise TokenRefused("malformed_token", f"the token is not valid: {error}", "see the provider") from error


def _registry(algorithms: frozenset[str]) -> jws.JWSRegistry:
    return jws.JWSRegistry(algorithms=sorted(algorithms))
