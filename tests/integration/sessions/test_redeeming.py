"""A session is opened once, by its own key, in time, for a workspace that runs and a person who is entitled: at a real broker."""

from __future__ import annotations

import base64
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from broker_rig import Lab

from databases import beside
from saw.broker.client import BrokerRefusal
from saw.broker.config import SessionRules
from saw.broker.session_views import key_digest

REDEEM = "/v1/bastion/sessions/redeem"


class Side:
    """The bastion's side of a broker: its client, and what it sends."""

    def __init__(self, lab: Lab, http: httpx.Client, directory: Path) -> None:
        self.lab = lab
        self.http = http
        self._directory = directory
        self._keys = 0

    def key(self) -> str:
        self._keys += 1
        path = self._directory / f"key{self._keys}"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(path)], check=True)
        return path.with_suffix(".pub").read_text().strip()

    def ask(self, workspace: str = "ws-a", **more: Any) -> tuple[str, str]:
        """Request a session; return its id and the key that may log in."""
        key = self.key()
        body = {"workspace_id": workspace, "public_key": key, **more}
        return str(self.lab.operator.request("POST", "/v1/sessions", body)["session_id"]), key

    def redeem(self, session: str, key: str, http: httpx.Client | None = None, **more: Any) -> httpx.Response:
        body = {
            "session_id": session,
            "key_sha256": key_digest(key),
            "address": "192.0.2.7",
            "leg_key": self.key(),
            **more,
        }
        return (http or self.http).post(REDEEM, json=body)

    def sql(self, statement: str, *values: str) -> None:
        with beside(self.lab.config) as store:
            store.execute(statement, values)

    def workspace(self, name: str) -> None:
        self.lab.workspace(name)
        self.sql("UPDATE workspaces SET state = 'active' WHERE id = ?", name)

    def openings(self, session: str) -> list[tuple[str, str]]:
        """Outcome and reason of every attempt to open it, as audited."""
        events = [item["event"] for item in self.lab.events()]
        return [
            (event["status"], event.get("status_detail", ""))
            for event in events
            if event.get("activity_name") == "Logon" and event["unmapped"]["saw"].get("session") == session
        ]


@pytest.fixture(scope="module")
def side() -> Iterator[Side]:
    directory = Path(tempfile.mkdtemp(prefix="saw-redeem-"))
    lab = Lab(directory, sessions=SessionRules(lease_s=6))
    try:
        lab.start()
        with lab.tls("bastion", "edge") as http:
            made = Side(lab, http, directory)
            made.workspace("ws-a")
            yield made
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.control("ID-02")
def test_the_first_redeem_wins_and_the_second_is_refused_and_audited(side: Side) -> None:
    session, key = side.ask()
    first = side.redeem(session, key)
    assert first.status_code == 200, first.text
    assert (first.json()["workspace_id"], first.json()["session_id"]) == ("ws-a", session)
    second = side.redeem(session, key)
    assert (second.status_code, second.json()["error"]) == (409, "session_used")
    assert side.openings(session) == [("Success", ""), ("Failure", "session_used")]


@pytest.mark.control("ID-02")
def test_of_many_at_once_exactly_one_opens_the_session(side: Side) -> None:
    session, key = side.ask()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: side.redeem(session, key).status_code, range(8)))
    assert sorted(answers) == [200, *[409] * 7]


@pytest.mark.control("ID-02")
def test_another_key_an_unknown_session_and_one_past_its_minutes_open_nothing(side: Side) -> None:
    session, key = side.ask()
    assert side.redeem(session, side.key()).json()["error"] == "session_unknown"
    assert side.redeem("ses-" + "0" * 32, key).json()["error"] == "session_unknown"
    side.sql("UPDATE sessions SET expires_at = '2026-01-01T00:00:00.000Z' WHERE id = ?", session)
    assert side.redeem(session, key).json()["error"] == "session_expired"
    assert side.openings(session) == [("Failure", "session_unknown"), ("Failure", "session_expired")]
    assert side.redeem(*side.ask()).status_code == 200


@pytest.mark.control("ID-02")
@pytest.mark.parametrize("step", ["stop", "kill"])
def test_a_workspace_that_left_active_takes_its_waiting_sessions_along(side: Side, step: str) -> None:
    name = f"ws-{step}"
    side.workspace(name)
    side.workspace(f"{name}-twin")
    session, key = side.ask(name)
    twin = side.ask(f"{name}-twin")
    if step == "kill":
        side.lab.operator.request("POST", f"/v1/workspaces/{name}/kill", {"reason": "test"})
    else:
        side.lab.step(name, "stopped")
    assert side.redeem(session, key).json()["error"] == "session_ended"
    with pytest.raises(BrokerRefusal) as refused:
        side.ask(name)
    assert refused.value.code == "workspace_not_admitted"
    assert side.redeem(*twin).status_code == 200


@pytest.mark.control("ID-02")
def test_a_perimeter_and_nobody_cannot_redeem_nor_another_bastion_watch(side: Side) -> None:
    session, key = side.ask()
    with (
        side.lab.tls("perimeter", "edge") as perimeter,
        side.lab.tls() as nobody,
        side.lab.tls("bastion", "b2") as other,
    ):
        for client in (perimeter, nobody):
            assert side.redeem(session, key, client).json()["error"] == "not_a_bastion"
        assert side.redeem(session, key).status_code == 200
        assert other.get(f"/v1/bastion/sessions/{session}").json()["error"] == "foreign_session"
        assert other.post(f"/v1/bastion/sessions/{session}/close", json={"reason": "closed"}).status_code == 403
        assert other.get("/v1/perimeter/state").json()["error"] == "not_a_perimeter"
    assert side.http.get(f"/v1/bastion/sessions/{session}").json() == {"state": "open", "reason": ""}


@pytest.mark.control("ID-03")
def test_a_waiting_bastion_hears_the_end_and_what_it_reports_is_kept(side: Side) -> None:
    session, key = side.ask()
    assert side.redeem(session, key).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(lambda: side.http.get(f"/v1/bastion/sessions/{session}?wait=30", timeout=60))
        ended = side.lab.operator.request("POST", f"/v1/sessions/{session}/end", {"reason": "enough"})
        assert (ended["state"], ended["changed"]) == ("ending", True)
        assert waiting.result().json() == {"state": "ended", "reason": "ended_by_operator"}
    said = {"reason": "ended", "exit_code": 255, "bytes_in": 3, "bytes_out": 9, "chunks": 4, "digest": "a" * 64}
    close = f"/v1/bastion/sessions/{session}/close"
    assert side.http.post(close, json=said).json() == {"changed": True}
    assert side.http.post(close, json={**said, "digest": "b" * 64}).json() == {"changed": False}
    shown = side.lab.operator.request("GET", f"/v1/sessions/{session}")
    assert (shown["state"], shown["reason"], shown["recording"]) == ("closed", "ended_by_operator", "a" * 64)
    [end] = [
        item["event"]
        for item in side.lab.events()
        if item["event"].get("activity_name") == "Logoff" and item["event"]["unmapped"]["saw"]["session"] == session
    ]
    assert (end["status_detail"], end["unmapped"]["saw"]["recording_sha256"]) == ("ended_by_operator", "a" * 64)


def test_a_recordings_key_is_given_to_operators_and_that_is_audited(side: Side) -> None:
    session, key = side.ask()
    with pytest.raises(BrokerRefusal, match="no recording"):
        side.lab.operator.request("POST", f"/v1/sessions/{session}/key")
    given = side.redeem(session, key).json()["recording_key"]
    found = side.lab.operator.request("POST", f"/v1/sessions/{session}/key")["key"]
    assert bytes.fromhex(found) == base64.b64decode(given)
    assert "session.replay" in {item["event"].get("api", {}).get("operation") for item in side.lab.events()}


@pytest.mark.control("ID-02")
def test_where_sessions_must_be_recorded_nobody_gets_a_certificate_past_the_bastion(side: Side) -> None:
    body = {"workspace_id": "ws-a", "public_key": side.key()}
    assert side.lab.operator.request("POST", "/v1/certificates/ssh", body)["certificate"]
    directory = Path(tempfile.mkdtemp(prefix="saw-redeem-"))
    lab = Lab(directory, sessions=SessionRules(recorded_only=True))
    try:
        lab.start()
        strict = Side(lab, side.http, directory)
        strict.workspace("ws-a")
        with pytest.raises(BrokerRefusal) as refused:
            lab.operator.request("POST", "/v1/certificates/ssh", body)
        assert refused.value.code == "bastion_required"
        assert strict.ask()[0].startswith("ses-")
    finally:
        lab.stop()
        shutil.rmtree(directory)
