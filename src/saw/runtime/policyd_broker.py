"""policyd's calls to the broker: TUF files, the wake-up long-poll, and reports.

The broker is reached through the perimeter under an address; its certificate is checked for its name, against the
workspace's own CA and nothing else. TUF verifies content, so a lying broker can at most withhold.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import msgspec

from saw import jsontext
from saw.audit.chain import ChainedEvent
from saw.audit.workspace_decisions import Decisions
from saw.audit.workspace_usage import Usage
from saw.errors import UnavailableError
from saw.policy.handed_tools import HandedInvalid, HandedTools, read_handed
from saw.policy.tuf_fetcher import PinnedFetcher
from saw.runtime.decide_counts import Counted
from saw.runtime.policyd_config import Workspace


class BrokerUnreachable(UnavailableError):
    """The broker gave no usable answer."""

    code = "broker_unreachable"


class Offer(msgspec.Struct, frozen=True):
    """Which release the broker gives this workspace; it can hold a signed release back with it, never replace one.

    ``policy_digest`` is None when there is none for it, and empty when the broker does not say: then the newest counts.
    """

    seq: int
    policy_digest: str | None = ""
    revision: int | None = 0


class Given(msgspec.Struct, frozen=True):
    """The bundle of the release that this workspace is given, base64, None when there is none."""

    bundle: str | None = None


class _Refusal(msgspec.Struct, frozen=True):
    """What the broker says of a refusal."""

    code: str = ""


class Recorded(msgspec.Struct, frozen=True):
    """Whether the broker kept a report."""

    recorded: bool = False


class PolicyBroker:
    """One workspace's client of the broker; ``fetcher`` is for the TUF client."""

    def __init__(self, workspace: Workspace, run_dir: Path, timeout: float = 15.0) -> None:
        self._workspace = workspace
        self._svid = run_dir / "svid"
        self._ca = run_dir / "ca.pem"
        self._timeout = timeout
        self._extensions = {"sni_hostname": workspace.broker_name}
        self._client = self._open(identified=False)
        self.fetcher = PinnedFetcher(workspace.ca_pem, workspace.broker_name, timeout=timeout)

    @property
    def tuf_url(self) -> str:
        """Base of the TUF repository."""
        return f"{self._workspace.broker_url}/tuf"

    def close(self) -> None:
        """Close the connections."""
        self._client.close()
        self.fetcher.close()

    def watch(self, after: int, wait: float) -> int:
        """Return the broker's sequence number once it differs from ``after``, or ``after`` when ``wait`` s passed."""
        return self._ask(after, wait).seq

    def offer(self) -> Offer:
        """Return what this workspace is offered now; raises :class:`BrokerUnreachable`."""
        return self._ask(0, 0)

    def given_bundle(self) -> bytes:
        """Return the bundle of the release that this workspace is given, nothing of it verified; empty for none.

        For a workspace that is held on an earlier release and has no copy of it: TUF names the newest one alone.
        """
        path = "/v1/workspace/bundle"
        try:
            answer = self._client.get(
                path, params={"workspace_id": self._workspace.workspace_id}, extensions=self._extensions
            )
            answer.raise_for_status()
            text = jsontext.decode(answer.content, kind=Given).bundle
            return base64.b64decode(text, validate=True) if text else b""
        except (httpx.HTTPError, msgspec.MsgspecError, binascii.Error) as error:
            raise _unreachable(path, error) from error

    def _ask(self, after: int, wait: float) -> Offer:
        query: dict[str, str | int] = {
            "workspace_id": self._workspace.workspace_id,
            "after": after,
            "wait": int(max(0, min(30, wait))),
        }
        try:
            answer = self._client.get(
                "/v1/workspace/watch", params=query, timeout=wait + self._timeout, extensions=self._extensions
            )
            answer.raise_for_status()
            return jsontext.decode(answer.content, kind=Offer) if answer.content else Offer(after)
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise _unreachable("/v1/workspace/watch", error) from error

    def report(
        self,
        kind: str,
        state: str,
        *,
        reason: str = "",
        policy_digest: str = "",
        revision: int = 0,
        detail: str | dict[str, Any] = "",
    ) -> None:
        """Report a policy state or a finding, under the workspace's identity when it holds one.

        The broker keeps a ``detail`` of at most 8 KiB.
        """
        body = {
            "workspace_id": self._workspace.workspace_id,
            "kind": kind,
            "state": state,
            "reason": reason,
            "policy_digest": policy_digest,
            "revision": revision,
            "detail": detail[:1000] if isinstance(detail, str) else detail,
        }
        # An identity that ended this moment must not hide what there is to say: the second try goes without one.
        for identified in (True, False):
            try:
                with self._open(identified=identified) as client:
                    client.post("/v1/workspace/report", json=body, extensions=self._extensions).raise_for_status()
            except httpx.HTTPError as error:
                # A broker that wants fewer words a second would take this one from nobody as well.
                busy = (
                    isinstance(error, httpx.HTTPStatusError)
                    and error.response.status_code == httpx.codes.TOO_MANY_REQUESTS
                )
                if busy or not identified:
                    raise _unreachable("/v1/workspace/report", error) from error
            else:
                return

    def report_calls(self, digest: str, counted: Counted, window: float) -> None:
        """Report calls that ring 1 decided under ``digest``, under the workspace's identity alone: others do not count."""
        body = {
            "workspace_id": self._workspace.workspace_id,
            "kind": "calls",
            "policy_digest": digest,
            "calls": {"allowed": counted.allowed, "denied": counted.denied, "window_s": round(window, 1)},
        }
        try:
            with self._open(identified=True) as client:
                client.post("/v1/workspace/report", json=body, extensions=self._extensions).raise_for_status()
        except httpx.HTTPError as error:
            raise _unreachable("/v1/workspace/report", error) from error

    def report_decisions(self, said: Decisions) -> None:
        """Tell what was decided in the workspace; raises :class:`BrokerUnreachable` unless the broker has recorded it.

        It records nothing without the workspace's identity.
        """
        self._tell("decisions", msgspec.to_builtins(said))

    def report_telemetry(self, source: str, events: Sequence[ChainedEvent]) -> None:
        """Tell events of the chain ``source``; raises :class:`BrokerUnreachable` unless the broker has recorded them.

        It records nothing without the workspace's identity, and takes about one report a second.
        """
        self._tell("telemetry", {"source": source, "events": msgspec.to_builtins(list(events))})

    def report_usage(self, usage: Usage) -> None:
        """Tell what the agent used; raises as :meth:`report_decisions`."""
        self._tell("usage", msgspec.to_builtins(usage))

    def _tell(self, kind: str, said: dict[str, Any]) -> None:
        """Report what only counts under the workspace's identity."""
        body = {"workspace_id": self._workspace.workspace_id, "kind": kind, kind: said}
        try:
            with self._open(identified=True) as client:
                answer = client.post("/v1/workspace/report", json=body, extensions=self._extensions).raise_for_status()
            recorded = jsontext.decode(answer.content, kind=Recorded).recorded
        except (httpx.HTTPError, msgspec.MsgspecError) as error:
            raise _unreachable("/v1/workspace/report", error) from error
        if not recorded:
            raise BrokerUnreachable(
                f"the broker records {kind} under the workspace's identity alone", cure="wait until it has attested"
            )

    def handed_tools(self) -> HandedTools:
        """Return which tools the agent was handed, asked for under the workspace's identity; raises :class:`BrokerUnreachable`.

        A broker that does not know the call knows no delegation that names tools.
        """
        path = "/v1/workspace/tools"
        try:
            with self._open(identified=True) as client:
                answer = client.get(
                    path, params={"workspace_id": self._workspace.workspace_id}, extensions=self._extensions
                )
            if answer.status_code == httpx.codes.NOT_FOUND and _code(answer) == "no_such_call":
                return HandedTools(bound=False)
            return read_handed(answer.raise_for_status().content)
        except (httpx.HTTPError, HandedInvalid) as error:
            raise _unreachable(path, error) from error

    def _open(self, *, identified: bool) -> httpx.Client:
        return open_client(self._workspace, self._ca, self._svid if identified else None, self._timeout)


def open_client(workspace: Workspace, ca: Path, svid: Path | None, timeout: float) -> httpx.Client:
    """Return a client of the broker; with the identity in the folder ``svid``, if there is one."""
    context = ssl.create_default_context(cafile=str(ca))
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if svid is not None:
        # Without an identity, or while it is being replaced, the broker records the report as unverified.
        with contextlib.suppress(OSError, ssl.SSLError):
            context.load_cert_chain(svid / "svid.pem", svid / "key.pem")
    return httpx.Client(
        base_url=workspace.broker_url,
        verify=context,
        timeout=timeout,
        trust_env=False,
        headers={"host": workspace.broker_name},
    )


def _code(answer: httpx.Response) -> str:
    try:
        return jsontext.decode(answer.content, kind=_Refusal).code
    except msgspec.DecodeError:
        return ""


def _unreachable(what: str, error: Exception) -> BrokerUnreachable:
    return BrokerUnreachable(
        f"{what}: {type(error).__name__}: {error}"[:300], cure="check the link to the broker and its certificate"
    )
