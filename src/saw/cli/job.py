"""``saw job``: lifecycle jobs - ask for one, watch it, cancel it, resume it."""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
from typing import Any
from urllib.parse import quote, urlencode

from saw.cli.operator_options import add_options, add_pages, fields, line, more, show, table
from saw.errors import SawError
from saw.jobs.messages import KINDS, LIVE, STATES

_COLUMNS = ("id", "kind", "workspace", "state", "attempt", "asked_by", "asked_at", "ended_at")
_PARAMETERS = ("sponsor", "blueprint", "ring", "image", "image_path", "reason")
WAIT_S = 25


class JobEnded(SawError):
    """A job that was watched did not succeed."""

    def __init__(self, job: dict[str, Any]) -> None:
        error = job["error"] or {}
        super().__init__(
            f"{job['id']} is {job['state']}: {error.get('message') or job['cancel_reason'] or 'no reason given'}",
            cure=str(error.get("cure") or "saw job show tells more"),
            details={"job": job["id"], "state": job["state"], "reason": error.get("code", "")},
        )
        self.code = f"job_{job['state']}"


def main(argv: list[str]) -> int:
    """Run one ``saw job`` command; what watches ends with 0 only when the job succeeded."""
    options = _parser().parse_args(argv)
    from saw.broker.client import OperatorClient
    from saw.broker.machine_client import asking_client

    client = asking_client(options.context)
    with client.session() if isinstance(client, OperatorClient) else contextlib.nullcontext():
        return int(options.run(client, options))


def _run(client: Any, options: argparse.Namespace) -> int:
    parameters = {name: value for name in _PARAMETERS if (value := getattr(options, name)) is not None}
    body = {"kind": options.kind, "workspace": options.workspace, "parameters": parameters}
    job = client.request("POST", "/v1/jobs", {**body, "idempotency_key": options.key or secrets.token_urlsafe(24)})
    return _answer(client, job, options)


def _list(client: Any, options: argparse.Namespace) -> int:
    wanted = {"state": options.state, "workspace": options.workspace, "after": options.after, "limit": options.limit}
    answer = client.request("GET", f"/v1/jobs?{urlencode({name: value for name, value in wanted.items() if value})}")
    show(answer, table(answer["jobs"], _COLUMNS) + more(answer), as_json=options.json)
    return 0


def _show(client: Any, options: argparse.Namespace) -> int:
    job = client.request("GET", _path(options.id))
    show({"job": job}, fields(job), as_json=options.json)
    return 0


def _watch(client: Any, options: argparse.Namespace) -> int:
    return _follow(client, options.id, options)


def _cancel(client: Any, options: argparse.Namespace) -> int:
    job = client.request("POST", f"{_path(options.id)}/cancel", {"reason": options.reason})
    return _answer(client, job, options)


def _resume(client: Any, options: argparse.Namespace) -> int:
    return _answer(client, client.request("POST", f"{_path(options.id)}/resume"), options)


def _answer(client: Any, job: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the job as it is, or go on watching it."""
    if not options.wait:
        show({"job": job}, f"{job['id']} is {job['state']}", as_json=options.json)
        return 0
    if not options.json:
        print(job["id"], flush=True)
    return _follow(client, job["id"], options, wanted="cancelled" if options.command == "cancel" else "succeeded")


def _follow(client: Any, identifier: str, options: argparse.Namespace, wanted: str = "succeeded") -> int:
    """Print what happens until the job has ended; one JSON object a line with ``--json``, the last one being the job."""
    after = 0
    while True:
        answer = client.request("GET", f"{_path(identifier)}/events?after={after}&wait={WAIT_S}")
        for event in answer["events"]:
            print(json.dumps(event) if options.json else _told(event), flush=True)
        after, job = answer["next"], answer["job"]
        if job["state"] not in LIVE and job["seq"] <= after:
            break
    if job["state"] != wanted:
        if options.json:
            print(json.dumps({"job": job}), flush=True)
        raise JobEnded(job)
    show({"job": job}, f"{job['id']} is {job['state']}", as_json=options.json)
    return 0


def _told(event: dict[str, Any]) -> str:
    """Return an event as one line for people."""
    words = event["text"]
    if event["kind"] == "host":
        words = f"{event['host']} {event['result']}: {words}"
    elif event["kind"] in {"play", "task"}:
        words = f"{event['kind']}: {words}"
    return line([event["at"][11:19], words])


def _path(identifier: str) -> str:
    return f"/v1/jobs/{quote(identifier, safe='')}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw job", description="Lifecycle jobs: playbooks that the broker has run.")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, text: str, *, waits: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        add_options(command)
        command.set_defaults(run=run)
        if waits:
            command.add_argument("--wait", action="store_true", help="watch it, and end with its result")
        return command

    run = add("run", _run, "ask for a job")
    run.add_argument("kind", choices=KINDS, help="what to do")
    run.add_argument("workspace", help="workspace id")
    run.add_argument("--reason", help="why; it is audited (kill needs one)")
    for name, text in (
        ("sponsor", "create: the employee on whose behalf it runs"),
        ("blueprint", "create: policy blueprint"),
        ("ring", "create: release ring"),
        ("image", "create, rebuild: name of a registered image"),
        ("image-path", "create, rebuild: its file on the hypervisor"),
    ):
        run.add_argument(f"--{name}", help=text)
    run.add_argument("--key", help="idempotency key: the same key is the same job (default: a new one)")
    listing = add("list", _list, "list jobs, the newest first", waits=False)
    listing.add_argument("--state", choices=STATES, help="in this state alone")
    listing.add_argument("--workspace", help="of this workspace alone")
    add_pages(listing, "100")
    for name, handler, text in (
        ("show", _show, "show one job"),
        ("watch", _watch, "print what happens until it has ended, and end with its result"),
        ("cancel", _cancel, "end a job"),
        ("resume", _resume, "run a job again that failed or was interrupted"),
    ):
        command = add(name, handler, text, waits=name in {"cancel", "resume"})
        command.add_argument("id", help="job id")
        if name == "cancel":
            command.add_argument("--reason", default="cancelled by operator", help="why; it is audited")
    return parser
