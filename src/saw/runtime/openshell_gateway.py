"""OpenShell's gateway as far as a handover needs it, over its published protocol (``openshell.v1.OpenShell``, SDK 0.1.x).

The SDK is imported where it is used: only workspaces that OpenShell runs have it (role ``runtime_openshell``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from saw.errors import ConfigError, SawError, UnavailableError

CALL_S = 60.0
"""Longest that one call may take (seconds)."""
State = Literal["pending", "loaded", "failed", "superseded", "unknown"]


class GatewayRefused(SawError):
    """The gateway answered, and refused the call."""

    code = "openshell_refused"


class Revision(msgspec.Struct, frozen=True):
    """One revision of a sandbox's policy: its number, whether the sandbox loaded it, why not, and which one is active."""

    version: int
    state: State
    error: str
    active: int


class InForce(msgspec.Struct, frozen=True):
    """What the gateway says a sandbox has: policy (JSON form of the message), revision, hash, and what could change it.

    ``source`` is ``sandbox`` or ``global``; ``on_invalid`` what happens when a policy does not load (``fail_closed``).
    """

    policy: dict[str, Any]
    version: int
    digest: str
    source: str
    on_invalid: str
    middlewares: int


class Gateway(Protocol):
    """What the handover asks of the gateway; every call raises :class:`GatewayRefused` or ``UnavailableError``."""

    def phase(self) -> str | None:
        """Return the sandbox's phase in lower case, such as ``ready``, or None when there is no sandbox."""

    def create(self, policy: dict[str, Any], image: str) -> None:
        """Create the sandbox from ``image`` with ``policy``."""

    def update(self, policy: dict[str, Any]) -> int:
        """Replace the sandbox's policy; return the number of the revision."""

    def revision(self, version: int) -> Revision:
        """Return what became of the revision ``version`` (0: the newest)."""

    def in_force(self) -> InForce:
        """Return what the sandbox has."""

    def stop(self) -> None:
        """Stop the sandbox; its files stay."""

    def start(self) -> None:
        """Start the sandbox that was stopped."""


class SdkGateway:
    """The gateway at ``endpoint`` (``host:port``) over mutual TLS; ``workspace`` and ``sandbox`` are OpenShell's names.

    ``tls`` is a directory as ``openshell-gateway generate-certs`` makes it: ``ca.crt``, ``client/tls.crt``, ``client/tls.key``.
    """

    def __init__(self, endpoint: str, tls: Path, workspace: str, sandbox: str) -> None:
        try:
            import grpc
            from google.protobuf import json_format
            from openshell._proto import datamodel_pb2, openshell_pb2, openshell_pb2_grpc, sandbox_pb2
        except ImportError as error:
            reason = f"OpenShell's Python SDK is not installed here ({error})"
            raise UnavailableError(reason, cure="make the wheelhouse of saw_runtime with --group openshell") from error
        self._grpc, self._json, self._pb, self._policy = grpc, json_format, openshell_pb2, sandbox_pb2
        self._scope = datamodel_pb2.WorkspaceSelector(workspace=workspace)
        self._endpoint, self._sandbox = endpoint, sandbox
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_file(tls / "ca.crt"),
            private_key=_file(tls / "client/tls.key"),
            certificate_chain=_file(tls / "client/tls.crt"),
        )
        # A proxy of the environment never stands between: the gateway is on this host.
        self._channel = grpc.secure_channel(endpoint, credentials, options=[("grpc.enable_http_proxy", 0)])
        self._stub = openshell_pb2_grpc.OpenShellStub(self._channel)

    def close(self) -> None:
        """End the connection."""
        self._channel.close()

    def phase(self) -> str | None:
        """See :class:`Gateway`."""
        try:
            answer = self._call(
                self._stub.GetSandbox,
                self._pb.GetSandboxRequest(workspace_scope=self._scope, name=self._sandbox),
            )
        except GatewayRefused as error:
            if error.details.get("status") == "NOT_FOUND":
                return None
            raise
        name: str = self._pb.SandboxPhase.Name(answer.sandbox.status.phase)
        return name.removeprefix("SANDBOX_PHASE_").lower()

    def create(self, policy: dict[str, Any], image: str) -> None:
        """See :class:`Gateway`."""
        template = self._pb.SandboxTemplate(image=image)
        spec = self._pb.SandboxSpec(template=template, policy=self._message(policy))
        request = self._pb.CreateSandboxRequest(workspace_scope=self._scope, name=self._sandbox, spec=spec)
        self._call(self._stub.CreateSandbox, request)

    def update(self, policy: dict[str, Any]) -> int:
        """See :class:`Gateway`."""
        request = self._pb.UpdateConfigRequest(
            workspace_scope=self._scope, sandbox=self._sandbox, policy=self._message(policy)
        )
        return int(self._call(self._stub.UpdateConfig, request).version)

    def revision(self, version: int) -> Revision:
        """See :class:`Gateway`."""
        request = self._pb.GetSandboxPolicyStatusRequest(
            workspace_scope=self._scope, sandbox=self._sandbox, version=version
        )
        answer = self._call(self._stub.GetSandboxPolicyStatus, request)
        told = answer.revision
        name = self._pb.PolicyStatus.Name(told.status).removeprefix("POLICY_STATUS_").lower()
        state: State = name if name in {"pending", "loaded", "failed", "superseded"} else "unknown"
        return Revision(told.version, state, told.load_error, answer.active_version)

    def in_force(self) -> InForce:
        """See :class:`Gateway`."""
        request = self._policy.GetSandboxConfigRequest(workspace_scope=self._scope, name=self._sandbox)
        answer = self._call(self._stub.GetSandboxConfig, request)
        return InForce(
            self._json.MessageToDict(answer.policy, preserving_proto_field_name=True),
            answer.version,
            answer.policy_hash,
            self._policy.PolicySource.Name(answer.policy_source).removeprefix("POLICY_SOURCE_").lower(),
            answer.policy_validation_failure_mode,
            len(answer.supervisor_middleware_services),
        )

    def stop(self) -> None:
        """See :class:`Gateway`."""
        request = self._pb.StopSandboxRequest(workspace_scope=self._scope, name=self._sandbox)
        self._call(self._stub.StopSandbox, request)

    def start(self) -> None:
        """See :class:`Gateway`."""
        request = self._pb.StartSandboxRequest(workspace_scope=self._scope, name=self._sandbox)
        self._call(self._stub.StartSandbox, request)

    def _message(self, policy: dict[str, Any]) -> Any:
        return self._json.ParseDict(policy, self._policy.SandboxPolicy())

    def _call(self, method: Callable[..., Any], request: Any) -> Any:
        try:
            return method(request, timeout=CALL_S)
        except self._grpc.RpcError as error:
            status, words = error.code().name, (error.details() or "")[:400]
            if status in {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}:
                reason = f"OpenShell's gateway at {self._endpoint} does not answer: {words}"
                raise UnavailableError(reason, cure="look at openshell-gateway.service") from None
            reason = f"OpenShell's gateway refused: {status}: {words}"
            raise GatewayRefused(reason, cure="its journal says more", details={"status": status}) from None


def _file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        reason = f"the gateway's certificates cannot be read: {path}: {error.strerror}"
        raise ConfigError(reason, cure="openshell-gateway generate-certs makes them") from error
