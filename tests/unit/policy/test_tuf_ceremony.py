"""A key ceremony needs no network, can be taken up at any step, and its transcript cannot be changed unnoticed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tuf_world import code_of

from saw.cli.main import main
from saw.policy.keys import load_private_key
from saw.policy.tuf_ceremony import begin, digests, resume, take_part
from saw.policy.tuf_changes import RootChange, change_root
from saw.policy.tuf_draft import save_draft
from saw.policy.tuf_repository import current_root, install_root, trusted_policy_keys

pytestmark = pytest.mark.control("POL-01")
Run = Callable[..., tuple[int, dict]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, dict]:
        code = main(["policy", *map(str, arguments), "--json"])
        return code, json.loads(capsys.readouterr().out)

    return call


@pytest.fixture
def keys(tmp_path: Path, run: Run) -> Path:
    names = [part for name in ("ada", "ben", "cleo", "dora", "online") for part in ("--name", name)]
    assert run("keys", "create", "--dir", tmp_path / "keys", *names)[0] == 0
    return tmp_path / "keys"


@pytest.fixture
def first(tmp_path: Path, keys: Path) -> list[object]:
    """The arguments that begin a first ceremony of three officers, two of whom must sign."""
    officers = [part for name in ("ada", "ben", "cleo") for part in ("--officer", f"{name}={keys / name}.pub")]
    folder, online = tmp_path / "ceremony", keys / "online.pub"
    repository = tmp_path / "officers"
    return [folder, *officers, "--threshold", 2, "--online-pub", online, "--repository", repository]


def test_a_first_root_is_made_step_by_step(run: Run, keys: Path, first: list[object], tmp_path: Path, now) -> None:
    folder = first[0]
    code, begun = run("keys", "ceremony", *first)
    assert code == 0 and not begun["complete"] and len(begun["owed"]) == 2
    assert run("keys", "ceremony", *first)[1]["entries"] == 1, "beginning again takes it up"
    digest = begun["items"]["root.json"]
    code, answer = run("keys", "ceremony", folder, "--key", keys / "ada.key", "--confirm", "0" * 64)
    assert code == 1 and answer["error"]["code"] == "mix_and_match"
    code, answer = run("keys", "ceremony", folder, "--key", keys / "ada.key", "--confirm", digest)
    assert code == 0 and answer["entries"] == 2 and not answer["complete"]
    assert run("keys", "ceremony", folder, "--key", keys / "ada.key")[1]["entries"] == 2, "signing again adds nothing"
    # The folder is carried to another machine.
    away = shutil.move(str(folder), tmp_path / "stick")
    code, answer = run("keys", "ceremony", away, "--key", keys / "dora.key")
    assert code == 1 and answer["error"]["code"] == "not_an_officer"
    code, answer = run(
        "keys", "ceremony", away, "--key", keys / "ben.key", "--confirm", digest, "--repository", tmp_path / "officers"
    )
    assert code == 0 and answer["complete"] and answer["owed"] == []
    transcript = json.loads((Path(away) / "transcript.json").read_text())
    assert [(entry["action"], entry["name"]) for entry in transcript["entries"]] == [
        ("begun", ""), ("signed", "ada"), ("signed", "ben"), ("completed", ""),
    ]  # fmt: skip
    assert {entry["items"]["root.json"] for entry in transcript["entries"]} == {digest}
    root = current_root(tmp_path / "officers")
    assert trusted_policy_keys(root)[1] == 2
    (tmp_path / "store").mkdir()
    assert install_root(tmp_path / "store", root, load_private_key(keys / "online.key"), now) == 1
    assert b"PRIVATE" not in (Path(away) / "transcript.json").read_bytes()


def test_a_rotation_is_a_ceremony_too(run: Run, keys: Path, first: list[object], tmp_path: Path) -> None:
    signers = ("--key", keys / "ada.key", "--key", keys / "ben.key")
    assert run("keys", "ceremony", *first, *signers)[1]["complete"]
    rotation = (tmp_path / "second", "--repository", tmp_path / "officers", "--add", keys / "dora.pub")
    code, answer = run("keys", "ceremony", *rotation)
    assert code == 0 and answer["subject"] == "root version 2"
    code, answer = run("keys", "ceremony", *rotation, "--key", keys / "ada.key")
    assert code == 0 and not answer["complete"]
    code, answer = run("keys", "ceremony", *rotation, "--key", keys / "ben.key")
    assert code == 0 and answer["complete"]
    assert trusted_policy_keys((tmp_path / "second" / "metadata" / "root.json").read_bytes())[1] == 2


def test_another_change_in_the_same_folder_is_refused(run: Run, keys: Path, world, tmp_path: Path) -> None:
    world.release(1)
    dora = RootChange(add=(load_private_key(keys / "dora.key").public_key(),))
    draft = change_root(world.copy, dora, world.now)
    begin(tmp_path / "c", draft, {}, world.now)
    other = change_root(world.copy, RootChange(threshold=3), world.now, kind="revoke")
    assert code_of(lambda: begin(tmp_path / "c", other, {}, world.now)) == "config_invalid"
    assert begin(tmp_path / "c", draft, {}, world.now).draft == draft


def test_a_crash_between_signature_and_transcript_is_healed(world, tmp_path: Path) -> None:
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    begin(tmp_path / "c", draft, {}, world.now)
    from saw.policy.tuf_draft import contribute

    save_draft(tmp_path / "c", contribute(draft, [world.officers[0]]))
    state = take_part(tmp_path / "c", world.officers[0], world.now)
    assert [entry.action for entry in state.transcript.entries] == ["begun", "signed"]


@pytest.mark.parametrize("change", ["digest", "name", "drop", "swap"])
def test_a_changed_transcript_is_noticed(world, tmp_path: Path, change: str) -> None:
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    begin(tmp_path / "c", draft, {}, world.now)
    for officer in world.officers:
        state = take_part(tmp_path / "c", officer, world.now)
    assert state.complete and resume(tmp_path / "c").complete
    path = tmp_path / "c" / "transcript.json"
    document = json.loads(path.read_text())
    entries = document["entries"]
    if change == "digest":
        entries[1]["items"]["root.json"] = "0" * 64
    elif change == "name":
        entries[2]["name"] = "ada"
    elif change == "drop":
        del entries[1]
    else:
        entries[1], entries[2] = entries[2], entries[1]
    path.write_text(json.dumps(document))
    assert code_of(lambda: resume(tmp_path / "c")) == "malformed"


def test_a_root_that_was_exchanged_under_way_is_noticed(world, tmp_path: Path) -> None:
    draft = change_root(world.copy, RootChange(threshold=3), world.now)
    begin(tmp_path / "c", draft, {}, world.now)
    take_part(tmp_path / "c", world.officers[0], world.now)
    other = change_root(world.copy, RootChange(threshold=1), world.now)
    save_draft(tmp_path / "c", type(other)(draft.note, other.base, other.metadata, other.targets))
    assert digests(other) != digests(draft)
    assert code_of(lambda: take_part(tmp_path / "c", world.officers[1], world.now)) == "malformed"
    save_draft(tmp_path / "c", draft)
    assert take_part(tmp_path / "c", world.officers[1], world.now).owed


def test_beginning_needs_everything(run: Run, keys: Path, tmp_path: Path) -> None:
    ada = ("--officer", f"ada={keys / 'ada.pub'}")
    for arguments in ((), ada, (*ada, "--threshold", 1), ("--officer", "ada")):
        code, answer = run("keys", "ceremony", tmp_path / "new", *arguments)
        assert code == 1 and answer["error"]["code"] == "config_invalid"
    code, answer = run(
        "keys", "ceremony", tmp_path / "new", *ada, "--threshold", 2, "--online-pub", keys / "online.pub"
    )
    assert code == 1 and answer["error"]["code"] == "threshold"
    code, _ = run("keys", "ceremony", tmp_path / "new", *ada, "--threshold", 1, "--online-pub", keys / "online.pub")
    assert code == 0
