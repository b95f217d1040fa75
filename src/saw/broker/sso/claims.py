"""From what the token endpoint gave to claims that are verified and complete."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from saw.broker.sso.provider import Provider, Tokens
from saw.broker.sso_settings import SsoSettings
from saw.identity.oidc import Expected, IdToken, TokenRefused, key_id_of, verify_id_token


def expected(
    settings: SsoSettings, now: datetime, *, nonce: str | None, max_age_s: int | None, acr: Sequence[str] = ()
) -> Expected:
    """Return what a token of the configured provider must be; ``acr`` takes the place of what the configuration wants."""
    wanted = settings.provider
    return Expected(
        issuer=wanted.issuer,
        client_id=wanted.client_id,
        algorithms=frozenset(wanted.algorithms),
        now=now.timestamp(),
        nonce=nonce,
        max_age_s=max_age_s,
        # With the command line a person has just agreed; there is no nonce, and not every provider tells when.
        auth_time_needed=nonce is not None,
        acr=frozenset(acr or wanted.acr) if max_age_s is not None else frozenset(),
        skew_s=wanted.skew_s,
    )


def person_claims(
    settings: SsoSettings,
    provider: Provider,
    tokens: Tokens,
    now: datetime,
    *,
    nonce: str | None,
    max_age_s: int | None,
    acr: Sequence[str] = (),
) -> tuple[IdToken, dict[str, Any]]:
    """Return the verified ID token and its claims, completed by userinfo where name or groups are missing.

    Raises :class:`TokenRefused`; userinfo of another subject is refused (OpenID Connect Core, section 5.3.2).
    """
    if tokens.id_token is None:
        raise TokenRefused("no_id_token", "the provider gave no ID token", "have it issue one, at refreshes too")
    keys = provider.keys(key_id_of(tokens.id_token))
    token = verify_id_token(tokens.id_token, keys, expected(settings, now, nonce=nonce, max_age_s=max_age_s, acr=acr))
    claims = token.claims
    wanted = settings.provider
    if wanted.name_claim not in claims or wanted.groups_claim not in claims:
        more = provider.userinfo(tokens.access_token)
        if more and more.get("sub") != token.sub:
            raise TokenRefused("wrong_subject", "userinfo is about somebody else")
        claims = {**more, **claims}
    return token, claims
