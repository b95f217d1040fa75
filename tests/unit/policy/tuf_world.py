"""An officers' copy, a broker's store and a TUF client, for tests of the life of a repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface

from saw.errors import SawError
from saw.policy.bundle import Reach, build_manifest, sign, verify_bundle
from saw.policy.loader import Bundle
from saw.policy.signers import Signer
from saw.policy.tuf_client import fetch_target, refresh
from saw.policy.tuf_draft import Draft, contribute
from saw.policy.tuf_reach import ReachDiff, bundle_diff
from saw.policy.tuf_repository import (
    Accepted,
    Publication,
    accept_publication,
    adopt_publication,
    init_repository,
    install_root,
    stage_publication,
    trusted_policy_keys,
)
from saw.policy.tuf_statements import state_reach

STABLE = "rings/stable/coding.bundle.json"
CANARY = "rings/canary/coding.bundle.json"
Officers = list[Ed25519PrivateKey]


class Served(FetcherInterface):
    """Serves a directory, as the broker would; ``instead`` replaces single files."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.instead: dict[str, bytes] = {}

    def _fetch(self, url: str) -> Iterator[bytes]:
        name = url.removeprefix("https://broker/tuf/")
        path = self.directory / name
        if name not in self.instead and not path.exists():
            raise DownloadHTTPError("not found", 404)
        yield self.instead.get(name) or path.read_bytes()


class World:
    """Three officers, two of whom must sign, their copy, the broker's store and a workspace's client."""

    def __init__(
        self, base: Path, content: Bundle, officers: Officers, online: Ed25519PrivateKey, now: datetime
    ) -> None:
        self.copy, self.store, self.client = base / "copy", base / "store", base / "client"
        self.content, self.officers, self.online, self.now = content, officers, online, now
        self.root = init_repository(self.copy, officers, online.public_key(), now=now)
        self.store.mkdir(parents=True)
        install_root(self.store, self.root, online, now)
        self.served = Served(self.store)

    @property
    def clock(self) -> datetime:
        """The time of the broker and the client: what commands sign meanwhile counts."""
        return max(self.now, datetime.now(UTC))

    def bundle(self, revision: int, signers: Sequence[Signer] | None = None, content: Bundle | None = None) -> bytes:
        """A signed bundle, by the first two officers unless told otherwise."""
        chosen = content or self.content
        manifest = build_manifest(chosen, revision, self.now, self.now + timedelta(days=30))
        return sign(manifest, chosen.members, self.officers[:2] if signers is None else signers)

    def staged(self, raw: bytes, target: str = STABLE, signers: Sequence[Signer] | None = None) -> Publication:
        """A publication whose signers state what it changes of the reach in force, as ``saw policy stage`` makes it."""
        return stage(self.copy, target, raw, self.officers[:2] if signers is None else signers, self.clock)

    def blind(
        self,
        raw: bytes,
        target: str = STABLE,
        signers: Sequence[Signer] | None = None,
        reach: Reach | None = None,
    ) -> Publication:
        """A publication that states this reach, or none."""
        chosen = self.officers[:2] if signers is None else signers
        return stage_publication(self.copy, target, raw, chosen, self.clock, reach=reach)

    def accept(
        self, what: Publication | Draft, online: Ed25519PrivateKey | None = None, diff: ReachDiff | None = None
    ) -> Accepted:
        """The broker takes a publication; the officers' copy stays as it is."""
        offered = what.publication if isinstance(what, Draft) else what
        key = online or self.online
        return accept_publication(self.store, offered.metadata, offered.targets, key, self.clock, diff=diff)

    def publish(self, what: Publication | Draft, online: Ed25519PrivateKey | None = None) -> Accepted:
        """The broker takes a publication, and the officers' copy follows."""
        accepted = self.accept(what, online)
        adopt_publication(self.copy, what.publication if isinstance(what, Draft) else what)
        return accepted

    def release(self, revision: int, target: str = STABLE) -> bytes:
        raw = self.bundle(revision)
        self.publish(self.staged(raw, target))
        return raw

    def fetch(self, target: str = STABLE) -> bytes:
        """What the workspace gets and loads: by TUF, and by the officers' signatures under the root that it trusts."""
        updater = refresh(self.client / "m", self.client / "t", "https://broker/tuf", self.root, self.served)
        raw, _ = fetch_target(updater, target)
        keys, threshold = trusted_policy_keys(self.trusted_root)
        verify_bundle(raw, keys, threshold, self.clock)
        return raw

    @property
    def trusted_root(self) -> bytes:
        """The root that the client has followed to."""
        return (self.client / "m" / "root.json").read_bytes()


def stage(copy: Path, target: str, raw: bytes, signers: Sequence[Signer], now: datetime) -> Publication:
    """A publication with the change of reach stated, as ``saw policy stage`` makes it."""
    reach = state_reach(copy, target, raw, bundle_diff())[1]
    return stage_publication(copy, target, raw, signers, now, reach=reach)


def signed_by(draft: Draft, *rounds: Sequence[Signer]) -> Draft:
    """The draft after each of the rounds of signing."""
    for signers in rounds:
        draft = contribute(draft, signers)
    return draft


def code_of(call: Callable[[], object]) -> str:
    """The code of the refusal that ``call`` ends in."""
    with pytest.raises(SawError) as caught:
        call()
    return caught.value.code
