"""The attestation agent's calls to the broker: JSON over TLS, the server verified by name against the workspace's CA."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx
import msgspec

from saw import jsontext
from saw.attest.messages import (
    ActivateAnswer,
    ActivateRequest,
    EnrolAnswer,
    EnrolRequest,
    Evidence,
    NonceAnswer,
    NonceRequest,
    QuoteAnswer,
    Refusal,
    RefusalFailure,
)
from saw.errors import SawError, UnavailableError

Answer = TypeVar("Answer")


class BrokerUnreachableError(UnavailableError):
    """The broker gave no usable answer."""

    code = "broker_unreachable"


class NotAttestedError(SawError):
    """The broker refused. ``failures`` holds its reasons."""

    code = "not_attested"

    def __init__(self, failures: tuple[RefusalFailure, ...]) -> None:
        super().__init__("the broker refused: " + ", ".join(failure.code for failure in failures))
        self.failures = failures


class BrokerClient:
    """A client of the broker's attestation calls.

    ``url`` may hold an address; the certificate is checked for ``server_name`` and against ``ca_file`` alone.
    """

    def __init__(self, url: str, server_name: str, ca_file: Path, timeout: float) -> None:
        context = ssl.create_default_context(cafile=str(ca_file))
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._extensions = {"sni_hostname": server_name}
        self._client = httpx.Client(
            base_url=url, verify=context, timeout=timeout, trust_env=False, headers={"host": server_name}
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def enrol(self, request: EnrolRequest) -> EnrolAnswer:
        """Ask for a challenge for this boot's attestation key."""
        return self._post("/v1/attest/enrol", request, EnrolAnswer)

    def activate(self, request: ActivateRequest) -> ActivateAnswer:
        """Answer the challenge."""
        return self._post("/v1/attest/activate", request, ActivateAnswer)

    def nonce(self, request: NonceRequest) -> NonceAnswer:
        """Ask for a nonce."""
        return self._post("/v1/attest/nonce", request, NonceAnswer)

    def quote(self, evidence: Evidence) -> QuoteAnswer:
        """Present evidence."""
        return self._post("/v1/attest/quote", evidence, QuoteAnswer)

    def _post(self, path: str, request: msgspec.Struct, kind: type[Answer]) -> Answer:
        try:
            answer = self._client.post(
                path,
                content=msgspec.json.encode(request),
                headers={"content-type": "application/json"},
                extensions=self._extensions,
            )
        except httpx.HTTPError as error:
            raise BrokerUnreachableError(
                f"{path}: {type(error).__name__}: {error}"[:300],
                cure="check the link to the broker and its certificate",
            ) from error
        try:
            if answer.status_code == httpx.codes.OK:
                return jsontext.decode(answer.content, kind=kind)
            if answer.is_client_error:
                refusal = jsontext.decode(answer.content, kind=Refusal)
                raise NotAttestedError(refusal.failures or (RefusalFailure(refusal.error, "broker", path),))
        except msgspec.DecodeError as error:
            raise BrokerUnreachableError(
                f"{path}: status {answer.status_code} with an unreadable body", cure="check the broker's version"
            ) from error
        raise BrokerUnreachableError(f"{path}: status {answer.status_code}", cure="check the broker's journal")
