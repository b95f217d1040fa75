"""The lowest policy revision that may ever load again, kept where a wiped or restored disk does not reset it.

TUF's rollback defence lives in the client's metadata; wiping that metadata must not bring an old policy back. The file
survives a wiped TUF cache, the TPM's counter survives a disk that was set back as well.
"""

from __future__ import annotations

import os
import re
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import msgspec

from saw.errors import SawError
from saw.files import load_json, write_private

_SIZE = 8
_ATTRIBUTES = "nt=counter|ownerread|ownerwrite|no_da"
_TYPE, _COUNTER, _WRITTEN = 0xF0, 0x10, 1 << 29
_HELPER_BIT = 1
MAX_STEP = 1000
"""Most revisions that the TPM's counter is moved at once; each is one command to the TPM."""


class FloorError(SawError):
    """The revision floor cannot be read or raised; nothing may load then."""

    code = "revision_floor"


class RevisionFloor(Protocol):
    """A revision that only rises."""

    def get(self) -> int:
        """Return the floor, 0 when none was set; raises :class:`FloorError`."""

    def check(self, revision: int) -> None:
        """Raise :class:`FloorError` when the floor could not be raised to ``revision``; changes nothing."""

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

    def check(self, revision: int) -> None:  # noqa: ARG002 - any will do
        """A file takes any revision; an unreadable one is an error."""
        self.get()

    def raise_to(self, revision: int) -> None:
        """Raise the floor."""
        if revision > self.get():
            try:
                write_private(self._path, msgspec.json.encode(_FloorFile(revision)))
            except OSError as error:
                raise FloorError(f"cannot raise the revision floor: {error}", cure="free space on the disk") from error


class TpmFloor:
    """The floor as a TPM NV counter: its value is the floor (TPM 2.0 Library part 1, 37.2.3; part 3, TPM2_NV_Increment).

    A counter can only be incremented, and a new one starts above every value that a removed counter of this TPM had. There
    is no base to subtract and no record beside it, so nothing that the workspace's root can write lowers the floor. An index
    of the ordinary kind, as earlier versions made it or as root may put in its place, gives way to a counter.

    The value is read once and then known to this process, which is the stricter of the two should the index be replaced.
    """

    def __init__(self, index: str, tcti: str | None = None, timeout: float = 60.0) -> None:
        self._index = int(index, 16)
        self._helper = self._index ^ _HELPER_BIT
        self._environment = {**os.environ, **({"TPM2TOOLS_TCTI": tcti} if tcti else {})}
        self._timeout = timeout
        self._known: int | None = None

    def get(self) -> int:
        """Return the counter's value. A counter that is not there is defined, and starts at 1 or above."""
        if self._known is None:
            self._known = self._counter(self._index)
        return self._known

    def check(self, revision: int) -> None:
        """Raise :class:`FloorError` for a revision that is more than :data:`MAX_STEP` above the counter."""
        missing = revision - self.get()
        if missing > MAX_STEP:
            raise FloorError(
                f"revision {revision} is {missing} above the TPM's counter, which moves at most {MAX_STEP} at once",
                cure="number releases one by one, or leave nv_index out",
            )

    def raise_to(self, revision: int) -> None:
        """Increment the counter to ``revision``, making it anew if it was removed meanwhile."""
        self.check(revision)
        if revision > self.get():
            self._known = max(self.get(), self._counter(self._index, revision))

    def _counter(self, index: int, start: int = 0) -> int:
        """Return the value of the counter ``index``, after making it one and bringing it to ``start``."""
        attributes = self._attributes(index)
        if attributes is not None and attributes & _TYPE != _COUNTER:
            self._retire(index, self._value(index) if attributes & _WRITTEN else 0)
            attributes = None
        if attributes is None:
            self._run(["tpm2_nvdefine", "-C", "o", "-a", _ATTRIBUTES, f"{index:#x}"])
            attributes = 0
        if not attributes & _WRITTEN:
            self._run(["tpm2_nvincrement", "-C", "o", f"{index:#x}"])
        value = self._value(index)
        if start - value > MAX_STEP:
            raise FloorError(
                f"TPM index {index:#x} would have to rise from {value} to {start}, more than {MAX_STEP} at once",
                cure="name another nv_index; the floor in the file still counts",
            )
        for _ in range(start - value):
            self._run(["tpm2_nvincrement", "-C", "o", f"{index:#x}"])
        return max(start, value)

    def _retire(self, index: int, value: int) -> None:
        """Remove an ordinary index so that a counter in its place starts at ``value`` or above; may end anywhere.

        A second counter is brought to one below it and removed first: a new counter starts above every removed one.
        """
        if value > 1 and index != self._helper:
            self._counter(self._helper, value - 1)
            self._run(["tpm2_nvundefine", "-C", "o", f"{self._helper:#x}"])
        self._run(["tpm2_nvundefine", "-C", "o", f"{index:#x}"])

    def _attributes(self, index: int) -> int | None:
        """Return TPMA_NV of ``index``, or None when it is not defined."""
        listed = self._run(["tpm2_getcap", "handles-nv-index"]).decode("ascii", "replace").lower()
        if f"{index:#x}" not in listed.replace("-", " ").split():
            return None
        public = self._run(["tpm2_nvreadpublic", f"{index:#x}"]).decode("ascii", "replace")
        found = re.search(r"attributes:\s+friendly:[^\n]*\s+value: 0x([0-9A-Fa-f]+)", public)
        if found is None:
            raise FloorError(f"the attributes of TPM index {index:#x} cannot be read", cure="check tpm2-tools")
        return int(found[1], 16)

    def _value(self, index: int) -> int:
        raw = self._run(["tpm2_nvread", "-C", "o", "-s", str(_SIZE), f"{index:#x}"])
        if len(raw) != _SIZE:
            raise FloorError(f"TPM index {index:#x} holds {len(raw)} bytes, not {_SIZE}", cure="check nv_index")
        return int(struct.unpack(">Q", raw)[0])

    def _run(self, command: Sequence[str]) -> bytes:
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=True,
                timeout=self._timeout,
                env=self._environment,
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

    def check(self, revision: int) -> None:
        """Ask every floor."""
        for floor in self._floors:
            floor.check(revision)

    def raise_to(self, revision: int) -> None:
        """Raise every floor."""
        for floor in self._floors:
            floor.raise_to(revision)
