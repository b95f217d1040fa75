"""Signing in: with a browser (authorization code and PKCE) and with the command line (device authorization).

What a sign-in needs later is sealed in one row under the hash of its state, or of the handle that the command line has. The
row is deleted before anything is asked of the provider, so a state is used once, whatever comes of it.
"""

from __future__ import annotations

import hmac
from datetime import timedelta
from typing import Annotated, Any

import msgspec
from sqlalchemy import func, select

from saw import jsontext
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, BusyError, ForbiddenError
from saw.broker.people import PersonRefused
from saw.broker.schema import sso_logins
from saw.broker.sso.claims import expected, person_claims
from saw.broker.sso.provider import MAX_INTERVAL_S, Provider, ProviderRefused, Tokens
from saw.broker.sso.sealed import Seal
from saw.broker.sso.sessions import Kind, Session, Sessions, digest_of, new_secret
from saw.broker.sso_settings import SsoSettings
from saw.identity.oidc import TokenRefused, key_id_of, verify_logout_token

LOGIN_FOR = timedelta(minutes=10)
"""How long somebody has at the provider."""
MAX_LOGINS = 4096
"""Most sign-ins that have begun and not ended."""

Path = Annotated[str, msgspec.Meta(pattern=r"^/[A-Za-z0-9/_-]{0,200}\Z")]


class _Begun(msgspec.Struct, frozen=True):
    """What is kept of a sign-in: with a browser nonce, PKCE verifier and the page to show; else the device code."""

    nonce: str = ""
    verifier: str = ""
    return_to: str = "/"
    fresh: bool = False
    acr: tuple[str, ...] = ()
    device_code: str = ""
    interval: int = 5


class Begun(msgspec.Struct, frozen=True):
    """Where to send the browser, and the secret that it keeps until it comes back."""

    url: str
    browser: str


class SignIn:
    """Both ways in. Everything that goes wrong is a refusal, and audited (control ID-01)."""

    def __init__(
        self, services: Services, settings: SsoSettings, provider: Provider, seal: Seal, sessions: Sessions
    ) -> None:
        self._s = services
        self._settings = settings
        self._provider = provider
        self._seal = seal
        self._sessions = sessions

    def begin(self, return_to: str, *, fresh: bool, acr: tuple[str, ...] = ()) -> Begun:
        """Begin a sign-in with a browser; ``return_to`` is one of our own pages, anything else is the first page.

        With ``acr`` it succeeds only when the provider says that one of these was reached.
        """
        try:
            page = msgspec.convert(return_to, Path)
        except msgspec.ValidationError:
            page = "/"
        if page.startswith("//"):
            page = "/"
        state, browser = new_secret(self._s), new_secret(self._s)
        begun = _Begun(new_secret(self._s), new_secret(self._s), page, fresh, acr)
        url = self._provider.authorization_url(
            self._settings.redirect_uri, state, begun.nonce, begun.verifier, fresh=fresh, acr=acr
        )
        self._keep(state, browser, "browser", begun, timedelta())
        return Begun(url, browser)

    def finish(self, caller: Caller, query: dict[str, str], browser: str, *, old: str = "") -> tuple[Session, str]:
        """End a sign-in with what the provider sent along, and return the session and the page to show.

        ``browser`` is the secret of :meth:`begin`: a state that another browser began is refused. ``old`` ends.
        """
        try:
            begun = self._take(query.get("state", ""), browser)
            if "error" in query:
                raise ProviderRefused(query["error"])
            self._check_issuer(query.get("iss"))
            tokens = self._provider.exchange(query.get("code", ""), begun.verifier, self._settings.redirect_uri)
            return self._start(caller, "browser", tokens, begun, old=old), begun.return_to
        except (BrokerError, TokenRefused) as error:
            self._record(caller, error, "browser")
            raise

    def device_begin(self) -> dict[str, Any]:
        """Begin a sign-in with the command line: what it shows, and the handle with which it asks again."""
        started = self._provider.device_start()
        handle = new_secret(self._s)
        wait = timedelta(seconds=min(started.interval, MAX_INTERVAL_S))
        begun = _Begun(device_code=started.device_code, interval=int(wait.total_seconds()))
        self._keep(handle, "", "cli", begun, wait)
        return {
            "handle": handle,
            "user_code": started.user_code,
            "verification_uri": started.verification_uri,
            "verification_uri_complete": started.verification_uri_complete,
            "expires_in": min(started.expires_in, int(LOGIN_FOR.total_seconds())),
            "interval": begun.interval,
        }

    def device_poll(self, caller: Caller, handle: str) -> Session | dict[str, Any]:
        """Return the session once the person has agreed, else ``{"pending": true, "interval": seconds}``.

        Who asks sooner than the interval says waits longer: the provider is not asked.
        """
        now = self._s.clock()
        key = digest_of(handle)
        mine = (sso_logins.c.secret_sha256 == key) & (sso_logins.c.kind == "cli")
        with self._s.store.write() as tx:
            row = tx.connection.execute(select(sso_logins).where(mine)).one_or_none()
            if row is None or row.expires_at <= iso(now):
                raise _unknown()
            begun = jsontext.decode(self._seal.open(key, row.sealed), kind=_Begun)
            early = row.poll_at > iso(now)
            later = iso(now + timedelta(seconds=begun.interval))
            if not early:
                tx.connection.execute(sso_logins.update().where(mine).values(poll_at=later))
        if early:
            return {"pending": True, "interval": begun.interval}
        try:
            tokens = self._provider.device_poll(begun.device_code)
        except ProviderRefused as error:
            if error.error in {"authorization_pending", "slow_down"}:
                if error.error == "slow_down":
                    begun = msgspec.structs.replace(begun, interval=min(begun.interval + 5, MAX_INTERVAL_S))
                    sealed = self._seal.close(key, msgspec.json.encode(begun))
                    with self._s.store.write() as tx:
                        tx.connection.execute(sso_logins.update().where(mine).values(sealed=sealed))
                return {"pending": True, "interval": begun.interval}
            self._forget(key)
            self._record(caller, error, "cli")
            raise
        try:
            if not self._forget(key):
                raise _unknown()
            return self._start(caller, "cli", tokens, begun)
        except (BrokerError, TokenRefused) as error:
            self._record(caller, error, "cli")
            raise

    def logout_by_provider(self, caller: Caller, token: str) -> int:
        """Take a logout token (OpenID Connect Back-Channel Logout 1.0) and return how many sessions it ended."""
        keys = self._provider.keys(key_id_of(token))
        wanted = expected(self._settings, self._s.clock(), nonce=None, max_age_s=None)
        found = verify_logout_token(token, keys, wanted)
        until = found.exp + wanted.skew_s
        return self._sessions.end_by_provider(caller, found.jti, until, subject=found.sub, sid=found.sid)

    def _start(self, caller: Caller, kind: Kind, tokens: Tokens, begun: _Begun, *, old: str = "") -> Session:
        now = self._s.clock()
        max_age = 60 if begun.fresh else self._settings.provider.max_age_s
        nonce = begun.nonce if kind == "browser" else None
        token, claims = person_claims(
            self._settings, self._provider, tokens, now, nonce=nonce, max_age_s=max_age, acr=begun.acr
        )
        return self._sessions.start(caller, kind, token, tokens, claims, old=old)

    def _check_issuer(self, given: str | None) -> None:
        """RFC 9207: an answer of another issuer is refused, and one without where the provider says that it sends it."""
        needed = self._provider.metadata().authorization_response_iss_parameter_supported
        if (given is None and needed) or (given is not None and given != self._settings.provider.issuer):
            raise TokenRefused("wrong_issuer", "the answer is another issuer's")

    def _keep(self, secret: str, browser: str, kind: str, begun: _Begun, wait: timedelta) -> None:
        now, key = self._s.clock(), digest_of(secret)
        with self._s.store.write() as tx:
            tx.connection.execute(sso_logins.delete().where(sso_logins.c.expires_at <= iso(now)))
            count = tx.connection.execute(select(func.count()).select_from(sso_logins)).scalar_one()
            if count >= MAX_LOGINS:
                raise BusyError("too many people sign in at the moment", cure="try again in some minutes")
            tx.connection.execute(
                sso_logins.insert().values(
                    secret_sha256=key,
                    kind=kind,
                    browser_sha256=digest_of(browser),
                    sealed=self._seal.close(key, msgspec.json.encode(begun)),
                    poll_at=iso(now + wait),
                    expires_at=iso(now + LOGIN_FOR),
                )
            )

    def _take(self, state: str, browser: str) -> _Begun:
        """Use up a state; raise the refusal of one that is unknown, ended, or another browser's."""
        now, key = self._s.clock(), digest_of(state)
        mine = (sso_logins.c.secret_sha256 == key) & (sso_logins.c.kind == "browser")
        with self._s.store.write() as tx:
            row = tx.connection.execute(select(sso_logins).where(mine)).one_or_none()
            tx.connection.execute(sso_logins.delete().where(mine))
        if row is None or row.expires_at <= iso(now):
            raise _unknown()
        if not hmac.compare_digest(row.browser_sha256, digest_of(browser)):
            raise ForbiddenError(
                "this sign-in was begun in another browser", cure="begin again here", code="other_browser"
            )
        return jsontext.decode(self._seal.open(key, row.sealed), kind=_Begun)

    def _forget(self, key: str) -> bool:
        with self._s.store.write() as tx:
            gone = tx.connection.execute(sso_logins.delete().where(sso_logins.c.secret_sha256 == key))
        return bool(gone.rowcount)

    def _record(self, caller: Caller, error: BrokerError | TokenRefused, kind: str) -> None:
        """Audit what failed before anybody was known; refusals of a person are audited with the person."""
        if isinstance(error, PersonRefused):
            return
        with self._s.store.write() as tx:
            self._sessions.record_sign_in(tx, caller, name="", session="", refused=error, kind=kind)


def _unknown() -> ForbiddenError:
    return ForbiddenError(
        "this sign-in is not known, has ended, or was used", cure="begin again", code="unknown_sign_in"
    )
