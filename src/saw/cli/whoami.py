"""``saw whoami``: who is signed in with ``saw login``, with which roles, as the broker says now."""

from __future__ import annotations

import argparse

from saw.broker.signed_in import call, load, session_file
from saw.cli.operator_options import fields, show


def main(argv: list[str]) -> int:
    """Run ``saw whoami``."""
    parser = argparse.ArgumentParser(prog="saw whoami", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    session = load(session_file())
    found = call(session.place, "GET", "/v1/sso/whoami", token=session.token)
    show(found, fields(found), as_json=options.json)
    return 0
