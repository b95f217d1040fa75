"""Where ``saw ssh --certify`` leaves key and certificate of a connection that plain ssh makes, so that no other one takes them.

A certificate logs in once. ssh has no word in its configuration for "this connection", so each connection has a folder named by
host, PID namespace and number of its process, and a file that ssh includes and that counts for this process alone: it asks the
shell for its parent.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

from saw.broker.signed_in import session_file
from saw.errors import ConfigError
from saw.files import write_private

KEYS_VARIABLE = "SAW_SSH_KEYS"
OWN = ("IdentityFile", "CertificateFile", "UserKnownHostsFile")
"""Options that a connection has from its own file."""
_NAME = re.compile(r"(?:(?P<place>[A-Za-z0-9-]+_[0-9]+)_)?(?P<process>[0-9]+)")
KEPT_S = 600
"""How long the key of a connection may lie there (seconds); its certificate counts for five minutes at most."""

#: What would end, or add to, the word of an ssh_config(5) or of a shell that it stands in.
SPECIAL = frozenset("\"'\\%$` ;&|<>()\n")


def kept_directory(workspace: str, environ: Mapping[str, str] = os.environ) -> Path:
    """Return (and make, 0700) where ``--certify`` leaves the keys of the next connections to ``workspace``."""
    if not workspace.replace("-", "").isalnum() or not workspace.isascii():
        raise ConfigError(f"{workspace!r} is not a workspace id", cure="saw workspace list shows them")
    return private(kept_base(environ) / workspace)


def kept_base(environ: Mapping[str, str]) -> Path:
    """Return the folder of all workspaces' folders; raise :class:`ConfigError` for a path that takes quotes."""
    named = environ.get(KEYS_VARIABLE)
    base = Path(named) if named else session_file({**environ, "SAW_SESSION": ""}).parent / "ssh"
    if set(str(base)) & SPECIAL:
        raise ConfigError(f"the path {base} has special characters", cure=f"name another folder in {KEYS_VARIABLE}")
    return base


def private(directory: Path, forbidden: int = 0o077) -> Path:
    """Return ``directory``, made if it was absent.

    Raises :class:`ConfigError` when it is somebody else's, or its mode has one of the bits ``forbidden``.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if directory.stat().st_uid != os.geteuid() or directory.stat().st_mode & forbidden:
        raise ConfigError(f"{directory} is not a private folder of yours", cure="remove it")
    return directory


def connection_directory(kept: Path, process: int) -> Path:
    """Return the empty folder (0700) of the connection that the ssh ``process`` makes; what ended ones left goes."""
    here, own = _here(), _named(process)
    for found in kept.iterdir():
        name = _NAME.fullmatch(found.name.removesuffix(".conf"))
        if name and (name[0] == own or _over(found, int(name["process"]) if name["place"] == here else None)):
            _remove(found)
    return private(kept / own)


def offer(kept: Path, workspace: str, process: int) -> None:
    """Have ssh use the folder of ``process`` where it is that process, and connects to ``workspace``."""
    folder = kept / _named(process)
    files = dict(zip(OWN, ("key", "key-cert.pub", "known_hosts"), strict=True))
    lines = [f'Match originalhost {workspace} exec "{own_shell(f"test $PPID = {process}")}"']
    lines += [f"    {name} {folder / file}" for name, file in files.items()]
    write_private(kept / f"{_named(process)}.conf", "\n".join(lines) + "\n")


def own_shell(command: str) -> str:
    """Return ``command`` so that ssh's shell, whichever it is, becomes one whose ``$PPID`` is ssh."""
    return f"exec sh -c '{command}'"


def _here() -> str:
    """Return the name of the place where process numbers mean what they mean here: a home may be shared by several."""
    try:
        space = Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        space = 0
    return f"{re.sub(r'[^A-Za-z0-9-]', '-', os.uname().nodename) or '-'}_{space}"


def _named(process: int) -> str:
    return f"{_here()}_{process}"


def _over(found: Path, process: int | None) -> bool:
    """Return whether nobody can use ``found`` any more: its process has ended, or its certificate long since.

    ``process`` None: it is one of another place, and of it only the age is known.
    """
    with contextlib.suppress(OSError):
        if time.time() - found.stat().st_mtime > KEPT_S:
            return True
    if process is None:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        return False
    return False


def _remove(found: Path) -> None:
    with contextlib.suppress(OSError):
        if found.suffix:
            found.unlink()
        else:
            shutil.rmtree(found)
