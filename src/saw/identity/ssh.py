"""The SSH authority: user certificates of minutes and host certificates (OpenSSH PROTOCOL.certkeys).

User certificates carry no custom extension: libraries differ in how they treat unknown ones. The session id travels as the
key id and, where a recorder wants it, inside the forced command.
"""

from __future__ import annotations

import ipaddress
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Self

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import SSHCertificateBuilder, SSHCertificateType

from saw.files import write_private
from saw.identity.names import (
    BACKDATE,
    AuthorityExistsError,
    IdentityError,
    check_segment,
    lifetime,
    private_directory,
    read_private,
    utc,
)

USER_TTL = timedelta(minutes=5)
HOST_TTL = timedelta(days=90)
FORWARD = "forward:"
"""Before the workspace id, the principal of certificates that reach one port and run nothing. No workspace id holds a colon."""
#: Under these names the two keys lie, that of users first.
KEY_NAMES = ("ssh-user-ca", "ssh-host-ca")

_PLAIN_TYPES = frozenset({"ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ssh-rsa"})
_PRINCIPAL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,126}[A-Za-z0-9])?")
_PublicKey = ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey


class SshAuthority:
    """Two Ed25519 keys, one for users and one for hosts, so that neither kind of certificate can pass for the other."""

    def __init__(
        self,
        user_key: ed25519.Ed25519PrivateKey,
        host_key: ed25519.Ed25519PrivateKey,
        random_serial: Callable[[], int] = lambda: secrets.randbits(63),
    ) -> None:
        self._user_key = user_key
        self._host_key = host_key
        self._random_serial = random_serial
        #: Public keys in ``authorized_keys`` form, one line without comment.
        self.user_ca = _public_line(user_key)
        self.host_ca = _public_line(host_key)

    @classmethod
    def create(cls, directory: Path | str) -> Self:
        """Make both keys in ``directory`` (0700, keys 0600); raise :class:`AuthorityExistsError` if one is there."""
        directory = private_directory(Path(directory))
        if any((directory / name).exists() for name in KEY_NAMES):
            raise AuthorityExistsError(f"{directory} already holds an SSH authority", cure="load it")
        made = cls.make()
        for name, pem in made.key_pems().items():
            write_private(directory / name, pem)
        return made

    @classmethod
    def make(cls) -> Self:
        """Make both keys; they lie nowhere yet."""
        return cls(ed25519.Ed25519PrivateKey.generate(), ed25519.Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, directory: Path | str) -> Self:
        """Read both keys of ``directory``; raise :class:`IdentityError` when one cannot be used."""
        return cls.parse({name: read_private(Path(directory) / name) for name in KEY_NAMES}, str(directory))

    @classmethod
    def parse(cls, pems: Mapping[str, bytes], place: str) -> Self:
        """Read both keys as :meth:`key_pems` gives them; raise :class:`IdentityError` that says that they came from ``place``."""
        keys: list[ed25519.Ed25519PrivateKey] = []
        for name in KEY_NAMES:
            where = f"{place}/{name}"
            try:
                key = serialization.load_ssh_private_key(pems[name], None)
            except (ValueError, TypeError, UnsupportedAlgorithm) as error:
                raise IdentityError(f"{where} is not a usable key", cure="restore it from its backup") from error
            if not isinstance(key, ed25519.Ed25519PrivateKey):
                raise IdentityError(f"{where} is not an Ed25519 key", cure="restore it from its backup")
            keys.append(key)
        return cls(keys[0], keys[1])

    def key_pems(self) -> dict[str, bytes]:
        """Return both private keys (PEM, OpenSSH) by :data:`KEY_NAMES`, for where they are kept."""
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        return {
            name: key.private_bytes(*form)
            for name, key in zip(KEY_NAMES, (self._user_key, self._host_key), strict=True)
        }

    def issue_user(
        self,
        public_key: str,
        workspace_id: str,
        session_id: str,
        now: datetime,
        ttl: timedelta | int = USER_TTL,
        *,
        source_address: str | None = None,
        force_command: str | None = None,
        terminal: bool = True,
        forward: bool = False,
    ) -> str:
        """Return a user certificate line for one workspace and one session.

        The only principal is ``workspace_id`` and the key id is ``session_id``. ``ttl`` is at most five minutes.
        ``source_address`` is a comma-separated list of addresses or networks. Only a terminal is permitted, and none without
        ``terminal``: no port, agent or X11 forwarding, no user rc file. With ``forward`` the principal is the workspace's for
        its account of forwarded ports (:data:`FORWARD`), which nothing else logs in to, and there is no terminal.
        """
        builder = (
            self._builder(public_key, now, lifetime(ttl, USER_TTL, "user certificate"))
            .type(SSHCertificateType.USER)
            .key_id(_session(session_id).encode())
            .valid_principals([(FORWARD * forward + check_segment(workspace_id, "workspace id")).encode()])
        )
        if terminal and not forward:
            builder = builder.add_extension(b"permit-pty", b"")
        if force_command is not None:
            if not force_command or any(ord(character) < 32 for character in force_command):
                raise IdentityError("the forced command is empty or holds control characters", cure="give one line")
            builder = builder.add_critical_option(b"force-command", force_command.encode())
        if source_address is not None:
            builder = builder.add_critical_option(b"source-address", _addresses(source_address).encode())
        return builder.sign(self._user_key).public_bytes().decode()

    def issue_host(
        self, public_key: str, principals: Sequence[str], now: datetime, ttl: timedelta | int = HOST_TTL
    ) -> str:
        """Return a host certificate line for ``principals`` (names or addresses by which clients reach the host)."""
        if not principals or not all(_PRINCIPAL.fullmatch(name) for name in principals):
            raise IdentityError("a host certificate needs usable principals", cure="pass host names or addresses")
        return (
            self._builder(public_key, now, lifetime(ttl, HOST_TTL, "host certificate"))
            .type(SSHCertificateType.HOST)
            .key_id(principals[0].encode())
            .valid_principals([name.encode() for name in principals])
            .sign(self._host_key)
            .public_bytes()
            .decode()
        )

    def _builder(self, public_key: str, now: datetime, ttl: timedelta) -> SSHCertificateBuilder:
        start = utc(now)
        return (
            SSHCertificateBuilder()
            .public_key(parse_public_key(public_key))
            .serial(self._random_serial())
            .valid_after(int((start - BACKDATE).timestamp()))
            .valid_before(int((start + ttl).timestamp()))
        )


def parse_public_key(line: str) -> _PublicKey:
    """Read one plain OpenSSH public key line (Ed25519, ECDSA P-256 or P-384, RSA ≥ 3072); certificates are refused."""
    parts = line.strip().split()
    if len(line) > 4096 or len(parts) < 2 or parts[0] not in _PLAIN_TYPES or "\n" in line.strip():
        raise IdentityError("the SSH key is not one plain public key line", cure="send ssh-ed25519, ecdsa or rsa")
    try:
        key = serialization.load_ssh_public_key(" ".join(parts[:2]).encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError) as error:
        raise IdentityError("the SSH public key is malformed", cure="send the content of the .pub file") from error
    if isinstance(key, rsa.RSAPublicKey) and key.key_size < 3072:
        raise IdentityError(f"an RSA key of {key.key_size} bits is too short", cure="use ssh-ed25519")
    if not isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise IdentityError(f"SSH keys of type {parts[0]} are not accepted", cure="use ssh-ed25519")
    return key


def _public_line(key: ed25519.Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def _session(value: str) -> str:
    if not _PRINCIPAL.fullmatch(value):
        raise IdentityError(f"{value!r} is not a session id", cure="use letters, digits, '.', '_' and '-'")
    return value


def _addresses(value: str) -> str:
    try:
        return ",".join(str(ipaddress.ip_network(part.strip())) for part in value.split(","))
    except ValueError as error:
        raise IdentityError(f"{value!r} is not a list of addresses", cure="use 192.0.2.7 or 192.0.2.0/24") from error
