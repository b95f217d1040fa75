"""``saw edr``: endpoint detection on this host - its health, its findings, a scan now, and the integrity database."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.cli.answers import Answer
from saw.edr import aide
from saw.edr.config import DEFAULT_CONFIG, EdrConfig, Integrity, read_config
from saw.edr.forward import kind_of
from saw.edr.health import Health, health_of, report
from saw.edr.place import ways_of
from saw.edr.scan import scan
from saw.edr.service import Courier, Service, factory_of, now
from saw.edr.store import Store
from saw.errors import ConfigError


def main(argv: list[str]) -> int:
    """Run ``saw edr``; 1 when it is not well (``status``), when a scan failed, or when something differs (``integrity``)."""
    options = _parser().parse_args(argv)
    config = read_config(options.config)
    if options.command == "check":
        return 0
    if options.command == "watch":
        return _watch(config, options.config)
    answer, text, code = _COMMANDS[options.command](config, options)
    if options.json:
        print(msgspec.json.encode(answer).decode())
    elif text:
        print(text)
    return code


def _status(config: EdrConfig, options: argparse.Namespace) -> Answer:
    health = health_of(config, now())
    if options.report:
        _report(config, health)
    width = max(map(len, health.parts))
    lines = [f"{'provider':<{width}}  {health.provider}"]
    lines += [f"{name:<{width}}  {text}" for name, text in health.parts.items()]
    lines += [f"problem: {problem}" for problem in health.problems]
    answer = {"ok": not health.problems, **msgspec.to_builtins(health)}
    return answer, "\n".join(lines), 1 if health.problems else 0


def _report(config: EdrConfig, health: Health) -> None:
    """Write new problems to the spool and deliver what waits there, for the watcher may be dead."""
    store = Store(config.state, config.spool_limit, ways=ways_of(config))
    try:
        report(health, config, store, factory_of(), now())
    finally:
        store.close()
    courier = Courier(config)
    try:
        courier.deliver()
    finally:
        courier.close()


def _findings(config: EdrConfig, options: argparse.Namespace) -> Answer:
    store = Store(config.state, config.spool_limit, ways=ways_of(config))
    try:
        found = store.newest(options.limit)
    finally:
        store.close()
    rows = []
    for one in found:
        event = one.event
        moment = datetime.fromtimestamp(event["time"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        rows.append(f"{moment}  {event['severity']:<13}  {kind_of(event):<19}  {event['message']}")
    return {"ok": True, "findings": [msgspec.to_builtins(one) for one in found]}, "\n".join(rows) or "no findings", 0


def _scan(config: EdrConfig, options: argparse.Namespace) -> Answer:
    store = Store(config.state, config.spool_limit, ways=ways_of(config))
    try:
        done = scan(config, store, factory_of(), now, everything=options.all)
        new = [one.event for one in store.newest() if one.seq in done.new]
    finally:
        store.close()
    lines = [f"{done.files} files scanned for malware, {done.differences} system files differ"]
    lines += [f"new: {event['message']}" for event in new]
    lines += [f"problem: {problem}" for problem in done.problems]
    answer = {"ok": not done.problems, "new": new, "files": done.files, "differences": done.differences}
    return answer | {"problems": list(done.problems)}, "\n".join(lines), 1 if done.problems else 0


def _integrity(config: EdrConfig, options: argparse.Namespace) -> Answer:
    integrity = config.integrity
    if integrity is None:
        raise ConfigError("there is no integrity check here", cure="the provider embedded has one")
    if options.init:
        aide.initialise(integrity)
        return {"ok": True}, f"made {integrity.database}", 0
    if options.accept:
        found = aide.accept(integrity, options.accept)
        return {"ok": True, "accepted": found.count}, f"accepted {found.count} differences", 0
    return _differences(integrity)


def _differences(integrity: Integrity) -> Answer:
    found = aide.check(integrity)
    lines = [
        f"{how:<8}{path}"
        for how, paths in (("added", found.added), ("removed", found.removed), ("changed", found.changed))
        for path in sorted(paths)
    ]
    if found.count:
        lines += ["", f"to take them as right: saw edr integrity --accept {found.digest}"]
    answer: dict[str, Any] = {"ok": not found.count, "digest": found.digest, **msgspec.to_builtins(found)}
    return answer, "\n".join(lines) or "no differences", 1 if found.count else 0


_COMMANDS = {"status": _status, "findings": _findings, "scan": _scan, "integrity": _integrity}


def _watch(config: EdrConfig, config_file: Path) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Service(config, config_file, stop).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saw edr", description="Endpoint detection on this host (docs/edr.md).")
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"configuration (default {DEFAULT_CONFIG})")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "status": "tell how every part is; 1 when one is not well",
        "findings": "show the newest findings, with --json as OCSF events",
        "scan": "scan for malware and check the system's files now",
        "integrity": "show which system files differ, and take that as right",
        "watch": "run the watcher (the unit saw-edr.service does)",
        "check": "read the configuration and refuse what is wrong in it",
    }
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for name in _COMMANDS:
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["status"].add_argument(
        "--report", action="store_true", help="make a new problem a finding, and deliver findings"
    )
    made["findings"].add_argument("--limit", type=int, default=100, help="how many (default 100)")
    made["scan"].add_argument("--all", action="store_true", help="scan every file, not only what is new or changed")
    either = made["integrity"].add_mutually_exclusive_group()
    either.add_argument("--init", action="store_true", help="make the first database")
    either.add_argument("--accept", metavar="DIGEST", help="take the differences that were shown under this digest")
    return parser
