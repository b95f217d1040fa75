"""The configuration of ring 2's Envoy, as data: a bootstrap that never changes, secrets by file name, clusters.

One mutually authenticated listener per workspace network (:mod:`saw.gateway.envoy_listeners`) asks saw-gatekeeper about
every request, then dials exactly the address that the gatekeeper named. Nothing in here is secret.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from saw.gateway.envoy_parts import (
    HEALTH_PATH,
    HTTP,
    KEPT,
    SSH_PORT,
    TLS,
    TYPE,
    WORKSPACE_SAN,
    Json,
    Seat,
    file_source,
    pipe,
    resources,
    socket_address,
)
from saw.gateway.replicas import Sockets, named

SDS_KIND = "envoy.extensions.transport_sockets.tls.v3.Secret"


def bootstrap(xds_dir: Path) -> str:
    """Return the bootstrap: everything dynamic comes from files in ``xds_dir``; there is no admin interface."""
    body: Json = {
        "node": {"id": "ring2", "cluster": "saw-perimeter"},
        "dynamic_resources": {
            "lds_config": file_source(xds_dir / "lds.json"),
            "cds_config": file_source(xds_dir / "cds.json"),
        },
    }
    return json.dumps(body, indent=1)


def server_secret(version: str, tls_dir: Path) -> str:
    """Return the SDS file of the server's key pair: file names, re-read when something is renamed into ``tls_dir``."""
    item: Json = {
        "name": "server",
        "tls_certificate": {
            "certificate_chain": {"filename": str(tls_dir / "server.pem")},
            "private_key": {"filename": str(tls_dir / "server.key")},
            "watched_directory": {"path": str(tls_dir)},
        },
    }
    return resources(version, SDS_KIND, [item])


def workspace_authority(version: str, tls_dir: Path) -> str:
    """Return the SDS file of what a caller's certificate must chain to, and which kind of name it must carry."""
    item: Json = {
        "name": "workspaces",
        "validation_context": {
            "trusted_ca": {"filename": str(tls_dir / "ca.pem")},
            "watched_directory": {"path": str(tls_dir)},
            "match_typed_subject_alt_names": [{"san_type": "URI", "matcher": {"safe_regex": {"regex": WORKSPACE_SAN}}}],
        },
    }
    return resources(version, SDS_KIND, [item])


def clusters(
    version: str,
    *,
    replicas: Sequence[Sockets],
    broker: tuple[str, int],
    upstream_ca: Path,
    numbers: Iterable[int],
) -> str:
    """Return the CDS file: gatekeepers, their services, two ways to an upstream, the broker, each VM's SSH port."""
    strip: Json = {
        "name": "envoy.filters.http.header_mutation",
        "typed_config": {
            "@type": HTTP + "header_mutation.v3.HeaderMutation",
            "mutations": {
                "request_mutations": [
                    {"remove_on_match": {"key_matcher": {"prefix": "x-saw-"}}},
                    {"remove_on_match": {"key_matcher": {"prefix": "x-envoy-"}}},
                    {"remove_on_match": {"key_matcher": {"prefix": "x-forwarded-"}}},
                ]
            },
        },
    }
    codec: Json = {
        "name": "envoy.filters.http.upstream_codec",
        "typed_config": {"@type": HTTP + "upstream_codec.v3.UpstreamCodec"},
    }
    options_type = TYPE + "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"

    def upstream(name: str, protocol: Json, extra: Json) -> Json:
        return {
            "name": name,
            "type": "ORIGINAL_DST",
            "lb_policy": "CLUSTER_PROVIDED",
            "connect_timeout": "10s",
            "original_dst_lb_config": {"use_http_header": True, "http_header_name": "x-saw-upstream"},
            "typed_extension_protocol_options": {
                "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                    "@type": options_type,
                    **protocol,
                    "common_http_protocol_options": {"idle_timeout": KEPT},
                    "http_filters": [strip, codec],
                }
            },
            **extra,
        }

    tls: Json = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": TLS + "UpstreamTlsContext",
            "common_tls_context": {
                "tls_params": {"tls_minimum_protocol_version": "TLSv1_2"},
                "validation_context": {"trusted_ca": {"filename": str(upstream_ca)}},
            },
        },
    }
    named: Json = {
        "upstream_http_protocol_options": {
            "auto_sni": True,
            "auto_san_validation": True,
            "override_auto_sni_header": "x-saw-authority",
        }
    }
    items: list[Json] = [
        *_gatekeepers(replicas),
        upstream(
            "upstream-tls",
            {"auto_config": {"http_protocol_options": {}, "http2_protocol_options": {}}, **named},
            {"transport_socket": tls},
        ),
        # WebSockets are opened over HTTP/1.1 (RFC 6455), which every service that has them speaks.
        upstream(
            "upstream-tls-1",
            {"explicit_http_config": {"http_protocol_options": {}}, **named},
            {"transport_socket": tls},
        ),
        upstream("upstream-plain", {"explicit_http_config": {"http_protocol_options": {}}}, {}),
        _tcp_cluster("broker", *broker),
    ]
    items += [_tcp_cluster(f"ssh-{seat.number}", seat.workspace, SSH_PORT) for seat in map(Seat, sorted(set(numbers)))]
    return resources(version, "envoy.config.cluster.v3.Cluster", items)


def _gatekeepers(replicas: Sequence[Sockets]) -> Iterator[Json]:
    """Yield what leads to the gatekeepers.

    A workspace's own replica is asked first and the others stand by; which of them are well, Envoy asks each of them. The
    services behind a decision, and what a replica sends, belong to the replica that decided: the tickets are in its memory.
    """
    for replica, own in enumerate(replicas, 1):
        if len(replicas) == 1:
            yield _local_cluster("gatekeeper", own.authz)
        else:
            others = [item.authz for item in [*replicas[replica:], *replicas[: replica - 1]]]
            yield _watched_cluster(named("gatekeeper", replica), [own.authz, *others])
            yield _local_cluster(named("alone", replica), own.authz)
        yield _local_cluster(named("mcp", replica), own.mcp)
        yield _local_cluster(named("postgres", replica), own.postgres)
        if own.review is not None:
            yield _local_cluster(named("review", replica), own.review)


def _watched_cluster(name: str, paths: Sequence[Path]) -> Json:
    """Return a cluster whose first socket is used as long as it is well, and then the next one that is."""
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "wait_for_warm_on_init": False,
        "health_checks": [
            {
                "timeout": "2s",
                "interval": "1s",
                "no_traffic_interval": "1s",
                "unhealthy_threshold": 2,
                "healthy_threshold": 2,
                "http_health_check": {"host": "gatekeeper", "path": HEALTH_PATH},
            }
        ],
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [
                {"priority": place, "lb_endpoints": [{"endpoint": {"address": pipe(path)}}]}
                for place, path in enumerate(paths)
            ],
        },
    }


def _local_cluster(name: str, path: Path) -> Json:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "1s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": pipe(path)}}]}],
        },
    }


def _tcp_cluster(name: str, address: str, port: int) -> Json:
    return {
        "name": name,
        "type": "STATIC",
        "connect_timeout": "5s",
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": socket_address(address, port)}}]}],
        },
    }
