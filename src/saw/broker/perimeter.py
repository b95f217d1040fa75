"""What perimeters and workspaces see and send: state, release watch, reports, and the gatekeepers' event chains."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import msgspec
from sqlalchemy import select

from saw.addressing import HIGHEST
from saw.audit import ChainedEvent, Head, event_hash, workspace_telemetry
from saw.audit.chain import ChainError
from saw.audit.workspace_decisions import Decisions, events_of
from saw.audit.workspace_usage import Usage, event_of
from saw.broker.agent_states import retired_agents
from saw.broker.charges import ChargeTally
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegations import told
from saw.broker.errors import ConflictError, ForbiddenError, MalformedError
from saw.broker.lifecycle import MAY_REPORT, State
from saw.broker.registry import get_row, require_state
from saw.broker.releases import Releases, bundles_of, live_bundles
from saw.broker.resource_use import count_use
from saw.broker.rollout import Assignments, assigned_release
from saw.broker.rollout_calls import Tally, count_inside
from saw.broker.rollout_control import Rollouts, Said
from saw.broker.schema import audit_events, registry, workspaces
from saw.broker.source_clocks import SourceClocks
from saw.broker.store import SOURCE, Transaction, append_chained, insert_chained, read_head

Text = Annotated[str, msgspec.Meta(max_length=2048)]
Count = Annotated[int, msgspec.Meta(ge=0, le=10**6)]
Reason = Annotated[str, msgspec.Meta(pattern=r"^[a-z_]{1,40}$")]


class CallsSaid(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Calls that ring 1 decided in the workspace since its last report; ``denied`` by reason."""

    allowed: Count = 0
    denied: Annotated[dict[Reason, Count], msgspec.Meta(max_length=32)] = {}
    window_s: Annotated[float, msgspec.Meta(ge=0, le=10**6)] = 0.0


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a workspace says about its policy, or something it found."""

    workspace_id: Annotated[str, msgspec.Meta(max_length=64)]
    kind: Literal["policy_state", "finding", "calls", "decisions", "telemetry", "usage"]
    state: Literal["offered", "verified", "loaded", "refused", ""] = ""
    revision: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    reason: Text = ""
    policy_digest: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f]{64})?\Z")] | None = ""
    detail: Any = None
    calls: CallsSaid | None = None
    decisions: Decisions | None = None
    telemetry: workspace_telemetry.Telemetry | None = None
    usage: Usage | None = None


class Shipment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Chained events of one gatekeeper, ascending by ``seq``."""

    source: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?\Z")]
    events: Annotated[tuple[ChainedEvent, ...], msgspec.Meta(max_length=2048)]


class Views:
    """Long-poll views, workspace reports and event shipments."""

    def __init__(self, services: Services, releases: Releases, rollouts: Rollouts) -> None:
        self._s = services
        self._releases = releases
        self._rollouts = rollouts
        self._clocks = SourceClocks(services)

    def perimeter_state(self, first: int = 1, last: int = HIGHEST) -> dict[str, Any]:
        """Return the whole state, of workspaces with these numbers, for gatekeepers (docs/architecture.md)."""
        with self._s.store.read() as connection:
            seq = connection.execute(select(registry.c.seq)).scalar_one()
            assignments = Assignments(connection)
            served = workspaces.c.number.between(first, last) & (workspaces.c.state != State.DECOMMISSIONED)
            rows = connection.execute(select(workspaces).where(served).order_by(workspaces.c.number)).all()
            given = {row.id: assignments.of(row) for row in rows}
            statements, engaged = told(connection, self._s.clock())
            retired = retired_agents(connection)
            bundles = live_bundles(connection)
            bundles |= bundles_of(
                connection, {found.policy_digest for found in given.values() if found} - bundles.keys()
            )
        entries: list[dict[str, Any]] = []
        for row in rows:
            release = given[row.id]
            entries.append(
                {
                    "id": row.id,
                    "number": row.number,
                    "state": row.state,
                    "sponsor": row.sponsor,
                    "blueprint": row.blueprint,
                    "ring": row.ring,
                    "lease_expires_at": row.lease_expires_at,
                    "policy_digest": row.policy_digest,
                    "released_digest": None if release is None else release.policy_digest,
                    "released_at": None if release is None else release.released_at,
                    "svid_sha256": row.svid_sha256,
                    "agent": row.agent_id,
                    "agent_retired": row.id in retired,
                    "delegation_required": row.id in engaged or self._s.config.delegation.required,
                    "delegations": statements.get(row.id, []),
                }
            )
        return {
            "seq": seq,
            "now": iso(self._s.clock()),
            "workspaces": entries,
            "releases": {digest: base64.b64encode(raw).decode() for digest, raw in bundles.items()},
            "policy_keys": self._releases.policy_keys(),
        }

    def registry_seq(self) -> int:
        """Return the registry's sequence number alone."""
        with self._s.store.read() as connection:
            return int(connection.execute(select(registry.c.seq)).scalar_one())

    def watch(self, workspace_id: str) -> dict[str, Any]:
        """Return what a workspace watches: the digest it should run and its own state."""
        with self._s.store.read() as connection:
            row = get_row(connection, workspace_id)
            release = assigned_release(connection, row)
        return {
            "seq": row.watch_seq,
            "policy_digest": None if release is None else release.policy_digest,
            "revision": None if release is None else release.revision,
            "state": row.state,
        }

    def report(self, caller: Caller, report: Report, *, verified: bool) -> dict[str, Any]:
        """Record a workspace's report. ``verified`` says whether it came over the workspace's own SVID.

        Raises :class:`ForbiddenError` for a workspace that was killed or decommissioned.
        """
        if report.kind == "calls":
            return self._hear_calls(caller, report, verified=verified)
        if report.kind == "decisions":
            return self._hear_decisions(caller, report, verified=verified)
        if report.kind == "telemetry":
            return self._hear_telemetry(caller, report, verified=verified)
        if report.kind == "usage":
            return self._hear_usage(caller, report, verified=verified)
        now = self._s.clock()
        detail = {"verified": verified, "revision": report.revision, "report": _bounded(report.detail)}
        digest = report.policy_digest or ""
        with self._s.store.write() as tx:
            row = get_row(tx.connection, report.workspace_id)
            require_state(row, MAY_REPORT)
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=digest)
            if report.kind == "finding":
                tx.record(
                    self._s.events.detection_finding(
                        now,
                        subject,
                        kind="workspace_finding",
                        title=report.reason or "a finding without a reason",
                        severity="high" if verified else "medium",
                        detail=detail,
                    )
                )
            else:
                values = {
                    "reported_state": report.state,
                    "reported_digest": digest or None,
                    "reported_reason": report.reason,
                    "reported_verified": verified,
                    "reported_at": iso(now),
                }
                tx.connection.execute(workspaces.update().where(workspaces.c.id == row.id).values(**values))
                tx.record(
                    self._s.events.application_lifecycle(
                        now,
                        subject,
                        ("policy", digest),
                        activity="enable" if report.state == "loaded" else "update",
                        outcome="failure" if report.state == "refused" else "success",
                        message=f"policy {report.state}",
                        status_detail=report.reason,
                        detail=detail,
                    )
                )
                if report.state:
                    said = Said(
                        policy_digest=digest,
                        revision=report.revision,
                        state=report.state,
                        reason=report.reason,
                        verified=verified,
                    )
                    self._rollouts.hear(tx, row, said)
        self._rollouts.act()
        return {"recorded": True, "verified": verified}

    def _hear_calls(self, caller: Caller, report: Report, *, verified: bool) -> dict[str, Any]:
        """Count calls that ring 1 denied, when the workspace is proven and attested with that policy; else leave no trace."""
        digest, said = report.policy_digest or "", report.calls
        if not verified or said is None:
            return {"recorded": False, "verified": verified}
        with self._s.store.write() as tx:
            row = get_row(tx.connection, report.workspace_id)
            require_state(row, MAY_REPORT)
            counted = 0 if row.policy_digest != digest else count_inside(tx, row.id, digest, said.denied)
            if counted:
                tx.record(
                    self._s.events.application_lifecycle(
                        self._s.clock(),
                        caller.subject(row.id, agent=row.agent_id, policy_digest=digest),
                        ("policy", digest),
                        activity="update",
                        outcome="success",
                        message="calls denied by ring 1 were counted",
                        status_detail="",
                        detail={"counted": counted, **msgspec.to_builtins(said)},
                    )
                )
                self._rollouts.counted(tx, frozenset({digest}))
        self._rollouts.act()
        return {"recorded": bool(counted), "verified": verified}

    def _hear_decisions(self, caller: Caller, report: Report, *, verified: bool) -> dict[str, Any]:
        """Write down what was decided in a workspace that proves who it is; without proof nothing is kept."""
        if not verified or report.decisions is None:
            return {"recorded": False, "verified": verified}
        with self._s.store.write() as tx:
            row = get_row(tx.connection, report.workspace_id)
            require_state(row, MAY_REPORT)
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
            tx.record(*events_of(self._s.events, self._s.clock(), subject, report.decisions))
        return {"recorded": True, "verified": verified}

    def _hear_telemetry(self, caller: Caller, report: Report, *, verified: bool) -> dict[str, Any]:
        """Write down what the journal of a workspace said that proves who it is; without proof nothing is kept."""
        if not verified or report.telemetry is None:
            return {"recorded": False, "verified": verified}
        with self._s.store.write() as tx:
            row = get_row(tx.connection, report.workspace_id)
            require_state(row, MAY_REPORT)
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
            said = report.telemetry
            tx.record(*workspace_telemetry.events_of(self._s.events, self._s.clock(), subject, said))
        return {"recorded": True, "verified": verified}

    def _hear_usage(self, caller: Caller, report: Report, *, verified: bool) -> dict[str, Any]:
        """Write down what the agent of a workspace used, when the workspace proves who it is."""
        if not verified or report.usage is None:
            return {"recorded": False, "verified": verified}
        with self._s.store.write() as tx:
            row = get_row(tx.connection, report.workspace_id)
            require_state(row, MAY_REPORT)
            subject = caller.subject(row.id, agent=row.agent_id, policy_digest=row.policy_digest or "")
            now = self._s.clock()
            count_use(tx, row, report.usage, iso(now))
            tx.record(event_of(self._s.events, now, subject, report.usage))
        return {"recorded": True, "verified": verified}

    def accept_events(self, caller: Caller, shipment: Shipment, sent: int | None = None) -> dict[str, Any]:
        """Store a gatekeeper's events: at-least-once, keyed by (source, seq). ``sent``: what time it has, milliseconds.

        What is stored already is skipped. A gap is accepted and becomes a finding; late events may still fill it. An event
        that contradicts what is stored is refused with a finding.
        """
        if shipment.source == SOURCE or f"perimeter:{shipment.source}" != caller.principal:
            raise ForbiddenError(
                f"{caller.principal} cannot ship events of {shipment.source!r}",
                cure="ship under the name in the certificate",
                code="foreign_source",
            )
        _check_hashes(shipment)
        conflict = 0
        tally, charged = Tally(), ChargeTally()
        with self._s.store.write() as tx:
            remember = self._clocks.judge(tx, caller, shipment.source, shipment.events, sent)
            head = read_head(tx.connection, shipment.source)
            for item in shipment.events:
                outcome = self._store_event(tx, caller, item, head, (tally, charged))
                if outcome is None:
                    conflict = item.seq
                    break
                head = outcome
            self._rollouts.counted(tx, tally.write(tx))
            charged.write(tx)
        remember()
        self._rollouts.act()
        if conflict:
            raise ConflictError(
                f"event {conflict} of {shipment.source} contradicts the stored chain",
                cure="the gatekeeper's spool was changed or reset: start a new source name after an investigation",
                code="chain_conflict",
                details={"accepted": head.seq, "seq": conflict},
            )
        return {"accepted": head.seq}

    def _store_event(
        self, tx: Transaction, caller: Caller, item: ChainedEvent, head: Head, tallies: tuple[Tally, ChargeTally]
    ) -> Head | None:
        """Store one event; return the new head, or None when it contradicts the chain (a finding is recorded)."""
        if item.seq <= head.seq:
            where = (audit_events.c.source == item.source) & (audit_events.c.seq == item.seq)
            stored = tx.connection.execute(select(audit_events.c.hash).where(where)).scalar_one_or_none()
            if stored is None:
                insert_chained(tx.connection, item, self._now_ms())
                for tally in tallies:
                    tally.add(item)
            elif stored != item.hash:
                self._finding(tx, caller, item, "chain_conflict", "was shipped again with another content")
                return None
            return head
        if item.seq == head.seq + 1 and item.prev != head.hash:
            self._finding(tx, caller, item, "chain_conflict", "does not continue the stored chain")
            return None
        if item.seq > head.seq + 1:
            self._finding(tx, caller, item, "chain_gap", f"came while {head.seq + 1} to {item.seq - 1} are missing")
        append_chained(tx.connection, item, self._now_ms())
        for tally in tallies:
            tally.add(item)
        return Head(item.seq, item.hash)

    def _now_ms(self) -> int:
        return int(self._s.clock().timestamp() * 1000)

    def _finding(self, tx: Transaction, caller: Caller, item: ChainedEvent, kind: str, text: str) -> None:
        tx.record(
            self._s.events.detection_finding(
                self._s.clock(),
                caller.subject(),
                kind=kind,
                title=f"Event {item.seq} of {item.source} {text}",
                detail={"source": item.source, "seq": item.seq, "hash": item.hash, "prev": item.prev},
            )
        )


def _check_hashes(shipment: Shipment) -> None:
    """Refuse a shipment whose events do not carry their own hash, or belong to another source."""
    for item in shipment.events:
        try:
            good = item.seq >= 1 and item.source == shipment.source and bool(item.event)
            good = good and item.hash == event_hash(item.source, item.seq, item.prev, item.event)
        except ChainError:
            good = False
        if not good:
            raise MalformedError(
                f"event {item.seq} of the shipment does not match its hash or source",
                cure="ship events as chained",
                code="event_changed",
            )


def _bounded(detail: Any) -> Any:
    """Keep a report's detail when it is small; a large one is replaced by its size."""
    size = len(msgspec.json.encode(detail))
    return detail if size <= 8192 else {"omitted_bytes": size}
