"""Messages on their way: signed, to the named receiver alone, again when it did not take them, and never through a redirect."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from notify_rig import PASSWORD, SECRET, USER, Hooks, Mails
from review_world import OPERATOR, World
from siem_rig import Certificates, free_port

from saw.broker.notification_courier import senders
from saw.broker.notification_settings import Channel
from saw.broker.notifications import FOR, Trial

pytestmark = pytest.mark.control("REV-01")


class Told(World):
    """A broker without network of its own whose deliveries the test makes, one by one."""

    def deliver(self, channel: str = "chat") -> dict[str, Any]:
        """Deliver one message that is due and return how it stands."""
        assert asyncio.run(self.broker.courier.step(channel)) == "", "nothing was due"
        return self.newest(channel)

    def newest(self, channel: str = "chat") -> dict[str, Any]:
        found = self.broker.notifications.listed(state="", channel=channel, after="", limit=1)
        return dict(found["notifications"][0])

    def trial(self, channel: str = "chat") -> dict[str, Any]:
        """Have a test sent to the one address of a channel, and return how it stands."""
        self.broker.notifications.test(OPERATOR, Trial(channel))
        return self.deliver(channel)

    def again(self, channel: str = "chat") -> dict[str, Any]:
        self.later(seconds=6 * 60)
        return self.deliver(channel)


@pytest.fixture
def hooks(tmp_path: Path) -> Iterator[Hooks]:
    found = Hooks(tmp_path / "hooks")
    found.start()
    yield found
    found.stop()


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Callable[..., Told]]:
    made: list[Told] = []

    def world(*channels: Channel) -> Told:
        made.append(Told(tmp_path / f"world-{len(made)}", notifications=channels))
        return made[-1]

    yield world
    for one in made:
        one.broker.close()


@pytest.fixture
def mails(tmp_path: Path) -> Iterator[Callable[..., Mails]]:
    made: list[Mails] = []

    def server(**how: Any) -> Mails:
        made.append(Mails(tmp_path / f"mails-{len(made)}", **how))
        made[-1].start()
        return made[-1]

    yield server
    for one in made:
        one.stop()


def reason(found: dict[str, Any]) -> tuple[str, str]:
    return found["state"], found["error"]["code"]


def test_a_review_is_told_over_tls_and_the_receiver_can_verify_it(hooks: Hooks, told: Callable[..., Told]) -> None:
    world = told(hooks.channel())
    review = world.open()
    assert world.deliver()["state"] == "delivered"
    [got] = hooks.wait(1)
    assert (got.path, got.said["data"]["review"], got.said["type"]) == ("/saw", review.id, "review_opened")
    assert got.verified()
    assert not got.verified(SECRET[:-4] + "AAA="), "another key verifies nothing"
    assert (got.id, got.timestamp) == (world.newest()["id"], int(world.now.timestamp()))
    assert got.headers["content-type"] == "application/json"
    assert not {"authorization", "cookie"} & set(got.headers)
    assert "agent" not in got.body.decode()


@pytest.mark.regression("AGT-ADR-0030-08")
def test_what_was_answered_with_500_comes_again_with_the_same_id_and_body(
    hooks: Hooks, told: Callable[..., Told]
) -> None:
    hooks.answers = [(500, {}), (503, {"retry-after": "120"})]
    world = told(hooks.channel())
    world.open()
    found = world.deliver()
    assert (*reason(found), found["error"]["message"]) == ("waiting", "refused", "it answered 500")
    found = world.again()
    later = msgspec.convert(found["next_at"], type(world.now)) - world.now
    assert (reason(found), later.total_seconds() >= 120) == (("waiting", "refused"), True)
    assert world.again()["state"] == "delivered"
    got = hooks.wait(3)
    assert len({one.id for one in got}) == len({one.body for one in got}) == 1
    assert len({one.timestamp for one in got}) == len({one.signature for one in got}) == 3
    assert all(one.verified() for one in got)


def test_a_receiver_that_is_gone_is_not_asked_again(hooks: Hooks, told: Callable[..., Told]) -> None:
    hooks.answers = [(410, {})]
    world = told(hooks.channel())
    assert reason(world.trial()) == ("given_up", "gone")
    world.later(hours=1)
    assert asyncio.run(world.broker.courier.step("chat")) is None
    assert world.trial()["state"] == "delivered", "410 was about that message: nothing else is held back"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(hooks: Hooks, told: Callable[..., Told], tmp_path: Path, status: int) -> None:
    other = Hooks(tmp_path / "other", plain=True)
    other.start()
    try:
        hooks.answers = [(status, {"location": f"http://127.0.0.1:{other.port}/saw"})]
        world = told(hooks.channel())
        assert reason(world.trial()) == ("waiting", "redirected")
        assert (len(hooks.wait(1)), other.got) == (1, [])
        assert world.again()["state"] == "delivered"
    finally:
        other.stop()


def test_a_receiver_of_another_authority_or_name_is_told_nothing(
    hooks: Hooks, told: Callable[..., Told], tmp_path: Path
) -> None:
    foreign = Certificates(tmp_path / "foreign")
    other = Hooks(tmp_path / "other", name="elsewhere.example.com")
    other.start()
    try:
        wrong = (
            hooks.channel("ca", ca_file=str(foreign.folder / "ca.pem")),
            hooks.channel("system", ca_file=None),
            other.channel("name"),
        )
        world = told(hooks.channel(), *wrong)
        for channel in wrong:
            assert reason(world.trial(channel.name)) == ("waiting", "certificate_refused"), channel.name
        assert hooks.got == other.got == []
        assert world.trial()["state"] == "delivered"
    finally:
        other.stop()


def test_nobody_who_listens_a_secret_that_is_open_and_an_answer_that_never_ends(
    hooks: Hooks, told: Callable[..., Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = told(hooks.channel(), hooks.channel("away", url=f"https://localhost:{free_port()}/"))
    assert reason(world.trial("away")) == ("waiting", "unreachable")
    hooks.secret.chmod(0o644)
    assert reason(world.trial()) == ("waiting", "file_unusable")
    assert hooks.got == [], "nothing leaves without a signature"
    hooks.secret.chmod(0o600)
    assert world.again()["state"] == "delivered"
    monkeypatch.setattr("saw.broker.notification_webhook.WHOLE_S", 0.3)
    hooks.hold = threading.Event()
    assert reason(world.trial()) == ("waiting", "timed_out")
    monkeypatch.undo()
    hooks.hold.set()
    hooks.hold = None
    assert world.again()["state"] == "delivered"


def test_plain_http_reaches_this_machine_where_that_is_said(told: Callable[..., Told], tmp_path: Path) -> None:
    here = Hooks(tmp_path / "here", plain=True)
    here.start()
    try:
        world = told(here.channel())
        assert world.trial()["state"] == "delivered"
        assert here.wait(1)[0].verified()
    finally:
        here.stop()


def test_after_a_day_without_the_receiver_a_message_is_given_up(hooks: Hooks, told: Callable[..., Told]) -> None:
    hooks.answers = [(500, {})] * 3
    world = told(hooks.channel())
    world.open()
    for _ in range(3):
        assert world.again()["state"] == "waiting"
    world.later(seconds=FOR.total_seconds())
    world.broker.notifications.tick()
    assert reason(world.newest()) == ("given_up", "too_old")
    assert asyncio.run(world.broker.courier.step("chat")) is None
    assert len(hooks.got) == 3
    world.broker.notifications.retry(OPERATOR, world.newest()["id"])
    assert world.deliver()["state"] == "delivered"


@pytest.mark.parametrize(
    ("tls", "login"), [("starttls", True), ("starttls", False), ("implicit", False), ("implicit", True)]
)
def test_a_mail_arrives_over_tls(mails: Callable[..., Mails], told: Callable[..., Told], tls: str, login: bool) -> None:
    server = mails(tls=tls, login=login)
    world = told(server.channel())
    world.open()
    found = world.deliver("mail")
    assert found["state"] == "delivered", found
    [(sender, to, _)] = server.got
    [letter] = server.letters()
    assert (sender, to) == ("saw@example.com", ["ops@example.com"])
    assert (letter["to"], letter["auto-submitted"]) == ("ops@example.com", "auto-generated")
    assert letter["message-id"] == f"<{found['id']}@example.com>"
    assert server.logins == ([(USER.encode(), PASSWORD.encode())] if login else [])
    world.broker.registry.kill(OPERATOR, "ws-b", "test")
    assert world.deliver("mail")["state"] == "delivered"
    assert server.letters()[1]["importance"] == "high"


def test_a_mail_server_that_is_not_the_named_one_gets_neither_mail_nor_password(
    mails: Callable[..., Mails], told: Callable[..., Told], tmp_path: Path
) -> None:
    foreign = Certificates(tmp_path / "foreign")
    for tls in ("starttls", "implicit"):
        server, other = mails(tls=tls, login=True), mails(tls=tls, name="elsewhere.example.com", login=True)
        world = told(
            server.channel(), other.channel("name"), server.channel("ca", ca_file=str(foreign.folder / "ca.pem"))
        )
        for channel in ("name", "ca"):
            assert reason(world.trial(channel)) == ("waiting", "certificate_refused")
        assert (server.got, server.logins, other.got, other.logins) == ([], [], [], [])
        assert world.trial("mail")["state"] == "delivered"


def test_a_mail_server_without_tls_is_told_nothing_but_on_this_machine_where_that_is_said(
    mails: Callable[..., Mails], told: Callable[..., Told]
) -> None:
    server = mails(tls="none")
    world = told(server.channel("wanted", tls="starttls"), server.channel(host="127.0.0.1"))
    assert reason(world.trial("wanted")) == ("waiting", "not_offered")
    assert server.got == []
    assert world.trial("mail")["state"] == "delivered"


def test_a_refused_address_is_given_up_alone_and_what_may_pass_comes_again(
    mails: Callable[..., Mails], told: Callable[..., Told]
) -> None:
    server = mails()
    server.refuse = {"gone@example.com": "550", "busy@example.com": "450"}
    world = told(server.channel(to=("gone@example.com", "busy@example.com", "ops@example.com")))
    world.open()
    for _ in range(3):
        assert asyncio.run(world.broker.courier.step("mail")) == ""
    listed = world.broker.notifications.listed(state="", channel="mail", after="", limit=9)["notifications"]
    found = {one["recipient"]: (one["state"], (one["error"] or {}).get("code")) for one in listed}
    assert found == {
        "gone@example.com": ("given_up", "address_refused"),
        "busy@example.com": ("waiting", "address_refused"),
        "ops@example.com": ("delivered", None),
    }
    server.refuse.pop("busy@example.com")
    assert world.again("mail")
    assert [to for _, to, _ in server.got] == [["ops@example.com"], ["busy@example.com"]]


@pytest.mark.parametrize(("status", "state"), [("451", "waiting"), ("554", "given_up")])
def test_a_refused_mail_comes_again_unless_its_refusal_is_final(
    mails: Callable[..., Mails], told: Callable[..., Told], status: str, state: str
) -> None:
    server = mails()
    server.refuse_data = [status]
    world = told(server.channel())
    found = world.trial("mail")
    assert (*reason(found), found["error"]["message"]) == (state, "refused", f"it answered {status}")
    world.later(hours=1)
    assert asyncio.run(world.broker.courier.step("mail")) == ("" if state == "waiting" else None)
    assert len(server.got) == (1 if state == "waiting" else 0)


def test_a_wrong_password_is_a_failure_that_can_be_corrected(
    mails: Callable[..., Mails], told: Callable[..., Told], caplog: pytest.LogCaptureFixture
) -> None:
    server = mails(login=True)
    server.password.write_text("hunter2-wrong\n")
    world = told(server.channel())
    assert reason(world.trial("mail")) == ("waiting", "login_refused")
    assert "hunter2-wrong" not in caplog.text
    server.password.write_text(f"{PASSWORD}\n")
    assert world.again("mail")["state"] == "delivered"


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_a_mail_server_that_says_too_little_too_slowly_is_left(
    told: Callable[..., Told], mails: Callable[..., Mails], monkeypatch: pytest.MonkeyPatch, tls: str
) -> None:
    monkeypatch.setattr("saw.broker.notification_mail.WHOLE_S", 0.3)
    with closing(socket.create_server(("127.0.0.1", 0))) as silent:
        world = told(mails(tls=tls).channel(port=silent.getsockname()[1]))
        assert reason(world.trial("mail")) == ("waiting", "timed_out")


def test_a_channel_that_the_broker_fails_to_serve_says_so(told: Callable[..., Told], hooks: Hooks) -> None:
    world = told(hooks.channel())

    class Broken:
        async def send(self, _claimed: Any) -> None:
            raise RuntimeError("not of this world")

    world.broker.courier._ways["chat"] = Broken()  # type: ignore[index]
    assert reason(world.trial()) == ("waiting", "internal")
    world.broker.courier._ways["chat"] = senders(world.broker.services)["chat"]  # type: ignore[index]
    assert world.again()["state"] == "delivered"


def test_the_courier_serves_every_channel_and_a_slow_one_holds_nobody_else(
    hooks: Hooks, told: Callable[..., Told], mails: Callable[..., Mails], tmp_path: Path
) -> None:
    slow = Hooks(tmp_path / "slow")
    slow.start()
    slow.hold = threading.Event()
    server = mails()
    world = told(slow.channel("slow"), hooks.channel(), server.channel())

    async def scenario() -> None:
        running = asyncio.create_task(world.broker.courier.run())
        await asyncio.to_thread(world.open)
        await asyncio.to_thread(slow.wait, 1)
        await asyncio.to_thread(hooks.wait, 1)
        await asyncio.to_thread(world.open, b"another")
        await asyncio.to_thread(hooks.wait, 2)
        assert len(slow.got) == 1
        slow.hold.set()  # type: ignore[union-attr]
        await asyncio.to_thread(slow.wait, 2)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    try:
        asyncio.run(scenario())
        assert len({one.id for one in (*slow.got, *hooks.got)}) == 4
    finally:
        slow.stop()
