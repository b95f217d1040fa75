"""Publications are verified before they are served; clients notice rollback, freeze, forgery and mixed files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf.api.exceptions import DownloadError, DownloadHTTPError
from tuf.ngclient.fetcher import FetcherInterface
from tuf_world import stage

from saw.policy.bundle import build_manifest, policy_digest, sign, verify_bundle
from saw.policy.errors import BundleRefused, RepositoryError
from saw.policy.loader import Bundle
from saw.policy.tuf_client import fetch_target, kept_root, refresh
from saw.policy.tuf_metadata import Metadata, Root, TargetFile, Targets, parse, sign_metadata, signing_key
from saw.policy.tuf_reach import bundle_diff, reach_between
from saw.policy.tuf_repository import (
    Accepted,
    accept_publication,
    adopt_publication,
    cosign_publication,
    current_releases,
    current_root,
    init_repository,
    install_root,
    read_target,
    resign_timestamp,
    trusted_policy_keys,
)

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]

TARGET = "rings/stable/coding.bundle.json"
Make = Callable[..., bytes]
Officers = list[Ed25519PrivateKey]


class Served(FetcherInterface):
    """Serves a directory, as the broker would; ``down`` cuts the link."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.down = False

    def _fetch(self, url: str) -> Iterator[bytes]:
        if self.down:
            raise DownloadError("no route")
        path = self.directory / url.removeprefix("https://broker/tuf/")
        if not path.exists():
            raise DownloadHTTPError("not found", 404)
        yield path.read_bytes()


class World:
    """An officers' copy, a broker's store and a client."""

    def __init__(self, base: Path, officers: Officers, online: Ed25519PrivateKey, now: datetime) -> None:
        self.copy, self.store, self.client = base / "copy", base / "store", base / "client"
        self.officers, self.online, self.now = officers, online, now
        self.root = init_repository(self.copy, officers, online.public_key(), now=now)
        self.store.mkdir()
        install_root(self.store, self.root, online, now)
        self.served = Served(self.store)

    def publish(self, raw: bytes, signers: int = 2, now: datetime | None = None, **more: timedelta) -> None:
        publication = stage(self.copy, TARGET, raw, self.officers[:signers], self.now)
        accept_publication(self.store, publication.metadata, publication.targets, self.online, now or self.now, **more)
        adopt_publication(self.copy, publication)

    def fetch(self, root: bytes | None = None) -> tuple[bytes, dict[str, object]]:
        updater = refresh(self.client / "m", self.client / "t", "https://broker/tuf", root or self.root, self.served)
        return fetch_target(updater, TARGET)


@pytest.fixture
def world(tmp_path: Path, officers: Officers, online: Ed25519PrivateKey, now: datetime) -> World:
    return World(tmp_path, officers, online, now)


def code_of(call: Callable[[], object]) -> str:
    with pytest.raises((RepositoryError, BundleRefused)) as caught:
        call()
    return caught.value.code


def test_publish_and_fetch(world: World, signed: Make, now: datetime) -> None:
    raw = signed(revision=1)
    world.publish(raw)
    fetched, custom = world.fetch()
    keys, threshold = trusted_policy_keys(world.root)
    bundle = verify_bundle(fetched, keys, threshold, now)
    assert fetched == raw == read_target(world.store, TARGET)
    reach = custom.pop("reach")
    assert isinstance(reach, dict) and set(reach) == {"base_digest", "diff_digest", "widening"}
    assert custom == {"policy_digest": bundle.digest, "revision": 1}
    assert threshold == 2 and len(keys) == 3
    world.publish(signed(revision=2))
    assert world.fetch()[1]["revision"] == 2
    assert [(r.ring, r.blueprint, r.revision) for r in current_releases(world.store)] == [("stable", "coding", 2)]


def test_publication_with_too_few_signatures_and_then_enough(world: World, signed: Make, now: datetime) -> None:
    publication = stage(world.copy, TARGET, signed(), world.officers[:1], now)
    offer = (publication.metadata, publication.targets, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "threshold"
    assert not (world.store / "metadata" / "timestamp.json").exists()
    full = cosign_publication(publication, world.officers[1:2])
    accepted = accept_publication(world.store, full.metadata, full.targets, world.online, now)
    assert [release.revision for release in accepted.changed] == [1]


def test_publication_by_strangers(world: World, signed: Make, now: datetime) -> None:
    strangers = [Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()]
    publication = stage(world.copy, TARGET, signed(), strangers, now)
    offer = (publication.metadata, publication.targets, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "threshold"


def test_stale_base(world: World, signed: Make, now: datetime) -> None:
    first = stage(world.copy, TARGET, signed(revision=1), world.officers, now)
    second = stage(world.copy, TARGET, signed(revision=2), world.officers, now)
    accept_publication(world.store, first.metadata, first.targets, world.online, now)
    offer = (second.metadata, second.targets, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "stale_base"


def test_revision_must_grow(world: World, signed: Make, tmp_path: Path, now: datetime) -> None:
    world.publish(signed(revision=5))
    assert code_of(lambda: world.publish(signed(revision=5))) == "rolled_back"
    # An officer whose copy forgot the release can sign the old revision, but the broker does not take it.
    (world.copy / "metadata" / "2.targets.json").unlink()
    old = stage(world.copy, TARGET, signed(revision=4), world.officers, now)
    targets = parse_targets(old.metadata["targets.json"], 3, world.officers)
    offer = ({"targets.json": targets}, old.targets, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "bundle"
    # The twin: a later revision, signed on a base that is current.
    newer = stage(world.store, TARGET, signed(revision=6), world.officers, now)
    targets = parse_targets(newer.metadata["targets.json"], 3, world.officers)
    accept_publication(world.store, {"targets.json": targets}, newer.targets, world.online, now)


def parse_targets(raw: bytes, version: int, officers: Officers) -> bytes:
    metadata = Metadata.from_bytes(raw)
    metadata.signed.version = version
    metadata.signatures.clear()
    return sign_metadata(metadata, officers[:2])


def test_targets_cannot_vanish(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed())
    metadata = Metadata.from_bytes((world.copy / "metadata" / "2.targets.json").read_bytes())
    metadata.signed.targets.clear()
    metadata.signed.version = 3
    metadata.signatures.clear()
    raw = sign_metadata(metadata, world.officers[:2])
    offer = ({"targets.json": raw}, {}, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "rollback"


def test_bundle_swapped_between_signing_and_publishing(world: World, signed: Make, now: datetime) -> None:
    publication = stage(world.copy, TARGET, signed(revision=1), world.officers, now)
    other = {TARGET: signed(revision=2)}
    offer = (publication.metadata, other, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "malformed"
    extra = {**publication.targets, "rings/canary/coding.bundle.json": signed()}
    offer = (publication.metadata, extra, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "malformed"


def test_bundle_signed_by_too_few_is_not_staged(world: World, signed: Make) -> None:
    assert code_of(lambda: world.publish(signed(signers=1))) == "threshold"


def test_a_frozen_repository_is_noticed(world: World, signed: Make, now: datetime) -> None:
    past = now - timedelta(hours=2)
    world.publish(signed(start=past), now=past)
    assert code_of(world.fetch) == "freeze"
    resign_timestamp(world.store, world.online, now)
    assert world.fetch()[1]["revision"] == 1


def test_an_ageing_snapshot_is_renewed_with_the_timestamp(world: World, signed: Make, now: datetime) -> None:
    past = now - timedelta(days=10)
    world.publish(signed(start=past), now=past)
    resign_timestamp(world.store, world.online, now)
    assert world.fetch()[1]["revision"] == 1
    assert (world.store / "metadata" / "2.snapshot.json").exists()


def test_timestamp_lifetime_is_configurable(world: World, signed: Make, now: datetime) -> None:
    past = now - timedelta(hours=2)
    world.publish(signed(start=past), now=past, timestamp_lifetime=timedelta(hours=3))
    assert world.fetch()[1]["revision"] == 1


def test_an_old_repository_state_is_noticed(world: World, signed: Make) -> None:
    world.publish(signed(revision=1))
    timestamp = world.store / "metadata" / "timestamp.json"
    old = timestamp.read_bytes()
    world.publish(signed(revision=2))
    assert world.fetch()[1]["revision"] == 2
    new = timestamp.read_bytes()
    timestamp.write_bytes(old)
    assert code_of(world.fetch) == "rollback"
    timestamp.write_bytes(new)
    assert world.fetch()[1]["revision"] == 2


def test_a_timestamp_by_another_key_is_noticed(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed())
    resign_timestamp(world.store, Ed25519PrivateKey.generate(), now)
    assert code_of(world.fetch) == "threshold"


def test_a_changed_target_is_noticed(world: World, signed: Make) -> None:
    world.publish(signed())
    stored = next((world.store / "targets" / "rings" / "stable").iterdir())
    stored.write_bytes(stored.read_bytes().replace(b"a", b"b", 1))
    assert code_of(world.fetch) == "mix_and_match"
    assert code_of(lambda: read_target(world.store, TARGET)) == "malformed"


def test_a_broker_out_of_reach(world: World, signed: Make) -> None:
    world.publish(signed())
    world.served.down = True
    assert code_of(world.fetch) == "unreachable"
    world.served.down = False
    assert world.fetch()[1]["revision"] == 1


def test_a_ring_that_is_not_released(world: World, signed: Make) -> None:
    world.publish(signed())
    updater = refresh(world.client / "m", world.client / "t", "https://broker/tuf/", world.root, world.served)
    assert code_of(lambda: fetch_target(updater, "rings/canary/coding.bundle.json")) == "not_found"


def rotated(world: World, officers: Officers, signers: Officers, now: datetime) -> bytes:
    root = parse(Root, world.root, "root.json")
    root.signed.version = 2
    root.signed.expires = now + timedelta(days=365)
    for role in ("root", "targets"):
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        for key in officers:
            root.signed.add_key(signing_key(key.public_key()), role)
    root.signatures.clear()
    return sign_metadata(root, signers)


def test_a_revoked_officer_no_longer_counts(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed(revision=1))
    successor = Ed25519PrivateKey.generate()
    others = [*world.officers[1:], successor]
    new_root = rotated(world, others, [*world.officers, successor], now)
    # The bundle in force was signed by officers 1 and 2; officer 1 leaves, so the release must be signed anew.
    offer = ({"root.json": new_root}, {}, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "threshold"
    keys, threshold = trusted_policy_keys(new_root)
    with pytest.raises(BundleRefused) as caught:
        verify_bundle(signed(revision=2), keys, threshold, now)
    assert caught.value.code == "threshold"


def test_root_rotation_with_the_same_signers(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed(revision=1))
    newcomer = Ed25519PrivateKey.generate()
    new_root = rotated(world, [*world.officers[:2], newcomer], world.officers[:2], now)
    accepted = accept_publication(world.store, {"root.json": new_root}, {}, world.online, now)
    assert accepted.root_version == 2 and current_root(world.store) == new_root
    assert world.fetch()[1]["revision"] == 1
    assert json.loads((world.client / "m" / "root.json").read_bytes())["signed"]["version"] == 2


def test_a_start_without_the_repository_follows_the_roots_that_were_kept(
    world: World, signed: Make, now: datetime
) -> None:
    kept = world.client / "m"
    assert kept_root(kept, world.root) == world.root
    world.publish(signed(revision=1))
    new_root = rotated(world, [*world.officers[:2], Ed25519PrivateKey.generate()], world.officers[:2], now)
    accept_publication(world.store, {"root.json": new_root}, {}, world.online, now)
    world.fetch()
    assert kept_root(kept, world.root) == new_root


@pytest.mark.parametrize("name", ["root.json", "root_history/1.root.json", "root_history/2.root.json"])
def test_a_root_that_was_left_among_the_kept_ones_is_passed_over(
    world: World, signed: Make, now: datetime, name: str
) -> None:
    world.publish(signed(revision=1))
    world.fetch()
    usurpers = [Ed25519PrivateKey.generate() for _ in range(3)]
    place = world.client / "m" / name
    place.unlink(missing_ok=True)
    place.write_bytes(rotated(world, usurpers, usurpers, now))
    assert kept_root(world.client / "m", world.root) == world.root


def test_a_root_that_the_old_officers_did_not_sign(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed())
    usurpers = [Ed25519PrivateKey.generate() for _ in range(3)]
    new_root = rotated(world, usurpers, usurpers, now)
    offer = ({"root.json": new_root}, {}, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "threshold"
    assert code_of(lambda: install_root(world.store, new_root, world.online, now)) == "exists"


def test_a_usurper_cannot_bring_root_targets_and_bundle_together(
    world: World, coding: Bundle, signed: Make, now: datetime
) -> None:
    world.publish(signed())

    def offer(root: bytes, officers: Officers) -> Accepted:
        manifest = build_manifest(coding, 2, now, now + timedelta(days=1))
        raw = sign(manifest, coding.members, officers)
        file = TargetFile.from_data(TARGET, raw, ["sha256"])
        reach = msgspec.to_builtins(reach_between(read_target(world.store, TARGET), coding, bundle_diff()))
        file.unrecognized_fields["custom"] = {"policy_digest": policy_digest(manifest), "revision": 2, "reach": reach}
        targets = Targets(version=3, expires=now + timedelta(days=1), targets={TARGET: file})
        metadata = {"root.json": root, "targets.json": sign_metadata(Metadata(targets), officers)}
        return accept_publication(world.store, metadata, {TARGET: raw}, world.online, now)

    strangers = [Ed25519PrivateKey.generate() for _ in range(3)]
    assert code_of(lambda: offer(rotated(world, strangers, strangers, now), strangers)) == "threshold"
    handed_over = rotated(world, strangers, [*world.officers, *strangers], now)
    assert offer(handed_over, strangers).root_version == 2


def test_the_root_must_name_this_online_key(tmp_path: Path, officers: Officers, now: datetime) -> None:
    root = init_repository(tmp_path / "copy", officers, Ed25519PrivateKey.generate().public_key(), now=now)
    (tmp_path / "store").mkdir()
    other = Ed25519PrivateKey.generate()
    assert code_of(lambda: install_root(tmp_path / "store", root, other, now)) == "online_key"


def test_an_expired_root_is_not_installed(
    tmp_path: Path, officers: Officers, online: Ed25519PrivateKey, now: datetime
) -> None:
    root = init_repository(tmp_path / "copy", officers, online, now=now - timedelta(days=400))
    (tmp_path / "store").mkdir()
    assert code_of(lambda: install_root(tmp_path / "store", root, online, now)) == "freeze"


def test_a_crash_before_the_timestamp_leaves_the_old_state(world: World, signed: Make, now: datetime) -> None:
    world.publish(signed(revision=1))
    timestamp = (world.store / "metadata" / "timestamp.json").read_bytes()
    publication = stage(world.copy, TARGET, signed(revision=2), world.officers, now)
    offer = (publication.metadata, publication.targets, world.online, now)
    accept_publication(world.store, *offer)
    (world.store / "metadata" / "timestamp.json").write_bytes(timestamp)
    assert world.fetch()[1]["revision"] == 1
    accept_publication(world.store, *offer)
    assert world.fetch()[1]["revision"] == 2


def test_only_officers_metadata_is_taken(world: World, now: datetime) -> None:
    offer = ({"timestamp.json": b"{}"}, {}, world.online, now)
    assert code_of(lambda: accept_publication(world.store, *offer)) == "malformed"


def test_malformed_metadata_is_refused(world: World, now: datetime) -> None:
    for raw in (b"", b"{}", b"[]", b'{"signed": 1}', b"\xff"):
        offer = ({"targets.json": raw}, {}, world.online, now)
        assert code_of(lambda offer=offer: accept_publication(world.store, *offer)) == "malformed"
