# Copyright: Secure Agent Workspace maintainers
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""One file of a host as it is wanted: what lies there, how it differs, and how it is replaced."""

from __future__ import annotations

import base64
import grp
import os
import pwd
import tempfile
from typing import Any

HIDDEN = "(content not shown)\n"


class ComponentError(Exception):
    """Something that stops the step; carries the machine-readable form."""

    def __init__(self, message: str, code: str, cure: str, **details: Any) -> None:
        super().__init__(message)
        self.failure = {"code": code, "details": details, "cure": cure}


def content_of(wanted: dict[str, Any]) -> bytes:
    """Return the content that a file shall have; raise :class:`ComponentError` for a secret that is no base64."""
    if wanted["secret_base64"] is None:
        return (wanted["content"] or "").encode()
    try:
        return base64.b64decode(wanted["secret_base64"], validate=True)
    except ValueError as error:
        raise ComponentError(
            f"{wanted['dest']}: secret_base64 is no base64", "secret_malformed", "filter the content with b64encode"
        ) from error


class ManagedFile:
    """One wanted file beside what lies on the host."""

    def __init__(self, wanted: dict[str, Any], notes: Any = None) -> None:
        self.dest = wanted["dest"]
        self.secret = wanted["secret_base64"] is not None
        self.content = content_of(wanted)
        self.mode = int(wanted["mode"], 8)
        self.owner = wanted["owner"]
        self.group = wanted["group"]
        self.validate = wanted["validate"]
        self.lines = wanted.get("lines") or []
        self.apply = wanted["apply"]
        # what an earlier run owes is written in notes, which only who applies has
        self.owed = bool(self.apply) and notes.owed("apply", self.dest)
        self.before: bytes | None = None
        self.before_meta: tuple[int, str, str] | None = None
        self.read()

    def read(self) -> None:
        """Look at what is there now."""
        try:
            status = os.stat(self.dest)
            with open(self.dest, "rb") as stream:
                self.before = stream.read()
        except FileNotFoundError:
            return
        self.before_meta = (
            status.st_mode & 0o7777,
            name_of(pwd.getpwuid, status.st_uid),
            name_of(grp.getgrgid, status.st_gid),
        )

    @property
    def meta(self) -> tuple[int, str, str]:
        """Wanted mode, owner and group."""
        return (self.mode, self.owner, self.group)

    @property
    def content_changes(self) -> bool:
        """Whether the content differs."""
        return self.before != self.content

    @property
    def differs(self) -> bool:
        """Whether the file is not what is wanted."""
        return self.content_changes or self.before_meta != self.meta

    @property
    def changes(self) -> bool:
        """Whether anything has to be done for it."""
        return self.differs or self.owed

    def diff(self) -> dict[str, str]:
        """The difference in the form of Ansible's diff mode."""

        def header(meta: tuple[int, str, str] | None) -> str:
            return self.dest if meta is None else f"{self.dest} ({meta[0]:04o} {meta[1]}:{meta[2]})"

        if self.secret:
            before, after = ("" if self.before is None else HIDDEN), HIDDEN
        else:
            before, after = (self.before or b"").decode(errors="replace"), self.content.decode()
        return {
            "before_header": header(self.before_meta),
            "after_header": header(self.meta),
            "before": before,
            "after": after,
        }

    def write(self, content: bytes, meta: tuple[int, str, str]) -> None:
        """Replace the file atomically."""
        folder = os.path.dirname(self.dest)
        os.makedirs(folder, mode=0o755, exist_ok=True)
        try:
            owner, group = pwd.getpwnam(meta[1]).pw_uid, grp.getgrnam(meta[2]).gr_gid
        except KeyError as error:
            raise ComponentError(
                f"{self.dest}: there is no account or group {error.args[0]!r} on this host",
                "account_missing",
                "list the file that declares it earlier, or install the role that does",
                dest=self.dest,
            ) from error
        descriptor, temporary = tempfile.mkstemp(prefix=f".{os.path.basename(self.dest)}.", dir=folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
                os.fchown(stream.fileno(), owner, group)
                os.fchmod(stream.fileno(), meta[0])
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, self.dest)
        except BaseException:
            os.unlink(temporary)
            raise

    def restore(self) -> None:
        """Put the old content back, or take the new file away."""
        if self.before is None or self.before_meta is None:
            os.unlink(self.dest)
        elif self.differs:
            self.write(self.before, self.before_meta)


def name_of(lookup: Any, number: int) -> str:
    """Name of a uid or gid, or its number where it has none."""
    try:
        return str(lookup(number)[0])
    except KeyError:
        return str(number)
