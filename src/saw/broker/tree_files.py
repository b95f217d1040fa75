"""Serves the trail's tree to witnesses: the signed checkpoint and the tiles of hashes, and nothing else of the folder.

The folder belongs to another account than the broker's, so no link in it is followed: what is read lies in it. Entries, which
name chains, are not served; a witness needs none.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from saw.audit.note import LONGEST_NOTE

_SERVED = re.compile(r"checkpoint|tile/[0-9]{1,2}/(x[0-9]{3}/){0,6}[0-9]{3}(\.p/[0-9]{1,3})?")
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def tree_routes(folder: str | None) -> list[Route]:
    """Return the route ``/audit-tree/…`` of the folder that ``saw audit checkpoint`` writes; none without one."""
    if folder is None:
        return []

    async def serve(request: Request) -> Response:
        path = str(request.path_params["path"])
        found = await run_in_threadpool(read_served, Path(folder), path)
        if found is None:
            return Response(status_code=404)
        kept = "no-cache" if path == "checkpoint" else "public, max-age=31536000, immutable"
        return Response(found, media_type="application/octet-stream", headers={"Cache-Control": kept})

    return [Route("/audit-tree/{path:path}", serve, methods=["GET"])]


def read_served(folder: Path, path: str) -> bytes | None:
    """Return a file of the tree, None for all that is not served: other names, links, and what is not there."""
    if not _SERVED.fullmatch(path):
        return None
    *folders, name = path.split("/")
    try:
        place = os.open(folder, _FOLDER)
        try:
            for one in folders:
                below = os.open(one, _FOLDER, dir_fd=place)
                os.close(place)
                place = below
            handle = os.open(name, _FILE, dir_fd=place)
        finally:
            os.close(place)
    except OSError:
        return None
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            return None
        return file.read(LONGEST_NOTE)
