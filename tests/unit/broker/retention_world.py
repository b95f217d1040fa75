"""A broker whose trail is signed, witnessed and shipped by the test, and whose clock it moves."""

from __future__ import annotations

import secrets
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
from job_world import JobWorld

from saw.audit import Chain, ChainedEvent
from saw.audit.choose import Choice
from saw.audit.merkle import EMPTY_ROOT
from saw.audit.note import LOG, WITNESS, Signer, sign_checkpoint
from saw.audit.ship import Before, Cursor
from saw.audit.tiles import Folder, Leaf, TreeWriter
from saw.broker.context import BROKER, Caller
from saw.broker.perimeter import Shipment
from saw.broker.retention_settings import AuditSettings
from saw.broker.schema import audit_events

DAYS = 40
CHOICE = Choice()
EDGE = Caller("perimeter:edge", "10.77.0.20", "request-2")


class RetentionWorld(JobWorld):
    """``directory`` holds the tree, its checkpoint and the cursor; ``witnessed``, ``shipped``: whether they are asked for."""

    def __init__(self, directory: Path, *, witnessed: bool = False, shipped: bool = False, **settings: Any) -> None:
        directory.mkdir(exist_ok=True)
        self.place = directory
        self.signer = Signer("trail.example.com", LOG, secrets.token_bytes(32))
        self.witness = Signer("witness.example.com", WITNESS, secrets.token_bytes(32))
        (directory / "log.key.pub").write_text(self.signer.public.line + "\n")
        (directory / "witness.key.pub").write_text(self.witness.public.line + "\n")
        kept = AuditSettings(
            retention=f"{DAYS}d",
            checkpoint=str(directory / "tiles/checkpoint"),
            key=str(directory / "log.key.pub"),
            witnesses=(str(directory / "witness.key.pub"),) if witnessed else (),
            shipped=str(directory / "cursor.json") if shipped else None,
        )
        super().__init__(directory, **{"audit": kept, **settings})
        self.chain = Chain("edge")

    def say(self, workspace: str = "", text: str = "something happened", count: int = 1) -> None:
        """Let the broker tell events about a workspace."""
        with self.broker.services.store.write() as tx:
            for _ in range(count):
                subject = BROKER.subject(workspace)
                tx.record(self.broker.services.events.api_activity(self.now, subject, "test.say", message=text))

    def ship_in(self, count: int = 1, workspace: str = "ws-a") -> list[ChainedEvent]:
        """Let the perimeter host tell events of its own chain."""
        made = [
            self.chain.append(
                self.broker.services.events.api_activity(self.now, EDGE.subject(workspace), "test.edge", message="edge")
            )
            for _ in range(count)
        ]
        self.broker.views.accept_events(EDGE, Shipment("edge", tuple(made)))
        return made

    def size(self) -> int:
        return int(self.broker.trail.log(0, 1, CHOICE)["end"])

    def sign(self, size: int | None = None, *, lie: bool = False, witnessed: bool = False) -> None:
        """Write the checkpoint of the first ``size`` events; with ``lie`` of a tree that is not the trail's."""
        leaves, after = [], 0
        while page := self.broker.trail.log(after, 1000, CHOICE)["events"]:
            leaves += [Leaf(one["source"], one["seq"], one["hash"]) for one in page]
            after = page[-1]["position"]
        leaves = leaves[:size]
        if lie:
            leaves[0] = Leaf("broker", 1, "0" * 64)
        files = Folder(self.place / ("lie" if lie else f"tiles-{len(leaves)}"))
        tree = TreeWriter(files, self.signer.public.name, 0, EMPTY_ROOT)
        tree.add(leaves)
        checkpoint = tree.finish()
        note = sign_checkpoint(checkpoint, self.signer)
        if witnessed:
            note += self.witness.sign(checkpoint.text, 1)
        Folder(self.place / "tiles").write("checkpoint", note.encode())

    def acknowledge(self, position: int) -> None:
        """Write the cursor of a receiver that has taken everything up to ``position``."""
        [row] = [one for one in self.rows() if one.position == position]
        cursor = Cursor(position=position, last=Before(row.source, row.seq, row.hash))
        (self.place / "cursor.json").write_bytes(msgspec.json.encode(cursor))

    def rows(self) -> list[Any]:
        with self.broker.services.store.read() as connection:
            return list(connection.execute(audit_events.select().order_by(audit_events.c.position)))

    def gone(self) -> list[int]:
        """Positions of the events that have no content any more."""
        return [row.position for row in self.rows() if not row.event]

    def pass_by(self) -> int:
        """Let retention look until it is through; return how many events went."""
        total = 0
        for _ in range(50):
            total += (went := self.broker.retention.tick())
            if not went and self.broker.retention.idle:
                return total
        raise AssertionError("retention does not come to an end")

    def operations(self) -> list[str]:
        events = self.broker.trail.page("broker", 0, 1000)["events"]
        return [item.event.get("api", {}).get("operation", "") for item in events if item.event]

    def old(self, days: float = DAYS + 2) -> None:
        self.now += timedelta(days=days)
