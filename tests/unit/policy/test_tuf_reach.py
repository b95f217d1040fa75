"""Every release carries the signed diff of reach, the one that the repository and each signer compute for themselves."""

from __future__ import annotations

import base64
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

from saw.cli import policy_release
from saw.cli.main import main
from saw.cli.policy_signing import load_publication, save_publication
from saw.policy.bundle import BundleRefused, Reach, build_manifest, describe, sign, verify_bundle
from saw.policy.loader import Bundle, load_bundle_folder, load_members
from saw.policy.reach_automata import TooLarge
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_compared import Compared
from saw.policy.tuf_reach import NOTHING, bundle_diff, reach_between
from saw.policy.tuf_repository import Publication, adopt_publication, read_target, trusted_policy_keys
from saw.policy.tuf_rings import held_revision

pytestmark = pytest.mark.control("POL-01")


class Report(msgspec.Struct, frozen=True):
    digest: str
    widening: bool


def diff(old: Bundle, new: Bundle) -> Report:
    """A far-end stand-in: any longer policy is wider."""
    texts = [bundle.members.get("policy.yaml", b"") for bundle in (old, new)]
    both = [hashlib.sha256(text).hexdigest() for text in texts]
    longer = len(texts[1]) > len(texts[0])
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
        Reach("1" * 64, true.diff_digest, True),
        reach_between(None, wider, diff),
    ):
        refused = world.blind(make(2, wider, reach))
        assert code_of(lambda refused=refused: world.accept(refused, diff=diff)) == "unsigned_widening"
    world.accept(world.blind(make(2, wider, true)), diff=diff)
    assert world.fetch() == make(2, wider, true)


def test_the_check_is_on_unless_told_how_to_compare(world: World, make: Callable[..., bytes]) -> None:
    world.release(1)
    blind = world.blind(make(2, world.content, None))
    assert code_of(lambda: world.accept(blind)) == "unsigned_widening"
    world.accept(world.staged(make(2, world.content, None)))


def test_the_whole_reach_of_a_first_release_is_new_and_signed_as_such(
    world: World, wider: Bundle, make: Callable[..., bytes]
) -> None:
    true = reach_between(None, wider, diff)
    assert (true.base_digest, true.widening) == (NOTHING, True)
    for reach in (None, Reach(NOTHING, "1" * 64, True), Reach("1" * 64, true.diff_digest, True)):
        refused = world.blind(make(1, wider, reach))
        assert code_of(lambda refused=refused: world.accept(refused, diff=diff)) == "unsigned_widening"
    world.accept(world.blind(make(1, wider, true)), diff=diff)


def test_a_narrow_step_elsewhere_is_no_statement_about_a_ring_that_is_new(
    world: World, coding: Bundle, make: Callable[..., bytes]
) -> None:
    """What was signed as a small change of canary opens everything at once where nothing was released before."""
    world.release(1, CANARY)
    raw = make(2, coding, reach_between(read_target(world.copy, CANARY), coding, bundle_diff()))
    assert not describe(raw)[1].reach.widening  # type: ignore[union-attr]
    world.publish(world.blind(raw, CANARY))
    assert code_of(lambda: world.accept(world.blind(raw, STABLE))) == "unsigned_widening"
    world.accept(world.staged(raw, STABLE))


def test_a_release_that_no_longer_loads_counts_as_one_that_allows_nothing(
    wider: Bundle, make: Callable[..., bytes]
) -> None:
    document = json.loads(make(1, wider, None))
    members = dict.fromkeys(document["members"], b"version: 1\nunknown: field\n")
    envelope = document["envelope"]
    manifest = json.loads(base64.b64decode(envelope["payload"]))
    for name, raw in members.items():
        document["members"][name] = base64.b64encode(raw).decode()
        manifest["members"][name] = {"sha256": hashlib.sha256(raw).hexdigest(), "length": len(raw)}
    envelope["payload"] = base64.b64encode(rfc8785.dumps(manifest)).decode()
    broken = json.dumps(document).encode()
    found = reach_between(broken, wider, bundle_diff())
    assert found.base_digest == describe(broken)[0]
    assert found.diff_digest == reach_between(None, wider, bundle_diff()).diff_digest


def test_what_cannot_be_compared_is_refused_with_a_reason(
    world: World, wider: Bundle, make: Callable[..., bytes]
) -> None:
    world.release(1)

    def never(old: Bundle, new: Bundle) -> Report:
        raise TooLarge

    raw = make(2, wider, reach_between(read_target(world.copy, STABLE), wider, diff))
    assert code_of(lambda: world.accept(world.blind(raw), diff=never)) == "reach_undecided"
    world.accept(world.blind(raw), diff=diff)


def test_under_a_lock_a_comparison_is_only_looked_up(world: World, wider: Bundle, make: Callable[..., bytes]) -> None:
    world.release(1)
    asked: list[int] = []

    def counted(old: Bundle, new: Bundle) -> Report:
        asked.append(1)
        return diff(old, new)

    compared = Compared(counted)
    raw = make(2, wider, reach_between(read_target(world.copy, STABLE), wider, diff))
    assert code_of(lambda: world.accept(world.blind(raw), diff=compared)) == "stale_base"
    compared.prepare(world.store, {STABLE: raw})
    compared.prepare(world.store, {STABLE: raw})
    assert len(asked) == 1, "the same pair is compared once"
    world.accept(world.blind(raw), diff=compared)
    assert len(asked) == 1
    compared.prepare(world.store, {STABLE: b"no bundle"})


def test_a_bundle_that_was_signed_for_another_ring_gets_the_reach_of_this_one(
    world: World, wider: Bundle, make: Callable[..., bytes]
) -> None:
    world.release(1)
    world.release(2, CANARY)
    raw = make(3, wider, reach_between(read_target(world.store, CANARY), wider, diff))
    world.accept(world.blind(raw, CANARY), diff=diff)
    adopt_publication(world.copy, world.blind(raw, CANARY))
    assert code_of(lambda: world.accept(world.blind(raw, STABLE), diff=diff)) == "unsigned_widening"
    reach = reach_between(read_target(world.store, STABLE), wider, diff)
    world.accept(world.blind(raw, STABLE, reach=reach), diff=diff)
    assert world.fetch(STABLE) == raw == world.fetch(CANARY)


def test_a_rollback_states_what_it_allows_again(world: World, wider: Bundle, make: Callable[..., bytes]) -> None:
    world.publish(world.staged(make(1, wider, None)))
    world.release(2)
    old = held_revision(world.copy, "stable", "coding", 1)
    seen = roll_back(world.copy, "stable", "coding", old, now=world.now, validity=timedelta(days=1), diff=diff)
    reach = describe(seen.targets[STABLE])[1].reach
    assert reach is not None and reach.widening
    signed = signed_by(seen, world.officers)
    assert code_of(lambda: world.accept(signed)) == "unsigned_widening", "by another comparison than the repository's"
    world.accept(signed, diff=diff)


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


class Desk:
    """The officers' key files, a released base, a wider folder, and ``saw policy``."""

    def __init__(self, world: World, coding: Bundle, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.world, self.capsys, self.base = world, capsys, folder
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        for name, key in zip(("ada", "ben", "cleo"), world.officers, strict=True):
            (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
        world.release(1)
        (folder / "1.json").write_bytes(read_target(world.copy, STABLE))
        policy = coding.members["policy.yaml"].replace(
            b"      - path: /usr/bin/curl\n", b"      - path: /usr/bin/curl\n      - path: /usr/bin/wget\n"
        )
        assert policy != coding.members["policy.yaml"]
        (folder / "wider").mkdir()
        (folder / "wider/policy.yaml").write_bytes(policy)
        (folder / "wider/governance.yaml").write_bytes(coding.members["governance.yaml"])

    def __call__(self, *arguments: object, signers: tuple[str, ...] = ()) -> tuple[int, dict]:
        keys = [part for name in signers for part in ("--key", str(self.base / f"{name}.key"))]
        code = main(["policy", *map(str, arguments), *keys, "--json"])
        return code, json.loads(self.capsys.readouterr().out)

    def sign(self, *more: object, out: str = "2.json", signers: tuple[str, ...] = ("ada", "ben")) -> tuple[int, dict]:
        return self("sign", self.base / "wider", "--out", self.base / out, *more, signers=signers)


@pytest.fixture
def desk(world: World, coding: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(world, coding, tmp_path, capsys)


def test_the_command_signs_the_diff_that_the_repository_computes(desk: Desk) -> None:
    """With the comparison that the product uses: one more program for an endpoint is a widening, and is named as one."""
    code, answer = desk.sign("--revision", 2, "--base", desk.base / "1.json")
    assert code == 0 and answer["reach"]["widening"] is True
    assert any("/usr/bin/wget" in json.dumps(item) for item in answer["diff"]["gained"])
    assert answer["diff"]["reach_digest"] == answer["reach"]["diff_digest"]
    desk.world.accept(desk.world.blind((desk.base / "2.json").read_bytes()))


def test_the_release_in_force_is_found_in_the_officers_copy(desk: Desk) -> None:
    of = ("--repository", desk.world.copy, "--ring")
    code, answer = desk.sign(*of, "stable")
    assert (code, answer["revision"]) == (0, 2), "one more than in force"
    assert answer["reach"]["base_digest"] == describe((desk.base / "1.json").read_bytes())[0]
    code, answer = desk.sign(*of, "canary", out="c.json")
    assert (code, answer["revision"], answer["reach"]["base_digest"]) == (0, 1, NOTHING)
    code, answer = desk.sign(*of, "stable", "--revision", 1)
    assert code == 1 and "does not follow revision 1" in answer["error"]["message"]


def test_people_see_the_table_before_a_key_is_used(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["policy", "sign", str(desk.base / "wider"), "--revision", "2", "--base", str(desk.base / "1.json")]
    assert main([*arguments, "--key", str(desk.base / "none.key"), "--out", str(desk.base / "2.json")]) == 1
    shown = capsys.readouterr().out
    assert "GAINED · " in shown and "/usr/bin/wget" in shown
    assert not (desk.base / "2.json").exists()
    assert main([*arguments, "--key", str(desk.base / "ada.key"), "--out", str(desk.base / "2.json")]) == 0
    assert "WIDENS the reach of" in capsys.readouterr().out


def test_a_bundle_that_follows_another_is_not_signed_without_it(desk: Desk, coding: Bundle) -> None:
    code, answer = desk.sign("--revision", 2)
    assert code == 1 and "--base RELEASED.bundle.json" in answer["error"]["cure"]
    assert not (desk.base / "2.json").exists()
    code, answer = desk.sign("--revision", 2, "--base", desk.base / "1.json", "--first")
    assert code == 1 and "exclude each other" in answer["error"]["message"]
    code, answer = desk.sign("--revision", 2, "--ring", "stable")
    assert code == 1 and "--repository and --ring together" in answer["error"]["cure"]
    other = desk.base / "other.json"
    governance = coding.members["governance.yaml"].replace(b"name: coding", b"name: other")
    content = load_members({**coding.members, "governance.yaml": governance})
    other.write_bytes(desk.world.bundle(1, content=content))
    code, answer = desk.sign("--revision", 2, "--base", other)
    assert code == 1 and "is of blueprint other, not coding" in answer["error"]["message"]
    # Nothing can be in force before revision 1; with a higher one somebody has to say that the ring is new.
    for more in (("--revision", 1), ("--revision", 9, "--first")):
        code, answer = desk.sign(*more)
        assert code == 0 and answer["reach"]["base_digest"] == NOTHING
    refused = desk.world.blind((desk.base / "2.json").read_bytes())
    assert code_of(lambda: desk.world.accept(refused)) == "unsigned_widening", "the broker knows better"


def test_an_officer_who_adds_a_signature_compares_again(desk: Desk) -> None:
    base, out = desk.base / "1.json", desk.base / "2.json"
    desk.sign("--revision", 2, "--base", base, signers=("ada",))
    add = ("sign", out, "--out", out)
    code, answer = desk(*add, signers=("ben",))
    assert code == 1 and "who signs sees what changes" in answer["error"]["message"]
    desk.world.now += timedelta(seconds=1)
    (desk.base / "forged.json").write_bytes(desk.world.bundle(1))
    code, answer = desk(*add, "--base", desk.base / "forged.json", signers=("ben",))
    assert (code, answer["error"]["code"]) == (1, "reach_differs")
    assert len(describe(out.read_bytes())[2]) == 1
    code, answer = desk(*add, "--base", base, signers=("ben",))
    assert (code, answer["signatures"]) == (0, 2) and answer["diff"]["gained"]
    desk.world.accept(desk.world.blind(out.read_bytes()))


def test_a_bundle_that_states_no_reach_or_an_untrue_one_gets_no_signature(
    desk: Desk, make: Callable[..., bytes]
) -> None:
    content, path = load_bundle_folder(desk.base / "wider"), desk.base / "given.json"
    true = reach_between((desk.base / "1.json").read_bytes(), content, bundle_diff())
    for reach in (None, Reach(true.base_digest, true.diff_digest, False), Reach(true.base_digest, "1" * 64, True)):
        path.write_bytes(make(2, content, reach))
        code, answer = desk("sign", path, "--out", path, "--base", desk.base / "1.json", signers=("cleo",))
        assert (code, answer["error"]["code"]) == (1, "reach_differs")
    path.write_bytes(make(2, content, true))
    assert desk("sign", path, "--out", path, "--base", desk.base / "1.json", signers=("cleo",))[0] == 0


def test_who_stages_and_who_signs_the_publication_on_compare_again(desk: Desk) -> None:
    bundle, out = desk.base / "2.json", desk.base / "publication"
    # Signed for a ring that has nothing yet: staging states what it changes here.
    desk.sign("--revision", 2, "--first")
    copy = ("--repository", desk.world.copy)
    code, answer = desk("stage", *copy, "--ring", "stable", "--bundle", bundle, "--out", out, signers=("ada",))
    [change] = answer["changes"]
    assert code == 0 and change["reach"]["base_digest"] == describe((desk.base / "1.json").read_bytes())[0]
    assert change["reach"]["widening"] and change["diff"]["gained"]
    code, answer = desk("stage", "--out", out, *copy, signers=("ben",))
    assert code == 0 and answer["changes"] == [change]
    desk.world.accept(load_publication(str(out)))


def test_nobody_signs_a_publication_on_that_states_another_change(desk: Desk) -> None:
    out, base = desk.base / "publication", desk.base / "1.json"
    desk.sign("--revision", 2, "--base", base)
    raw = (desk.base / "2.json").read_bytes()
    save_publication(str(out), desk.world.blind(raw, signers=desk.world.officers[:1]))
    add = ("stage", "--out", out)
    code, answer = desk(*add, signers=("ben",))
    assert (code, answer["error"]["code"]) == (1, "base_missing")
    desk.world.now += timedelta(seconds=1)
    (desk.base / "other.json").write_bytes(desk.world.bundle(1))
    code, answer = desk(*add, "--base", desk.base / "other.json", signers=("ben",))
    assert (code, answer["error"]["code"]) == (1, "unsigned_widening")
    assert code_of(lambda: desk.world.accept(load_publication(str(out)))) == "threshold"
    code, answer = desk(*add, "--base", base, signers=("ben",))
    assert code == 0 and answer["changes"][0]["reach"]["widening"]
    desk.world.accept(load_publication(str(out)))


def test_publish_refuses_before_the_broker_is_asked(
    desk: Desk, make: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Publication] = []

    def hand_over(publication: Publication, context: str | None, root: str | None = None) -> dict[str, object]:
        sent.append(publication)
        return {}

    monkeypatch.setattr(policy_release, "hand_over", hand_over)
    content, out = load_bundle_folder(desk.base / "wider"), desk.base / "publication"
    save_publication(str(out), desk.world.blind(make(2, content, None)))
    code, answer = desk("publish", out, "--repository", desk.world.copy)
    assert (code, answer["error"]["code"]) == (1, "unsigned_widening")
    assert "it widens the reach of the release in force, and no diff was signed" in answer["error"]["message"]
    assert not sent
    save_publication(str(out), desk.world.staged(make(2, content, None)))
    assert desk("publish", out, "--repository", desk.world.copy)[0] == 0
    assert len(sent) == 1


def test_without_the_comparison_nothing_passes_as_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_diff()
    monkeypatch.setitem(sys.modules, "saw.policy.reach_diff", None)
    assert code_of(bundle_diff) == "unsupported"
