"""Programs that ask for changes, such as AWX: known by a certificate of the broker's authority, or by a token of the provider.

Either way a machine is one that the configuration names, and its scopes say what it may do; it never decides.
"""

from __future__ import annotations

import time

from saw.broker.context import Caller, Services
from saw.broker.errors import BrokerError, ForbiddenError
from saw.broker.limits import RateLimit
from saw.broker.sso.provider import Provider
from saw.errors import SawError
from saw.identity.oidc import MAX_TOKEN, Expected, TokenRefused, key_id_of, verify_access_token


class Machines:
    """Tells which machine calls (control REV-02: what asks is not what decides)."""

    def __init__(self, services: Services, provider: Provider | None) -> None:
        self._s = services
        self._provider = provider
        # Each token costs a verification, and one that is refused an event.
        self._limit = RateLimit(60, 2.0, time.monotonic)

    def admit(self, caller: Caller, authorization: str) -> Caller:
        """Return the machine behind ``caller`` (whom TLS knows) or behind the header ``authorization``; raise the refusal."""
        kind, _, name = caller.principal.partition(":")
        scheme, _, token = authorization.partition(" ")
        if kind == "anonymous" and scheme.lower() == "bearer":
            self._limit.take(caller.address)
            try:
                name = self._named(token.strip())
            except SawError as error:
                refused = error if isinstance(error, BrokerError) else _refused(error)
                self._record(caller, refused)
                raise refused from error
        elif kind != "machine":
            raise ForbiddenError(
                "this call needs the certificate or the token of a machine", cure="present one", code="not_a_machine"
            )
        if name not in self._s.config.machines:
            raise ForbiddenError(
                f"the machine {name} is not configured",
                cure="see the role variable broker_machines",
                code="unknown_machine",
            )
        return Caller(f"machine:{name}", caller.address, caller.request_id)

    def _named(self, token: str) -> str:
        """Return the machine whose client of the provider ``token`` was issued to (RFC 9068, RFC 6750)."""
        config = self._s.config
        if self._provider is None or config.sso is None or config.machine_audience is None:
            raise TokenRefused("no_tokens_here", "tokens are not taken here", "present a certificate")
        wanted = config.sso.provider
        if len(token) > MAX_TOKEN:
            raise TokenRefused("malformed_token", "this is no signed token", "present an access token of the provider")
        expected = Expected(
            issuer=wanted.issuer,
            client_id=config.machine_audience,
            algorithms=frozenset(wanted.algorithms),
            now=self._s.clock().timestamp(),
            skew_s=wanted.skew_s,
        )
        client = verify_access_token(token, self._provider.keys(key_id_of(token)), expected)
        for name, machine in config.machines.items():
            if machine.oauth_client is not None and machine.oauth_client == client:
                return name
        raise TokenRefused(
            "unknown_client",
            f"the client {client[:64]!r} is no machine here",
            "name it in broker_machines (oauth_client)",
        )

    def _record(self, caller: Caller, error: BrokerError) -> None:
        with self._s.store.write() as tx:
            tx.record(
                self._s.events.authentication(
                    self._s.clock(),
                    caller.subject(),
                    outcome="failure",
                    protocol="oauth-bearer",
                    message="a machine was not let in",
                    status_detail=error.code,
                )
            )


def _refused(error: SawError) -> BrokerError:
    return ForbiddenError(error.message, cure=error.cure, code=error.code)
