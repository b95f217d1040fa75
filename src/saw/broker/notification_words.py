"""What a message says: facts of the broker's own, a sentence, and where to look. Nothing that an agent wrote, no way to decide.

The body of a webhook is as Standard Webhooks recommends (``{type, timestamp, data}``); a mail is made of the same body.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from datetime import datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime
from typing import Any
from urllib.parse import urlencode

import msgspec

from saw.broker.clock import iso, parse_iso
from saw.broker.config import BrokerConfig
from saw.broker.notification_settings import URGENT, Email, Kind, is_address

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,62})(\.[a-z0-9_]([a-z0-9_-]{0,62}))*\Z")
_LONGEST = 256
_AFTER = frozenset({Kind.AFTER_REVIEW_OWED, Kind.AFTER_REVIEW_OVERDUE})
_GATE = "gate"  # as saw.broker.review_states, which tells through this module, calls changes to the fleet
_CALL = "call"  # and what leaves a workspace
NOT_A_DECISION = "This message decides nothing: to decide, sign in, or sign with your key."


class Facts(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What happened. ``title`` is one sentence, ``link`` the page to look at (empty without pages), ``command`` the same
    for a terminal.

    ``expires_at`` is until when people can decide, or have to look at a broken glass.
    ``host`` is for programs and stands in no text: where policy allows ``*.example.com``, the agent chose a part of it.
    """

    title: str
    urgent: bool = False
    review: str = ""
    workspace: str = ""
    group: str = ""
    quorum: int = 0
    expires_at: str = ""
    method: str = ""
    host: str = ""
    gate: str = ""
    account: str = ""
    state: str = ""
    link: str = ""
    command: str = ""


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of a webhook; ``timestamp`` is when it happened."""

    type: Kind
    timestamp: str
    data: Facts


def review_message(config: BrokerConfig, kind: Kind, row: Any, at: datetime) -> Message:
    """Return what is said about the review ``row`` (a row of ``reviews``)."""
    gate, call = row.kind == _GATE, row.kind == _CALL
    method = row.method if call and row.method in _METHODS else ""
    host = row.host if call and len(row.host) <= 253 and (_HOST.match(row.host) or is_address(row.host)) else ""
    group, workspace = _plain(row.group_name), _plain(row.workspace_id)
    what = f"A {method or 'call'} of {workspace}" if call else f"A call of a tool of {workspace}"
    what = f"A change to the fleet ({_plain(row.rule)})" if gate else what
    title = {
        Kind.REVIEW_OPENED: f"{what} waits for {group}",
        Kind.REVIEW_ENDED: f"{what} is {row.state}",
        Kind.BREAK_GLASS_KEY: f"Break-glass: one key has signed for {what[0].lower()}{what[1:]}",
        Kind.BREAK_GLASS_REJECTED: f"{what} went by break-glass, and {group} says that this was wrong",
        Kind.BREAK_GLASS: f"Break-glass: {what} goes without its review",
        Kind.AFTER_REVIEW_OWED: f"{what} went by break-glass, and {group} owes its review",
        Kind.AFTER_REVIEW_OVERDUE: f"{what} went by break-glass, and its review by {group} is overdue",
    }[kind]
    facts = Facts(
        title=title,
        urgent=kind in URGENT,
        review=row.id,
        workspace=workspace,
        group=group,
        quorum=row.quorum,
        expires_at=row.after_due_at if kind in _AFTER and row.after_due_at else row.expires_at,
        method=method,
        host=host,
        gate=_plain(row.rule) if gate else "",
        state=row.state,
        link=_link(config, f"reviews/{row.id}"),
        command=f"saw review show {row.id}",
    )
    return Message(kind, iso(at), facts)


def workspace_message(config: BrokerConfig, kind: Kind, workspace_id: str, at: datetime) -> Message:
    """Return what is said about a workspace that was cut off."""
    facts = Facts(
        title=f"The workspace {workspace_id} was cut off",
        urgent=kind in URGENT,
        workspace=workspace_id,
        state="quarantined",
        link=_link(config, f"workspaces/{workspace_id}"),
        command=f"saw workspace show {workspace_id}",
    )
    return Message(kind, iso(at), facts)


def request_message(config: BrokerConfig, kind: Kind, workspace_id: str, request: str, at: datetime) -> Message:
    """Return what is said about a policy request. What the agent asks for, and why, are its own words and stand in no message."""
    facts = Facts(
        title=f"The agent of {workspace_id} asks for more than its policy allows",
        urgent=kind in URGENT,
        workspace=workspace_id,
        state="open",
        link=_link(config, f"policy-requests/{request}"),
        command=f"saw policy requests show {request}",
    )
    return Message(kind, iso(at), facts)


def account_message(config: BrokerConfig, kind: Kind, account: str, at: datetime) -> Message:
    """Return what is said about an account of the control host that changed things without signing in."""
    facts = Facts(
        title=f"{_plain(account)} changes things over the control host's socket, without signing in",
        urgent=kind in URGENT,
        account=_plain(account),
        link=_link(config, "audit?" + urlencode({"person": f"operator:{account}"})),
        command="saw audit search --principal " + shlex.quote(f"operator:{_plain(account)}"),
    )
    return Message(kind, iso(at), facts)


def trial_message(config: BrokerConfig, channel: str, at: datetime) -> Message:
    """Return what a test of ``channel`` says."""
    facts = Facts(title=f"A test of the channel {channel}", link=_link(config, ""), command="saw notify list")
    return Message(Kind.TEST, iso(at), facts)


def mail(message: Message, channel: Email, recipient: str, identifier: str) -> EmailMessage:
    """Return ``message`` as a mail to one address. Its Message-ID (RFC 5322, section 3.6.4) is the same with each attempt.

    Addresses were checked with the configuration, and a header takes no line break: it raises ValueError.
    """
    facts = message.data
    found = EmailMessage(policy=SMTP)
    found["From"] = Address(display_name="Secure Agent Workspace", addr_spec=channel.sender)
    found["To"] = Address(addr_spec=recipient)
    found["Subject"] = facts.title
    found["Date"] = format_datetime(parse_iso(message.timestamp))
    found["Message-ID"] = f"<{identifier}@{channel.sender.rpartition('@')[2]}>"
    found["Auto-Submitted"] = "auto-generated"  # RFC 3834
    if facts.urgent:
        found["Importance"] = "high"  # RFC 2156, as programs for mail show it
    found.set_content(text(message))
    return found


def text(message: Message) -> str:
    """Return the text of a mail."""
    facts = message.data
    needed = f"{facts.quorum} of {facts.group}" if facts.quorum and facts.group else ""
    lines = _table(
        [
            ("Review", facts.review),
            ("Workspace", facts.workspace),
            ("Gate", facts.gate),
            ("Account", facts.account),
            ("State", facts.state),
            ("Needs", needed),
            ("Until", facts.expires_at if message.type in {Kind.REVIEW_OPENED, *_AFTER} else ""),
            ("Told", message.timestamp),
        ]
    )
    place = facts.link or f"On the control host, or where its socket is reached: {facts.command}"
    return "\n".join([f"{facts.title}.", "", *lines, "", place, "", NOT_A_DECISION, ""])


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"{name + ':':<11}{value}" for name, value in rows if value]


def _link(config: BrokerConfig, path: str) -> str:
    return "" if config.sso is None else f"{config.sso.origin}/{path}"


def _plain(value: str) -> str:
    """Return ``value`` on one line: policy's own words, and no character that steers or hides."""
    return "".join(letter if letter.isprintable() else "?" for letter in value[:_LONGEST])
