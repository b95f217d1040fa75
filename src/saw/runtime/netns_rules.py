"""nftables rules of the sandbox's network and of the VM, as libnftables JSON (libnftables-json(5)).

The same document is loaded and later compared with what the kernel reports, so it is written in the form in which
``nft -j list`` gives it back.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from saw import addressing, jsontext
from saw.errors import SawError

Json = dict[str, object]
FAMILY = "inet"


class RulesError(SawError):
    """nftables refused the rules, or the kernel holds others than were loaded."""

    code = "nft_rules"


@dataclass(frozen=True)
class Ruleset:
    """One table: its name and its chains as (name, hook, policy, rules); a rule is a list of expressions."""

    table: str
    chains: tuple[tuple[str, str, str, tuple[tuple[Json, ...], ...]], ...]

    def objects(self) -> list[Json]:
        """Return the table, chain and rule objects in the form of ``nft -j list table``."""
        found: list[Json] = [{"table": {"family": FAMILY, "name": self.table}}]
        for name, hook, policy, _ in self.chains:
            chain = {"family": FAMILY, "table": self.table, "name": name, "type": "filter", "hook": hook, "prio": 0}
            found.append({"chain": {**chain, "policy": policy}})
        for name, _, _, rules in self.chains:
            found += [
                {"rule": {"family": FAMILY, "table": self.table, "chain": name, "expr": list(rule)}} for rule in rules
            ]
        return found

    def load_document(self) -> bytes:
        """Return the transaction that replaces the table, whether or not it exists (atomic, nft(8))."""
        table = {"family": FAMILY, "name": self.table}
        commands: list[Json] = [{"add": {"table": table}}, {"delete": {"table": table}}]
        commands += [{"add": item} for item in self.objects()]
        return msgspec.json.encode({"nftables": commands})


ACCEPT: Json = {"accept": None}
DROP: Json = {"drop": None}
COUNTER: Json = {"counter": {"packets": 0, "bytes": 0}}


def meta(key: str, value: object, *, op: str = "==") -> Json:
    """Match on meta data of the packet, such as ``iifname`` or ``skuid``."""
    return {"match": {"op": op, "left": {"meta": {"key": key}}, "right": value}}


def header(protocol: str, field: str, value: object, *, op: str = "==") -> Json:
    """Match on a header field, such as (``tcp``, ``dport``)."""
    return {"match": {"op": op, "left": {"payload": {"protocol": protocol, "field": field}}, "right": value}}


def state(*states: str) -> Json:
    """Match on the connection tracking state."""
    return {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": list(states) if states[1:] else states[0]}}


def sandbox_rules(proxy: str, port: int) -> Ruleset:
    """Return the rules inside the sandbox's namespace: out only to the proxy, in nothing, loopback to itself."""
    return Ruleset(
        "saw_sandbox",
        (
            (
                "input",
                "input",
                "drop",
                ((meta("iifname", "lo"), ACCEPT), (state("established"), ACCEPT), (COUNTER, DROP)),
            ),
            (
                "output",
                "output",
                "drop",
                (
                    (meta("oifname", "lo"), ACCEPT),
                    (header("ip", "daddr", proxy), header("tcp", "dport", port), ACCEPT),
                    (COUNTER, DROP),
                ),
            ),
            ("forward", "forward", "drop", ((COUNTER, DROP),)),
        ),
    )


def veth_rules(interface: str, proxy: str, sandbox: str, port: int) -> Ruleset:
    """Return the VM's rules for the sandbox's link: from it only TCP to the proxy, to it only answers, forward nothing.

    Other traffic of the VM passes this table untouched; :func:`vm_rules` judges that.
    """
    return Ruleset(
        "saw_vm",
        (
            (
                "input",
                "input",
                "accept",
                (
                    (
                        meta("iifname", interface),
                        header("ip", "saddr", sandbox),
                        header("ip", "daddr", proxy),
                        header("tcp", "dport", port),
                        ACCEPT,
                    ),
                    (meta("iifname", interface), COUNTER, DROP),
                    (header("ip", "saddr", sandbox), COUNTER, DROP),
                ),
            ),
            (
                "output",
                "output",
                "accept",
                (
                    (meta("oifname", interface), header("tcp", "sport", port), state("established"), ACCEPT),
                    (meta("oifname", interface), COUNTER, DROP),
                ),
            ),
            ("forward", "forward", "drop", ((COUNTER, DROP),)),
        ),
    )


def vm_rules(
    number: int, interface: str, port: int, daemon_uids: Sequence[int], proxy: str, *, reporter_uids: Sequence[int] = ()
) -> Ruleset:
    """Return the VM-wide rules of workspace ``number``: out to two ports for our daemons, in by SSH from the perimeter.

    ``daemon_uids``: the users whose processes may use the two perimeter ports. Any other user of the VM, the agent
    included, reaches loopback only. ``reporter_uids`` may use the broker's port alone, to report.
    """
    perimeter = addressing.gateway(number)
    outgoing: list[tuple[Json, ...]] = [(meta("oifname", "lo"), ACCEPT), (state("established", "related"), ACCEPT)]
    for uid in sorted(set(daemon_uids)):
        outgoing += [
            (header("ip", "daddr", perimeter), header("tcp", "dport", target), meta("skuid", uid), ACCEPT)
            for target in (8443, 8444)
        ]
    for uid in sorted(set(reporter_uids) - set(daemon_uids)):
        outgoing.append((header("ip", "daddr", perimeter), header("tcp", "dport", 8444), meta("skuid", uid), ACCEPT))
    outgoing.append((COUNTER, DROP))
    return Ruleset(
        "saw_host",
        (
            (
                "input",
                "input",
                "drop",
                (
                    (meta("iifname", "lo"), ACCEPT),
                    (state("established", "related"), ACCEPT),
                    (header("ip", "saddr", perimeter), header("tcp", "dport", 22), ACCEPT),
                    (meta("iifname", interface), header("ip", "daddr", proxy), header("tcp", "dport", port), ACCEPT),
                    (COUNTER, DROP),
                ),
            ),
            ("output", "output", "drop", tuple(outgoing)),
            ("forward", "forward", "drop", ((COUNTER, DROP),)),
        ),
    )


def _normalised(value: object) -> object:
    if isinstance(value, dict):
        return {k: None if k == "counter" else _normalised(v) for k, v in value.items() if k not in {"handle", "index"}}
    return [_normalised(item) for item in value] if isinstance(value, list) else value


def differences(ruleset: Ruleset, listed: bytes) -> list[str]:
    """Compare ``ruleset`` with the output of ``nft -j list table``; return what differs, empty when nothing does."""
    document = jsontext.decode(listed)
    found = [_normalised(item) for item in document.get("nftables", []) if "metainfo" not in item]
    expected = [_normalised(item) for item in ruleset.objects()]
    return (
        [f"{ruleset.table}: missing {_short(item)}" for item in expected if item not in found]
        + [f"{ruleset.table}: not ours {_short(item)}" for item in found if item not in expected]
        + ([f"{ruleset.table}: rules are in another order"] if _rules(found) != _rules(expected) else [])
    )


def _rules(items: list[object]) -> list[object]:
    return [item for item in items if isinstance(item, dict) and "rule" in item]


def _short(item: object) -> str:
    return msgspec.json.encode(item).decode()[:300]


def _nft(prefix: Sequence[str], *arguments: str, document: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(
            [*prefix, "nft", *arguments], input=document, capture_output=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RulesError(f"nft could not be run: {error}", cure="install nftables") from error


def check(ruleset: Ruleset, prefix: Sequence[str] = ()) -> list[str]:
    """Return how the kernel's table differs from ``ruleset`` (a missing table is one difference).

    ``prefix`` is put before ``nft``, for example ``ip netns exec NAME``.
    """
    answer = _nft(prefix, "-j", "list", "table", FAMILY, ruleset.table)
    if answer.returncode != 0:
        return [f"{ruleset.table}: the table is not loaded"]
    return differences(ruleset, answer.stdout)


def dry_run(ruleset: Ruleset, prefix: Sequence[str] = ()) -> None:
    """Have ``nft -c`` check the transaction that would load ``ruleset``; raises :class:`RulesError` with its words."""
    _accepted(ruleset, _nft(prefix, "-c", "-j", "-f", "-", document=ruleset.load_document()))


def _accepted(ruleset: Ruleset, answer: subprocess.CompletedProcess[bytes]) -> None:
    if answer.returncode != 0:
        reason = answer.stderr.decode(errors="replace").strip()
        raise RulesError(f"nft refused table {ruleset.table}: {reason}", cure="the rules before are still in force")


def load(ruleset: Ruleset, prefix: Sequence[str] = ()) -> bool:
    """Make the kernel hold exactly ``ruleset`` in its table; return whether anything had to change.

    Dry run, then one transaction, then read back. Raises :class:`RulesError` when nft refuses (the old rules stay) or the
    read-back differs.
    """
    if not check(ruleset, prefix):
        return False
    dry_run(ruleset, prefix)
    _accepted(ruleset, _nft(prefix, "-j", "-f", "-", document=ruleset.load_document()))
    left = check(ruleset, prefix)
    if left:
        raise RulesError(
            f"the kernel holds other rules than were loaded: {'; '.join(left)}",
            cure="find what else writes nftables here",
        )
    return True
