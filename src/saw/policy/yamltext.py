"""Write YAML that our strict reader reads back as the same values, and change files without losing their comments."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from saw.policy.errors import PolicyError
from saw.policy.yamltree import Node, parse


class _Dumper(yaml.SafeDumper):
    """Writes values out instead of referring to them: the reader refuses anchors and aliases."""

    def ignore_aliases(self, data: object) -> bool:
        """Return ``True``: no value is written as an alias."""
        del data
        return True


def dump(value: Mapping[str, Any]) -> str:
    """Return ``value`` (maps, lists, scalars) as YAML in block style, keys in their order."""
    text: str = yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110)
    return text


def plain(node: Node) -> Any:
    """Return a parsed value as plain maps, lists and scalars."""
    if node.kind == "map":
        return {key: plain(value) for key, (_, value) in node.pairs.items()}
    return [plain(item) for item in node.items] if node.kind == "list" else node.value


def read(raw: bytes, name: str) -> dict[str, Any]:
    """Return the map in ``raw``; raise :class:`PolicyError` for what the strict reader refuses."""
    root, problems = parse(raw, name)
    if problems:
        raise PolicyError(problems)
    result: dict[str, Any] = plain(root)
    return result


def _first_that_says(wanted: dict[str, Any], candidates: Iterable[str], otherwise: str) -> bytes:
    for candidate in candidates:
        try:
            if read(candidate.encode(), "draft") == wanted:
                return candidate.encode()
        except PolicyError:
            continue
    return otherwise.encode()


def with_entries(raw: bytes, key: str, entries: Mapping[str, Any]) -> bytes:
    """Return the file ``raw`` with ``entries`` added to its top-level map ``key``, comments kept where possible.

    The text is edited only when the result reads as exactly the intended values; else the whole file is written anew.
    """
    root, _ = parse(raw, "base")
    wanted = plain(root)
    wanted[key] = {**(wanted.get(key) or {}), **entries}
    text = raw.decode().rstrip("\n")
    node = root.pairs.get(key)
    indent = min((child.column - 1 for child, _ in node[1].pairs.values()), default=2) if node else 2
    block = textwrap.indent(dump(entries), " " * indent)
    candidates = [f"{text}\n\n{block}", text.replace(f"{key}: {{}}", f"{key}:\n{block.rstrip()}") + "\n"]
    if node is None:
        candidates.append(f"{text}\n\n{key}:\n{block}")
    return _first_that_says(wanted, candidates, dump(wanted))


def with_items(raw: bytes, key: str, items: list[Any]) -> bytes:
    """Return the file ``raw`` with ``items`` added to the end of its top-level list ``key``, comments kept if possible."""
    root, _ = parse(raw, "base")
    wanted = plain(root)
    wanted[key] = [*(wanted.get(key) or []), *items]
    node = root.pairs.get(key)
    # An item's own column lies behind its dash.
    indent = max(node[1].items[0].column - 3, 0) if node and node[1].items else 2
    block = textwrap.indent(dump({"x": items}).partition("\n")[2], " " * indent)
    candidates = [f"{raw.decode().rstrip(chr(10))}\n{block}"]
    return _first_that_says(wanted, candidates, dump(wanted))


def with_scalars(raw: bytes, changes: Mapping[tuple[str, str], str]) -> bytes:
    """Return the file ``raw`` with the texts at (section, field) replaced, comments kept where possible."""
    root, _ = parse(raw, "base")
    wanted = plain(root)
    lines = raw.decode().splitlines(keepends=True)
    for (section, field), value in changes.items():
        node = root.pairs[section][1].pairs[field][1]
        line = lines[node.line - 1]
        lines[node.line - 1] = line[: node.column - 1] + line[node.column - 1 :].replace(str(node.value), value, 1)
        wanted[section][field] = value
    return _first_that_says(wanted, ["".join(lines)], dump(wanted))
