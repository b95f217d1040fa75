"""What a GraphQL request asks for: the operation that the server would run, with its root fields.

Forms: the GraphQL specification (October 2021) and GraphQL over HTTP. Aliases count as the field they stand for, fragments at
the root are followed. The grammar is graphql-core's, within bounds on tokens and nesting.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from saw.policy.address_rules import parse_query
from saw.policy.calls import BodyRefused, Reading, batch, body_of, lookalikes, no_body, read_json
from saw.policy.model import Endpoint, Operation, PersistedQuery, Request

if TYPE_CHECKING:
    from graphql.language import DocumentNode, OperationDefinitionNode, SelectionSetNode

MAX_TOKENS = 4000
"""Most tokens of a request, all its queries together: they bound the time that reading takes."""
MAX_BATCH = 32
"""Most operations in one request."""
MAX_FIELDS = 256
"""Most root fields of an operation, and most fragments that are followed for them."""
MAX_NAME = 256
"""Longest name (characters) of an operation or root field."""

_MEMBERS = frozenset({"query", "operationName", "variables", "extensions"})
_HASH = re.compile(r"[0-9a-f]{64}\Z")


class Envelope(NamedTuple):
    """One operation as it was sent: the document, the name of the operation to run, and the hash it is called by."""

    text: str | None
    name: str | None
    digest: str | None


def reader_of(endpoint: Endpoint) -> Callable[[Request, str], Reading]:
    """Return how requests to ``endpoint`` are read."""
    import graphql.language.parser  # noqa: F401 - so that the first call does not wait for it

    limit = endpoint.graphql_max_body_bytes
    registered: Mapping[str, PersistedQuery] = (
        endpoint.graphql_persisted_queries if endpoint.persisted_queries == "allow_registered" else {}
    )

    def read(request: Request, query: str) -> Reading:
        left = MAX_TOKENS
        found: list[Operation] = []
        for envelope in envelopes(request, query, limit):
            if envelope.text is None:
                found.append(_registered(envelope, registered))
                continue
            document = _parse(envelope.text, left)
            left -= document.token_count
            found.append(_chosen(document, envelope.name))
        written = next((asked for asked in found if asked.kind != "query"), None)
        if written is not None and request.method.upper() != "POST":
            raise BodyRefused(f"a {written.kind} is sent by POST")
        return Reading(tuple(found))

    return read


def envelopes(request: Request, query: str, limit: int) -> tuple[Envelope, ...]:
    """Return what was sent, by GET in the ``query`` of the URL or by POST; raise :class:`BodyRefused` for other forms."""
    method = request.method.upper()
    if method in {"GET", "HEAD"}:
        no_body(request)
        return (_envelope(_of_query(query, limit)),)
    if method != "POST":
        raise BodyRefused(f"GraphQL is spoken by POST and GET, not by {method}", "method_or_path_not_allowed")
    if query:
        raise BodyRefused("a POST with a query in its URL can be read in two ways")
    value = read_json(body_of(request, limit), limit)
    return tuple(_envelope(item) for item in batch(value, MAX_BATCH))


def _of_query(query: str, limit: int) -> dict[str, object]:
    """Return the members of a GET; each at most once, nothing else."""
    if len(query) > limit:
        raise BodyRefused(f"the query is longer than {limit} bytes", "body_too_large")
    found = parse_query(query)
    if found is None:
        raise BodyRefused("the query of the URL can be read in two ways")
    if any(len(values) != 1 for values in found.values()):
        raise BodyRefused("a parameter appears twice")
    result: dict[str, object] = {key: values[0] for key, values in found.items()}
    for name in ("variables", "extensions"):
        if result.get(name):
            result[name] = read_json(str(result[name]), limit)
        else:
            result.pop(name, None)
    return result


def _envelope(value: object) -> Envelope:
    if not isinstance(value, dict):
        raise BodyRefused("a GraphQL request is a JSON object")
    unknown = sorted(set(value) - _MEMBERS)
    if unknown:
        raise BodyRefused(f"the member {unknown[0][:40]!r} is not read; only {', '.join(sorted(_MEMBERS))}")
    text, name, extensions = value.get("query"), value.get("operationName"), value.get("extensions")
    if not isinstance(text, str | None) or not isinstance(name, str | None):
        raise BodyRefused("query and operationName are texts")
    if not isinstance(value.get("variables"), dict | None) or not isinstance(extensions, dict | None):
        raise BodyRefused("variables and extensions are JSON objects")
    digest = _persisted(extensions or {})
    text = text if text is not None and text.strip() else None
    if text is not None and digest is not None and hashlib.sha256(text.encode()).hexdigest() != digest:
        raise BodyRefused("the hash is not that of the query")
    if text is None and digest is None:
        raise BodyRefused("there is no query")
    return Envelope(text, name or None, digest)


def _registered(envelope: Envelope, registered: Mapping[str, PersistedQuery]) -> Operation:
    known = registered.get(envelope.digest or "")
    if known is None:
        raise BodyRefused("the hash stands for a query that the policy does not know; send the query's text")
    if envelope.name is not None and envelope.name != known.operation_name:
        raise BodyRefused("the operation's name is not that of the registered query")
    return Operation(known.operation_type, known.operation_name, tuple(sorted(set(known.fields))))


def _persisted(extensions: dict[str, object]) -> str | None:
    """Return the hash by which a query is called, or ``None``."""
    lookalikes(extensions, frozenset({"persistedQuery"}))
    if "persistedQuery" not in extensions:
        return None
    found = extensions["persistedQuery"]
    if not isinstance(found, dict) or set(found) - {"version", "sha256Hash"}:
        raise BodyRefused("persistedQuery holds version and sha256Hash")
    digest = found.get("sha256Hash")
    if not isinstance(digest, str) or not _HASH.match(digest):
        raise BodyRefused("sha256Hash is a SHA-256 in lower-case hexadecimal digits")
    return digest


def operation_of(text: str, wanted: str | None) -> Operation:
    """Return the operation of the document ``text`` that is run for the name ``wanted``; raise :class:`BodyRefused`."""
    return _chosen(_parse(text, MAX_TOKENS), wanted)


def _chosen(document: DocumentNode, wanted: str | None) -> Operation:
    from graphql.language import FragmentDefinitionNode, OperationDefinitionNode

    operations: dict[str, OperationDefinitionNode] = {}
    fragments: dict[str, SelectionSetNode] = {}
    for definition in document.definitions:
        if isinstance(definition, OperationDefinitionNode):
            name = definition.name.value if definition.name else ""
            if name in operations:
                raise BodyRefused("two operations have the same name")
            operations[name] = definition
        elif isinstance(definition, FragmentDefinitionNode):
            if definition.name.value in fragments:
                raise BodyRefused("two fragments have the same name")
            fragments[definition.name.value] = definition.selection_set
        else:
            raise BodyRefused("the document holds more than operations and fragments")
    if "" in operations and len(operations) > 1:
        raise BodyRefused("an operation without a name must be the only one")
    if wanted:
        chosen = operations.get(wanted)
        if chosen is None:
            raise BodyRefused("no operation of the document has the name of operationName")
    elif len(operations) == 1:
        chosen = next(iter(operations.values()))
    else:
        raise BodyRefused(f"the document has {len(operations)} operations; operationName must say which")
    name = chosen.name.value if chosen.name else ""
    fields = _root_fields(chosen.selection_set, fragments)
    if max(map(len, (name, *fields))) > MAX_NAME:
        raise BodyRefused(f"a name is longer than {MAX_NAME} characters")
    return Operation(chosen.operation.value, name, fields)


def _parse(text: str, tokens: int) -> DocumentNode:
    from graphql import GraphQLError, parse

    try:
        return parse(text, no_location=True, max_tokens=max(tokens, 0), allow_empty_selection_sets=False)
    except RecursionError:
        raise BodyRefused("the query is nested too deeply") from None
    except (GraphQLError, ValueError) as error:
        message = getattr(error, "message", "not GraphQL")
        raise BodyRefused(f"the query cannot be read: {str(message)[:200]}") from None


def _root_fields(root: SelectionSetNode, fragments: Mapping[str, SelectionSetNode]) -> tuple[str, ...]:
    """Return the names of the fields that a selection at the root asks for, fragments included, sorted.

    Whether a directive would skip one does not matter: it counts.
    """
    found, spread = _selected(root)
    fields = set(found)
    follows: dict[str, set[str]] = {}
    pending = list(spread)
    while pending:
        name = pending.pop()
        if name in follows:
            continue
        if name not in fragments:
            raise BodyRefused(f"the fragment {name[:80]} is not in the document")
        found, follows[name] = _selected(fragments[name])
        fields |= found
        pending += follows[name]
        if len(fields) > MAX_FIELDS or len(follows) > MAX_FIELDS:
            raise BodyRefused(f"more than {MAX_FIELDS} root fields or fragments")
    while follows:
        ends = [name for name, after in follows.items() if after.isdisjoint(follows)]
        if not ends:
            raise BodyRefused(f"the fragment {min(follows)[:80]} is in a circle of fragments")
        for name in ends:
            del follows[name]
    if not fields:
        raise BodyRefused("the operation selects no field")
    return tuple(sorted(fields))


def _selected(selection: SelectionSetNode) -> tuple[set[str], set[str]]:
    """Return the fields and the fragments that a selection names itself, inline fragments included."""
    from graphql.language import FieldNode, FragmentSpreadNode, InlineFragmentNode

    fields: set[str] = set()
    spread: set[str] = set()
    pending = [selection]
    while pending:
        for part in pending.pop().selections:
            if isinstance(part, FieldNode):
                fields.add(part.name.value)
            elif isinstance(part, InlineFragmentNode):
                pending.append(part.selection_set)
            elif isinstance(part, FragmentSpreadNode):
                spread.add(part.name.value)
    return fields, spread
