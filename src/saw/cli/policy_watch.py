"""``saw policy watch, halt, resume, status, escrow``: a release on its way through its ring."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from urllib.parse import quote

import msgspec

from saw.cli.answers import Add, Answer
from saw.cli.operator_options import table
from saw.cli.policy_signing import encoded, load_publication
from saw.errors import ConfigError
from saw.policy.errors import RepositoryError
from saw.policy.tuf_draft import is_draft, load_draft, owed

_PAUSE_S = 1.0


class Words(msgspec.Struct, frozen=True):
    """How many workspaces said what, as the broker counts them."""

    waiting: int = 0
    offered: int = 0
    verified: int = 0
    loaded: int = 0
    refused: int = 0
    silent: int = 0


class Rate(msgspec.Struct, frozen=True):
    """Calls under a policy."""

    allowed: int
    denied: int
    deny_rate: float


class Member(msgspec.Struct, frozen=True):
    """One workspace's last word."""

    workspace: str
    state: str
    reason: str
    silent: bool


class Escrowed(msgspec.Struct, frozen=True):
    """The rollback in escrow."""

    state: str
    reason: str
    returns_to: int


class Rollout(msgspec.Struct, frozen=True, kw_only=True):
    """A rollout as the broker shows it, as far as these commands read it."""

    ring: str
    blueprint: str
    revision: int
    policy_digest: str
    returns_to: int | None
    state: str
    reason: str
    newest: bool
    counts: Words
    all_loaded: bool
    calls: Rate
    calls_before: Rate
    rollback: Escrowed | None
    rollback_due: bool
    prepare_rollback: str
    members: tuple[Member, ...]
    held: tuple[str, ...]


class Client(Protocol):
    """The operator's client, as far as it is used here."""

    def request(self, method: str, path: str, json: object | None = None, /) -> dict[str, Any]:
        """Call the broker."""
        ...


def _client(options: argparse.Namespace) -> Client:
    from saw.broker.client import OperatorClient

    return OperatorClient.from_context(options.context)


def _ring_path(ring: str, what: str = "") -> str:
    return f"/v1/policy/rollouts/{quote(ring, safe='')}" + (f"/{what}" if what else "")


def _rollouts(answer: dict[str, Any], blueprint: str | None) -> list[Rollout]:
    found = [msgspec.convert(item, Rollout) for item in answer["rollouts"]]
    return [one for one in found if not blueprint or one.blueprint == blueprint]


def _line(one: Rollout) -> str:
    counts = one.counts
    text = (
        f"{one.ring}/{one.blueprint} revision {one.revision} {one.state}: loaded {counts.loaded}, "
        f"verified {counts.verified}, offered {counts.offered}, waiting {counts.waiting}, refused {counts.refused}, "
        f"silent {counts.silent}, held {len(one.held)}"
    )
    if one.calls.allowed + one.calls.denied:
        text += f"; denied {one.calls.deny_rate:.1%} of calls, {one.calls_before.deny_rate:.1%} before"
    return text


def _why(one: Rollout) -> list[str]:
    """Return who refused or is silent and, for a halt, why and what helps."""
    lines = [
        f"  {member.workspace}: {'silent' if member.silent else member.state} {member.reason}".rstrip()
        for member in one.members
        if member.silent or member.state == "refused"
    ]
    if one.state == "halted":
        lines.append(f"  halted: {one.reason}")
        if one.rollback is not None:
            lines.append(
                f"  rollback to revision {one.rollback.returns_to}: {one.rollback.state} {one.rollback.reason}"
            )
        elif one.prepare_rollback:
            lines.append(f"  no rollback is in escrow; prepare one: {one.prepare_rollback}")
    if one.state == "waiting":
        lines.append(f"  waits for a rollback in escrow: {one.prepare_rollback} --prepare-only; saw policy escrow")
    return lines


def follow(
    read: Callable[[], list[Rollout]],
    clock: Callable[[], float],
    pause: Callable[[float], None],
    timeout_s: float,
    revision: int | None = None,
) -> Iterator[tuple[list[Rollout], str]]:
    """Yield what is seen, with the outcome once there is one: ``loaded``, ``halted``, ``refused`` or ``timeout``.

    The releases that are newest at the beginning are followed, or those of ``revision``; one that is followed by another
    (a rollback) is halted.
    """
    end = clock() + timeout_s
    followed: dict[tuple[str, str], int] = {}
    while True:
        seen = read()
        if not followed:
            chosen = [one for one in seen if (one.newest if revision is None else one.revision == revision)]
            followed = {(one.ring, one.blueprint): one.revision for one in chosen}
        mine = [one for one in seen if followed.get((one.ring, one.blueprint)) == one.revision]
        outcome = _outcome(mine)
        if not outcome and clock() >= end:
            outcome = "timeout"
        yield mine, outcome
        if outcome:
            return
        pause(min(_PAUSE_S, max(0.0, end - clock())))


def _outcome(rollouts: list[Rollout]) -> str:
    if not rollouts or any(one.state == "halted" or not one.newest for one in rollouts):
        return "halted"
    if any(one.counts.refused for one in rollouts) and not any(
        one.counts.waiting + one.counts.offered + one.counts.verified or one.held for one in rollouts
    ):
        return "refused"
    return "loaded" if all(one.all_loaded for one in rollouts) else ""


def watch(options: argparse.Namespace) -> Answer:
    """Follow the newest release of a ring, or one revision of it, until every running workspace has loaded it.

    Ends 0 when all have loaded it; 1 when it is halted, refused, or not there in time.
    """
    if options.timeout < 0:
        raise ConfigError("a timeout below zero", cure="give --timeout in seconds, 0 to look once")
    client = _client(options)
    first = _rollouts(client.request("GET", _ring_path(options.ring)), options.blueprint)
    if options.revision is not None:
        first = [one for one in first if one.revision == options.revision]
    if not first:
        what = "nothing" if options.revision is None else f"no revision {options.revision}"
        raise ConfigError(f"{what} rolls out to ring {options.ring}", cure="see saw policy rings")

    def read() -> list[Rollout]:
        return _rollouts(client.request("GET", _ring_path(options.ring)), options.blueprint)

    last, rollouts, outcome = "", first, ""
    for seen in follow(read, time.monotonic, time.sleep, options.timeout, options.revision):
        rollouts, outcome = seen
        text = "\n".join(_line(one) for one in rollouts)
        if text != last and not options.json:
            sys.stdout.write(text + "\n")
            sys.stdout.flush()
        last = text
    lines = [line for one in rollouts for line in _why(one)]
    lines.append({"loaded": "every running workspace has loaded it"}.get(outcome, f"outcome: {outcome}"))
    value = {"ok": outcome == "loaded", "outcome": outcome, "rollouts": [msgspec.to_builtins(one) for one in rollouts]}
    return value, "\n".join(lines), 0 if outcome == "loaded" else 1


def _order(options: argparse.Namespace, what: str, **further: object) -> Answer:
    body = {"reason": options.reason, "blueprint": options.blueprint or "", **further}
    answer = _client(options).request("POST", _ring_path(options.ring, what), body)
    found = [one for one in _rollouts(answer, options.blueprint) if one.revision == answer["revision"]]
    lines = [line for one in found for line in (_line(one), *_why(one))]
    return {"ok": True, "revision": answer["revision"], "rollouts": answer["rollouts"]}, "\n".join(lines), 0


def halt(options: argparse.Namespace) -> Answer:
    """Offer the newest release of a ring to nobody any more; with --roll-back, publish the rollback in escrow."""
    return _order(options, "halt", roll_back=options.roll_back)


def resume(options: argparse.Namespace) -> Answer:
    """Offer a halted release again; refusals, silence and counted calls from before are forgiven."""
    return _order(options, "resume")


def status(options: argparse.Namespace) -> Answer:
    """Say which release a workspace is given, which it runs, and what it said about each.

    Ends 0 when it was attested with the release that it is given, else 1.
    """
    answer = _client(options).request("GET", f"/v1/workspaces/{quote(options.workspace, safe='')}/policy")
    good = answer["given_digest"] is not None and answer["given_digest"] == answer["attested_digest"]
    lines = [
        f"{answer['workspace']} ({answer['ring']}/{answer['blueprint']}, {answer['state']})",
        f"given:    revision {answer['given_revision']}  {answer['given_digest'] or 'nothing'}",
        f"attested: {answer['attested_digest'] or 'nothing'}",
        table(answer["releases"], ("revision", "state", "reason", "offered_at", "said_at", "silent")),
    ]
    if answer["history"]:
        lines.append(table(answer["history"], ("at", "revision", "state", "reason", "verified", "policy_digest")))
    return {"ok": good, **answer}, "\n".join(lines), 0 if good else 1


def escrow(options: argparse.Namespace) -> Answer:
    """Hand a complete rollback (saw policy rollback --prepare-only) to the broker, which publishes it on a halt alone."""
    if is_draft(options.path):
        left = owed(load_draft(options.path))
        if left:
            reason = f"the rollback lacks signatures: {'; '.join(str(one) for one in left)}"
            raise RepositoryError(
                "threshold",
                reason,
                cure=f"let them sign: saw policy stage --repository COPY --key KEY --out {options.path}",
            )
    body = {**encoded(load_publication(options.path)), "blueprint": options.blueprint or ""}
    answer = _client(options).request("PUT", _ring_path(options.ring, "rollback"), body)
    done = "is in escrow" if answer["changed"] else "was in escrow already"
    return {"ok": True, **answer}, f"the rollback {done} for ring {options.ring}", 0


def register(add: Add) -> None:
    """Add the commands to ``saw policy``."""

    def ring(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub.add_argument("--ring", required=True, help="ring, for example stable")
        sub.add_argument("--blueprint", help="blueprint, where the ring has several")
        sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
        return sub

    sub = ring(add("watch", watch, "follow a release until everyone loaded it, or it halts"))
    sub.add_argument("--revision", type=int, help="follow this revision, whatever came after it (default: the newest)")
    sub.add_argument("--timeout", type=float, default=600.0, help="seconds to wait (default: %(default)s)")
    sub = ring(add("halt", halt, "stop offering the newest release of a ring"))
    sub.add_argument("--reason", required=True, help="why, for the audit trail")
    sub.add_argument("--roll-back", action="store_true", help="publish the rollback in escrow as well")
    sub = ring(add("resume", resume, "offer a halted release again"))
    sub.add_argument("--reason", required=True, help="why, for the audit trail")
    sub = add("status", status, "say which release a workspace runs, and what it said about each")
    sub.add_argument("workspace")
    sub.add_argument("--context", help="context file of the broker (default: SAW_CONTEXT)")
    sub = ring(add("escrow", escrow, "keep a signed rollback at the broker, published only when the release halts"))
    sub.add_argument("path", help="folder of the complete rollback")
