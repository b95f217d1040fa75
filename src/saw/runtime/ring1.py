"""Envoy's configuration for ring 1: what the sandbox's only exit does with a connection.

Two listeners. ``sandbox`` takes CONNECT and absolute-form requests from the sandbox's veth; a CONNECT that ``saw-decide``
allows is handed to the internal listener ``inspect``, which ends TLS with the generation's leaf certificate. Every request
of both is decided by ``saw-decide`` and travels to ring 2 in one form. The facts a decision needs (the raw path, the
CONNECT authority, the server name, the source address) are written by Envoy before anything else looks at the request,
over whatever the client sent under the same names.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from saw.runtime.ring1_clusters import clusters
from saw.runtime.ring1_listeners import closed_listeners, listeners
from saw.runtime.ring1_settings import API, PROBE_HOST, PROBE_PATH, Config, Ring1, watched

__all__ = [
    "PROBE_HOST",
    "PROBE_PATH",
    "Ring1",
    "bootstrap",
    "closed_listeners",
    "clusters",
    "discovery",
    "listeners",
    "static_config",
]


def bootstrap(settings: Ring1) -> Config:
    """Return the static part: no admin interface, listeners and clusters watched under the current generation.

    ``current`` is replaced by one rename, and the watch lies on the directory of that rename, so listeners, clusters and
    leaf always belong to one generation.
    """
    current = settings.generations / "current"
    return {
        "node": {"id": "ring1", "cluster": "ring1"},
        "bootstrap_extensions": [
            {
                "name": "envoy.bootstrap.internal_listener",
                "typed_config": {
                    "@type": f"{API}.extensions.bootstrap.internal_listener.v3.InternalListener",
                },
            }
        ],
        "dynamic_resources": {
            "lds_config": watched(current / "lds.json", settings.generations),
            "cds_config": watched(current / "cds.json", settings.generations),
        },
        "overload_manager": {
            "resource_monitors": [
                {
                    "name": "envoy.resource_monitors.global_downstream_max_connections",
                    "typed_config": {
                        "@type": f"{API}.extensions.resource_monitors.downstream_connections.v3"
                        ".DownstreamConnectionsConfig",
                        "max_active_downstream_connections": 4096,
                    },
                }
            ]
        },
    }


def discovery(kind: str, resources: list[Config], version: str) -> bytes:
    """Return a file-based discovery response; ``kind`` is ``listener`` or ``cluster``."""
    url = {"listener": f"{API}.config.listener.v3.Listener", "cluster": f"{API}.config.cluster.v3.Cluster"}[kind]
    return msgspec.json.encode(
        {"version_info": version, "resources": [{"@type": url, **resource} for resource in resources]}
    )


def static_config(settings: Ring1, generation: str, directory: Path) -> bytes:
    """Return everything as one static configuration, for ``envoy --mode validate`` (which reads no discovery files)."""
    config = bootstrap(settings)
    del config["dynamic_resources"]
    config["static_resources"] = {
        "listeners": listeners(settings, generation, directory),
        "clusters": clusters(settings, generation),
    }
    return msgspec.json.encode(config)
