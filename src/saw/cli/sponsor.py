"""``saw sponsor``: the people on whose behalf agents act; disable one who left, and enable one again."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote, urlencode

from saw.cli.operator_options import add_options, fields, show, table

_COLUMNS = ("name", "state", "workspaces", "agents", "changed_at", "changed_by", "reason")


def main(argv: list[str]) -> int:
    """Run one ``saw sponsor`` command."""
    options = _parser().parse_args(argv)
    from saw.broker.client import OperatorClient

    with OperatorClient.from_context(options.context).session() as client:
        if options.command == "list":
            rows = _listed(client, options)
            show({"sponsors": rows}, table([_flat(row) for row in rows], _COLUMNS), as_json=options.json)
            return 0
        path = f"/v1/sponsors/{quote(options.name, safe='')}"
        if options.command == "show":
            answer = client.request("GET", path)
        else:
            answer = client.request("POST", f"{path}/{options.command}", {"reason": options.reason})
    show(answer, fields(answer), as_json=options.json)
    return 0


def _listed(client: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    filters = {name: value for name in ("state", "text") if (value := getattr(options, name))}
    rows: list[dict[str, Any]] = []
    after: str | None = ""
    while after is not None:
        page = client.request("GET", f"/v1/sponsors?{urlencode({**filters, 'after': after})}")
        rows += page["sponsors"]
        after = page["next"]
    return rows


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Return a sponsor with numbers in the place of ids."""
    states = ", ".join(f"{len(ids)} {state}" for state, ids in row["workspaces"].items())
    return {**row, "workspaces": states, "agents": len(row["agents"])}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw sponsor", description="The people on whose behalf agents act.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        if name != "list":
            command.add_argument(
                "name", help="the sponsor's name, as workspaces and agents have it; case does not matter"
            )
        return command

    listing = add("list", "list sponsors: all, or those that filters choose")
    listing.add_argument("--state", choices=("active", "disabled"), help="in this state")
    listing.add_argument("--text", help="occurs in the name")
    add("show", "show one sponsor, with workspaces and agents")
    for name, text in (
        ("disable", "end everything on behalf of a sponsor at once, and let nothing begin"),
        ("enable", "let things begin on behalf of a sponsor again; nothing comes back by itself"),
    ):
        add(name, text).add_argument("--reason", required=True, help="why; it is audited")
    return parser
