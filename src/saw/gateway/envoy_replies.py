"""What ring 2's Envoy says on its own, in the form of a refusal, so that an agent can act on it."""

from __future__ import annotations

from saw.gateway.envoy_parts import LOCAL_MARK, NO_ANSWER, NOT_SENT, TYPE, Json

REFUSAL: Json = {"error": "policy_denied", "layer": "ring2"}
FAILURE: Json = {"error": "service_failed", "layer": "ring2"}
ASK_AGAIN = "try again shortly; if it lasts, ask the platform team about saw-gatekeeper"
LOOK_FIRST = "it may have been carried out: look what came of it before it is sent again"


def local_replies(*, inner: bool = False) -> Json:
    """Return what Envoy says on its own, in the form of a refusal: for want of a gatekeeper, or of the service itself.

    Calls that never left are marked, so that the filter that reads answers can tell them from those without an answer. ``inner``:
    the listener of the gatekeepers, where every answer of Envoy's own is.
    """
    mark: Json = {"headers_to_add": [_mark()]}
    always: Json = mark if inner else {}
    ended = _said(
        REFUSAL, "gatekeeper_unavailable", "the gatekeeper that had the call ended, and nothing was sent", ASK_AGAIN
    )
    mappers: list[Json] = [
        {
            "filter": _expression("response.code_details == 'ext_authz_error'"),
            **always,
            **_said(
                REFUSAL, "gatekeeper_unavailable", "the gatekeeper did not answer, so nothing is allowed", ASK_AGAIN
            ),
        },
        # The gatekeepers' own sockets are behind clusters too, and are no services: nothing that they have not sent on was sent.
        {
            "filter": _both(_flagged(NOT_SENT - {"UAEX"}), _expression(_own("mcp", "review", "postgres"))),
            **mark,
            **ended,
        },
        {"filter": _both(_flagged(NO_ANSWER), _expression(_own("review", "postgres"))), **always, **ended},
        {
            "filter": _flagged(NOT_SENT - {"UAEX"}),
            **mark,
            **_said(
                FAILURE,
                "service_unreachable",
                "the call is allowed, and was not sent: no connection, or a certificate that is not accepted",
                "try again later; if it lasts, ask whoever runs the service, then the platform team",
            ),
        },
    ]
    unanswered = _said(
        FAILURE,
        "service_gave_no_answer",
        "the call is allowed, and was sent: the service ended the connection before it answered, or took too long",
        LOOK_FIRST,
    )
    # A stream that is idle for too long is answered 504, or 408 where the client was to send more.
    missing = (_flagged(NO_ANSWER), _both(_status("EQ", 504), _flagged(frozenset({"SI"}))))
    mappers += [{"filter": each, **always, **unanswered} for each in missing]
    if inner:
        mappers.append({"filter": _status("GE", 100), **mark})
    return {"mappers": mappers}


def _said(error: Json, reason: str, detail: str, step: str) -> Json:
    body = {
        **error,
        "reason": reason,
        "detail": detail,
        "envoy": "%RESPONSE_CODE_DETAILS%",
        "host": "%REQ(:AUTHORITY)%",
        "method": "%REQ(:METHOD)%",
        "path": "%PATH(NQ)%",
        "request_id": "%REQ(X-REQUEST-ID)%",
        "next_steps": [step],
    }
    return {"body_format_override": {"json_format": body, "content_type": "application/json"}}


def _own(*names: str) -> str:
    """Return whether the call went to one of these clusters of a gatekeeper, whatever its number."""
    return " || ".join(f"xds.cluster_name.startsWith('{name}')" for name in names)


def _expression(text: str) -> Json:
    return {
        "extension_filter": {
            "name": "envoy.access_loggers.extension_filters.cel",
            "typed_config": {
                "@type": TYPE + "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                "expression": text,
            },
        }
    }


def _flagged(flags: frozenset[str]) -> Json:
    return {"response_flag_filter": {"flags": sorted(flags)}}


def _status(op: str, status: int) -> Json:
    return {
        "status_code_filter": {
            "comparison": {"op": op, "value": {"default_value": status, "runtime_key": "ring2.local"}}
        }
    }


def _both(*filters: Json) -> Json:
    return {"and_filter": {"filters": list(filters)}}


def _mark() -> Json:
    """Return the header that says that Envoy itself answered, and why."""
    return {
        "header": {"key": LOCAL_MARK, "value": "%RESPONSE_FLAGS%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
