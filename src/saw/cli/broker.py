"""``saw broker``: initialise and run the broker on the control host."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys

import msgspec

from saw.broker.clock import utc_now
from saw.broker.config import load_config
from saw.cli import broker_secrets


def main(argv: list[str]) -> int:
    """Run ``saw broker init``, ``serve``, ``check``, ``ports``, ``certificate``, ``database copy`` or ``secrets``."""
    parser = argparse.ArgumentParser(
        prog="saw broker", description="Run the broker: registry, attestation, policy repository, audit."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    database = commands.add_parser("database", help="move the broker's database").add_subparsers(
        dest="step", required=True
    )
    for parsers, name, text in (
        (commands, "init", "make keys, database and certificate where they are missing"),
        (commands, "serve", "serve until stopped"),
        (commands, "check", "read the configuration as serve does, and do nothing else"),
        (commands, "ports", "tell whether somebody else has the broker's port (root)"),
        (database, "copy", "copy the SQLite file of a stopped broker into the empty database of PostgreSQL"),
    ):
        command = parsers.add_parser(name, help=text)
        command.add_argument(
            "--config", default="/etc/saw/broker.json", help="configuration file (default: %(default)s)"
        )
        command.add_argument("--json", action="store_true", help="print JSON")
    certificate = commands.add_parser(
        "certificate", help="tell whether browsers take a file with a key and certificates"
    )
    certificate.add_argument("file", help="the key (PKCS #8) and the certificates, the server's own first, in PEM")
    certificate.add_argument(
        "--name", action="append", default=[], help="a name that it must be for; may be given again"
    )
    certificate.add_argument(
        "--min-days", type=int, default=0, help="days that it must still count (default: %(default)s)"
    )
    certificate.add_argument("--ca", help="authorities (PEM) that it must lead to; without it that is not checked")
    certificate.add_argument("--json", action="store_true", help="print JSON")
    broker_secrets.add_commands(commands)
    options = parser.parse_args(argv)
    if options.command == "certificate":
        return _certificate(options)
    if options.command == "secrets":
        return broker_secrets.run(options)
    config = load_config(options.config)
    if options.command in ("check", "ports") and os.access(config.state, os.X_OK):
        from saw.broker.register_place import require_register
        from saw.broker.secret_place import require_way

        require_way(config)
        require_register(config)  # before the file takes the place of one that works
    if options.command == "check":
        print(json.dumps({"ok": True}) if options.json else f"{options.config} is valid")
        return 0
    if options.command == "init":
        from saw.broker.setup import initialise

        made = initialise(config, utc_now())
        if options.json:
            print(json.dumps({"ok": True, "changed": bool(made), "made": made}))
        else:
            print(f"made: {', '.join(made)}" if made else "everything is there already")
        return 0
    if options.command == "database":
        from saw.broker.database_copy import copy_database

        copied = copy_database(config)
        if options.json:
            print(json.dumps({"ok": True, "rows": copied.rows, "chains": copied.chains}))
        else:
            print(f"copied {copied.rows} rows; every audit chain is complete; {config.database} is kept")
        return 0
    if options.command == "ports":
        from saw.broker.setup import require_free_port

        require_free_port(config)
        print(json.dumps({"ok": True}) if options.json else "the broker's port is free or its own")
        return 0
    from saw.broker.server import run

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("tuf").setLevel(logging.WARNING)  # it reports every absent third signature of 2-of-3
    logging.getLogger("alembic").setLevel(logging.WARNING)
    run(config)
    return 0


def _certificate(options: argparse.Namespace) -> int:

    from saw.broker.pages_certificate import check_pages_certificate
    from saw.cli.answers import read_file

    authorities = read_file(options.ca) if options.ca else None
    found = check_pages_certificate(
        read_file(options.file), options.name, utc_now(), min_days=options.min_days, ca_pem=authorities
    )
    if options.json:
        print(json.dumps({"ok": True, **msgspec.to_builtins(found)}))
    else:
        print(f"for {', '.join(found.names)}; counts until {found.not_after}, {found.days_left} days")
    return 0
