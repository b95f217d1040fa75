"""Passes questions about tools on to the broker, under the workspace's identity alone (``/v1/workspace/reviews``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec

from saw.review.tool import AskTool, ClaimTool, EndTool, ToolView
from saw.runtime.policyd_broker import open_client
from saw.runtime.policyd_config import Workspace
from saw.runtime.review_desk import Ask, Claim, Question, ReviewRefused, Wait, unavailable


class _Said(msgspec.Struct, frozen=True):
    """What the broker says of a refusal."""

    code: str
    message: str = ""
    cure: str = ""


class ReviewBroker:
    """One workspace's way to ask people; safe for use by several threads."""

    def __init__(self, workspace: Workspace, run_dir: Path, timeout: float = 15.0) -> None:
        self._workspace = workspace
        self._ca = run_dir / "ca.pem"
        self._svid = run_dir / "svid"
        self._timeout = timeout
        self._extensions = {"sni_hostname": workspace.broker_name}

    def review(self, question: Question) -> ToolView:
        """Return the broker's answer; raise :class:`ReviewRefused` with its refusal, or ``review_unavailable``."""
        workspace = self._workspace.workspace_id
        path = "/v1/workspace/reviews"
        if isinstance(question, Wait):
            query: dict[str, str | int] = {"workspace_id": workspace, "wait": question.wait_s}
            return self._call("GET", f"{path}/{question.id}", wait=question.wait_s, params=query)
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
        return self._call("POST", path, content=msgspec.json.encode(body))

    def _call(self, method: str, path: str, *, wait: int = 0, **sent: Any) -> ToolView:
        try:
            with open_client(self._workspace, self._ca, self._svid, self._timeout + wait) as client:
                answer = client.request(method, path, extensions=self._extensions, **sent)
            if answer.is_success:
                return msgspec.json.decode(answer.content, type=ToolView)
            said = msgspec.json.decode(answer.content, type=_Said)
        except (httpx.HTTPError, OSError, msgspec.MsgspecError) as error:
            raise unavailable(f"the broker gave no usable answer: {type(error).__name__}") from error
        if answer.is_server_error or said.code in {"rate_limited", "not_this_workspace"}:
            raise unavailable(said.message or f"the broker answered {answer.status_code}")
        raise ReviewRefused(said.code, said.message[:500], said.cure[:300])
