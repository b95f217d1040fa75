"""``saw telemetry``: what the journal of this host says, as OCSF events - whether they leave, and the newest of them."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from saw.cli.answers import Answer
from saw.errors import ConfigError
from saw.telemetry.config import DEFAULT_CONFIG, TelemetryConfig, read_config
from saw.telemetry.health import health_of
from saw.telemetry.service import Service, host_name
from saw.telemetry.spool import Spool


def main(argv: list[str]) -> int:
    """Run ``saw telemetry``; 1 when it is not well (``status``)."""
    options = _parser().parse_args(argv)
    config = read_config(options.config)
    if options.command == "check":
        return 0
    if options.command == "run":
        return _run(config)
    answer, text, code = _COMMANDS[options.command](config, options)
    if options.json:
        print(msgspec.json.encode(answer).decode())
    elif text:
        print(text)
    return code


def _status(config: TelemetryConfig, _options: argparse.Namespace) -> Answer:
    health = health_of(config, host_name(config), datetime.now(UTC))
    width = max(map(len, health.parts))
    lines = [f"{name:<{width}}  {text}" for name, text in health.parts.items()]
    lines += [f"{'chain':<{width}}  {health.source}, {health.head} events"] if health.source else []
    lines += [f"problem: {problem}" for problem in health.problems]
    answer = {"ok": not health.problems, **msgspec.to_builtins(health)}
    return answer, "\n".join(lines), 1 if health.problems else 0


def _tail(config: TelemetryConfig, options: argparse.Namespace) -> Answer:
    if not (Path(config.state_dir) / "spool.db").exists():
        raise ConfigError(f"there is no spool in {config.state_dir}", cure="systemctl status saw-telemetry")
    spool = Spool(Path(config.state_dir), config.spool_bytes, host_name(config))
    try:
        found = spool.newest(options.limit)
    finally:
        spool.close()
    rows = []
    for one in found:
        moment = datetime.fromtimestamp(one.event["time"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
        said = one.event.get("message") or one.event["type_name"]
        rows.append(f"{moment}  {one.seq:>6}  {one.event['severity']:<13}  {one.event['class_name']:<21}  {said}")
    return {"ok": True, "events": [msgspec.to_builtins(one) for one in found]}, "\n".join(rows) or "no events", 0


_COMMANDS = {"status": _status, "tail": _tail}


def _run(config: TelemetryConfig) -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    Service(config, stop).run()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="saw telemetry", description="What the journal of this host says, as OCSF events (docs/telemetry.md)."
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help=f"configuration (default {DEFAULT_CONFIG})")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "status": "tell whether events are read and leave; 1 when something is not well",
        "tail": "show the newest events, with --json as OCSF in their chain",
        "run": "read and deliver (the unit saw-telemetry.service does)",
        "check": "read the configuration and refuse what is wrong in it",
    }
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in texts.items()}
    for name in _COMMANDS:
        made[name].add_argument("--json", action="store_true", help="print JSON")
    made["tail"].add_argument("--limit", type=int, default=20, help="how many (default 20)")
    return parser
