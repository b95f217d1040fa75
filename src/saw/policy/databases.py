"""PostgreSQL sessions in policy: what opening one is called, who it is opened as, and what the two files must agree on.

A session is a connection that carries the protocol of PostgreSQL (version 3) and nothing else. Ring 2 ends the client's start,
signs in at the server itself, and then passes bytes on: what is asked inside is bounded by the rights of the server's role,
not by policy. In ``policy.yaml`` it is an endpoint with ``protocol: tcp``, in ``governance.yaml`` a credential with ``postgres``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Protocol

from saw.policy import globs, websocket
from saw.policy.decode import Report, Steps, StructureReport
from saw.policy.model import Endpoint, Part, says
from saw.policy.partial import Unknown

if TYPE_CHECKING:
    from saw.policy.governance import Credential, Governance

PROTOCOL = "tcp"
"""The protocol of an endpoint that sessions are opened at."""
UPGRADE = "postgres"
"""What a request asks to switch to that opens a session (RFC 9110, section 7.8)."""
METHOD = "POSTGRES"
"""Stands for the method of such a request, where methods are compared. No client can send a call of it."""
TARGET = "/"
"""The path of such a request. It has no other, and no query."""
LASTING = websocket.STREAM_METHODS | {METHOD}
"""The methods that stand for what stays open, as opposed to a call."""
MAX_DATABASES = 32

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$.-]{0,62}\Z")


class Told(Protocol):
    """Called with the way to what is wrong, the reason and the cure."""

    def __call__(self, steps: Steps, reason: str, cure: str, /) -> None: ...


class Postgres(Part, frozen=True):
    """Ring 2 signs in with the secret as this user (SCRAM-SHA-256-PLUS, over TLS), to one of these databases.

    It takes the place of ``inject``. What may be done inside is a matter of the role's rights at the server.
    """

    user: Annotated[str, says("The role at the server. A client that names another one is refused.", "agent")]
    databases: Annotated[tuple[str, ...], says("The databases that may be opened, by name.", ["orders"])]


def is_session(upgrade: str) -> bool:
    """Return whether a request that asks to switch to ``upgrade`` opens a session."""
    return upgrade.lower() == UPGRADE


def check_name(value: str, report: Report) -> None:
    """Check the name of a role or database (at most 63 bytes, PostgreSQL's NAMEDATALEN)."""
    if not _NAME.match(value):
        report(f"{value[:64]!r} is not a name", "use letters, digits, _ $ . and -, at most 63, no digit first")


def check_postgres(value: Postgres, report: StructureReport) -> None:
    """Check the list of databases."""
    if not value.databases or len(value.databases) > MAX_DATABASES:
        report("databases", f"a session needs 1 to {MAX_DATABASES} databases to choose from", "list them by name")


def check_credential(value: Credential, report: StructureReport) -> None:
    """Check the other fields of a credential with ``postgres``."""
    if value.inject is not None or value.sigv4 is not None or value.oauth2 is not None:
        report("postgres", "ring 2 signs in with the secret itself", "remove inject, sigv4 and oauth2")
    if not value.hosts:
        report("hosts", "it is not said which server takes the secret", "list its host and port")
    if value.methods or value.paths != ("/**",):
        report("paths", "a session has no method and no path", "remove methods and paths")


def check_endpoint(endpoint: Endpoint, report: StructureReport) -> None:
    """Check an endpoint with ``protocol: tcp``: nothing narrows a session but its credential."""
    if endpoint.protocol != PROTOCOL:
        return
    if endpoint.access or endpoint.rules is not None or endpoint.deny_rules is not None or endpoint.path:
        reason = "nothing looks into a session, so access, rules, deny_rules and path have no meaning"
        report("protocol", reason, "remove them; the rights of the server's role bound what is done inside")
    if endpoint.enforcement == "audit":
        report("enforcement", "a session is opened with a credential, or not at all", "remove enforcement")
    if not globs.is_exact(endpoint.host):
        report("host", "a session needs one exact host", "name the host")


def session_problems(endpoints: Iterable[tuple[Steps, Endpoint]], governance: Governance, of_policy: Told) -> None:
    """Tell where endpoints and credentials for sessions do not fit: each needs the other, and nothing else goes there."""
    held: set[str] = set()
    others: set[str] = set()
    for credential in governance.credentials:
        with suppress(Unknown):
            (others if credential.postgres is None else held).update(host.lower() for host in credential.hosts)
    for steps, endpoint in endpoints:
        with suppress(Unknown):
            hosts = {f"{endpoint.host.lower()}:{port}" for port in endpoint.all_ports}
            if endpoint.protocol == PROTOCOL and (hosts - held or hosts & others):
                missing = min((hosts - held) or (hosts & others))
                reason = f"no credential with postgres is for {missing}, and uninspected TCP is not carried"
                if missing in others:
                    reason = f"a credential for calls is bound to {missing}, where sessions are opened"
                of_policy((*steps, "protocol"), reason, "add a credential with postgres for it, or remove the endpoint")
            elif endpoint.protocol != PROTOCOL:
                _no_calls(steps, endpoint, held, of_policy)


def _no_calls(steps: Steps, endpoint: Endpoint, held: set[str], of_policy: Told) -> None:
    """Tell an endpoint for calls at an address whose credential opens sessions."""
    pattern = globs.host_glob(endpoint.host.lower())
    for address in sorted(held):
        host, _, port = address.rpartition(":")
        if port.isdigit() and int(port) in endpoint.all_ports and pattern.fullmatch(host):
            of_policy((*steps, "protocol"), f"{address} takes sessions of PostgreSQL", "write protocol: tcp")
            return
