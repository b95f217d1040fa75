"""The OpenID provider as the broker's far end: discovery, keys, tokens, device authorization. Every answer is bounded.

OpenID Connect Core and Discovery 1.0, RFC 6749, 7636 (PKCE), 8628 (device authorization), 9207 (issuer in the answer).
"""

from __future__ import annotations

import base64
import hashlib
import ssl
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote_plus, urlencode, urlsplit

import httpx
import msgspec
from joserfc.jwk import KeySet

from saw import jsontext
from saw.broker.errors import BrokerError, ForbiddenError
from saw.broker.sso_settings import ProviderSettings
from saw.errors import ConfigError
from saw.identity.oidc import import_keys

T = TypeVar("T")
TIMEOUT_S = 10.0
MAX_ANSWER = 512 * 1024
METADATA_FOR_S = 3600.0
KEYS_FOR_S = 600.0
#: Keys are asked for again at most this often when a token names a key that is not among them (seconds).
KEYS_AGAIN_S = 10.0
MAX_INTERVAL_S = 60
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"

Url = Annotated[str, msgspec.Meta(pattern=r"^https://", max_length=2048)]
Token = Annotated[str, msgspec.Meta(min_length=1, max_length=16_384)]


class ProviderUnavailable(BrokerError):
    """The provider does not answer, or not as its standard says. Nobody is let in by that."""

    code = "provider_unavailable"
    status = 503


class ProviderRefused(ForbiddenError):
    """The provider refuses; ``error`` is its reason (RFC 6749, section 5.2)."""

    code = "provider_refused"

    def __init__(self, error: str) -> None:
        self.error = "".join(letter for letter in error[:64] if letter.isascii() and letter.isprintable())
        super().__init__(f"the identity provider refused: {self.error}", cure="sign in again")


class Metadata(msgspec.Struct, frozen=True):
    """What is used of the discovery document."""

    issuer: str
    authorization_endpoint: Url
    token_endpoint: Url
    jwks_uri: Url
    userinfo_endpoint: Url | None = None
    device_authorization_endpoint: Url | None = None
    authorization_response_iss_parameter_supported: bool = False


class Tokens(msgspec.Struct, frozen=True):
    """What the token endpoint answered."""

    access_token: Token
    id_token: Token | None = None
    refresh_token: Token | None = None


class DeviceStart(msgspec.Struct, frozen=True):
    """A device authorization: ``user_code`` is typed at ``verification_uri``; polls come every ``interval`` seconds."""

    device_code: Token
    user_code: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    verification_uri: Url
    expires_in: Annotated[int, msgspec.Meta(ge=1)]
    verification_uri_complete: Url | None = None
    interval: Annotated[int, msgspec.Meta(ge=1)] = 5


class _Error(msgspec.Struct, frozen=True):
    error: Annotated[str, msgspec.Meta(max_length=256)]


def pkce_challenge(verifier: str) -> str:
    """Return the S256 challenge of ``verifier`` (RFC 7636, section 4.2)."""
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()


class Provider:
    """Talks to one provider; safe for several threads. ``monotonic`` gives seconds."""

    def __init__(self, settings: ProviderSettings, monotonic: Callable[[], float]) -> None:
        self.settings = settings
        self._now = monotonic
        self._lock = threading.Lock()
        self._metadata: tuple[Metadata, float] | None = None
        self._keys: tuple[KeySet, float] | None = None
        self._http: httpx.Client | None = None

    def close(self) -> None:
        """Close the connections."""
        with self._lock:
            if self._http is not None:
                self._http.close()
                self._http = None

    def metadata(self) -> Metadata:
        """Return the discovery document; its issuer must be the configured one (Discovery, section 4.3)."""
        held = self._metadata
        if held is not None and self._now() - held[1] < METADATA_FOR_S:
            return held[0]
        issuer = self.settings.issuer
        found = self._get(f"{issuer.rstrip('/')}/.well-known/openid-configuration", Metadata)
        if found.issuer != issuer:
            raise ProviderUnavailable(
                f"the provider calls itself {found.issuer[:128]!r}, the configuration says {issuer!r}",
                cure="correct sso.provider.issuer, letter by letter",
                code="wrong_issuer",
            )
        self._metadata = (found, self._now())
        return found

    def keys(self, kid: str) -> KeySet:
        """Return the provider's keys; they are asked for again when ``kid`` is not among them."""
        held = self._keys
        age = self._now() - held[1] if held else KEYS_FOR_S
        known = held is not None and (not kid or any(key.kid == kid for key in held[0].keys))
        if held is not None and age < (KEYS_FOR_S if known else KEYS_AGAIN_S):
            return held[0]
        found = import_keys(self._get(self.metadata().jwks_uri, dict[str, Any]))
        self._keys = (found, self._now())
        return found

    def authorization_url(
        self, redirect_uri: str, state: str, nonce: str, verifier: str, *, fresh: bool, acr: Sequence[str] = ()
    ) -> str:
        """Return where a browser is sent; ``fresh`` wants the person to sign in now, ``acr`` in one of these ways."""
        settings = self.settings
        query = {
            "response_type": "code",
            "client_id": settings.client_id,
            "redirect_uri": redirect_uri,
            "scope": " ".join(settings.scopes),
            "state": state,
            "nonce": nonce,
            "code_challenge": pkce_challenge(verifier),
            "code_challenge_method": "S256",
            "max_age": "0" if fresh else str(settings.max_age_s),
        }
        if fresh:
            query["prompt"] = "login"
        if wanted := acr or settings.acr:
            query["acr_values"] = " ".join(wanted)
        target = self.metadata().authorization_endpoint
        return f"{target}{'&' if urlsplit(target).query else '?'}{urlencode(query)}"

    def exchange(self, code: str, verifier: str, redirect_uri: str) -> Tokens:
        """Give a code for tokens."""
        body = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": redirect_uri,
            "code_verifier": verifier,
        }
        return self._token(body)

    def refresh(self, token: str) -> Tokens:
        """Ask for somebody's present claims with a refresh token; it may be replaced by the one in the answer."""
        return self._token({"grant_type": "refresh_token", "refresh_token": token})

    def device_start(self) -> DeviceStart:
        """Begin a device authorization; raise :class:`ProviderUnavailable` where the provider has none."""
        endpoint = self.metadata().device_authorization_endpoint
        if endpoint is None:
            raise ProviderUnavailable(
                "the provider has no device authorization", cure="sign in with a browser", code="no_device_flow"
            )
        body = {"scope": " ".join(self.settings.scopes), "max_age": str(self.settings.max_age_s)}
        if self.settings.acr:
            body["acr_values"] = " ".join(self.settings.acr)
        return self._post(endpoint, body, DeviceStart)

    def device_poll(self, device_code: str) -> Tokens:
        """Ask whether the person has agreed; :class:`ProviderRefused` says ``authorization_pending`` and the like."""
        return self._token({"grant_type": DEVICE_GRANT, "device_code": device_code})

    def userinfo(self, access_token: str) -> dict[str, Any]:
        """Return the claims at the userinfo endpoint, an empty dict where there is none."""
        endpoint = self.metadata().userinfo_endpoint
        if endpoint is None:
            return {}
        return self._get(endpoint, dict[str, Any], {"authorization": f"Bearer {access_token}"})

    def _token(self, body: Mapping[str, str]) -> Tokens:
        return self._post(self.metadata().token_endpoint, body, Tokens)

    def _get(self, url: str, kind: type[T], headers: Mapping[str, str] | None = None) -> T:
        return self._call("GET", url, kind, headers=headers or {})

    def _post(self, url: str, body: Mapping[str, str], kind: type[T]) -> T:
        secret, name = self._secret(), self.settings.client_id
        if secret is None:
            return self._call("POST", url, kind, data={**body, "client_id": name})
        # RFC 6749, section 2.3.1: both are form-encoded first
        return self._call("POST", url, kind, data=dict(body), auth=(quote_plus(name), quote_plus(secret)))

    def _call(self, method: str, url: str, kind: type[T], **how: Any) -> T:
        place = urlsplit(url).netloc
        try:
            with self._client().stream(method, url, **how) as response:
                raw = b""
                for chunk in response.iter_bytes():
                    raw += chunk
                    if len(raw) > MAX_ANSWER:
                        raise _unavailable(place, "its answer is too long")
        except httpx.HTTPError as error:
            raise _unavailable(place, str(error) or type(error).__name__) from error
        if 400 <= response.status_code < 500 and method == "POST":
            try:
                raise ProviderRefused(jsontext.decode(raw, kind=_Error).error)
            except msgspec.DecodeError:
                pass
        if response.status_code == 401:
            raise ProviderRefused("the access token is refused")
        if response.status_code != 200:
            raise _unavailable(place, f"it answered {response.status_code}")
        try:
            return jsontext.decode(raw, kind=kind)
        except msgspec.DecodeError as error:
            raise _unavailable(place, f"its answer is not valid: {error}") from error

    def _client(self) -> httpx.Client:
        with self._lock:
            if self._http is None:
                try:
                    context = ssl.create_default_context(cafile=self.settings.ca_file)
                except OSError as error:
                    raise ConfigError(
                        f"cannot use {self.settings.ca_file}: {error.strerror or error}",
                        cure="correct sso.provider.ca_file",
                    ) from error
                self._http = httpx.Client(verify=context, timeout=TIMEOUT_S, follow_redirects=False, trust_env=False)
            return self._http

    def _secret(self) -> str | None:
        if self.settings.client_secret_file is None:
            return None
        try:
            text = Path(self.settings.client_secret_file).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                "the client's secret cannot be read", cure="check sso.provider.client_secret_file"
            ) from error
        if not text:
            raise ConfigError("the client's secret is empty", cure="check sso.provider.client_secret_file")
        return text


def _unavailable(place: str, why: str) -> ProviderUnavailable:
    return ProviderUnavailable(
        f"the identity provider {place} cannot be used: {why[:200]}",
        cure="check that the broker reaches it, its certificate, and sso.provider",
    )
