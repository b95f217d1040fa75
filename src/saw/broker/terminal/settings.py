"""The part ``terminal`` of the broker's configuration: sessions and recordings in a browser (docs/portal.md)."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

MAX_TERMINALS = 1000
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252}[A-Za-z0-9])?\Z")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}\Z")


class TerminalBastion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The bastion as the broker's host reaches it, and the account there."""

    host: str
    port: int = 2222
    user: str = "saw-session"


class TerminalSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``files_dir`` holds the emulator that browsers load (``xterm.js``, ``xterm.css``, ``addon-fit.js``); without ``bastion``
    recordings are played and no terminal is opened. ``source_address``: addresses from which the bastion sees this host; None:
    the one by which this host reaches it. ``runtime_dir`` (in memory) holds the keys of live terminals, and is the broker's
    alone. ``per_person`` and ``in_all`` are the most terminals at once.
    """

    files_dir: str
    bastion: TerminalBastion | None = None
    source_address: str | None = None
    runtime_dir: str = "/run/saw/broker/terminals"
    per_person: int = 4
    in_all: int = 64


def problems_of_terminal(settings: TerminalSettings) -> Iterator[str]:
    """Yield what is wrong with ``settings``, naming the field."""
    for name in ("files_dir", "runtime_dir"):
        if not Path(getattr(settings, name)).is_absolute():
            yield f"terminal.{name} must be an absolute path"
    bastion = settings.bastion
    if bastion is not None:
        if not (_HOST.match(bastion.host) or _is_network(bastion.host)):
            yield "terminal.bastion.host must be a name or an IP address"
        if not 1 <= bastion.port <= 65_535:
            yield "terminal.bastion.port must be 1 to 65535"
        if not _USER.match(bastion.user):
            yield "terminal.bastion.user must be the name of an account"
    if settings.source_address is not None and not all(map(_is_network, settings.source_address.split(","))):
        yield "terminal.source_address must be IP addresses or networks with commas between them"
    if not 1 <= settings.per_person <= settings.in_all <= MAX_TERMINALS:
        yield f"terminal.per_person and terminal.in_all must be 1 to {MAX_TERMINALS}, the first not above the second"


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text, strict=False)
    except ValueError:
        return False
    return True
