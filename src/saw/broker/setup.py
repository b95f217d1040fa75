"""``saw broker init``: makes keys, database and server certificate, each only when it is missing."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw.broker.config import BrokerConfig
from saw.broker.register_place import remember_kind, require_register
from saw.broker.replicas import bind_installation
from saw.broker.secret_place import (
    AUTHORITY,
    ONLINE,
    REVIEWS,
    SERVER,
    SESSIONS,
    SIGN_INS,
    SIGNER,
    SSH,
    SSH_SESSIONS,
    Known,
    known_place,
    load_authority,
    open_secrets,
    remember_place,
    require_place,
)
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError
from saw.files import locked, write_atomic
from saw.identity.names import AuthorityExistsError, private_directory
from saw.identity.sealed import KEY_BYTES
from saw.identity.ssh import KEY_NAMES, SshAuthority
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.keys import parse_private_key, private_pem, public_pem
from saw.ports import listening_on, taken
from saw.secrets.store import SecretStore, read_or_none

SERVER_TTL = timedelta(days=30)
#: A server certificate is renewed when less than this is left.
RENEW_BEFORE = timedelta(days=10)


def initialise(config: BrokerConfig, now: datetime) -> list[str]:
    """Make what is missing in the state directory and return its names; a second run returns an empty list.

    Needs no officer key: the TUF root is installed later by ``PUT /v1/policy/root`` or by the first publication.
    """
    made: list[str] = []
    if not config.state.is_dir():
        config.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        made.append(config.state.name)
    with locked(config.state):
        require_register(config)
        require_place(config)
        secrets = open_secrets(config)
        try:
            return made + _make_missing(config, secrets, now)
        finally:
            secrets.close()


_CUT_OFF = "where the first start of a new installation was cut off, remove it and start again"


def _make_missing(config: BrokerConfig, secrets: SecretStore, now: datetime) -> list[str]:
    made: list[str] = []
    if not config.keys.is_dir():
        config.keys.mkdir(mode=0o700)
        made.append(config.keys.name)
    for directory in (config.tuf_dir / "metadata", config.tuf_dir / "targets"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if known_place(config) is None:
        remember_place(config, Known(config.secrets.provider))
    if _make_authority(config, secrets, now):
        made.append("x509 authority")
    authority = load_authority(config, secrets)
    if authority.trust_domain != config.trust_domain:
        raise ConfigError(
            f"the authority in {config.keys} is of {authority.trust_domain}, the configuration says {config.trust_domain}",
            cure="a trust domain never changes: correct trust_domain",
        )
    if _make_ssh(secrets, SSH):
        made.append("ssh authority")
    if _make_online_key(config, secrets):
        made.append("tuf online key")
    if config.postgresql is None and not config.database.exists():
        made.append("database")
    store = Store.open(config, Waker())
    try:
        if config.postgresql is not None and bind_installation(store, config):
            made.append("database")
        remember_kind(config)
    finally:
        store.close()
    if renew_server_certificate(config, secrets, authority, now):
        made.append("server certificate")
    if renew_signer(secrets, authority, now):
        made.append("signer of statements")
    if _make_key(secrets, REVIEWS):
        made.append("key of reviewed calls")
    if _make_ssh(secrets, SSH_SESSIONS):
        made.append("ssh authority of sessions")
    if _make_key(secrets, SESSIONS):
        made.append("key of recordings")
    if config.sso is not None and _make_key(secrets, SIGN_INS):
        made.append("key of sign-ins")
    return made


def _make_authority(config: BrokerConfig, secrets: SecretStore, now: datetime) -> bool:
    certificate = authority_certificate(config)
    if certificate.exists():
        return False
    private_directory(certificate.parent)
    if read_or_none(secrets, AUTHORITY) is not None:
        raise AuthorityExistsError(
            f"there is {AUTHORITY} in {secrets.place} and no {certificate}",
            cure=f"put the certificate of the backup back; {_CUT_OFF}",
        )
    authority = Authority.make(config.trust_domain, now)
    secrets.write(AUTHORITY, authority.key_pem(), new=True)
    write_atomic(certificate, authority.ca_pem)
    return True


def _make_ssh(secrets: SecretStore, folder: str) -> bool:
    held = [read_or_none(secrets, f"{folder}/{name}") is not None for name in KEY_NAMES]
    if held[0]:
        return False
    if any(held):
        raise AuthorityExistsError(
            f"half of the keys of {folder} is in {secrets.place}", cure=f"put back those of the backup; {_CUT_OFF}"
        )
    for name, pem in SshAuthority.make().key_pems().items():
        secrets.write(f"{folder}/{name}", pem, new=True)
    return True


def _make_online_key(config: BrokerConfig, secrets: SecretStore) -> bool:
    raw = read_or_none(secrets, ONLINE)
    if raw is None:
        secrets.write(ONLINE, private_pem(Ed25519PrivateKey.generate()), new=True)
    public = config.keys / "tuf-online.pub"
    if raw is None or not public.exists():
        write_atomic(public, public_pem(parse_private_key(secrets.read(ONLINE), ONLINE).public_key()))
    return raw is None


def _make_key(secrets: SecretStore, name: str) -> bool:
    if read_or_none(secrets, name) is not None:
        return False
    secrets.write(name, os.urandom(KEY_BYTES), new=True)
    return True


def authority_certificate(config: BrokerConfig) -> Path:
    """Return the path of the CA certificate."""
    return config.keys / "x509" / "ca.pem"


def renew_server_certificate(config: BrokerConfig, secrets: SecretStore, authority: Authority, now: datetime) -> bool:
    """Issue a server certificate when there is none, it ends soon, or its names differ; return whether one was issued."""
    held = read_or_none(secrets, SERVER)
    if held is not None and _still_good(held, config.server_names, now):
        return False
    key, csr = new_key_and_csr(config.server_names[0], config.server_names)
    certificate = authority.issue_server(csr, config.server_names, now, SERVER_TTL, spiffe_path="service/broker")
    secrets.write(SERVER, certificate + key)
    return True


def renew_signer(secrets: SecretStore, authority: Authority, now: datetime) -> bool:
    """Make a key that signs statements when there is none or its certificate ends soon; return whether one was made.

    What it signs ends before its certificate does: a statement lives for :data:`RENEW_BEFORE` at most.
    """
    held = read_or_none(secrets, SIGNER)
    if held is not None and _still_good(held, (), now):
        return False
    key, csr = new_key_and_csr("broker statements")
    secrets.write(SIGNER, authority.issue_signer(csr, "broker", now, SERVER_TTL) + key)
    return True


def _still_good(pem: bytes, names: tuple[str, ...], now: datetime) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (ValueError, x509.ExtensionNotFound):
        return False
    return certificate.not_valid_after_utc - now > RENEW_BEFORE and set(found.get_values_for_type(x509.DNSName)) == set(
        names
    )


def require_free_port(config: BrokerConfig) -> None:
    """Raise :class:`saw.ports.TakenError` when a TLS port is held by anybody but the account that the state belongs to."""
    owner = config.state.stat().st_uid if config.state.is_dir() else -1
    places = [("the broker", config.listen.host, config.listen.port, "broker_listen_port")]
    if config.sso is not None:
        places.append(("the broker's pages", config.sso.listen.host, config.sso.listen.port, "broker_sso.listen"))
    for what, host, port, setting in places:
        holders = [holder for holder in listening_on(host, port) if holder.uid != owner or not holder.pid]
        if holders:
            raise taken(what, holders, f"{host}:{port}", setting)
