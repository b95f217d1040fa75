"""The lowest policy revision that may ever load again, kept where a wiped or restored disk does not reset it.

TUF's rollback defence lives in the client's metadata; wiping that metadata must not bring an old policy back. The file
survives a wiped TUF cache, the TPM index survives a disk that was set back as well.
"""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from saw.errors import SawError
from saw.files import load_json, write_private

_SIZE = 8
_ATTRIBUTES = "ownerread|ownerwrite|no_da"


class FloorError(SawError):
    """The revision floor cannot be read or raised; nothing may load then."""

    code = "revision_floor"


class RevisionFloor(Protocol):
    """A revision that only rises."""

    def get(self) -> int:
        """Return the floor, 0 when none was set; raises :class:`FloorError`."""

    def raise_to(self, revision: int) -> None:
        """Raise the floor to ``revision``; a lower value changes nothing. Raises :class:`FloorError`."""


class _FloorFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    revision: int


class FileFloor:
    """The floor in a file, replaced atomically."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def get(self) -> int:
        """Return the floor; a missing file is 0, an unreadable one an error."""
        if not self._path.exists():
            return 0
        try:
            return load_json(self._path, _FloorFile).revision
        except SawError as error:
            raise FloorError(
                f"the revision floor is unreadable: {error.message}", cure="rebuild the workspace"
            ) from error

    def raise_to(self, revision: int) -> None:
        """Raise the floor."""
        if revision > self.get():
            try:
                write_private(self._path, msgspec.json.encode(_FloorFile(revision)))
            except OSError as error:
                raise FloorError(f"cannot raise the revision floor: {error}", cure="free space on the disk") from error


class TpmFloor:
    """The floor in an ordinary TPM NV index of 8 bytes, big-endian (tpm2-tools; TPM 2.0 Library part 1, 37)."""

    def __init__(self, index: str, tcti: str | None = None, timeout: float = 60.0) -> None:
        self._index = index
        self._environment = {**os.environ, **({"TPM2TOOLS_TCTI": tcti} if tcti else {})}
        self._timeout = timeout

    def get(self) -> int:
        """Return the floor, 0 when the index was never defined."""
        if not self._defined():
            return 0
        raw = self._run(["tpm2_nvread", "-C", "o", "-s", str(_SIZE), self._index])
        if len(raw) != _SIZE:
            raise FloorError(f"TPM index {self._index} holds {len(raw)} bytes, not {_SIZE}", cure="check nv_index")
        return int(struct.unpack(">Q", raw)[0])

    def raise_to(self, revision: int) -> None:
        """Raise the floor, defining the index when it is new."""
        if not self._defined():
            self._run(["tpm2_nvdefine", "-C", "o", "-s", str(_SIZE), "-a", _ATTRIBUTES, self._index])
            self._write(revision)
        elif revision > self.get():
            self._write(revision)

    def _write(self, revision: int) -> None:
        self._run(["tpm2_nvwrite", "-C", "o", "-i", "-", self._index], struct.pack(">Q", revision))

    def _defined(self) -> bool:
        listed = self._run(["tpm2_getcap", "handles-nv-index"]).decode("ascii", "replace").lower()
        return f"0x{int(self._index, 16):x}" in listed.replace("-", " ").split()

    def _run(self, command: Sequence[str], data: bytes = b"") -> bytes:
        try:
            done = subprocess.run(
                command, input=data, capture_output=True, check=True, timeout=self._timeout, env=self._environment
            )
        except subprocess.CalledProcessError as error:
            text = error.stderr.decode("utf-8", "replace").strip()[-300:]
            raise FloorError(f"{command[0]} failed: {text}", cure="check the TPM and nv_index") from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise FloorError(f"{command[0]} did not run: {error}", cure="check the TPM") from error
        return done.stdout


class Floors:
    """Several floors as one: the highest counts, all are raised."""

    def __init__(self, floors: Sequence[RevisionFloor]) -> None:
        self._floors = tuple(floors)

    def get(self) -> int:
        """Return the highest floor."""
        return max(floor.get() for floor in self._floors)

    def raise_to(self, revision: int) -> None:
        """Raise every floor."""
        for floor in self._floors:
            floor.raise_to(revision)
