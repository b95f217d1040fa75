"""Passes an agent's policy requests on to the broker, under the workspace's identity (``/v1/workspace/policy-requests``)."""

from __future__ import annotations

from pathlib import Path

import msgspec

from saw.policy.policy_request import Asked, AskedList, AskMore
from saw.runtime.policyd_asking import BrokerWay
from saw.runtime.policyd_config import Workspace
from saw.runtime.request_desk import AskRefused, More, Question, unavailable

_PATH = "/v1/workspace/policy-requests"


class RequestBroker:
    """One workspace's way to ask for more; safe for use by several threads."""

    def __init__(self, workspace: Workspace, run_dir: Path) -> None:
        self._id = workspace.workspace_id
        unanswered = frozenset({"not_this_workspace"})
        self._way = BrokerWay(workspace, run_dir, AskRefused, unavailable, unanswered=unanswered)

    def pass_on(self, question: Question) -> Asked | AskedList:
        """Return the broker's answer; raise :class:`AskRefused` with its refusal, or ``ask_unavailable``."""
        if isinstance(question, More):
            fields = {name: getattr(question, name) for name in question.__struct_fields__}
            body = msgspec.json.encode(AskMore(workspace_id=self._id, **fields))
            return self._way.call("POST", _PATH, Asked, content=body)
        return self._way.call("GET", _PATH, AskedList, params={"workspace_id": self._id})
