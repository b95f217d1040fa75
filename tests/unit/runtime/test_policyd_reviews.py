"""The policy agent's way to ask people about tools: what it sends, what it makes of answers, and for whom it asks at all."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from saw.cli import policyd
from saw.review.tool import AskTool, ClaimTool, EndTool, ToolView
from saw.runtime import policyd_asking
from saw.runtime.policyd_config import PolicydConfig, Workspace
from saw.runtime.policyd_reviews import ReviewBroker
from saw.runtime.review_desk import Ask, Claim, End, Question, ReviewRefused, Wait

REVIEW, DIGEST, SECRET = f"rv-{'1' * 32}", "d" * 64, "A" * 43
VIEW = ToolView(id=REVIEW, state="pending", request_digest="e" * 64, opened_at="o", expires_at="x")
WORKSPACE = Workspace(
    workspace_id="ws-a", number=1, trust_domain="saw.example", broker_url="https://10.0.0.1:8443", broker_name="broker",
    ring2="10.0.0.1:1", ring2_name="ring2", ca_pem="", tuf_root={}, blueprint="coding", ring="stable",
)  # fmt: skip
Answer = Callable[[httpx.Request], httpx.Response]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[httpx.Request], dict[str, Any]]:
    """What the broker was asked, and what it answers."""
    seen: list[httpx.Request] = []
    answers: dict[str, Any] = {"status": 200, "body": msgspec.json.encode(VIEW)}

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        if "raises" in answers:
            raise answers["raises"]
        return httpx.Response(answers["status"], content=answers["body"])

    def client(workspace: Workspace, *_: object) -> httpx.Client:
        return httpx.Client(transport=httpx.MockTransport(answer), base_url=workspace.broker_url)

    monkeypatch.setattr(policyd_asking, "open_client", client)
    return seen, answers


def ask(question: Question) -> ToolView:
    return ReviewBroker(WORKSPACE, Path("/nowhere")).review(question)


@pytest.mark.parametrize(
    ("question", "method", "path", "kind"),
    [
        (Ask(policy_digest=DIGEST, server="files", params=b"{}"), "POST", "/v1/workspace/reviews", AskTool),
        (Wait(id=REVIEW, wait_s=7), "GET", f"/v1/workspace/reviews/{REVIEW}?workspace_id=ws-a&wait=7", None),
        (
            Claim(id=REVIEW, policy_digest=DIGEST, server="files", params=b"{}", claim=SECRET),
            "POST", f"/v1/workspace/reviews/{REVIEW}/claim", ClaimTool,
        ),
        (
            End(id=REVIEW, claim=SECRET, outcome="done", answer_sha256=DIGEST),
            "POST", f"/v1/workspace/reviews/{REVIEW}/result", EndTool,
        ),
    ],
    ids=["ask", "wait", "claim", "end"],
)  # fmt: skip
def test_each_question_is_one_call_of_the_broker_in_the_workspaces_own_name(
    asked: tuple[list[httpx.Request], dict[str, Any]], question: Question, method: str, path: str, kind: type | None
) -> None:
    assert ask(question) == VIEW
    (request,) = asked[0]
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    if kind is not None:
        assert msgspec.json.decode(request.content, type=kind).workspace_id == "ws-a"


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (409, {"code": "already_claimed", "message": "m", "cure": "c"}, "already_claimed"),
        (403, {"code": "outside_delegation", "message": "m"}, "outside_delegation"),
        (403, {"code": "not_this_workspace", "message": "no certificate"}, "review_unavailable"),
        (429, {"code": "rate_limited", "message": "slower"}, "review_unavailable"),
        (429, {"code": "too_many_reviews", "message": "m"}, "too_many_reviews"),
        (500, {"code": "internal", "message": "m"}, "review_unavailable"),
        (409, "no JSON object", "review_unavailable"),
        (200, {"id": "no id"}, "review_unavailable"),
    ],
)
def test_a_refusal_has_the_brokers_reason_and_whatever_else_is_no_answer(
    asked: tuple[list[httpx.Request], dict[str, Any]], status: int, body: object, code: str
) -> None:
    asked[1].update(status=status, body=msgspec.json.encode(body))
    with pytest.raises(ReviewRefused) as caught:
        ask(Wait(id=REVIEW))
    assert caught.value.code == code


@pytest.mark.parametrize("error", [httpx.ConnectError("gone"), httpx.ReadTimeout("late"), FileNotFoundError("ca.pem")])
def test_a_broker_that_cannot_be_reached_is_no_answer(
    asked: tuple[list[httpx.Request], dict[str, Any]], error: Exception
) -> None:
    asked[1]["raises"] = error
    with pytest.raises(ReviewRefused) as caught:
        ask(Wait(id=REVIEW))
    assert caught.value.code == "review_unavailable"


def test_people_are_asked_for_the_mediators_user_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policyd, "load_workspace", lambda _config: WORKSPACE)
    folder = str(tmp_path)
    assert policyd.review_desk(PolicydConfig(run_dir=folder, review_user=None)) is None
    assert policyd.review_desk(PolicydConfig(run_dir=folder, review_user="nobody-of-that-name")) is None
    assert "have no reviews here" in capsys.readouterr().err
    me = pwd.getpwuid(os.getuid()).pw_name
    desk = policyd.review_desk(PolicydConfig(run_dir=folder, review_user=me))
    assert desk is not None
    path = tmp_path / "review" / "tools.sock"
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o711)
    desk.close()
    assert not path.exists()


def test_where_the_socket_cannot_be_made_the_policy_is_enforced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(policyd, "load_workspace", lambda _config: WORKSPACE)
    (tmp_path / "review").write_text("no folder")
    me = pwd.getpwuid(os.getuid()).pw_name
    assert policyd.review_desk(PolicydConfig(run_dir=str(tmp_path), review_user=me)) is None
    assert "have no reviews here" in capsys.readouterr().err
