"""Diffs of reach that are made before a lock is taken: under the lock they are only looked up."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

from saw.policy.bundle import read_content
from saw.policy.errors import BundleRefused, PolicyError, RepositoryError
from saw.policy.loader import Bundle
from saw.policy.tuf_reach import ReachDiff, ReachReport, compare
from saw.policy.tuf_statements import released

_KEPT = 4096


class NotCompared(RepositoryError):
    """The release in force is another one than was compared with."""

    def __init__(self) -> None:
        super().__init__(
            "stale_base",
            "the release in force changed while the reach was compared",
            cure="bring the copy up to date and stage the publication again",
        )


class Compared:
    """A comparison that answers only what :meth:`prepare` has compared, from memory."""

    def __init__(self, diff: ReachDiff) -> None:
        self._diff = diff
        self._lock = threading.Lock()
        self._seen: set[tuple[bytes, bytes]] = set()
        self._known: dict[tuple[bytes, bytes], ReachReport] = {}

    def prepare(self, directory: Path | str, targets: Mapping[str, bytes]) -> None:
        """Compare each bundle of ``targets`` with what ``directory`` releases under its path now.

        Takes up to some seconds; call it outside locks and transactions. A file that cannot be read is left to the checks
        that follow. Raises :class:`RepositoryError` (``reach_undecided``).
        """
        for path, raw in targets.items():
            base = released(directory, path)
            pair = (hashlib.sha256(base or b"").digest(), hashlib.sha256(raw).digest())
            with self._lock:
                if pair in self._seen:
                    continue
            try:
                compare(base, read_content(raw), self._remember)
            except (BundleRefused, PolicyError):
                continue
            with self._lock:
                self._seen.add(pair)

    def _remember(self, old: Bundle, new: Bundle) -> ReachReport:
        report = self._diff(old, new)
        with self._lock:
            if len(self._known) >= _KEPT:
                self._known.clear()
                self._seen.clear()
            self._known[_key(old, new)] = report
        return report

    def __call__(self, old: Bundle, new: Bundle) -> ReachReport:
        """Return the diff that was prepared; raise :class:`NotCompared` when there is none."""
        with self._lock:
            report = self._known.get(_key(old, new))
        if report is None:
            raise NotCompared
        return report


def _key(old: Bundle, new: Bundle) -> tuple[bytes, bytes]:
    return _digest(old), _digest(new)


def _digest(bundle: Bundle) -> bytes:
    """Return a digest of the members; the empty bundle, which allows nothing, differs from every other."""
    whole = hashlib.sha256()
    for name, raw in sorted(bundle.members.items()):
        whole.update(f"{len(name)}:{name}:{len(raw)}:".encode() + raw)
    return whole.digest()
