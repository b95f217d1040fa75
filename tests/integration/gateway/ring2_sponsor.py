"""Delegations for tests, signed as the broker signs them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
from ring2_rig import Rig

from saw.identity.statement import sign_statement
from saw.identity.x509 import new_key_and_csr
from saw.policy.delegation import STATEMENT_TYPE, Delegation, Resource


class Sponsor:
    """Signs delegations as the broker does."""

    def __init__(self, rig: Rig) -> None:
        self.key, csr = new_key_and_csr("broker statements")
        self.certificate = rig.authority.issue_signer(csr, "broker", datetime.now(UTC), timedelta(days=20))

    def hand(self, identifier: str = "dlg-1", parent: str = "", **fields: Any) -> str:
        now = datetime.now(UTC)
        record = Delegation(
            format="saw-delegation/1", id=identifier, parent=parent, sponsor="mia@example.com", workspace="ws-1",
            agent="agent-1", task="notes", not_before=now - timedelta(minutes=1), expires=now + timedelta(hours=1),
            resources=(Resource(host="api.example.com", paths=("/v1/things", "/v1/other/**")),),
        )  # fmt: skip
        payload = msgspec.json.encode(msgspec.structs.replace(record, **fields))
        return sign_statement(payload, STATEMENT_TYPE, self.key, self.certificate)
