"""``saw ssh``: attach to a workspace with a key and a certificate that live for minutes."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from saw.broker.client import Ingress, OperatorClient, load_context
from saw.errors import UnavailableError
from saw.files import write_private


def main(argv: list[str]) -> int:
    """Run ``saw ssh WORKSPACE [-- COMMAND …]`` and return ssh's exit code."""
    own, _, command = _split(argv)
    parser = argparse.ArgumentParser(
        prog="saw ssh",
        usage="saw ssh [--context FILE] [--ttl S] WORKSPACE [-- COMMAND …]",
        description="Attach to a workspace.",
    )
    parser.add_argument("workspace", help="workspace id")
    parser.add_argument("--context", help="context file (default: the file named by SAW_CONTEXT)")
    parser.add_argument(
        "--ttl", type=int, default=120, help="seconds within which to connect, 10 to 300 (default: %(default)s)"
    )
    options = parser.parse_args(own)
    context = load_context(options.context)
    with tempfile.TemporaryDirectory(prefix="saw-ssh-") as name:
        directory = Path(name)  # 0700, removed with the key when ssh ends
        public_key = make_key(directory)
        granted = OperatorClient(context).request(
            "POST",
            "/v1/certificates/ssh",
            {"workspace_id": options.workspace, "public_key": public_key, "ttl_s": options.ttl},
        )
        write_private(directory / "key-cert.pub", granted["certificate"] + "\n")
        write_private(directory / "known_hosts", f"@cert-authority * {granted['host_ca']}\n")
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        line = ssh_command(directory, options.workspace, granted["number"], context.ingress, command, terminal=terminal)
        return subprocess.call(line)


def make_key(directory: Path) -> str:
    """Make an Ed25519 key in ``directory`` and return its public line; the private part never leaves it."""
    line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(directory / "key")]
    try:
        subprocess.run(line, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError("ssh-keygen cannot make a key", cure="install the OpenSSH client") from error
    return (directory / "key.pub").read_text("ascii").strip()


def ssh_command(
    directory: Path, workspace: str, number: int, ingress: Ingress, command: list[str], *, terminal: bool
) -> list[str]:
    """Return the ssh command line: our key and certificate only, the host checked by its certificate, no forwarding."""
    options = {
        "CertificateFile": str(directory / "key-cert.pub"),
        "UserKnownHostsFile": str(directory / "known_hosts"),
        "GlobalKnownHostsFile": "/dev/null",
        "HostKeyAlias": workspace,
        "StrictHostKeyChecking": "yes",
        "IdentitiesOnly": "yes",
        "IdentityAgent": "none",
        "PreferredAuthentications": "publickey",
        "BatchMode": "yes",
        "ClearAllForwardings": "yes",
        "ForwardAgent": "no",
        "ControlPath": "none",
        "UpdateHostKeys": "no",
        "LogLevel": "ERROR",
        "ConnectTimeout": "60",
        "ServerAliveInterval": "15",
    }
    line = ["ssh", "-F", "/dev/null", "-i", str(directory / "key"), "-p", str(ingress.base_port + number)]
    line.append("-tt" if terminal else "-T")
    for name, value in options.items():
        line += ["-o", f"{name}={value}"]
    return [*line, "--", f"{ingress.user}@{ingress.host}", *command]


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Split at the first ``--``."""
    if "--" in argv:
        at = argv.index("--")
        return argv[:at], "--", argv[at + 1 :]
    return argv, "", []
