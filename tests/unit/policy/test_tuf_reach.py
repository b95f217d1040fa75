"""A release that follows another one carries the signed diff of reach, the one that the repository computes for itself."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
import rfc8785
from cryptography.hazmat.primitives import serialization
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.cli.main import main
from saw.policy.bundle import BundleRefused, Reach, build_manifest, describe, sign, verify_bundle
from saw.policy.loader import Bundle, load_members
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_reach import bundle_diff, reach_between
from saw.policy.tuf_repository import read_target, stage_publication, trusted_policy_keys
from saw.policy.tuf_rings import held_revision

pytestmark = pytest.mark.control("POL-01")


class Report(msgspec.Struct, frozen=True):
    digest: str
    widening: bool


def diff(old: Bundle, new: Bundle) -> Report:
    """A far-end stand-in: any longer policy is wider."""
    both = [hashlib.sha256(bundle.members["policy.yaml"]).hexdigest() for bundle in (old, new)]
    longer = len(new.members["policy.yaml"]) > len(old.members["policy.yaml"])
    return Report(hashlib.sha256("".join(both).encode()).hexdigest(), longer)


@pytest.fixture
def wider(coding: Bundle) -> Bundle:
    return load_members({**coding.members, "policy.yaml": coding.members["policy.yaml"] + b"\n# longer\n"})


@pytest.fixture
def make(world: World) -> Callable[..., bytes]:
    """A signed bundle with a stated reach."""

    def bundle(revision: int, content: Bundle, reach: Reach | None) -> bytes:
        manifest = build_manifest(content, revision, world.now, world.now + timedelta(days=1), reach=reach)
        return sign(manifest, content.members, world.officers[:2])

    return bundle


def test_a_widening_is_released_only_with_its_diff(world: World, wider: Bundle, make: Callable[..., bytes]) -> None:
    world.release(1)
    base = read_target(world.store, STABLE)
    true = reach_between(base, wider, diff)
    assert true.widening and true.base_digest == describe(base)[0]
    for reach in (
        None,
        Reach(true.base_digest, true.diff_digest, False),
        Reach(true.base_digest, "0" * 64, True),
        Reach("0" * 64, true.diff_digest, True),
    ):
        refused = world.staged(make(2, wider, reach))
        assert code_of(lambda refused=refused: world.accept(refused, diff=diff)) == "unsigned_widening"
    world.accept(world.staged(make(2, wider, true)), diff=diff)
    assert world.fetch() == make(2, wider, true)


def test_the_first_release_of_a_ring_has_nothing_to_compare_with(
    world: World, wider: Bundle, make: Callable[..., bytes]
) -> None:
    world.accept(world.staged(make(1, wider, None)), diff=diff)


def test_a_bundle_that_was_signed_for_another_ring_gets_the_reach_of_this_one(
    world: World, wider: Bundle, make: Callable[..., bytes]
) -> None:
    world.release(1)
    world.release(2, CANARY)
    raw = make(3, wider, reach_between(read_target(world.store, CANARY), wider, diff))
    world.publish(world.staged(raw, CANARY))
    assert code_of(lambda: world.accept(world.staged(raw, STABLE), diff=diff)) == "unsigned_widening"
    reach = reach_between(read_target(world.store, STABLE), wider, diff)
    stated = stage_publication(world.copy, STABLE, raw, world.officers[:2], world.now, reach=reach)
    world.accept(stated, diff=diff)
    assert world.fetch(STABLE) == raw == world.fetch(CANARY)


def test_a_rollback_states_what_it_allows_again(world: World, wider: Bundle, make: Callable[..., bytes]) -> None:
    world.publish(world.staged(make(1, wider, None)))
    world.release(2)
    old = held_revision(world.copy, "stable", "coding", 1)
    blind = roll_back(world.copy, "stable", "coding", old, now=world.now, validity=timedelta(days=1))
    assert code_of(lambda: world.accept(signed_by(blind, world.officers), diff=diff)) == "unsigned_widening"
    seen = roll_back(world.copy, "stable", "coding", old, now=world.now, validity=timedelta(days=1), diff=diff)
    reach = describe(seen.targets[STABLE])[1].reach
    assert reach is not None and reach.widening
    world.accept(signed_by(seen, world.officers), diff=diff)


@pytest.mark.parametrize(
    "reach",
    [
        None,
        {},
        {"base_digest": "0" * 64, "diff_digest": "0" * 64},
        {"base_digest": "0" * 64, "diff_digest": "0" * 64, "widening": 1},
        {"base_digest": "0" * 63, "diff_digest": "0" * 64, "widening": True},
        {"base_digest": "A" * 64, "diff_digest": "0" * 64, "widening": True},
        {"base_digest": "0" * 64 + "\n", "diff_digest": "0" * 64, "widening": True},
        {"base_digest": "0" * 64, "diff_digest": "0" * 64, "widening": True, "more": 1},
    ],
)
def test_a_reach_of_another_form_is_refused(world: World, reach: object) -> None:
    document = json.loads(build_manifest(world.content, 1, world.now, world.now + timedelta(days=1)))
    document["reach"] = reach
    raw = sign(rfc8785.dumps(document), world.content.members, world.officers[:2])
    keys = trusted_policy_keys(world.root)[0]
    with pytest.raises(BundleRefused) as caught:
        verify_bundle(raw, keys, 2, world.now)
    assert caught.value.code == "malformed"
    document["reach"] = {"base_digest": "0" * 64, "diff_digest": "0" * 64, "widening": True}
    good = sign(rfc8785.dumps(document), world.content.members, world.officers[:2])
    assert verify_bundle(good, keys, 2, world.now).reach == Reach("0" * 64, "0" * 64, True)


def test_the_command_signs_the_diff_that_the_repository_computes(
    world: World, coding: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the comparison that the product uses: one more program for an endpoint is a widening, and is named as one."""
    world.release(1)
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    keys: list[str] = []
    for number, key in enumerate(world.officers[:2]):
        (tmp_path / f"{number}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        keys += ["--key", str(tmp_path / f"{number}.key")]
    base, folder, out = tmp_path / "base.json", tmp_path / "wider", tmp_path / "2.json"
    base.write_bytes(read_target(world.copy, STABLE))
    folder.mkdir()
    policy = coding.members["policy.yaml"].replace(
        b"      - path: /usr/bin/curl\n", b"      - path: /usr/bin/curl\n      - path: /usr/bin/wget\n"
    )
    assert policy != coding.members["policy.yaml"]
    (folder / "policy.yaml").write_bytes(policy)
    (folder / "governance.yaml").write_bytes(coding.members["governance.yaml"])

    def signed(*more: str) -> dict:
        arguments = ["policy", "sign", str(folder), *keys, "--revision", "2", "--out", str(out), *more, "--json"]
        assert main(arguments) == 0
        answer: dict = json.loads(capsys.readouterr().out)
        return answer

    assert "reach" not in signed()
    blind = world.staged(out.read_bytes())
    assert code_of(lambda: world.accept(blind, diff=bundle_diff())) == "unsigned_widening"
    assert signed("--base", str(base))["reach"]["widening"] is True
    world.accept(world.staged(out.read_bytes()), diff=bundle_diff())
    assert main(["policy", "sign", str(out), *keys, "--base", str(base), "--out", str(out)]) == 1


def test_without_the_comparison_nothing_passes_as_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_diff()
    monkeypatch.setitem(sys.modules, "saw.policy.reach_diff", None)
    assert code_of(bundle_diff) == "unsupported"
