"""SPIFFE names, lifetimes and private key files shared by the two certificate authorities."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from saw.errors import SawError

#: Certificates start this long before they are issued, so that a peer whose clock is a little behind accepts them.
BACKDATE = timedelta(seconds=30)

_TRUST_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,253}[a-z0-9])?")
_SEGMENT = re.compile(r"[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?")


class IdentityError(SawError):
    """A key, certificate, name or lifetime cannot be used."""

    code = "identity_invalid"


class AuthorityExistsError(IdentityError):
    """An authority is never written over another one."""

    code = "authority_exists"


class SpiffeId(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A SPIFFE ID of the form ``spiffe://<trust domain>/<kind>/<name>`` (SPIFFE-ID, section 2)."""

    trust_domain: str
    kind: str
    name: str

    @property
    def uri(self) -> str:
        """The ID as a URI."""
        return f"spiffe://{self.trust_domain}/{self.kind}/{self.name}"


def check_trust_domain(name: str) -> str:
    """Return ``name`` when it is a SPIFFE trust domain (lower-case host name without port); raise :class:`IdentityError`."""
    if not _TRUST_DOMAIN.fullmatch(name) or ".." in name:
        raise IdentityError(f"{name!r} is not a trust domain", cure="use a lower-case DNS name such as saw.example")
    return name


def check_segment(value: str, what: str) -> str:
    """Return ``value`` when it may stand in a SPIFFE path: 1–64 of ``a-z 0-9 . _ -``, alphanumeric at both ends."""
    if not _SEGMENT.fullmatch(value):
        raise IdentityError(
            f"{what} {value!r} is not usable in a name", cure="use a-z, 0-9, '.', '_' and '-', at most 64"
        )
    return value


def parse_spiffe_id(uri: str) -> SpiffeId:
    """Parse exactly ``spiffe://<trust domain>/<kind>/<name>``; anything else raises :class:`IdentityError`."""
    scheme, separator, rest = uri.partition("://")
    parts = rest.split("/")
    if scheme != "spiffe" or not separator or len(parts) != 3:
        raise IdentityError(
            f"{uri!r} is not a SPIFFE ID of this system", cure="expected spiffe://<domain>/<kind>/<name>"
        )
    return SpiffeId(
        trust_domain=check_trust_domain(parts[0]),
        kind=check_segment(parts[1], "kind"),
        name=check_segment(parts[2], "name"),
    )


def lifetime(ttl: timedelta | int, limit: timedelta, what: str) -> timedelta:
    """Return ``ttl`` (a timedelta, or whole seconds) when it is positive and at most ``limit``; else raise."""
    duration = timedelta(seconds=ttl) if isinstance(ttl, int) else ttl
    if not timedelta(0) < duration <= limit:
        raise IdentityError(
            f"a {what} cannot live {duration.total_seconds():.0f} s",
            cure=f"ask for 1 to {limit.total_seconds():.0f} seconds",
        )
    return duration


def utc(now: datetime) -> datetime:
    """Return ``now`` in UTC without microseconds; raise :class:`IdentityError` for a time without zone."""
    if now.tzinfo is None:
        raise IdentityError("the time given has no time zone", cure="pass a datetime with tzinfo=UTC")
    return now.astimezone(UTC).replace(microsecond=0)


def private_directory(path: Path) -> Path:
    """Create ``path`` with mode 0700, or check that it is not open to others."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & 0o077:
        raise IdentityError(f"{path} is open to group or others", cure=f"chmod 0700 {path}")
    return path


def read_private(path: Path) -> bytes:
    """Return the content of a key file; raise :class:`IdentityError` when it is missing or open to group or others."""
    try:
        mode = path.stat().st_mode
        raw = path.read_bytes()
    except OSError as error:
        raise IdentityError(
            f"cannot read the key {path}: {error.strerror}", cure="create the authority first"
        ) from error
    if mode & 0o077:
        raise IdentityError(f"the key {path} is open to group or others", cure=f"chmod 0600 {path}")
    return raw
