"""The parts ``gates`` and ``machines`` of the broker's configuration: who decides on a change, and which programs may ask."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from saw.broker.job_settings import SCOPES
from saw.review.messages import SPONSORS

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")
GATE_SCOPE = "gate:"
"""A scope ``gate:NAME`` lets a machine ask and claim at the gate ``NAME``; the other scopes are those of jobs."""


class GateSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One gate. ``group`` decides, ``quorum`` of it must agree. ``expires_in_s``: how long a question, and what was approved,
    waits; ``run_for_s``: how long a wave may take from its claim until it has told its end, both in seconds."""

    group: str
    quorum: int = 1
    expires_in_s: int = 4 * 3600
    run_for_s: int = 3600


class MachineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A program that asks, such as AWX, with the certificate of its name or, with ``oauth_client``, as that client of the
    identity provider. It may do what ``scopes`` list and nothing else."""

    scopes: tuple[str, ...]
    oauth_client: str | None = None


def problems_of_gates(
    gates: Mapping[str, GateSettings],
    machines: Mapping[str, MachineSettings],
    *,
    audience: str | None,
    client: str | None,
) -> Iterator[str]:
    """Yield what is wrong, naming the field. ``client`` is the client id under which people sign in, None without sign-in."""
    for name, gate in gates.items():
        if not _NAME.match(name):
            yield f"gates: {name[:64]!r} is no name of lower-case letters, digits and -"
        if not gate.group.strip() or gate.group == SPONSORS:
            yield f"gates.{name}.group must be a group other than {SPONSORS}"
        for field, value, low, high in (
            ("quorum", gate.quorum, 1, 16),
            ("expires_in_s", gate.expires_in_s, 60, 30 * 86_400),
            ("run_for_s", gate.run_for_s, 60, 7 * 86_400),
        ):
            if not low <= value <= high:
                yield f"gates.{name}.{field} must be {low} to {high}"
    held: dict[str, str] = {}
    for name, machine in machines.items():
        if not _NAME.match(name):
            yield f"machines: {name[:64]!r} is no name of lower-case letters, digits and -"
        unknown = [
            scope
            for scope in machine.scopes
            if scope not in SCOPES and (scope.removeprefix(GATE_SCOPE) not in gates or GATE_SCOPE not in scope)
        ]
        if unknown:
            yield f"machines.{name}.scopes must be {GATE_SCOPE}NAME of a gate, or of jobs, not {', '.join(unknown)[:128]}"
        if machine.oauth_client is not None:
            if audience is None or client is None:
                yield f"machines.{name}.oauth_client needs sso and machine_audience"
            if machine.oauth_client in {"", client}:
                yield f"machines.{name}.oauth_client must be a client of its own"
            if machine.oauth_client in held:
                yield f"machines.{name}.oauth_client is that of {held[machine.oauth_client]}"
            held[machine.oauth_client] = name
    if audience is not None and audience in {"", client, *held}:
        yield "machine_audience must not be a client of the provider"
