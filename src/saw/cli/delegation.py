"""``saw delegation``: what an agent is handed for one engagement; issue, list, show, revoke, and verify a statement."""

from __future__ import annotations

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from saw import jsontext
from saw.cli.operator_options import add_options, fields, show, table
from saw.errors import SawError
from saw.policy.governance import duration

_COLUMNS = ("id", "state", "workspace", "agent", "expires", "approval", "parent", "task")
_RESOURCE = re.compile(
    r"(?P<host>[^\s:/]+)(?::(?P<ports>[0-9,]+))?(?:\s+(?P<methods>[A-Z,*-]+))?(?P<paths>(?:\s+/\S*)*)"
)


class ResourceMalformed(SawError):
    """A resource on the command line cannot be read."""

    code = "resource_malformed"


def resource_of(text: str) -> dict[str, Any]:
    """Read ``HOST[:PORT,…] [METHOD,…] [/PATH…]``, such as ``api.example.com:443 GET,POST /v1/notes /v1/items/**``."""
    match = _RESOURCE.fullmatch(text.strip())
    if match is None:
        raise ResourceMalformed(
            f"the resource {text!r} cannot be read", cure="write HOST[:PORT] [METHOD,METHOD] [/PATH /PATH]"
        )
    found: dict[str, Any] = {"host": match["host"]}
    if match["ports"]:
        found["ports"] = [int(port) for port in match["ports"].split(",") if port]
    if match["methods"] and match["methods"] != "*":
        found["methods"] = [method for method in match["methods"].split(",") if method]
    if match["paths"]:
        found["paths"] = match["paths"].split()
    return found


def tools_of(texts: list[str] | None) -> list[dict[str, Any]] | None:
    """Read ``SERVER [TOOL …]`` of each, globs as in policies; the word ``none`` alone is no tool of any server."""
    if texts is None:
        return None
    if texts == ["none"]:
        return []
    found: list[dict[str, Any]] = []
    for text in texts:
        server, *tools = text.split() or ["none"]
        if server == "none":
            raise ResourceMalformed(
                f"the tools {text!r} cannot be read", cure="write SERVER [TOOL TOOL], or none and nothing else"
            )
        found.append({"server": server, **({"tools": tools} if tools else {})})
    return found


def main(argv: list[str]) -> int:
    """Run one ``saw delegation`` command."""
    options = _parser().parse_args(argv)
    if options.command == "verify":
        return _verify(options)
    from saw.broker.client import OperatorClient, listed_delegations

    client = OperatorClient.from_context(options.context)
    if options.command == "list":
        with client.session():
            found = listed_delegations(
                client, workspace_id=[options.workspace] if options.workspace else [], state=options.state or []
            )
        show({"delegations": found}, table(found, _COLUMNS), as_json=options.json)
        return 0
    answer = _call(client, options)
    shown = {name: value for name, value in answer.items() if name not in {"statement", "format"}}
    show(answer, fields(shown), as_json=options.json)
    return 0


def _call(client: Any, options: argparse.Namespace) -> dict[str, Any]:
    if options.command == "issue":
        try:
            seconds = duration(options.duration)
        except ValueError as error:
            raise ResourceMalformed(f"--for: {error}", cure="write 90m, 8h or 2d") from error
        body = {
            "workspace_id": options.workspace,
            "task": options.task,
            "resources": [resource_of(text) for text in options.resource],
            "duration_s": seconds,
            "approval": options.approval,
            "parent": options.parent,
        }
        tools = tools_of(options.tool)
        if tools is not None:
            body["tools"] = tools
        if options.data_class:
            body["data_classes"] = options.data_class
        return dict(client.request("POST", "/v1/delegations", body))
    path = f"/v1/delegations/{quote(options.id, safe='')}"
    if options.command == "revoke":
        return dict(client.request("POST", f"{path}/revoke", {"reason": options.reason}))
    return dict(client.request("GET", path))


def _verify(options: argparse.Namespace) -> int:
    """Check a statement without the broker; ``--ca`` is the authority's certificate."""
    from saw.identity.statement import verify_statement
    from saw.policy.delegation import STATEMENT_TYPE, parse_delegation

    token = _read(Path(options.file)).decode("ascii", "replace").strip()
    if token.startswith("{"):
        token = str(jsontext.decode(token).get("statement", ""))
    now = datetime.now(UTC)
    verified = verify_statement(token, STATEMENT_TYPE, _read(Path(options.ca)), now)
    record = parse_delegation(verified.payload)
    answer = {**msgspec.to_builtins(record), "signer": verified.signer, "live": record.live(now)}
    show(answer, fields(answer), as_json=options.json)
    return 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ResourceMalformed(f"cannot read {path}: {error.strerror}", cure="name a readable file") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw delegation", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    issue = commands.add_parser("issue", help="hand a task to the agent of a workspace")
    add_options(issue)
    issue.add_argument("workspace", help="workspace id; sponsor and agent are those of the workspace")
    issue.add_argument("--task", required=True, help="what it is for; it is audited")
    issue.add_argument(
        "--resource",
        action="append",
        required=True,
        metavar="'HOST[:PORT] [METHOD,…] [/PATH…]'",
        help="calls that it may make; may be given several times",
    )
    issue.add_argument(
        "--tool",
        action="append",
        metavar="'SERVER [TOOL …]'",
        help="tools of MCP servers that it may call; may be given several times; 'none': none (default: as policy says)",
    )
    issue.add_argument(
        "--data-class",
        action="append",
        metavar="CLASS",
        help="a class of data that the work brings: calls of models then hold it too; may be given several times",
    )
    issue.add_argument("--for", dest="duration", required=True, metavar="TIME", help="how long it counts, such as 8h")
    issue.add_argument(
        "--approval",
        default="policy",
        choices=("policy", "review", "read-only"),
        help="what it may do on its own: as policy says, reads only while writes wait for a person, or reads only",
    )
    issue.add_argument("--parent", default="", metavar="ID", help="the delegation that this one is a part of")
    listing = commands.add_parser("list", help="list delegations, newest first")
    add_options(listing)
    listing.add_argument("workspace", nargs="?", help="workspace id (default: all)")
    listing.add_argument(
        "--state",
        action="append",
        choices=("active", "ended", "revoked"),
        help="those alone; may be given several times",
    )
    one = commands.add_parser("show", help="show one delegation; --json has its signed statement")
    add_options(one)
    one.add_argument("id", help="delegation id")
    revoke = commands.add_parser("revoke", help="end a delegation and all that was made from it")
    add_options(revoke)
    revoke.add_argument("id", help="delegation id")
    revoke.add_argument("--reason", required=True, help="why; it is audited")
    verify = commands.add_parser("verify", help="check a signed statement without the broker")
    verify.add_argument("file", help="the statement, or the JSON of `saw delegation show --json`")
    verify.add_argument("--ca", required=True, help="certificate of the broker's authority (PEM)")
    verify.add_argument("--json", action="store_true", help="print JSON")
    return parser
