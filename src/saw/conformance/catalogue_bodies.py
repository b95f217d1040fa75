"""Cases of the suite ``http`` about GraphQL: a policy that allows one root field must not be talked into another one.

``${graphql_host}`` and ``${graphql_path}`` are where the policy allows the query ``{__typename}`` and nothing else.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

from saw.conformance.case import Case

TWIN = "twin.http.graphql"
OPERATION = ("operation_not_allowed", "deny_rule")
UNREADABLE = ("body_unreadable", "not_canonical", "status:400")
_OTHER = "__schema{types{name}}"
_JSON = "application/json"


def _text(body: str, kind: str, headers: tuple[str, ...], target: str, method: str) -> str:
    lines = [
        f"{method} {target} HTTP/1.1",
        "Host: ${graphql_host}",
        "X-Probe-Nonce: ${nonce}",
        *([f"Content-Type: {kind}"] if kind else []),
        *headers,
        f"Content-Length: {len(body.encode('latin-1'))}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", body])


def _arguments(
    body: Any, kind: str = _JSON, *headers: str, target: str = "${graphql_path}", method: str = "POST"
) -> dict[str, Any]:
    text = body if isinstance(body, str) else json.dumps(body)
    request = _text(text, kind, headers, target, method)
    return {"authority": "${graphql_authority}", "request": request, "sni": "${graphql_host}"}


def _case(name: str, title: str, arguments: dict[str, Any], expected: tuple[str, ...]) -> Case:
    return Case(
        f"http.graphql.{name}", "RUN-01", "http", title, "tunnel", arguments, "ring 1: body", expected, TWIN,
        needs=("http_proxy",), seconds=25.0,
    )  # fmt: skip


def _operations() -> list[Case]:
    def asked(name: str, title: str, body: Any, expected: tuple[str, ...] = OPERATION) -> Case:
        return _case(name, title, _arguments(body), expected)

    fragment = f"fragment F on Query{{{_OTHER}}}"
    two = "query A{__typename} mutation B{__typename}"
    return [
        asked("field", "a root field that is not allowed", {"query": f"{{{_OTHER}}}"}),
        asked("beside", "such a field beside an allowed one", {"query": f"{{__typename {_OTHER}}}"}),
        asked("alias", "such a field under the name of an allowed one", {"query": f"{{__typename: {_OTHER}}}"}),
        asked("fragment", "such a field in a fragment", {"query": f"{{__typename ...F}} {fragment}"}),
        asked("inline", "such a field in an inline fragment", {"query": f"{{... on Query{{{_OTHER}}}}}"}),
        asked("skipped", "such a field that a directive skips", {"query": "{__typename __schema @skip(if: $a){types{name}}}"}),
        asked("mutation", "a mutation", {"query": "mutation{__typename}"}),
        asked("comment", "a mutation behind a comment", {"query": "#{__typename}\nmutation{__typename}"}),
        asked("name", "the mutation of a document with a query", {"query": two, "operationName": "B"}),
        asked("batch", "a batch with one mutation", [{"query": "{__typename}"}, {"query": "mutation{__typename}"}]),
        asked("several", "two operations and no name", {"query": two}, UNREADABLE),
        asked("circle", "fragments that lead to each other",
              {"query": "{...F} fragment F on Query{__typename ...G} fragment G on Query{...F}"}, UNREADABLE),
        asked("hash", "a hash without its query",
              {"extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 64}}}, UNREADABLE),
        asked("saved", "a saved query by its id", {"id": "1"}, UNREADABLE),
        asked("hash-beside", "a hash beside another query",
              {"query": "{__typename}", "extensions": {"persistedQuery": {"version": 1, "sha256Hash": "0" * 64}}}, UNREADABLE),
    ]  # fmt: skip


def _forms() -> list[Case]:
    good = json.dumps({"query": "{__typename}"})
    bad = json.dumps({"query": f"{{{_OTHER}}}"})
    packed = gzip.compress(bad.encode(), mtime=0).decode("latin-1")
    bomb = gzip.compress(good.encode() + b" " * 16 * 1024 * 1024, mtime=0).decode("latin-1")

    def form(name: str, title: str, *arguments: Any, expected: tuple[str, ...] = UNREADABLE, **more: Any) -> Case:
        return _case(name, title, _arguments(*arguments, **more), expected)

    return [
        form("key-twice", "the query twice", good[:-1] + f', "query": "{{{_OTHER}}}"}}'),
        form("key-escaped", "the query twice, once escaped", good[:-1] + f', "\\u0071uery": "{{{_OTHER}}}"}}'),
        form("key-case", "the query twice, once in capitals", good[:-1] + f', "QUERY": "{{{_OTHER}}}"}}'),
        form("url", "another query in the URL", good, target="${graphql_path}?query=mutation%7B__typename%7D"),
        form("get-mutation", "a mutation by GET", "", "", method="GET", target="${graphql_path}?query=mutation%7B__typename%7D"),
        form("get-twice", "two queries by GET", "", "", method="GET",
             target="${graphql_path}?query=%7B__typename%7D&query=%7B__schema%7Btypes%7Bname%7D%7D%7D"),
        form("type-form", "a form", "query=%7B__schema%7Btypes%7Bname%7D%7D%7D", "application/x-www-form-urlencoded"),
        form("type-graphql", "a query that is no JSON", f"{{{_OTHER}}}", "application/graphql"),
        form("type-text", "JSON that says it is text", bad, "text/plain"),
        form("type-none", "JSON that says nothing", bad, ""),
        form("compressed", "a compressed body", packed, _JSON, "Content-Encoding: gzip"),
        form("bomb", "a compressed body that is large when it is unpacked", bomb, _JSON, "Content-Encoding: gzip"),
        form("large", "a body beyond what is read", good + " " * 600_000, expected=("body_too_large",)),
    ]  # fmt: skip


def twins() -> list[Case]:
    """Return what must work."""
    arguments = _arguments({"query": "{__typename}"})
    return [
        Case(TWIN, "RUN-01", "http", "an allowed query", "tunnel", arguments, is_twin=True, recorded=True,
             needs=("http_proxy",), seconds=25.0)
    ]  # fmt: skip


def cases() -> list[Case]:
    """Return the attacks."""
    return [*_operations(), *_forms()]
