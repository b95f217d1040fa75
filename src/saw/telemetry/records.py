"""Records of the kernel's audit, entries of the kernel and chosen logs, as OCSF Base Events (class 0): no other class fits them.

Of an audit record only named fields are read. Its command line is in records that are not told at all (EXECVE, PROCTITLE, CWD).
"""

from __future__ import annotations

import re
from typing import Any

from saw.audit.events import Severity
from saw.telemetry.config import Select, of_an_agent
from saw.telemetry.journal import Entry, words
from saw.telemetry.told import Host, origin, priority_of, short, time_of

_SYSCALL = "1300"
#: Audit types that are told without a key: configuration of audit, refusals of AppArmor, SELinux and seccomp, modules.
_TOLD = {"1305": "CONFIG_CHANGE", "1400": "AVC", "1326": "SECCOMP", "1330": "KERN_MODULE"}
_ANOMALIES = range(1700, 1800)
_FIELD = re.compile(r'\b([a-z_]+)=("[^"]*"|\S+)')
_FIELDS = (
    "success", "exit", "syscall", "auid", "uid", "euid", "pid", "ppid", "ses", "comm", "exe", "key", "op", "res",
    "apparmor", "operation", "class", "profile", "requested_mask", "denied_mask", "sig", "code", "name", "list",
)  # fmt: skip
_SEVERITY: dict[int, Severity] = {0: "critical", 1: "critical", 2: "critical", 3: "high", 4: "medium", 5: "low"}


def audit_event(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    """Return the event of a record of the kernel's audit that is to be told, else None."""
    kind = words(entry.audit_type)
    known = kind in _TOLD or (kind.isdecimal() and int(kind) in _ANOMALIES)
    if entry.transport != "audit" or not (known or kind == _SYSCALL):
        return None
    fields = _fields(words(entry.message))
    key = fields.get("key", "")
    if not (select.tells_key(key) or (select.audit and known)):
        return None
    name = short(words(entry.audit_type_name), 64) or _TOLD.get(kind, kind)
    # What "name" is of a module is a path elsewhere, and a path may be anybody's.
    said = {field: fields[field] for field in _FIELDS if field in fields and (field != "name" or kind == "1330")}
    event = host.factory.log(
        time_of(entry),
        host.subject(),
        message=f"audit: {name}{f' by the rule {key}' if key else ''}",
        severity="medium",
        detail={"audit": {"type": name, "id": short(words(entry.audit_id), 32), **said}},
    )
    return host.finished(event, entry)


def kernel_event(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    """Return the event of an entry of the kernel itself (facility 0) that is severe enough, else None."""
    if entry.transport != "kernel" or words(entry.syslog_facility) != "0" or select.kernel is None:
        return None
    if priority_of(entry) > select.kernel:
        return None
    return _log(host, entry, "kernel: " + short(words(entry.message)), {"transport": "kernel"})


def log_event(host: Host, entry: Entry, select: Select) -> dict[str, Any] | None:
    """Return the event of an entry that a rule of ``select.logs`` names by its unit, else None."""
    rule = select.log_of(entry.systemd_unit, priority_of(entry)) if entry.systemd_unit else None
    # What the service says of its own troubles would be a new trouble each time.
    if rule is None or entry.systemd_unit == "saw-telemetry.service":
        return None
    carried = rule.text and not of_an_agent(entry.systemd_unit)
    text = short(words(entry.message)) if carried else f"an entry of priority {priority_of(entry)}"
    return _log(host, entry, f"{short(entry.systemd_unit, 256)}: {text}", {"journal": origin(entry)})


def claim_event(host: Host, entry: Entry) -> dict[str, Any] | None:
    """Return the event of an entry that speaks of a sign-in or an account and is nobody's word who could know.

    None when too many were told in this minute; the next that is told says how many were not (``more``).
    """
    left_out = host.claims.take(entry)
    if left_out is None:
        return None
    name = short(words(entry.syslog_identifier), 64)
    event = host.factory.log(
        time_of(entry),
        host.subject(),
        message=f"an entry speaks as {name} and is not by it",
        severity="medium",
        detail={"claims": name, "journal": origin(entry)} | ({"more": left_out} if left_out else {}),
    )
    return host.finished(event, entry)


def _log(host: Host, entry: Entry, message: str, detail: dict[str, object]) -> dict[str, Any]:
    severity = _SEVERITY.get(priority_of(entry), "informational")
    event = host.factory.log(
        time_of(entry),
        host.subject(),
        message=message,
        severity=severity,
        detail={**detail, "priority": priority_of(entry)},
    )
    return host.finished(event, entry)


def _fields(text: str) -> dict[str, str]:
    """Return the first value of each field; hexadecimal ones stay as they are."""
    found: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        found.setdefault(name, short(value.strip('"'), 200))
    return found


__all__ = ["audit_event", "claim_event", "kernel_event", "log_event"]
