"""The way of one workspace's questions to the broker, under the workspace's identity: an answer, a refusal, or none of both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import httpx
import msgspec

from saw import jsontext
from saw.errors import SawError
from saw.runtime.policyd_broker import open_client
from saw.runtime.policyd_config import Workspace

T = TypeVar("T")


class _Said(msgspec.Struct, frozen=True):
    """What the broker says of a refusal."""

    code: str
    message: str = ""
    cure: str = ""


class BrokerWay:
    """Safe for use by several threads.

    ``refused`` makes the error for a refusal of the broker's (code, message, cure), ``unavailable`` the one for a question that
    nobody answered (why). Refusals with a code of ``unanswered`` count as that.
    """

    def __init__(
        self,
        workspace: Workspace,
        run_dir: Path,
        refused: Callable[[str, str, str], SawError],
        unavailable: Callable[[str], SawError],
        *,
        unanswered: frozenset[str],
        timeout_s: float = 15.0,
    ) -> None:
        self._workspace = workspace
        self._ca = run_dir / "ca.pem"
        self._svid = run_dir / "svid"
        self._timeout_s = timeout_s
        self._extensions = {"sni_hostname": workspace.broker_name}
        self._refused = refused
        self._unavailable = unavailable
        self._unanswered = unanswered

    def call(self, method: str, path: str, kind: type[T], *, wait_s: int = 0, **sent: Any) -> T:
        """Return the broker's answer as ``kind``; it may take ``wait_s`` seconds longer than others."""
        try:
            with open_client(self._workspace, self._ca, self._svid, self._timeout_s + wait_s) as client:
                answer = client.request(method, path, extensions=self._extensions, **sent)
            if answer.is_success:
                return jsontext.decode(answer.content, kind=kind)
            said = jsontext.decode(answer.content, kind=_Said)
        except (httpx.HTTPError, OSError, msgspec.MsgspecError) as error:
            raise self._unavailable(f"the broker gave no usable answer: {type(error).__name__}") from error
        if answer.is_server_error or said.code in self._unanswered:
            raise self._unavailable(said.message or f"the broker answered {answer.status_code}")
        raise self._refused(said.code, said.message[:500], said.cure[:300])
