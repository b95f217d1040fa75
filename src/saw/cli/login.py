"""``saw login``: sign in with single sign-on. It shows an address and a code; a browser anywhere does the rest (RFC 8628)."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import Any

from saw.broker.signed_in import NotSignedIn, Place, StoredSession, call, session_file, store
from saw.cli.operator_options import fields, show


def main(argv: list[str], wait: Callable[[float], None] = time.sleep) -> int:
    """Run ``saw login``."""
    parser = argparse.ArgumentParser(prog="saw login", description=__doc__)
    parser.add_argument(
        "--url", required=True, help="address of the broker's pages, such as https://saw.example.com:8445"
    )
    parser.add_argument("--ca", metavar="FILE", help="authorities of its certificate (PEM; default: the system's)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(argv)
    place = Place(options.url.rstrip("/"), options.ca)
    begun = call(place, "POST", "/v1/sso/device")
    # What people have to do is not the answer: it goes to standard error, so that --json stays one line.
    lines = [f"Open {begun['verification_uri']} and enter the code {begun['user_code']}"]
    if begun.get("verification_uri_complete"):
        lines.append(f"or open {begun['verification_uri_complete']}")
    print("\n".join(lines), file=sys.stderr, flush=True)
    found = _await(place, begun, wait)
    path = session_file()
    store(StoredSession(place.url, place.ca_file, found["name"], found["expires_at"], found["token"]), path)
    told = {name: found[name] for name in ("name", "roles", "expires_at")} | {"session_file": str(path)}
    show(told, fields(told), as_json=options.json)
    return 0


def _await(place: Place, begun: dict[str, Any], wait: Callable[[float], None]) -> dict[str, Any]:
    """Ask at the provider's pace until the person has agreed or the code has ended."""
    left, interval = float(begun["expires_in"]), float(begun["interval"])
    while left > 0:
        wait(interval)
        left -= interval
        found = call(place, "POST", "/v1/sso/device/poll", {"handle": begun["handle"]})
        if not found["pending"]:
            return found
        interval = float(found["interval"])
    raise NotSignedIn("the code has ended before anybody agreed", cure="run saw login again")
