"""What sshd says of who logged in (``ExposeAuthInfo``): the certificate, from where, and what it is to run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import msgspec
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHCertificate,
    load_ssh_public_identity,
)

from saw.errors import SawError

SFTP = "saw-sftp"
"""What the bastion's sshd names the SFTP subsystem in ``SSH_ORIGINAL_COMMAND``."""
_SESSION = re.compile(r"ses-[0-9a-f]{32}")
_MAX_COMMAND = 4096


class NotPresented(SawError):
    """Nobody logged in with the certificate of a session."""

    code = "no_session"


class Presented(msgspec.Struct, frozen=True):
    """``command`` is empty for a shell; ``sftp`` is whether the subsystem was asked for."""

    session_id: str
    key_sha256: str
    address: str
    command: str
    sftp: bool


def read_presented(environ: Mapping[str, str]) -> Presented:
    """Return who logged in, from sshd's environment; raise :class:`NotPresented` when it was not with a session."""
    cure = "connect with saw ssh"
    try:
        said = Path(environ["SSH_USER_AUTH"]).read_text("ascii").splitlines()
    except (KeyError, OSError, UnicodeDecodeError) as error:
        raise NotPresented("sshd does not say how you logged in", cure="sshd needs ExposeAuthInfo yes") from error
    keys = [line.split(" ", 1)[1] for line in said if line.startswith("publickey ")]
    if len(said) != 1 or len(keys) != 1:
        raise NotPresented("a session takes one certificate and nothing else", cure=cure)
    try:
        certificate = load_ssh_public_identity(keys[0].encode())
    except (ValueError, UnsupportedAlgorithm, NotImplementedError) as error:
        raise NotPresented("what you logged in with is no certificate", cure=cure) from error
    if not isinstance(certificate, SSHCertificate):
        raise NotPresented("a plain key opens no session", cure=cure)
    session = certificate.key_id.decode("ascii", "replace")
    if not _SESSION.fullmatch(session) or certificate.valid_principals != [session.encode()]:
        raise NotPresented("the certificate is not of a session", cure=cure)
    line = certificate.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    command = environ.get("SSH_ORIGINAL_COMMAND", "")
    if len(command) > _MAX_COMMAND:
        raise NotPresented(f"the command has more than {_MAX_COMMAND} characters", cure="put it into a file")
    return Presented(
        session_id=session,
        key_sha256=hashlib.sha256(line).hexdigest(),
        address=environ.get("SSH_CONNECTION", "").partition(" ")[0][:64],
        command="" if command == SFTP else command,
        sftp=command == SFTP,
    )
