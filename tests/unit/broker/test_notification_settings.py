"""Channels in the broker's configuration: each wrong field is refused by its name, and its allowed twin is taken."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from saw.broker.config import BrokerConfig, load_config
from saw.broker.notification_settings import DEFAULT_KINDS, Email, Kind, Webhook
from saw.errors import ConfigError

WHOLE = {
    "trust_domain": "saw.example",
    "state_dir": "/s",
    "operator_socket": "/o",
    "server_names": ["b.saw.internal"],
}
HOOK = {
    "type": "webhook",
    "name": "chat",
    "url": "https://hooks.example.com/saw?team=a",
    "secret_file": "/etc/saw/chat",
}
MAIL = {
    "type": "email",
    "name": "mail",
    "host": "smtp.example.com",
    "from": "saw@example.com",
    "to": ["ops@example.com"],
}


def loaded(folder: Path, *channels: dict[str, Any]) -> BrokerConfig:
    path = folder / "broker.json"
    path.write_text(json.dumps({**WHOLE, "notifications": channels}))
    return load_config(path)


def test_nobody_is_told_until_it_is_configured(tmp_path: Path) -> None:
    path = tmp_path / "broker.json"
    path.write_text(json.dumps(WHOLE))
    assert load_config(path).notifications == ()
    hook, mail = loaded(tmp_path, HOOK, MAIL).notifications
    assert isinstance(hook, Webhook)
    assert isinstance(mail, Email)
    assert (mail.port, mail.tls, mail.sender) == (587, "starttls", "saw@example.com")
    assert {Kind.REVIEW_ENDED, Kind.POLICY_REQUESTED, Kind.TEST} == set(Kind) - DEFAULT_KINDS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "http://hooks.example.com/"}, "chat.url must be https"),
        ({"url": "http://127.0.0.1:8080/"}, "needs insecure_loopback"),
        ({"url": "http://hooks.example.com/", "insecure_loopback": True}, "chat.url must be https"),
        ({"url": "http://localhost/", "insecure_loopback": True}, "chat.url must be https"),
        ({"url": "http://127.0.0.1@hooks.example.com/", "insecure_loopback": True}, "chat.url must be https"),
        ({"url": "https://user:secret@hooks.example.com/"}, "without a user"),
        ({"url": "https://hooks.example.com/#x"}, "chat.url"),
        ({"url": "https://hooks.example.com\\@other.example/"}, "chat.url"),
        ({"url": "https://hooks.example.com/\r\nx-other: 1"}, "chat.url"),
        ({"url": "https://hooks.example.com:0/"}, "chat.url"),
        ({"url": "https://hooks.example.com:port/"}, "chat.url"),
        ({"url": "https:///saw"}, "chat.url"),
        ({"url": "ftp://hooks.example.com/"}, "chat.url"),
        ({"secret_file": "chat.secret"}, "chat.secret_file must be an absolute path"),
        ({"ca_file": "ca.pem"}, "chat.ca_file must be an absolute path"),
        ({"secret": "whsec_x"}, "secret"),
        ({"kinds": ["test"]}, "chat.kinds must not have test"),
        ({"kinds": ["review_approved"]}, "review_approved"),
        ({"groups": [""]}, "chat.groups"),
        ({"groups": ["a\nb"]}, "chat.groups"),
        ({"groups": ["*"]}, "chat.groups"),
        ({"name": "Chat"}, "no name"),
        ({"name": "mail"}, "two channels mail"),
        ({"type": "pager"}, "pager"),
    ],
    ids=str,
)
def test_a_wrong_field_of_a_webhook_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        loaded(tmp_path, {**HOOK, **change}, MAIL)
    assert len(loaded(tmp_path, HOOK, MAIL).notifications) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"url": "http://127.0.0.1:8080/saw", "insecure_loopback": True},
        {"url": "http://[::1]:8080/saw", "insecure_loopback": True},
        {"url": "https://192.0.2.7:8443/saw"},
        {"url": "https://[2001:db8::1]/saw"},
        {"kinds": ["review_ended", "break_glass"], "groups": ["maintainers"], "ca_file": "/etc/saw/ca.pem"},
    ],
    ids=str,
)
def test_a_right_field_of_a_webhook_is_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    assert len(loaded(tmp_path, {**HOOK, **change}).notifications) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"host": "smtp example"}, "mail.host"),
        ({"host": ""}, "mail.host"),
        ({"port": 0}, "mail.port must be 1 to 65535"),
        ({"tls": "none"}, "mail.tls must be starttls or implicit"),
        ({"tls": "none", "host": "localhost"}, "mail.tls must be starttls or implicit"),
        ({"tls": "optional"}, "tls"),
        ({"from": "saw"}, "mail.from"),
        ({"from": "Saw <saw@example.com>"}, "mail.from"),
        ({"from": "saw@example.com\r\nBcc: x@example.com"}, "mail.from"),
        ({"to": []}, "mail.to must list addresses"),
        ({"to": {}}, "mail.to must list addresses"),
        ({"to": ["ops@example.com\nx"]}, "mail.to must list addresses"),
        ({"to": ["ops@example.com", "a,b@example.com"]}, "mail.to must list addresses"),
        ({"to": ["ops@-example.com"]}, "mail.to must list addresses"),
        ({"to": ["=?utf-8?q?ops?=@example.com"]}, "mail.to must list addresses"),
        ({"to": {"maintainers": ["ops"]}}, "mail.to must list addresses"),
        ({"to": {"a\nb": ["ops@example.com"]}}, "mail.to must name groups"),
        ({"to": [f"n{number}@example.com" for number in range(65)]}, "64 addresses at most"),
        ({"username": "saw"}, "belong together"),
        ({"password_file": "/etc/saw/mail"}, "belong together"),
        ({"username": "", "password_file": "/etc/saw/mail"}, "mail.username must be visible"),
        ({"username": "a\r\nb", "password_file": "/etc/saw/mail"}, "mail.username must be visible"),
        ({"username": "saw", "password_file": "mail"}, "mail.password_file must be an absolute path"),
        ({"username": "saw", "password_file": "/p", "host": "127.0.0.1", "tls": "none"}, "mail.username needs TLS"),
        ({"password": "hunter2"}, "password"),
        ({"ca_file": "ca.pem"}, "mail.ca_file must be an absolute path"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_wrong_field_of_mail_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        loaded(tmp_path, {**MAIL, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"host": "127.0.0.1", "tls": "none", "port": 25},
        {"host": "::1", "tls": "none"},
        {"tls": "implicit", "port": 465, "username": "saw", "password_file": "/etc/saw/mail"},
        {"to": {"maintainers": ["a.b+c@example.com"], "*": ["ops@mail.example.com"]}},
    ],
    ids=str,
)
def test_a_right_field_of_mail_is_taken(tmp_path: Path, change: dict[str, Any]) -> None:
    assert len(loaded(tmp_path, {**MAIL, **change}).notifications) == 1


def test_there_are_not_more_channels_than_a_broker_serves(tmp_path: Path) -> None:
    many = [{**HOOK, "name": f"chat-{number}"} for number in range(33)]
    with pytest.raises(ConfigError, match="32 channels at most"):
        loaded(tmp_path, *many)
    assert len(loaded(tmp_path, *many[:32]).notifications) == 32


def test_whom_a_channel_reaches_follows_from_kinds_groups_and_addresses() -> None:
    hook = Webhook(name="chat", url="https://h.example/", secret_file="/f", groups=("a",))
    assert hook.takes(Kind.REVIEW_OPENED, "a")
    assert not hook.takes(Kind.REVIEW_OPENED, "b")
    assert not hook.takes(Kind.WORKSPACE_QUARANTINED, ""), "what is about no group is for channels without groups"
    assert not hook.takes(Kind.REVIEW_ENDED, "a")
    everything = Webhook(name="chat", url="https://h.example/", secret_file="/f")
    assert [kind for kind in Kind if everything.takes(kind, "a")] == [kind for kind in Kind if kind in DEFAULT_KINDS]
    ended = Webhook(name="chat", url="https://h.example/", secret_file="/f", kinds=(Kind.REVIEW_ENDED,))
    assert [kind for kind in Kind if ended.takes(kind, "a")] == [Kind.REVIEW_ENDED]
    split = {"a": ("x@e.com", "x@e.com"), "*": ("z@e.com",)}
    mail = Email(name="mail", host="h", sender="s@e.com", to=split)
    assert [mail.recipients(group) for group in ("a", "b", "")] == [("x@e.com",), ("z@e.com",), ("z@e.com",)]
    assert mail.everyone == ("x@e.com", "z@e.com")
    assert Email(name="mail", host="h", sender="s@e.com", to={"a": ("x@e.com",)}).recipients("b") == ()
