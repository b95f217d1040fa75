"""``saw audit ship``: send the trail to a receiver elsewhere, and say how far that is."""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from saw.audit.ship import Forwarder, Page, ShipSettings, ShipState, load_settings
from saw.broker.client import BrokerContext, Context, OperatorClient
from saw.cli.operator_options import fields, show, table
from saw.errors import SawError, UnavailableError


class AuditSocket:
    """The trail, over the broker's audit socket; connections are kept between calls."""

    def __init__(self, client: OperatorClient) -> None:
        """Use a client whose session is open."""
        self._client = client

    @classmethod
    def open(cls, path: str, stack: contextlib.ExitStack) -> AuditSocket:
        """Return the trail behind the socket ``path``; the session ends with ``stack``."""
        return cls(stack.enter_context(OperatorClient(Context(BrokerContext(socket=path))).session()))

    def read(self, after: int, limit: int, wait_s: int) -> Page:
        """Return a page of the trail in the order of arrival."""
        answer = self._client.request("GET", f"/v1/audit/log?after={after}&limit={limit}&wait={wait_s}")
        try:
            return msgspec.convert(answer, Page)
        except msgspec.ValidationError as error:
            raise UnavailableError(f"the broker's answer is not understood: {error}", cure="update both") from error

    def heads(self) -> dict[str, int]:
        """Return the last sequence number of every chain."""
        sources = self._client.request("GET", "/v1/audit/events?limit=1")["sources"]
        return {
            str(source): int(self._client.request("GET", f"/v1/audit/events?source={source}&limit=1")["head"]["seq"])
            for source in sources
        }


def ship(options: argparse.Namespace) -> int:
    """Run ``saw audit ship``: until stopped, or with ``--status`` say how far it is (exit 1 when it is failing)."""
    settings = load_settings(options.config)
    if options.check:
        print(json.dumps({"ok": True}) if options.json else f"{options.config} is valid")
        return 0
    if options.status:
        return _status(settings, as_json=options.json)
    with contextlib.ExitStack() as stack:
        trail = AuditSocket.open(settings.socket, stack)
        Forwarder(settings, trail, lambda: datetime.now(UTC), threading.Event()).run()
    return 0


def _status(settings: ShipSettings, *, as_json: bool) -> int:
    state = ShipState(Path(settings.state_dir))
    cursor, health = state.cursor(), state.health()
    lag: int | None = None
    heads: dict[str, int] = {}
    broker_error: dict[str, object] | None = None
    try:
        with contextlib.ExitStack() as stack:
            trail = AuditSocket.open(settings.socket, stack)
            lag = trail.read(cursor.position, 1, 0).end - cursor.position
            heads = trail.heads()
    except SawError as error:
        broker_error = error.as_dict()
    sources = [
        {"source": name, "acknowledged": cursor.sources[name].seq if name in cursor.sources else 0, "head": heads.get(name)}
        for name in sorted({*cursor.sources, *heads})
    ]  # fmt: skip
    good = health is not None and health.state == "shipping" and broker_error is None
    value: Mapping[str, Any] = {
        "state": "never_ran" if health is None else health.state,
        "since": "" if health is None else health.since,
        "receiver": settings.receiver.address,
        "lag": lag,
        "acknowledged_at": cursor.acknowledged_at,
        "restarts": cursor.restarts,
        "error": None if health is None else health.error,
        "error_at": "" if health is None else health.error_at,
        "broker": broker_error,
        "sources": sources,
    }
    flat = {name: item for name, item in value.items() if name not in {"sources", "error", "broker"}}
    for name in ("error", "broker"):
        flat[name] = (value[name] or {}).get("message")
    text = f"{fields(flat)}\n{table(sources, ('source', 'acknowledged', 'head'))}"
    show({**value, "ok": good}, text, as_json=as_json)
    return 0 if good else 1


def add_ship(commands: Any) -> None:
    """Add the command to the parser of ``saw audit``."""
    command = commands.add_parser("ship", help="send the trail to a receiver (RELP or OTLP), and keep at it")
    command.add_argument("--config", default="/etc/saw/audit.json", help="configuration file (default: %(default)s)")
    command.add_argument("--status", action="store_true", help="say how far it is; exit 1 when it is failing")
    command.add_argument("--check", action="store_true", help="check the configuration and end")
    command.add_argument("--json", action="store_true", help="print JSON")
