"""``saw workspace``: the register of workspaces for operators; ``bootstrap`` inside the VM.

These commands change the register only. Machines are made, started and destroyed by the playbooks, which call the same API;
``saw job`` has them run.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec

from saw.cli.operator_options import add_options, fields, show, table

_COLUMNS = ("id", "number", "state", "sponsor", "blueprint", "ring", "policy_digest", "lease_expires_at")
_FILTERS = ("state", "sponsor", "blueprint", "ring", "image", "text")
#: Command → the state it asks for.
_STEPS = {"start": "attesting", "stop": "stopped", "decommission": "decommissioned"}


def main(argv: list[str]) -> int:
    """Run one ``saw workspace`` command."""
    options = _parser().parse_args(argv)
    if options.command == "bootstrap":
        return _bootstrap(options)
    if options.command == "list":
        return list_workspaces(options)
    from saw.broker.client import OperatorClient

    client = OperatorClient.from_context(options.context)
    path = f"/v1/workspaces/{quote(options.id, safe='')}" if "id" in options else "/v1/workspaces"
    if options.command == "credential":
        from saw.broker.vm_credential import vm_credential

        answer = vm_credential(client, options.id)
        show(answer, msgspec.json.encode(answer).decode(), as_json=options.json)
        return 0
    answer = _call(client, path, options)
    show(answer, fields(answer), as_json=options.json)
    return 0


def add_filters(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`list_workspaces`."""
    for name in _FILTERS[:-1]:
        parser.add_argument(
            f"--{name}", dest=f"only_{name}", action="append", metavar="NAME", help=f"with this {name}; may be repeated"
        )
    parser.add_argument("--text", dest="only_text", nargs=1, metavar="TEXT", help="occurs in the id or the sponsor")
    add_options(parser)


def list_workspaces(options: argparse.Namespace) -> int:
    """Print the workspaces that the filters of ``options`` choose."""
    from saw.broker.client import OperatorClient, listed_workspaces

    client = OperatorClient.from_context(options.context)
    filters = {name: values for name in _FILTERS if (values := getattr(options, f"only_{name}"))}
    with client.session():
        rows = listed_workspaces(client, **filters)
    show({"workspaces": rows}, table(_shorten(rows), _COLUMNS), as_json=options.json)
    return 0


def _call(client: Any, path: str, options: argparse.Namespace) -> dict[str, Any]:
    command = options.command
    told = {"version": getattr(options, "version", None), "idempotency_key": getattr(options, "key", None)}
    given = {name: value for name, value in told.items() if value is not None}
    if command == "way-back":
        answer = client.request("GET", f"{path}/way-back" + ("?further=1" if options.further else ""))
    elif command == "show":
        answer = client.request("GET", path)
    elif command == "create":
        profile = {name: getattr(options, name) for name in ("id", "sponsor", "blueprint", "ring", "image")}
        profile |= {name: value for name in ("agent", "place") if (value := getattr(options, name))}
        answer = client.request("POST", "/v1/workspaces", {**profile, **given})
    elif command == "record-ek":
        answer = client.request("PUT", f"{path}/ek", {"ek_pub_pem": Path(options.file).read_text("ascii")})
    elif command == "reprovision":
        answer = client.request("PUT", f"{path}/image", {"image": options.image, **given})
    elif command == "kill":
        answer = client.request("POST", f"{path}/kill", {"reason": options.reason, **given})
    else:
        to = options.to if command == "transition" else _STEPS[command]
        answer = client.request("POST", f"{path}/transition", {"to": to, "reason": options.reason, **given})
    return dict(answer)


def _bootstrap(options: argparse.Namespace) -> int:
    from saw.runtime.bootstrap import bootstrap, credential_path

    source = Path(options.source) if options.source else credential_path(os.environ)
    written = bootstrap(source, Path(options.directory))
    show(
        {"written": [str(path) for path in written]},
        "\n".join(f"wrote {path}" for path in written),
        as_json=options.json,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw workspace", description="The register of workspaces.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, text: str, *, keyed: bool = False, versioned: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        command.add_argument("id", help="workspace id")
        if keyed:
            command.add_argument("--key", metavar="KEY", help="idempotency key: what is told again is done once")
        if versioned:
            command.add_argument("--version", type=int, help="change it only if this is its version (default: any)")
        return command

    text = "list workspaces: all, or those that filters choose"
    add_filters(commands.add_parser("list", help=text, description=text))
    add("show", "show one workspace")
    back = add("way-back", "show the stable image that it ran before, to which playbook image_rollback takes it")
    back.add_argument("--further", action="store_true", help="one more step back, where it has just gone back")
    add("credential", "print what its VM is told at creation (public data)")
    create = add("create", "register a workspace; its profile is fixed from then on", keyed=True)
    for name, text in (
        ("sponsor", "the employee on whose behalf it runs"),
        ("blueprint", "policy blueprint"),
        ("ring", "release ring"),
        ("image", "name of a registered image"),
    ):
        create.add_argument(f"--{name}", required=True, help=text)
    create.add_argument(
        "--agent", default="", metavar="ID", help="a registered agent without a workspace (default: a new one)"
    )
    create.add_argument("--place", default="", metavar="NAME", help="whose numbers it gets one of (docs/scale.md)")
    record = add("record-ek", "record the endorsement key of its TPM, once")
    record.add_argument("file", help="PEM file of the public key")
    reprovision = add("reprovision", "bind a stopped workspace to another registered image", keyed=True, versioned=True)
    reprovision.add_argument("--image", required=True, help="name of a registered image")
    transition = add("transition", "take one lifecycle step", keyed=True, versioned=True)
    transition.add_argument("to", help="the state to reach")
    transition.add_argument("--reason", required=True, help="why; it is audited")
    for name, text in (
        ("start", "let a stopped workspace attest again"),
        ("stop", "take its lease away until it is started"),
        ("decommission", "end it for good"),
    ):
        step = add(name, text, keyed=True, versioned=True)
        step.add_argument("--reason", default=f"{name} by operator", help="why; it is audited")
    kill = add("kill", "refuse everything of it at once, until it is released", keyed=True)
    kill.add_argument("--reason", required=True, help="why; it is audited")
    bootstrap = commands.add_parser("bootstrap", help="in the VM: check what it was told at creation and lay it out")
    bootstrap.add_argument("--from", dest="source", help="file (default: the systemd credential saw.workspace)")
    bootstrap.add_argument("--directory", default="/run/saw", help="where to write (default: %(default)s)")
    bootstrap.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _shorten(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "policy_digest": (row["policy_digest"] or "")[:12]} for row in rows]
