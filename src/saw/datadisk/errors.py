"""The errors of an encrypted data disk."""

from __future__ import annotations

from saw.errors import SawError


class DataDiskError(SawError):
    """An encrypted data disk cannot be made, opened, recovered or erased."""

    code = "data_disk_failed"


class DataDiskRefused(DataDiskError):
    """A disk is not touched: what lies on it is not ours to format or to mount."""

    code = "data_disk_refused"


class DataDiskLocked(DataDiskError):
    """The TPM of this machine, as it was started, does not give the key out."""

    code = "data_disk_locked"
