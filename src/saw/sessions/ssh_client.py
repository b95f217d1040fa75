"""The OpenSSH client as we run it: our key and certificate only, the host checked by its certificate, nothing forwarded."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

OPTIONS = {
    "StrictHostKeyChecking": "yes",
    "IdentitiesOnly": "yes",
    "IdentityAgent": "none",
    "PreferredAuthentications": "publickey",
    "BatchMode": "yes",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "ForwardX11": "no",
    "ControlMaster": "no",
    "ControlPath": "none",
    "UpdateHostKeys": "no",
    "LogLevel": "ERROR",
    "ConnectTimeout": "60",
    # A workspace's SSH server takes no connection while it loads a new host certificate.
    "ConnectionAttempts": "15",
    "ServerAliveInterval": "15",
}
"""Options of every connection (ssh_config(5))."""


def host_options(directory: Path, alias: str) -> dict[str, str]:
    """Return :data:`OPTIONS` with the files of ``directory``: ``key``, ``key-cert.pub`` and ``known_hosts``."""
    return {
        "IdentityFile": str(directory / "key"),
        "CertificateFile": str(directory / "key-cert.pub"),
        "UserKnownHostsFile": str(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": alias,
        **OPTIONS,
    }


def ssh_line(
    directory: Path,
    alias: str,
    user: str,
    address: tuple[str, int],
    command: Sequence[str],
    *,
    terminal: bool,
    subsystem: bool = False,
    entered: Path | None = None,
) -> list[str]:
    """Return the command line of ssh to ``address`` (host, port), whose host certificate is for ``alias``.

    ``command`` is what to run there, empty for a shell; with ``subsystem`` it is the name of one. ``entered`` is a file that ssh
    makes once it is logged in, before it asks for anything there.
    """
    host, port = address
    line = ["ssh", "-F", "/dev/null", "-p", str(port), "-tt" if terminal else "-T"]
    if subsystem:
        line.append("-s")
    for name, value in host_options(directory, alias).items():
        line += ["-o", f"{name}={value}"]
    if entered is not None:
        line += ["-o", "PermitLocalCommand=yes", "-o", f"LocalCommand=: > {shlex.quote(str(entered))}"]
    return [*line, "--", f"{user}@{host}", *command]
