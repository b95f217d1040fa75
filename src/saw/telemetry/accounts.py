"""Changes of accounts: what shadow's programs say of users, groups and passwords, as OCSF Account Change (3001)."""

from __future__ import annotations

import re
from typing import Any, Literal

from saw.telemetry.journal import Entry, words
from saw.telemetry.told import Host, origin, short, time_of

PROGRAMS = frozenset(
    {"useradd", "userdel", "usermod", "groupadd", "groupdel", "groupmod", "passwd", "chpasswd", "gpasswd", "chage"}
)
_Activity = Literal["create", "delete", "password", "attach", "detach", "lock", "unlock", "other"]
_NAME = r"'?(?P<name>[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63}\$?)'?"
_GROUP = r"'?(?P<group>[A-Za-z0-9_][A-Za-z0-9_.@-]{0,63})'?"
#: Form of the words → what changed. Of groups, the account is the group's.
_WORDS: tuple[tuple[str, _Activity, str], ...] = (
    (rf"new user: name={_NAME}, UID=.*", "create", "user"),
    (rf"delete user {_NAME}", "delete", "user"),
    (rf"new group: name={_NAME}, GID=.*", "create", "group"),
    (rf"(?:group {_NAME} removed|removed group {_NAME.replace('name', 'other')} owned by .*)", "delete", "group"),
    (rf"add {_NAME} to (?:shadow )?group {_GROUP}", "attach", "member"),
    (rf"delete {_NAME} from (?:shadow )?group {_GROUP}", "detach", "member"),
    (rf"user {_NAME} added by \S+ to group {_GROUP}", "attach", "member"),
    (rf"user {_NAME} removed by \S+ from group {_GROUP}", "detach", "member"),
    (rf"lock user {_NAME} password", "lock", "user"),
    (rf"unlock user {_NAME} password", "unlock", "user"),
    (rf"change user {_NAME} password", "password", "user"),
    (rf"pam_\w+\((?:passwd|chpasswd):chauthtok\): password changed for {_NAME}", "password", "user"),
    (rf"change user {_NAME} (?P<what>UID|GID|shell|home|expiration|inactive|name)\b.*", "other", "user"),
    (rf"changed password expiry for {_NAME}", "other", "user"),
)
_FORMS = tuple((re.compile(form), activity, what) for form, activity, what in _WORDS)
_SAID = {"create": "made", "delete": "removed", "password": "password changed", "attach": "joined", "detach": "left"}


def account_change(host: Host, entry: Entry) -> dict[str, Any] | None:
    """Return the event of an entry that is proven to be of such a program; None when it tells of no change."""
    text = words(entry.message)
    if text.startswith("add '") and " to shadow group " in text:
        return None  # the same member of the same group, said a second time
    for form, activity, what in _FORMS:
        if found := form.fullmatch(text):
            return _event(host, entry, activity, what, found.groupdict())
    return None


def looks_like_one(entry: Entry) -> bool:
    """Whether the entry says of itself that it is about an account."""
    name, text = words(entry.syslog_identifier), words(entry.message)
    return name in PROGRAMS and any(form.fullmatch(text) for form, _, _ in _FORMS)


def _event(host: Host, entry: Entry, activity: _Activity, what: str, named: dict[str, str | None]) -> dict[str, Any]:
    name = named["name"] or named.get("other") or "unknown"
    said = _SAID.get(activity, activity if activity != "other" else "changed")
    group = named.get("group") or ""
    message = f"{'group' if what == 'group' else 'account'} {name}: {said}{f' group {group}' if group else ''}"
    detail: dict[str, object] = {
        "account": what,
        "journal": origin(entry),
        "by_program": short(words(entry.syslog_identifier)),
    }
    detail |= {key: named[key] for key in ("group", "what") if named.get(key)}
    event = host.factory.account_change(
        time_of(entry), host.subject(), name, activity=activity, message=message, detail=detail
    )
    user: dict[str, Any] = {"name": name} | ({"groups": [{"name": group}]} if group else {})
    return host.finished(event, entry, user=user)


__all__ = ["PROGRAMS", "account_change", "looks_like_one"]
