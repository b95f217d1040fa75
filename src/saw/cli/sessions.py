"""``saw sessions``: who has, or had, a session with which workspace, how it ended, and the digest of its recording."""

from __future__ import annotations

import argparse
from urllib.parse import urlencode

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options, add_pages, more, show, table

COLUMNS = ("id", "state", "who", "workspace", "started_at", "closed_at", "reason", "bytes_out", "recording")


def main(argv: list[str]) -> int:
    """Run ``saw sessions``."""
    parser = argparse.ArgumentParser(prog="saw sessions", description=__doc__)
    parser.add_argument("--workspace", help="of this workspace alone")
    parser.add_argument("--person", help="of this person alone, by the name that they signed in with")
    parser.add_argument("--live", action="store_true", help="only those that are open")
    add_pages(parser, "1000, with --live all")
    add_options(parser)
    options = parser.parse_args(argv)
    asked = {"workspace_id": options.workspace, "person": options.person, "live": 1 if options.live else None}
    asked |= {"after": options.after, "limit": options.limit}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    found = OperatorClient.from_context(options.context).request("GET", f"/v1/sessions?{query}")
    rows = [row for row in found["sessions"] if not options.live or row["state"] in {"open", "ending"}]
    # The digest is for eyes that compare; a row has room for its beginning, JSON for all of it.
    shown = [{**row, "recording": (row["recording"] or "")[:16]} for row in rows]
    text = (table(shown, COLUMNS) if rows else "no sessions") + more(found)
    show({"sessions": rows, "next": found["next"]}, text, as_json=options.json)
    return 0
