"""Access tokens: fetched once for racing calls, renewed before their end, never used longer, and bound to their secret."""

from __future__ import annotations

import asyncio
import base64
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from saw.gateway import oauth2
from saw.gateway.credentials import CredentialStore, Injection
from saw.gateway.errors import CredentialUnavailable
from saw.gateway.oauth2 import REFUSED_S, Answer, TokenKeeper
from saw.policy.governance import Credential, Inject
from saw.policy.providers import OAuth2

URL = "https://id.example.com/token"
SECRET, TOKEN = "the client's secret: 100%", "access-token-number-"


class Endpoint:
    """A token endpoint that counts; ``says`` is what it answers besides, ``hold`` keeps answers back."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, str], dict[str, str]]] = []
        self.says: dict[str, Any] = {"expires_in": 100}
        self.answer: Answer | None = None
        self.error: Exception | None = None
        self.arrived = asyncio.Event()
        self.hold = asyncio.Event()
        self.hold.set()

    async def __call__(self, url: str, form: dict[str, str], headers: dict[str, str]) -> Answer:
        self.asked.append((url, form, headers))
        self.arrived.set()
        await self.hold.wait()
        if self.error is not None:
            raise self.error
        if self.answer is not None:
            return self.answer
        told = {"access_token": f"{TOKEN}{len(self.asked)}", "token_type": "Bearer"} | self.says
        return Answer(200, json.dumps({name: value for name, value in told.items() if value is not None}).encode())


class Bench:
    """The credentials of a gatekeeper whose client has a secret; ``now`` is its clock, seconds."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now = 0.0
        self.far = Endpoint()
        self.store = CredentialStore(directory, tokens=TokenKeeper(self.far, lambda: self.now))
        self.put("crm", SECRET)
        self.put("refresh", "the stored refresh token")

    def put(self, name: str, value: str) -> None:
        path = self.directory / name
        path.write_text(value)
        path.chmod(0o600)

    async def injection(self, ref: str = "file:crm", form: str = "Bearer {secret}", **more: Any) -> Injection:
        wanted = OAuth2(token_url=URL, client_id="agents", **more)
        credential = Credential(id="crm", ref=ref, inject=Inject(header="Authorization", format=form), oauth2=wanted)
        return await self.store.injection(credential, {"sponsor": "mia", "workspace": "ws-1"})

    def sent(self, **more: Any) -> str:
        return asyncio.run(self.injection(**more)).headers[0][1]

    def refused(self, **more: Any) -> str:
        with pytest.raises(CredentialUnavailable) as caught:
            self.sent(**more)
        return f"{caught.value.message} {caught.value.cure}"


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


@pytest.mark.control("CRED-01")
def test_the_token_is_sent_and_the_secret_only_to_the_token_endpoint(bench: Bench) -> None:
    assert bench.sent(scopes=("items.read", "items.list"), resource="https://api.example.com") == f"Bearer {TOKEN}1"
    ((url, form, headers),) = bench.far.asked
    assert (url, form) == (
        URL,
        {"grant_type": "client_credentials", "scope": "items.read items.list", "resource": "https://api.example.com"},
    )
    assert (
        base64.b64decode(headers["authorization"].removeprefix("Basic ")) == b"agents:the+client%27s+secret%3A+100%25"
    )


@pytest.mark.control("CRED-01")
def test_the_token_is_starred_out_of_answers_in_each_form_in_which_it_is_sent(bench: Bench) -> None:
    found = asyncio.run(bench.injection(form="Basic {b64:agents:{secret}}")).reflections
    assert f"{TOKEN}1" in found
    assert base64.b64encode(f"agents:{TOKEN}1".encode()).decode() in found


@pytest.mark.control("CRED-01")
def test_a_refresh_token_is_handed_in_and_the_newer_one_that_comes_back_the_next_time(bench: Bench) -> None:
    more: dict[str, Any] = {"ref": "file:refresh", "grant": "refresh_token"}
    bench.far.says = {"expires_in": 100, "refresh_token": "newer"}
    assert bench.sent(**more) == f"Bearer {TOKEN}1"
    bench.now += 100
    assert bench.sent(**more) == f"Bearer {TOKEN}2"
    assert [form for _, form, _ in bench.far.asked] == [
        {"grant_type": "refresh_token", "refresh_token": "the stored refresh token", "client_id": "agents"},
        {"grant_type": "refresh_token", "refresh_token": "newer", "client_id": "agents"},
    ]
    assert all("authorization" not in headers for _, _, headers in bench.far.asked), "a client without a secret"
    bench.sent(**more, client_secret="file:crm")
    assert bench.far.asked[-1][1] == {"grant_type": "refresh_token", "refresh_token": "the stored refresh token"}
    assert "authorization" in bench.far.asked[-1][2]


@pytest.mark.parametrize("several", [True, False])
def test_one_of_several_gatekeepers_says_that_it_spends_the_refresh_token_of_all(
    bench: Bench, caplog: pytest.LogCaptureFixture, several: bool
) -> None:
    bench.store = CredentialStore(bench.directory, tokens=TokenKeeper(bench.far, lambda: bench.now, several=several))
    for answer in ("the stored refresh token", "newer", "the newest"):
        bench.far.says = {"expires_in": 100, "refresh_token": answer}
        bench.sent(ref="file:refresh", grant="refresh_token")
        bench.now += 100
    said = [text for text in caplog.messages if "perimeter_replicas: 1" in text]
    assert len(said) == (1 if several else 0), said


@pytest.mark.control("CRED-01")
def test_a_token_is_renewed_before_its_end_and_never_used_after_it(bench: Bench) -> None:
    assert [bench.sent(), bench.sent()] == [f"Bearer {TOKEN}1"] * 2
    bench.now = 89.9
    assert bench.sent() == f"Bearer {TOKEN}1"
    bench.now = 90.0
    assert bench.sent() == f"Bearer {TOKEN}2"
    bench.far.error = httpx.ConnectError("away")
    bench.now += 90
    assert "the token endpoint does not answer" in bench.refused(), "an older one is no way out"


@pytest.mark.parametrize(
    ("told", "life"), [(None, 54), (1e9, 3570), (10, 9), (0, 0), (-5, 0), ("100", 90), ("9999999999", 3570)]
)
def test_how_long_a_token_counts_is_bounded(bench: Bench, told: float | str | None, life: float) -> None:
    bench.far.says = {"expires_in": told}
    bench.sent()
    bench.now = max(0.0, life - 0.1)
    bench.sent()
    bench.now = life + 0.1
    bench.sent()
    assert len(bench.far.asked) == (3 if life == 0 else 2)


@pytest.mark.control("CRED-01")
def test_racing_calls_wait_for_one_request(bench: Bench) -> None:
    async def race() -> list[str]:
        bench.far.hold.clear()
        calls = [asyncio.create_task(bench.injection()) for _ in range(20)]
        await bench.far.arrived.wait()
        calls[0].cancel()
        bench.far.hold.set()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(found[0], asyncio.CancelledError)
        return [one.headers[0][1] for one in found[1:] if isinstance(one, Injection)]

    assert asyncio.run(race()) == [f"Bearer {TOKEN}1"] * 19
    assert len(bench.far.asked) == 1


@pytest.mark.control("CRED-01")
def test_racing_calls_are_all_refused_by_one_failure_and_the_next_asks_again(bench: Bench) -> None:
    async def race() -> list[Any]:
        return await asyncio.gather(*(bench.injection() for _ in range(5)), return_exceptions=True)

    bench.far.error = httpx.ConnectError("away")
    assert all(isinstance(one, CredentialUnavailable) for one in asyncio.run(race()))
    assert len(bench.far.asked) == 1
    bench.far.error = None
    assert bench.sent() == f"Bearer {TOKEN}2"


@pytest.mark.control("CRED-01")
def test_an_exchanged_secret_gets_a_token_of_its_own_and_a_removed_one_none(bench: Bench) -> None:
    assert bench.sent() == f"Bearer {TOKEN}1"
    bench.put("crm", "another secret")
    assert bench.sent() == f"Bearer {TOKEN}2"
    (bench.directory / "crm").unlink()
    assert "not at hand" in bench.refused()


def test_tokens_of_other_scopes_and_other_secrets_are_others(bench: Bench) -> None:
    bench.put("noa", SECRET)
    found = [bench.sent(), bench.sent(scopes=("a",)), bench.sent(ref="file:noa"), bench.sent()]
    assert found == [f"Bearer {TOKEN}{number}" for number in (1, 2, 3, 1)]


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    ("status", "body", "words"),
    [
        (
            400,
            b'{"error": "invalid_client", "error_description": "the client\'s secret: 100%"}',
            "answered 400 invalid_client",
        ),
        (400, b'{"error": "the client\'s secret: 100%"}', "answered 400"),
        (500, b"the client's secret: 100%", "answered 500"),
        (302, b"", "answered 302"),
        (200, b"<html>", "something else"),
        (200, b'{"token_type": "Bearer"}', "something else"),
        (200, b'{"access_token": "x", "token_type": "Bearer", "expires_in": "soon"}', "something else"),
        (200, b'{"access_token": "x", "token_type": "Bearer", "expires_in": "1e3"}', "something else"),
        (200, b'{"access_token": "x", "token_type": "mac"}', "another type than Bearer"),
        (200, b'{"access_token": "a\\r\\nx-evil: 1", "token_type": "bearer"}', "cannot be sent"),
        (200, b'{"access_token": "", "token_type": "bearer"}', "cannot be sent"),
    ],
)
def test_every_other_answer_is_a_refusal_that_repeats_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture, status: int, body: bytes, words: str
) -> None:
    bench.far.answer = Answer(status, body)
    said = bench.refused()
    assert words in said
    assert "secret: 100" not in said + caplog.text
    assert "x-evil" not in said + caplog.text


def test_a_perimeter_without_tokens_refuses(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.store = CredentialStore(tmp_path)
    assert "fetches no token" in bench.refused()


@pytest.mark.control("CRED-01")
def test_a_refusal_counts_for_a_moment_and_for_the_same_secret_only(bench: Bench) -> None:
    bench.far.answer = Answer(401, b'{"error": "invalid_client"}')
    assert {"answered 401 invalid_client" in bench.refused() for _ in range(20)} == {True}
    assert len(bench.far.asked) == 1
    bench.far.answer = None
    assert "invalid_client" in bench.refused()
    bench.now += REFUSED_S
    assert bench.sent() == f"Bearer {TOKEN}2"
    bench.put("crm", "wrong")
    bench.far.answer = Answer(401, b'{"error": "invalid_client"}')
    bench.refused()
    bench.far.answer = None
    bench.put("crm", "right")
    assert bench.sent() == f"Bearer {TOKEN}4"


REFRESH: dict[str, Any] = {"grant": "refresh_token"}


def handed_in(bench: Bench) -> list[str]:
    return [form["refresh_token"] for _, form, _ in bench.far.asked]


@pytest.mark.control("CRED-01")
def test_no_exchanged_refresh_token_is_lost_to_those_of_others(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oauth2, "_REMEMBERED", 2)
    for name in ("mia", "noa", "eli"):
        bench.put(name, f"stored of {name}")
    bench.far.says = {"expires_in": 0, "refresh_token": "newer of mia"}
    bench.sent(ref="file:mia", **REFRESH)
    bench.far.says = {"expires_in": 0, "refresh_token": "newer of noa"}
    bench.sent(ref="file:noa", **REFRESH)
    assert "as many refresh tokens as it can" in bench.refused(ref="file:eli", **REFRESH)
    for name in ("mia", "noa"):
        bench.sent(ref=f"file:{name}", **REFRESH)
    assert handed_in(bench) == ["stored of mia", "stored of noa", "newer of mia", "newer of noa"]


@pytest.mark.control("CRED-01")
def test_a_release_with_other_scopes_hands_in_the_newer_refresh_token(bench: Bench) -> None:
    bench.far.says = {"expires_in": 100, "refresh_token": "newer"}
    bench.sent(ref="file:refresh", **REFRESH)
    bench.far.says = {"expires_in": 100, "refresh_token": "the newest"}
    bench.sent(ref="file:refresh", scopes=("a",), **REFRESH)
    bench.put("refresh", "another one")
    bench.sent(ref="file:refresh", **REFRESH)
    bench.put("refresh", "the stored refresh token")
    bench.sent(ref="file:refresh", scopes=("b",), **REFRESH)
    stored = "the stored refresh token"
    assert handed_in(bench) == [stored, "newer", "another one", stored], "what came of an older secret is forgotten"


@pytest.mark.control("CRED-01")
def test_racing_calls_of_other_scopes_never_hand_in_one_refresh_token_twice(bench: Bench) -> None:
    async def race() -> None:
        bench.far.hold.clear()
        calls = [
            asyncio.create_task(bench.injection(ref="file:refresh", scopes=(name,), **REFRESH)) for name in ("a", "b")
        ]
        await bench.far.arrived.wait()
        bench.far.hold.set()
        await asyncio.gather(*calls)

    bench.far.says = {"expires_in": 100, "refresh_token": "newer"}
    asyncio.run(race())
    assert handed_in(bench) == ["the stored refresh token", "newer"]
