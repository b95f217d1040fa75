"""``saw audit hold``: keep what is about a workspace, or from a time, past its retention until it is released (legal hold)."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from saw.broker.client import OperatorClient
from saw.cli.audit_search import moment
from saw.cli.operator_options import add_options, show, table

_COLUMNS = ("id", "workspace", "since", "until", "added_at", "added_by", "released_at", "reason")


def hold(options: argparse.Namespace) -> int:
    """Run ``saw audit hold add``, ``list`` or ``release``."""
    client = OperatorClient.from_context(options.context)
    if options.hold == "list":
        found = client.request("GET", f"/v1/holds?all={int(options.all)}")
        show(found, table(found["holds"], _COLUMNS), as_json=options.json)
        return 0
    if options.hold == "release":
        path = f"/v1/holds/{quote(options.id, safe='')}/release"
        found = client.request("POST", path, {"reason": options.reason})
        text = f"{found['id']} is released" if found["changed"] else f"{found['id']} was released before"
        show(found, text, as_json=options.json)
        return 0
    body: dict[str, Any] = {"reason": options.reason}
    if options.workspace:
        body["workspace"] = options.workspace
    now = datetime.now(UTC)
    for name, said in (("since", options.since), ("until", options.until)):
        if said:
            body[name] = int(moment(said, now).timestamp() * 1000)
    found = client.request("POST", "/v1/holds", body)
    text = f"{found['id']} holds" if found["changed"] else f"{found['id']} holds the same already"
    show(found, text, as_json=options.json)
    return 0


def add_hold(commands: Any) -> None:
    """Add the command to the parser of ``saw audit``."""
    parser = commands.add_parser("hold", help="keep events, recordings, reviewed bytes and jobs past their time")
    steps = parser.add_subparsers(dest="hold", required=True)
    add = steps.add_parser("add", help="hold what is about a workspace, or from a time, or both together")
    add_options(add)
    add.add_argument("--workspace", metavar="ID", help="what is about this workspace")
    add.add_argument(
        "--from", dest="since", metavar="TIME", help="what happened from then on: ISO 8601, or how long ago"
    )
    add.add_argument("--to", dest="until", metavar="TIME", help="the same; not included")
    add.add_argument("--reason", required=True, help="why, for the audit trail")
    listed = steps.add_parser("list", help="list the holds in force, those of single recordings too")
    add_options(listed)
    listed.add_argument("--all", action="store_true", help="also those that were released")
    release = steps.add_parser("release", help="end a hold; what is past its time goes")
    add_options(release)
    release.add_argument("id", help="id of the hold")
    release.add_argument("--reason", required=True, help="why, for the audit trail")
