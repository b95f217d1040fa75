"""What a change to the fleet is asked for with: a statement of everything that will run, its digest, and how it is shown.

A gate is a named point at which a playbook stops until people agree. The statement names the files, hosts and variables of
one wave; whoever asks states it twice, when asking and when claiming, and both must be the same to the byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal

import msgspec
import rfc8785

from saw.errors import SawError
from saw.review.escapes import escape, plain
from saw.review.messages import Digest, Message, ReviewId, ReviewState, Secret

STATEMENT_TYPE = "saw-gate-statement/1"
MAX_GATE = 1024 * 1024
"""Longest statement in canonical form (bytes)."""
MAX_VALUE = 4096
"""Longest value of a variable that is stated as it is (characters of JSON); of a longer one there is the digest alone."""
MAX_NAMED = 20
"""Most differences that a refusal names."""
NO_POLICY = "0" * 64
"""Stands in decisions and receipts for the policy of a statement that binds none."""

GateName = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
Line = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Path = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
MaybeDigest = Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")]


class GateRefused(SawError):
    """A statement is not what it must be."""

    code = "gate_refused"


class BoundFile(Message, frozen=True, order=True, kw_only=True):
    """One file below a bound path. ``sha256`` is over the content, of a link over its target; ``program``: it may be run."""

    path: Path
    kind: Literal["file", "program", "link"]
    sha256: Digest


class BoundHost(Message, frozen=True, order=True, kw_only=True):
    """One host of the wave: its name in the inventory, and the address that Ansible connects to."""

    name: Line
    address: Annotated[str, msgspec.Meta(max_length=256)] = ""


class BoundVariable(Message, frozen=True, order=True, kw_only=True):
    """A variable, shown to people: ``sha256`` is over its value as RFC 8785 JSON, ``value`` is that JSON unless it is long."""

    name: Line
    sha256: Digest
    value: Annotated[str, msgspec.Meta(max_length=MAX_VALUE)] | None = None


class GateStatement(Message, frozen=True, kw_only=True):
    """What one wave of a change will run.

    ``first`` is the place of the wave's first host among the ``total`` hosts of the play, from 1. ``requested_by`` is the person
    who asks, in the words of the client that does. ``excluded`` are the patterns of names below the bound paths that are not
    bound; ``unbound`` names variables that were given to this run and whose values are not bound. ``image`` and ``policy`` are
    digests, empty when none is bound. Lists are sorted, without repetition.
    """

    format: Literal["saw-gate-statement/1"] = "saw-gate-statement/1"
    gate: GateName
    purpose: Line
    requested_by: Line
    playbook: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    first: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    total: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    hosts: Annotated[tuple[BoundHost, ...], msgspec.Meta(min_length=1, max_length=4096)]
    files: Annotated[tuple[BoundFile, ...], msgspec.Meta(min_length=1, max_length=8192)]
    excluded: Annotated[tuple[Line, ...], msgspec.Meta(max_length=64)] = ()
    variables: Annotated[tuple[BoundVariable, ...], msgspec.Meta(max_length=512)] = ()
    unbound: Annotated[tuple[Line, ...], msgspec.Meta(max_length=512)] = ()
    image: MaybeDigest = ""
    policy: MaybeDigest = ""


class GateRequest(Message, frozen=True, kw_only=True):
    """What is kept of a question: the statement, and the last one of the same gate that was approved, to compare it with."""

    statement: GateStatement
    before: GateStatement | None = None


class AskGate(Message, frozen=True, kw_only=True):
    """``POST /v1/gates``: ask people for a wave; the same statement that waits already is answered with its review."""

    statement: GateStatement


class ClaimGate(Message, frozen=True, kw_only=True):
    """``POST /v1/gates/{id}/claim``: begin the wave. ``claim`` is a secret of the run; the same one has the same answer."""

    statement: GateStatement
    claim: Secret


class EndGate(Message, frozen=True, kw_only=True):
    """``POST /v1/gates/{id}/result``: how the wave ended."""

    claim: Secret
    outcome: Literal["done", "failed"]
    detail: Annotated[str, msgspec.Meta(max_length=512)] = ""


class GateDecision(Message, frozen=True, kw_only=True):
    """One decision as whoever asked sees it."""

    approver: str
    decision: str
    comment: str
    decided_at: str


class GateView(Message, frozen=True, kw_only=True):
    """A question as whoever asked sees it. ``url`` is where people decide; empty without single sign-on."""

    id: ReviewId
    gate: str
    state: ReviewState
    statement_digest: Digest
    group: str
    quorum: int
    approved_by: tuple[str, ...]
    decisions: tuple[GateDecision, ...]
    detail: str
    opened_at: str
    expires_at: str
    claim_ends_at: str | None = None
    url: str = ""


class GatePreview(Message, frozen=True, kw_only=True):
    """What would be asked: the text that people would see; the last approved statement (``before``, empty without one) and this
    one (``after``) as text; and what waits already for the same statement (None: nothing)."""

    gate: str
    group: str
    quorum: int
    statement_digest: Digest
    rendering: str
    before: str
    after: str
    waiting: ReviewId | None = None


def bound_variable(name: str, value: object) -> BoundVariable:
    """Return ``value`` (what JSON can hold) as it is bound; raise :class:`GateRefused` for anything else."""
    try:
        raw = rfc8785.dumps(value)  # type: ignore[arg-type]
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise GateRefused(
            f"the variable {name[:64]} cannot be bound: {error}",
            cure="bind texts, whole numbers, lists and dictionaries",
        ) from error
    text = raw.decode()
    return BoundVariable(
        name=name, sha256=hashlib.sha256(raw).hexdigest(), value=text if len(text) <= MAX_VALUE else None
    )


def check_gate(statement: GateStatement) -> bytes:
    """Return the canonical form of ``statement`` (RFC 8785); raise :class:`GateRefused` unless its lists are in order."""
    _in_order("hosts", [item.name for item in statement.hosts])
    _in_order("files", [item.path for item in statement.files])
    _in_order("variables", [item.name for item in statement.variables])
    _in_order("excluded", list(statement.excluded))
    _in_order("unbound", list(statement.unbound))
    if statement.first - 1 + len(statement.hosts) > statement.total:
        raise GateRefused("the wave has more hosts than the play", cure="state the place of its first host")
    for item in statement.variables:
        if (
            item.value is not None
            and hashlib.sha256(item.value.encode("utf-8", "surrogatepass")).hexdigest() != item.sha256
        ):
            raise GateRefused(f"the digest of the variable {item.name} is another value's", cure="state it again")
    for text in (statement.purpose, statement.requested_by):
        if not text.isprintable() or not text.strip():
            raise GateRefused("purpose and requested_by are lines of printable text", cure="write one line")
    try:
        raw = rfc8785.dumps(msgspec.to_builtins(statement))
    except (rfc8785.CanonicalizationError, UnicodeError) as error:
        raise GateRefused(f"the statement has no canonical form: {error}", cure="use valid Unicode") from error
    if len(raw) > MAX_GATE:
        raise GateRefused(f"the statement has {len(raw)} bytes", cure=f"bind fewer files; {MAX_GATE} are the most")
    return raw


def gate_digest(asker: str, statement: GateStatement) -> str:
    """Return the digest (hex SHA-256) of ``statement`` as asked by the principal ``asker``.

    Hashed are type, asker and canonical form, each preceded by its length in bytes (8 bytes, big-endian).
    """
    total = hashlib.sha256()
    for part in (STATEMENT_TYPE.encode(), asker.encode(), check_gate(statement)):
        total.update(len(part).to_bytes(8, "big"))
        total.update(part)
    return total.hexdigest()


def tree_digest(statement: GateStatement) -> str:
    """Return one digest (hex SHA-256) over all bound files, for people who compare two trees."""
    return hashlib.sha256(rfc8785.dumps(msgspec.to_builtins(statement.files))).hexdigest()


def render_gate(asker: str, request: GateRequest) -> str:
    """Return the text that people see before they decide: what is asked, the difference to last time, then everything bound."""
    now, before = request.statement, request.before
    last = now.first - 1 + len(now.hosts)
    lines = [
        f"gate       {plain(now.gate)}",
        f"purpose    {escape(now.purpose)}",
        f"asked by   {plain(now.requested_by)}, through {plain(asker)}",
        f"playbook   {plain(now.playbook) or '-'}",
        f"wave       hosts {now.first} to {last} of {now.total}" if now.total > 1 else "wave       the only host",
        f"tree       {len(now.files)} files, sha256 {tree_digest(now)}",
        f"image      {now.image or '-'}",
        f"policy     {now.policy or '-'}",
        "",
        "hosts of this wave:",
        *(f"  {_host(item)}" for item in now.hosts),
        "",
    ]
    if before is None:
        lines.append("no statement of this gate was approved before")
    else:
        found = list(_changes(before, now))
        lines.append(
            "against the last approved statement of this gate:"
            if found
            else "as the last approved statement of this gate"
        )
        lines += [f"  {item}" for item in found]
    lines += ["", "variables:", *(f"  {_variable(item)}" for item in now.variables)] if now.variables else []
    lines += ["", "not bound below the paths:", *(f"  {plain(item)}" for item in now.excluded)] if now.excluded else []
    if now.unbound:
        lines += ["", "variables given to this run that are NOT bound:", *(f"  {plain(item)}" for item in now.unbound)]
    lines += ["", "files:", *(f"  {_file(item)}" for item in now.files)]
    return "\n".join(lines) + "\n"


def differences(stated: GateStatement, claimed: GateStatement) -> list[str]:
    """Return what ``claimed`` has otherwise than ``stated``, one line each; empty when they are the same."""
    return list(_changes(stated, claimed))


def changed_files(mine: Sequence[BoundFile], stated: Sequence[BoundFile]) -> list[str]:
    """Return how ``stated`` files differ from ``mine``, one line each."""
    return list(_listed("file", {i.path: _file(i) for i in mine}, {i.path: _file(i) for i in stated}))


def _in_order(what: str, names: list[str]) -> None:
    if names != sorted(set(names)):
        raise GateRefused(f"{what} are not sorted, or name one twice", cure="sort them by name")


def _changes(before: GateStatement, now: GateStatement) -> Iterator[str]:
    for name in ("gate", "purpose", "requested_by", "playbook", "first", "total", "image", "policy"):
        was, value = getattr(before, name), getattr(now, name)
        if was != value:
            yield f"{name}: {plain(str(was)) or '-'} → {plain(str(value)) or '-'}"
    for name in ("excluded", "unbound"):
        was, value = " ".join(getattr(before, name)), " ".join(getattr(now, name))
        if was != value:
            yield f"{name}: {plain(was) or '-'} → {plain(value) or '-'}"
    yield from _listed("host", {i.name: _host(i) for i in before.hosts}, {i.name: _host(i) for i in now.hosts})
    yield from _listed(
        "variable", {i.name: _variable(i) for i in before.variables}, {i.name: _variable(i) for i in now.variables}
    )
    yield from changed_files(before.files, now.files)


def _listed(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name in sorted(before.keys() | now.keys()):
        was, value = before.get(name), now.get(name)
        if was is None:
            yield f"+ {what} {value}"
        elif value is None:
            yield f"- {what} {was}"
        elif was != value:
            yield f"~ {what} {value} (was {was.removeprefix(plain(name)).strip()})"


def _host(item: BoundHost) -> str:
    return plain(item.name) + (f" ({plain(item.address)})" if item.address and item.address != item.name else "")


def _variable(item: BoundVariable) -> str:
    shown = f"sha256 {item.sha256}, its value is NOT shown" if item.value is None else escape(item.value)
    return f"{plain(item.name)} = {shown}"


def _file(item: BoundFile) -> str:
    return f"{plain(item.path)}  {item.kind} {item.sha256}"
