"""From a YAML tree to frozen structures, reporting every fault instead of the first.

The structures themselves are the schema: field names, types and defaults come from their definitions. ``Checks`` adds
what types cannot say, per field and per structure.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from msgspec import inspect as shapes

from saw.policy.errors import Problem
from saw.policy.partial import Partial, PartialDict, PartialTuple, Unknown, is_whole
from saw.policy.yamltree import Node

Report = Callable[[str, str], None]
"""Called with reason and cure."""

Steps = tuple[str | int, ...]
"""The way from a value to one inside it: names of fields and keys, and positions in lists."""

StructureReport = Callable[[str | Steps, str, str], None]
"""Called with the way to what is wrong (a field's name, or nothing for the structure itself), reason and cure."""

StructureCheck = Callable[[Any, StructureReport], None]

MAX_REASON = 400
"""Longest reason in a problem (characters); it may quote a value of any size."""

_BAD = object()


class Checks(NamedTuple):
    """Rules beyond types.

    ``fields``: by (structure, field), called with the value and a report. ``items``: the same for each element of a list and
    each value of a map, so that the report points at it. ``structures``: by structure, each called by itself with the object,
    of which a part may be unknown (:class:`Partial`), and a report that takes the way to what is wrong. ``unsupported``:
    fields of the public schema that are refused, by (structure, field), with the reason and the cure. ``keys``: checks of
    the keys of a map field.
    """

    fields: Mapping[tuple[type, str], Callable[[Any, Report], None]]
    structures: Mapping[type, tuple[StructureCheck, ...]]
    unsupported: Mapping[tuple[type, str], tuple[str, str]]
    keys: Mapping[tuple[type, str], Callable[[str, Report], None]]
    items: Mapping[tuple[type, str], Callable[[Any, Report], None]] = MappingProxyType({})


_SHAPES: dict[type, dict[str, shapes.Field]] = {}


def _fields(kind: type) -> dict[str, shapes.Field]:
    known = _SHAPES.get(kind)
    if known is None:
        shape = shapes.type_info(kind)
        assert isinstance(shape, shapes.StructType)  # noqa: S101 - only structures are asked for
        known = _SHAPES[kind] = {field.encode_name: field for field in shape.fields}
    return known


def _bare(shape: shapes.Type) -> shapes.Type:
    """Return ``shape`` without what the schema says of it."""
    return shape.type if isinstance(shape, shapes.Metadata) else shape


def locate(node: Node, steps: Steps) -> Node:
    """Return the value that ``steps`` lead to from ``node``, or the last one on the way that the file has."""
    for step in steps:
        if isinstance(step, int):
            if node.kind != "list" or step >= len(node.items):
                return node
            node = node.items[step]
        else:
            pair = node.pairs.get(step)
            if pair is None:
                return node
            node = pair[1]
    return node


def path_text(steps: Steps) -> str:
    """Return ``steps`` as people write them: ``credentials[0].hosts``."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")


class Decoder:
    """Decodes one file; ``problems`` collects what is wrong."""

    def __init__(self, name: str, checks: Checks) -> None:
        self.name = name
        self.checks = checks
        self.problems: list[Problem] = []

    def report(self, node: Node, path: str, reason: str, cure: str) -> None:
        """Add one problem at ``node``."""
        if len(reason) > MAX_REASON:
            reason = f"{reason[: MAX_REASON // 2]} … {reason[-MAX_REASON // 4 :]}"
        self.problems.append(Problem(self.name, node.line, node.column, path, reason, cure[:MAX_REASON]))

    def _at(self, node: Node, path: str) -> Report:
        def report(reason: str, cure: str) -> None:
            self.report(node, path, reason, cure)

        return report

    def structure(self, node: Node, kind: type, path: str) -> Any:
        """Return ``node`` as the structure ``kind``, or as a :class:`Partial` of it when something in it is wrong."""
        if node.kind != "map":
            self.report(node, path, f"expected a map of fields, found {node.describe()}", "write its fields")
            return Partial(kind, {}, frozenset(field.name for field in _fields(kind).values()))
        fields = _fields(kind)
        values: dict[str, Any] = {}
        bad: set[str] = set()
        before = len(self.problems)
        prefix = f"{path}." if path else ""
        for key, (key_node, value_node) in node.pairs.items():
            field = fields.get(key)
            where = prefix + key
            if field is None:
                bad |= self._unknown(kind, key, key_node, where, fields)
                continue
            value = self.field(value_node, kind, key, where)
            if value is _BAD:
                bad.add(field.name)
            else:
                values[field.name] = value
        for key, field in fields.items():
            if field.required and key not in node.pairs:
                self.report(node, prefix + key, "this required field is missing", f"add {key}")
                bad.add(field.name)
        whole = len(self.problems) == before
        result = kind(**values) if whole else Partial(kind, values, frozenset(bad))
        checks = self.checks.structures.get(kind, ())
        if checks:
            self._check(checks, result, node, path)
            if whole and len(self.problems) != before:
                return Partial(kind, values, frozenset())
        return result

    def _check(self, checks: tuple[StructureCheck, ...], value: Any, node: Node, path: str) -> None:
        def report(at: str | Steps, reason: str, cure: str) -> None:
            steps = at if isinstance(at, tuple) else ((at,) if at else ())
            where = ".".join(filter(None, (path, path_text(steps))))
            self.report(locate(node, steps), where, reason, cure)

        for check in checks:
            try:
                check(value, report)
            except Unknown:
                continue

    def field(self, node: Node, kind: type, key: str, path: str) -> Any:
        """Return ``node`` as the value of the field ``key`` of ``kind``, or a marker that no field has when it is bad."""
        value = self._value(node, _bare(_fields(kind)[key].type), path, (kind, key))
        check = self.checks.fields.get((kind, key))
        if check is None or value is _BAD or not is_whole(value):
            return value
        before = len(self.problems)
        check(value, self._at(node, path))
        return value if len(self.problems) == before else _BAD

    def _unknown(self, kind: type, key: str, node: Node, path: str, fields: Mapping[str, shapes.Field]) -> set[str]:
        """Report a field that is not known; return the field that was probably meant, whose value is unknown then."""
        known = self.checks.unsupported.get((kind, key))
        if known is not None:
            self.report(node, path, *known)
            return set()
        close = difflib.get_close_matches(key, fields, n=1)
        cure = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(sorted(fields))}"
        self.report(node, path, "this field is not known", cure)
        return {fields[name].name for name in close}

    def _value(self, node: Node, shape: shapes.Type, path: str, owner: tuple[type, str]) -> Any:
        if isinstance(shape, shapes.StructType):
            return self.structure(node, shape.cls, path)
        if isinstance(shape, shapes.VarTupleType):
            if node.kind != "list":
                self.report(node, path, f"expected a list, found {node.describe()}", "write a list")
                return _BAD
            items = [self._item(n, shape.item_type, f"{path}[{i}]", owner) for i, n in enumerate(node.items)]
            if any(item is _BAD for item in items):
                return _BAD
            return tuple(items) if all(map(is_whole, items)) else PartialTuple(items)
        if isinstance(shape, shapes.DictType):
            return self._map(node, shape, path, owner)
        if isinstance(shape, shapes.AnyType):
            return _plain(node)
        if isinstance(shape, shapes.UnionType):
            return self._union(node, shape, path, owner)
        return self._scalar(node, shape, path)

    def _item(self, node: Node, shape: shapes.Type, path: str, owner: tuple[type, str]) -> Any:
        """Return one element of a list or one value of a map."""
        value = self._value(node, shape, path, owner)
        check = self.checks.items.get(owner)
        if check is None or value is _BAD or not is_whole(value):
            return value
        before = len(self.problems)
        check(value, self._at(node, path))
        return value if len(self.problems) == before else _BAD

    def _map(self, node: Node, shape: shapes.DictType, path: str, owner: tuple[type, str]) -> Any:
        if node.kind != "map":
            self.report(node, path, f"expected a map, found {node.describe()}", "write a map")
            return _BAD
        check = self.checks.keys.get(owner)
        result: dict[str, Any] = {}
        before = len(self.problems)
        for key, (key_node, value_node) in node.pairs.items():
            where = f"{path}.{key}"
            if check is not None:
                check(key, self._at(key_node, where))
            value = self._item(value_node, shape.value_type, where, owner)
            if value is not _BAD:
                result[key] = value
        return result if len(self.problems) == before else PartialDict(result)

    def _union(self, node: Node, shape: shapes.UnionType, path: str, owner: tuple[type, str]) -> Any:
        options = [option for option in shape.types if not isinstance(option, shapes.NoneType)]
        if len(options) == 1:
            return self._value(node, options[0], path, owner)
        for option in options:
            if node.kind == "map" and isinstance(option, shapes.StructType):
                return self.structure(node, option.cls, path)
            if node.kind == "scalar" and _fits(node.value, option):
                return node.value
        self.report(node, path, f"{node.describe()} is not allowed here", f"write {_wanted(shape)}")
        return _BAD

    def _scalar(self, node: Node, shape: shapes.Type, path: str) -> Any:
        if node.kind == "scalar" and _fits(node.value, shape):
            return node.value
        self.report(node, path, f"expected {_wanted(shape)}, found {node.describe()}", _cure(node, shape))
        return _BAD


def _fits(value: object, shape: shapes.Type) -> bool:
    if isinstance(shape, shapes.StrType):
        return isinstance(value, str)
    if isinstance(shape, shapes.BoolType):
        return isinstance(value, bool)
    if isinstance(shape, shapes.IntType):
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(shape, shapes.FloatType):
        return isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(shape, shapes.LiteralType):
        return any(type(value) is type(known) and value == known for known in shape.values)
    return False


def _wanted(shape: shapes.Type) -> str:
    if isinstance(shape, shapes.LiteralType):
        return "one of " + ", ".join(str(value) or '""' for value in shape.values)
    if isinstance(shape, shapes.UnionType):
        return " or ".join(_wanted(option) for option in shape.types if not isinstance(option, shapes.NoneType))
    names: dict[type, str] = {
        shapes.StrType: "text",
        shapes.BoolType: "true or false",
        shapes.IntType: "a whole number",
        shapes.FloatType: "a number",
        shapes.StructType: "a map",
    }
    return names.get(type(shape), "another type")


def _cure(node: Node, shape: shapes.Type) -> str:
    if isinstance(shape, shapes.StrType) and node.kind == "scalar" and node.value is not None:
        return "put it in quotes"
    return "correct the value"


def _plain(node: Node) -> Any:
    """Return ``node`` as plain lists, maps and scalars; the depth is bounded by the reader."""
    if node.kind == "list":
        return [_plain(item) for item in node.items]
    if node.kind == "map":
        return {key: _plain(value) for key, (_, value) in node.pairs.items()}
    return node.value
