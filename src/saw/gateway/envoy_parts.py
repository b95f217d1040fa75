"""Names, numbers and small pieces that ring 2's Envoy files share."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import msgspec

from saw import addressing
from saw.gateway.redaction import WORDS_HEADER
from saw.policy.seen_body import LONGEST
from saw.policy.websocket import FRAMES_HEADER

Json = dict[str, object]

TYPE = "type.googleapis.com/"
HTTP = TYPE + "envoy.extensions.filters.http."
NETWORK = TYPE + "envoy.extensions.filters.network."
TLS = TYPE + "envoy.extensions.transport_sockets.tls.v3."

RING2_PORT = 8443
BROKER_PORT = 8444
SSH_PORT = 22
CONNECTION_BUFFER = 2 * LONGEST
DRAIN_SECONDS = 1
"""How long Envoy lets connections of a removed listener live; given on its command line."""
AUTHZ_TIMEOUT = "8s"
KEPT = "4s"
"""How long an unused connection to a service is kept. Many services close theirs after 5 s: a call that meets that is sent, and
nobody knows what came of it, which an approved write must not risk."""
HEALTH_PATH = "/saw-health"
"""Where Envoy asks a gatekeeper whether it is well; a call of a workspace names its listener, wherever it goes."""
WORKSPACE_SAN = "spiffe://[^/]+/workspace/[^/]+"
METER_HEADER = "x-saw-meter"
"""The header in which the gatekeeper names the charge of a call, and the filter that reads the answer tells it back."""
METER_SEAT = "meter"
"""What stands for the workspace number where that filter tells the gatekeeper the end of a call."""
EDIT_HEADER = "x-saw-edit"
"""The header in which the gatekeeper says what is written into the body of a call; a filter does it, and removes the header."""
RECORD_HEADER = "x-saw-record"
"""The header in which the gatekeeper names the record of a call whose answer is kept; a filter does that, and removes it."""
RECORD_SEAT = "record"
"""What stands for the workspace number where that filter tells the gatekeeper pieces of an answer."""
ANSWER_HEADERS = (
    "x-saw-upstream",
    "x-saw-authority",
    "x-saw-transport",
    "x-saw-path",
    "x-saw-ticket",
    FRAMES_HEADER,
    WORDS_HEADER,
    METER_HEADER,
    EDIT_HEADER,
    RECORD_HEADER,
)
"""What the gatekeeper's answer sets, and a client may never bring."""
STREAM_SECONDS = 600
"""How long a WebSocket or a gRPC call lives at most: as long as the certificate that it was opened with could (seconds)."""
SEND_SEAT = "approved"
"""What stands for the workspace number on the listener that takes approved calls from the gatekeeper."""
SEND_TICKET = "x-saw-send"
"""The header in which the gatekeeper brings its own ticket there."""
LOCAL_MARK = "x-saw-local"
"""The header that tells the gatekeeper there that Envoy itself answered, and why (its response flags)."""
NOT_SENT = frozenset({"UF", "UH", "UO", "NR", "NC", "UAEX"})
"""Envoy's response flags that mean that no byte of the call left: no connection, no route, or no authorisation."""
NO_ANSWER = frozenset({"UC", "UMSDR", "UPE", "UR", "URX", "UT"})
"""Envoy's response flags that mean that a call was sent, at least in part, and not answered."""
HOP_HEADERS = (
    "connection",
    "content-length",
    "expect",
    "http2-settings",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
)
"""Headers about the connection: not shown to the gatekeeper and never set by a credential."""


class Seat(msgspec.Struct, frozen=True, order=True):
    """One workspace as ring 2's Envoy needs it: its number decides addresses and ports (:mod:`saw.addressing`)."""

    number: int

    @property
    def gateway(self) -> str:
        """Return the perimeter's address on this workspace's network."""
        return addressing.gateway(self.number)

    @property
    def workspace(self) -> str:
        """Return the VM's address."""
        return addressing.workspace(self.number)

    @property
    def ingress_port(self) -> int:
        """Return the port of the perimeter host that passes SSH on to the VM, on the address of its block."""
        return addressing.ingress_port(self.number)


def socket_address(address: str, port: int) -> Json:
    """Return an Envoy address."""
    return {"socket_address": {"address": address, "port_value": port}}


def pipe(path: Path, mode: int | None = None) -> Json:
    """Return the Envoy address of a Unix socket; ``mode`` for one that Envoy makes."""
    return {"pipe": {"path": str(path), **({} if mode is None else {"mode": mode})}}


def file_source(path: Path) -> Json:
    """Return a source that re-reads ``path`` whenever something is renamed into its folder."""
    return {
        "path_config_source": {"path": str(path), "watched_directory": {"path": str(path.parent)}},
        "resource_api_version": "V3",
    }


def resources(version: str, kind: str, items: Iterable[Json]) -> str:
    """Return the text of an xDS file that holds ``items`` of one kind."""
    return file_of(version, (resource(kind, item) for item in items))


def resource(kind: str, item: Json) -> str:
    """Return the text of one item of an xDS file."""
    return json.dumps({"@type": TYPE + kind, **item}, separators=(",", ":"))


def file_of(version: str, texts: Iterable[str]) -> str:
    """Return the text of an xDS file out of those of its items, each on a line of its own."""
    items = ",\n".join(texts)
    return f'{{"version_info": {json.dumps(version)}, "resources": [\n{items}\n]}}\n'
