"""``saw session``: end sessions, hold recordings, grant ports; on bastions: the recorder, renewal of the host certificate."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import SSHCertificate, load_ssh_public_identity

from saw.broker.client import OperatorClient
from saw.cli import session_grants
from saw.cli.operator_options import add_options, show
from saw.errors import SawError, UnavailableError
from saw.files import write_atomic, write_private

CONFIG = "/etc/saw/bastion.json"


def main(argv: list[str]) -> int:
    """Run ``saw session``."""
    parser = argparse.ArgumentParser(prog="saw session", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    end = commands.add_parser("end", help="end a live session; its connection drops at once")
    end.add_argument("session", help="session id, as saw sessions lists it")
    end.add_argument("--reason", required=True, help="why, for the audit trail")
    add_options(end)
    for name, text in (
        ("hold", "keep a session's recording past its time (legal hold)"),
        ("release", "end such a hold"),
    ):
        holding = commands.add_parser(name, help=text)
        holding.add_argument("session", help="session id, as saw sessions lists it")
        holding.add_argument("--reason", required=True, help="why, for the audit trail")
        add_options(holding)
    session_grants.add_commands(commands)
    record = commands.add_parser("record", help="run one session and record it (the forced command of a bastion)")
    record.add_argument("--config", default=CONFIG, help="configuration of the bastion (default: %(default)s)")
    host = commands.add_parser("host", help="have the bastion's host key certified, when that is due")
    host.add_argument("--config", default=CONFIG, help="configuration of the bastion (default: %(default)s)")
    host.add_argument("--directory", required=True, help="folder of ssh_host_ed25519_key; the certificate goes there")
    host.add_argument(
        "--renew-days", type=int, default=20, help="renew when fewer days are left (default: %(default)s)"
    )
    host.add_argument("--json", action="store_true", help="print JSON")
    check = commands.add_parser("check", help="read a bastion's configuration and say what is wrong with it")
    check.add_argument("--config", default=CONFIG, help="configuration of the bastion (default: %(default)s)")
    init = commands.add_parser("init", help="make the bastion's key and its signing request, when they are missing")
    init.add_argument("--directory", required=True, help="folder of key.pem and key.csr")
    init.add_argument("--name", required=True, help="name of the bastion")
    init.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    run = {
        "end": _end,
        "hold": _hold,
        "release": _hold,
        "grant": session_grants.grant,
        "grants": session_grants.grants,
        "revoke": session_grants.revoke,
        "record": _record,
        "host": _host,
        "check": _check,
        "init": _init,
    }
    return run[options.command](options)


def _end(options: argparse.Namespace) -> int:
    client = OperatorClient.from_context(options.context)
    found = client.request("POST", f"/v1/sessions/{quote(options.session, safe='')}/end", {"reason": options.reason})
    text = f"{found['id']} is told to end" if found["changed"] else f"{found['id']} has ended already"
    show(found, text, as_json=options.json)
    return 0


def _hold(options: argparse.Namespace) -> int:
    client = OperatorClient.from_context(options.context)
    path = f"/v1/sessions/{quote(options.session, safe='')}/recording/{options.command}"
    found = client.request("POST", path, {"reason": options.reason})
    now = {"hold": "is held", "release": "is held no more"}[options.command]
    before = {"hold": "was held before", "release": "was not held"}[options.command]
    show(found, f"the recording of {found['id']} {now if found['changed'] else before}", as_json=options.json)
    return 0


def _record(options: argparse.Namespace) -> int:
    # People who connect wait for this start: only what a recorder needs is loaded.
    from saw.sessions.config import load_config
    from saw.sessions.recorder import REFUSED, record

    try:
        return record(load_config(options.config), os.environ)
    except SawError as error:
        print(f"saw: refused: {error}", file=sys.stderr)
        return REFUSED


def _check(options: argparse.Namespace) -> int:
    from saw.sessions.config import load_config

    load_config(options.config)
    print(f"{options.config} is good")
    return 0


def _init(options: argparse.Namespace) -> int:
    from saw.identity.x509 import new_key_and_csr

    folder, changed = Path(options.directory), []
    if not all((folder / name).exists() for name in ("key.pem", "key.csr")):
        key, request = new_key_and_csr(options.name)
        write_private(folder / "key.pem", key)
        write_atomic(folder / "key.csr", request)
        changed = ["key.pem", "key.csr"]
    show({"changed": changed}, f"made: {', '.join(changed) or 'nothing'}", as_json=options.json)
    return 0


def _host(options: argparse.Namespace) -> int:
    from saw.sessions.config import load_config
    from saw.sessions.link import BrokerLink

    folder = Path(options.directory)
    key, certificate, authority = (
        folder / name for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key-cert.pub", "session_ca.pub")
    )
    changed = []
    if not key.exists():
        line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(key)]
        try:
            subprocess.run(line, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise UnavailableError(f"ssh-keygen cannot make {key}", cure="check the folder") from error
        changed.append(key.name)
    public = key.with_name(f"{key.name}.pub").read_text("ascii").strip()
    if changed or not _good(certificate, authority, timedelta(days=options.renew_days)):
        with BrokerLink(load_config(options.config)) as link:
            made = link.certify_host(public)
        write_atomic(certificate, made.certificate + "\n")
        write_atomic(authority, made.session_ca + "\n")
        changed.append(certificate.name)
    show({"changed": changed}, f"made: {', '.join(changed) or 'nothing'}", as_json=options.json)
    return 0


def _good(certificate: Path, authority: Path, left: timedelta) -> bool:
    try:
        found = load_ssh_public_identity(certificate.read_bytes().strip())
    except (OSError, ValueError, UnsupportedAlgorithm, NotImplementedError):
        return False
    until = datetime.fromtimestamp(found.valid_before, UTC) if isinstance(found, SSHCertificate) else None
    return authority.exists() and until is not None and until - datetime.now(UTC) > left
