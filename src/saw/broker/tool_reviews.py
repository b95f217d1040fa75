"""Calls of MCP tools over stdio that people decide on: asked for and claimed by the workspace, which makes the call itself.

A review of the kind ``tool`` has the states, decisions, receipts and pages of every review. What differs is who asks: the
workspace, under its own identity. What it asks is judged here, by the broker's copy of the policy that is in force there, so that
nothing in the workspace says whom a call waits for. What it does with a claim, nobody outside sees.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Row, select

from saw.broker.agent_states import require_living
from saw.broker.break_glass import held_up_by, let_through, overdue_error
from saw.broker.clock import iso
from saw.broker.context import Caller, Services
from saw.broker.delegation_ends import record_of
from saw.broker.errors import BrokerError, ConflictError, ForbiddenError, MalformedError
from saw.broker.lifecycle import State
from saw.broker.registry import get_row, require_state
from saw.broker.releases import bundles_of
from saw.broker.review_evidence import counting
from saw.broker.review_states import (
    COLUMNS,
    OPEN,
    TOOL,
    UNENDED,
    Moves,
    due_at,
    get_review,
    lease_counts,
    other_policy,
    stored,
    unknown_review,
    why_void,
)
from saw.broker.review_vault import BytesChanged, Vault
from saw.broker.reviews import require_room
from saw.broker.schema import delegations, reviews
from saw.broker.store import Transaction
from saw.policy.bundle import describe, read_content
from saw.policy.governance import Governance
from saw.policy.mcp import ToolReview, decide_tool, tool_review
from saw.review.messages import FINAL
from saw.review.tool import (
    AskTool,
    ClaimTool,
    EndTool,
    ReviewedTool,
    ToolRefused,
    ToolView,
    read_params,
    tool_digest,
)

RUN_FOR = timedelta(minutes=15)
"""How long a workspace has from the claim to telling how the call ended."""
SHORTEST_S, LONGEST_S = 60, 30 * 86400
"""Bounds of the time for which a review stays open (seconds), as those of calls that leave the workspace."""


class ToolReviews:
    """Reviews of tools over stdio, as workspaces use them (controls REV-01 to REV-03)."""

    def __init__(self, services: Services, vault: Vault) -> None:
        self._s = services
        self._vault = vault
        self._moves = Moves(services)

    def ask(self, caller: Caller, body: AskTool) -> ToolView:
        """Keep a call until people have decided; the same call that waits or runs already is answered with its review.

        Raises :class:`ForbiddenError` for a call that policy does not let people decide on or that no delegation covers,
        :class:`ConflictError` for another policy than the one in force, :class:`BusyError` when too much waits.
        """
        require_self(caller, body.workspace_id)
        with self._s.store.read() as connection:
            # Before anything of a policy is read: of others than its own a workspace learns nothing.
            _asking(connection, body)
        call, asked = self._judged(body)
        digest = tool_digest(body.workspace_id, call)
        now = self._s.clock()
        identifier = self._s.new_id("rv")
        sealed = self._vault.seal(identifier, "call", call)
        with self._s.store.write() as tx:
            workspace = _asking(tx.connection, body)
            require_living(tx.connection, workspace)
            delegation = self._delegation(tx.connection, workspace)
            found = self._same(tx, body, digest)
            if found is None:
                require_room(tx.connection, workspace.id)
                tx.connection.execute(
                    reviews.insert().values(
                        id=identifier,
                        kind=TOOL,
                        workspace_id=workspace.id,
                        agent_id=workspace.agent_id,
                        sponsor=workspace.sponsor,
                        perimeter=caller.principal,
                        policy_digest=body.policy_digest,
                        request_digest=digest,
                        group_name=asked.group,
                        quorum=asked.quorum,
                        rule=f"mcp.servers.{call.server}.tools.{call.tool}"[:256],
                        delegation=delegation,
                        binary="",
                        request_id=caller.request_id,
                        method="TOOL",
                        scheme="",
                        host=f"{call.server}/{call.tool}"[:256],
                        port=0,
                        path="",
                        call=sealed,
                        held_bytes=len(sealed),
                        state="pending",
                        detail="",
                        opened_at=iso(now),
                        expires_at=iso(now + timedelta(seconds=min(max(asked.expires_s, SHORTEST_S), LONGEST_S))),
                    )
                )
                found = get_review(tx.connection, identifier)
                self._moves.record(tx, caller, found, "a call of a tool waits for review", "create")
                self._moves.opened(tx, found)
            return self._view(tx.connection, found)

    def view(self, caller: Caller, identifier: str, workspace_id: str) -> ToolView:
        """Return a review of the caller's own; another's does not exist."""
        require_self(caller, workspace_id)
        with self._s.store.read() as connection:
            row = _mine(connection, caller, identifier)
            found = self._view(connection, row)
        if due_at(row) and due_at(row) <= iso(self._s.clock()):
            with self._s.store.write() as tx:
                row = self._moves.settle(tx, _mine(tx.connection, caller, identifier))
                found = self._view(tx.connection, row)
        return found

    def claim(self, caller: Caller, identifier: str, body: ClaimTool) -> ToolView:
        """Give the one right to make the approved call, for exactly the bytes that people saw.

        Everything is looked at again first: bytes, workspace, policy, agent, delegation, lease, and who approved. The same claim
        again is answered as the first time. A refusal is an event.
        """
        require_self(caller, body.workspace_id)
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, _mine(tx.connection, caller, identifier))
            found = self._claim(tx, caller, row, body)
            if isinstance(found, BrokerError):
                told: dict[str, object] = {"reason": found.code, "state": row.state}
                self._moves.record(tx, caller, row, "a claim was refused", refused=True, said=told)
        if isinstance(found, BrokerError):
            raise found
        return found

    def result(self, caller: Caller, identifier: str, body: EndTool) -> ToolView:
        """Take the workspace's word for how the call ended; the same word again changes nothing."""
        require_self(caller, body.workspace_id)
        if (body.outcome == "done") != bool(body.answer_sha256):
            raise MalformedError("an answer belongs to done, and to nothing else", cure="tell what happened")
        with self._s.store.write() as tx:
            row = self._moves.settle(tx, _mine(tx.connection, caller, identifier))
            mine = hmac.compare_digest(row.claim_sha256 or "", _hash(body.claim))
            if mine and row.state == "executing":
                digest = body.answer_sha256 or None
                said: dict[str, object] = {"answer_sha256": digest}
                told = self._moves.move(tx, caller, row, body.outcome, body.detail, said=said, answer_sha256=digest)
                row = told or row
            view = self._view(tx.connection, row)
        if not mine:
            raise ForbiddenError(
                f"{identifier} was not claimed with this claim",
                cure="whoever claimed it tells its end",
                code="wrong_claim",
            )
        if (row.state, row.answer_sha256 or "") != (body.outcome, body.answer_sha256):
            raise ConflictError(
                f"{identifier} has ended as {row.state} already", cure="look at what the tool did", code="claim_ended"
            )
        return view

    def _claim(self, tx: Transaction, caller: Caller, row: Row[Any], body: ClaimTool) -> ToolView | BrokerError:
        """Return the claimed review, or why it is not claimed."""
        now = self._s.clock()
        try:
            call = self._vault.open(row.id, "call", stored(tx.connection, row.id, "call") or b"", ReviewedTool)
            good = hmac.compare_digest(tool_digest(row.workspace_id, call), row.request_digest)
        except BytesChanged:
            good = False
        if not good:
            if row.state in OPEN:
                self._moves.move(
                    tx, caller, row, "cancelled", "bytes_changed: the stored call is not what was reviewed"
                )
            return ConflictError(f"{row.id} was changed in the database", cure="ask again", code="bytes_changed")
        if (body.server, body.params) != (call.server, call.params):
            return ConflictError(
                f"what is claimed is not what was asked in {row.id}", cure="ask for it", code="call_changed"
            )
        if row.claim_sha256:
            if hmac.compare_digest(row.claim_sha256, _hash(body.claim)) and row.state == "executing":
                return self._view(tx.connection, row)
            return ConflictError(
                f"{row.id} was claimed at {row.claimed_at} and is {row.state}",
                cure="one approval is for one call: ask again",
                code="already_claimed",
            )
        if body.policy_digest != row.policy_digest:
            return other_policy(row.workspace_id)
        if row.state in OPEN and (why := why_void(tx.connection, row, now)):
            self._moves.move(tx, caller, row, "cancelled", why)
            return ConflictError(f"{row.id} is void: {why}", cure="ask again", code=why)
        if row.state == "approved":
            if not lease_counts(tx.connection, row.workspace_id, now):
                return ConflictError(
                    f"the lease of {row.workspace_id} has lapsed",
                    cure="claim again once it has attested",
                    code="lease_lapsed",
                )
            try:
                # A workspace that was handed its first delegation meanwhile needs one that counts, as its next call does.
                self._delegation(tx.connection, get_row(tx.connection, row.workspace_id))
            except ForbiddenError as error:
                return error
            if (overdue := held_up_by(tx.connection, row, now)) is not None:
                return overdue_error(overdue)
            approvals = let_through(tx.connection, row, self._s.config.break_glass, now)
            names: dict[str, object] = {"approvers": approvals or [*counting(tx.connection, row, now)]}
            if not approvals:
                row = self._moves.move(tx, caller, row, "pending", "an approval no longer counts", said=names) or row
            else:
                ends = iso(now + RUN_FOR)
                values = {"claimed_at": iso(now), "claim_sha256": _hash(body.claim), "claim_ends_at": ends}
                taken = self._moves.move(tx, caller, row, "executing", "claimed", said=names, **values)
                if taken is not None:
                    return self._view(tx.connection, taken)
        code = {"denied": "review_denied", "expired": "review_expired", "cancelled": "review_cancelled"}
        return ConflictError(
            f"{row.id} is {row.state}",
            cure="wait for the people who decide" if row.state in OPEN else "ask again",
            code=code.get(row.state, "not_approved"),
        )

    def _judged(self, body: AskTool) -> tuple[ReviewedTool, ToolReview]:
        """Return the call as policy describes it, and who decides; raise the refusal of what no person decides on."""
        try:
            tool, arguments = read_params(body.params)
        except ToolRefused as error:
            raise MalformedError(error.message, cure=error.cure, code=error.code) from error
        with self._s.store.read() as connection:
            raw = bundles_of(connection, {body.policy_digest}).get(body.policy_digest)
        if raw is None:
            raise other_policy(body.workspace_id)
        governance = _governance(body.policy_digest, raw)
        rules = governance.mcp.servers.get(body.server)
        decision = decide_tool(governance, body.server, tool, arguments)
        if decision.allowed:
            raise ConflictError(f"{tool} of {body.server} waits for nobody", cure="call it", code="no_review_needed")
        if decision.reason != "review_required" or rules is None or rules.transport != "stdio":
            code = "tool_not_allowed" if decision.reason == "review_required" else decision.reason
            raise ForbiddenError(decision.detail, cure="; ".join(decision.next_steps), code=code)
        pinned = rules.tools[tool].definition or ""
        call = ReviewedTool(server=body.server, command=rules.command, tool=tool, definition=pinned, params=body.params)
        return call, tool_review(governance, rules.tools[tool])

    def _delegation(self, connection: Connection, workspace: Row[Any]) -> str:
        """Return the delegation under which the agent asks; an empty text where none is needed.

        Delegations name hosts, so none covers a tool by itself: one that counts and lets the agent write is enough.
        """
        ever = select(delegations.c.id).where(delegations.c.workspace_id == workspace.id).limit(1)
        if not self._s.config.delegation.required and connection.execute(ever).first() is None:
            return ""
        now = self._s.clock()
        counting_now = delegations.c.revoked_at.is_(None) & (delegations.c.expires_at > iso(now))
        mine = select(delegations).where(counting_now, delegations.c.workspace_id == workspace.id)
        for row in connection.execute(mine.order_by(delegations.c.expires_at.desc(), delegations.c.id)).all():
            record = record_of(row)
            if record.agent == workspace.agent_id and record.live(now) and record.approval != "read-only":
                return str(row.id)
        raise ForbiddenError(
            f"no delegation of the agent of {workspace.id} counts now and lets it write",
            cure="ask the sponsor for one",
            code="outside_delegation",
        )

    def _same(self, tx: Transaction, body: AskTool, digest: str) -> Row[Any] | None:
        """Return the review of the same call that has not ended."""
        query = select(*COLUMNS).where(
            reviews.c.kind == TOOL,
            reviews.c.workspace_id == body.workspace_id,
            reviews.c.request_digest == digest,
            reviews.c.policy_digest == body.policy_digest,
            reviews.c.state.in_(UNENDED),
        )
        settled = (self._moves.settle(tx, row) for row in tx.connection.execute(query).all())
        return next((row for row in settled if row.state in UNENDED), None)

    def _view(self, connection: Connection, row: Row[Any]) -> ToolView:
        return ToolView(
            id=row.id,
            state=row.state,
            request_digest=row.request_digest,
            opened_at=row.opened_at,
            expires_at=row.expires_at,
            approvals=0 if row.state in FINAL else len(counting(connection, row, self._s.clock())),
            quorum=row.quorum,
            detail=row.detail,
            claim_ends_at=row.claim_ends_at,
        )


@functools.lru_cache(maxsize=16)
def _governance(digest: str, raw: bytes) -> Governance:
    """Return what the release ``digest`` says of tools; it was verified when it was published."""
    if describe(raw)[0] != digest:
        raise ConflictError("the stored policy is another one", cure="saw broker check", code="policy_changed")
    return read_content(raw).governance


def require_self(caller: Caller, workspace_id: str) -> None:
    """Refuse whoever is not the workspace that it speaks of, by the certificate that its attestation gave it."""
    if caller.principal == f"workspace:{workspace_id}":
        return
    kind, _, name = caller.principal.partition(":")
    raise ForbiddenError(
        f"{kind} {name} cannot ask for {workspace_id[:64]}".replace("anonymous  ", "somebody without a certificate "),
        cure="call with the workspace's own certificate",
        code="not_this_workspace",
    )


def _mine(connection: Connection, caller: Caller, identifier: str) -> Row[Any]:
    row = get_review(connection, identifier)
    if row.kind != TOOL or row.perimeter != caller.principal:
        raise unknown_review(identifier)
    return row


def _asking(connection: Connection, body: AskTool) -> Row[Any]:
    """Return the workspace that asks; raise unless it is active and under the policy that it names."""
    workspace = get_row(connection, body.workspace_id)
    require_state(workspace, frozenset({State.ACTIVE}))
    if workspace.policy_digest != body.policy_digest:
        raise other_policy(workspace.id)
    return workspace


def _hash(claim: str) -> str:
    return hashlib.sha256(claim.encode()).hexdigest()
