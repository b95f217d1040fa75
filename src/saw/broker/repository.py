"""The broker's TUF repository on disk: the store behind ``/tuf``, and the only user of the online key.

What is verified before anything is written is decided in :mod:`saw.policy.tuf_repository`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from saw import jsontext
from saw.policy import tuf_repository
from saw.policy.keys import parse_private_key, public_pem
from saw.policy.tuf_compared import Compared
from saw.policy.tuf_reach import ReachDiff, bundle_diff
from saw.policy.tuf_store import read_role
from saw.policy.tuf_transfer import export_repository


class OnlineKey:
    """The broker's own TUF key, which signs snapshot and timestamp and nothing else."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self.private = key
        self.public_pem = public_pem(key.public_key()).decode()

    @classmethod
    def parse(cls, raw: bytes, name: str) -> OnlineKey:
        """Read the key (PEM); raise ``KeyFileError`` when it is of another kind."""
        return cls(parse_private_key(raw, name))


class Repository:
    """The directory that is served; ``metadata/`` holds consistent snapshots, ``targets/`` the files."""

    def __init__(self, directory: Path, online: OnlineKey, timestamp_ttl_s: int) -> None:
        self._directory = directory
        self._timestamp = directory / "metadata" / "timestamp.json"
        self._online = online
        self._lifetime = timedelta(seconds=timestamp_ttl_s)
        self._compared = Compared(bundle_diff())
        self.online_public_pem = online.public_pem

    def root(self) -> bytes | None:
        """Return the newest trusted root, or None before one is installed."""
        return tuf_repository.current_root(self._directory) if self._root_versions() else None

    def roots(self) -> list[bytes]:
        """Return every root from the first on, in order; whoever trusts one of them can follow the signatures from there."""
        return [read_role(self._directory, "root", version) for version in sorted(self._root_versions())]

    def root_version(self) -> int:
        """Return the version of the newest root, 0 when there is none."""
        return max(self._root_versions(), default=0)

    def versions_after(self, version: int) -> list[int]:
        """Return the versions of the roots that are newer than ``version``, in order."""
        return sorted(each for each in self._root_versions() if each > version)

    def holds_root(self, raw: bytes) -> bool:
        """Tell whether ``raw`` is one of the roots that are installed, in whatever formatting."""
        folder = self._directory / "metadata"
        return any(_same(raw, (folder / f"{version}.root.json").read_bytes()) for version in self._root_versions())

    def install_root(self, raw: bytes, now: datetime) -> None:
        """Take the first root; it must be signed by itself and give this broker's key the online roles."""
        tuf_repository.install_root(self._directory, raw, self._online.private, now)

    @property
    def compared(self) -> ReachDiff:
        """What :meth:`compare` found: a comparison that answers from memory, for use under locks."""
        return self._compared

    def compare(self, targets: Mapping[str, bytes]) -> None:
        """Compute what ``targets`` change of the reach in force; takes up to seconds, so never inside a transaction."""
        self._compared.prepare(self._directory, targets)

    def accept(self, metadata: dict[str, bytes], targets: dict[str, bytes], now: datetime) -> None:
        """Verify and store a publication, then sign snapshot and timestamp; or raise and change nothing."""
        self.compare(targets)
        tuf_repository.accept_publication(
            self._directory,
            metadata,
            targets,
            self._online.private,
            now,
            timestamp_lifetime=self._lifetime,
            diff=self.compared,
        )

    def refresh(self, now: datetime) -> bool:
        """Sign the timestamp (and an ageing snapshot) anew when half of its time has passed; return whether it was."""
        if not self._timestamp.exists():
            return False
        signed = jsontext.decode(self._timestamp.read_bytes())["signed"]
        if datetime.fromisoformat(signed["expires"]) - now > self._lifetime / 2:
            return False
        tuf_repository.resign_timestamp(self._directory, self._online.private, now, timestamp_lifetime=self._lifetime)
        return True

    def archive(self, now: datetime) -> bytes:
        """Return the whole repository as one archive, for a copy to be brought up to it."""
        return export_repository(self._directory, now)

    def current_targets(self) -> Iterator[tuple[str, bytes]]:
        """Yield path and content of every target that is released, content checked against the signed metadata."""
        if self.root() is not None:
            for release in tuf_repository.current_releases(self._directory):
                yield release.path, tuf_repository.read_target(self._directory, release.path)

    def _root_versions(self) -> list[int]:
        names = (path.name.partition(".")[0] for path in (self._directory / "metadata").glob("[1-9]*.root.json"))
        return [int(name) for name in names if name.isdecimal()]


def _same(one: bytes, other: bytes) -> bool:
    try:
        return bool(one == other or jsontext.decode(one) == jsontext.decode(other))
    except msgspec.DecodeError:
        return False
