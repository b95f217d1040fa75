"""Which images a workspace was bound to, and which one it goes back to: read from the trail, where every binding is an event."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import Connection, select

from saw import jsontext
from saw.broker.context import Services
from saw.broker.errors import ConflictError
from saw.broker.images import ImageState, refusal
from saw.broker.registry import get_row
from saw.broker.schema import audit_events, images
from saw.broker.store import SOURCE
from saw.broker.workspace_views import ImageBinding, WayBack

_TRIED = frozenset({"attesting", "active"})
"""States that a workspace reaches only by starting what it is bound to."""
_UPDATE = 3
"""OCSF: activity "update" of Entity Management."""
_DIGEST = 64
"""Hexadecimal digits of an image's SHA-256, by which a binding is told from a step of the life."""
_EARLY_MS = 60_000
"""How much earlier than its registration an event of a workspace is looked for."""


class Bindings:
    """Replay of a workspace's events, oldest first.

    ``stack`` holds the images (SHA-256) that lie below the present one, which is its last. Going back takes off what lies above,
    so that what was left is not what one goes back to next.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.since: list[int] = []
        self.whole = False
        self.left = ""
        """The image that was left by going back, with nothing newer bound since; empty otherwise."""
        self.names: dict[str, str] = {}
        """Under which name an image was bound, where its event says so."""
        self.ran: set[str] = set()
        self._tried: set[str] = set()

    def take(self, event: dict[str, Any]) -> None:
        """Take one event of class Entity Management of this workspace."""
        detail = event["unmapped"]["saw"]
        if "profile" in detail:
            self.whole = True
            self.names[detail["profile"]["image_sha256"]] = str(detail["profile"].get("image", ""))
            self._bind(detail["profile"]["image_sha256"], event["time"])
        elif event["activity_id"] == _UPDATE and detail.get("to") and len(detail["to"]) == _DIGEST:
            if not self.stack:
                self._bind(detail["from"], 0)
            self.names[detail["to"]] = str(detail.get("image", ""))
            self._bind(detail["to"], event["time"])
        elif self.stack and detail.get("to") in _TRIED:
            self._tried.add(self.stack[-1])
            if detail["to"] == "active":
                self.ran.add(self.stack[-1])

    def _bind(self, digest: str, at: int) -> None:
        self.left = ""
        if digest in self.stack:
            # A rebuild that failed binds back by itself: nobody went back from an image that was never started.
            self.left = self.stack[-1] if self.stack[-1] in self._tried else ""
            place = self.stack.index(digest)
            del self.stack[place + 1 :], self.since[place + 1 :]
        else:
            self.stack.append(digest)
            self.since.append(at)


class ImageHistory:
    """Answers for operators; nothing changes."""

    def __init__(self, services: Services) -> None:
        self._s = services

    def way_back(self, workspace_id: str, *, further: bool = False) -> WayBack:
        """Return the image that the workspace goes back to: the newest stable, usable one below the present that it ran.

        One that has just gone back stays where it is, so that going back twice is going back once; ``further`` goes on.
        Raises :class:`ConflictError` (``no_earlier_image``) when there is none, with the reason for each that was passed over.
        """
        now = self._s.clock()
        with self._s.store.read() as connection:
            row = get_row(connection, workspace_id)
            found = self._bindings(connection, workspace_id, str(row.created_at))
            target = _binding(connection, row.image_sha256, row.image, now)
            # What it went back to may be revoked by now: then it has not got anywhere.
            if found.left and not further and not target.refusal:
                return WayBack(workspace_id, row.image, target, (), gone_back=True)
            passed: list[str] = []
            for digest in reversed(found.stack[:-1]):
                target = _binding(connection, digest, found.names.get(digest, ""), now)
                reason = target.refusal or ("" if digest in found.ran else "the workspace never ran it")
                if not reason and target.state != ImageState.STABLE:
                    reason = f"it is {target.state}"
                if not reason:
                    return WayBack(workspace_id, row.image, target, tuple(passed), gone_back=False)
                passed.append(f"{target.name or digest[:16]}: {reason}")
        because = "; ".join(passed) or (
            "it is the first that it was bound to"
            if found.whole
            else "the trail of its time before is not held any more"
        )
        raise ConflictError(
            f"there is no image that {workspace_id} can go back to from {row.image}: {because}",
            cure="name one: playbook workspace_rebuild with workspace_image, workspace_image_path and workspace_image_sha256",
            code="no_earlier_image",
        )

    def _bindings(self, connection: Connection, workspace_id: str, created_at: str) -> Bindings:
        columns = audit_events.c
        begin = int(datetime.fromisoformat(created_at).timestamp() * 1000) - _EARLY_MS
        query = select(columns.event).where(
            columns.source == SOURCE,
            columns.at >= begin,
            columns.event.contains(f'"workspace":{msgspec.json.encode(workspace_id).decode()}', autoescape=True),
            columns.event.contains('"class_uid":3004', autoescape=True),
        )
        found = Bindings()
        with connection.execution_options(yield_per=200).execute(query.order_by(columns.position)) as rows:
            for row in rows:
                event = jsontext.decode(row.event)
                if event.get("entity") == {"type": "workspace", "uid": workspace_id}:
                    found.take(event)
        return found


def _binding(connection: Connection, digest: str, name: str, now: datetime) -> ImageBinding:
    """Return how the image with these bytes stands; under another name it may be registered too, and be revoked there."""
    query = select(images).where(images.c.image_sha256 == digest).order_by(images.c.registered_at.desc())
    rows = connection.execute(query).all()
    if not rows:
        return ImageBinding("", digest, "", "it is not registered")
    revoked = [row for row in rows if row.state == ImageState.REVOKED]
    row = (revoked or [one for one in rows if one.name == name] or rows)[0]
    return ImageBinding(row.name, digest, row.state, refusal(row, now).partition(": ")[2])
