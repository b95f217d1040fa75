"""Ring 1's listeners: what happens to a connection of the sandbox, and to each request on it."""

from __future__ import annotations

from pathlib import Path

import msgspec

from saw.policy.databases import UPGRADE
from saw.policy.grpc_calls import unread_route
from saw.policy.seen_body import COLLECTED, LONGEST
from saw.policy.websocket import FRAME_FILTER
from saw.runtime.ring1_local import FRAMES, SENDER, policy_host, probe_host
from saw.runtime.ring1_settings import (
    ANSWER_AUTHORITY,
    ANSWER_PATH,
    API,
    FACT_CONNECT,
    FACT_PATH,
    FACT_SNI,
    FACT_SOURCE,
    FACT_STAGE,
    FACT_UPGRADE,
    POLICY_HEADERS,
    STATE_AUTHORITY,
    STATE_SOURCE,
    Config,
    Ring1,
    removed,
)

_ASK = f"""
function envoy_on_request(handle)
  handle:headers():replace(":method", "POST")
  handle:headers():replace(":path", "/")
  handle:headers():replace("{FACT_STAGE}", "connect")
end
"""
_RESTORE = """
function envoy_on_request(handle)
  handle:headers():replace(":method", "CONNECT")
  handle:headers():remove(":path")
end
"""
_NO_TUNNEL = (
    '{"error": "policy_denied", "layer": "ring1", "reason": "method_or_path_not_allowed", '
    '"detail": "a tunnel inside a tunnel is never opened"}'
)
_SEND_AS_MATCHED = f"""
function envoy_on_request(handle)
  if handle:headers():get(":method") == "CONNECT" then
    handle:respond({{[":status"] = "403", ["content-type"] = "application/json"}}, '{_NO_TUNNEL}')
    return
  end
  local path = handle:headers():get("{ANSWER_PATH}")
  if path == nil or handle:headers():get("{ANSWER_AUTHORITY}") == nil then
    handle:respond({{[":status"] = "503"}}, "")
  else
    handle:headers():replace(":path", path)
  end
end
"""
_EVERYTHING: tuple[Config, ...] = ({"connect_matcher": {}}, {"prefix": "/"})
_NO_ANSWER = "service_gave_no_answer"
_UNLIMITED = "0s"


def listeners(settings: Ring1, generation: str, directory: Path) -> list[Config]:
    """Return both listeners of the generation named by its policy digest, with the leaf of ``directory``."""
    return [_sandbox_listener(settings, generation), _inspect_listener(settings, generation, directory)]


def closed_listeners(settings: Ring1) -> list[Config]:
    """Return the listener of a workspace that has no policy yet: it answers and refuses everything."""
    hcm = _connection_manager("sandbox", "closed")
    body = refusal("not_released", "no verified policy is loaded in this workspace yet")
    hcm["route_config"] = {
        "name": "closed",
        "virtual_hosts": [
            probe_host("closed"),
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    {"match": match, "direct_response": {"status": 403, "body": {"inline_string": body}}}
                    for match in _EVERYTHING
                ],
            },
        ],
    }
    hcm["http_filters"] = [_router()]
    return [_listener(settings, [_chain(hcm)])]


def refusal(reason: str, detail: str, **fields: object) -> str:
    """Return the body of a refusal that Envoy itself gives; ``fields`` replace the defaults."""
    return msgspec.json.encode(
        {"error": "policy_denied", "layer": "ring1", "reason": reason, "detail": detail, **fields}
    ).decode()


def _sandbox_listener(settings: Ring1, generation: str) -> Config:
    hcm = _connection_manager("sandbox", generation)
    hcm["early_header_mutation_extensions"] = _facts(
        {
            FACT_STAGE: "plain",
            FACT_PATH: "%REQ(:PATH)%",
            FACT_SOURCE: "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
            FACT_UPGRADE: "%REQ(UPGRADE)%",
        }
    )
    hcm["local_reply_config"] = _local_replies(absolute=True)
    hcm["http_filters"] = _decided_filters(settings)
    # On CONNECT the decision service is asked with an ordinary method: Envoy's client would otherwise open a tunnel to it.
    hcm["upgrade_configs"] = [
        {"upgrade_type": "websocket"},
        # A session has filters of its own: nothing collects its bytes, and no frames are looked for in them.
        {
            "upgrade_type": UPGRADE,
            "filters": [_authorize(settings, body=False), _script(SENDER, _SEND_AS_MATCHED), _router()],
        },
        {
            "upgrade_type": "CONNECT",
            "filters": [
                _script("ask", _ASK),
                _authorize(settings, body=False),
                _script("restore", _RESTORE),
                {
                    "name": "envoy.filters.http.set_filter_state",
                    "typed_config": {
                        "@type": f"{API}.extensions.filters.http.set_filter_state.v3.Config",
                        "on_request_headers": [
                            _state(STATE_AUTHORITY, "%REQ(:AUTHORITY)%"),
                            _state(STATE_SOURCE, "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%"),
                        ],
                    },
                },
                _router(),
            ],
        },
    ]
    hcm["route_config"] = {
        "name": f"sandbox-{generation}",
        "virtual_hosts": [
            probe_host(generation, refusals=True),
            policy_host(_to_tunnel()),
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    _to_tunnel(),
                    unread_route(_to_ring2()),
                    _to_ring2(),
                ],
            },
        ],
    }
    return _listener(settings, [_chain(hcm)])


def _inspect_listener(settings: Ring1, generation: str, directory: Path) -> Config:
    return {
        "name": "inspect",
        "internal_listener": {},
        "per_connection_buffer_limit_bytes": 2 * LONGEST,
        "listener_filters": [
            {
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": {"@type": f"{API}.extensions.filters.listener.tls_inspector.v3.TlsInspector"},
            }
        ],
        "listener_filters_timeout": "10s",
        "filter_chains": [
            {
                **_chain(_tunnelled(settings, generation, "tls")),
                "filter_chain_match": {"transport_protocol": "tls"},
                "transport_socket_connect_timeout": "10s",
                "transport_socket": {
                    "name": "envoy.transport_sockets.tls",
                    "typed_config": {
                        "@type": f"{API}.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                        "common_tls_context": {
                            "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                            "alpn_protocols": ["h2", "http/1.1"],
                            "tls_certificates": [
                                {
                                    "certificate_chain": {"filename": str(directory / "leaf.pem")},
                                    "private_key": {"filename": str(directory / "leaf.key")},
                                }
                            ],
                        },
                    },
                },
            },
            # Some clients tunnel plain HTTP as well; anything that is neither TLS nor HTTP ends here with 400.
            {
                **_chain(_tunnelled(settings, generation, "tunnel")),
                "filter_chain_match": {"transport_protocol": "raw_buffer"},
            },
        ],
    }


def _tunnelled(settings: Ring1, generation: str, stage: str) -> Config:
    hcm = _connection_manager(f"inspect-{stage}", generation)
    if stage == "tls":
        hcm["codec_type"] = "AUTO"
        hcm["http2_protocol_options"] = {"max_concurrent_streams": 100, "allow_connect": True}
    hcm["early_header_mutation_extensions"] = _facts(
        {
            FACT_STAGE: stage,
            FACT_PATH: "%REQ(:PATH)%",
            FACT_SOURCE: f"%FILTER_STATE({STATE_SOURCE}:PLAIN)%",
            FACT_CONNECT: f"%FILTER_STATE({STATE_AUTHORITY}:PLAIN)%",
            FACT_SNI: "%REQUESTED_SERVER_NAME%",
            FACT_UPGRADE: "%REQ(UPGRADE)%",
        }
    )
    hcm["http_filters"] = _decided_filters(settings)
    hcm["upgrade_configs"] = [{"upgrade_type": "websocket"}]
    hcm["route_config"] = {
        "name": f"inspect-{stage}-{generation}",
        "virtual_hosts": [
            policy_host(),
            {"name": "all", "domains": ["*"], "routes": [unread_route(_to_ring2()), _to_ring2()]},
        ],
    }
    return hcm


def _listener(settings: Ring1, chains: list[Config]) -> Config:
    return {
        "name": "sandbox",
        "address": {"socket_address": {"address": settings.listen_address, "port_value": settings.listen_port}},
        "per_connection_buffer_limit_bytes": 2 * LONGEST,
        "filter_chains": chains,
    }


def _chain(hcm: Config) -> Config:
    return {"filters": [{"name": "envoy.filters.network.http_connection_manager", "typed_config": hcm}]}


def _connection_manager(name: str, generation: str) -> Config:
    return {
        "@type": f"{API}.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": f"{name}-{generation[:12]}",
        "codec_type": "HTTP1",
        "use_remote_address": True,
        "skip_xff_append": True,
        "internal_address_config": {"cidr_ranges": []},
        "always_set_request_id_in_response": True,
        "server_header_transformation": "PASS_THROUGH",
        # The path is made canonical once, by saw-decide, which must see what was sent to refuse what is not canonical;
        # the route then sends exactly the path that was matched.
        "normalize_path": False,
        "merge_slashes": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "common_http_protocol_options": {
            "headers_with_underscores_action": "REJECT_REQUEST",
            "idle_timeout": "300s",
            "max_headers_count": 100,
        },
        # Widespread clients (Python's before 3.12) open tunnels with HTTP/1.0.
        "http_protocol_options": {"accept_http_10": True},
        "request_headers_timeout": "15s",
        "stream_idle_timeout": "900s",
        "max_request_headers_kb": 64,
        "delayed_close_timeout": "1s",
        "drain_timeout": "0.1s",
        "local_reply_config": _local_replies(),
    }


def _local_replies(*, absolute: bool = False) -> Config:
    """Give every answer that Envoy makes on its own the same body as the decision service's.

    ``absolute``: a 403 that the decision service did not give (flag UAEX) is the codec's, for an ``https:`` address in absolute
    form without TLS, which no filter ever sees.
    """

    def mapper(status: int, reason: str, detail: str, step: str, *flags: str) -> Config:
        test: Config = {
            "status_code_filter": {
                "comparison": {"op": "EQ", "value": {"default_value": status, "runtime_key": "ring1.reply"}}
            }
        }
        if flags:
            test = {"and_filter": {"filters": [test, {"response_flag_filter": {"flags": list(flags)}}]}}
        return {
            "filter": test,
            "body_format_override": {
                "json_format": {
                    "error": "service_failed" if reason == _NO_ANSWER else "policy_denied",
                    "layer": "ring1",
                    "reason": reason,
                    "detail": detail,
                    "envoy": "%RESPONSE_CODE_DETAILS% %RESPONSE_FLAGS%",
                    "method": "%REQ(:METHOD)%",
                    "host": "%REQ(:AUTHORITY)%",
                    "request_id": "%REQ(X-REQUEST-ID)%",
                    "next_steps": [step],
                }
            },
        }

    unanswered = (
        _NO_ANSWER,
        "the call was sent to ring 2: the way ended before an answer came, or it took too long",
        "it may have been carried out: look what came of it before it is sent again",
    )
    of_service: Config = {"filter": {"response_flag_filter": {"flags": ["UAEX"]}}}
    no_tunnel = mapper(403, "method_or_path_not_allowed", "an https address in absolute form would travel in plain text",
                       "open a tunnel with CONNECT host:443 and speak TLS in it")  # fmt: skip
    return {
        "mappers": [
            mapper(503, "gatekeeper_stale", "the decision service of ring 1 does not answer",
                   "try again shortly; if it lasts, ask the platform team about saw-decide in this workspace", "UAEX"),
            mapper(503, *unanswered, "UC", "UR", "URX"),
            mapper(502, *unanswered, "UPE"),
            mapper(504, *unanswered, "SI", "UT"),
            mapper(503, "no_identity", "ring 2 cannot be reached with this workspace's identity: none was issued yet, it "
                   "ended, or the perimeter is away", "wait for the next attestation; if it lasts, ask the platform team"),
            mapper(400, "not_canonical", "the request is not well-formed HTTP", "send it as HTTP/1.1 or HTTP/2 has it"),
            *([of_service, no_tunnel] if absolute else []),
        ]
    }  # fmt: skip


def _facts(values: dict[str, str]) -> list[Config]:
    """Remove what only we may say, then state the facts; this runs before anything else reads the request."""
    removals: list[Config] = [
        removed(prefix) for prefix in ("x-saw-", "x-envoy-", "x-request-id", "x-forwarded-for", "x-forwarded-proto")
    ]
    return [
        {
            "name": "envoy.http.early_header_mutation.header_mutation",
            "typed_config": {
                "@type": f"{API}.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
                "mutations": [*removals, *(_set(name, value) for name, value in values.items())],
            },
        }
    ]


def _decided_filters(settings: Ring1) -> list[Config]:
    return [
        _authorize(settings, body=True),
        _script(SENDER, _SEND_AS_MATCHED),
        _script(FRAMES, FRAME_FILTER),
        _router(),
    ]


def _set(header: str, value: str) -> Config:
    return {"append": {"header": {"key": header, "value": value}, "append_action": "OVERWRITE_IF_EXISTS_OR_ADD"}}


def _script(name: str, source: str) -> Config:
    return {
        "name": name,
        "typed_config": {
            "@type": f"{API}.extensions.filters.http.lua.v3.Lua",
            "default_source_code": {"inline_string": source},
        },
    }


def _authorize(settings: Ring1, *, body: bool) -> Config:
    config: Config = {
        "@type": f"{API}.extensions.filters.http.ext_authz.v3.ExtAuthz",
        "transport_api_version": "V3",
        "failure_mode_allow": False,
        # 503 with the flag UAEX is how the local reply tells "no decision" from a refusal that was decided.
        "status_on_error": {"code": "ServiceUnavailable"},
        "allowed_headers": {
            "patterns": [
                {"prefix": "x-saw-i-"},
                *({"exact": name} for name in ("x-request-id", *POLICY_HEADERS)),
            ]
        },
        "http_service": {
            "server_uri": {"uri": "http://decide", "cluster": "decide", "timeout": f"{settings.decide_timeout}s"},
            "path_override": "/decide",
            "authorization_response": {
                "allowed_upstream_headers": {"patterns": [{"prefix": "x-saw-"}]},
                "allowed_client_headers": {"patterns": [{"exact": "content-type"}]},
            },
        },
    }
    if body:
        config |= COLLECTED
    return {"name": "envoy.filters.http.ext_authz", "typed_config": config}


def _state(key: str, value: str) -> Config:
    # Hashable, so that a tunnel opened for one client and address is never lent to another.
    return {
        "object_key": key,
        "factory_key": "envoy.hashable_string",
        "format_string": {"text_format_source": {"inline_string": value}},
        "shared_with_upstream": "ONCE",
    }


def _to_tunnel() -> Config:
    return {
        "match": {"connect_matcher": {}},
        "route": {
            "cluster": "tunnel",
            "timeout": _UNLIMITED,
            "idle_timeout": "3600s",
            "upgrade_configs": [{"upgrade_type": "CONNECT", "connect_config": {}}],
        },
    }


def _to_ring2() -> Config:
    return {
        "match": {"prefix": "/"},
        "route": {
            "cluster": "ring2",
            "timeout": _UNLIMITED,
            "idle_timeout": "900s",
            "host_rewrite_header": ANSWER_AUTHORITY,
        },
    }


def _router() -> Config:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {
            "@type": f"{API}.extensions.filters.http.router.v3.Router",
            "suppress_envoy_headers": True,
        },
    }
