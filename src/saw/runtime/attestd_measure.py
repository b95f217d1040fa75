"""The log of the policy PCR, kept so that log and PCR agree even when the process dies between the two.

Before an extension the entry is written as *pending*; after it, as done. At the next start the PCR itself tells which of
the two happened.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec

from saw.attest.messages import PolicyLogEntry
from saw.attest.policy_log import POLICY_PCR, fold
from saw.errors import SawError
from saw.files import load_json, write_private


class PolicyPcrError(SawError):
    """PCR 14 holds something that this log does not explain."""

    code = "policy_pcr_mismatch"


class PolicyPcr(Protocol):
    """The part of the TPM used here."""

    def extend_policy(self, policy_digest: str) -> None:
        """Extend PCR 14."""

    def read_policy_pcr(self) -> bytes:
        """Return PCR 14."""


class _LogFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    entries: tuple[PolicyLogEntry, ...] = ()
    pending: PolicyLogEntry | None = None


class PolicyLog:
    """The policy log of this boot in ``path``, paired with PCR 14 of ``tpm``."""

    def __init__(self, path: Path, tpm: PolicyPcr, write: Callable[[Path, bytes], None] = write_private) -> None:
        self._path = path
        self._tpm = tpm
        self._write = write
        self._file: _LogFile | None = None

    @property
    def entries(self) -> tuple[PolicyLogEntry, ...]:
        """The entries measured so far, oldest first."""
        return self._state().entries

    @property
    def value(self) -> bytes:
        """The value that PCR 14 must have."""
        return fold(self.entries)

    def measure(self, policy_digest: str, revision: int) -> bool:
        """Measure a digest unless it is the last one already; tell whether PCR 14 was extended.

        Raises :class:`PolicyPcrError` when PCR 14 and the log disagree, :class:`saw.attest.tpm.TpmError` when the TPM fails.
        """
        state = self._state()
        if state.entries and state.entries[-1].policy_digest == policy_digest:
            return False
        entry = PolicyLogEntry(seq=len(state.entries) + 1, policy_digest=policy_digest, revision=revision)
        self._save(_LogFile(state.entries, entry))
        # From here until the entry is saved as done, only the PCR knows: an error leads back through recovery.
        self._file = None
        self._tpm.extend_policy(policy_digest)
        self._save(_LogFile((*state.entries, entry)))
        self._file = _LogFile((*state.entries, entry))
        return True

    def _state(self) -> _LogFile:
        if self._file is None:
            self._file = self._recover()
        return self._file

    def _recover(self) -> _LogFile:
        state = load_json(self._path, _LogFile) if self._path.exists() else _LogFile()
        value = self._tpm.read_policy_pcr()
        if state.pending is not None and value == fold((*state.entries, state.pending)):
            state = _LogFile((*state.entries, state.pending))
        elif value != fold(state.entries):
            raise PolicyPcrError(
                f"PCR {POLICY_PCR} holds a measurement that the policy log does not explain",
                cure="restart the workspace; find out what extended the PCR",
            )
        self._save(_LogFile(state.entries))
        return _LogFile(state.entries)

    def _save(self, state: _LogFile) -> None:
        self._write(self._path, msgspec.json.encode(state))
