"""policy_release where a way back is wanted, against a real broker: it is signed first, kept, and used when a ring breaks.

Every test has a blueprint and rings of its own, so each runs alone and in any order.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from playbook_rig import Desk, Office, RunningWorkspace, blueprint_of, open_office, until


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """The officers of a broker that offers nothing without a way back."""
    with open_office(tmp_path_factory.mktemp("guarded"), require_rollback=True) as office:
        yield office


@pytest.fixture
def careful(guarded: Office, request: pytest.FixtureRequest) -> Desk:
    return Desk(guarded, blueprint_of(request.node.name))


@pytest.mark.thorough
@pytest.mark.control("LIF-03")
@pytest.mark.control("POL-02")
def test_a_ring_loads_it_breaks_is_halted_and_rolled_back_by_itself(careful: Desk) -> None:
    machine = RunningWorkspace(careful, "ws-real")
    try:
        loaded = careful.release(approved=careful.change(), watch_seconds=120)
        assert loaded.ok, loaded.text + (machine.directory / "policyd.log").read_text()
        first = careful.rollouts()[0]
        assert [(one["workspace"], one["state"]) for one in first["members"]] == [("ws-real", "loaded")]
        assert machine.current() == machine.known.attested() == first["policy_digest"]

        machine.break_checker(broken=True)
        careful.write("read-write")
        broken = careful.release(approved=careful.change("read-write", "read-only"), watch_seconds=120)
        assert not broken.ok
        assert f"did not load revision 2 of {careful.name} (halted" in broken.words, broken.text
        newest, halted, _ = careful.rollouts()
        assert (halted["revision"], halted["state"], halted["rollback"]["state"]) == (2, "halted", "published")
        assert (newest["revision"], newest["returns_to"]) == (3, 1)
        assert machine.current() == first["policy_digest"], "what was in force stays in force"

        machine.break_checker(broken=False)
        until(lambda: machine.known.attested() == newest["policy_digest"], "the workspace loads the way back")
        until(lambda: careful.rollouts()[0]["all_loaded"], "the ring has loaded it")
        assert careful.released() == 3
    finally:
        machine.stop()


@pytest.mark.thorough
@pytest.mark.control("LIF-03")
def test_where_a_way_back_is_wanted_it_is_signed_first_and_kept_before_anybody_is_offered_the_release(
    careful: Desk,
) -> None:
    careful.publish("read-write", 1)
    released = careful.release()
    assert released.ok, released.text
    tasks = re.findall(r"TASK \[([^\]]+)\]", released.text)
    places = [tasks.index(name) for name in ("Sign the way back", "Publish", "Hand it to the broker")]
    assert places == sorted(places)
    [newest, _] = careful.rollouts()
    assert (newest["revision"], newest["state"]) == (2, "running")
    assert (newest["rollback"]["state"], newest["rollback"]["returns_to"]) == ("kept", 1)
    again = careful.release()
    assert again.ok, again.text
    assert (again.changed, careful.released()) == (0, 2)


@pytest.mark.control("LIF-03")
def test_a_release_whose_way_back_cannot_be_made_is_not_published(careful: Desk) -> None:
    careful.publish("read-write", 1)
    lost = careful.release(back_to=77)
    assert not lost.ok
    assert "revision 77" in lost.words
    assert "is not held here" in lost.words
    assert (careful.released(), len(careful.rollouts())) == (1, 1)


@pytest.mark.thorough
def test_officers_sign_the_way_back_one_after_the_other(careful: Desk) -> None:
    careful.publish("read-write", 1)
    said = []
    for key in ("ada", "ben", "ada", "ben", "ada"):
        run = careful.release(keys=(key,))
        assert run.ok, run.text
        said.append("the way back lacks signatures" in run.words)
        assert careful.released() == (2 if len(said) == 5 else 1), run.text
    assert said == [False, False, True, True, False]
    assert careful.rollouts()[0]["rollback"]["state"] == "kept"


@pytest.mark.thorough
def test_a_play_that_is_killed_between_publishing_and_escrow_is_made_good_by_the_next(careful: Desk) -> None:
    careful.publish("read-write", 1)
    # The officers' copy takes over what was published in the same step; the way back comes a second later.
    careful.release_killed(lambda: careful.released() == careful.adopted() == 2, "revision 2 is published")
    [newest, _] = careful.rollouts()
    assert (newest["state"], newest["rollback"]) == ("waiting", None)
    again = careful.release()
    assert again.ok, again.text
    [newest, _] = careful.rollouts()
    assert (newest["state"], newest["rollback"]["state"]) == ("running", "kept")
    assert careful.release().changed == 0


def test_a_renewal_needs_no_way_back(careful: Desk) -> None:
    careful.publish("read-only", 1)
    renewed = careful.release(renew=True)
    assert renewed.ok, renewed.text
    assert (careful.released(), careful.rollouts()[0]["state"]) == (2, "running")
    assert "TASK [Sign the way back]" not in renewed.text
