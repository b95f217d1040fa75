"""What ring 2's Envoy says on its own, in the form of a refusal, so that an agent can act on it."""

from __future__ import annotations

from saw.gateway.envoy_parts import LOCAL_MARK, NO_ANSWER, NOT_SENT, TYPE, Json

REFUSAL: Json = {"error": "policy_denied", "layer": "ring2"}
FAILURE: Json = {"error": "service_failed", "layer": "ring2"}


def local_replies() -> Json:
    """Return what Envoy says on its own, in the form of a refusal: for want of a gatekeeper, or of the service itself."""

    def said(error: Json, reason: str, detail: str, step: str) -> Json:
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

    unasked = "response.code_details == 'ext_authz_error'"
    return {
        "mappers": [
            {
                "filter": {
                    "extension_filter": {
                        "name": "envoy.access_loggers.extension_filters.cel",
                        "typed_config": {
                            "@type": TYPE + "envoy.extensions.access_loggers.filters.cel.v3.ExpressionFilter",
                            "expression": unasked,
                        },
                    }
                },
                **said(
                    REFUSAL,
                    "gatekeeper_unavailable",
                    "the gatekeeper did not answer, so nothing is allowed",
                    "try again shortly; if it lasts, ask the platform team about saw-gatekeeper",
                ),
            },
            {
                # Marked, so that the filter that reads answers can tell a call that never left from one without an answer.
                "filter": _flagged(NOT_SENT - {"UAEX"}),
                "headers_to_add": [marked()],
                **said(
                    FAILURE,
                    "service_unreachable",
                    "the call is allowed, and was not sent: no connection, or a certificate that is not accepted",
                    "try again later; if it lasts, ask whoever runs the service, then the platform team",
                ),
            },
            {
                "filter": _flagged(NO_ANSWER),
                **said(
                    FAILURE,
                    "service_gave_no_answer",
                    "the call is allowed, and was sent: the service ended the connection before it answered, or took too long",
                    "it may have been carried out: look what came of it before it is sent again",
                ),
            },
        ]
    }


def _flagged(flags: frozenset[str]) -> Json:
    return {"response_flag_filter": {"flags": sorted(flags)}}


def marked() -> Json:
    """Return the header that says that Envoy itself answered, and why."""
    return {
        "header": {"key": LOCAL_MARK, "value": "%RESPONSE_FLAGS%"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }
