"""Passes questions about tools on to the broker, under the workspace's identity alone (``/v1/workspace/reviews``)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from saw.review.tool import AskTool, ClaimTool, EndTool, ToolView
from saw.runtime.policyd_asking import BrokerWay
from saw.runtime.policyd_config import Workspace
from saw.runtime.review_desk import Ask, Claim, Question, ReviewRefused, Wait, unavailable


class ReviewBroker:
    """One workspace's way to ask people; safe for use by several threads."""

    def __init__(self, workspace: Workspace, run_dir: Path) -> None:
        self._id = workspace.workspace_id
        unanswered = frozenset({"rate_limited", "not_this_workspace"})
        self._way = BrokerWay(workspace, run_dir, ReviewRefused, unavailable, unanswered=unanswered)

    def review(self, question: Question) -> ToolView:
        """Return the broker's answer; raise :class:`ReviewRefused` with its refusal, or ``review_unavailable``."""
        workspace = self._id
        path = "/v1/workspace/reviews"
        if isinstance(question, Wait):
            query: dict[str, str | int] = {"workspace_id": workspace, "wait": question.wait_s}
            return self._way.call("GET", f"{path}/{question.id}", ToolView, wait_s=question.wait_s, params=query)
        if isinstance(question, Ask):
            body: AskTool | EndTool = AskTool(
                workspace_id=workspace,
                policy_digest=question.policy_digest,
                server=question.server,
                params=question.params,
            )
        elif isinstance(question, Claim):
            path = f"{path}/{question.id}/claim"
            body = ClaimTool(
                workspace_id=workspace,
                policy_digest=question.policy_digest,
                server=question.server,
                params=question.params,
                claim=question.claim,
            )
        else:
            path = f"{path}/{question.id}/result"
            body = EndTool(
                workspace_id=workspace,
                claim=question.claim,
                outcome=question.outcome,
                answer_sha256=question.answer_sha256,
                detail=question.detail,
            )
        return self._way.call("POST", path, ToolView, content=msgspec.json.encode(body))
