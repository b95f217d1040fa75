"""``saw inference``: what a perimeter keeps of calls of models, for auditors of that host. Each reading is in the audit trail."""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
from datetime import datetime
from pathlib import Path
from typing import Any

from saw.cli.operator_options import fields, show, table
from saw.errors import ConfigError, SawError

SOCKETS = Path("/run/saw/gatekeeper")
"""Where each gatekeeper of a host has its sockets, in a folder of its own number."""
_TIMEOUT_S = 60
_LOOK_S = 5
"""How long a gatekeeper has to show that it runs (seconds), before the next one is asked."""
_COLUMNS = ("record", "time", "workspace", "route", "model", "classes", "kept", "bytes", "answer", "status")


class NotRead(SawError):
    """The gatekeeper gave out nothing, and said why."""

    code = "not_read"


def main(argv: list[str]) -> int:
    """Run ``saw inference log`` or ``show``."""
    options = _parser().parse_args(argv)
    if options.command == "log":
        question: dict[str, object] = {"action": "list", "workspace": options.workspace, "limit": options.limit}
        if options.before is not None:
            question["before"] = _seconds(options.before)
        answer = ask(options.socket or running(), question)
        show(answer, table([_row(one) for one in answer["records"]], _COLUMNS), as_json=options.json)
        return 0
    answer = ask(options.socket or running(), {"action": "show", "record": options.record})
    show(answer["shown"], _text(answer["shown"]), as_json=options.json)
    return 0


def running(folder: Path = SOCKETS) -> Path:
    """Return the socket of a gatekeeper that answers; all of them have the same records."""
    found = sorted([*folder.glob("records.sock"), *folder.glob("*/records.sock")])
    for path in found:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
            sock.settimeout(_LOOK_S)
            sock.connect(str(path))
            sock.sendall(b"{}\n")  # no question; one that stands still says nothing to it
            if sock.recv(1):
                return path
    return found[0] if found else folder / "1" / "records.sock"


def ask(path: Path, question: dict[str, object]) -> dict[str, Any]:
    """Put one question to the gatekeeper of this host; raise :class:`NotRead` with its reason where it refuses."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(_TIMEOUT_S)
            sock.connect(str(path))
            sock.sendall(json.dumps(question).encode() + b"\n")
            with sock.makefile("rb") as stream:
                line = stream.readline()
        answer: dict[str, Any] = json.loads(line)
    except OSError as error:
        raise ConfigError(
            f"{path} does not answer: {error.strerror or error}",
            cure="run this on the perimeter host as root or a member of records.readers_group; see whether saw-gatekeeper runs",
        ) from error
    except ValueError as error:
        raise NotRead("the gatekeeper's answer cannot be read", cure="try again") from error
    if not answer.get("ok"):
        raise NotRead(str(answer.get("detail", "no reason was given")), cure=str(answer.get("cure", "")))
    return answer


def _seconds(text: str) -> float:
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise NotRead(f"{text!r} is not a time", cure="write for example 2026-11-30T12:00:00+00:00") from error
    if time.tzinfo is None:
        raise NotRead(f"{text!r} has no zone", cure="add +00:00")
    return time.timestamp()


def _row(one: dict[str, Any]) -> dict[str, Any]:
    facts = one["facts"]
    model = facts["model"] if facts["model"] == facts["model_sent"] else f"{facts['model']} as {facts['model_sent']}"
    return {
        **{name: facts[name] for name in ("time", "workspace", "route")},
        "record": one["id"],
        "model": model,
        "classes": " ".join(facts["data_classes"]),
        "kept": facts["content"],
        "bytes": facts["size"],
        "answer": one["answer"],
        "status": one["status"] or "",
    }


def _text(shown: dict[str, Any]) -> str:
    """Return a record for a terminal: what programs and models wrote is escaped, so that it cannot act on it."""
    record = shown["record"]
    lines = [fields({"record": record["id"], **record["facts"], "answer": record["answer"]}), ""]
    if shown["body"] is not None:
        lines += ["-- what was asked", _plain(shown["body"]), ""]
    if record["answer"] != "none":
        lines += ["-- what was answered", _plain(shown["answer"])]
    return "\n".join(lines)


def _plain(text: str) -> str:
    return "".join(one if one.isprintable() or one == "\n" else f"\\u{ord(one):04x}" for one in text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw inference",
        description="What this perimeter keeps of calls of models. Each reading is in the audit trail.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    log = commands.add_parser("log", help="list records, the newest first, without what was said")
    log.add_argument("--workspace", default="", help="of this workspace only")
    log.add_argument("--before", metavar="TIME", help="older than this time (RFC 3339)")
    log.add_argument("--limit", type=int, default=50, help="most records (default 50, at most 500)")
    shown = commands.add_parser("show", help="print one record with what was asked and answered, as far as it is kept")
    shown.add_argument("record", help="its name, as `log` and the audit trail's `record` tell it")
    for command in (log, shown):
        command.add_argument(
            "--socket", type=Path, help=f"a gatekeeper's socket (default: one in {SOCKETS} that answers)"
        )
        command.add_argument("--json", action="store_true", help="print machine-readable results")
    return parser
