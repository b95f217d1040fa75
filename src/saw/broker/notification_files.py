"""The files that channels name: secrets and authorities, read anew for each delivery, so that a new one counts at once."""

from __future__ import annotations

import base64
import binascii
import os
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path

from saw.broker.notification_queue import NotDelivered

_PREFIX = "whsec_"
_LONGEST = 4096
_FEWEST_BYTES, _MOST_BYTES = 24, 64
_MOST_KEYS = 3


def read_secret(path: str, environ: Mapping[str, str] = os.environ) -> str:
    """Return the text of a secret's file; raise :class:`NotDelivered`, without the text, when it is missing or open to others.

    What systemd hands over (``$CREDENTIALS_DIRECTORY``) may have an access list, which its mode shows as the group's.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        words = f"the secret {path} cannot be read: {error.strerror}"
        raise _unusable(words, "put it there, readable by the broker") from error
    try:
        status = os.fstat(descriptor)
        regular = stat.S_ISREG(status.st_mode)
        raw = os.read(descriptor, _LONGEST + 1) if regular else b""
    finally:
        os.close(descriptor)
    handed_over = environ.get("CREDENTIALS_DIRECTORY", "")
    forbidden = 0o007 if handed_over and Path(path).parent == Path(handed_over) else 0o077
    if not regular or status.st_mode & forbidden:
        raise _unusable(f"the secret {path} is no file, or open to group or others", f"chmod 0600 {path}")
    text = raw.decode("ascii", errors="replace").strip("\r\n")
    if not text or len(raw) > _LONGEST or not all(" " <= letter <= "~" or letter == "\n" for letter in text):
        raise _unusable(f"the secret {path} is empty, too long or not printable ASCII", "write it again")
    return text


def signing_keys(path: str) -> list[bytes]:
    """Return the keys in a webhook's file, a ``whsec_`` with 24 to 64 bytes in base64 on each line (Standard Webhooks, 1.0).

    The first one is the one in force; further ones sign too, for receivers that have yet to change.
    """
    lines = read_secret(path).split("\n")
    keys = []
    for line in lines[:_MOST_KEYS]:
        try:
            key = base64.b64decode(line.strip().removeprefix(_PREFIX), validate=True)
        except binascii.Error:
            key = b""
        if not line.startswith(_PREFIX) or not _FEWEST_BYTES <= len(key) <= _MOST_BYTES:
            raise _unusable(
                f"{path} holds no signing secret", f"write {_PREFIX} and 24 to 64 bytes in base64 on a line"
            )
        keys.append(key)
    return keys


def tls_context(ca_file: str | None) -> ssl.SSLContext:
    """Return a context that verifies the far end's certificate and name; raise :class:`NotDelivered` for a file that is none."""
    try:
        context = ssl.create_default_context(cafile=ca_file)
    except OSError as error:
        raise _unusable(f"{ca_file} cannot be used: {error.strerror or error}", "correct ca_file") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def _unusable(message: str, cure: str) -> NotDelivered:
    return NotDelivered(message, cure=cure, code="file_unusable")
