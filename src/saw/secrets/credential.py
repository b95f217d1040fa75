"""The key of sealed secrets as systemd keeps it: an encrypted credential that it opens for the unit alone.

``systemd-creds(1)`` encrypts it under a secret of the host, its TPM, or both; ``LoadCredentialEncrypted=`` (systemd.exec(5))
hands it over as a file below ``$CREDENTIALS_DIRECTORY``, in memory that is never swapped.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from saw.errors import ConfigError
from saw.files import locked, write_private
from saw.identity.sealed import KEY_BYTES
from saw.secrets.store import SecretError

WithKey = Literal["auto", "host", "host+tpm2", "tpm2"]
WITH_KEY: tuple[WithKey, ...] = ("auto", "host", "host+tpm2", "tpm2")
DIRECTORY = "CREDENTIALS_DIRECTORY"
_TIMEOUT_S = 60
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


def is_credential(name: str) -> bool:
    """Tell whether ``name`` may be the name of a credential."""
    return _NAME.fullmatch(name) is not None


def handed_over(name: str, environ: Mapping[str, str]) -> bytes:
    """Return the key (32 bytes) that systemd handed to this process; raise :class:`ConfigError`."""
    folder = environ.get(DIRECTORY, "")
    if not folder:
        raise ConfigError(
            f"no credential {name} was handed to this process",
            cure=f"start it by its unit; else systemd-run --property=LoadCredentialEncrypted={name}:FILE",
        )
    return read_key(Path(folder) / name)


def read_key(path: Path) -> bytes:
    """Return the key in a file that nobody may read but its owner and, by systemd's access list, the service.

    Raise :class:`ConfigError` for any other file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            mode = os.fstat(descriptor).st_mode
            raw = stream.read(KEY_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError(
            f"cannot read the key {path}: {error.strerror}", cure="see LoadCredentialEncrypted= of the unit"
        ) from error
    if mode & 0o007 or mode & 0o020:
        raise ConfigError(f"the key {path} is open to others", cure=f"chmod 0400 {path}")
    if len(raw) != KEY_BYTES:
        raise ConfigError(f"{path} is not a key of {KEY_BYTES} bytes", cure="saw broker secrets key makes one")
    return raw


def make_credential(
    out: Path,
    name: str,
    with_key: WithKey,
    *,
    random: Callable[[int], bytes],
    given: Path | None = None,
    recovery: Path | None = None,
    program: Sequence[str] = ("systemd-creds",),
) -> bool:
    """Make the encrypted credential ``out`` (0600) when there is none; return whether one was made.

    ``given``: a file with the key of another host, or of a lost one. ``recovery``: where a copy of the key is written in the
    clear (0600), before anything is sealed under it. The key goes to ``systemd-creds`` by a pipe, and is opened again before the
    file takes its place. Raises :class:`ConfigError` or :class:`SecretError`.
    """
    if not is_credential(name):
        raise ConfigError(f"{name[:64]!r} is not the name of a credential", cure="use a-z, 0-9, '.', '_' and '-'")
    out.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(out.parent):
        if out.exists():
            return False
        key = random(KEY_BYTES) if given is None else read_key(given)
        if recovery is not None and recovery.exists():
            raise SecretError(f"{recovery} is there already", cure="name a new file; nothing was made")
        with tempfile.TemporaryDirectory(prefix=".saw-credential-", dir=out.parent) as folder:
            made = Path(folder) / name
            _run([*program, "encrypt", f"--name={name}", f"--with-key={with_key}", "-", str(made)], key)
            if _run([*program, "decrypt", f"--name={name}", str(made), "-"], b"") != key:
                raise SecretError(
                    "systemd-creds does not open what it encrypted", cure="see its messages; nothing was made"
                )
            if recovery is not None:
                write_private(recovery, key)
            write_private(out, made.read_bytes())
    return True


def _run(command: Sequence[str], given: bytes) -> bytes:
    try:
        done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_TIMEOUT_S)
    except FileNotFoundError as error:
        raise SecretError(f"there is no {command[0]}", cure="systemd 250 or later brings it") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SecretError(
            f"{command[0]} did not run: {type(error).__name__}", cure="run it by hand; nothing was made"
        ) from error
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise SecretError(
            f"{command[0]} {command[1]} failed: {said[-1][:200] if said else done.returncode}",
            cure="without a TPM use --with-key host; nothing was made",
        )
    return done.stdout
