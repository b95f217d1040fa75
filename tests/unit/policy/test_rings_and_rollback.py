"""What each ring gets and got is told; going back is one command that ends published or says who must still sign."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
from tuf_world import CANARY, STABLE, World, code_of, signed_by

from saw.cli import policy_rings
from saw.cli.main import main
from saw.policy.bundle import describe, read_content
from saw.policy.keys import key_id
from saw.policy.loader import Bundle, load_members
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_repository import Publication
from saw.policy.tuf_rings import held_revision, ring_status

pytestmark = pytest.mark.control("POL-01")


@pytest.fixture
def wider(coding: Bundle) -> Bundle:
    """Another content of the same blueprint."""
    governance = coding.members["governance.yaml"].replace(b"1.0.0", b"1.1.0", 1)
    return load_members({**coding.members, "governance.yaml": governance})


@pytest.fixture
def twice(world: World, wider: Bundle) -> World:
    """Revision 1 in both rings, and revision 2 with other content in stable."""
    world.release(1)
    world.release(1, CANARY)
    world.publish(world.staged(world.bundle(2, content=wider)))
    return world


def test_rings_tell_revision_digest_signers_and_history(twice: World) -> None:
    canary, stable = ring_status(twice.copy)
    assert (canary.ring, canary.current.revision, canary.history) == ("canary", 1, ())
    assert (stable.ring, stable.current.revision, stable.current.version) == ("stable", 2, "1.1.0")
    assert [old.revision for old in stable.history] == [1]
    signers = tuple(sorted(key_id(key.public_key()) for key in twice.officers[:2]))
    assert stable.current.signers == stable.history[0].signers == signers
    assert msgspec.to_builtins(ring_status(twice.store)) == msgspec.to_builtins(ring_status(twice.copy))


def test_the_old_content_comes_back_as_the_next_revision(twice: World, coding: Bundle) -> None:
    old = held_revision(twice.copy, "stable", "coding", 1)
    draft = roll_back(twice.copy, "stable", "coding", old, now=twice.now, validity=msgspec_days(7))
    assert code_of(lambda: twice.accept(signed_by(draft, twice.officers[:1]))) == "threshold"
    twice.publish(signed_by(draft, twice.officers[:2]))
    raw = twice.fetch(STABLE)
    assert read_content(raw).members == coding.members and describe(raw)[1].revision == 3
    assert [old.revision for old in ring_status(twice.copy)[1].history] == [2, 1]


def msgspec_days(days: int):
    from datetime import timedelta

    return timedelta(days=days)


def test_a_revision_that_is_not_held_is_named(twice: World) -> None:
    assert code_of(lambda: held_revision(twice.copy, "stable", "coding", 9)) == "not_found"
    assert code_of(lambda: held_revision(twice.copy, "canary", "coding", 2)) == "not_found"
    old = held_revision(twice.copy, "stable", "coding", 1)
    nowhere = lambda: roll_back(twice.copy, "beta", "coding", old, now=twice.now, validity=msgspec_days(1))  # noqa: E731
    assert code_of(nowhere) == "not_found"


class Commands:
    """Key files of the world's officers, and ``saw policy`` with a broker that takes publications into the world's store."""

    def __init__(self, world: World, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        from cryptography.hazmat.primitives import serialization

        self.world, self.capsys, self.folder = world, capsys, folder
        for name, key in zip(("ada", "ben", "cleo"), world.officers, strict=True):
            form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            (folder / f"{name}.key").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))

    def __call__(self, *arguments: object) -> tuple[int, dict]:
        code = main(["policy", *map(str, arguments), "--json"])
        return code, json.loads(self.capsys.readouterr().out)

    def rollback(self, *officers: str, to: int | None = 1, out: str = "back") -> tuple[int, dict]:
        keys = [part for name in officers for part in ("--key", self.folder / f"{name}.key")]
        return self(
            "rollback",
            "--repository",
            self.world.copy,
            "--ring",
            "stable",
            *(() if to is None else ("--to", to)),
            *keys,
            "--out",
            self.folder / out,
        )


@pytest.fixture
def commands(
    twice: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Commands:
    def hand_over(publication: Publication, context: str | None, root: str | None = None) -> dict[str, object]:
        return {"targets_version": twice.accept(publication).targets_version}

    monkeypatch.setattr(policy_rings, "hand_over", hand_over)
    return Commands(twice, tmp_path, capsys)


def test_two_keys_roll_back_in_one_command(commands: Commands) -> None:
    code, answer = commands.rollback("ada", "ben")
    assert code == 0 and answer["published"]
    assert describe(commands.world.fetch(STABLE))[1].revision == 3
    code, answer = commands("rings", "--repository", commands.world.copy)
    stable = answer["rings"][1]
    assert code == 0 and (stable["current"]["revision"], stable["current"]["version"]) == (3, "1.0.0")


def test_without_a_revision_it_goes_back_by_one(commands: Commands) -> None:
    code, answer = commands.rollback("ada", "ben", to=None)
    assert code == 0 and answer["subject"] == "stable/coding to revision 1 as 3"
    [change] = answer["changes"]
    before = describe(held_revision(commands.world.copy, "stable", "coding", 2))[0]
    assert (change["target"], change["reach"]["base_digest"]) == (STABLE, before), "and it is shown what that changes"
    code, answer = commands("rollback", "--repository", commands.world.copy, "--ring", "canary", "--key",
                            commands.folder / "ada.key", "--out", commands.folder / "none")  # fmt: skip
    assert code == 1 and "has no earlier revision here" in answer["error"]["message"]


def test_one_key_prepares_and_says_who_must_still_sign(commands: Commands) -> None:
    code, answer = commands.rollback("ada")
    assert code == 1 and not answer["published"]
    ben = key_id(commands.world.officers[1].public_key())
    assert [one["item"] for one in answer["owed"]] == ["bundle rings/stable/coding.bundle.json", "targets version 5"]
    assert all(ben in one["may"] for one in answer["owed"])
    assert describe(commands.world.fetch(STABLE))[1].revision == 2
    code, answer = commands.rollback("ada")
    assert code == 1, "the same officer again adds nothing"
    code, answer = commands.rollback("ben")
    assert code == 1 and [one["item"] for one in answer["owed"]] == ["targets version 5"]
    code, answer = commands.rollback("ada")
    assert code == 0 and answer["published"]
    back = describe(commands.world.fetch(STABLE))[1]
    assert back.revision == 3
    assert datetime.fromisoformat(back.not_before) < datetime.now(UTC) - timedelta(minutes=4), "clocks may be behind"


def test_a_rollback_that_somebody_overtook_is_not_taken_up(commands: Commands) -> None:
    assert commands.rollback("ada")[0] == 1
    commands.world.release(3)
    code, answer = commands.rollback("ben")
    assert code == 1 and "another change" in answer["error"]["message"]
    assert commands.rollback("ada", "ben", out="again")[1]["published"]


def test_rings_for_people(commands: Commands, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "rings", "--repository", str(commands.world.copy)]) == 0
    text = capsys.readouterr().out
    assert "stable/coding: revision 2 (1.1.0) until " in text and "before: revision 1" in text
