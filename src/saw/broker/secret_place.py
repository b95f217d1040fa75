"""The broker's own secrets: their names, the place that the configuration says, and the place where they are known to be.

``secrets.json`` of the state directory says where they are. It is written before the first one, so whoever changes the setting
``secrets``, or loses it, is refused by name: a broker never makes new authorities in place of those that lie elsewhere.
Certificates and public keys stay as files in ``keys/``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from saw.broker.config import BrokerConfig
from saw.errors import ConfigError
from saw.files import load_json, write_private
from saw.identity.sealed import KEY_BYTES, SealKey
from saw.identity.ssh import KEY_NAMES, SshAuthority
from saw.identity.x509 import Authority
from saw.secrets.settings import Provider, open_store
from saw.secrets.store import SecretMissing, SecretStore

AUTHORITY = "x509/ca-key.pem"
ONLINE = "tuf-online.key"
SERVER = "server.pem"
SIGNER = "signer.pem"
SESSIONS = "sessions.key"
REVIEWS = "reviews.key"
SIGN_INS = "sso.key"
SSH, SSH_SESSIONS = "ssh", "ssh-sessions"

#: Every secret that the broker makes.
NAMES = (
    AUTHORITY,
    *(f"{folder}/{name}" for folder in (SSH, SSH_SESSIONS) for name in KEY_NAMES),
    ONLINE,
    SERVER,
    SIGNER,
    SESSIONS,
    REVIEWS,
    SIGN_INS,
)
#: The broker itself makes these anew from time to time; an old one is worth nothing.
RENEWED = frozenset({SERVER, SIGNER})
#: Keys (32 bytes) that encrypt things in the database.
SEALING = frozenset({SESSIONS, REVIEWS, SIGN_INS})
BACKUP = "put back the key of the backup"
MISSING = f"run saw broker init; after a restore, {BACKUP}"


class Known(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the secrets are. ``leaving``: where copies may still be that a move has not removed yet."""

    provider: Provider
    leaving: Provider | None = None


def folders(config: BrokerConfig) -> dict[str, Path]:
    """Return the places in the state directory."""
    return {"files": config.keys, "sealed": config.state / "sealed"}


def open_secrets(
    config: BrokerConfig,
    provider: Provider | None = None,
    *,
    random: Callable[[int], bytes] = os.urandom,
    environ: Mapping[str, str] = os.environ,
) -> SecretStore:
    """Open the place that the configuration says, or another one; raise :class:`ConfigError` when it cannot be opened."""
    settings = config.secrets
    return open_store(settings, provider or settings.provider, folders(config), random=random, environ=environ)


def place_file(config: BrokerConfig) -> Path:
    """Return the path of the file that says where the secrets are."""
    return config.state / "secrets.json"


def known_place(config: BrokerConfig) -> Known | None:
    """Return where the secrets are known to be; None where there are none yet. One of before this file has plain files."""
    if place_file(config).exists():
        return load_json(place_file(config), Known)
    return Known("files") if (config.keys / AUTHORITY).exists() else None


def remember_place(config: BrokerConfig, known: Known) -> None:
    """Note where the secrets are."""
    if not place_file(config).exists() or known_place(config) != known:
        write_private(place_file(config), msgspec.json.encode(known))


def require_place(config: BrokerConfig) -> None:
    """Raise :class:`ConfigError` when the secrets of this installation are elsewhere than the configuration says."""
    known, wanted = known_place(config), config.secrets.provider
    if known is not None and known.provider != wanted:
        raise ConfigError(
            f"the secrets of this installation are in {known.provider}, and the configuration says {wanted}",
            cure=f"saw broker secrets move --to {wanted}, while no broker serves; or name {known.provider} again",
            details={"known": known.provider, "configured": wanted},
        )


def require_way(config: BrokerConfig) -> None:
    """Raise :class:`ConfigError` when the configuration does not even say how the place is reached where the secrets are."""
    known, settings = known_place(config), config.secrets
    ways = {"files", settings.provider} | {kind for kind in ("sealed", "vault") if getattr(settings, kind) is not None}
    if known is not None and (missing := {known.provider, known.leaving or "files"} - ways):
        raise ConfigError(
            f"secrets of this installation are in {', '.join(sorted(missing))}, which the configuration does not name",
            cure="name it again in the setting secrets (docs/broker.md); to move them, name both places",
        )


def load_authority(config: BrokerConfig, secrets: SecretStore) -> Authority:
    """Return the X.509 authority; raise :class:`saw.identity.names.IdentityError` or what the place refuses."""
    folder = config.keys / "x509"
    try:
        certificate = (folder / "ca.pem").read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {folder / 'ca.pem'}: {error.strerror}", cure=MISSING) from error
    return Authority.parse(_needed(secrets, AUTHORITY), certificate, str(folder))


def load_ssh(secrets: SecretStore, folder: str) -> SshAuthority:
    """Return the SSH authority whose keys lie under ``folder``."""
    return SshAuthority.parse({name: _needed(secrets, f"{folder}/{name}") for name in KEY_NAMES}, folder)


def load_seal_key(
    secrets: SecretStore,
    name: str,
    random: Callable[[int], bytes],
    *,
    absent: str = MISSING,
    malformed: str = BACKUP,
) -> SealKey:
    """Return a key that encrypts things in the database; raise :class:`ConfigError` with the cure ``absent`` or ``malformed``."""
    key = _needed(secrets, name, absent)
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{name} in {secrets.place} is not a key of {KEY_BYTES} bytes", cure=malformed)
    return SealKey(key, random)


def _needed(secrets: SecretStore, name: str, cure: str = MISSING) -> bytes:
    try:
        return secrets.read(name)
    except SecretMissing as error:
        raise ConfigError(error.message, cure=cure, details={"secret": name}) from error


class Signer:
    """The key that signs statements, with its certificate: read when it is first needed, and again after it was renewed."""

    def __init__(self, secrets: SecretStore) -> None:
        self._secrets = secrets
        self._pem: bytes | None = None

    @property
    def pem(self) -> bytes:
        """Certificate and key (PEM)."""
        if self._pem is None:
            self._pem = self._secrets.read(SIGNER)
        return self._pem

    def look_again(self) -> None:
        """Take what is there now; what was known stays in use where that fails."""
        self._pem = self._secrets.read(SIGNER)
