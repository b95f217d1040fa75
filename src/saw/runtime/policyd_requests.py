"""Passes an agent's policy requests on to the broker, under the workspace's identity (``/v1/workspace/policy-requests``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import msgspec

from saw.policy.policy_request import Asked, AskedList, AskMore
from saw.runtime.policyd_broker import open_client
from saw.runtime.policyd_config import Workspace
from saw.runtime.request_desk import AskRefused, More, Question, unavailable

_PATH = "/v1/workspace/policy-requests"


class _Said(msgspec.Struct, frozen=True):
    """What the broker says of a refusal."""

    code: str
    message: str = ""
    cure: str = ""


class RequestBroker:
    """One workspace's way to ask for more; safe for use by several threads."""

    def __init__(self, workspace: Workspace, run_dir: Path, timeout: float = 15.0) -> None:
        self._workspace = workspace
        self._ca = run_dir / "ca.pem"
        self._svid = run_dir / "svid"
        self._timeout = timeout
        self._extensions = {"sni_hostname": workspace.broker_name}

    def pass_on(self, question: Question) -> Asked | AskedList:
        """Return the broker's answer; raise :class:`AskRefused` with its refusal, or ``ask_unavailable``."""
        workspace = self._workspace.workspace_id
        if isinstance(question, More):
            fields = {name: getattr(question, name) for name in question.__struct_fields__}
            body = msgspec.json.encode(AskMore(workspace_id=workspace, **fields))
            return msgspec.convert(self._call("POST", Asked, content=body), Asked)
        return msgspec.convert(self._call("GET", AskedList, params={"workspace_id": workspace}), AskedList)

    def _call(self, method: str, kind: Any, **sent: Any) -> Any:
        try:
            with open_client(self._workspace, self._ca, self._svid, self._timeout) as client:
                answer = client.request(method, _PATH, extensions=self._extensions, **sent)
            if answer.is_success:
                return msgspec.json.decode(answer.content, type=kind)
            said = msgspec.json.decode(answer.content, type=_Said)
        except (httpx.HTTPError, OSError, msgspec.MsgspecError) as error:
            raise unavailable(f"the broker gave no usable answer: {type(error).__name__}") from error
        if answer.is_server_error or said.code == "not_this_workspace":
            raise unavailable(said.message or f"the broker answered {answer.status_code}")
        raise AskRefused(said.code, said.message[:500], said.cure[:300])
