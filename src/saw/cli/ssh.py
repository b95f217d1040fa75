"""``saw ssh``: attach to a workspace with a key and a certificate that live for minutes.

With a bastion in the context file the session goes through it and is recorded; the certificate then logs in once.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from saw.broker.client import Bastion, Context, OperatorClient, load_context
from saw.broker.signed_in import call, load, session_file
from saw.cli.ssh_kept import (
    OWN,
    SPECIAL,
    connection_directory,
    kept_base,
    kept_directory,
    offer,
    own_shell,
    private,
)
from saw.errors import ConfigError, UnavailableError
from saw.files import write_private
from saw.sessions.ssh_client import host_options, ssh_line

DIRECT = "/v1/certificates/ssh"


class Granted(msgspec.Struct, frozen=True):
    """What a connection takes: where the server is, as whom to log in, and under which name it is certified. ``session`` is what
    the audit trail calls it."""

    address: tuple[str, int]
    user: str
    alias: str
    session: str


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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--config", action="store_true", help="print the part of ~/.ssh/config with which ssh, scp and rsync work"
    )
    instead.add_argument(
        "--certify",
        action="store_true",
        help="only obtain key and certificate (that part runs this before each connection)",
    )
    parser.add_argument(
        "--process",
        type=int,
        metavar="PID",
        help="with --certify: the ssh that they are for, and that no other one uses",
    )
    options = parser.parse_args(own)
    context = load_context(options.context)
    if options.config:
        print(snippet(context, options.workspace, options.context, options.ttl), end="")
        return 0
    if options.certify:
        leave(context, options.workspace, options.process, options.ttl)
        return 0
    return attach(context, options.workspace, command, options.ttl)


def attach(context: Context, workspace: str, command: Sequence[str], ttl_s: int) -> int:
    """Run ``command`` in a workspace, a shell when it is empty, and return ssh's exit code."""
    leave_no_key()
    with tempfile.TemporaryDirectory(prefix="saw-ssh-") as name:
        directory = Path(name)  # 0700, removed with the key when ssh ends
        to = certify(context, workspace, directory, ttl_s)
        terminal = sys.stdin.isatty() and sys.stdout.isatty()
        return subprocess.call(ssh_line(directory, to.alias, to.user, to.address, command, terminal=terminal))


def leave(context: Context, workspace: str, process: int | None, ttl_s: int) -> None:
    """Obtain key and certificate for the ssh ``process``; without one, where configurations from before look for them."""
    kept = kept_directory(workspace)
    if process is None:
        certify(context, workspace, kept, ttl_s)
        return
    certify(context, workspace, connection_directory(kept, process), ttl_s)
    offer(kept, workspace, process)


def leave_no_key() -> None:
    """Let a hang-up or a request to end go the way of every end, on which folders are removed; what is ignored stays so."""

    wanted = (signal.SIGHUP, signal.SIGTERM)

    def end(number: int, _frame: object) -> None:
        for one in wanted:
            signal.signal(one, signal.SIG_IGN)  # a second one must not cut the removal off
        raise SystemExit(128 + number)

    for number in wanted:
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def certify(
    context: Context, workspace: str, directory: Path, ttl_s: int, *, forward_port: int | None = None
) -> Granted:
    """Make a key in ``directory``, have it certified for one session with ``workspace``, and put beside it what ssh needs.

    With ``forward_port``, which takes a bastion, the session is for that port and nothing else.
    """
    public_key = make_key(directory)
    wanted: dict[str, Any] = {"workspace_id": workspace, "public_key": public_key, "ttl_s": ttl_s}
    bastion = context.bastion
    if bastion is None:
        given = OperatorClient(context).request("POST", DIRECT, wanted)
        ingress = context.ingress
        to = Granted(ingress.of(given["number"]), ingress.user, workspace, given["session_id"])
    else:
        wanted["source_address"] = bastion.source_address
        if forward_port is not None:
            wanted["forward_port"] = forward_port
        if bastion.sign_in:
            session = load(session_file())
            given = call(session.place, "POST", "/v1/sso/sessions", wanted, token=session.token)
        else:
            given = OperatorClient(context).request("POST", "/v1/sessions", wanted)
        to = Granted((bastion.host, bastion.port), bastion.user, given["host_name"], given["session_id"])
    write_private(directory / "key-cert.pub", given["certificate"] + "\n")
    write_private(directory / "known_hosts", f"@cert-authority * {given['host_ca']}\n")
    return to


def make_key(directory: Path) -> str:
    """Make an Ed25519 key in ``directory`` and return its public line; the private part never leaves it."""
    for name in ("key", "key.pub", "key-cert.pub"):
        (directory / name).unlink(missing_ok=True)
    line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(directory / "key")]
    try:
        subprocess.run(line, check=True, stdin=subprocess.DEVNULL, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UnavailableError("ssh-keygen cannot make a key", cure="install the OpenSSH client") from error
    return (directory / "key.pub").read_text("ascii").strip()


def snippet(context: Context, workspace: str, context_file: str | None, ttl_s: int) -> str:
    """Return the part of ssh_config(5) with which plain ssh, scp, sftp, rsync and Ansible reach ``workspace``.

    ssh runs ``saw ssh --certify`` for each connection before it reads the key. Raises :class:`ConfigError` without a bastion.
    """
    bastion: Bastion | None = context.bastion
    if bastion is None:
        raise ConfigError(
            "the context names no bastion", cure="use saw ssh, or write the bastion into the context file"
        )
    directory = kept_directory(workspace)
    options = {
        "Include": f"{directory}/*.conf",
        "HostName": bastion.host,
        "Port": str(bastion.port),
        "User": bastion.user,
        **_shared(directory),
    }
    lines = [f'Match originalhost {workspace} exec "{_certify_words(context_file, ttl_s, workspace)}"']
    lines += [f"    {name} {value}" for name, value in options.items()]
    return "\n".join(lines) + "\n"


def fleet_file(context: Context, context_file: str | None, ttl_s: int, environ: Mapping[str, str] = os.environ) -> Path:
    """Write an ssh_config(5) of its own with which ``ssh -F FILE ID`` reaches every workspace, and return its path.

    As in :func:`snippet`, ssh obtains a certificate for each connection; where it gets none, it connects to nothing. Without a
    bastion the caller adds what differs from workspace to workspace: the port and ``HostKeyAlias``, which is the id.
    """
    # The keys are in private folders below it; here it matters that nobody else can put a file in the place of ours.
    base = private(kept_base(environ), 0o022)
    options = {"Include": f"{base}/*/*.conf", **_shared(base)}
    if context.bastion is not None:
        where = {"HostName": context.bastion.host, "Port": str(context.bastion.port), "User": context.bastion.user}
    else:
        where = {"HostName": context.ingress.host, "User": context.ingress.user}
        del options["HostKeyAlias"]
    words = _certify_words(context_file, ttl_s, "%n")
    lines = [f'Match !exec "{words}"', "    HostName no-certificate.saw.invalid", "Host *"]
    lines += [f"    {name} {value}" for name, value in {**options, **where}.items()]
    text = "\n".join(lines) + "\n"
    file = base / f"fleet-{hashlib.sha256(text.encode()).hexdigest()[:16]}.conf"
    if not file.exists():
        write_private(file, text)
    return file


def _shared(directory: Path) -> dict[str, str]:
    """Return the options that all connections have alike; what each has for itself is in the file that it includes."""
    found = host_options(directory, "saw-bastion")
    return {name: value for name, value in found.items() if name not in OWN}


def _certify_words(context_file: str | None, ttl_s: int, workspace: str) -> str:
    """Return the command that certifies ``workspace`` for the ssh that runs it; raise :class:`ConfigError` for paths that need
    quotes."""
    named = context_file or os.environ.get("SAW_CONTEXT")
    words = [str(Path(sys.executable).parent / "saw"), "ssh", "--certify", "--ttl", str(ttl_s)]
    words += ["--context", str(Path(named).resolve())] if named else []
    if any(set(word) & SPECIAL for word in words):
        raise ConfigError("the path of saw or of the context file has special characters", cure="move it")
    return own_shell(" ".join(["exec", *words, "--process", "$PPID", workspace]))


def _split(argv: list[str]) -> tuple[list[str], str, list[str]]:
    """Split at the first ``--``."""
    if "--" in argv:
        at = argv.index("--")
        return argv[:at], "--", argv[at + 1 :]
    return argv, "", []
