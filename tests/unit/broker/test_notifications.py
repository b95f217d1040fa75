"""What people are told, written down with what happened: who, what it says and what not, and how it ends when nobody takes it."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from typing import Any

import msgspec
import pytest
from portal_world import ORIGIN
from review_world import OPERATOR, POLICY, World, call
from sqlalchemy import select

from saw.broker.config import BrokerConfig
from saw.broker.errors import BrokerError
from saw.broker.gate_settings import GateSettings
from saw.broker.notification_files import read_secret, signing_keys, tls_context
from saw.broker.notification_queue import CLAIM_FOR, Claimed, NotDelivered, Queue
from saw.broker.notification_settings import Channel, Email, Kind, Webhook
from saw.broker.notification_webhook import signature
from saw.broker.notification_words import NOT_A_DECISION, Message, mail, review_message
from saw.broker.notifications import FOR, KEEP, Trial
from saw.broker.registry import Step
from saw.broker.review_decisions import Cancel
from saw.broker.review_states import get_review
from saw.broker.schema import notifications
from saw.broker.sso_settings import ProviderSettings, SsoSettings
from saw.review.gate import AskGate, BoundFile, BoundHost, GateStatement

pytestmark = pytest.mark.control("REV-01")

HOOK = Webhook(name="chat", url="https://hooks.example.com/saw", secret_file="/nowhere/chat")
MAIL = Email(
    name="mail",
    host="smtp.example.com",
    sender="saw@example.com",
    to={"maintainers": ("ben@example.com", "cleo@example.com"), "*": ("ops@example.com",)},
)
ENDS = Webhook(name="ends", url="https://ends.example.com/", secret_file="/nowhere/ends", kinds=(Kind.REVIEW_ENDED,))
OTHERS = Webhook(name="others", url="https://others.example.com/", secret_file="/nowhere/o", groups=("auditors",))
SSO = SsoSettings(
    origin=ORIGIN,
    provider=ProviderSettings(issuer="https://idp.example.com", client_id="saw"),
    roles={"approver": ("approvers",)},
)
REFUSED = NotDelivered("it answered 500", code="refused")


class Told(World):
    """A broker that tells people."""

    def __init__(self, folder: Path, *channels: Channel, **settings: Any) -> None:
        super().__init__(folder, notifications=channels, **settings)
        self.queue = Queue(self.broker.services)

    def rows(self, **where: Any) -> list[Any]:
        query = select(notifications).order_by(notifications.c.created_at, notifications.c.id)
        for name, value in where.items():
            query = query.where(notifications.c[name] == value)
        with self.broker.services.store.read() as connection:
            return list(connection.execute(query).all())

    def said(self, row: Any) -> dict[str, Any]:
        return dict(json.loads(row.body))

    def trail(self, operation: str) -> list[dict[str, Any]]:
        page = self.broker.trail.page("broker", 0, 1000)["events"]
        return [item.event for item in page if item.event.get("api", {}).get("operation") == operation]

    def claimed(self, channel: str = "chat") -> Claimed:
        found = self.queue.claim(channel)[0]
        assert found is not None
        return found


@pytest.fixture
def world(tmp_path: Path) -> Iterator[Told]:
    found = Told(tmp_path, HOOK, MAIL, ENDS, OTHERS)
    yield found
    found.broker.close()


def test_without_channels_nothing_is_written_and_reviews_go_as_before(tmp_path: Path) -> None:
    world = Told(tmp_path)
    assert world.tell(_claim(world)).state == "done"
    world.broker.registry.kill(OPERATOR, "ws-a", "test")
    assert world.rows() == []
    world.broker.close()


def _claim(world: Told) -> Any:
    world.approved()
    claimed = world.claim()
    assert claimed is not None
    return claimed


def test_who_decides_is_told_that_a_call_waits_and_once(world: Told) -> None:
    review = world.open(quorum=2)
    assert world.open(quorum=2).id == review.id, "the same call that waits is no news"
    rows = world.rows()
    assert sorted((row.channel, row.recipient) for row in rows) == [
        ("chat", ""), ("mail", "ben@example.com"), ("mail", "cleo@example.com"),
    ]  # fmt: skip
    assert {(row.kind, row.review_id, row.workspace_id, row.state) for row in rows} == {
        ("review_opened", review.id, "ws-a", "waiting")
    }
    assert len({row.id for row in rows}) == 3
    said = world.said(rows[0])
    assert said == {
        "type": "review_opened",
        "timestamp": "2026-11-26T08:00:00.000Z",
        "data": {
            "title": "A POST of ws-a waits for maintainers",
            "review": review.id,
            "workspace": "ws-a",
            "group": "maintainers",
            "quorum": 2,
            "expires_at": review.expires_at,
            "method": "POST",
            "host": "api.example.com",
            "state": "pending",
            "command": f"saw review show {review.id}",
        },
    }


def letter(world: Told, row: Any) -> Any:
    message = msgspec.json.decode(row.body, type=Message)
    return message_from_bytes(bytes(mail(message, MAIL, row.recipient, row.id)))


@pytest.mark.control("REV-02")
@pytest.mark.regression("AGT-ADR-0030-04")
@pytest.mark.regression("AGT-ADR-0030-11")
def test_nothing_that_the_agent_wrote_is_in_a_message_and_no_way_to_decide(tmp_path: Path) -> None:
    world = Told(tmp_path, HOOK, MAIL, sso=SSO)
    marks = [
        "agentpath",
        "agentquery",
        "agentheader",
        "agentbody",
        "agentbinary",
        "agentrequest",
        "agenthost",
        "AGENTMETHOD",
    ]
    wrote = call(
        b"agentbody", method="AGENTMETHOD", path="/agentpath?q=agentquery", headers=(("x-a", "agentheader"),),
        host="agenthost.example.com",
    )  # fmt: skip
    review = world.open(call=wrote, binary="/usr/bin/agentbinary", request_id="agentrequest")
    hook, first = world.rows(channel="chat")[0], world.rows(channel="mail")[0]
    sent = letter(world, first)
    text = sent.get_payload(decode=True).decode()
    # A host can be a part of what policy allows as a whole; programs are given it, and no text has it.
    data = world.said(hook)["data"]
    assert data.pop("host") == "agenthost.example.com"
    assert not [mark for mark in marks if mark.lower() in f"{data} {sent} {text}".lower()]
    assert data["link"] == f"{ORIGIN}/reviews/{review.id}"
    assert f"\n{ORIGIN}/reviews/{review.id}\n" in text.replace("\r", "")
    assert NOT_A_DECISION in text
    for secret in ("nonce", "token", "approve?", "deny?", "?"):
        assert secret not in data["link"] + text
    # What a link could carry was never made: no nonce is out, and the page behind it asks who comes.
    with world.broker.services.store.read() as connection:
        row = get_review(connection, review.id)
    assert row.state == "pending"
    world.broker.close()


def test_a_host_that_is_none_is_left_out(world: Told) -> None:
    review = world.open()
    with world.broker.services.store.read() as connection:
        row = get_review(connection, review.id)
    names = {name: getattr(row, name) for name in row._fields}
    for host, shown in (
        ("a b", ""),
        ("x\r\ny", ""),
        ("<b>", ""),
        ("2001:db8::1", "2001:db8::1"),
        ("a.example", "a.example"),
    ):
        given = type("Row", (), {**names, "host": host, "group_name": "main\r\ntainers\u202e"})
        data = review_message(world.config, Kind.REVIEW_OPENED, given, world.now).data
        assert (data.host, data.group) == (shown, "main??tainers?")
        assert (
            "\n"
            not in mail(Message(Kind.REVIEW_OPENED, "2026-11-26T08:00:00.000Z", data), MAIL, "a@e.com", "m")["subject"]
        )


def test_a_mail_names_the_message_and_itself_as_a_programs(world: Told) -> None:
    review = world.open()
    row = world.rows(recipient="ben@example.com")[0]
    first, again = letter(world, row), letter(world, row)
    assert first["message-id"] == again["message-id"] == f"<{row.id}@example.com>"
    assert bytes(first) == bytes(again)
    assert (first["to"], first["from"]) == ("ben@example.com", "Secure Agent Workspace <saw@example.com>")
    assert (first["auto-submitted"], first["importance"]) == ("auto-generated", None)
    assert first["date"] == "Thu, 26 Nov 2026 08:00:00 +0000"
    assert f"saw review show {review.id}" in first.get_payload(decode=True).decode()
    world.broker.registry.kill(OPERATOR, "ws-a", "test")
    urgent = letter(world, world.rows(kind="workspace_quarantined", channel="mail")[0])
    assert urgent["importance"] == "high"


def test_no_line_break_gets_into_a_header() -> None:
    facts = msgspec.json.decode(
        b'{"type": "test", "timestamp": "2026-11-26T08:00:00.000Z", "data": {"title": "a\\r\\nBcc: x@y.z"}}',
        type=Message,
    )
    with pytest.raises(ValueError, match=r"linefeed|header"):
        mail(facts, MAIL, "ops@example.com", "msg-1")


def test_a_question_at_a_gate_is_told_by_the_gates_name_alone(tmp_path: Path) -> None:
    world = Told(tmp_path, HOOK, gates={"update": GateSettings(group="maintainers", quorum=2)})
    statement = GateStatement(
        gate="update", purpose="purpose-of-the-asker", requested_by="Ada", total=1, hosts=(BoundHost(name="ws-1"),),
        files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
    )  # fmt: skip
    asked = world.broker.gates.ask(OPERATOR, AskGate(statement=statement))
    [row] = world.rows()
    data = world.said(row)["data"]
    assert (data["review"], data["gate"], data["title"]) == (
        asked.id, "update", "A change to the fleet (update) waits for maintainers",
    )  # fmt: skip
    assert "purpose-of-the-asker" not in row.body
    assert not {"method", "host", "workspace"} & set(data)
    world.broker.close()


def test_ends_are_told_where_they_were_asked_for(world: Told) -> None:
    denied, cancelled, expired = (world.open(body) for body in (b"one", b"two", b"three"))
    world.decide(denied.id, "ben", "deny")
    world.broker.decisions.cancel(OPERATOR, cancelled.id, Cancel("a reason of somebody's"))
    world.later(hours=2)
    world.broker.reviews.tick()
    ends = {row.review_id: world.said(row)["data"] for row in world.rows(kind="review_ended")}
    assert {name: data["state"] for name, data in ends.items()} == {
        denied.id: "denied", cancelled.id: "cancelled", expired.id: "expired",
    }  # fmt: skip
    assert "a reason of somebody's" not in str(ends)
    assert {row.channel for row in world.rows(kind="review_ended")} == {"ends"}
    world.later(seconds=1)
    assert world.tell(_claim(world)).state == "done"
    assert world.said(world.rows(kind="review_ended")[-1])["data"]["title"] == "A POST of ws-a is done"


def test_a_kill_is_told_once_and_a_stop_is_not(world: Told) -> None:
    world.broker.registry.transition(OPERATOR, "ws-b", Step("stopped", "for tonight"))
    assert world.rows() == []
    for _ in range(2):
        world.broker.registry.kill(OPERATOR, "ws-a", "the reason of an operator")
    rows = world.rows()
    assert sorted((row.channel, row.recipient) for row in rows) == [("chat", ""), ("mail", "ops@example.com")]
    assert world.said(rows[0])["data"] == {
        "title": "The workspace ws-a was cut off", "urgent": True, "workspace": "ws-a", "state": "quarantined",
        "command": "saw workspace show ws-a",
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind", ["break_glass_key", "break_glass", "break_glass_rejected", "after_review_owed", "after_review_overdue"]
)
def test_break_glass_is_told_as_urgent_by_whoever_does_it(world: Told, kind: str) -> None:
    review = world.open()
    with world.broker.services.store.write() as tx:
        assert world.broker.notifications.tell(tx, kind=kind, review=get_review(tx.connection, review.id)) == 3
    rows = world.rows(kind=kind)
    assert {(row.urgent, row.review_id) for row in rows} == {(True, review.id)}
    assert letter(world, next(row for row in rows if row.recipient))["importance"] == "high"
    with world.broker.services.store.write() as tx, pytest.raises(ValueError, match="review_broken"):
        world.broker.notifications.tell(tx, kind="review_broken", review=get_review(tx.connection, review.id))


def test_what_did_not_happen_is_not_told(world: Told) -> None:
    with pytest.raises(RuntimeError), world.broker.services.store.write() as tx:
        assert world.broker.notifications.tell(tx, kind="workspace_quarantined", workspace="ws-a") == 2
        raise RuntimeError("the transaction fails")
    assert world.rows() == []
    world.set("ws-a", policy_digest="b" * 64)
    with pytest.raises(BrokerError):
        world.open()
    assert world.rows() == []
    world.set("ws-a", policy_digest=POLICY)
    world.open()
    world.crash()
    assert len(world.rows()) == 3, "what happened is still to be told after a crash"


def test_a_message_is_claimed_once_and_urgent_ones_come_first(world: Told) -> None:
    opened = world.open()
    world.later(seconds=1)
    world.broker.registry.kill(OPERATOR, "ws-b", "test")
    first = world.claimed()
    assert world.said(world.rows(id=first.id)[0])["type"] == "workspace_quarantined"
    second = world.claimed()
    assert world.said(world.rows(id=second.id)[0])["data"]["review"] == opened.id
    none, due = world.queue.claim("chat")
    assert none is None
    assert due == world.rows(id=first.id)[0].next_at
    world.queue.delivered(first)
    [row] = world.rows(id=first.id)
    assert (row.state, row.ended_at, row.attempts) == ("delivered", row.created_at, 1)
    [told] = world.trail("notification.deliver")
    assert (told["status"], told["resources"][0]["uid"]) == ("Success", first.id)


def test_a_claim_that_was_lost_is_another_brokers_with_the_same_id(world: Told) -> None:
    world.open()
    lost = world.claimed()
    assert world.queue.claim("chat")[0] is None
    world.later(seconds=CLAIM_FOR.total_seconds())
    again = world.claimed()
    assert (again.id, again.attempt, again.claim == lost.claim) == (lost.id, 2, False)
    world.queue.delivered(lost)  # too late: it is another's now
    assert world.rows(id=lost.id)[0].state == "sending"
    world.queue.failed(lost, NotDelivered("gone", code="gone", gives_up=True))
    assert world.rows(id=lost.id)[0].state == "sending"
    world.queue.delivered(again)
    assert world.rows(id=lost.id)[0].state == "delivered"


@pytest.mark.sqlite("a broker on PostgreSQL may be one of several, and takes nothing back")
def test_the_only_broker_of_a_database_takes_back_at_its_start_what_it_was_sending(world: Told) -> None:
    world.open()
    lost = world.claimed()
    world.crash()
    world.queue = Queue(world.broker.services)
    assert world.claimed().id == lost.id


def test_pauses_grow_with_chance_in_them_and_stay_bounded(world: Told) -> None:
    world.open()
    pauses = []
    for _ in range(12):
        claimed = world.claimed()
        world.queue.failed(claimed, REFUSED)
        [row] = world.rows(id=claimed.id)
        assert (row.state, row.error_code, row.error) == ("waiting", "refused", "it answered 500")
        assert world.queue.claim("chat") == (None, row.next_at)
        at = msgspec.convert(row.next_at, type(world.now))
        pauses.append((at - world.now).total_seconds())
        world.now = at
    for number, pause in enumerate(pauses):
        whole = min(900.0, 5.0 * 2**number)
        assert whole / 2 - 0.002 <= pause <= whole + 0.002
    assert len({round(pause / min(900.0, 5.0 * 2**number), 3) for number, pause in enumerate(pauses)}) > 3
    claimed = world.claimed()
    world.queue.failed(claimed, NotDelivered("busy", code="refused", wait_s=900.0))
    at = msgspec.convert(world.rows(id=claimed.id)[0].next_at, type(world.now))
    assert (at - world.now).total_seconds() >= 900, "the far end wants to be left alone for longer"


def test_what_nobody_takes_for_a_day_is_given_up_with_an_event(world: Told) -> None:
    world.open()
    world.queue.failed(world.claimed(), REFUSED)
    world.later(seconds=FOR.total_seconds() - 1)
    world.broker.notifications.tick()
    assert {row.state for row in world.rows()} == {"waiting"}
    world.later(seconds=1)
    assert world.queue.claim("chat") == (None, None), "it is too old to be sent"
    world.broker.notifications.tick()
    assert {row.state for row in world.rows(kind="review_opened")} == {"given_up"}
    [row] = world.rows(channel="chat")
    assert (row.error_code, row.error) == ("too_old", "nobody took it in 24 hours; the last attempt: it answered 500")
    events = world.trail("notification.give_up")
    assert {event["resources"][0]["uid"] for event in events} == {row.id for row in world.rows()}
    assert {(event["status"], event["status_detail"]) for event in events} == {("Failure", "too_old")}
    world.later(seconds=KEEP.total_seconds())
    world.broker.notifications.tick()
    assert world.rows() == []
    [removed] = world.trail("notification.retention.remove")
    assert removed["unmapped"]["saw"]["notifications"] == 3


def test_what_cannot_arrive_is_given_up_at_once(world: Told) -> None:
    world.open()
    world.queue.failed(world.claimed(), NotDelivered("it answered 410", code="gone", gives_up=True))
    [row] = world.rows(channel="chat")
    assert (row.state, row.error_code) == ("given_up", "gone")
    assert world.queue.claim("chat") == (None, None)


def test_a_flood_of_reviews_leaves_room_for_what_is_urgent(world: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saw.broker.notifications.MOST_WAITING", 2)
    world.broker.registry.kill(OPERATOR, "ws-b", "test")
    reviews = [world.open(b"%d" % number).id for number in range(4)]
    with world.broker.services.store.write() as tx:
        world.broker.notifications.tell(tx, kind="break_glass", review=get_review(tx.connection, reviews[0]))
    chat = world.rows(channel="chat")
    assert sorted((row.kind, row.state, row.error_code or "") for row in chat) == [
        ("break_glass", "waiting", ""),
        ("review_opened", "given_up", "too_many"), ("review_opened", "given_up", "too_many"),
        ("review_opened", "waiting", ""), ("review_opened", "waiting", ""),
        ("workspace_quarantined", "waiting", ""),
    ]  # fmt: skip
    assert {event["status_detail"] for event in world.trail("notification.give_up")} == {"too_many"}
    for _ in range(3):  # both urgent ones, and one of the others
        world.queue.delivered(world.claimed())
    world.open(b"there is room again")
    assert [row.state for row in world.rows(channel="chat")].count("waiting") == 2


def test_operators_see_messages_in_pages_test_channels_and_try_again(world: Told) -> None:
    told = world.broker.notifications
    world.open()
    world.later(seconds=1)
    made = told.test(OPERATOR, Trial("mail"))["notifications"]
    assert sorted(one["recipient"] for one in made) == ["ben@example.com", "cleo@example.com", "ops@example.com"]
    assert len(world.trail("notification.test")) == 3
    everything = told.listed(state="", channel="", after="", limit=100)
    assert [one["kind"] for one in everything["notifications"]] == ["test"] * 3 + ["review_opened"] * 3
    assert [one["name"] for one in everything["channels"]] == ["chat", "mail", "ends", "others"]
    assert "hooks.example.com" not in str(everything["channels"])
    seen, after = [], ""
    while after is not None:
        page = told.listed(state="", channel="", after=after, limit=4)
        seen += page["notifications"]
        after = page["next"]
    assert seen == everything["notifications"]
    assert {
        one["channel"] for one in told.listed(state="waiting", channel="chat", after="", limit=9)["notifications"]
    } == {"chat"}
    assert told.listed(state="delivered", channel="", after="", limit=9)["notifications"] == []
    claimed = world.claimed()
    assert told.retry(OPERATOR, claimed.id)["changed"] is False, "it is under way"
    world.queue.failed(claimed, NotDelivered("gone", code="gone", gives_up=True))
    world.later(hours=30)
    again = told.retry(OPERATOR, claimed.id)
    assert (again["state"], again["attempts"], again["changed"]) == ("waiting", 0, True)
    assert world.trail("notification.retry")[0]["unmapped"]["saw"]["principal"] == "operator:root"
    taken = world.claimed()
    assert taken.id == claimed.id
    world.queue.delivered(taken)
    for wrong, code in (
        (lambda: told.retry(OPERATOR, claimed.id), "delivered"),
        (lambda: told.retry(OPERATOR, "msg-none"), "unknown_notification"),
        (lambda: told.test(OPERATOR, Trial("nowhere")), "unknown_channel"),
        (lambda: told.listed(state="lost", channel="", after="", limit=9), "malformed"),
    ):
        with pytest.raises(BrokerError) as caught:
            wrong()
        assert caught.value.code == code


def test_a_message_of_a_channel_that_is_no_more_waits_for_its_end_and_is_not_sent_elsewhere(world: Told) -> None:
    world.open()
    [row] = world.rows(channel="chat")
    world.broker.close()
    world.config = msgspec.structs.replace(world.config, notifications=(MAIL,))
    world.open_broker()
    with pytest.raises(BrokerError) as caught:
        world.broker.notifications.retry(OPERATOR, row.id)
    assert caught.value.code == "channel_changed"
    world.later(hours=24)
    world.broker.notifications.tick()
    assert world.rows(id=row.id)[0].state == "given_up"


def test_the_configuration_survives_its_own_form(world: Told) -> None:
    assert msgspec.json.decode(msgspec.json.encode(world.config), type=BrokerConfig) == world.config


# The example that the specification's own libraries test with (Standard Webhooks, symmetric signatures).
KEY = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
EXAMPLE = ("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')


def test_a_signature_is_that_of_the_specification_and_of_a_computation_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text(f"{KEY}\n")
    path.chmod(0o600)
    keys = signing_keys(str(path))
    assert signature(*EXAMPLE, keys) == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    other = "whsec_" + base64.b64encode(bytes(range(32))).decode()
    path.write_text(f"{other}\n{KEY}\n")
    made = signature("msg-1", 7, b"{}", signing_keys(str(path))).split(" ")
    by_hand = hmac.new(bytes(range(32)), b"msg-1.7.{}", hashlib.sha256).digest()
    assert made[0] == f"v1,{base64.b64encode(by_hand).decode()}"
    assert len(made) == 2, "whoever has yet to change knows the old one"


@pytest.mark.control("CRED-01")
@pytest.mark.parametrize(
    "text",
    [
        "", "hunter2", "whsec_", "whsec_short", "whsec_" + "A" * 31, KEY.removeprefix("whsec_"), f"{KEY}\nother",
        "whsec_" + base64.b64encode(b"x" * 23).decode(), "whsec_" + base64.b64encode(b"x" * 65).decode(), "whsec_é",
    ],
)  # fmt: skip
def test_a_file_without_a_signing_secret_signs_nothing_and_is_not_repeated(tmp_path: Path, text: str) -> None:
    path = tmp_path / "secret"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(NotDelivered) as caught:
        signing_keys(str(path))
    assert caught.value.code == "file_unusable"
    assert not text.removeprefix("whsec_") or text.removeprefix("whsec_") not in caught.value.message.replace(
        str(path), ""
    )


@pytest.mark.control("CRED-01")
def test_a_secret_is_read_from_a_file_of_its_own_that_is_closed_to_others(tmp_path: Path) -> None:
    path, link = tmp_path / "secret", tmp_path / "link"
    path.write_text("hunter2\n")
    link.symlink_to(path)
    path.chmod(0o600)
    assert read_secret(str(path), {}) == "hunter2"
    for mode in (0o640, 0o604, 0o660, 0o644):
        path.chmod(mode)
        with pytest.raises(NotDelivered, match="or open to group or others"):
            read_secret(str(path), {})
    path.chmod(0o440)
    with pytest.raises(NotDelivered, match="or open to group or others"):
        read_secret(str(path), {"CREDENTIALS_DIRECTORY": str(tmp_path / "elsewhere")})
    assert read_secret(str(path), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) == "hunter2", "systemd's access list"
    path.chmod(0o444)
    with pytest.raises(NotDelivered, match="or open to group or others"):
        read_secret(str(path), {"CREDENTIALS_DIRECTORY": str(tmp_path)})
    path.chmod(0o600)
    os.mkfifo(tmp_path / "pipe", 0o600)
    for wrong in (link, tmp_path / "missing", tmp_path, tmp_path / "pipe"):
        with pytest.raises(NotDelivered) as caught:
            read_secret(str(wrong), {})
        assert caught.value.code == "file_unusable"
    with pytest.raises(NotDelivered, match="cannot be used"):
        tls_context(str(path))
