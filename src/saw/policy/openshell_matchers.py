"""Patterns of OpenShell's rules in our globs, each in the reading that grants less.

There, ``**`` stands for one or more segments (0.1.x) and ``*`` does not cross a separator, which in query values is the
dot; the reference of 0.0.x says that ``*`` crosses ``/``. Here ``**`` inside a path is zero or more segments, and ``*`` in
a query value is any run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from saw.policy import globs

_BY_HAND = "write the rule by hand"


def allow_match(match: Mapping[str, Any], dialect: str) -> dict[str, Any] | tuple[str, str]:
    """Return the match of an allow rule, never wider than it was, or (reason, cure) when there is none."""
    del dialect
    for field in ("method", "path"):
        if not match.get(field):
            return f"it names no {field}, which matches nothing there and everything here", f"add the {field}"
    result = dict(match)
    if isinstance(result["path"], str):
        result["path"] = _one_or_more(result["path"])
    query = result.get("query")
    if isinstance(query, dict):
        result["query"] = {key: _value(value) for key, value in query.items()}
        for key, value in result["query"].items():
            for glob in value.get("any", []) if isinstance(value, dict) else [value]:
                if isinstance(glob, str) and "*" in glob and glob != "*":
                    return f"query.{key}: * stops at a dot there and not here", "list the values"
                if glob == "*" and not _is_any(query[key]):
                    return f"query.{key}: * stops at a dot there and not here", 'write "**" there if any value is meant'
    return result


def deny_match(match: Mapping[str, Any], dialect: str) -> tuple[dict[str, Any], tuple[str, str] | None]:
    """Return the match of a deny rule, never narrower than it was, and (reason, cure) if it denies more now."""
    result = dict(match)
    change: tuple[str, str] | None = None
    for field, everything in (("method", "*"), ("path", "/**")):
        if not result.get(field):
            result[field] = everything
            change = (f"it names no {field}; here it denies every {field}", f"add the {field}")
    path = result["path"]
    if isinstance(path, str):
        if path == "**":
            result["path"] = "/**"
        else:
            result["path"] = "/".join(_denied(segment, dialect) for segment in path.split("/"))
            if result["path"] != path:
                change = (f"{path} became {result['path']}, which denies at least as much in either reading", _BY_HAND)
    query = result.get("query")
    if isinstance(query, dict):
        result["query"] = {key: _value(value) for key, value in query.items()}
    return result, change


def _denied(segment: str, dialect: str) -> str:
    """Return a segment that matches at least as much: ``*`` may be empty there, and in 0.0.x cross ``/``."""
    if segment == "*" or ("*" in segment and segment != "**" and dialect != "0.1"):
        return "**"
    return segment


def _one_or_more(path: str) -> str:
    """Return the path with every ``**`` that is not last as ``*/**``: one or more segments."""
    if path == "**":
        return "/**"
    *front, last = path.split("/")
    return "/".join([*("*/**" if segment == "**" else segment for segment in front), last])


def _value(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("any"), list):
        return {**value, "any": ["*" if glob == "**" else glob for glob in value["any"]]}
    return "*" if value == "**" else value


def _is_any(value: Any) -> bool:
    """Return whether the pattern as written there matches every value."""
    values = value.get("any", []) if isinstance(value, dict) else [value]
    return isinstance(values, list) and "*" not in values


def covered(include: object, host: object) -> bool:
    """Return whether a middleware may see the host; what cannot be read counts as yes."""
    if not isinstance(include, list) or not isinstance(host, str):
        return True
    return any(not isinstance(glob, str) or globs.may_overlap(glob.lower(), host.lower(), ".") for glob in include)


def takes_over(endpoint: Mapping[str, Any], lost: Mapping[str, Any]) -> bool:
    """Return whether ``endpoint`` may decide a call that ``lost`` decided, or denied, before."""
    host, other = endpoint.get("host"), lost.get("host")
    if not isinstance(host, str) or not isinstance(other, str):
        return not isinstance(other, str) and isinstance(host, str) and "*" in host
    ports = {endpoint.get("port"), *(endpoint.get("ports") or ())} & {lost.get("port"), *(lost.get("ports") or ())}
    path, other_path = endpoint.get("path") or "/**", lost.get("path") or "/**"
    if not ports - {None} or not globs.may_overlap(host.lower(), other.lower(), "."):
        return False
    if not isinstance(path, str) or not isinstance(other_path, str) or not globs.may_overlap(path, other_path):
        return False
    mine = (globs.specificity(host), globs.specificity(path))
    theirs = (globs.specificity(other), globs.specificity(other_path))
    return mine < theirs or (mine == theirs and bool(lost.get("deny_rules")))
