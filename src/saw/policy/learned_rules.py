"""What learned calls look like as network rules: each set of programs gets exactly what all of them asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from saw.policy.model import Policy


class Asked(msgspec.Struct, frozen=True, order=True):
    """One call in its canonical form; ``query`` holds the parameters that the record names, with their values."""

    host: str
    port: int
    binary: str
    path: str
    method: str
    query: tuple[tuple[str, tuple[str, ...]], ...] = ()


class Proposal(msgspec.Struct, frozen=True):
    """One rule to add: the calls it was learned from, the path (a glob only when generalised), and where it goes.

    ``endpoint_path`` and ``endpoint_host`` are those of the endpoint that decides such calls today, if one does: endpoints
    of equal specificity add up, a more specific one would take its place.
    """

    asked: tuple[Asked, ...]
    path: str
    endpoint_host: str
    endpoint_path: str
    allow_encoded_slash: bool
    tls: str


def network_rules(base: Policy, proposals: Sequence[Proposal]) -> dict[str, Any]:
    """Return network rules of exactly these proposals: one rule for each set of programs that asked the same."""
    programs: dict[tuple[Any, ...], set[str]] = {}
    for proposal in proposals:
        asked = proposal.asked[0]
        endpoint = (
            proposal.endpoint_host,
            asked.port,
            proposal.endpoint_path,
            proposal.allow_encoded_slash,
            proposal.tls,
        )
        programs.setdefault((endpoint, asked.method, proposal.path, asked.query), set()).add(asked.binary)
    groups: dict[tuple[str, ...], list[tuple[Any, ...]]] = {}
    for atom, callers in programs.items():
        groups.setdefault(tuple(sorted(callers)), []).append(atom)
    rules: dict[str, Any] = {}
    taken = set(base.network_policies)
    for binaries, atoms in sorted(groups.items()):
        endpoints: dict[tuple[Any, ...], dict[str, Any]] = {}
        for endpoint, method, path, query in sorted(atoms):
            host, port, endpoint_path, encoded, tls = endpoint
            entry = endpoints.setdefault(
                endpoint,
                {"host": host, "port": port}
                | ({"path": endpoint_path} if endpoint_path else {})
                | {"protocol": "rest", "enforcement": "enforce"}
                | ({"tls": tls} if tls else {})
                | ({"allow_encoded_slash": True} if encoded else {})
                | {"rules": []},
            )
            match: dict[str, Any] = {"method": method, "path": path}
            if query:
                match["query"] = {
                    key: values[0] if len(values) == 1 else {"any": list(values)} for key, values in query
                }
            entry["rules"].append({"allow": match})
        number = next(n for n in range(1, len(taken) + 2) if f"learned-{n}" not in taken)
        taken.add(f"learned-{number}")
        rules[f"learned-{number}"] = {
            "name": "Draft, learned from denials; review before use",
            "endpoints": list(endpoints.values()),
            "binaries": [{"path": binary} for binary in binaries],
        }
    return rules
