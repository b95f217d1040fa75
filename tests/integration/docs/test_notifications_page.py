"""docs/notifications.md as it is written: its channels are taken, its commands reach their far ends, its table is the code's."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from broker_rig import running_broker
from notify_rig import Hooks, Mails
from page import ROOT, run_page

from saw.broker.notification_settings import DEFAULT_KINDS, Channel, Kind
from saw.broker.notification_words import Message

PAGE = (ROOT / "docs/notifications.md").read_text(encoding="utf-8")


@pytest.mark.control("REV-01")
def test_the_page_sets_channels_up_and_tests_them(tmp_path: Path) -> None:
    hooks, mails = Hooks(tmp_path / "hooks"), Mails(tmp_path / "mails", login=True)
    hooks.start()
    mails.start()
    chat, mail = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])["broker_notifications"]
    here: dict[str, dict[str, Any]] = {
        "chat": {"url": hooks.channel().url, "secret_file": str(hooks.secret)},
        "mail": {"host": "localhost", "port": mails.port, "password_file": str(mails.password)},
    }
    files = {"chat": hooks.channel().ca_file, "mail": mails.channel().ca_file}
    channels = [{**one, **here[one["name"]], "ca_file": files[one["name"]]} for one in (chat, mail)]
    try:
        with running_broker(notifications=msgspec.convert(channels, tuple[Channel, ...])) as lab:
            context = tmp_path / "context.json"
            context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket, "ssh": None}}))
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            run_page("docs/notifications.md", tmp_path, {"PATH": path, "SAW_CONTEXT": str(context)})
    finally:
        hooks.stop()
        mails.stop()
    assert [one.verified() for one in hooks.got] == [True]
    assert sorted(to for _, [to], _ in mails.got) == ["ben@example.com", "cleo@example.com", "operations@example.com"]


def test_the_body_on_the_page_is_one() -> None:
    shown = msgspec.json.decode(PAGE.partition("```json\n")[2].partition("```")[0], type=Message)
    assert (shown.type, shown.data.link.rpartition("/")[2]) == (Kind.REVIEW_OPENED, shown.data.review)


def test_the_page_names_every_reason() -> None:
    rows = re.findall(r"^\| (`.*?) \|", PAGE.partition("| reason |")[2].partition("\n\n")[0], re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    source = "".join(path.read_text() for path in sorted((ROOT / "src/saw/broker").glob("notification_*.py")))
    source += (ROOT / "src/saw/broker/notifications.py").read_text().partition("def get_notification")[0]
    known = {*re.findall(r'code="([a-z_]+)"', source), "unreachable"} - {
        "delivered",
        "channel_changed",
        "unknown_channel",
    }  # those refuse operators
    assert told == known


def test_the_page_names_every_kind_and_its_default() -> None:
    table = PAGE.partition("## What is told")[2].partition("\n\n## ")[0]
    rows = re.findall(r"^\| (`.*`) \|.*\| (on|off) \|$", table, re.MULTILINE)
    told = {name: default for names, default in rows for name in re.findall(r"`([a-z_]+)`", names)}
    assert told == {kind: "on" if kind in DEFAULT_KINDS else "off" for kind in Kind if kind is not Kind.TEST}
