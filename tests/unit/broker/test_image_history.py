"""Which image a workspace goes back to: the newest stable one below the present that it ran, as its events tell."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from review_world import OPERATOR, World
from sqlalchemy import update

from saw.attest.verifier import RELEASED_PCRS
from saw.broker.errors import ConflictError, NotFoundError
from saw.broker.images import Move
from saw.broker.registry import CreateWorkspace, Reprovision, Step
from saw.broker.schema import audit_events, images, workspaces
from saw.broker.workspace_views import WayBack

pytestmark = pytest.mark.control("LIF-03")
NAMES = ("one", "two", "three")


class Desk:
    """A workspace that is bound to images and runs them, by the broker's own calls but for the TPM."""

    def __init__(self, world: World) -> None:
        self.broker = world.broker
        for digit, name in enumerate(NAMES):
            record = {
                "format": "saw-image-release/2", "inputs_digest": "inputs", "created": "2026-11-01T00:00:00Z",
                "not_after": "2099-11-01T00:00:00Z", "boot": {"pcrs": {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}},
                "name": name, "image_sha256": str(digit) * 64,
            }  # fmt: skip
            told = {"record": msgspec.json.encode(record).decode(), "envelope": "{}", "state": "stable"}
            with self.broker.services.store.write() as tx:
                tx.connection.execute(
                    images.insert().values(name=name, image_sha256=str(digit) * 64, registered_at="2026", **told)
                )
        wanted = CreateWorkspace(id="ws-back", sponsor="Ada", blueprint="coding", ring="stable", image="one")
        self.broker.registry.create(OPERATOR, wanted)
        self.step("provisioning")
        self.run()

    def step(self, to: str) -> None:
        self.broker.registry.transition(OPERATOR, "ws-back", Step(to=to, reason="test"))

    def run(self) -> None:
        """Start it and let it be active; the event is the one that an attestation writes."""
        self.step("attesting")
        services = self.broker.services
        with services.store.write() as tx:
            tx.connection.execute(update(workspaces).where(workspaces.c.id == "ws-back").values(state="active"))
            tx.record(
                services.events.entity_management(
                    services.clock(), OPERATOR.subject("ws-back"), ("workspace", "ws-back"), activity="activate",
                    detail={"from": "attesting", "to": "active"},
                )
            )  # fmt: skip

    def bind(self, image: str) -> None:
        self.broker.registry.reprovision(OPERATOR, "ws-back", Reprovision(image=image))

    def rebuild(self, image: str, *, works: bool = True) -> None:
        self.step("stopped")
        self.bind(image)
        self.run() if works else self.step("attesting")

    def back(self, *, further: bool = False) -> WayBack:
        return self.broker.image_history.way_back("ws-back", further=further)

    def refused(self, *, further: bool = False) -> str:
        with pytest.raises(ConflictError) as caught:
            self.back(further=further)
        assert caught.value.code == "no_earlier_image"
        assert "workspace_rebuild" in caught.value.cure
        return caught.value.message


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    world = World(tmp_path)
    yield Desk(world)
    world.broker.close()


def test_a_workspace_goes_back_to_the_image_that_it_ran_before(desk: Desk) -> None:
    assert "it is the first that it was bound to" in desk.refused()
    desk.rebuild("two")
    found = desk.back()
    assert (found.present, found.image.name, found.image.image_sha256) == ("two", "one", "0" * 64)
    assert (found.gone_back, found.passed_over) == (False, ())


def test_going_back_twice_is_going_back_once_and_further_goes_on(desk: Desk) -> None:
    desk.rebuild("two")
    desk.rebuild("three", works=False)
    assert desk.back().image.name == "two"
    desk.step("stopped")
    desk.bind("two")
    again = desk.back()
    assert (again.image.name, again.gone_back) == ("two", True)
    desk.run()
    assert desk.back().gone_back
    assert (desk.back(further=True).image.name, desk.back(further=True).gone_back) == ("one", False)
    desk.rebuild("one")
    assert "first that it was bound to" in desk.refused(further=True)
    desk.rebuild("three")
    assert desk.back().image.name == "one"


def test_a_rebuild_that_bound_back_by_itself_is_no_going_back(desk: Desk) -> None:
    desk.rebuild("two")
    desk.step("stopped")
    desk.bind("three")
    desk.bind("two")
    assert (desk.back().image.name, desk.back().gone_back) == ("one", False)


def test_what_never_ran_is_deprecated_revoked_or_ended_is_passed_over(desk: Desk) -> None:
    desk.rebuild("two", works=False)
    desk.rebuild("three")
    found = desk.back()
    assert (found.image.name, found.passed_over) == ("one", ("two: the workspace never ran it",))
    desk.broker.images.move(OPERATOR, "one", Move(to="deprecated", reason="old"))
    assert desk.refused().endswith("from three: two: the workspace never ran it; one: it is deprecated")
    desk.broker.images.move(OPERATOR, "one", Move(to="stable", reason="good again"))
    assert desk.back().image.name == "one"
    desk.broker.images.move(OPERATOR, "one", Move(to="revoked", reason="kernel"))
    assert "one: the image is revoked: kernel" in desk.refused()


def test_where_retention_took_the_beginning_the_rest_is_used_and_its_absence_said(desk: Desk) -> None:
    desk.rebuild("two")
    desk.rebuild("three")
    gone = audit_events.c.event.contains('"profile"') | audit_events.c.event.contains("attesting")
    with desk.broker.services.store.write() as tx:
        tx.connection.execute(update(audit_events).where(gone).values(event="", at=None))
    assert "the workspace never ran it" in desk.refused()
    with desk.broker.services.store.write() as tx:
        tx.connection.execute(update(audit_events).values(event="", at=None))
    assert "the trail of its time before is not held any more" in desk.refused()


def test_an_unknown_workspace_is_named(desk: Desk) -> None:
    with pytest.raises(NotFoundError, match="ws-none"):
        desk.broker.image_history.way_back("ws-none")


def test_bytes_that_are_revoked_under_another_name_are_not_gone_back_to(desk: Desk) -> None:
    desk.rebuild("two")
    desk.rebuild("three")
    assert desk.back().image.name == "two"
    with desk.broker.services.store.write() as tx:
        # The register's world has these bytes under the name "i" as well.
        tx.connection.execute(update(images).where(images.c.name == "i").values(state="revoked", state_reason="cve"))
    assert desk.back().image.name == "one"


def test_a_workspace_whose_image_was_revoked_after_it_went_back_goes_on(desk: Desk) -> None:
    for image in ("two", "three", "two"):
        desk.rebuild(image)
    assert desk.back().gone_back
    desk.broker.images.move(OPERATOR, "two", Move(to="revoked", reason="kernel"))
    found = desk.back()
    assert (found.gone_back, found.image.name) == (False, "one")
