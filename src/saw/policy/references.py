"""Where the secret of a credential lies: ``store:path``, with ``{sponsor}`` and ``{workspace}`` for whoever calls.

A field is a whole segment of the path and its value is escaped into one, so that no name reaches the secret of another:
what is no letter, digit, ``_``, ``-``, ``@`` or a dot behind the first character is written as ``%`` and two hexadecimal digits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import msgspec

if TYPE_CHECKING:
    from saw.policy.governance import Governance

Store = Literal["file", "vault"]
STORES: tuple[Store, ...] = ("file", "vault")
FIELDS = ("sponsor", "workspace")
"""What may stand in braces: who answers for the calling workspace, and its id."""
DEFAULT_FIELD = "value"
"""Which entry of a vault's secret is used where the reference names none."""
MAX_SEGMENTS = 8
MAX_VALUE = 200
"""Longest text in place of a field (bytes, before it is escaped)."""

_OLD_NAMES: Mapping[str, Store] = {"local": "file"}
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_ENTRY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}\Z")
_PLAIN = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-@.")


class Place(msgspec.Struct, frozen=True):
    """A secret of one caller: its ``segments`` have no fields any more; ``entry`` is which part of a vault's secret."""

    store: Store
    segments: tuple[str, ...]
    entry: str = ""

    def text(self) -> str:
        """Return the place as a reference is written."""
        return f"{self.store}:{'/'.join(self.segments)}" + (f"#{self.entry}" if self.entry else "")


class Reference(msgspec.Struct, frozen=True):
    """A parsed ``ref``. ``entry`` is empty for ``file``."""

    store: Store
    segments: tuple[str, ...]
    entry: str = ""

    @property
    def fields(self) -> tuple[str, ...]:
        """Return the fields that are filled in for each caller."""
        return tuple(name for name in FIELDS if f"{{{name}}}" in self.segments)

    def text(self) -> str:
        """Return the one way in which this reference is written."""
        return Place(self.store, self.segments, self.entry).text()

    def at(self, values: Mapping[str, str]) -> Place:
        """Return the place for a caller; raise ``ValueError`` when a field has no usable value."""
        known = {f"{{{name}}}": name for name in FIELDS}
        segments = tuple(
            escape(values.get(known[part], ""), known[part]) if part in known else part for part in self.segments
        )
        return Place(self.store, segments, self.entry)


def may_meet(left: Reference, right: Reference) -> bool:
    """Return whether two references that differ lead to one secret, for callers with fitting names."""
    if left.store != right.store or left.segments == right.segments or len(left.segments) != len(right.segments):
        return False
    return all(
        a == b or a.startswith("{") or b.startswith("{") for a, b in zip(left.segments, right.segments, strict=True)
    )


def stores_of(governance: Governance) -> tuple[tuple[str, Store], ...]:
    """Return the id of each credential with each store that something of it lies in."""
    found: dict[tuple[str, Store], None] = {}
    for credential in governance.credentials:
        handed = credential.oauth2.client_secret if credential.oauth2 else None
        for ref in filter(None, (credential.ref, handed)):
            found[credential.id, parse_reference(ref).store] = None
    return tuple(found)


def escape(value: str, name: str) -> str:
    """Return ``value`` as one segment of a path; two values never become the same. Raise ``ValueError`` when there is none."""
    try:
        raw = value.encode()
    except UnicodeEncodeError:
        raw = b""
    if not 0 < len(raw) <= MAX_VALUE:
        raise ValueError(f"the caller has no {name} that can stand in a path")
    return "".join(
        chr(byte) if byte in _PLAIN and (index or byte != ord(".")) else f"%{byte:02X}"
        for index, byte in enumerate(raw)
    )


def parse_reference(text: str) -> Reference:
    """Return the parts of a ``ref``; raise ``ValueError`` that says what is wrong with it."""
    scheme, colon, rest = text.partition(":")
    store = next((known for known in STORES if known == _OLD_NAMES.get(scheme, scheme)), None)
    if not colon:
        raise ValueError("it has no store in front")
    if store is None:
        raise ValueError(f"there is no store {scheme[:32]!r}")
    path, sharp, entry = rest.partition("#")
    segments = tuple(path.split("/"))
    for number, segment in enumerate(segments, 1):
        if "{" in segment or "}" in segment:
            if segment not in {f"{{{name}}}" for name in FIELDS}:
                raise ValueError(f"part {number} of the path is neither {{sponsor}} nor {{workspace}}")
        elif not _SEGMENT.match(segment):
            raise ValueError(f"part {number} of the path is not letters, digits, '.', '_' and '-'")
    if len(segments) > MAX_SEGMENTS:
        raise ValueError(f"the path has more than {MAX_SEGMENTS} parts")
    if store == "file":
        if sharp:
            raise ValueError("a file has no entries")
        if segments[0].startswith("{"):
            raise ValueError("a file for each caller needs a name in front, so that it is never taken for another one")
        return Reference(store, segments)
    if sharp and not _ENTRY.match(entry):
        raise ValueError("the entry behind # is not letters, digits, '_' and '-'")
    if len(segments) < 2 or segments[0].startswith("{"):
        raise ValueError("it needs the mount of a KV engine and a path below it")
    if segments[1].startswith("{"):
        raise ValueError(
            "a secret for each caller needs a folder below the mount, so that it is never taken for another"
        )
    return Reference(store, segments, entry or DEFAULT_FIELD)
