"""Sign-ins: what sshd, sudo and PAM say, as OCSF Authentication (3002).

Forms are those of OpenSSH 9 and 10, sudo 1.9 and Linux-PAM 1.5 and later.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from saw.audit.events import Outcome
from saw.telemetry.journal import Entry, words
from saw.telemetry.told import Host, origin, short, time_of

SSHD = frozenset({"sshd", "sshd-session", "sshd-auth"})
_FROM = r"(?P<address>[0-9A-Za-z.:%_-]+) port (?P<port>\d{1,5})"
# A user's name is whatever the client sends: it is read up to the last address of the line, never the first.
_ACCEPTED = re.compile(
    r"Accepted (?P<method>\S+) for (?P<user>.*) from " + _FROM + r" ssh2"
    r"(?:: (?P<type>\S+) (?P<key>SHA256:\S+)(?: ID (?P<id>.*) \(serial (?P<serial>\d+)\) CA .*)?)?"
)
_FAILED = re.compile(r"Failed (?P<method>\S+) for (?:invalid user )?(?P<user>.*) from " + _FROM + r" ssh2(?:: .*)?")
_LEFT_EARLY = re.compile(
    r"(?:Connection (?:closed|reset) by|Disconnected from|Disconnecting) (?:authenticating|invalid) user (?P<user>.*) "
    + _FROM
    + r"(?:: [A-Za-z ]+)?(?: \[preauth\])?"
)
_LEFT = re.compile(r"Disconnected from user (?P<user>.*) " + _FROM)
_SUDO = re.compile(r"\s*(?P<by>\S+) : (?P<rest>.*)", re.DOTALL)
_SUDO_START = re.compile(r"(?:HOST|TTY|CHROOT|PWD|USER)=")
_SUDO_REASONS = {
    "user not in sudoers": "not in sudoers",
    "command not allowed": "command not allowed",
    "incorrect password attempt": "wrong password",
    "a password is required": "a password is required",
    "user not allowed to": "not allowed",
}
#: sudo breaks a long line in two or more; each further one begins so (sudoers(5), syslog_maxlen).
_SUDO_GOES_ON = "(command continued) "
_SUDO_USER = re.compile(r"(?:^|; )USER=([^\s;]+)(?= ;|$)")
_SUDO_PROGRAM = re.compile(r" ; COMMAND=([^\s]+)")
_OPENED = re.compile(r"session opened for user (?P<user>[^\s(]+)(?:\(uid=\d+\))? by (?P<by>[^\s(]*)(?:\(uid=\d+\))?")
_CLOSED = re.compile(r"session closed for user (?P<user>\S+)")
_REFUSED = re.compile(r"authentication failure; .*?ruser=(?P<by>\S*) rhost=(?P<address>\S*)(?: +user=(?P<user>\S*))?")
_PAM = re.compile(r"pam_\w+\((?P<service>[A-Za-z0-9_.-]{1,64}):(?P<kind>session|auth)\): (?P<rest>.*)")
#: Services that PAM speaks of and that are told by their own words, or are no sign-in of anybody.
_NOT_BY_PAM = frozenset(
    {"sshd", "sudo", "sudo-i", "cron", "atd", "systemd-user", "runuser", "runuser-l", "chpasswd", "passwd"}
)


def looks_like_one(entry: Entry) -> bool:
    """Whether the entry says of itself that it is about a sign-in; whose word that is remains to be asked."""
    name, text = words(entry.syslog_identifier), words(entry.message)
    if name in SSHD:
        return any(form.fullmatch(text) for form in (_ACCEPTED, _FAILED, _LEFT_EARLY, _LEFT))
    return (name == "sudo" and _of_sudo(text) is not None) or _pam(text) is not None


def sign_in(host: Host, entry: Entry) -> dict[str, Any] | None:
    """Return the event of an entry that is proven to be of such a program; None when it is about no sign-in."""
    name, text = words(entry.syslog_identifier), words(entry.message)
    if name in SSHD:
        return _ssh(host, entry, text)
    if name == "sudo" and (sudo := _of_sudo(text)):
        return _sudo(host, entry, sudo)
    pam = _pam(text)
    return None if pam is None else _by_pam(host, entry, pam)


def _ssh(host: Host, entry: Entry, text: str) -> dict[str, Any] | None:
    if found := _ACCEPTED.fullmatch(text):
        detail = {"key_type": found["type"], "key": found["key"], "certificate": found["id"], "serial": found["serial"]}
        said = {name: short(value) for name, value in detail.items() if value}
        return _event(host, entry, "sshd", found["user"], found, method=found["method"], detail=said)
    if (found := _FAILED.fullmatch(text)) or (found := _LEFT_EARLY.fullmatch(text)):
        method = found.groupdict().get("method") or ""
        return _event(host, entry, "sshd", found["user"], found, outcome="failure", method=method)
    if found := _LEFT.fullmatch(text):
        return _event(host, entry, "sshd", found["user"], found, activity="logoff")
    return None


def _of_sudo(text: str) -> re.Match[str] | None:
    """Return the parts of what sudo says of a call, also where it is the beginning of a line that was broken in two."""
    found = _SUDO.fullmatch(text)
    if found is None:
        return None
    rest = found["rest"]
    if rest.startswith(
        _SUDO_GOES_ON
    ):  # arguments alone are not told; a user or a program puts what was told before in doubt
        return found if "USER=" in rest or "COMMAND=" in rest else None
    return found if "COMMAND=" in rest or _SUDO_START.match(rest) or _reason(rest) else None


def _reason(rest: str) -> str:
    """Return why sudo refused, as the beginning of its line says; empty for a reason that is not known here."""
    return next((said for form, said in _SUDO_REASONS.items() if form in rest.partition(" ; ")[0].lower()), "")


def _sudo(host: Host, entry: Entry, found: re.Match[str]) -> dict[str, Any] | None:
    rest = found["rest"]
    if rest.startswith(_SUDO_GOES_ON):
        return _sudo_goes_on(host, entry, found["by"])
    # Folder and arguments are chosen by who runs sudo, and may look like what sudo itself says: then neither is believed.
    users, programs = _SUDO_USER.findall(rest), _SUDO_PROGRAM.findall(rest)
    clear = len(users) == 1 and rest.count("USER=") == 1 and rest.count("COMMAND=") == 1
    refused = not _SUDO_START.match(rest)
    reason = _reason(rest) or "refused"
    detail = {"by": short(found["by"])} | (
        {"runs": short(programs[0])} if clear and programs else {"ambiguous": not clear}
    )
    return _event(
        host,
        entry,
        "sudo",
        users[0] if clear else "unknown",
        None,
        outcome="failure" if refused else "success",
        reason=reason if refused else "",
        detail=detail,
    )


def _sudo_goes_on(host: Host, entry: Entry, by: str) -> dict[str, Any]:
    """Return the event of a line that goes on. It says neither that somebody became another nor that somebody was refused."""
    event = host.factory.log(
        time_of(entry),
        host.subject(),
        message=f"sudo: a line about {short(by, 128)} was too long: user and program of the one before are in doubt",
        severity="medium",
        detail={"by": short(by), "ambiguous": True, "journal": origin(entry)},
    )
    return host.finished(event, entry)


def _pam(text: str) -> re.Match[str] | None:
    found = _PAM.fullmatch(text)
    return None if found is None or found["service"] in _NOT_BY_PAM else found


def _by_pam(host: Host, entry: Entry, pam: re.Match[str]) -> dict[str, Any] | None:
    rest, service = pam["rest"], pam["service"]
    if found := _OPENED.fullmatch(rest):
        return _event(
            host, entry, service, found["user"], None, detail={"by": short(found["by"])} if found["by"] else {}
        )
    if found := _CLOSED.fullmatch(rest):
        return _event(host, entry, service, found["user"], None, activity="logoff")
    if pam["kind"] == "auth" and (found := _REFUSED.fullmatch(rest)):
        detail = {name: short(found[name]) for name in ("by", "address") if found[name]}
        return _event(host, entry, service, found["user"] or "unknown", None, outcome="failure", detail=detail)
    return None


def _event(
    host: Host,
    entry: Entry,
    service: str,
    user: str,
    remote: re.Match[str] | None,
    *,
    activity: Literal["logon", "logoff"] = "logon",
    outcome: Outcome = "success",
    method: str = "",
    reason: str = "",
    detail: dict[str, Any] | None = None,
) -> dict[str, Any]:
    user = short(user, 128) or "unknown"
    word = {"logoff": "left", "logon": "signed in" if outcome == "success" else "was refused"}[activity]
    event = host.factory.authentication(
        time_of(entry),
        host.subject(user),
        activity=activity,
        outcome=outcome,
        message=f"{service}: {user} {word}",
        protocol=short(method, 64),
        status_detail=reason,
        detail={**(detail or {}), "journal": origin(entry)},
    )
    source: dict[str, Any] = {"hostname": host.name}
    if remote is not None:
        source = {"ip": remote["address"], "port": int(remote["port"])}
    return host.finished(
        event,
        entry,
        user={"name": user},
        service={"name": service},
        is_remote=remote is not None,
        src_endpoint=source,
        dst_endpoint={"hostname": host.name},
    )


__all__ = ["SSHD", "looks_like_one", "sign_in"]
