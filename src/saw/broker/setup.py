"""``saw broker init``: makes keys, database and server certificate, each only when it is missing."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509

from saw.broker.config import BrokerConfig
from saw.broker.register_place import remember_kind, require_register
from saw.broker.replicas import bind_installation
from saw.broker.review_vault import make_vault_key
from saw.broker.sso.sealed import make_seal_key
from saw.broker.store import Store
from saw.broker.wake import Waker
from saw.errors import ConfigError
from saw.files import locked, write_private
from saw.identity.sealed import make_key_file
from saw.identity.ssh import SshAuthority
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.keys import create_key
from saw.ports import listening_on, taken

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
        return made + _make_missing(config, now)


def _make_missing(config: BrokerConfig, now: datetime) -> list[str]:
    made: list[str] = []
    require_register(config)
    if not config.keys.is_dir():
        config.keys.mkdir(mode=0o700)
        made.append(config.keys.name)
    for directory in (config.tuf_dir / "metadata", config.tuf_dir / "targets"):
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    if not (config.keys / "x509" / "ca.pem").exists():
        Authority.create(config.keys / "x509", config.trust_domain, now)
        made.append("x509 authority")
    authority = Authority.load(config.keys / "x509")
    if authority.trust_domain != config.trust_domain:
        raise ConfigError(
            f"the authority in {config.keys} is of {authority.trust_domain}, the configuration says {config.trust_domain}",
            cure="a trust domain never changes: correct trust_domain",
        )
    if not (config.keys / "ssh" / "ssh-user-ca").exists():
        SshAuthority.create(config.keys / "ssh")
        made.append("ssh authority")
    if not (config.keys / "tuf-online.key").exists():
        create_key(config.keys, "tuf-online")
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
    if renew_server_certificate(config, authority, now):
        made.append("server certificate")
    if renew_signer(config, authority, now):
        made.append("signer of statements")
    if make_vault_key(config):
        made.append("key of reviewed calls")
    if not (config.keys / "ssh-sessions" / "ssh-user-ca").exists():
        SshAuthority.create(config.keys / "ssh-sessions")
        made.append("ssh authority of sessions")
    if make_key_file(config.keys / "sessions.key"):
        made.append("key of recordings")
    if make_seal_key(config):
        made.append("key of sign-ins")
    return made


def server_files(config: BrokerConfig) -> tuple[Path, Path]:
    """Return the paths of the server's certificate (with its key in one file) and of the CA certificate."""
    return config.keys / "server.pem", config.keys / "x509" / "ca.pem"


def renew_server_certificate(config: BrokerConfig, authority: Authority, now: datetime) -> bool:
    """Issue a server certificate when there is none, it ends soon, or its names differ; return whether one was issued."""
    path, _ = server_files(config)
    if path.exists() and _still_good(path.read_bytes(), config.server_names, now):
        return False
    key, csr = new_key_and_csr(config.server_names[0], config.server_names)
    certificate = authority.issue_server(csr, config.server_names, now, SERVER_TTL, spiffe_path="service/broker")
    write_private(path, certificate + key)
    return True


def signer_file(config: BrokerConfig) -> Path:
    """Return the path of the key that signs statements, with its certificate in one file."""
    return config.keys / "signer.pem"


def renew_signer(config: BrokerConfig, authority: Authority, now: datetime) -> bool:
    """Make a key that signs statements when there is none or its certificate ends soon; return whether one was made.

    What it signs ends before its certificate does: a statement lives for :data:`RENEW_BEFORE` at most.
    """
    path = signer_file(config)
    if path.exists() and _still_good(path.read_bytes(), (), now):
        return False
    key, csr = new_key_and_csr("broker statements")
    write_private(path, authority.issue_signer(csr, "broker", now, SERVER_TTL) + key)
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
