"""The part ``notifications`` of the broker's configuration: who is told what happens, by webhook or by e-mail, and of what."""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import msgspec

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
_HOST = re.compile(r"[a-z0-9]([a-z0-9-]{0,62})(\.[a-z0-9]([a-z0-9-]{0,62}))*\Z")
#: An addr-spec (RFC 5322, section 3.4.1) of a dot-atom and a domain, in ASCII: nothing in it could begin another header.
_ADDRESS = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+(\.[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+)*@(?P<host>[a-z0-9.-]+)\Z")
_VISIBLE = re.compile(r"[!-~]*\Z")
EVERYONE_ELSE = "*"
"""Key of :attr:`Email.to` for messages of groups that have no key of their own, and of no group."""
MOST_CHANNELS = 32
MOST_ADDRESSES = 64
"""Most addresses of one channel; each is sent a message of its own."""


class Kind(enum.StrEnum):
    """What people are told. ``TEST`` is asked for by an operator, of one channel."""

    REVIEW_OPENED = "review_opened"
    REVIEW_ENDED = "review_ended"
    WORKSPACE_QUARANTINED = "workspace_quarantined"
    POLICY_REQUESTED = "policy_requested"
    BREAK_GLASS_KEY = "break_glass_key"
    BREAK_GLASS = "break_glass"
    BREAK_GLASS_REJECTED = "break_glass_rejected"
    AFTER_REVIEW_OWED = "after_review_owed"
    AFTER_REVIEW_OVERDUE = "after_review_overdue"
    LOCAL_CHANGE = "local_change"
    TEST = "test"


DEFAULT_KINDS = frozenset(Kind) - {Kind.REVIEW_ENDED, Kind.POLICY_REQUESTED, Kind.TEST}
"""Kinds that a channel gets which names none."""
URGENT = frozenset(Kind) - {Kind.REVIEW_OPENED, Kind.REVIEW_ENDED, Kind.POLICY_REQUESTED, Kind.TEST}
"""Kinds that are sent first, and marked as important."""


class _Channel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="type"):
    """``groups``: what is about these groups of reviewers alone; empty: about all, and about none. ``kinds``: of these kinds
    alone; empty: :data:`DEFAULT_KINDS`. ``ca_file``: authorities (PEM) of the far end, None for the system's."""

    name: str
    groups: tuple[str, ...] = ()
    kinds: tuple[Kind, ...] = ()
    ca_file: str | None = None

    def takes(self, kind: Kind, group: str) -> bool:
        """Tell whether this channel is told of ``kind`` about ``group`` (empty: about none)."""
        wanted = frozenset(self.kinds) or DEFAULT_KINDS
        return kind in wanted and (not self.groups or group in self.groups)


class Webhook(_Channel, tag="webhook", frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Messages go to ``url`` by POST, signed with each secret (``whsec_…``) that ``secret_file`` has a line of.

    ``insecure_loopback``: the URL may be ``http://`` to an address of this machine, and no other.
    """

    url: str
    secret_file: str
    insecure_loopback: bool = False

    def recipients(self, group: str) -> tuple[str, ...]:  # noqa: ARG002 - as of mail
        """Return who gets a message of its own; a webhook is one."""
        return ("",)

    @property
    def everyone(self) -> tuple[str, ...]:
        """Everyone whom a message can reach."""
        return ("",)


class Email(_Channel, tag="email", frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Messages go to a mail server (a submission service, RFC 6409).

    ``tls``: ``starttls`` (RFC 3207) or ``implicit`` (RFC 8314); ``none`` only to an address of this machine. ``to``: addresses
    for all messages, or for each group its own, with ``*`` for everything else.
    """

    host: str
    sender: str = msgspec.field(name="from")
    to: tuple[str, ...] | dict[str, tuple[str, ...]]
    port: int = 587
    tls: Literal["starttls", "implicit", "none"] = "starttls"
    username: str | None = None
    password_file: str | None = None

    def recipients(self, group: str) -> tuple[str, ...]:
        """Return the addresses that get a message about ``group`` (empty: about none), each one of its own."""
        if not isinstance(self.to, dict):
            return tuple(dict.fromkeys(self.to))
        found = self.to.get(group) if group else None
        return tuple(dict.fromkeys(found if found is not None else self.to.get(EVERYONE_ELSE, ())))

    @property
    def everyone(self) -> tuple[str, ...]:
        """Everyone whom a message can reach."""
        lists = self.to.values() if isinstance(self.to, dict) else (self.to,)
        return tuple(dict.fromkeys(address for one in lists for address in one))


Channel = Webhook | Email


def problems_of_notifications(channels: Sequence[Channel]) -> Iterator[str]:
    """Yield what is wrong, naming the channel and its field."""
    if len(channels) > MOST_CHANNELS:
        yield f"notifications must be {MOST_CHANNELS} channels at most"
    held: set[str] = set()
    for channel in channels:
        if not _NAME.match(channel.name):
            yield f"notifications: {channel.name[:64]!r} is no name of lower-case letters, digits and -"
            continue
        if channel.name in held:
            yield f"notifications: there are two channels {channel.name}"
        held.add(channel.name)
        found = _of_webhook(channel) if isinstance(channel, Webhook) else _of_email(channel)
        yield from (f"notifications.{channel.name}.{one}" for one in (*_of_any(channel), *found))


def _of_any(channel: Channel) -> Iterator[str]:
    if Kind.TEST in channel.kinds:
        yield "kinds must not have test: it is asked for"
    if not all(_is_group(name) for name in channel.groups):
        yield "groups must name groups of reviewers"
    if channel.ca_file is not None and not Path(channel.ca_file).is_absolute():
        yield "ca_file must be an absolute path"


def _of_webhook(channel: Webhook) -> Iterator[str]:
    if not _is_https(channel.url):
        try:
            plain, host = urlsplit(channel.url).scheme == "http", urlsplit(channel.url).hostname or ""
            here = plain and _is_https(channel.url.replace("http://", "https://", 1)) and is_loopback(host)
        except ValueError:
            here = False
        if not here:
            yield "url must be https://NAME/… without a user, a password or a fragment"
        elif not channel.insecure_loopback:
            yield "url must begin with https://; http:// to this machine needs insecure_loopback"
    if not Path(channel.secret_file).is_absolute():
        yield "secret_file must be an absolute path"


def _of_email(channel: Email) -> Iterator[str]:
    if not (_HOST.match(channel.host) or is_address(channel.host)):
        yield "host must be a name in lower case, or an address"
    if not 1 <= channel.port <= 65_535:
        yield "port must be 1 to 65535"
    if channel.tls == "none" and not is_loopback(channel.host):
        yield "tls must be starttls or implicit; none is for an address of this machine"
    if not _is_mailbox(channel.sender):
        yield "from must be an address such as saw@example.com"
    if not channel.everyone or not all(_is_mailbox(address) for address in channel.everyone):
        yield "to must list addresses such as ops@example.com"
    if len(channel.everyone) > MOST_ADDRESSES:
        yield f"to must list {MOST_ADDRESSES} addresses at most"
    if isinstance(channel.to, dict) and not all(name == EVERYONE_ELSE or _is_group(name) for name in channel.to):
        yield f"to must name groups of reviewers, or {EVERYONE_ELSE}"
    if (channel.username is None) != (channel.password_file is None):
        yield "username and password_file belong together"
    elif channel.username is not None and channel.tls == "none":
        yield "username needs TLS"
    elif channel.username is not None and not (channel.username and _VISIBLE.match(channel.username)):
        yield "username must be visible ASCII"
    if channel.password_file is not None and not Path(channel.password_file).is_absolute():
        yield "password_file must be an absolute path"


def is_address(host: str) -> bool:
    """Tell whether ``host`` is an IP address."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Tell whether ``host`` is an address of this machine itself; no name is, since somebody else could say where it leads."""
    return is_address(host) and ipaddress.ip_address(host).is_loopback


def _is_https(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    host = parts.hostname or ""
    good = _VISIBLE.match(url) and len(url) <= 2048 and "\\" not in url
    return bool(
        good
        and parts.scheme == "https"
        and (_HOST.match(host) or is_address(host))
        and "@" not in parts.netloc
        and "#" not in url
        and port != 0
    )


def _is_mailbox(address: str) -> bool:
    found = _ADDRESS.match(address)
    # What begins as an encoded word (RFC 2047) is none here, and would be read as one.
    return found is not None and "=?" not in address and len(address) <= 254 and bool(_HOST.match(found["host"]))


def _is_group(name: str) -> bool:
    return bool(name.strip()) and name.isprintable() and len(name) <= 256 and name != EVERYONE_ELSE
