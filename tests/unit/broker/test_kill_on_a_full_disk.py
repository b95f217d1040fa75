"""A full disk and people who signed in: they go on to read, and kill, for as long as their sessions live."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from portal_world import BASTION, OPERATOR, Visitor, World
from sqlalchemy import select

from saw.broker.clock import iso
from saw.broker.errors import StorageFull
from saw.broker.people import disentitle
from saw.broker.schema import people, sessions, sponsors, sso_sessions
from saw.broker.sso import rechecks
from saw.broker.sso.provider import ProviderRefused, ProviderUnavailable
from saw.broker.sso.unwritten import Unwritten
from saw.broker.store import Store
from saw.identity.oidc import TokenRefused

pytestmark = [pytest.mark.control("LIF-02"), pytest.mark.control("ID-01")]
GROUPS = {"security": "sec", "operator": "ops", "auditor": "aud", "user": "staff"}
LATER = timedelta(minutes=6)
"""More than ``recheck_s``."""


class Disk:
    """A disk that takes nothing more; the room that was set aside is enough for one write."""

    def __init__(self, patch: pytest.MonkeyPatch, store: Store) -> None:
        self.room, self.spent = 0.0, 0
        real = Store.write

        def write(one: Store) -> Any:
            if self.room <= 0:
                raise StorageFull
            self.room -= 1
            return real(one)

        def spend() -> bool:
            self.spent += 1
            self.room += self.spent == 1
            return self.spent == 1

        patch.setattr(Store, "write", write)
        patch.setattr(store, "_reserve", SimpleNamespace(spend=spend, keep=lambda: None))
        patch.setattr(store, "_shared", False)  # as with a file, whatever the tests are run on

    def clear(self) -> None:
        self.room = math.inf


class Provider:
    """Gives a new refresh token each time, and nothing more to whoever comes with a used one."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        assert world.broker.sso is not None
        kept = world.broker.sso.sessions
        self.groups = {"dan": ["ops"], "eve": ["sec"], "fay": ["aud"], "ada": ["staff"]}
        self.groups |= {"ben": ["staff"], "cleo": ["staff"]}
        self.good: dict[str, int] = {}
        self.asked: list[str] = []
        self.away = False
        self.seal, self.checks = kept._seal, kept._checks
        roles = {role: (group,) for role, group in GROUPS.items()}
        for part in (kept, self.checks):
            patch.setattr(part, "_settings", msgspec.structs.replace(kept._settings, roles=roles))
        patch.setattr(self.checks._provider, "refresh", self.refresh)
        patch.setattr(rechecks, "person_claims", self.claims)
        with world.broker.services.store.write() as tx:
            tx.connection.execute(people.update().values(issuer=kept._settings.provider.issuer))
            for row in tx.connection.execute(sso_sessions.select()).all():
                self.good[row.id] = 0
                sealed = self.seal.close(row.id, f"{row.id} 0".encode())
                mine = sso_sessions.c.id == row.id
                tx.connection.execute(sso_sessions.update().where(mine).values(refresh=sealed))

    def refresh(self, token: str) -> Any:
        grant, number = token.split()
        if self.away:
            raise ProviderUnavailable("away")
        self.asked.append(grant)
        if self.good.get(grant) != int(number):
            self.good.pop(grant, None)
            raise ProviderRefused("invalid_grant")
        self.good[grant] += 1
        return SimpleNamespace(refresh_token=f"{grant} {self.good[grant]}", name=grant.partition("-")[2])

    def claims(
        self, _settings: Any, _provider: Any, tokens: Any, *_now: Any, **_how: Any
    ) -> tuple[Any, dict[str, Any]]:
        name = tokens.name
        said = {"email": f"{name}@example.com", "email_verified": True, "groups": self.groups[name]}
        return SimpleNamespace(sub=name), said

    def stored(self, world: World, session: str) -> str:
        """Return the refresh token in the database."""
        return self.seal.open(session, rows(world, session)[0].refresh).decode()


def rows(world: World, *names: str) -> list[Any]:
    with world.broker.services.store.read() as connection:
        return list(connection.execute(select(sso_sessions).where(sso_sessions.c.id.in_(names))).all())


def tick(world: World) -> None:
    assert world.broker.sso is not None
    world.broker.sso.sessions.tick()


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


@pytest.mark.parametrize("who", ["cli-eve", "ss-eve"])
def test_it_goes_on_when_the_providers_word_is_old(world: World, provider: Provider, disk: Disk, who: str) -> None:
    for _ in range(2):
        world.now += LATER
        tick(world)
        page = world["eve"].get("/workspaces/ws-a")
        assert page.status_code == 200
        assert 'name="confirm"' in page.text, "the form of the kill"
        assert world["eve-cli"].ask("GET", "/operator/v1/workspaces/ws-a").status_code == 200
    assert provider.asked.count(who) == 2, "once for each time that its word was old"
    world.now += LATER
    assert disk.spent == 0
    if who == "cli-eve":
        assert kill(world["eve-cli"]) == (200, "")
    else:
        assert world["eve"].post("/workspaces/ws-a/kill", reason="scans", confirm="ws-a").status_code == 303
    assert (world.state("ws-a"), disk.spent) == ("quarantined", 1)
    assert provider.stored(world, who) == f"{who} 0", "there was room for the kill alone"

    disk.clear()
    tick(world)
    assert provider.stored(world, who) == f"{who} {provider.good[who]}"
    assert rows(world, who)[0].checked_at == iso(world.now)
    assert not provider.checks._unwritten.held.words
    for _ in range(2):
        world.now += LATER
        assert world["eve"].get("/workspaces/ws-a").status_code == 200
        assert kill(world["eve-cli"]) == (200, "")
    assert provider.stored(world, who) == f"{who} {provider.good[who]}"


def test_a_check_takes_the_place_of_what_was_kept_where_there_is_room_again(
    world: World, provider: Provider, disk: Disk
) -> None:
    world.now += LATER
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    disk.clear()
    world.now += LATER
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    assert (provider.stored(world, "ss-eve"), provider.good["ss-eve"]) == ("ss-eve 2", 2)
    tick(world)
    assert rows(world, "ss-eve")[0].checked_at == iso(world.now)


@pytest.mark.parametrize("later", [timedelta(0), LATER])
def test_somebody_who_has_lost_every_role_is_out_at_once_and_stays_out(
    world: World, provider: Provider, disk: Disk, later: timedelta
) -> None:
    world.now += later
    provider.groups["eve"] = []
    assert kill(world["eve-cli"]) == (403, "no_role")
    asked = len(provider.asked)
    provider.groups["eve"] = ["sec"]
    assert kill(world["eve-cli"]) == (401, "not_signed_in")
    assert world["eve"].get("/workspaces/ws-a").status_code == 303, "the browser's session is over too"
    tick(world)
    assert (world.state("ws-a"), disk.spent, set(provider.asked[asked:]) & {"ss-eve", "cli-eve"}) == (
        "active",
        0,
        set(),
    )

    disk.clear()
    tick(world)
    assert rows(world, "ss-eve", "cli-eve") == []
    with world.broker.services.store.read() as connection:
        assert connection.execute(select(people.c.roles).where(people.c.name == "eve@example.com")).scalar() == "[]"
    assert len(rows(world, "ss-dan", "cli-dan")) == 2


def test_somebody_who_has_lost_the_role_for_it_is_refused_in_every_session(
    world: World, provider: Provider, disk: Disk
) -> None:
    world.now += LATER
    provider.groups["eve"] = ["staff"]
    assert kill(world["eve-cli"])[0] == 507, "what was tried in vain would have to be recorded"
    provider.groups["eve"] = ["sec"]
    assert world["eve"].get("/workspaces/ws-a").status_code == 200, "the provider has given it back"
    provider.groups["eve"] = ["staff"]
    assert kill(world["eve-cli"])[0] == 507
    assert world["eve"].get("/workspaces/ws-a").status_code == 404, "nobody else's workspace is shown to a user"
    assert world["eve"].post("/workspaces/ws-a/kill", reason="scans", confirm="ws-a").status_code == 404
    assert (world.state("ws-a"), disk.spent) == ("active", 0)

    disk.clear()
    tick(world)
    assert kill(world["eve-cli"]) == (403, "not_allowed")
    assert world["eve"].get("/workspaces/ws-a").status_code == 404


def test_a_session_that_the_provider_has_ended_is_over_at_once(world: World, provider: Provider, disk: Disk) -> None:
    del provider.good["cli-eve"]
    assert kill(world["eve-cli"]) == (401, "session_ended")
    assert kill(world["eve-cli"]) == (401, "not_signed_in")
    assert world["eve-cli"].ask("GET", "/operator/v1/workspaces/ws-a").status_code == 401
    assert (world.state("ws-a"), disk.spent, provider.asked.count("cli-eve")) == ("active", 0, 1)
    assert world["eve"].post("/workspaces/ws-a/kill", reason="scans", confirm="ws-a").status_code == 303
    disk.clear()
    tick(world)
    assert [row.id for row in rows(world, "ss-eve", "cli-eve")] == ["ss-eve"]


def test_the_word_counts_no_longer_than_from_the_database(world: World, provider: Provider, disk: Disk) -> None:
    world.now += LATER
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    provider.away = True
    world.now += timedelta(seconds=299)
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    world.now += timedelta(seconds=1)
    assert world["eve"].get("/workspaces/ws-a").status_code == 503
    assert disk.spent == 0


@pytest.mark.parametrize("how", ["deleted", "expired", "idle", "no role"])
def test_what_the_database_says_of_the_end_goes_before(world: World, provider: Provider, disk: Disk, how: str) -> None:
    assert world["dan-cli"].ask("GET", "/operator/v1/workspaces").status_code == 200
    world.now += LATER
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    assert provider.checks._unwritten.held.words
    mine = sso_sessions.c.id == "ss-eve"
    disk.room = 1
    with world.broker.services.store.write() as tx:
        if how == "deleted":
            tx.connection.execute(sso_sessions.delete().where(mine))
        elif how == "expired":
            tx.connection.execute(sso_sessions.update().where(mine).values(expires_at=iso(world.now)))
        elif how == "idle":
            idle = world.now - timedelta(minutes=30)
            tx.connection.execute(sso_sessions.update().where(mine).values(seen_at=iso(idle)))
        else:
            disentitle(tx.connection, "eve@example.com", world.now)
    assert world["eve"].get("/workspaces/ws-a").status_code == 303
    disk.clear()
    provider.checks.write_down()
    assert not provider.checks._unwritten.held.words
    assert world["eve"].get("/workspaces/ws-a").status_code == 303


def test_who_is_disabled_here_is_refused_whatever_the_provider_says(
    world: World, provider: Provider, disk: Disk
) -> None:
    disk.room = 1
    with world.broker.services.store.write() as tx:
        values = {"name": "eve@example.com", "state": "disabled", "reason": "left", "changed_at": iso(world.now)}
        tx.connection.execute(sponsors.insert().values(**values, changed_by="operator:root", version=1))
    assert kill(world["eve-cli"]) == (403, "sponsor_disabled")
    assert world["eve"].get("/workspaces/ws-a").status_code == 303
    assert (world.state("ws-a"), disk.spent, provider.asked) == ("active", 0, ["cli-eve"])


def test_a_later_sign_in_is_not_ended_by_what_was_said_before_it(world: World, provider: Provider, disk: Disk) -> None:
    provider.groups["eve"] = []
    assert kill(world["eve-cli"]) == (403, "no_role")
    provider.groups["eve"] = ["sec"]
    world.now += LATER
    disk.clear()
    assert world.broker.sso is not None
    token = SimpleNamespace(sub="eve", sid="", auth_time=None, acr="")
    claims = provider.claims(None, None, SimpleNamespace(name="eve"))[1]
    tokens: Any = SimpleNamespace(refresh_token=None)
    session = world.broker.sso.sessions.start(OPERATOR, "cli", token, tokens, claims)  # type: ignore[arg-type]
    again = Visitor(world)
    again.headers = {"authorization": f"Bearer {session.secret}"}
    for _ in range(2):
        assert again.ask("GET", "/operator/v1/workspaces/ws-a").status_code == 200
        assert kill(world["eve-cli"]) == (401, "not_signed_in")
        tick(world)
    assert rows(world, "ss-eve", "cli-eve") == []


def test_sessions_with_workspaces_of_who_is_no_user_any_more_end_when_there_is_room(
    world: World, provider: Provider, disk: Disk
) -> None:
    disk.clear()
    session = world.session("ws-b", person="ben")
    disk.room = 0
    world.now += LATER
    provider.groups["ben"] = ["ops"]
    assert world["ben"].get("/workspaces/ws-a").status_code == 200

    def ended() -> Any:
        with world.broker.services.store.read() as connection:
            return connection.execute(select(sessions.c.end_reason).where(sessions.c.id == session)).scalar()

    assert ended() is None
    disk.clear()
    tick(world)
    assert ended() == "not_entitled"


def test_a_sign_out_at_the_provider_counts_at_once(world: World, provider: Provider, disk: Disk) -> None:
    assert world.broker.sso is not None
    kept = world.broker.sso.sessions
    until = (world.now + timedelta(minutes=2)).timestamp()
    disk.room = 1
    assert kept.end_by_provider(BASTION, "used", until, subject="dan", sid="") == 2
    with pytest.raises(TokenRefused):
        kept.end_by_provider(BASTION, "used", until, subject="eve", sid="")
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    with pytest.raises(StorageFull):
        kept.end_by_provider(BASTION, "new", until, subject="eve", sid="")
    assert world["eve"].get("/workspaces/ws-a").status_code == 303
    assert kill(world["eve-cli"]) == (401, "not_signed_in")
    assert provider.asked == []
    disk.clear()
    tick(world)
    assert rows(world, "ss-eve", "cli-eve") == []


def test_where_no_more_is_kept_no_token_is_used_up(world: World, provider: Provider, disk: Disk) -> None:
    provider.checks._unwritten = Unwritten(1)
    world.now += LATER
    assert world["eve"].get("/workspaces/ws-a").status_code == 200
    assert world["dan"].get("/workspaces/ws-a").status_code == 507
    assert kill(world["dan-cli"]) == (507, "storage_full")
    assert provider.asked == ["ss-eve"]
    disk.clear()
    tick(world)
    assert world["dan"].get("/workspaces/ws-a").status_code == 200
    assert kill(world["dan-cli"]) == (200, "")


def test_everybody_has_their_turn_though_nothing_is_written_down(
    world: World, provider: Provider, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rechecks, "CHECKS_AT_ONCE", 2)
    world.now += LATER
    due = len(provider.good)
    for _ in range(due):
        tick(world)
    assert sorted(provider.asked) == sorted(provider.good)
    assert disk.spent == 0


def test_of_several_brokers_none_keeps_a_word_to_itself(
    world: World, provider: Provider, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world.broker.services.store, "_shared", True)
    monkeypatch.setattr(world.broker.services.store, "exclusively", lambda _what: nullcontext())
    assert kill(world["eve-cli"]) == (507, "storage_full")
    assert not provider.checks._unwritten.held.words
    assert world.state("ws-a") == "active"


def test_with_room_the_provider_is_asked_as_before(world: World, provider: Provider) -> None:
    assert kill(world["eve-cli"]) == (200, "")
    provider.groups["dan"] = []
    assert kill(world["dan-cli"]) == (403, "no_role")
    assert rows(world, "ss-dan", "cli-dan") == []


@pytest.mark.parametrize(("token", "status"), [("", 401), ("nobody's", 401), ("dan", 200), ("ada", 403)])
def test_head_is_asked_as_get_is(world: World, token: str, status: int) -> None:
    visitor = world[f"{token}-cli"] if token in {"dan", "ada"} else Visitor(world)
    headers = {"authorization": f"Bearer {token}"} if token == "nobody's" else {}
    assert visitor.ask("HEAD", "/operator/v1/workspaces", headers=headers).status_code == status
