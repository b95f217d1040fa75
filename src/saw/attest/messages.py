"""The messages between attestation agent and broker (docs/architecture.md, "Attestation protocol").

Byte fields travel as standard base64, which msgspec decodes strictly. Requests forbid unknown fields; answers do not, so
that a newer broker can serve an older image.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any

import msgspec

from saw import jsontext
from saw.errors import SawError

#: A whole evidence message, as JSON, may not be longer. Nothing in it is ever decompressed.
MAX_EVIDENCE = 1024 * 1024

#: Failure code that tells the agent to enrol its attestation key again.
AK_UNKNOWN = "ak_unknown"

WorkspaceId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


class EvidenceError(SawError):
    """A message is oversize or malformed. ``code`` of the failure that stands for it is ``malformed``."""

    code = "evidence_malformed"


class PolicyLogEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One policy generation that was activated since boot; ``seq`` is dense from 1."""

    seq: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    policy_digest: Digest
    revision: Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Evidence(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a workspace presents to obtain an SVID. ``pcrs`` maps decimal PCR numbers to lower-case hex SHA-256 values."""

    workspace_id: WorkspaceId
    nonce: Annotated[bytes, msgspec.Meta(max_length=64)] = msgspec.field(name="nonce_b64")
    quote: Annotated[bytes, msgspec.Meta(max_length=1024)] = msgspec.field(name="quote_b64")
    signature: Annotated[bytes, msgspec.Meta(max_length=256)] = msgspec.field(name="signature_b64")
    pcrs: Annotated[dict[str, Digest], msgspec.Meta(max_length=24)]
    event_log: Annotated[bytes, msgspec.Meta(max_length=512 * 1024)] = msgspec.field(name="event_log_b64")
    policy_log: Annotated[tuple[PolicyLogEntry, ...], msgspec.Meta(max_length=4096)]
    csr_pem: Annotated[str, msgspec.Meta(max_length=8192)]
    ssh_host_pub: Annotated[str, msgspec.Meta(max_length=4096)] = ""


class EnrolRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for a challenge that only the TPM holding both the endorsement key and the attestation key can answer."""

    workspace_id: WorkspaceId
    ek_pub_pem: Annotated[str, msgspec.Meta(max_length=4096)]
    ak_pub: Annotated[bytes, msgspec.Meta(max_length=1024)] = msgspec.field(name="ak_pub_b64")


class EnrolAnswer(msgspec.Struct, frozen=True):
    """The challenge: TPM2B_ID_OBJECT and TPM2B_ENCRYPTED_SECRET."""

    challenge_id: str
    credential_blob: bytes = msgspec.field(name="credential_blob_b64")
    secret: bytes = msgspec.field(name="secret_b64")


class ActivateRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The challenge's secret, as recovered by the TPM."""

    challenge_id: Annotated[str, msgspec.Meta(max_length=128)]
    secret: Annotated[bytes, msgspec.Meta(max_length=64)] = msgspec.field(name="secret_b64")


class ActivateAnswer(msgspec.Struct, frozen=True):
    """The attestation key is enrolled under this id."""

    ak_id: str


class NonceRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Ask for a single-use nonce."""

    workspace_id: WorkspaceId


class NonceAnswer(msgspec.Struct, frozen=True):
    """A nonce of 32 bytes and the seconds it may still be used."""

    nonce: bytes = msgspec.field(name="nonce_b64")
    expires_in: float


class Lease(msgspec.Struct, frozen=True, omit_defaults=True):
    """How long the perimeter honours the SVID: seconds from issue, and the end by the broker's clock.

    ``offline_s``: how many seconds longer while the perimeter cannot reach the broker, if the attested policy grants any.
    """

    ttl_s: Annotated[float, msgspec.Meta(gt=0)]
    expires_at: datetime
    offline_s: Annotated[float, msgspec.Meta(gt=0)] | None = None


class QuoteAnswer(msgspec.Struct, frozen=True):
    """The identity granted on good evidence."""

    svid_pem: str
    ca_pem: str
    lease: Lease
    policy_digest: str
    ssh_user_ca: str = ""
    ssh_host_cert: str = ""
    verdict: Any = None


class RefusalFailure(msgspec.Struct, frozen=True):
    """One reason of a refusal."""

    code: str
    component: str = ""
    detail: str = ""


class Refusal(msgspec.Struct, frozen=True):
    """The body of an error answer; ``error`` is ``not_attested`` for refused evidence."""

    error: str
    failures: tuple[RefusalFailure, ...] = ()


def parse_evidence(raw: bytes) -> Evidence:
    """Parse one evidence message; raise :class:`EvidenceError` when it is oversize or malformed."""
    if len(raw) > MAX_EVIDENCE:
        raise EvidenceError(f"evidence of {len(raw)} bytes is too long", cure=f"send at most {MAX_EVIDENCE} bytes")
    try:
        return jsontext.decode(raw, kind=Evidence)
    except msgspec.DecodeError as error:
        raise EvidenceError(f"the evidence is malformed: {error}", cure="correct the named field") from error
