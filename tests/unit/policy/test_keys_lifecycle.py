"""Officers come and go, thresholds and the online key change; clients follow, and what a revoked key signed no longer counts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from securesystemslib.signer import SSlibKey
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.cli.main import main
from saw.policy.bundle import describe, good_signers, verify_bundle
from saw.policy.keys import key_id
from saw.policy.tuf_changes import RootChange, change_root, delegate_ring
from saw.policy.tuf_draft import Draft, load_draft, owed, save_draft
from saw.policy.tuf_metadata import Metadata, Root, Targets, parse, sign_metadata, trusted_policy_keys
from saw.policy.tuf_repository import Publication, current_releases, current_root, read_target, target_file
from saw.policy.tuf_roots import follow_roots, root_chain
from saw.policy.tuf_store import stated_reach

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]


def identifier(key: Ed25519PrivateKey) -> str:
    return key_id(key.public_key())


def test_a_newcomer_is_added_and_clients_follow(world: World) -> None:
    world.release(1)
    world.fetch()
    dora = Ed25519PrivateKey.generate()
    draft = change_root(world.copy, RootChange(add=(dora.public_key(),)), world.now)
    assert code_of(lambda: world.accept(signed_by(draft, world.officers[:1]))) == "threshold"
    world.publish(signed_by(draft, world.officers[:2]))
    assert world.fetch() == read_target(world.store, STABLE)
    assert parse(Root, world.trusted_root, "root.json").signed.version == 2
    raw = world.bundle(2, [world.officers[2], dora])
    world.publish(world.staged(raw, signers=[world.officers[2], dora]))
    assert world.fetch() == raw


def test_a_new_root_needs_the_officers_before_and_after(world: World) -> None:
    world.release(1)
    newcomers = [Ed25519PrivateKey.generate() for _ in range(3)]
    gone = tuple(identifier(key) for key in world.officers)
    change = RootChange(tuple(key.public_key() for key in newcomers), gone)
    draft = change_root(world.copy, change, world.now)
    items = [one.item for one in owed(draft)]
    assert items[:2] == ["root version 2 (officers before)", "root version 2 (officers after)"]
    by_old, by_new = signed_by(draft, world.officers), signed_by(draft, newcomers, newcomers)
    assert [one.item for one in owed(by_new)] == ["root version 2 (officers before)"]
    assert code_of(lambda: world.accept(by_old)) == "threshold"
    assert code_of(lambda: world.accept(by_new)) == "threshold"
    assert world.publish(signed_by(by_new, world.officers[:2])).root_version == 2
    assert world.fetch() == read_target(world.store, STABLE)


def test_a_revoked_officer_counts_nowhere_and_releases_stay(world: World) -> None:
    before = world.release(1)
    world.fetch()
    ada, ben, cleo = world.officers
    draft = change_root(world.copy, RootChange(remove=(identifier(ada),)), world.now, kind="revoke")
    assert set(draft.targets) == {STABLE}, "the release was signed by ada and ben"
    one = signed_by(draft, [ben])
    assert [item.item for item in owed(one)][-1] == "targets version 3"
    accepted = world.publish(signed_by(one, [cleo], [ben]))
    assert [release.revision for release in accepted.resigned] == [1] and accepted.changed == ()
    after = world.fetch()
    assert describe(after)[0] == describe(before)[0], "content and revision are what they were"
    keys, threshold = trusted_policy_keys(world.trusted_root)
    assert good_signers(after, keys) == tuple(sorted((identifier(ben), identifier(cleo))))
    assert identifier(ada) not in describe(after)[2], "her signature is not even served any more"
    assert code_of(lambda: verify_bundle(before, keys, threshold, world.now)) == "threshold"
    assert code_of(lambda: world.staged(world.bundle(2, [ada, ben]), signers=[ben, cleo])) == "threshold"
    world.publish(world.staged(world.bundle(2, [ben, cleo]), signers=[ben, cleo]))


def test_a_revocation_does_not_wait_for_the_window_of_a_release(world: World) -> None:
    world.release(1)
    ada, ben, cleo = world.officers
    world.now += timedelta(days=60)
    draft = change_root(world.copy, RootChange(remove=(identifier(ada),)), world.now, kind="revoke")
    accepted = world.publish(signed_by(draft, [ben], [cleo, ben]))
    assert [release.path for release in accepted.resigned] == [STABLE]


def with_file(draft: Draft, raw: bytes, digest: str, signers: Sequence[Ed25519PrivateKey]) -> Publication:
    """The draft's publication with another file behind the entry of the stable ring."""
    targets = parse(Targets, draft.metadata["targets.json"], "targets.json")
    reach = stated_reach(STABLE, targets.signed.targets[STABLE])
    targets.signed.targets[STABLE] = target_file(STABLE, raw, digest, 1, reach)
    targets.signatures.clear()
    return Publication({**draft.metadata, "targets.json": sign_metadata(targets, signers)}, {STABLE: raw})


def test_nobody_slips_other_content_into_a_release_that_is_signed_anew(world: World) -> None:
    world.release(1)
    ada, ben, cleo = world.officers
    draft = change_root(world.copy, RootChange(remove=(identifier(ada),)), world.now, kind="revoke")
    good = signed_by(draft, [ben, cleo])
    digest = describe(good.targets[STABLE])[0]
    world.now += timedelta(seconds=1)
    other = world.bundle(1, [ben, cleo])
    assert describe(other)[0] != digest
    for stated in (digest, describe(other)[0]):
        forged = with_file(good, other, stated, [ben, cleo])
        assert code_of(lambda forged=forged: world.accept(forged)) == "bundle"
    unsigned = with_file(good, draft.targets[STABLE], digest, [ben, cleo])
    assert code_of(lambda: world.accept(unsigned)) == "bundle"
    assert world.accept(good).resigned


def test_a_revocation_that_leaves_a_release_unsigned_is_refused(world: World) -> None:
    before = world.release(1)
    ada, ben, cleo = world.officers
    draft = change_root(world.copy, RootChange(remove=(identifier(ada),)), world.now, kind="revoke")
    good = signed_by(draft, [ben, cleo])
    lazy = with_file(good, before, describe(before)[0], [ben, cleo])
    assert code_of(lambda: world.accept(Publication(lazy.metadata, {}))) == "bundle"
    world.accept(good)


def test_metadata_is_signed_only_when_its_bundles_are(world: World) -> None:
    world.release(1)
    ada, ben, cleo = world.officers
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    half = signed_by(draft, [ada, ben])
    assert not parse(Targets, half.metadata["targets.json"], "targets.json").signatures
    assert len(parse(Targets, signed_by(half, [cleo]).metadata["targets.json"], "targets.json").signatures) == 1


def test_one_officer_under_two_key_ids_is_refused(world: World) -> None:
    root = parse(Root, world.root, "root.json")
    ada = root.signed.keys[identifier(world.officers[0])]
    twin = SSlibKey("f" * 64, ada.keytype, ada.scheme, dict(ada.keyval))  # type: ignore[attr-defined]
    root.signed.version = 2
    assert follow_roots(world.root, [signed_root(root, world.officers)])
    root.signed.add_key(twin, "targets")
    raw = signed_root(root, world.officers)
    assert code_of(lambda: follow_roots(world.root, [raw])) == "malformed"
    assert code_of(lambda: world.accept(Publication({"root.json": raw}, {}))) == "malformed"


def signed_root(root: Metadata[Root], signers: Sequence[Ed25519PrivateKey]) -> bytes:
    root.signatures.clear()
    return sign_metadata(root, signers)


def test_the_threshold_can_rise_and_everything_is_signed_up_to_it(world: World) -> None:
    world.release(1)
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    assert code_of(lambda: world.accept(signed_by(draft, world.officers[:2]))) == "threshold"
    world.publish(signed_by(draft, world.officers[:2], world.officers, world.officers))
    world.fetch()
    assert trusted_policy_keys(world.trusted_root)[1] == 3
    assert code_of(lambda: world.staged(world.bundle(2))) == "threshold"
    world.publish(world.staged(world.bundle(2, world.officers), signers=world.officers))


@pytest.mark.parametrize("threshold", [0, 4, -1])
def test_a_threshold_that_cannot_be_reached_is_refused(world: World, threshold: int) -> None:
    assert code_of(lambda: change_root(world.copy, RootChange(threshold=threshold), world.now)) == "threshold"


def test_too_many_removals_are_refused_and_a_successor_allows_them(world: World) -> None:
    gone = tuple(identifier(key) for key in world.officers[:2])
    assert code_of(lambda: change_root(world.copy, RootChange(remove=gone), world.now)) == "threshold"
    dora = Ed25519PrivateKey.generate().public_key()
    assert owed(change_root(world.copy, RootChange(add=(dora,), remove=gone), world.now))
    stranger = (identifier(Ed25519PrivateKey.generate()),)
    assert code_of(lambda: change_root(world.copy, RootChange(remove=stranger), world.now)) == "not_found"


def test_the_online_key_changes_and_clients_follow(world: World) -> None:
    world.release(1)
    world.fetch()
    successor = Ed25519PrivateKey.generate()
    draft = signed_by(change_root(world.copy, RootChange(online=successor.public_key()), world.now), world.officers[:2])
    assert code_of(lambda: world.accept(draft)) == "online_key", "the broker does not hold this key"
    world.publish(draft, online=successor)
    assert world.fetch() == read_target(world.store, STABLE)
    old = world.online
    assert code_of(lambda: world.accept(world.staged(world.bundle(2)), online=old)) == "online_key"


def test_a_change_on_an_old_base_is_refused_and_stays_whole(world: World, tmp_path: Path) -> None:
    world.release(1)
    dora, eve = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    first = signed_by(change_root(world.copy, RootChange(add=(dora.public_key(),)), world.now), world.officers[:2])
    second = signed_by(change_root(world.copy, RootChange(add=(eve.public_key(),)), world.now), world.officers[:2])
    save_draft(tmp_path / "second", second)
    world.publish(first)
    assert code_of(lambda: world.accept(second)) == "threshold", "version 2 is installed with another content"
    assert load_draft(tmp_path / "second") == second
    again = change_root(world.copy, RootChange(add=(eve.public_key(),)), world.now)
    assert world.publish(signed_by(again, world.officers[:2])).root_version == 3


def test_a_stranger_has_no_part_in_a_change(world: World) -> None:
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    assert code_of(lambda: signed_by(draft, [Ed25519PrivateKey.generate()])) == "not_an_officer"
    assert owed(signed_by(draft, world.officers)) == ()


def test_a_draft_on_disk_is_the_same_draft(world: World, tmp_path: Path) -> None:
    world.release(1)
    draft = signed_by(change_root(world.copy, RootChange(threshold=3), world.now), world.officers[:1])
    save_draft(tmp_path / "d", draft)
    assert load_draft(tmp_path / "d") == draft
    (tmp_path / "d" / "metadata" / "timestamp.json").write_text("{}")
    assert code_of(lambda: load_draft(tmp_path / "d")) == "config_invalid"


# ---------------------------------------------------------------- following roots


@pytest.fixture
def chain(world: World) -> list[bytes]:
    """Roots 1 to 4, each with one more officer."""
    world.release(1)
    for _ in range(3):
        newcomer = Ed25519PrivateKey.generate()
        draft = change_root(world.copy, RootChange(add=(newcomer.public_key(),)), world.now)
        world.publish(signed_by(draft, world.officers[:2]))
    return list(root_chain(world.store))


def test_a_chain_is_followed_and_a_gap_or_a_forgery_is_not(world: World, chain: list[bytes]) -> None:
    assert follow_roots(chain[0], chain[1:], world.now) == chain[3]
    assert follow_roots(chain[1], chain, world.now) == chain[3], "what is known already is passed over"
    assert code_of(lambda: follow_roots(chain[0], [chain[1], chain[3]])) == "stale_base"
    strangers = [Ed25519PrivateKey.generate() for _ in range(3)]
    forged = parse(Root, chain[1], "root.json")
    forged.signatures.clear()
    assert code_of(lambda: follow_roots(chain[0], [sign_metadata(forged, strangers), chain[2]])) == "threshold"
    assert code_of(lambda: follow_roots(chain[0], [b"{}"])) == "malformed"
    assert code_of(lambda: follow_roots(chain[0], chain[1:], world.now + timedelta(days=4000))) == "freeze"


@given(order=st.permutations(range(1, 4)), kept=st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
def test_only_versions_in_order_lead_on(chain: list[bytes], order: list[int], kept: int) -> None:
    offered = [chain[number] for number in order[:kept]]
    try:
        reached = chain.index(follow_roots(chain[0], offered))
    except Exception as error:  # noqa: BLE001 - the property is about which error
        assert getattr(error, "code", "") == "stale_base"
        return
    expected = 0
    for number in order[:kept]:
        if number == expected + 1:
            expected = number
    assert reached == expected


# ---------------------------------------------------------------- commands


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict]:
    code = main(["policy", *map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Path]:
    """Key files of four officers and two online keys, and an officers' copy of the first three."""
    folder = tmp_path / "keys"
    names = ("ada", "ben", "cleo", "dora", "online", "next")
    assert (
        run(capsys, "keys", "create", "--dir", folder, *(part for name in names for part in ("--name", name)))[0] == 0
    )
    made = run(
        capsys, "init-repo", "--dir", tmp_path / "officers", "--key", folder / "ada.key", "--key", folder / "ben.key",
        "--officer-pub", folder / "cleo.pub", "--online-pub", folder / "online.pub",
    )  # fmt: skip
    assert made[0] == 0
    return lambda name: folder / name


def test_list_names_every_role(
    files: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = run(capsys, "keys", "list", "--repository", tmp_path / "officers", "--dir", tmp_path / "keys")
    roles = {role["role"]: role for role in answer["roles"]}
    assert code == 0 and roles["root"]["threshold"] == 2
    assert sorted(key["name"] for key in roles["targets"]["keys"]) == ["ada", "ben", "cleo"]
    assert [key["name"] for key in roles["timestamp"]["keys"]] == ["online"]
    code, answer = run(capsys, "keys", "list")
    assert code == 1 and answer["error"]["code"] == "config_invalid"


def test_rotate_is_signed_on_by_others_until_it_is_complete(
    files: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "change"
    rotate = (
        "keys", "rotate", "--repository", tmp_path / "officers", "--add", files("dora.pub"), "--online-pub",
        files("next.pub"), "--key", files("ada.key"), "--out", out,
    )  # fmt: skip
    code, answer = run(capsys, *rotate)
    assert code == 0 and not answer["complete"]
    assert {one["item"] for one in answer["owed"]} >= {"root version 2 (officers before)"}
    code, answer = run(capsys, *rotate)
    assert code == 1 and "change under way" in answer["error"]["message"]
    code, answer = run(capsys, "publish", out)
    assert code == 1 and answer["error"]["code"] == "threshold" and answer["error"]["details"]["owed"]
    code, answer = run(capsys, "stage", "--key", files("next.key"), "--out", out)
    assert code == 1 and answer["error"]["code"] == "not_an_officer"
    code, answer = run(capsys, "stage", "--key", files("ben.key"), "--out", out)
    assert code == 0 and answer["complete"] and answer["owed"] == []


def test_revoke_by_public_key_or_key_id(
    files: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, listed = run(capsys, "keys", "list", "--repository", tmp_path / "officers", "--dir", tmp_path / "keys")
    ada = next(key["key_id"] for key in listed["roles"][0]["keys"] if key["name"] == "ada")
    revoke = ("keys", "revoke", "--repository", tmp_path / "officers", "--replace-with", files("dora.pub"))
    signers = ("--key", files("ben.key"), "--key", files("cleo.key"))
    for number, officer in enumerate((ada, files("ada.pub"))):
        code, answer = run(capsys, *revoke, "--officer", officer, *signers, "--out", tmp_path / f"out-{number}")
        assert code == 0 and answer["complete"], answer
        root = parse(Root, (tmp_path / f"out-{number}" / "metadata" / "root.json").read_bytes(), "root.json").signed
        assert ada not in root.keys and len(root.roles["targets"].keyids) == 3
    code, answer = run(capsys, *revoke, "--officer", "ff" * 32, *signers, "--out", tmp_path / "none")
    assert code == 1 and answer["error"]["code"] == "not_found"


def test_a_revocation_takes_the_key_from_the_rings_too(world: World) -> None:
    world.release(1)
    world.release(1, CANARY)
    ada, ben, cleo = world.officers
    held = [ada.public_key(), cleo.public_key()]
    world.publish(signed_by(delegate_ring(world.copy, "canary", held, 1, world.now), [ada, ben]))
    draft = change_root(world.copy, RootChange(remove=(identifier(ada),)), world.now, kind="revoke")
    world.publish(signed_by(draft, [ben, cleo], [ben, cleo]))
    assert world.fetch(CANARY) == read_target(world.store, CANARY)
    raw = world.bundle(2, [ben, cleo])
    alone = world.staged(raw, CANARY, signers=[ada])
    assert code_of(lambda: world.accept(alone)) == "threshold"
    world.publish(world.staged(raw, CANARY, signers=[cleo]))
    assert [release.revision for release in current_releases(world.store)] == [2, 1]


def test_a_ring_that_would_lose_its_last_officer_blocks_the_revocation(world: World) -> None:
    world.release(1, CANARY)
    ada, ben, cleo = world.officers
    world.publish(signed_by(delegate_ring(world.copy, "canary", [ada.public_key()], 1, world.now), [ada, ben]))
    change = RootChange(remove=(identifier(ada),))
    assert code_of(lambda: change_root(world.copy, change, world.now)) == "threshold"
    world.publish(signed_by(delegate_ring(world.copy, "canary", [cleo.public_key()], 1, world.now), [cleo, ben]))
    assert owed(change_root(world.copy, change, world.now))


def test_the_root_of_the_copy_is_what_the_broker_has(world: World) -> None:
    world.release(1)
    draft = change_root(world.copy, RootChange(), world.now)
    world.publish(signed_by(draft, world.officers[:2]))
    assert current_root(world.copy) == current_root(world.store)
    assert Metadata.from_bytes(current_root(world.store)).signed.version == 2
