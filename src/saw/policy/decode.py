"""From a YAML tree to frozen structures, reporting every fault instead of the first.

The structures themselves are the schema: field names, types and defaults come from their definitions. ``Checks`` adds
what types cannot say, per field and per structure.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from msgspec import inspect as shapes

from saw.policy.errors import Problem
from saw.policy.yamltree import Node

Report = Callable[[str, str], None]
"""Called with reason and cure."""

MAX_REASON = 400
"""Longest reason in a problem (characters); it may quote a value of any size."""

_BAD = object()


class Checks(NamedTuple):
    """Rules beyond types.

    ``fields``: by (structure, field), called with the value and a report. ``structures``: by structure, called with the
    finished object and a report that also takes a field name. ``unsupported``: fields of the public schema that are
    refused, by (structure, field), with the reason and the cure. ``keys``: checks of the keys of a map field.
    """

    fields: Mapping[tuple[type, str], Callable[[Any, Report], None]]
    structures: Mapping[type, Callable[[Any, Callable[[str, str, str], None]], None]]
    unsupported: Mapping[tuple[type, str], tuple[str, str]]
    keys: Mapping[tuple[type, str], Callable[[str, Report], None]]


_SHAPES: dict[type, dict[str, shapes.Field]] = {}


def _fields(kind: type) -> dict[str, shapes.Field]:
    known = _SHAPES.get(kind)
    if known is None:
        shape = shapes.type_info(kind)
        assert isinstance(shape, shapes.StructType)  # noqa: S101 - only structures are asked for
        known = _SHAPES[kind] = {field.encode_name: field for field in shape.fields}
    return known


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
        """Return ``node`` as the structure ``kind``, or a marker that is not an instance of it when that failed."""
        if node.kind != "map":
            self.report(node, path, f"expected a map of fields, found {node.describe()}", "write its fields")
            return _BAD
        fields = _fields(kind)
        values: dict[str, Any] = {}
        good = True
        prefix = f"{path}." if path else ""
        for key, (key_node, value_node) in node.pairs.items():
            field = fields.get(key)
            where = prefix + key
            if field is None:
                self._unknown(kind, key, key_node, where, fields)
                good = False
                continue
            value = self._value(value_node, field.type, where, (kind, key))
            if value is _BAD:
                good = False
                continue
            values[field.name] = value
            check = self.checks.fields.get((kind, key))
            if check is not None:
                before = len(self.problems)
                check(value, self._at(value_node, where))
                good = good and len(self.problems) == before
        for key, field in fields.items():
            if field.required and key not in node.pairs:
                self.report(node, prefix + key, "this required field is missing", f"add {key}")
                good = False
        if not good:
            return _BAD
        result = kind(**values)
        whole = self.checks.structures.get(kind)
        if whole is not None:
            before = len(self.problems)

            def report(field: str, reason: str, cure: str) -> None:
                pair = node.pairs.get(field)
                self.report(pair[1] if pair else node, prefix + field if field else path, reason, cure)

            whole(result, report)
            if len(self.problems) != before:
                return _BAD
        return result

    def _unknown(self, kind: type, key: str, node: Node, path: str, fields: Mapping[str, object]) -> None:
        known = self.checks.unsupported.get((kind, key))
        if known is not None:
            self.report(node, path, *known)
            return
        close = difflib.get_close_matches(key, fields, n=1)
        cure = f"did you mean {close[0]}?" if close else f"known fields: {', '.join(sorted(fields))}"
        self.report(node, path, "this field is not known", cure)

    def _value(self, node: Node, shape: shapes.Type, path: str, owner: tuple[type, str]) -> Any:
        if isinstance(shape, shapes.StructType):
            return self.structure(node, shape.cls, path)
        if isinstance(shape, shapes.VarTupleType):
            if node.kind != "list":
                self.report(node, path, f"expected a list, found {node.describe()}", "write a list")
                return _BAD
            items = [self._value(n, shape.item_type, f"{path}[{i}]", owner) for i, n in enumerate(node.items)]
            return _BAD if any(item is _BAD for item in items) else tuple(items)
        if isinstance(shape, shapes.DictType):
            return self._map(node, shape, path, owner)
        if isinstance(shape, shapes.AnyType):
            return _plain(node)
        if isinstance(shape, shapes.UnionType):
            return self._union(node, shape, path, owner)
        return self._scalar(node, shape, path)

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
            result[key] = self._value(value_node, shape.value_type, where, owner)
        return result if len(self.problems) == before else _BAD

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
