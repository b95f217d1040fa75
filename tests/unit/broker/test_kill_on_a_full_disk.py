"""A kill by somebody who signed in, on a full disk: what the provider says of the person is noted in the room for kills."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from portal_world import Visitor, World

from saw.broker.errors import StorageFull
from saw.broker.schema import people, sso_sessions
from saw.broker.sso import sessions as sso
from saw.broker.store import Store

pytestmark = [pytest.mark.control("LIF-02"), pytest.mark.control("ID-01")]
GROUPS = {"security": "sec", "operator": "ops", "auditor": "aud", "user": "staff"}


class Disk:
    """A disk that takes nothing more until the room that was set aside is given back."""

    def __init__(self, patch: pytest.MonkeyPatch, store: Store) -> None:
        self.full, self.spent = True, 0
        real = Store.write

        def write(one: Store) -> Any:
            if self.full:
                raise StorageFull
            return real(one)

        def spend() -> bool:
            self.full, self.spent = False, self.spent + 1
            return self.spent == 1

        patch.setattr(Store, "write", write)
        patch.setattr(store, "_reserve", SimpleNamespace(spend=spend, keep=lambda: None))


class Provider:
    """Says of each refresh token which person it is, and in which groups."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        assert world.broker.sso is not None
        kept = world.broker.sso.sessions
        self.groups = {"dan": ["ops"], "eve": ["sec"], "fay": ["aud"], "ada": ["staff"]}
        roles = {role: (group,) for role, group in GROUPS.items()}
        patch.setattr(kept, "_settings", msgspec.structs.replace(kept._settings, roles=roles))
        patch.setattr(kept._provider, "refresh", lambda token: SimpleNamespace(refresh_token=None, name=token))
        patch.setattr(sso, "person_claims", self.claims)
        with world.broker.services.store.write() as tx:
            tx.connection.execute(people.update().values(issuer=kept._settings.provider.issuer))
            for row in tx.connection.execute(sso_sessions.select()).all():
                sealed = kept._seal.close(row.id, row.person.partition("@")[0].encode())
                mine = sso_sessions.c.id == row.id
                tx.connection.execute(sso_sessions.update().where(mine).values(refresh=sealed))

    def claims(
        self, _settings: Any, _provider: Any, tokens: Any, *_now: Any, **_how: Any
    ) -> tuple[Any, dict[str, Any]]:
        name = tokens.name
        said = {"email": f"{name}@example.com", "email_verified": True, "groups": self.groups[name]}
        return SimpleNamespace(sub=name), said


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    found = World(tmp_path, operate=True)
    found.visitors |= {f"{name}-cli": found.terminal(name) for name in ("dan", "eve", "fay", "ada")}
    yield found
    found.close()


@pytest.fixture
def provider(world: World, monkeypatch: pytest.MonkeyPatch) -> Provider:
    return Provider(world, monkeypatch)


@pytest.fixture
def disk(world: World, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> Disk:
    assert provider is not None
    return Disk(monkeypatch, world.broker.services.store)


def kill(visitor: Visitor) -> tuple[int, str]:
    answer = visitor.ask("POST", "/operator/v1/workspaces/ws-a/kill", json={"reason": "scans"})
    return answer.status_code, answer.json().get("error", "")


@pytest.mark.parametrize("who", ["dan-cli", "eve-cli"])
def test_a_kill_after_saw_login_is_made(world: World, disk: Disk, who: str) -> None:
    assert kill(world[who]) == (200, "")
    assert (world.state("ws-a"), disk.spent) == ("quarantined", 1)


def test_a_kill_in_the_browser_is_made(world: World, disk: Disk) -> None:
    assert world["eve"].post("/workspaces/ws-a/kill", reason="scans", confirm="ws-a").status_code == 303
    assert (world.state("ws-a"), disk.spent) == ("quarantined", 1)


def test_what_is_no_kill_leaves_the_room_alone(world: World, disk: Disk) -> None:
    step = {"to": "stopped", "reason": "night"}
    answer = world["dan-cli"].ask("POST", "/operator/v1/workspaces/ws-a/transition", json=step)
    assert (answer.status_code, answer.json()["error"]) == (507, "storage_full")
    assert (world.state("ws-a"), disk.spent) == ("active", 0)


@pytest.mark.parametrize("who", ["fay-cli", "ada-cli"])
def test_somebody_who_may_not_kill_leaves_the_room_alone(world: World, disk: Disk, who: str) -> None:
    assert kill(world[who]) == (507, "storage_full")
    assert (world.state("ws-a"), disk.spent) == ("active", 0)


def test_somebody_who_has_lost_the_role_at_the_provider_kills_nothing(
    world: World, provider: Provider, disk: Disk
) -> None:
    provider.groups["eve"] = []
    assert kill(world["eve-cli"]) == (403, "no_role")
    assert world.state("ws-a") == "active"


def test_with_room_the_provider_is_asked_as_before(world: World, provider: Provider) -> None:
    assert kill(world["eve-cli"]) == (200, "")
    provider.groups["dan"] = []
    assert kill(world["dan-cli"]) == (403, "no_role")
