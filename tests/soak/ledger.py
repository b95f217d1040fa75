"""What the writers of a soak tried and what was acknowledged, in a file that a later run goes on with."""

from __future__ import annotations

import json
import threading
from collections import deque
from pathlib import Path
from typing import Any

Mark = tuple[str, ...]
"""Something the trail says: ``("workspace", id)``, ``("gone", id)``, ``("opened", id, digest)``, ``("approve", id)`` …"""


class Ledger:
    """Marks that were tried (before the call leaves) and acknowledged (after its answer came). For many threads.

    ``calls`` has the SHA-256 of the body for each request digest of which a review was asked for.
    """

    def __init__(self, file: Path) -> None:
        self.tried: set[Mark] = set()
        self.acknowledged: set[Mark] = set()
        self.calls: dict[str, str] = {}
        self.fresh: list[Mark] = []
        self.to_decide: deque[str] = deque()
        self.progress: dict[str, Any] = {}
        self._lock = threading.Lock()
        if file.exists():
            for line in file.read_text().splitlines():
                try:
                    self._take(json.loads(line))
                except ValueError:
                    continue  # the last line of a run that was cut off: nobody went on from it
        self._file = file.open("a")

    def _take(self, line: list[Any]) -> None:
        kind, *mark = line
        if kind == "progress":
            self.progress = mark[0]
        elif kind == "c":
            self.calls[mark[0]] = mark[1]
        else:
            (self.tried if kind == "t" else self.acknowledged).add(tuple(mark))

    def _write(self, *line: object) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def will(self, *mark: str) -> None:
        """Note what is about to be asked for."""
        with self._lock:
            self.tried.add(mark)
            self._write("t", *mark)

    def will_open(self, digest: str, body: str) -> None:
        """Note for what call a review is about to be asked for."""
        with self._lock:
            self.calls[digest] = body
            self._write("c", digest, body)

    def did(self, *mark: str) -> None:
        """Note what was acknowledged."""
        with self._lock:
            self.acknowledged.add(mark)
            self.fresh.append(mark)
            self._write("a", *mark)

    def take_fresh(self) -> list[Mark]:
        """Return what was acknowledged since the last time."""
        with self._lock:
            found, self.fresh = self.fresh, []
            return found

    def count(self) -> int:
        """Return how much was acknowledged since the last :meth:`take_fresh`."""
        return len(self.fresh)

    def save(self, **progress: object) -> None:
        """Note how far the run is."""
        with self._lock:
            self.progress = dict(progress)
            self._write("progress", self.progress)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
