"""policy_release and policy_rollback as people run them, against a real broker: shown, approved, signed, released, gone back.

Every test has a blueprint and rings of its own, so each runs alone and in any order.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from playbook_rig import ROOT, Desk, Office, blueprint_of, open_office


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """The officers of a broker with the limits that it has by itself."""
    with open_office(tmp_path_factory.mktemp("free")) as office:
        yield office


@pytest.fixture
def desk(free: Office, request: pytest.FixtureRequest) -> Desk:
    return Desk(free, blueprint_of(request.node.name))


# ------------------------------------------------------------ shown, approved, signed, published


@pytest.mark.thorough
@pytest.mark.control("POL-01")
def test_a_first_release_is_shown_refused_without_approval_and_then_released_once(desk: Desk) -> None:
    before = desk.fingerprint()
    shown = desk.release("--check", "--diff")
    assert shown.ok, shown.text
    assert "GET, HEAD, OPTIONS https://git.example.com:443" in shown.text
    assert shown.text.count("reach digest") == 2, "the list and --diff both show the reach"
    assert (desk.fingerprint(), desk.released()) == (before, 0), "check mode changes nothing"
    refused = desk.release()
    assert not refused.ok
    assert "reach more" in refused.words
    assert refused.approval == desk.change()
    assert refused.approval in shown.text
    assert desk.released() == 0
    released = desk.release(approved=refused.approval)
    assert released.ok, released.text
    assert released.changed > 0
    assert desk.released() == 1
    held = desk.fingerprint()
    again = desk.release()
    assert again.ok, again.text
    assert (again.changed, desk.released(), desk.fingerprint()) == (0, 1, held)


@pytest.mark.control("POL-01")
def test_check_mode_shows_a_widening_as_diff_and_changes_nothing(desk: Desk) -> None:
    desk.publish("read-only", 1)
    desk.write("read-write")
    before = desk.fingerprint()
    shown = desk.release("--check", "--diff")
    assert shown.ok, shown.text
    assert "PATCH, POST, PUT https://git.example.com:443" in shown.text
    assert desk.change("read-write", "read-only") in shown.text
    handed = shown.words.partition("CUSTOM STATS")[2]  # to the next job of a workflow, which releases exactly this
    assert f'"policy_release_approved": "{desk.change("read-write", "read-only")}"' in handed
    assert (desk.fingerprint(), desk.released()) == (before, 1)


@pytest.mark.thorough
@pytest.mark.control("POL-01")
def test_officers_sign_one_after_the_other(desk: Desk) -> None:
    digest = desk.change()
    for key, revision in (("ada", 0), ("ben", 0), ("ada", 1)):
        run = desk.release(keys=(key,), approved=digest)
        assert run.ok, run.text
        assert ("nothing is released yet" in run.words) == (revision == 0), run.text
        assert desk.released() == revision


def test_the_same_bundle_goes_to_the_next_ring(desk: Desk) -> None:
    desk.publish("read-only", 1)
    stable = f"{desk.name}-stable"
    released = desk.release(ring=stable, approved=desk.change())
    assert released.ok, released.text
    assert desk.released(stable) == 1
    found = {one["ring"]: one["current"] for one in desk.lab.operator.request("GET", "/v1/policy/rings")["rings"]}
    assert found[desk.ring]["policy_digest"] == found[stable]["policy_digest"]


def _hook(place: Path, condition: str) -> str:
    place.write_text(
        "- name: Ask the ticket system\n  ansible.builtin.assert:\n"
        f"    that: {condition}\n    fail_msg: ticket 4711 is not closed\n"
    )
    return str(place)


@pytest.mark.thorough
@pytest.mark.control("POL-01")
def test_a_hook_that_passes_lets_a_widening_through_and_one_that_fails_stops_it(desk: Desk, tmp_path: Path) -> None:
    desk.publish("read-only", 1)
    desk.write("read-write")
    unapproved = desk.release()
    assert not unapproved.ok, "without a hook this change needs its digest"
    refused = desk.release(approval=_hook(tmp_path / "no.yml", "not policy_release_compared.reach.widening"))
    assert not refused.ok
    assert "ticket 4711 is not closed" in refused.text
    assert (desk.released(), desk.releases.exists()) == (1, False), "nothing was signed"
    digest = desk.change("read-write", "read-only")
    passed = desk.release(
        approval=_hook(tmp_path / "yes.yml", f"policy_release_compared.reach.reach_digest == '{digest}'")
    )
    assert passed.ok, passed.text
    assert desk.released() == 2


def test_less_reach_needs_no_approval(desk: Desk) -> None:
    desk.publish("read-write", 1)
    released = desk.release()
    assert released.ok, released.text
    assert desk.released() == 2


def test_what_breaks_an_invariant_stops_before_anything_is_signed(desk: Desk, tmp_path: Path) -> None:
    good = (desk.office.base / "policies/invariants.yaml").read_text()
    (tmp_path / "invariants.yaml").write_text(good.replace("metadata.google.internal", "git.example.com"))
    broken = desk.release(invariants=str(tmp_path / "invariants.yaml"), approved=desk.change())
    assert not broken.ok
    assert "no-metadata" in broken.text
    assert "TASK [Sign]" not in broken.text


@pytest.mark.thorough
def test_a_copy_that_somebody_published_past_is_refused(desk: Desk, tmp_path: Path) -> None:
    desk.publish("read-only", 1)
    shutil.copytree(desk.office.copy, tmp_path / "copy")
    desk.publish("read-write", 2)
    stale = desk.release(repository=str(tmp_path / "copy"))
    assert not stale.ok
    assert f"is not what ring {desk.ring} runs" in stale.words
    update = ("repository-update", "--repository", str(tmp_path / "copy"), "--context", str(desk.office.context))
    assert "brought up to" in desk.office.saw(*update)
    assert "is at" in desk.office.saw(*update)
    current = desk.release(repository=str(tmp_path / "copy"))
    assert current.ok, current.text


@pytest.mark.thorough
def test_a_play_that_is_killed_between_staging_and_publishing_goes_on_where_it_was(desk: Desk) -> None:
    digest = desk.change()
    staged = desk.releases / f"{desk.name}-1-{desk.ring}/metadata/targets.json"
    desk.release_killed(staged.exists, "the publication is staged", approved=digest)
    assert desk.released() == 0
    again = desk.release(approved=digest)
    assert again.ok, again.text
    assert desk.released() == 1
    assert desk.release().changed == 0


# ------------------------------------------------------------ what the ring says


@pytest.mark.thorough
@pytest.mark.control("POL-02")
def test_a_ring_that_says_nothing_is_halted(desk: Desk) -> None:
    desk.workspace("ws-late")
    late = desk.release(approved=desk.change())
    assert not late.ok
    assert f"ring {desk.ring} did not load revision 1 of {desk.name} (timeout); it is halted there" in late.words
    [rollout] = desk.rollouts()
    assert (rollout["state"], rollout["reason"].split(":")[0]) == ("halted", "by playbook")


@pytest.mark.control("POL-02")
def test_a_ring_whose_workspace_refuses_is_halted(desk: Desk) -> None:
    workspace = desk.workspace("ws-refusing")
    desk.publish("read-only", 1)
    workspace.say("refused", desk.rollouts()[0]["policy_digest"], 1, "validate_failed")
    assert desk.rollouts()[0]["state"] == "running", "limits halt no first release"
    refused = desk.release(watch_seconds=60)
    assert not refused.ok
    assert f"ring {desk.ring} did not load revision 1 of {desk.name} (refused); it is halted there" in refused.words
    assert "ws-refusing refused" in refused.words
    assert desk.rollouts()[0]["state"] == "halted"


# ------------------------------------------------------------ the way back


@pytest.mark.thorough
def test_a_way_back_can_be_asked_for_where_the_broker_does_not_want_one(desk: Desk) -> None:
    desk.publish("read-write", 1)
    released = desk.release(way_back=True)
    assert released.ok, released.text
    assert desk.rollouts()[0]["rollback"]["state"] == "kept"


# ------------------------------------------------------------ going back


@pytest.mark.thorough
@pytest.mark.control("POL-01")
def test_rolling_back_is_one_command_and_repeating_it_changes_nothing(desk: Desk) -> None:
    desk.publish("read-write", 1)
    desk.publish("read-only", 2)
    before = desk.fingerprint()
    shown = desk.play("policy_rollback", "--check", "--diff", to=1)
    assert shown.ok, shown.text
    assert "PATCH, POST, PUT https://git.example.com:443" in shown.text
    assert (desk.fingerprint(), desk.released()) == (before, 2)
    alone = desk.play("policy_rollback", keys=("ada",), to=1)
    assert alone.ok, alone.text
    assert "nothing is released yet" in alone.words
    back = desk.play("policy_rollback", keys=("ben", "ada"), to=1)
    assert back.ok, back.text
    assert desk.released() == 3
    again = desk.play("policy_rollback", to=1)
    assert again.ok, again.text
    assert (again.changed, desk.released()) == (0, 3)


def test_a_revision_that_is_not_held_is_named(desk: Desk) -> None:
    desk.publish("read-only", 1)
    refused = desk.play("policy_rollback", to=77)
    assert not refused.ok
    assert "revision 77 is not held; held are 1" in refused.words


@pytest.mark.parametrize(
    ("versions", "newest"), [((1,), "1"), (range(1, 10), "9"), (range(1, 11), "10"), ((9, 10, 11, 100), "100")]
)
def test_the_newest_root_is_told_by_its_number(versions: range, newest: str, tmp_path: Path) -> None:
    [play] = yaml.safe_load((ROOT / "playbooks/policy_release.yml").read_text(encoding="utf-8"))
    (tmp_path / "metadata").mkdir()
    for version in versions:
        (tmp_path / f"metadata/{version}.root.json").touch()
    root = play["vars"]["policy_release_root"]
    values = {"policy_release_root": root, "policy_release_at": {"repository": str(tmp_path)}}
    done = subprocess.run(
        [Path(sys.executable).parent / "ansible", "localhost", "-m", "debug", "-a", "var=policy_release_root",
         "-e", json.dumps(values)],
        env={**os.environ, "ANSIBLE_NOCOLOR": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert re.search(rf'"policy_release_root": "?{newest}"?$', done.stdout, re.MULTILINE), done.stdout + done.stderr
    verify = "{{ policy_release_at.repository }}/metadata/{{ policy_release_root }}.root.json"
    assert verify in (ROOT / "playbooks/policy_release.yml").read_text(encoding="utf-8")
