"""Roots of the TUF repository are in the audit trail: each once, under whoever brought it, later where there was no room."""

from __future__ import annotations

import base64
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from securesystemslib.signer import CryptoSigner, SSlibKey
from test_rollout import OPERATOR, World, as_body
from tuf.api.metadata import Metadata, Root

from saw.broker.context import Caller
from saw.broker.errors import StorageFull
from saw.broker.releases import Publication as Published
from saw.broker.releases import TrustRoot
from saw.broker.store import Store
from saw.policy import tuf_accept
from saw.policy.errors import RepositoryError
from saw.policy.tuf_changes import RootChange, change_root
from saw.policy.tuf_draft import contribute

pytestmark = [pytest.mark.control("AUD-01"), pytest.mark.control("POL-02")]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path)
    yield found
    found.broker.close()


@contextmanager
def no_room(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every write finds the disk full."""

    def full(_store: Store) -> Any:
        raise StorageFull

    with patch.context() as now:
        now.setattr(Store, "write", full)
        yield


def told(world: World) -> list[tuple[str, str, str]]:
    """Return version, activity and principal of every root in the trail."""
    return [
        (event["entity"]["uid"], event["activity_name"], event["unmapped"]["saw"]["principal"])
        for item in world.broker.trail.page("broker", 0, 1000)["events"]
        if (event := item.event).get("entity", {}).get("type") == "tuf-root"
    ]


def root_of(world: World) -> TrustRoot:
    return TrustRoot(msgspec.Raw(msgspec.json.encode(base64.b64encode(world.root).decode())))


def first_publication(world: World) -> Published:
    body = as_body(world.publication(1))
    return Published(metadata={**body.metadata, "root.json": root_of(world).root}, targets=body.targets)


def successor(world: World) -> Published:
    """Return the publication of a root that follows the present one: there is one more officer."""
    dora = Ed25519PrivateKey.generate()
    change = change_root(world.officers, RootChange(add=(dora.public_key(),)), world.now)
    return as_body(contribute(change, [*world.keys[:2], dora]).publication)


def test_a_root_is_recorded_once(world: World) -> None:
    assert world.broker.releases.install_root(OPERATOR, root_of(world))["changed"]
    assert told(world) == [("1", "Create", OPERATOR.principal)]
    assert not world.broker.releases.install_root(OPERATOR, root_of(world))["changed"]
    world.publish(1)
    world.restart()
    world.broker.releases.catch_up()
    assert told(world) == [("1", "Create", OPERATOR.principal)]


def test_a_root_for_which_there_was_no_room_is_recorded_later_under_whoever_brought_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_room(monkeypatch):
        with pytest.raises(StorageFull):
            world.broker.releases.install_root(OPERATOR, root_of(world))
        with pytest.raises(StorageFull):
            world.broker.releases.catch_up()
    assert told(world) == []
    world.broker.releases.catch_up()
    assert told(world) == [("1", "Create", OPERATOR.principal)]
    world.broker.releases.catch_up()
    world.restart()
    assert len(told(world)) == 1


def test_a_root_that_came_with_the_first_publication_is_recorded_later_too(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_room(monkeypatch), pytest.raises(StorageFull):
        world.broker.releases.publish(OPERATOR, first_publication(world))
    world.broker.releases.catch_up()
    assert told(world) == [("1", "Create", OPERATOR.principal)]
    world.broker.releases.publish(OPERATOR, first_publication(world))
    assert len(told(world)) == 1
    assert [one["revision"] for one in world.broker.releases.state()["releases"]] == [1]


def test_a_root_that_a_broker_which_died_took_is_recorded_by_the_next_start(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_room(monkeypatch), pytest.raises(StorageFull):
        world.broker.releases.install_root(OPERATOR, root_of(world))
    world.restart()
    assert told(world) == [("1", "Create", "service:saw-broker")]


def test_a_root_that_follows_is_recorded_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.broker.releases.install_root(OPERATOR, root_of(world))
    world.publish(1)
    with no_room(monkeypatch), pytest.raises(StorageFull):
        world.broker.releases.publish(OPERATOR, successor(world))
    assert len(told(world)) == 1
    world.broker.releases.catch_up()
    assert told(world)[1:] == [("2", "Update", OPERATOR.principal)]


def test_a_root_that_alone_found_room_in_the_repository_is_recorded_later(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full once the new root lies there, before the metadata that goes with it."""
    world.broker.releases.install_root(OPERATOR, root_of(world))
    world.publish(1)
    before = tuf_accept.write_atomic

    def full(path: Path, raw: bytes) -> None:
        if path.name.endswith(".root.json"):
            before(path, raw)
            return
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as now:
        now.setattr(tuf_accept, "write_atomic", full)
        with pytest.raises(OSError, match="No space"):
            world.broker.releases.publish(OPERATOR, successor(world))
    world.broker.releases.catch_up()
    assert told(world)[1:] == [("2", "Update", OPERATOR.principal)]


def test_what_others_brought_is_recorded_under_their_names_before_the_next_publication(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_room(monkeypatch), pytest.raises(StorageFull):
        world.broker.releases.install_root(OPERATOR, root_of(world))
    other = Caller("service:pipeline", "10.0.0.9", "r-1")
    world.broker.releases.publish(other, as_body(world.publication(1)))
    assert told(world) == [("1", "Create", OPERATOR.principal)]


def test_a_first_root_may_have_another_number_and_none_is_told_that_never_was(tmp_path: Path) -> None:
    found = World(tmp_path)
    try:
        third = numbered(found, 3)
        found.broker.releases.install_root(OPERATOR, third)
        assert told(found) == [("3", "Create", OPERATOR.principal)]
    finally:
        found.broker.close()


def test_a_first_root_with_a_number_that_no_file_can_have_is_refused(world: World) -> None:
    with pytest.raises(RepositoryError, match="version 1000000000"):
        world.broker.releases.install_root(OPERATOR, numbered(world, 1_000_000_000))
    assert told(world) == []


def numbered(world: World, version: int) -> TrustRoot:
    """Return the world's first root under another number, signed anew by its officers."""
    root = Metadata[Root].from_bytes(world.root)
    root.signed.version = version
    root.signatures.clear()
    for key in world.keys:
        root.sign(CryptoSigner(key, SSlibKey.from_crypto(key.public_key())), append=True)
    return TrustRoot(msgspec.Raw(msgspec.json.encode(base64.b64encode(root.to_bytes()).decode())))
