"""A ring can have officers of its own: they release to their ring and to no other, and only what the policy officers signed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.cli.main import main
from saw.policy.tuf_changes import delegate_ring
from saw.policy.tuf_metadata import Metadata, Targets, parse, sign_metadata
from saw.policy.tuf_repository import cosign_publication, current_releases, read_target
from saw.policy.tuf_store import current_state

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]


@pytest.fixture
def canary(world: World) -> Ed25519PrivateKey:
    """The officer of the canary ring, who is none of the policy officers; both rings have revision 1."""
    world.release(1)
    world.release(1, CANARY)
    key = Ed25519PrivateKey.generate()
    draft = delegate_ring(world.copy, "canary", [key.public_key()], 1, world.now)
    assert code_of(lambda: world.accept(signed_by(draft, [key]))) == "threshold"
    world.publish(signed_by(draft, [key], world.officers[:2]))
    return key


def test_the_ring_keeps_its_release_and_clients_find_it(world: World, canary: Ed25519PrivateKey) -> None:
    assert world.fetch(CANARY) == read_target(world.store, CANARY)
    assert world.fetch(STABLE) == read_target(world.store, STABLE)
    state = current_state(world.store)
    assert state is not None
    assert list(state.targets.targets) == [STABLE] and list(state.rings["ring-canary"].targets) == [CANARY]


def test_one_officer_releases_to_canary_and_stable_still_needs_two(world: World, canary: Ed25519PrivateKey) -> None:
    raw = world.bundle(2)
    assert code_of(lambda: world.accept(world.staged(raw, STABLE, signers=[canary]))) == "threshold"
    assert code_of(lambda: world.accept(world.staged(raw, CANARY, signers=world.officers))) == "threshold"
    world.publish(world.staged(raw, CANARY, signers=[canary]))
    assert world.fetch(CANARY) == raw
    assert world.fetch(STABLE) == read_target(world.store, STABLE) != raw
    world.publish(world.staged(raw, STABLE))
    assert [release.revision for release in current_releases(world.store)] == [2, 2]


def test_the_rings_officer_cannot_release_what_the_policy_officers_did_not_sign(
    world: World, canary: Ed25519PrivateKey
) -> None:
    raw = world.bundle(2, [canary])
    assert code_of(lambda: world.staged(raw, CANARY, signers=[canary])) == "threshold"
    good = world.staged(world.bundle(2), CANARY, signers=[canary])
    metadata = parse(Targets, good.metadata["ring-canary.json"], "ring-canary.json")
    from saw.policy.tuf_repository import target_file

    present = metadata.signed.targets[CANARY].custom
    assert isinstance(present, dict)
    metadata.signed.targets[CANARY] = target_file(CANARY, raw, str(present["policy_digest"]), 2)
    metadata.signatures.clear()
    forged = {**good.metadata, "ring-canary.json": sign_metadata(metadata, [canary])}
    assert code_of(lambda: world.accept(type(good)(forged, {CANARY: raw}))) == "bundle"
    world.accept(good)


def test_the_rings_officer_cannot_name_another_ring(world: World, canary: Ed25519PrivateKey) -> None:
    raw = world.bundle(2)
    good = world.staged(raw, CANARY, signers=[canary])
    metadata = parse(Targets, good.metadata["ring-canary.json"], "ring-canary.json")
    metadata.signed.targets[STABLE] = metadata.signed.targets[CANARY]
    metadata.signatures.clear()
    forged = {**good.metadata, "ring-canary.json": sign_metadata(metadata, [canary])}
    assert code_of(lambda: world.accept(type(good)(forged, {CANARY: raw, STABLE: raw}))) == "malformed"
    world.accept(good)


def test_a_client_ignores_a_ring_that_reaches_beyond_its_paths(world: World, canary: Ed25519PrivateKey) -> None:
    """Should a broker serve it all the same, the client does not take another ring's target from this role."""
    before = world.fetch(STABLE)
    raw = world.bundle(2)
    good = world.staged(raw, CANARY, signers=[canary])
    world.publish(good)
    metadata = parse(Targets, good.metadata["ring-canary.json"], "ring-canary.json")
    metadata.signed.targets[STABLE] = metadata.signed.targets[CANARY]
    metadata.signatures.clear()
    world.served.instead[f"metadata/{metadata.signed.version}.ring-canary.json"] = sign_metadata(metadata, [canary])
    assert world.fetch(STABLE) == before


@pytest.mark.parametrize("change", ["paths", "name", "terminating", "threshold", "hashed", "repeated", "both"])
def test_other_delegations_are_refused(world: World, canary: Ed25519PrivateKey, change: str) -> None:
    staged = world.staged(world.bundle(2))
    document = json.loads(staged.metadata["targets.json"])
    roles = document["signed"]["delegations"]["roles"]
    role = roles[0]
    if change == "paths":
        role["paths"] = ["rings/*/*.bundle.json"]
    elif change == "name":
        role["name"] = "anything"
    elif change == "terminating":
        role["terminating"] = False
    elif change == "threshold":
        role["threshold"] = 2
    elif change == "hashed":
        del role["paths"]
        role["path_hash_prefixes"] = ["00"]
    elif change == "repeated":
        roles.append({**role, "name": "ring-stable", "paths": ["rings/stable/*.bundle.json"]})
    else:
        document["signed"]["targets"][CANARY] = document["signed"]["targets"][STABLE]
    parsed = Metadata.from_bytes(json.dumps(document).encode())
    parsed.signatures.clear()
    forged = {**staged.metadata, "targets.json": sign_metadata(parsed, world.officers[:2])}
    assert code_of(lambda: world.accept(type(staged)(forged, staged.targets))) == "malformed"
    world.accept(staged)


def test_two_rings_do_not_stand_in_each_others_way(world: World, canary: Ed25519PrivateKey) -> None:
    raw = world.bundle(2)
    stable, own = world.staged(raw, STABLE), world.staged(raw, CANARY, signers=[canary])
    world.publish(stable)
    world.publish(own)
    assert [release.revision for release in current_releases(world.store)] == [2, 2]
    assert world.accept(stable).changed == (), "what is in force already changes nothing"
    late = world.staged(world.bundle(3), CANARY, signers=[canary])
    also = world.staged(world.bundle(4), CANARY, signers=[canary])
    world.accept(late)
    assert code_of(lambda: world.accept(also)) == "stale_base"


def test_a_ring_given_back_to_the_policy_officers(world: World, canary: Ed25519PrivateKey) -> None:
    world.fetch(CANARY)
    world.publish(signed_by(delegate_ring(world.copy, "canary", [], 1, world.now), world.officers[:2]))
    assert world.fetch(CANARY) == read_target(world.store, CANARY)
    raw = world.bundle(2)
    world.publish(world.staged(raw, CANARY))
    assert world.fetch(CANARY) == raw
    # And once more to an officer of its own: versions go on where they were.
    world.publish(
        signed_by(delegate_ring(world.copy, "canary", [canary.public_key()], 1, world.now), [canary, *world.officers])
    )
    assert world.fetch(CANARY) == raw
    assert code_of(lambda: delegate_ring(world.copy, "stable", [], 1, world.now)) == "not_found"


def test_signing_on_a_publication_goes_where_the_key_belongs(world: World, canary: Ed25519PrivateKey) -> None:
    staged = world.staged(world.bundle(2), CANARY, signers=[])
    # A policy officer's signature on the unchanged targets does no harm; it is still the ring's officer who is missing.
    by_ada = cosign_publication(staged, world.officers[:1])
    assert code_of(lambda: world.accept(by_ada)) == "threshold"
    assert code_of(lambda: cosign_publication(staged, [Ed25519PrivateKey.generate()])) == "not_an_officer"
    world.accept(cosign_publication(by_ada, [canary]))


def test_the_command_delegates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: object) -> tuple[int, dict]:
        code = main(["policy", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    keys = tmp_path / "keys"
    names = [part for name in ("ada", "ben", "cleo", "online") for part in ("--name", name)]
    assert run("keys", "create", "--dir", keys, *names)[0] == 0
    signers = ("--key", keys / "ada.key", "--key", keys / "ben.key")
    online = ("--online-pub", keys / "online.pub")
    assert run("init-repo", "--dir", tmp_path / "officers", *signers, *online)[0] == 0
    delegate = ("keys", "delegate", "--repository", tmp_path / "officers", "--ring", "canary", *signers)
    code, answer = run(*delegate, "--officer-pub", keys / "cleo.pub", "--threshold", 2, "--out", tmp_path / "no")
    assert code == 1, answer
    code, answer = run(*delegate, "--officer-pub", keys / "cleo.pub", "--out", tmp_path / "out")
    assert code == 0 and [one["item"] for one in answer["owed"]] == ["ring-canary version 1"]
    code, answer = run("stage", "--key", keys / "cleo.key", "--out", tmp_path / "out")
    assert code == 0 and answer["complete"]
