"""What a workspace VM is told at creation: public data only, handed over as the systemd credential ``saw.workspace``."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

from saw import addressing
from saw.broker.client import OperatorClient

BROKER_PORT = 8444
RING2_PORT = 8443


def vm_credential(client: OperatorClient, workspace_id: str) -> dict[str, Any]:
    """Return the credential of ``workspace_id`` out of the register and the broker's public trust anchors."""
    with client.session():
        workspace = client.request("GET", f"/v1/workspaces/{quote(workspace_id, safe='')}")
        trust = client.request("GET", "/v1/trust")
    number = int(workspace["number"])
    gateway = addressing.gateway(number)
    return {
        "workspace_id": workspace["id"],
        "number": number,
        "trust_domain": trust["trust_domain"],
        "broker_url": f"https://{gateway}:{BROKER_PORT}",
        "broker_name": "broker.saw.internal",
        "ring2": f"{gateway}:{RING2_PORT}",
        "ring2_name": "ring2.saw.internal",
        "ca_pem": trust["ca_pem"],
        "tuf_root": trust["tuf_root"],
        "blueprint": workspace["blueprint"],
        "ring": workspace["ring"],
    }
