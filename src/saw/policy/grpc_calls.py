"""gRPC calls: their messages are not waited for, so that both sides can talk at the same time.

The name of a gRPC call is its path, and a client may go on sending for hours while it is answered (gRPC over HTTP/2, the
protocol's own description). Envoy therefore sends such a request on without collecting its body first, and a decision on it is
made as on the beginning of a long body: whatever has to read a body (GraphQL, JSON-RPC, MCP, a push, a model's name) refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping

CONTENT_TYPE = "application/grpc"
"""How the content type of every gRPC call begins. Envoy looks for exactly this; :func:`is_grpc` takes other cases as well."""

METHOD = "POST"
"""The method of every gRPC call. A request of another one is collected, whatever its content type says."""

Json = dict[str, object]


def is_grpc(headers: Mapping[str, str]) -> bool:
    """Return whether Envoy may not have collected the body; ``headers`` have names in lower case."""
    return headers.get("content-type", "").strip().lower().startswith(CONTENT_TYPE)


def goes_unread(method: str, headers: Mapping[str, str]) -> bool:
    """Return whether the request may go on while its client still sends; ``headers`` have names in lower case."""
    return method.upper() == METHOD and is_grpc(headers)


def unread_route(route: Json) -> Json:
    """Return Envoy's ``route`` (which matches every path) for gRPC calls only, and without the collecting of bodies."""
    return {
        **route,
        "match": {
            "prefix": "/",
            "headers": [
                {"name": ":method", "string_match": {"exact": METHOD}},
                {"name": "content-type", "string_match": {"prefix": CONTENT_TYPE}},
            ],
        },
        "typed_per_filter_config": {
            "envoy.filters.http.ext_authz": {
                "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
                "check_settings": {"disable_request_body_buffering": True},
            }
        },
    }
