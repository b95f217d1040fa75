"""Chained events as syslog messages (RFC 5424), and back.

One structured-data element ``saw@32473`` carries the place of the event in its chain: ``source``, ``seq``, ``prev``,
``hash``, the ``position`` in the order of arrival, and where something is wrong a ``mark``. The message is the OCSF event as
JSON, over which ``hash`` was made, so what a receiver stored can be proved complete without the broker.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import msgspec

from saw import jsontext
from saw.audit.chain import ChainedEvent, ChainError, Head, event_hash
from saw.audit.removal import is_removed
from saw.errors import SawError

#: RFC 5612 sets this number aside for documentation; ours is the name in front of it.
SD_ID = "saw@32473"
#: Facility 13 is "log audit" (RFC 5424); severities by OCSF's severity_id, informational when unknown.
_FACILITY = 13
_SEVERITY = {1: 6, 2: 5, 3: 4, 4: 3, 5: 2, 6: 1}
_ESCAPED = re.compile(r'(["\\\]])')
_LINE = re.compile(
    r"<\d{1,3}>1 \S+ \S+ saw \S+ \S+ \[" + re.escape(SD_ID) + r'((?: [a-z]+="(?:[^"\\\]]|\\["\\\]])*")+)\](?: (.*))?',
    re.DOTALL,
)
_PARAMETER = re.compile(r' ([a-z]+)="((?:[^"\\\]]|\\["\\\]])*)"')
_NOT_NAME = re.compile(r"[^\x21-\x7e]")


class SyslogError(SawError):
    """A line is no message of ours, or is one without its event."""

    code = "syslog_invalid"


def mark_of(head: Head, item: ChainedEvent) -> str:
    """Return what is wrong with ``item`` behind ``head`` in its chain, empty when nothing is.

    ``removed``: its content is gone. ``changed``: the content does not match its hash. ``late``: it comes after one with a
    higher number. ``gap``: numbers before it are missing. ``relinked``: it does not continue the event before it.
    """
    if is_removed(item):
        return "removed"
    try:
        good = event_hash(item.source, item.seq, item.prev, item.event) == item.hash
    except ChainError:
        good = False
    if not good:
        return "changed"
    if item.seq <= head.seq:
        return "late"
    if item.seq > head.seq + 1:
        return "gap"
    return "" if item.prev == head.hash else "relinked"


def message(item: ChainedEvent, position: int, mark: str, host: str, longest: int) -> bytes:
    """Return ``item`` as one message of at most ``longest`` bytes; a longer event is left out and its size is said."""
    event = item.event
    priority = _FACILITY * 8 + _SEVERITY.get(_whole(event.get("severity_id")), 6)
    try:
        time = datetime.fromtimestamp(_whole(event.get("time")) / 1000, UTC)
        stamp = time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    except (OverflowError, ValueError, OSError):
        stamp = "-"
    name = _NOT_NAME.sub("", host)[:255] or "-"
    fields: dict[str, object] = {"source": item.source, "seq": item.seq, "prev": item.prev, "hash": item.hash}
    fields |= {"position": position} | ({"mark": mark} if mark else {})
    head = f"<{priority}>1 {stamp} {name} saw - {_whole(event.get('type_uid')) or '-'} "
    body = msgspec.json.encode(event)
    raw = f"{head}{_element(fields)} ".encode() + body
    if len(raw) > longest:
        raw = f"{head}{_element(fields | {'omitted': len(body)})}".encode()
    return raw


def parse(line: str) -> ChainedEvent:
    """Return the chained event in a line that a receiver stored; raise :class:`SyslogError` naming what is wrong."""
    found = _LINE.fullmatch(line)
    if found is None:
        raise SyslogError("this is no message of the audit trail", cure="store messages raw, one on each line")
    fields = {name: re.sub(r"\\(.)", r"\1", value) for name, value in _PARAMETER.findall(found[1])}
    if "omitted" in fields:
        raise SyslogError(
            f"event {fields.get('seq')} of {fields.get('source')} was too long to be sent",
            cure="take it from saw audit export, and raise max_message_bytes here and at the receiver",
        )
    try:
        event = jsontext.decode(found[2] or "", kind=dict[str, Any])
        return ChainedEvent(fields["source"], int(fields["seq"]), fields["prev"], event, fields["hash"])
    except (KeyError, ValueError, msgspec.DecodeError) as error:
        raise SyslogError(f"this message is not whole: {error}", cure="check what the receiver cuts off") from error


def _element(fields: Mapping[str, object]) -> str:
    return f"[{SD_ID} " + " ".join(f'{name}="{_ESCAPED.sub(_escape, str(fields[name]))}"' for name in fields) + "]"


def _escape(found: re.Match[str]) -> str:
    return "\\" + found[1]


def _whole(value: object) -> int:
    return value if isinstance(value, int) else 0
