"""What a machine was told about its data disk: by the role ``data_disk``, and by the hypervisor in a systemd credential."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from saw import jsontext
from saw.datadisk.recovery import KEY, load_public
from saw.errors import ConfigError
from saw.files import load_json

CONFIG = Path("/etc/saw/data-disk.json")
CREDENTIAL = "saw.data-disk"
"""Credential whose presence means: this machine's data disk is encrypted. Public data."""
ONCE = "saw.data-disk.recovery"
"""Credential of one start with the recovery key, a secret; the TPM gets a new key out of it."""

SecureBoot = Literal["required", "any"]
Pcr = Annotated[int, msgspec.Meta(ge=0, le=15)]


class DataDiskConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``/etc/saw/data-disk.json``: the disk by a name that stays, and the registers that its key is sealed to (SHA-256 bank).

    ``recovery_key`` (PEM) and ``secure_boot`` hold where no credential says otherwise.
    """

    device: Annotated[str, msgspec.Meta(pattern=r"^/dev/disk/by-[a-z]+/[^/\s]+\Z")]
    pcrs: Annotated[tuple[Pcr, ...], msgspec.Meta(min_length=1)] = (7,)
    recovery_key: str = ""
    secure_boot: SecureBoot = "required"
    trim: bool = True
    patience_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 180


class Told(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The credential: the operator's public key (PEM), and whether secure boot has to be on."""

    recovery_key: str
    secure_boot: SecureBoot = "required"


def read_config(path: Path, environ: Mapping[str, str]) -> tuple[DataDiskConfig, str]:
    """Return the configuration with what the credential says, and the recovery key of this one start (mostly empty).

    Raises :class:`ConfigError` for anything that is not valid, so that nothing is formatted on a guess.
    """
    config = load_json(path, DataDiskConfig)
    folder = environ.get("CREDENTIALS_DIRECTORY", "")
    told = _credential(folder, CREDENTIAL)
    if told:
        try:
            said = jsontext.decode(told, kind=Told)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"the credential {CREDENTIAL} is not valid: {error}", cure="create the workspace again"
            ) from error
        config = msgspec.structs.replace(config, recovery_key=said.recovery_key, secure_boot=said.secure_boot)
    load_public(config.recovery_key)
    once = _credential(folder, ONCE).decode("ascii", "replace").strip()
    if once and not KEY.fullmatch(once):
        raise ConfigError(f"the credential {ONCE} is no recovery key", cure="hand it over again: saw vm unlock")
    return config, once


def _credential(folder: str, name: str) -> bytes:
    path = Path(folder or os.devnull, name)
    return path.read_bytes() if folder and path.exists() else b""
