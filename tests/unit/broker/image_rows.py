"""Images as a registration leaves them, for brokers without officers."""

from __future__ import annotations

import msgspec

from saw.attest.verifier import RELEASED_PCRS
from saw.broker.schema import images
from saw.broker.store import Store

RECORD = {
    "format": "saw-image-release/2",
    "inputs_digest": "inputs",
    "created": "2026-11-01T00:00:00Z",
    "not_after": "2027-11-01T00:00:00Z",
    "boot": {"pcrs": {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}},
}


def put_image(store: Store, name: str, digest: str) -> None:
    """Put down a stable image whose record counts."""
    record = msgspec.json.encode({**RECORD, "name": name, "image_sha256": digest}).decode()
    told = {"record": record, "envelope": "{}", "state": "stable", "registered_at": "2026"}
    with store.write() as tx:
        tx.connection.execute(images.insert().values(name=name, image_sha256=digest, **told))
