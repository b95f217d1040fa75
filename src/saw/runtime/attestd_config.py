"""Configuration of the attestation agent and what the machine was told at its creation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec

from saw.attest.messages import WorkspaceId

Seconds = Annotated[float, msgspec.Meta(gt=0, le=300)]


class AttestdConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/saw/attestd.json``.

    ``tcti`` names the TPM (default: the kernel's device); ``broker_url`` replaces the one told at creation;
    ``reattest_seconds`` is the longest time between two attestations; ``svid_group`` may read the SVID's key.
    """

    tcti: str | None = None
    broker_url: str | None = None
    reattest_seconds: Seconds = 60.0
    broker_timeout_seconds: Seconds = 15.0
    run_dir: str = "/run/saw"
    event_log: str = "/sys/kernel/security/tpm0/binary_bios_measurements"
    ssh_host_key: str = "/etc/ssh/ssh_host_ed25519_key.pub"
    svid_group: str = "saw-egress"

    @property
    def run(self) -> Path:
        """The runtime directory shared by all parts of the workspace."""
        return Path(self.run_dir)

    @property
    def socket(self) -> Path:
        """The agent's Unix socket."""
        return self.run / "attest" / "attest.sock"


class WorkspaceIdentity(msgspec.Struct, frozen=True):
    """The part of ``/run/saw/workspace.json`` used here. ``saw workspace bootstrap`` has validated the whole file."""

    workspace_id: WorkspaceId
    trust_domain: str
    broker_url: str
    broker_name: str
