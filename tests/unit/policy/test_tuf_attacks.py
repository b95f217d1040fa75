"""Attacks on the supply chain of policy, at the broker's door and at the client's; each beside what is allowed."""

from __future__ import annotations

import base64
import json

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.policy.bundle import describe, sign, verify_bundle
from saw.policy.keys import key_id
from saw.policy.tuf_changes import RootChange, change_root
from saw.policy.tuf_metadata import (
    Metadata,
    MetaFile,
    Root,
    Snapshot,
    Timestamp,
    parse,
    sign_metadata,
    signing_key,
    trusted_policy_keys,
)
from saw.policy.tuf_repository import Publication, current_releases, current_root, read_target, stage_publication

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]


def state_of(world: World) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in world.store.rglob("*") if path.is_file()}


def revoked(world: World) -> None:
    """Ada's key is taken out; ben and cleo stay."""
    ada, ben, cleo = world.officers
    gone = RootChange(remove=(key_id(ada.public_key()),))
    world.publish(signed_by(change_root(world.copy, gone, world.now, kind="revoke"), [ben], [cleo, ben]))


# ---------------------------------------------------------------- keys


def test_a_revoked_key_releases_nothing_at_the_broker_and_loads_nothing_at_the_client(world: World) -> None:
    world.release(1)
    world.fetch()
    ada, ben, cleo = world.officers
    stolen = world.bundle(2, [ada, ben])
    ready = world.staged(stolen, signers=[ada, ben])
    revoked(world)
    before = state_of(world)
    assert code_of(lambda: world.accept(ready)) in {"threshold", "stale_base"}
    assert state_of(world) == before
    world.fetch()
    keys, threshold = trusted_policy_keys(world.trusted_root)
    assert code_of(lambda: verify_bundle(stolen, keys, threshold, world.clock)) == "threshold"
    world.publish(world.staged(world.bundle(2, [ben, cleo]), signers=[ben, cleo]))
    assert describe(world.fetch())[1].revision == 2


def test_a_revoked_key_cannot_bring_itself_back(world: World) -> None:
    world.release(1)
    ada, ben, _ = world.officers
    old_root = current_root(world.store)
    revoked(world)
    # A second version 2, signed by the officers of version 1, with ada in it.
    rival = parse(Root, old_root, "root.json")
    rival.signed.version = 2
    rival.signatures.clear()
    raw = sign_metadata(rival, [ada, ben])
    assert code_of(lambda: world.accept(Publication({"root.json": raw}, {}))) == "threshold"
    rival.signed.version = 3
    rival.signatures.clear()
    raw = sign_metadata(rival, [ada, ben])
    assert code_of(lambda: world.accept(Publication({"root.json": raw}, {}))) == "threshold"
    back = change_root(world.copy, RootChange(add=(ada.public_key(),)), world.now)
    assert world.publish(signed_by(back, world.officers)).root_version == 3


@pytest.mark.parametrize("kind", ["none", "one", "one twice", "one and a stranger", "one and the online key"])
def test_too_few_signatures_wherever_they_are_counted(world: World, kind: str) -> None:
    ada = world.officers[0]
    signers = {
        "none": [],
        "one": [ada],
        "one twice": [ada, ada],
        "one and a stranger": [ada, Ed25519PrivateKey.generate()],
        "one and the online key": [ada, world.online],
    }[kind]
    assert code_of(lambda: world.staged(world.bundle(1, signers))) in {"threshold", "unsigned"}
    assert code_of(lambda: world.accept(world.staged(world.bundle(1), signers=signers))) == "threshold"
    draft = change_root(world.copy, RootChange(), world.now)
    root = sign_metadata(parse(Root, draft.metadata["root.json"], "root.json"), signers)
    assert code_of(lambda: world.accept(Publication({**draft.metadata, "root.json": root}, {}))) == "threshold"
    world.publish(world.staged(world.bundle(1)))


def test_one_signature_under_two_key_ids_is_one_signature(world: World) -> None:
    raw = world.bundle(1, [world.officers[0]])
    document = json.loads(raw)
    signature = document["envelope"]["signatures"][0]
    other = key_id(world.officers[1].public_key())
    document["envelope"]["signatures"].append({**signature, "keyid": other})
    assert code_of(lambda: world.staged(json.dumps(document).encode())) == "threshold"


# ---------------------------------------------------------------- roots


@pytest.fixture
def rotated(world: World) -> list[bytes]:
    """A client that knows root 1, and roots 1 to 3 at the broker."""
    world.release(1)
    world.fetch()
    for _ in range(2):
        dora = Ed25519PrivateKey.generate()
        draft = change_root(world.copy, RootChange(add=(dora.public_key(),)), world.now)
        world.publish(signed_by(draft, world.officers[:2]))
    return [(world.store / "metadata" / f"{version}.root.json").read_bytes() for version in (1, 2, 3)]


def test_a_skipped_root_version_is_not_followed(world: World, rotated: list[bytes]) -> None:
    world.served.instead["metadata/2.root.json"] = rotated[2]
    assert code_of(world.fetch) == "rollback"
    assert parse(Root, world.trusted_root, "root.json").signed.version == 1
    del world.served.instead["metadata/2.root.json"]
    world.fetch()
    assert parse(Root, world.trusted_root, "root.json").signed.version == 3


def test_a_skipped_root_version_is_not_published(world: World) -> None:
    world.release(1)
    draft = change_root(world.copy, RootChange(), world.now)
    root = parse(Root, draft.metadata["root.json"], "root.json")
    root.signed.version = 3
    raw = sign_metadata(root, world.officers)
    assert code_of(lambda: world.accept(Publication({"root.json": raw}, {}))) == "stale_base"
    world.publish(signed_by(draft, world.officers))


def test_a_root_signed_by_the_new_keys_only_is_not_followed(world: World) -> None:
    world.release(1)
    world.fetch()
    usurpers = [Ed25519PrivateKey.generate() for _ in range(3)]
    root = parse(Root, world.root, "root.json")
    root.signed.version = 2
    for role in ("root", "targets"):
        for keyid in list(root.signed.roles[role].keyids):
            root.signed.revoke_key(keyid, role)
        for key in usurpers:
            root.signed.add_key(signing_key(key.public_key()), role)
    root.signatures.clear()
    forged = sign_metadata(root, usurpers)
    assert code_of(lambda: world.accept(Publication({"root.json": forged}, {}))) == "threshold"
    world.served.instead["metadata/2.root.json"] = forged
    assert code_of(world.fetch) == "threshold"
    assert world.trusted_root == world.root
    del world.served.instead["metadata/2.root.json"]
    root.signatures.clear()
    both = sign_metadata(root, [*world.officers[:2], *usurpers])
    world.served.instead["metadata/2.root.json"] = both
    assert code_of(world.fetch) == "threshold", "the new root is followed, and the old officers' targets count no more"
    assert parse(Root, world.trusted_root, "root.json").signed.version == 2


def test_a_root_signed_by_the_old_keys_only_is_not_followed(world: World) -> None:
    world.release(1)
    world.fetch()
    newcomers = [Ed25519PrivateKey.generate() for _ in range(2)]
    gone = tuple(key_id(key.public_key()) for key in world.officers)
    change = RootChange(tuple(key.public_key() for key in newcomers), gone)
    draft = change_root(world.copy, change, world.now)
    half = signed_by(draft, world.officers)
    world.served.instead["metadata/2.root.json"] = half.metadata["root.json"]
    assert code_of(world.fetch) == "threshold"
    world.served.instead.clear()
    world.publish(signed_by(half, newcomers, newcomers))
    assert world.fetch() == read_target(world.store, STABLE)


# ---------------------------------------------------------------- publications


def test_an_older_publication_is_not_taken_again(world: World) -> None:
    first = world.staged(world.bundle(1))
    world.publish(first)
    world.release(2)
    before = state_of(world)
    assert code_of(lambda: world.accept(first)) == "stale_base"
    assert state_of(world) == before
    assert describe(world.fetch())[1].revision == 2


def test_an_older_release_under_new_metadata_is_not_taken(world: World) -> None:
    """Enough officers are tricked into signing metadata that names an old bundle: the revision gives it away."""
    old = world.bundle(1)
    world.publish(world.staged(old))
    world.release(2)
    backwards = (world.copy / "metadata" / "3.targets.json").rename(world.copy / "metadata" / "aside")
    staged = stage_publication(world.copy, STABLE, world.bundle(2), world.officers, world.now)
    backwards.rename(world.copy / "metadata" / "3.targets.json")
    targets = Metadata.from_bytes(staged.metadata["targets.json"])
    targets.signed.version = 4
    targets.signed.targets = dict(
        Metadata.from_bytes((world.copy / "metadata" / "2.targets.json").read_bytes()).signed.targets
    )
    targets.signatures.clear()
    raw = sign_metadata(targets, world.officers[:2])
    assert code_of(lambda: world.accept(Publication({"targets.json": raw}, {STABLE: old}))) == "bundle"
    world.publish(world.staged(world.bundle(3)))


def test_the_broker_cannot_mix_what_officers_signed_at_different_times(world: World) -> None:
    """The online key is in an attacker's hands: clients still refuse a state that goes back or does not fit together."""
    world.release(1)
    old = (world.store / "metadata" / "2.targets.json").read_bytes()
    world.release(2)
    assert describe(world.fetch())[1].revision == 2
    meta = {"targets.json": MetaFile(2)}
    snapshot = Snapshot(version=9, expires=world.now.replace(year=world.now.year + 1), meta=meta)
    stamp = Timestamp(version=99, expires=snapshot.expires, snapshot_meta=MetaFile(9))
    world.served.instead = {
        "metadata/9.snapshot.json": sign_metadata(Metadata(snapshot), [world.online]),
        "metadata/timestamp.json": sign_metadata(Metadata(stamp), [world.online]),
        "metadata/2.targets.json": old,
    }
    assert code_of(world.fetch) == "rollback"
    # The attacker has also run the version of the timestamp far ahead. Another online key ends both.
    world.served.instead = {}
    assert code_of(world.fetch) == "rollback"
    successor = Ed25519PrivateKey.generate()
    change = change_root(world.copy, RootChange(online=successor.public_key()), world.now)
    world.publish(signed_by(change, world.officers[:2]), online=successor)
    assert describe(world.fetch())[1].revision == 2


def test_another_version_under_the_name_of_the_signed_one_is_noticed(world: World) -> None:
    world.release(1)
    old = (world.store / "metadata" / "2.targets.json").read_bytes()
    world.release(2)
    world.served.instead = {"metadata/3.targets.json": old}
    assert code_of(world.fetch) == "rollback"
    world.served.instead = {}
    assert describe(world.fetch())[1].revision == 2


def test_a_bundle_of_one_ring_is_not_served_for_another(world: World) -> None:
    world.release(1)
    world.publish(world.staged(world.bundle(2), CANARY))
    stable, canary = (next((world.store / "targets" / "rings" / ring).iterdir()) for ring in ("stable", "canary"))
    good = stable.read_bytes()
    world.served.instead[str(stable.relative_to(world.store))] = canary.read_bytes()
    assert code_of(world.fetch) == "mix_and_match"
    world.served.instead = {}
    assert world.fetch() == good


def test_signatures_on_one_bundle_do_not_fit_another(world: World) -> None:
    one, two = (json.loads(world.bundle(number)) for number in (1, 2))
    two["envelope"]["signatures"] = one["envelope"]["signatures"]
    assert code_of(lambda: world.staged(json.dumps(two).encode())) == "threshold"
    two["envelope"]["payload"] = one["envelope"]["payload"]
    assert world.staged(json.dumps(two).encode()).targets


def test_a_signature_over_metadata_is_none_over_a_manifest(world: World) -> None:
    """DSSE binds the type: what an officer signs as targets metadata cannot be passed off as a bundle's manifest."""
    payload = Metadata.from_bytes((world.copy / "metadata" / "1.targets.json").read_bytes()).signed_bytes
    raw = sign(payload, {}, world.officers[:2])
    keys, threshold = trusted_policy_keys(world.root)
    assert code_of(lambda: verify_bundle(raw, keys, threshold, world.now)) == "malformed"
    document = json.loads(world.bundle(1))
    bare = [key.sign(base64.b64decode(document["envelope"]["payload"])) for key in world.officers[:2]]
    for entry, signature in zip(document["envelope"]["signatures"], bare, strict=True):
        entry["sig"] = base64.b64encode(signature).decode()
    assert code_of(lambda: verify_bundle(json.dumps(document).encode(), keys, threshold, world.now)) == "threshold"


def test_two_people_publish_on_one_base_and_the_second_loses_nothing(world: World, tmp_path) -> None:
    world.release(1)
    hers, his = world.staged(world.bundle(2)), world.staged(world.bundle(1), CANARY)
    world.publish(hers)
    before = state_of(world)
    assert code_of(lambda: world.accept(his)) == "stale_base"
    assert state_of(world) == before, "the first publication stands untouched"
    # His bundle is as good as it was: only the metadata is made again, on the present base.
    again = world.staged(his.targets[CANARY], CANARY)
    assert again.targets == his.targets
    world.publish(again)
    assert [(one.ring, one.revision) for one in current_releases(world.store)] == [("canary", 1), ("stable", 2)]
