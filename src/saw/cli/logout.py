"""``saw logout``: end the session of ``saw login``, at the broker and here."""

from __future__ import annotations

import argparse

from saw.broker.signed_in import Refused, call, load, session_file
from saw.cli.operator_options import show


def main(argv: list[str]) -> int:
    """Run ``saw logout``."""
    parser = argparse.ArgumentParser(prog="saw logout", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    path = session_file()
    session = load(path)
    try:
        call(session.place, "POST", "/v1/sso/logout", token=session.token)
    except Refused as error:
        if error.code not in {"not_signed_in", "session_ended"}:
            raise
    path.unlink(missing_ok=True)
    show({"signed_out": session.name}, f"{session.name} is signed out", as_json=options.json)
    return 0
