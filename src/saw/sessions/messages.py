"""What a bastion and the broker tell each other about a session, as JSON over mutual TLS. Bytes are base64."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

SessionId = Annotated[str, msgspec.Meta(pattern=r"^ses-[0-9a-f]{32}\Z")]
Digest = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]

BASTION_NAME = "saw-bastion"
"""The principal of every bastion's host certificate: clients look for it under this name."""

CloseReason = Literal[
    "closed",
    "client_gone",
    "ended",
    "max_duration",
    "broker_unreachable",
    "recording_failed",
    "recording_full",
    "not_sftp",
    "not_forwarding",
    "failed",
]
"""How a session ended, as the recorder saw it; ``ended`` is for the reason that the broker gave."""


class Redeem(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Somebody logged in at the bastion with the certificate of ``session_id``, which counts once.

    ``key_sha256`` is the digest of the key that logged in, ``leg_key`` the public key that the recorder made for its own way
    to the workspace, ``command`` what the client asked to run ("" for a shell, ``sftp`` for the subsystem).
    """

    session_id: SessionId
    key_sha256: Digest
    address: Annotated[str, msgspec.Meta(max_length=64)]
    leg_key: Annotated[str, msgspec.Meta(max_length=4096)]
    command: Annotated[str, msgspec.Meta(max_length=4096)] = ""
    terminal: bool = False


class Granted(msgspec.Struct, frozen=True):
    """The session is open: a certificate for the way to the workspace, and how long it may last.

    ``recording_key`` (32 bytes) encrypts this recording alone. ``ends_in_s`` is the most that the session may last, and
    ``lease_s`` how long it may go on without an answer of the broker (seconds). ``forward_port``: it carries connections to that
    port of the workspace and nothing else; absent: a session of any other kind.
    """

    session_id: str
    workspace_id: str
    number: int
    principal: str
    certificate: str
    host_ca: str
    recording_key: bytes
    ends_in_s: float
    lease_s: float
    forward_port: int | None = None


class Watched(msgspec.Struct, frozen=True):
    """What the broker says of an open session: it goes on, or must end because of ``reason``."""

    state: Literal["open", "ended"]
    reason: str = ""


class Closing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The session is over: why, what went through it (bytes), and the end of its recording's chain."""

    reason: CloseReason
    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)] = 255
    bytes_in: Count = 0
    bytes_out: Count = 0
    chunks: Count = 0
    digest: Digest | None = None


class HostKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The public host key of a bastion, for which it wants a certificate."""

    public_key: Annotated[str, msgspec.Meta(max_length=4096)]
