"""Ring 1's clusters: ring 2 under the workspace's identity, the decision service, and the tunnel into ring 1 itself."""

from __future__ import annotations

from saw.runtime.ring1_settings import API, Config, Ring1, assignment, removed, watched


def clusters(settings: Ring1, generation: str) -> list[Config]:
    """Return the clusters: ring 2, the decision service and the tunnel into the internal listener.

    The generation's name is part of ring 2's metadata: a new generation replaces the cluster, so that no call under the
    new policy travels on a connection that was opened with the identity of the old one.
    """
    return [
        {
            "name": "ring2",
            "type": "STATIC",
            "connect_timeout": "5s",
            "metadata": {"filter_metadata": {"saw": {"generation": generation}}},
            "load_assignment": assignment(
                "ring2", {"socket_address": {"address": settings.ring2_address, "port_value": settings.ring2_port}}
            ),
            "typed_extension_protocol_options": _upstream_http(
                {
                    "http2_protocol_options": {
                        "allow_connect": True,
                        "connection_keepalive": {"interval": "15s", "timeout": "5s"},
                    }
                },
                # A rotated SVID is used by new connections only; this bounds how long the previous one is presented.
                {"max_connection_duration": "30s", "idle_timeout": "30s"},
                [
                    {
                        "name": "envoy.filters.http.header_mutation",
                        "typed_config": {
                            "@type": f"{API}.extensions.filters.http.header_mutation.v3.HeaderMutation",
                            "mutations": {"request_mutations": [removed("x-saw-i-")]},
                        },
                    },
                    {
                        "name": "envoy.filters.http.upstream_codec",
                        "typed_config": {"@type": f"{API}.extensions.filters.http.upstream_codec.v3.UpstreamCodec"},
                    },
                ],
            ),
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": f"{API}.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
                    "sni": settings.ring2_name,
                    "common_tls_context": {
                        "tls_params": {
                            "tls_minimum_protocol_version": "TLSv1_3",
                            "tls_maximum_protocol_version": "TLSv1_3",
                        },
                        "alpn_protocols": ["h2"],
                        "tls_certificate_sds_secret_configs": [
                            {
                                "name": "svid",
                                "sds_config": {
                                    **watched(settings.sds_file, settings.sds_file.parent),
                                    "initial_fetch_timeout": "1s",
                                },
                            }
                        ],
                        "validation_context": {
                            "trusted_ca": {"filename": str(settings.ca_file)},
                            "match_typed_subject_alt_names": [
                                {"san_type": "DNS", "matcher": {"exact": settings.ring2_name}}
                            ],
                        },
                    },
                },
            },
        },
        {
            "name": "decide",
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": assignment("decide", {"pipe": {"path": str(settings.decide_socket)}}),
            "typed_extension_protocol_options": _upstream_http({"http_protocol_options": {}}, {"idle_timeout": "30s"}),
        },
        {
            "name": "tunnel",
            "type": "STATIC",
            "connect_timeout": "1s",
            "load_assignment": assignment(
                "tunnel", {"envoy_internal_address": {"server_listener_name": "inspect", "endpoint_id": "inspect"}}
            ),
            "transport_socket": {
                "name": "envoy.transport_sockets.internal_upstream",
                "typed_config": {
                    "@type": f"{API}.extensions.transport_sockets.internal_upstream.v3.InternalUpstreamTransport",
                    "transport_socket": {
                        "name": "envoy.transport_sockets.raw_buffer",
                        "typed_config": {"@type": f"{API}.extensions.transport_sockets.raw_buffer.v3.RawBuffer"},
                    },
                },
            },
        },
    ]


def _upstream_http(protocol: Config, common: Config, filters: list[Config] | None = None) -> Config:
    return {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": f"{API}.extensions.upstreams.http.v3.HttpProtocolOptions",
            "common_http_protocol_options": common,
            "explicit_http_config": protocol,
            **({"http_filters": filters} if filters else {}),
        }
    }
