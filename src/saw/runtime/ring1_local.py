"""Hosts that ring 1 answers itself: about its generation, its last refusals and the policy. No call to them is sent on."""

from __future__ import annotations

import msgspec

from saw.runtime.ring1_settings import (
    API,
    POLICY_CALLS,
    POLICY_HOST,
    POLICY_PREFIX,
    PROBE_HOST,
    PROBE_PATH,
    REFUSALS_PATH,
    Config,
)

SENDER = "send as matched"
FRAMES = "frames"
"""Names of the filters that act on decided calls; here nothing is decided."""


def probe_host(generation: str, *, refusals: bool = False) -> Config:
    """Return the host that tells the sandbox about ring 1; ``refusals``: a decision service is there that knows them."""
    probe: Config = {
        "match": {"path": PROBE_PATH},
        "direct_response": {"status": 200, "body": {"inline_string": generation}},
        "typed_per_filter_config": _undecided(),
    }
    recent: Config = {
        "match": {"path": REFUSALS_PATH, "headers": [{"name": ":method", "string_match": {"exact": "GET"}}]},
        "route": {"cluster": "decide", "timeout": "5s"},
        "typed_per_filter_config": _undecided(),
    }
    return {"name": "probe", "domains": [PROBE_HOST], "routes": [probe, *([recent] if refusals else [])]}


def policy_host(*before: Config) -> Config:
    """Return the host that tells the sandbox its policy and takes its requests for more; ``before`` are routes that go first.

    A tunnel to it is opened by the decision service's word like any other; what is asked inside ends here as well.
    """
    routes: list[Config] = [
        {
            "match": {"path": path, "headers": [{"name": ":method", "string_match": {"exact": method}}]},
            "route": {
                "cluster": "decide",
                "prefix_rewrite": f"{POLICY_PREFIX}{path}",
                "timeout": "25s",
                "idle_timeout": "30s",
                "max_stream_duration": {"max_stream_duration": "60s"},
            },
            "typed_per_filter_config": _undecided(),
        }
        for method, path in POLICY_CALLS
    ]
    calls = ", ".join(f"{method} {path}" for method, path in POLICY_CALLS)
    body = msgspec.json.encode({"error": "not_found", "message": "there is no such call", "cure": calls}).decode()
    missing: Config = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 404, "body": {"inline_string": body}},
        "response_headers_to_add": [_json_type()],
        "typed_per_filter_config": _undecided(),
    }
    return {
        "name": "policy",
        "domains": [POLICY_HOST, f"{POLICY_HOST}:80", f"{POLICY_HOST}:443"],
        "routes": [*before, *routes, missing],
    }


def _json_type() -> Config:
    return {
        "header": {"key": "content-type", "value": "application/json"},
        "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
    }


def _undecided() -> Config:
    """Return what keeps a route from being decided on: what it answers stays in the workspace."""
    return {
        "envoy.filters.http.ext_authz": {
            "@type": f"{API}.extensions.filters.http.ext_authz.v3.ExtAuthzPerRoute",
            "disabled": True,
        },
        **{
            name: {"@type": f"{API}.extensions.filters.http.lua.v3.LuaPerRoute", "disabled": True}
            for name in (SENDER, FRAMES)
        },
    }
