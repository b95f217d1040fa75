"""The part ``sso`` of the broker's configuration: which OpenID provider signs people in, and what its groups may do here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

from saw.broker.step_up import StepUpSettings, problems_of_step_up
from saw.identity.oidc import ALGORITHMS, MAX_SKEW_S

Role = Literal["user", "approver", "security", "operator", "auditor"]
ROLES: tuple[Role, ...] = ("user", "approver", "security", "operator", "auditor")

#: What Linux takes as the name of an account, and of directories such as ``ada@example.com`` or ``EXAMPLE\\ada``.
_ACCOUNT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@\\+-]{0,255}\Z")
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*\Z")


class Listen(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the pages listen; port 0 lets the kernel choose (tests)."""

    host: str = "0.0.0.0"  # noqa: S104 - as the broker's other listener: the firewall decides who reaches it
    port: int = 8445


class ProviderSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The provider and how it knows this broker.

    ``client_secret_file``: file with the client's secret, None for a public client. ``ca_file``: authorities (PEM) of the
    provider's certificate, None for the system's. ``name_claim`` names the person, ``groups_claim`` lists the groups;
    ``max_age_s``: oldest sign-in at the provider that counts here; ``acr``: one of these must be reached, empty wants none.
    """

    issuer: str
    client_id: str
    client_secret_file: str | None = None
    ca_file: str | None = None
    scopes: tuple[str, ...] = ("openid", "email")
    name_claim: str = "email"
    groups_claim: str = "groups"
    algorithms: tuple[str, ...] = ("RS256", "PS256", "ES256")
    acr: tuple[str, ...] = ()
    max_age_s: int = 43_200
    skew_s: int = 60


class SessionSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``idle_s``: a session ends unused after that; ``absolute_s``: it ends in any case; ``recheck_s``: how long the word of
    the provider about somebody's groups counts before it is asked again."""

    idle_s: int = 1800
    absolute_s: int = 43_200
    recheck_s: int = 300


class SsoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``origin`` is what people type, such as ``https://saw.example.com:8445``; ``rp_id`` the domain of passkeys (default: its
    host). ``roles`` gives roles to groups of the provider. ``operate``: the operators' calls are also served to those who
    signed in, as far as their roles go. ``step_up``: which decisions want a stronger or newer sign-in.
    ``automation``: accounts of the control host that programs have, whose changes over the socket are no alarm.
    ``certificate_file``/``key_file``: for the pages, instead of the broker's own certificate.
    """

    origin: str
    provider: ProviderSettings
    roles: dict[Role, tuple[str, ...]]
    listen: Listen = Listen()
    rp_id: str | None = None
    operate: bool = False
    automation: tuple[str, ...] = ()
    session: SessionSettings = SessionSettings()
    step_up: StepUpSettings = StepUpSettings()
    certificate_file: str | None = None
    key_file: str | None = None

    @property
    def passkey_domain(self) -> str:
        """The relying party id (WebAuthn Level 3, section 4) of passkeys."""
        return self.rp_id or (urlsplit(self.origin).hostname or "")

    @property
    def redirect_uri(self) -> str:
        """Where the provider sends people back to; it is registered there."""
        return f"{self.origin}/callback"

    def roles_of(self, groups: Iterable[str]) -> tuple[Role, ...]:
        """Return the roles that ``groups`` give, in a fixed order."""
        held = set(groups)
        return tuple(role for role in ROLES if held & set(self.roles.get(role, ())))


def problems_of(settings: SsoSettings) -> Iterator[str]:
    """Yield what is wrong with ``settings``, naming the field."""
    origin = urlsplit(settings.origin)
    try:
        port = origin.port
    except ValueError:
        port = 0
    plain = f"https://{origin.hostname}" + (f":{port}" if port else "")
    if settings.origin != plain or port in {0, 443} or not _HOST.match(origin.hostname or ""):
        yield "sso.origin must be https://NAME or https://NAME:PORT in lower case, without a path"
    host, domain = origin.hostname or "", settings.passkey_domain
    if not (host == domain or host.endswith(f".{domain}")):
        yield "sso.rp_id must be the host of sso.origin or a domain that it lies in"
    if not settings.provider.issuer.startswith("https://"):
        yield "sso.provider.issuer must begin with https://"
    if not settings.provider.client_id:
        yield "sso.provider.client_id must not be empty"
    if "openid" not in settings.provider.scopes:
        yield "sso.provider.scopes must have openid"
    if not settings.provider.algorithms or not ALGORITHMS.issuperset(settings.provider.algorithms):
        yield f"sso.provider.algorithms must be some of {', '.join(sorted(ALGORITHMS))}"
    yield from problems_of_step_up(settings.step_up)
    if not all(_ACCOUNT.match(name) for name in settings.automation):
        yield "sso.automation must list names of accounts"
    if not any(settings.roles.values()):
        yield "sso.roles must give a role to a group"
    if (settings.certificate_file is None) != (settings.key_file is None):
        yield "sso.certificate_file and sso.key_file belong together"
    files = {
        "sso.provider.client_secret_file": settings.provider.client_secret_file,
        "sso.provider.ca_file": settings.provider.ca_file,
        "sso.certificate_file": settings.certificate_file,
        "sso.key_file": settings.key_file,
    }
    yield from (
        f"{name} must be an absolute path"
        for name, value in files.items()
        if value is not None and not Path(value).is_absolute()
    )
    for name, value, low, high in (
        ("listen.port", settings.listen.port, 0, 65_535),
        ("provider.max_age_s", settings.provider.max_age_s, 60, 30 * 86_400),
        ("provider.skew_s", settings.provider.skew_s, 0, MAX_SKEW_S),
        ("session.idle_s", settings.session.idle_s, 60, 86_400),
        ("session.absolute_s", settings.session.absolute_s, 300, 7 * 86_400),
        ("session.recheck_s", settings.session.recheck_s, 30, 3600),
    ):
        if not low <= value <= high:
            yield f"sso.{name} must be {low} to {high}"
