"""``saw agent``: the register of agents; register, list, show, change, retire, and have one succeeded by another."""

from __future__ import annotations

import argparse
import sys
from typing import Any
from urllib.parse import quote

from saw.cli.operator_options import add_options, fields, show, table
from saw.errors import SawError

_COLUMNS = ("id", "name", "state", "workspace", "sponsor", "harness", "model", "successor")
_FILTERS = ("state", "sponsor", "workspace", "blueprint", "name", "text")
_SAID = (
    ("name", "a name of its own among the living: lower-case letters, digits, dashes (default: its id)"),
    ("owner", "the team or person that answers for it"),
    ("purpose", "what it is for"),
    ("harness", "claim: the program that it is, such as 'codex 1.2'; nothing proves it"),
    ("model", "claim: the model that it asks; nothing proves it"),
)


class NotConfirmed(SawError):
    """What would be issued anew was shown, and nobody agreed to it."""

    code = "not_confirmed"


def main(argv: list[str]) -> int:
    """Run one ``saw agent`` command."""
    options = _parser().parse_args(argv)
    from saw.broker.client import OperatorClient, listed_agents

    client = OperatorClient.from_context(options.context)
    if options.command == "list":
        filters = {name: values for name in _FILTERS if (values := getattr(options, f"only_{name}"))}
        with client.session():
            rows = listed_agents(client, **filters)
        show({"agents": rows}, table([_flat(row) for row in rows], _COLUMNS), as_json=options.json)
        return 0
    with client.session():
        answer = _call(client, options)
    show(answer, fields(_flat(answer)), as_json=options.json)
    return 0


def _call(client: Any, options: argparse.Namespace) -> dict[str, Any]:
    path = f"/v1/agents/{quote(options.id, safe='')}" if "id" in options else "/v1/agents"
    said = {name: value for name, _ in _SAID if (value := getattr(options, name, None)) is not None}
    if options.command == "show":
        answer = client.request("GET", path)
    elif options.command == "register":
        key = {"idempotency_key": options.key} if options.key else {}
        body = {"sponsor": options.sponsor, "workspace": options.workspace, **said, **key}
        answer = client.request("POST", path, body)
    elif options.command == "change":
        workspace = {"workspace": options.workspace} if options.workspace else {}
        version = options.version or client.request("GET", path)["version"]
        answer = client.request("PUT", path, {"version": version, **said, **workspace})
    elif options.command == "retire":
        answer = client.request("POST", f"{path}/retire", {"reason": options.reason})
    else:
        answer = _succeed(client, path, said, options)
    return dict(answer)


def _succeed(client: Any, path: str, said: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """Have an agent succeeded; what is to be issued anew is shown first, and exactly that is asked for."""
    present = client.request("GET", path)
    body = {"reason": options.reason, "version": present["version"], **said}
    if options.reissue and present["workspace"]:
        from saw.broker.client import listed_delegations

        every = listed_delegations(client, workspace_id=[present["workspace"]], state=["active"])
        held = [one for one in every if one["agent"] == present["id"]]
        if held:
            _agree(present["id"], held, given=options.yes)
        body["reissue"] = [one["id"] for one in held]
    return dict(client.request("POST", f"{path}/succeed", body))


def _agree(agent: str, held: list[dict[str, Any]], *, given: bool) -> None:
    """Show what would be issued anew and ask for it; raise :class:`NotConfirmed` without a yes."""
    print(f"to be issued anew, as {agent} holds it, until the same time:", file=sys.stderr)
    rows = [{**one, "resources": "; ".join(_resource(part) for part in one["resources"])} for one in held]
    print(table(rows, ("id", "expires", "approval", "task", "resources")), file=sys.stderr)
    if given:
        return
    if not sys.stdin.isatty():
        raise NotConfirmed("nobody is there to agree to it", cure="give --yes after a look at the list")
    print("issue them to the successor? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise NotConfirmed("nothing was done", cure="leave --reissue out to have the successor hold nothing")


def _resource(part: dict[str, Any]) -> str:
    where = f"{part['host']}:{','.join(map(str, part['ports']))}"
    return " ".join([where, ",".join(part["methods"]) or "*", *part["paths"]])


def _flat(agent: dict[str, Any]) -> dict[str, Any]:
    """Return an agent with its claims beside the rest, for people."""
    return {**{name: value for name, value in agent.items() if name != "claims"}, **agent["claims"]}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw agent", description="The register of agents.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *, identified: bool = True, describes: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        if identified:
            command.add_argument("id", help="agent id")
        for field, meaning in _SAID if describes else ():
            command.add_argument(f"--{field}", help=meaning)
        return command

    register = add("register", "register an agent", identified=False, describes=True)
    register.add_argument("--sponsor", required=True, help="the person on whose behalf it acts")
    register.add_argument(
        "--workspace", default="", metavar="ID", help="its workspace, for life (default: bound later)"
    )
    register.add_argument("--key", metavar="KEY", help="idempotency key: the same key is the same agent")
    listing = add("list", "list agents: all, or those that filters choose", identified=False)
    for name in _FILTERS[:-1]:
        listing.add_argument(
            f"--{name}", dest=f"only_{name}", action="append", metavar="NAME", help=f"with this {name}; may be repeated"
        )
    listing.add_argument(
        "--text", dest="only_text", nargs=1, metavar="TEXT", help="occurs in id, name, sponsor, owner or purpose"
    )
    add("show", "show one agent")
    change = add("change", "change what is said of an agent, or bind one that has no workspace", describes=True)
    change.add_argument("--workspace", metavar="ID", help="the workspace that it is bound to from then on")
    change.add_argument("--version", type=int, help="change it only if this is its version (default: the present one)")
    retire = add("retire", "end an agent for good: its delegations are revoked, its calls refused")
    retire.add_argument("--reason", required=True, help="why; it is audited")
    succeed = add("succeed", "retire an agent and put another one in its place, which inherits nothing", describes=True)
    succeed.add_argument("--reason", required=True, help="why; it is audited")
    succeed.add_argument(
        "--reissue",
        action="store_true",
        help="show what the agent holds and, when agreed to, issue it to the successor",
    )
    succeed.add_argument("--yes", action="store_true", help="agree to what --reissue shows")
    return parser
