"""Values of which a part could not be read, so that whatever can be told of the rest is told in the same go."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec


@cache
def _fields(kind: type[msgspec.Struct]) -> dict[str, msgspec.structs.FieldInfo]:
    return {field.name: field for field in msgspec.structs.fields(kind)}


class Unknown(Exception):
    """Asked for a value that could not be read; what depends on it cannot be told."""


class Partial:
    """A structure with faults: fields that were read answer as usual, the others raise :class:`Unknown`."""

    __slots__ = ("_bad", "_kind", "_values")

    def __init__(self, kind: type[msgspec.Struct], values: dict[str, Any], bad: frozenset[str]) -> None:
        self._kind, self._values, self._bad = kind, values, bad

    def __getattr__(self, name: str) -> Any:
        """Return the field ``name``, its default where the file does not name it, or a property of the structure."""
        if name in self._bad:
            raise Unknown(name)
        if name in self._values:
            return self._values[name]
        field = _fields(self._kind).get(name)
        if field is not None:
            if field.default_factory is not msgspec.NODEFAULT:
                return field.default_factory()
            if field.default is msgspec.NODEFAULT:
                raise Unknown(name)
            return field.default
        member = getattr(self._kind, name)
        if isinstance(member, property) and member.fget is not None:
            return member.fget(self)
        raise AttributeError(name)


class PartialTuple(tuple[Any, ...]):
    """A list of structures some of which are :class:`Partial`."""

    __slots__ = ()


class PartialDict(dict[str, Any]):
    """A map of structures some of which are :class:`Partial`, or whose names have faults."""

    __slots__ = ()


def is_whole(value: object) -> bool:
    """Return whether ``value`` was read without any fault."""
    return not isinstance(value, Partial | PartialTuple | PartialDict)
