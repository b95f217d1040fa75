"""Attacks on a policy's way to a workspace that no other file tries; test_attack_coverage.py names the tests of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
import rfc8785
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from tuf_world import STABLE, World, code_of

from saw.policy.bundle import build_manifest, sign, verify_bundle
from saw.policy.loader import Bundle, load_members
from saw.policy.tuf_metadata import trusted_policy_keys

pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("POL-02")]
Make = Callable[..., bytes]
Keys = dict[str, Ed25519PublicKey]
Officers = list[Ed25519PrivateKey]


def test_a_release_counts_for_its_own_blueprint(world: World, coding: Bundle) -> None:
    raw = world.bundle(1)
    assert code_of(lambda: world.publish(world.staged(raw, "rings/stable/operations.bundle.json"))) in {
        "bundle",
        "malformed",
    }
    other = coding.members["governance.yaml"].replace(b"name: coding", b"name: operations")
    operations = world.bundle(1, content=load_members({**coding.members, "governance.yaml": other}))
    world.publish(world.staged(operations, "rings/stable/operations.bundle.json"))
    world.publish(world.staged(raw))
    assert world.fetch(STABLE) == raw


def test_a_release_of_another_deployment_is_not_taken(
    tmp_path: Path, world: World, coding: Bundle, online: Ed25519PrivateKey, now: datetime
) -> None:
    strangers = [Ed25519PrivateKey.generate() for _ in range(3)]
    elsewhere = World(tmp_path / "elsewhere", coding, strangers, online, now)
    foreign = elsewhere.release(9)
    world.release(1)
    keys, threshold = trusted_policy_keys(world.root)
    assert code_of(lambda: verify_bundle(foreign, keys, threshold, now)) == "threshold"
    assert code_of(lambda: world.accept(elsewhere.staged(elsewhere.bundle(10)))) in {"threshold", "stale_base"}
    # A whole repository in place of ours, with the same online key.
    world.served.directory = elsewhere.store
    assert code_of(world.fetch) in {"threshold", "malformed", "rollback"}
    world.served.directory = world.store
    assert verify_bundle(world.fetch(), keys, threshold, now).revision == 1


SIGNED_TROUBLE = {
    "duplicate key": lambda text: text + b"version: 1\n",
    "unknown field": lambda text: text + b"unknown: 1\n",
    "alias bomb": lambda text: b"x: &x [a]\ny: [*x, *x]\n" + text,
    "tag": lambda text: text.replace(b"version: 1", b"version: !!int 1", 1),
    "second document": lambda text: text + b"\n---\nversion: 1\n",
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text,
    "merge key": lambda text: text + b"<<: {}\n",
}


@pytest.mark.parametrize("kind", SIGNED_TROUBLE)
def test_signed_trouble_is_not_loaded(
    coding: Bundle, officers: Officers, trusted: Keys, now: datetime, kind: str
) -> None:
    def verified(policy: bytes) -> int:
        members = {**coding.members, "policy.yaml": policy}
        made = Bundle(members, coding.policy, coding.governance)
        raw = sign(build_manifest(made, 1, now, now + timedelta(days=1)), members, officers)
        return verify_bundle(raw, trusted, 2, now).revision

    good = coding.members["policy.yaml"]
    assert code_of(lambda: verified(SIGNED_TROUBLE[kind](good))) == "policy_invalid"
    assert verified(good + b"# the same with a remark\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(note="x"),
        lambda manifest: manifest.update(revision=0),
        lambda manifest: manifest.update(revision="1"),
        lambda manifest: manifest.update(revision=2**60),
        lambda manifest: manifest.update(not_after="2999-01-01"),
        lambda manifest: manifest.update(not_before="2026-02-30T00:00:00Z"),
        lambda manifest: manifest.update(blueprint="operations"),
        lambda manifest: manifest.update(version="9.9.9"),
        lambda manifest: manifest.update(version="\ud800"),
        lambda manifest: manifest.update(reach=None),
        lambda manifest: manifest["members"].pop("governance.yaml"),
        lambda manifest: manifest["members"].update({"../x": manifest["members"]["policy.yaml"]}),
    ],
)
def test_a_manifest_that_says_something_else_is_refused_though_signed(
    coding: Bundle, officers: Officers, trusted: Keys, now: datetime, change: Callable[[dict], object]
) -> None:
    manifest = build_manifest(coding, 1, now, now + timedelta(days=1))
    tree = json.loads(manifest)
    change(tree)
    try:
        payload = rfc8785.dumps(tree)
    except (ValueError, UnicodeError):
        payload = json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
    refusal = code_of(lambda: verify_bundle(sign(payload, coding.members, officers), trusted, 2, now))
    assert refusal in {"malformed", "member_mismatch"}
    assert verify_bundle(sign(manifest, coding.members, officers), trusted, 2, now).revision == 1


def test_a_client_without_memory_still_has_the_floor(world: World, now: datetime) -> None:
    old = world.release(1)
    keys, threshold = trusted_policy_keys(world.root)
    store = {path: path.read_bytes() for path in world.store.rglob("*") if path.is_file()}
    new = world.release(2)
    assert world.fetch() == new
    for path in list(world.store.rglob("*")):
        if path.is_file() and path not in store:
            path.unlink()
    for path, raw in store.items():
        path.write_bytes(raw)
    assert code_of(world.fetch) == "rollback"  # the client remembers
    world.client = world.client.with_name("wiped")
    assert world.fetch() == old  # one that forgot cannot know
    assert code_of(lambda: verify_bundle(old, keys, threshold, now, min_revision=2)) == "rolled_back"
    assert verify_bundle(new, keys, threshold, now, min_revision=2).revision == 2


def test_a_clock_set_back_or_forward_loads_nothing(signed: Make, trusted: Keys, now: datetime) -> None:
    raw = signed(revision=1, days=30)
    for clock, code in (
        (now - timedelta(seconds=1), "not_yet_valid"),
        (now - timedelta(days=20_000), "not_yet_valid"),
        (now + timedelta(days=30), "expired"),
        (now + timedelta(days=20_000), "expired"),
    ):
        assert code_of(lambda clock=clock: verify_bundle(raw, trusted, 2, clock)) == code
    for clock in (now, now + timedelta(days=30) - timedelta(seconds=1)):
        assert verify_bundle(raw, trusted, 2, clock).revision == 1


def test_a_clock_set_back_brings_no_old_policy(signed: Make, trusted: Keys, now: datetime) -> None:
    old = signed(revision=1, start=now - timedelta(days=60))
    back_then = now - timedelta(days=45)
    assert code_of(lambda: verify_bundle(old, trusted, 2, now, min_revision=2)) == "expired"
    assert code_of(lambda: verify_bundle(old, trusted, 2, back_then, min_revision=2)) == "rolled_back"
    assert verify_bundle(old, trusted, 2, back_then, min_revision=1).revision == 1


@pytest.mark.parametrize("zone", [timedelta(hours=14), -timedelta(hours=12)])
def test_the_window_is_the_same_moment_in_every_time_zone(
    signed: Make, trusted: Keys, now: datetime, zone: timedelta
) -> None:
    from datetime import timezone

    local = timezone(zone)
    raw = signed(start=now.astimezone(local), days=1)
    assert verify_bundle(raw, trusted, 2, now.astimezone(local)).not_before == now
    later = (now + timedelta(days=1)).astimezone(local)
    assert code_of(lambda: verify_bundle(raw, trusted, 2, later)) == "expired"
