"""Denial records, as the rings and the audit trail write them, read into one form.

Understood are the body of a refusal (HTTP 403 JSON of either ring, or of the MCP gate), the decision lines of ring 1's
journal, OCSF HTTP Activity events, and events in their chain as ``saw audit export`` and ``saw audit events --json``
print them; one JSON value per file, or one per line. Records are evidence from outside: nothing in them is believed
beyond "this was asked".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from saw.policy.errors import PolicyError, Problem
from saw.policy.strict_json import NotStrict, loads

MAX_DENIAL_BYTES = 256 * 1024 * 1024
"""Largest file of denial records that is read (bytes)."""

_HTTP_ACTIVITY = 4002
_LIMITS = {"host": 256, "method": 256, "path": 2048, "binary": 256}
"""Where the audit event cuts a text (characters); a text of this length may be the beginning of a longer one."""


class Denial(msgspec.Struct, frozen=True, kw_only=True):
    """One refused call. Empty text means that the record does not say.

    ``where`` is file and line. ``path`` is as recorded, with the query where the record has it (``query_known``).
    ``cut`` names a text that the record may have shortened.
    """

    where: str
    layer: str = ""
    reason: str = ""
    scheme: str = ""
    host: str = ""
    port: int = 0
    method: str = ""
    path: str = ""
    query_known: bool = False
    binary: str = ""
    tool: str = ""
    upgrade: str = ""
    cut: str = ""


class Denials(msgspec.Struct, frozen=True):
    """What a file holds: the denials, and how many records were about something else (allowed calls, other events)."""

    denials: tuple[Denial, ...]
    others: int


def read_denials(raw: bytes, name: str) -> Denials:
    """Return the denials in ``raw``; raise :class:`PolicyError` that names every line that is no record."""
    if len(raw) > MAX_DENIAL_BYTES:
        raise PolicyError([Problem(name, 1, 1, "", f"the file has {len(raw)} bytes", "split it")])
    found: list[Denial] = []
    problems: list[Problem] = []
    others = 0
    for line, value in _values(raw, name, problems):
        for record in _records(value):
            denial = _denial(record, f"{name}:{line}") if isinstance(record, dict) else None
            if denial is None:
                reason = "this is no denial record"
                problems.append(
                    Problem(name, line, 1, "", reason, "give refusals, ring-1 journal lines or audit events")
                )
            elif denial:
                found.append(denial)
            else:
                others += 1
    if problems:
        raise PolicyError(problems)
    return Denials(tuple(found), others)


def _values(raw: bytes, name: str, problems: list[Problem]) -> Iterator[tuple[int, object]]:
    try:
        whole = loads(raw, limit=MAX_DENIAL_BYTES)
    except NotStrict:
        for number, line in enumerate(raw.splitlines(), 1):
            if line.strip():
                try:
                    yield number, loads(line, limit=MAX_DENIAL_BYTES)
                except NotStrict as error:
                    problems.append(Problem(name, number, 1, "", str(error), "give one JSON value per line"))
    else:
        yield 1, whole


def _records(value: object) -> Iterator[object]:
    """Yield the records of one JSON value: itself, its elements, or the events of ``saw audit events --json``."""
    if isinstance(value, dict) and isinstance(value.get("events"), list):
        yield from value["events"]
    elif isinstance(value, list):
        yield from value
    else:
        yield value


def _denial(record: dict[str, Any], where: str) -> Denial | tuple[()] | None:
    """Return the denial, ``()`` for a record about something else, or ``None`` for what is no record at all."""
    if isinstance(record.get("event"), dict) and "seq" in record:
        record = record["event"]
    if record.get("error") == "policy_denied":
        return _plain(record, where, query_known=record.get("layer") == "ring2")
    if record.get("event") == "ring1_decision":
        return _plain(record, where, query_known=False) if record.get("verdict") != "allow" else ()
    if record.get("event") == "tool_call":
        return _plain(record, where, query_known=False) if record.get("verdict") != "allow" else ()
    if isinstance(record.get("class_uid"), int):
        denied = record["class_uid"] == _HTTP_ACTIVITY and record.get("action_id") == 2
        return _event(record, where) if denied else ()
    return None


def _plain(record: Mapping[str, Any], where: str, *, query_known: bool) -> Denial:
    return _made(
        where,
        query_known=query_known,
        layer=record.get("layer", ""),
        reason=record.get("reason", ""),
        scheme=record.get("protocol", ""),
        host=record.get("host", ""),
        port=record.get("port"),
        method=record.get("method", ""),
        path=record.get("path", ""),
        binary=record.get("binary", ""),
        tool=record.get("tool", ""),
        upgrade=record.get("upgrade", ""),
    )


def _event(event: Mapping[str, Any], where: str) -> Denial:
    request = _part(event, "http_request")
    url = _part(request, "url")
    ours = _part(_part(event, "unmapped"), "saw")
    query = url.get("query_string")
    return _made(
        where,
        query_known=ours.get("layer") != "ring1",  # what ring 1 writes down has no query
        layer=ours.get("layer", ""),
        reason=ours.get("reason", event.get("status_detail", "")),
        scheme=url.get("scheme", ""),
        host=url.get("hostname", ""),
        port=url.get("port"),
        method=request.get("http_method", ""),
        path=f"{url.get('path', '')}?{query}" if query else url.get("path", ""),
        binary=ours.get("binary", ""),
    )


def _part(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = value.get(key)
    return found if isinstance(found, dict) else {}


def _made(where: str, *, query_known: bool, port: object, **texts: object) -> Denial:
    values = {key: value if isinstance(value, str) else "" for key, value in texts.items()}
    cut = next((key for key, limit in _LIMITS.items() if len(values.get(key, "")) >= limit), "")
    number = port if isinstance(port, int) and not isinstance(port, bool) and 0 < port < 65536 else 0
    return Denial(where=where, query_known=query_known, port=number, cut=cut, **values)


def as_line(denial: Denial) -> str:
    """Return the call of a denial in one line, for people."""
    if denial.tool:
        return f"tool {denial.tool}"
    at = f"{denial.host or 'an unnamed host'}:{denial.port or '?'}"
    by = f" by {denial.binary}" if denial.binary else ""
    return f"{denial.method or '?'} {denial.scheme or 'https'}://{at}{json.dumps(denial.path)[1:-1]}{by}"
