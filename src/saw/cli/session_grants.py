"""``saw session grant``, ``grants`` and ``revoke``: ports of workspaces that people may reach with ``saw expose``."""

from __future__ import annotations

import argparse
import re
from typing import Any
from urllib.parse import quote, urlencode

from saw.broker.client import OperatorClient
from saw.cli.operator_options import add_options, show, table

COLUMNS = ("id", "state", "workspace", "port", "to", "expires_at", "granted_by", "reason")
_LENGTH = re.compile(r"([1-9][0-9]{0,3})([mh])")
_SECONDS = {"m": 60, "h": 3600}
_KINDS = ("user:", "operator:")


def add_commands(commands: Any) -> None:
    """Add the three commands to those of ``saw session``."""
    grant = commands.add_parser("grant", help="grant a port of a workspace to one person, for hours")
    grant.add_argument("workspace", help="workspace id")
    grant.add_argument("--port", type=int, required=True, help="port in the workspace")
    grant.add_argument(
        "--to", required=True, metavar="PERSON", help="its sponsor, by the name of their sign-in; or operator:NAME"
    )
    grant.add_argument(
        "--for", dest="length", type=_seconds, required=True, metavar="TIME", help="how long, as in 90m or 4h"
    )
    grant.add_argument("--reason", required=True, help="why, for the audit trail")
    add_options(grant)
    grants = commands.add_parser("grants", help="list ports that are granted")
    grants.add_argument("--workspace", help="of this workspace alone")
    grants.add_argument("--all", action="store_true", help="those that are over too")
    add_options(grants)
    revoke = commands.add_parser("revoke", help="revoke such a grant; what goes through it ends at once")
    revoke.add_argument("grant", help="id of the grant, as saw session grants lists it")
    revoke.add_argument("--reason", required=True, help="why, for the audit trail")
    add_options(revoke)


def grant(options: argparse.Namespace) -> int:
    """Grant a port."""
    body = {
        "workspace_id": options.workspace,
        "port": options.port,
        "to": options.to if options.to.startswith(_KINDS) else f"user:{options.to}",
        "for_s": options.length,
        "reason": options.reason,
    }
    found = OperatorClient.from_context(options.context).request("POST", "/v1/forwards", body)
    verb = "is granted" if found["changed"] else "was granted before"
    text = f"{found['id']}: port {found['port']} of {found['workspace']} {verb} to {found['to']} until {found['expires_at']}"
    show(found, text, as_json=options.json)
    return 0


def grants(options: argparse.Namespace) -> int:
    """List grants."""
    asked = {"workspace_id": options.workspace, "all": 1 if options.all else None}
    query = urlencode({name: value for name, value in asked.items() if value is not None})
    found = OperatorClient.from_context(options.context).request("GET", f"/v1/forwards?{query}")
    rows = found["forwards"]
    show(found, table(rows, COLUMNS) if rows else "no port is granted", as_json=options.json)
    return 0


def revoke(options: argparse.Namespace) -> int:
    """Revoke a grant."""
    path = f"/v1/forwards/{quote(options.grant, safe='')}/revoke"
    found = OperatorClient.from_context(options.context).request("POST", path, {"reason": options.reason})
    text = f"{found['id']} is revoked" if found["changed"] else f"{found['id']} was over before"
    show(found, text, as_json=options.json)
    return 0


def _seconds(text: str) -> int:
    """Read ``90m`` or ``4h`` as seconds."""
    found = _LENGTH.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no length such as 90m or 4h")
    return int(found[1]) * _SECONDS[found[2]]
