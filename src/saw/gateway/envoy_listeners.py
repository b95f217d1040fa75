"""The listeners of ring 2's Envoy: what a workspace may speak to, and what is asked before anything passes.

Without the gatekeeper's answer no route leads anywhere: the only other route is a refusal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from saw.gateway.edit_filter import EDIT_FILTER
from saw.gateway.envoy_parts import (
    ANSWER_HEADERS,
    AUTHZ_TIMEOUT,
    BROKER_PORT,
    CONNECTION_BUFFER,
    HOP_HEADERS,
    HTTP,
    LOCAL_MARK,
    NETWORK,
    RING2_PORT,
    SEND_SEAT,
    STREAM_SECONDS,
    TLS,
    TYPE,
    Json,
    Seat,
    file_of,
    file_source,
    pipe,
    resource,
    socket_address,
)
from saw.gateway.envoy_replies import REFUSAL, local_replies
from saw.gateway.record_filter import record_filter
from saw.gateway.redaction import REDACTION_FILTER
from saw.gateway.replicas import MOST_REPLICAS, home, named
from saw.gateway.streams import Standing
from saw.gateway.usage_filter import usage_filter
from saw.policy.databases import UPGRADE
from saw.policy.grpc_calls import unread_route
from saw.policy.seen_body import COLLECTED
from saw.policy.websocket import FRAME_FILTER, PROTOCOL

_LISTENER = "envoy.config.listener.v3.Listener"
_UNASKED = {
    "retry_on": "connect-failure,reset-before-request",
    "num_retries": MOST_REPLICAS - 1,
    # The longest pause is also the longest time of one try, in which nothing changes.
    "retry_back_off": {"base_interval": "0.01s", "max_interval": AUTHZ_TIMEOUT},
    "retry_priority": {
        "name": "envoy.retry_priorities.previous_priorities",
        "typed_config": {
            "@type": TYPE + "envoy.extensions.retry.priority.previous_priorities.v3.PreviousPrioritiesConfig",
            "update_frequency": 1,
        },
    },
}
ACCESS_FIELDS = {
    "time": "%START_TIME%",
    "request_id": "%REQ(X-REQUEST-ID)%",
    "peer": "%DOWNSTREAM_PEER_URI_SAN%",
    "method": "%REQ(:METHOD)%",
    "authority": "%REQ(:AUTHORITY)%",
    "path": "%PATH(NQ)%",
    "status": "%RESPONSE_CODE%",
    "details": "%RESPONSE_CODE_DETAILS%",
    "flags": "%RESPONSE_FLAGS%",
    "upstream": "%UPSTREAM_HOST%",
    "bytes_in": "%BYTES_RECEIVED%",
    "bytes_out": "%BYTES_SENT%",
    "duration_ms": "%DURATION%",
}


def listeners(
    version: str,
    *,
    numbers: Iterable[int],
    credential_headers: Iterable[str],
    xds_dir: Path,
    ingress_of: Callable[[int], str | None],
    send_sockets: Sequence[Path],
    reviews: bool = False,
    streams: Mapping[int, Standing] | None = None,
    known: dict[object, str] | None = None,
) -> str:
    """Return the LDS file: two or three listeners for each workspace number, and one for each gatekeeper that brings calls.

    ``credential_headers`` are the names that the loaded releases' credentials use; no other header of the gatekeeper's
    answer is ever copied into a request. ``ingress_of``: the address of a
    workspace's ingress, None where it has none. ``send_sockets``: where each gatekeeper brings calls. ``reviews``: calls
    that wait for a person have a service.
    ``streams``: the workspaces that may open WebSockets or gRPC calls now, and a word for what that rests on. When the word
    changes, Envoy replaces the listener, which ends what is open. ``known``: texts of the last time, kept from call to call, so
    that of a thousand workspaces only those are written out anew that are not as they were.
    """
    names = tuple(sorted({"authorization", *(name.lower() for name in credential_headers)} - set(HOP_HEADERS)))
    before: Mapping[object, str] = dict(known or {})
    texts: dict[object, str] = {}
    replicas = len(send_sockets)
    for seat in map(Seat, sorted(set(numbers))):
        standing, address = (streams or {}).get(seat.number), ingress_of(seat.number)
        key = (seat, names, xds_dir, address, reviews, standing, replicas)
        texts[key] = before.get(key) or ",\n".join(
            resource(_LISTENER, item)
            for item in _of_workspace(
                seat, names, xds_dir, address, reviews=reviews, standing=standing, replicas=replicas
            )
        )
    if known is not None:
        known.clear()
        known.update(texts)
    brought = (_approved(path, names, place, replicas) for place, path in enumerate(send_sockets, 1))
    return file_of(version, [*texts.values(), *(resource(_LISTENER, item) for item in brought)])


def _of_workspace(
    seat: Seat,
    names: tuple[str, ...],
    xds_dir: Path,
    ingress: str | None,
    *,
    reviews: bool,
    standing: Standing | None,
    replicas: int,
) -> Iterator[Json]:
    yield _governed(seat, names, xds_dir, reviews=reviews, standing=standing, replicas=replicas)
    yield _pass_through(f"broker-{seat.number}", seat.gateway, BROKER_PORT, "broker")
    if ingress is not None:
        yield _pass_through(f"ingress-{seat.number}", ingress, seat.ingress_port, f"ssh-{seat.number}")


def _pass_through(name: str, address: str, port: int, cluster: str) -> Json:
    proxy: Json = {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": NETWORK + "tcp_proxy.v3.TcpProxy",
            "stat_prefix": name,
            "cluster": cluster,
            "idle_timeout": "0s",
        },
    }
    return _listener(name, address, port, {"filters": [proxy]})


def _listener(name: str, address: str, port: int, chain: Json) -> Json:
    return {
        "name": name,
        "address": socket_address(address, port),
        "freebind": True,
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER,
        "filter_chains": [chain],
    }


def _governed(
    seat: Seat,
    credential_headers: tuple[str, ...],
    xds_dir: Path,
    *,
    reviews: bool,
    standing: Standing | None,
    replicas: int,
) -> Json:
    own = home(seat.number, replicas)
    asked = named("gatekeeper", own)
    websockets = standing is not None and standing.websockets
    sessions = standing is not None and standing.sessions

    def secret(name: str) -> Json:
        return {"name": name, "sds_config": file_source(xds_dir / f"sds-{name}.json")}

    tls: Json = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": TLS + "DownstreamTlsContext",
            "require_client_certificate": True,
            "disable_stateless_session_resumption": True,
            "disable_stateful_session_resumption": True,
            "common_tls_context": {
                "alpn_protocols": ["h2", "http/1.1"],
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3"},
                "tls_certificate_sds_secret_configs": [secret("server")],
                "validation_context_sds_secret_config": secret("workspaces"),
            },
        },
    }
    connection_manager: Json = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            **_connection(f"ring2-{seat.number}", str(seat.number)),
            "codec_type": "AUTO",
            "use_remote_address": True,
            "skip_xff_append": True,
            # No caller counts as internal, so nothing that Envoy lets internal callers set is taken from a workspace.
            "internal_address_config": {"cidr_ranges": [{"address_prefix": "255.255.255.255", "prefix_len": 32}]},
            "forward_client_cert_details": "SANITIZE_SET",
            "set_current_client_cert_details": {"cert": True},
            "common_http_protocol_options": {
                "idle_timeout": "900s",
                "headers_with_underscores_action": "REJECT_REQUEST",
            },
            "http2_protocol_options": {
                "max_concurrent_streams": 128,
                **({"allow_connect": True} if websockets or sessions else {}),
            },
            "local_reply_config": local_replies(),
            "http_filters": [
                _authorisation(credential_headers, asked, body=True, others=replicas > 1),
                # Answers pass the filters from the last one on: what is kept has no credential in it any more.
                _script("answers that are kept", record_filter(asked)),
                _script("credentials that come back", REDACTION_FILTER),
                _script("models that others stand for", EDIT_FILTER),
                _script("what model services used", usage_filter(drop_mark=True, gatekeepers=_told(own, replicas))),
                # The name of what open calls rest on is part of the filter: when it changes, the listener does.
                *([_script(f"frames {standing.rests_on}", FRAME_FILTER)] if standing else []),
                _router(),
            ],
            "route_config": {
                **_routes(
                    reviews=reviews,
                    unread=standing is not None,
                    streams=websockets,
                    sessions=sessions,
                    replicas=replicas,
                ),
                "response_headers_to_remove": [LOCAL_MARK],
            },
            # Envoy asks before the gatekeeper is asked, so it cannot tell routes apart here: what may not be opened, the
            # gatekeeper refuses, and its answer for any other call leads to no route that this matters for.
            **(
                {"upgrade_configs": upgrades}
                if (upgrades := _upgrades(credential_headers, asked, standing, others=replicas > 1))
                else {}
            ),
        },
    }
    chain: Json = {"transport_socket": tls, "transport_socket_connect_timeout": "10s", "filters": [connection_manager]}
    return _listener(f"ring2-{seat.number}", seat.gateway, RING2_PORT, chain)


def _approved(path: Path, credential_headers: tuple[str, ...], replica: int, replicas: int) -> Json:
    """Return the listener on which a gatekeeper brings approved calls, and those whose answers it reads, each with a ticket.

    From here on such a call goes the way of every other one: the gatekeeper that
    has the ticket, and no other, is asked, its answer names the address and
    the credential. Envoy says when it was Envoy that answered, so that "never sent" is told from "no answer".
    """
    name = named("ring2-approved", replica)
    connection_manager: Json = {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            **_connection(name, SEND_SEAT),
            "codec_type": "HTTP1",
            "use_remote_address": True,
            "skip_xff_append": True,
            "common_http_protocol_options": {"idle_timeout": "900s"},
            "local_reply_config": local_replies(inner=True),
            "http_filters": [
                _authorisation(
                    credential_headers, named("alone", replica) if replicas > 1 else "gatekeeper", body=False
                ),
                # Answers pass the filters from the last one on: what is kept has no credential in it any more.
                _script("answers that are kept", record_filter(named("gatekeeper", replica))),
                _script("credentials that come back", REDACTION_FILTER),
                _script("models that others stand for", EDIT_FILTER),
                _script(
                    "what model services used", usage_filter(drop_mark=False, gatekeepers=_told(replica, replicas))
                ),
                _router(),
            ],
            "route_config": {**_routes(reviews=False, answers=False), "response_headers_to_remove": [LOCAL_MARK]},
        },
    }
    return {
        "name": name,
        "address": pipe(path, 0o660),
        "per_connection_buffer_limit_bytes": CONNECTION_BUFFER,
        "filter_chains": [{"filters": [connection_manager]}],
    }


def _told(first: int, replicas: int) -> list[str]:
    """Return the clusters that are told the end of a call, that of the gatekeeper ``first`` before the others."""
    return [named("gatekeeper", (first - 1 + step) % replicas + 1) for step in range(replicas)]


def _connection(name: str, place: str) -> Json:
    """Return what all listeners for calls have in common; ``place`` is the workspace number, or what stands for one."""
    return {
        "@type": NETWORK + "http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        # The gatekeeper is the one judge of a path's form: it sees the bytes that would be sent on and refuses
        # every path that is not canonical, so Envoy must not tidy it up first.
        "normalize_path": False,
        "path_with_escaped_slashes_action": "KEEP_UNCHANGED",
        "server_header_transformation": "PASS_THROUGH",
        "stream_idle_timeout": "900s",
        "request_headers_timeout": "10s",
        "early_header_mutation_extensions": [_early(place)],
        "access_log": [
            {
                "name": "envoy.access_loggers.stdout",
                "typed_config": {
                    "@type": TYPE + "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog",
                    "log_format": {"json_format": {**ACCESS_FIELDS, "workspace_number": place}},
                },
            }
        ],
    }


def _script(name: str, source: str) -> Json:
    return {
        "name": name,
        "typed_config": {"@type": HTTP + "lua.v3.Lua", "default_source_code": {"inline_string": source}},
    }


def _router() -> Json:
    return {
        "name": "envoy.filters.http.router",
        "typed_config": {"@type": HTTP + "router.v3.Router", "suppress_envoy_headers": True},
    }


def _early(place: str) -> Json:
    """Overwrite what the gatekeeper relies on, and drop what only it may say, before anything else looks."""

    def put(key: str, value: str) -> Json:
        return {
            "append": {
                "header": {"key": key, "value": value},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
                "keep_empty_value": True,
            }
        }

    removed: list[Json] = [{"remove": name} for name in ANSWER_HEADERS]
    return {
        "name": "envoy.http.early_header_mutation.header_mutation",
        "typed_config": {
            "@type": TYPE + "envoy.extensions.http.early_header_mutation.header_mutation.v3.HeaderMutation",
            "mutations": [
                *removed,
                {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
                put("x-saw-listener", place),
                put("x-saw-target", "%REQ(:PATH)%"),
                put("x-saw-method", "%REQ(:METHOD)%"),
                put("x-saw-upgrade", "%REQ(UPGRADE)%"),
            ],
        },
    }


def _authorisation(credential_headers: tuple[str, ...], asked: str, *, body: bool, others: bool = False) -> Json:
    """Return the filter that has the cluster ``asked`` decide; ``others``: there are gatekeepers that stand by.

    Another one is asked only when certainly nobody was: there was no connection, or it ended before the question was sent.
    Whoever has the question may have decided, charged and recorded, so a second question would do that twice.
    """

    def exactly(names: Iterable[str]) -> Json:
        return {"patterns": [{"exact": name, "ignore_case": True} for name in names]}

    return {
        "name": "envoy.filters.http.ext_authz",
        "typed_config": {
            "@type": HTTP + "ext_authz.v3.ExtAuthz",
            "transport_api_version": "V3",
            "http_service": {
                "server_uri": {"uri": "http://gatekeeper", "cluster": asked, "timeout": AUTHZ_TIMEOUT},
                **({"retry_policy": _UNASKED} if others else {}),
                "authorization_response": {
                    "allowed_upstream_headers": exactly([*ANSWER_HEADERS, *credential_headers]),
                    "allowed_client_headers": exactly(["content-type", "retry-after", "x-request-id"]),
                },
            },
            "allowed_headers": {"patterns": [{"safe_regex": {"regex": ".*"}}]},
            "disallowed_headers": exactly(HOP_HEADERS),
            **(COLLECTED if body else {}),
            "failure_mode_allow": False,
            "status_on_error": {"code": "Forbidden"},
            "clear_route_cache": True,
            "validate_mutations": True,
        },
    }


def _upgrades(
    credential_headers: tuple[str, ...], asked: str, standing: Standing | None, *, others: bool
) -> list[Json]:
    """Return what a client may switch to. A session has filters of its own: its bytes are not read, and not waited for."""
    found: list[Json] = []
    if standing is not None and standing.websockets:
        found.append({"upgrade_type": PROTOCOL})
    if standing is not None and standing.sessions:
        filters = [_authorisation(credential_headers, asked, body=False, others=others), _router()]
        found.append({"upgrade_type": UPGRADE, "filters": filters})
    return found


def _routes(
    *,
    reviews: bool,
    unread: bool = False,
    streams: bool = False,
    sessions: bool = False,
    answers: bool = True,
    replicas: int = 1,
) -> Json:
    places = range(1, replicas + 1)

    def onward(transport: str, cluster: str, **more: object) -> Json:
        return {
            "match": {"prefix": "/", "headers": [{"name": "x-saw-transport", "string_match": {"exact": transport}}]},
            "route": {
                "cluster": cluster,
                "host_rewrite_header": "x-saw-authority",
                # Only the path: Envoy keeps the query as it came.
                "path_rewrite": "%REQ(X-SAW-PATH)%",
                "timeout": "0s",
                "idle_timeout": "900s",
                **more,
            },
        }

    def lasting(transport: str, cluster: str) -> Json:
        return onward(
            transport,
            cluster,
            max_stream_duration={"max_stream_duration": f"{STREAM_SECONDS}s"},
        )

    refusal = json.dumps({**REFUSAL, "reason": "host_not_allowed", "detail": "no upstream was authorised"})
    refused: Json = {
        "match": {"prefix": "/"},
        "direct_response": {"status": 403, "body": {"inline_string": refusal}},
        "response_headers_to_add": [
            {
                "header": {"key": "content-type", "value": "application/json"},
                "append_action": "OVERWRITE_IF_EXISTS_OR_ADD",
            }
        ],
    }
    return {
        "name": "governed",
        "virtual_hosts": [
            {
                "name": "all",
                "domains": ["*"],
                "routes": [
                    onward("tls", "upstream-tls"),
                    onward("plain", "upstream-plain"),
                    *(onward(name, name) for name in (named("mcp", place) for place in places if answers)),
                    *(onward(name, name) for name in (named("review", place) for place in places if reviews)),
                    *(
                        [lasting("tls-upgrade", "upstream-tls-1"), lasting("plain-upgrade", "upstream-plain")]
                        if streams
                        else []
                    ),
                    *(lasting(name, name) for name in (named("postgres", place) for place in places if sessions)),
                    *(
                        [lasting("tls-unread", "upstream-tls"), lasting("plain-unread", "upstream-plain")]
                        if unread
                        else []
                    ),
                    *([unread_route(refused)] if answers else []),
                    refused,
                ],
            }
        ],
    }
