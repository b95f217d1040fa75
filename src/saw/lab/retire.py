"""Images that the embedded default has gone past: their records are deprecated, and what nothing uses is removed.

The newest two stay, and every one that a workspace is made of or goes back to, or that a root disk reads from. An organisation
decides this by itself: ``saw image deprecate`` and ``saw image prune`` (docs/images.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from saw.errors import SawError
from saw.image import usage
from saw.image.finished import GoldenImage, kinds_in

_OFFERED = {"candidate", "stable"}
_GONE = "decommissioned"


def retire_images(
    build: Path, saw: Callable[..., dict[str, Any]], say: Callable[[str], None], now: GoldenImage
) -> None:
    """Deprecate the records of images older than the newest two of a kind that no workspace needs; remove those images.

    A workspace needs the one that it is made of, and the one that it goes back to.

    ``saw`` runs the command and returns its answer; ``now`` is the image in use. Raises :class:`SawError`.
    """
    workspaces = [row for row in saw("workspace", "list")["workspaces"] if row["state"] != _GONE]
    made = {(row["image"], row["image_sha256"]): row["id"] for row in workspaces}
    back = {name: f"{row['id']} goes back to it" for row in workspaces if (name := _way_back(saw, row["id"]))}
    used = back | {name: f"{workspace} is made of it" for (name, _), workspace in made.items()}
    listed = saw("image", "list")["images"]
    for kind in kinds_in(build / "images"):
        names = [image.name for image, _ in kind]
        going = {name for name in names[usage.KEPT :] if name != now.name and name not in back}
        for row in listed:
            key = (row["name"], row["image_sha256"])
            if row["name"] in going and row["state"] in _OFFERED and key not in made:
                reason = f"superseded by {now.name}"
                saw("image", "deprecate", row["name"], "--sha256", row["image_sha256"], "--reason", reason)
        usage.prune(build, names, say, named=[now.name], in_force=used, registered={row["name"] for row in listed})


def _way_back(saw: Callable[..., dict[str, Any]], workspace: str) -> str:
    """Return the name of the image that the workspace goes back to, empty where there is none; raises :class:`SawError`."""
    try:
        return str(saw("workspace", "way-back", workspace)["image"]["name"])
    except SawError as error:
        refused = error.details.get("error")
        if isinstance(refused, dict) and refused.get("code") == "no_earlier_image":
            return ""
        raise
