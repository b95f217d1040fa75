"""Calls of tools over stdio that wait for people, in the mediator: held, claimed once, written as reviewed, told of."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from saw.policy.loader import load_governance
from saw.policy.mcp import decide_tool
from saw.policy.mcp_messages import MAX_OUTSTANDING
from saw.review.messages import ReviewState
from saw.review.tool import MAX_PARAMS, ToolView, params_of
from saw.runtime.mcp_conversation import Conversation
from saw.runtime.mcp_protocol import Session
from saw.runtime.mcp_reviews import MAX_HELD, WAIT_S, Reviews, desk_client
from saw.runtime.review_desk import MAX_ASKING, Ask, Claim, End, Question, ReviewDesk, ReviewRefused, Wait, unavailable

DIGEST = "d" * 64
REVIEW = f"rv-{'1' * 32}"
GOVERNANCE = load_governance(
    b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
mcp:
  servers:
    files:
      transport: stdio
      command: [server]
      tools:
        read: {class: auto, args: {path: {required: true}}}
        publish: {class: review, args: {text: {max_length: 999999}}, definition: "sha256:%s"}
        move: {class: review, args: {to: {}}}
"""
    % (b"0" * 64)
)
SILENT = load_governance(b"""
schema: 1
blueprint: {name: coding, version: 1.0.0, owner: team}
mcp: {servers: {files: {transport: stdio, command: [server], tools: {move: {class: deny}}}}}
""")


def view(state: ReviewState = "pending", identifier: str = REVIEW, **more: Any) -> ToolView:
    return ToolView(id=identifier, state=state, request_digest="e" * 64, opened_at="o", expires_at="soon", **more)


class Desk:
    """A broker in few words: what the next look at a review says, and everything that was asked."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.state: ReviewState = "pending"
        self.claimed = ""
        self.refused: dict[type, list[ReviewRefused]] = {}
        self.stopped: dict[type, asyncio.Event] = {}
        self.detail = ""

    async def __call__(self, question: Question) -> ToolView:
        self.asked.append(question)
        if type(question) in self.stopped:
            await self.stopped[type(question)].wait()
        if waiting := self.refused.get(type(question)):
            raise waiting.pop(0)
        if isinstance(question, Claim):
            if self.claimed and self.claimed != question.claim:
                raise ReviewRefused("already_claimed", "another has it")
            self.claimed, self.state = question.claim, "executing"
        if isinstance(question, End):
            self.state = question.outcome
        return view(self.state, detail=self.detail)

    def of(self, kind: type) -> list[Any]:
        return [one for one in self.asked if isinstance(one, kind)]


class Line:
    """One end of a connection."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.raw: list[bytes] = []
        self.closed = False
        self.unread = 0
        self.transport = SimpleNamespace(get_write_buffer_size=lambda: self.unread)

    def close(self) -> None:
        self.closed = True

    def write(self, data: bytes) -> None:
        self.raw.append(data)
        self.lines.append(json.loads(data))

    def is_closing(self) -> bool:
        return self.closed


class Table:
    """A session with people behind it; ``run`` lets everything go on until nothing moves."""

    def __init__(self, desk: Desk | None = None, reviews: Reviews | None = None) -> None:
        self.desk = desk or Desk()
        self.log: list[dict[str, Any]] = []
        self.paused: list[float] = []
        self.governance = GOVERNANCE
        self.digest = DIGEST
        self.reviews = reviews or Reviews(self.desk, self.log.append, pause=self._pause)
        self.client, self.server = Line(), Line()
        self.session = Session(
            "files",
            lambda: self.governance.mcp.servers["files"],
            lambda tool, arguments: decide_tool(self.governance, "files", tool, arguments),
            self.log.append,
        )
        writers = {"client": self.client, "server": self.server}
        self.conversation = Conversation(self.session, self.reviews, lambda: self.digest, writers)
        self.session.hold = self.conversation.hold

    async def _pause(self, seconds: float) -> None:
        self.paused.append(seconds)

    async def say(self, tool: str = "move", number: int | str = 1, **arguments: object) -> None:
        params = {"name": tool, "arguments": arguments, "_meta": {"progressToken": 1}}
        await self.send(id=number, method="tools/call", params=params)

    async def send(self, **message: Any) -> None:
        for out in self.session.from_client(json.dumps({"jsonrpc": "2.0", **message}).encode() + b"\n"):
            {"client": self.client, "server": self.server}[out.to].write(out.line)
        await self.settle()

    async def answer(self, number: int | str = 1, **result: Any) -> None:
        message = {"jsonrpc": "2.0", "id": number, "result": result or {"content": []}}
        for out in self.conversation.from_server(json.dumps(message).encode() + b"\n"):
            {"client": self.client, "server": self.server}[out.to].write(out.line)
        await self.settle()

    async def settle(self) -> None:
        for _ in range(60):
            await asyncio.sleep(0)

    @property
    def told(self) -> dict[str, Any]:
        """The last result that the agent got."""
        return dict(self.client.lines[-1]["result"])

    @property
    def refusal(self) -> dict[str, Any]:
        return dict(self.client.lines[-1]["error"]["data"])


def run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(body())


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-03")
@pytest.mark.control("RUN-05")
def test_a_call_is_written_after_people_agreed_with_the_reviewed_bytes_and_its_answer_is_told() -> None:
    async def body() -> None:
        table = Table()
        await table.say(to="b", number="seven")
        assert table.server.raw == []
        assert table.told["isError"] is True
        assert table.told["_meta"]["saw/review"] == {"id": REVIEW, "state": "pending", "expires_at": "soon"}
        assert "same arguments again" in table.told["content"][0]["text"]
        assert table.desk.of(Wait)[-1].wait_s == WAIT_S
        table.desk.state = "approved"
        await table.say(to="b", number=8)
        params = params_of("move", {"to": "b"})
        assert table.server.raw == [b'{"jsonrpc":"2.0","id":8,"method":"tools/call","params":' + params + b"}\n"]
        assert [one.params for one in (*table.desk.of(Ask), *table.desk.of(Claim))] == [params, params]
        await table.answer(8, content=[{"type": "text", "text": "moved"}])
        assert table.told == {"content": [{"type": "text", "text": "moved"}]}
        (told,) = table.desk.of(End)
        assert (told.outcome, told.claim) == ("done", table.desk.claimed)
        assert told.answer_sha256 == hashlib.sha256(table.client.raw[-1].rstrip(b"\n")).hexdigest()
        assert [one["verdict"] for one in table.log if one["event"] == "tool_call"] == ["allow"]

    run(body)


def test_a_call_that_is_approved_while_it_is_held_is_written_in_the_same_request() -> None:
    async def body() -> None:
        table = Table()
        table.desk.stopped[Wait] = asyncio.Event()
        await table.say(to="b")
        assert (table.server.raw, table.client.raw) == ([], [])
        table.desk.state = "approved"
        table.desk.stopped[Wait].set()
        await table.settle()
        assert table.server.lines[0]["id"] == 1

    run(body)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("denied", "denied this call: by ben"),
        ("expired", "Nobody decided"),
        ("cancelled", "was not made"),
        ("unknown", "may have been made"),
        ("done", "answer went to an earlier request"),
    ],
)
def test_an_end_is_told_once_and_then_the_same_call_is_another(state: ReviewState, words: str) -> None:
    async def body() -> None:
        table = Table()
        await table.say(to="b")
        table.desk.state, table.desk.detail = state, "by ben"
        await table.say(to="b", number=2)
        assert words in table.told["content"][0]["text"]
        assert len(table.desk.of(Ask)) == 1
        table.desk.state = "pending"
        await table.say(to="b", number=3)
        assert len(table.desk.of(Ask)) == 2
        assert table.server.raw == []

    run(body)


def test_the_same_call_is_known_by_policy_tool_and_arguments_in_any_order_of_its_members() -> None:
    assert params_of("t", {"b": 1, "a": 2}) == params_of("t", {"a": 2, "b": 1})

    async def body() -> None:
        table = Table()
        await table.say(to="b")
        await table.say(to="b", number=2)
        assert len(table.desk.of(Ask)) == 1
        await table.say(to="c", number=3)
        table.digest = "c" * 64
        await table.say(to="b", number=4)
        assert len(table.desk.of(Ask)) == 3

    run(body)


@pytest.mark.control("REV-03")
def test_two_sessions_with_one_approved_call_write_it_once() -> None:
    async def body() -> None:
        first = Table()
        second = Table(first.desk, first.reviews)
        first.desk.stopped[Claim] = asyncio.Event()
        first.desk.state = "approved"
        await first.say(to="b")
        await second.say(to="b")
        assert len(first.desk.of(Claim)) == 2, "both have seen the approval"
        first.desk.stopped[Claim].set()
        await first.settle()
        assert len(first.server.raw) + len(second.server.raw) == 1
        other = second if first.server.raw else first
        assert "another has it" in other.told["content"][0]["text"]

    run(body)


@pytest.mark.parametrize("code", ["lease_lapsed", "after_review_overdue", "not_approved"])
def test_a_claim_that_is_refused_for_now_is_asked_for_again_with_the_next_call(code: str) -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        table.desk.refused[Claim] = [ReviewRefused(code, "not at this moment")]
        await table.say(to="b")
        assert "not at this moment" in table.told["content"][0]["text"]
        assert table.server.raw == []
        await table.say(to="b", number=2)
        assert len(table.server.raw) == 1

    run(body)


@pytest.mark.parametrize(
    "code", ["review_denied", "policy_changed", "agent_retired", "bytes_changed", "outside_delegation"]
)
def test_a_claim_that_is_refused_refuses_the_call_with_its_reason(code: str) -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        table.desk.refused[Claim] = [ReviewRefused(code, "no", "do this")]
        await table.say(to="b")
        assert table.refusal["reason"] == code
        assert table.refusal["next_steps"]
        assert table.server.raw == []
        assert table.log[-1]["verdict"] == "deny"

    run(body)


@pytest.mark.control("RUN-05")
@pytest.mark.parametrize("kind", [Ask, Wait])
def test_without_the_policy_agent_or_the_broker_the_call_is_refused(kind: type) -> None:
    async def body() -> None:
        table = Table()
        table.desk.refused[kind] = [unavailable("nobody answers")]
        await table.say(to="b")
        assert table.refusal["reason"] == "review_required"
        assert "nobody answers" in table.refusal["detail"]
        assert table.refusal["next_steps"] == ["call again later with the same arguments"]
        assert table.server.raw == []
        await table.say("read", number=2, path="/a")
        assert [one["params"]["name"] for one in table.server.lines] == ["read"], "other tools go on"

    run(body)


@pytest.mark.control("REV-03")
def test_an_answer_to_a_claim_that_is_lost_is_asked_for_again_with_the_same_claim() -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        table.desk.refused[Claim] = [unavailable("lost"), unavailable("lost")]
        await table.say(to="b")
        assert len({one.claim for one in table.desk.of(Claim)}) == 1
        assert table.paused == [1.0, 2.0]
        assert len(table.server.raw) == 1

    run(body)


@pytest.mark.control("REV-03")
def test_a_claim_without_any_answer_writes_nothing_and_says_so() -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        table.desk.refused[Claim] = [unavailable("lost")] * 4
        await table.say(to="b")
        assert table.server.raw == []
        assert [one.outcome for one in table.desk.of(End)] == ["failed"]
        assert table.refusal["reason"] == "review_required"

    run(body)


@pytest.mark.control("REV-03")
@pytest.mark.parametrize("change", ["taken back", "policy", "refused now", "definition", "client left", "server gone"])
def test_between_claim_and_writing_everything_is_looked_at_once_more(change: str) -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        table.desk.stopped[Claim] = asyncio.Event()
        await table.say(
            "publish" if change == "definition" else "move",
            **({"text": "t"} if change == "definition" else {"to": "b"}),
        )
        if change == "taken back":
            await table.send(method="notifications/cancelled", params={"requestId": 1})
        elif change == "policy":
            table.digest = "c" * 64
        elif change == "refused now":
            table.governance = SILENT
        elif change == "definition":
            await table.send(id=9, method="tools/list")
            await table.answer(9, tools=[{"name": "publish", "description": "anything"}])
        elif change == "client left":
            table.conversation.leave()
        else:
            table.server.closed = True
        before = len(table.server.raw)
        table.desk.stopped[Claim].set()
        await table.settle()
        assert len(table.server.raw) == before
        assert [one.outcome for one in table.desk.of(End)] == ["failed"]
        assert ("error" in table.client.lines[-1]) if change != "taken back" else table.client.lines == []

    run(body)


@pytest.mark.control("REV-03")
def test_a_session_that_ends_before_the_answer_leaves_it_unknown() -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        await table.say(to="b")
        assert len(table.server.raw) == 1
        table.conversation.close()
        await table.settle()
        assert [one.outcome for one in table.desk.of(End)] == ["unknown"]
        again = Table(table.desk, table.reviews)
        await again.say(to="b")
        assert "may have been made" in again.told["content"][0]["text"]
        assert again.server.raw == []

    run(body)


def test_a_call_that_is_taken_back_before_anybody_decided_is_neither_answered_nor_told_to_the_server() -> None:
    async def body() -> None:
        table = Table()
        table.desk.stopped[Wait] = asyncio.Event()
        await table.say(to="b")
        await table.send(method="notifications/cancelled", params={"requestId": 1})
        table.desk.stopped[Wait].set()
        await table.settle()
        assert (table.client.raw, table.server.raw) == ([], [])
        await table.send(method="notifications/cancelled", params={"requestId": 5})
        assert table.server.lines[-1]["params"] == {"requestId": 5}

    run(body)


@pytest.mark.control("REV-03")
@pytest.mark.parametrize("how", ["cancelled", "left", "closed"])
def test_an_approval_is_not_used_up_for_a_caller_who_has_gone(how: str) -> None:
    async def body() -> None:
        table = Table()
        table.desk.stopped[Wait] = asyncio.Event()
        await table.say(to="b")
        if how == "cancelled":
            await table.send(method="notifications/cancelled", params={"requestId": 1})
        elif how == "left":
            table.conversation.leave()
        else:
            table.conversation.close()
        table.desk.state = "approved"
        table.desk.stopped[Wait].set()
        await table.settle()
        assert (table.desk.of(Claim), table.server.raw) == ([], [])

    run(body)


@pytest.mark.control("REV-03")
def test_who_was_told_to_call_again_hears_how_it_ended_and_asks_nobody_anew() -> None:
    async def body() -> None:
        table = Table()
        table.desk.state = "approved"
        await table.say(to="b")
        await table.say(to="b", number=2)
        assert "call again to hear how it ended" in table.told["content"][0]["text"]
        await table.answer(1)
        await table.say(to="b", number=3)
        assert "answer went to an earlier request" in table.told["content"][0]["text"]
        assert (len(table.desk.of(Ask)), len(table.server.lines)) == (1, 1)
        table.desk.state, table.desk.claimed = "pending", ""
        await table.say(to="b", number=4)
        assert len(table.desk.of(Ask)) == 2

    run(body)


def test_who_never_reads_the_answers_loses_the_session() -> None:
    async def body() -> None:
        table = Table()
        await table.say(to="b")
        assert not table.client.closed
        table.client.unread = 1024 * 1024 + 1
        await table.say(to="b", number=2)
        assert table.client.closed
        await table.say(to="b", number=3)
        assert len(table.client.raw) == 2

    run(body)


def test_what_is_held_is_bounded_and_its_number_is_taken() -> None:
    async def body() -> None:
        table = Table()
        table.desk.stopped[Ask] = asyncio.Event()
        for number in range(MAX_HELD):
            await table.say(to="b", number=number)
        await table.say(to="b", number=3)
        assert "still outstanding" in table.client.lines[-1]["error"]["message"]
        await table.say(to="b", number=MAX_HELD)
        assert table.refusal["reason"] == "review_required"
        await table.answer(3)
        assert not any("result" in line for line in table.client.lines), "nobody but the mediator answers a held call"
        assert len(table.session.held) == MAX_HELD < MAX_OUTSTANDING
        table.desk.stopped[Ask].set()
        await table.settle()
        assert len(table.session.held) == 0

    run(body)


def test_arguments_that_people_could_not_be_shown_whole_are_refused() -> None:
    async def body() -> None:
        table = Table()
        await table.say("publish", text="x" * MAX_PARAMS)
        assert table.refusal["reason"] == "review_required"
        assert "shorter" in table.refusal["next_steps"][0]
        assert table.desk.asked == []
        await table.say("publish", number=2, text="x")
        assert len(table.desk.of(Ask)) == 1

    run(body)


def test_without_a_policy_in_force_nobody_is_asked() -> None:
    async def body() -> None:
        table = Table()
        table.digest = ""
        await table.say(to="b")
        assert (table.refusal["reason"], table.desk.asked) == ("review_required", [])

    run(body)


# --- the desk ----------------------------------------------------------------------------------------------------------------


class Answers:
    """What stands behind the desk of the policy agent."""

    def __init__(self) -> None:
        self.asked: list[Question] = []
        self.end: Callable[[], ToolView] = view

    def review(self, question: Question) -> ToolView:
        self.asked.append(question)
        return self.end()


def exchange(path: Path, *questions: Question) -> list[ToolView | str]:
    async def one(question: Question) -> ToolView | str:
        try:
            return await desk_client(str(path))(question)
        except ReviewRefused as error:
            return error.code

    async def all_of_them() -> list[ToolView | str]:
        found: list[Awaitable[ToolView | str]] = [one(question) for question in questions]
        return list(await asyncio.gather(*found))

    return asyncio.run(all_of_them())


def test_the_desk_passes_four_questions_on_and_answers_or_refuses(tmp_path: Path) -> None:
    import os

    answers, path = Answers(), tmp_path / "review" / "tools.sock"
    desk = ReviewDesk(path, os.getuid(), answers, lambda _line: None)
    desk.start()
    try:
        assert path.stat().st_mode & 0o777 == 0o600
        questions = [
            Ask(policy_digest=DIGEST, server="files", params=b"{}"),
            Wait(id=REVIEW, wait_s=3),
            Claim(id=REVIEW, policy_digest=DIGEST, server="files", params=b"\xff", claim="A" * 43),
            End(id=REVIEW, claim="A" * 43, outcome="done", answer_sha256="e" * 64),
        ]
        for question in questions:
            assert exchange(path, question) == [view()]
        assert answers.asked == questions

        def refuse() -> ToolView:
            raise ReviewRefused("too_many_reviews", "no")

        answers.end = refuse
        assert exchange(path, questions[0]) == ["too_many_reviews"]
        strange = msgspec.structs.replace(questions[1], id="../../reviewers")
        assert exchange(path, strange) == ["malformed"]
        assert exchange(path, Ask(policy_digest="", server="files", params=b"{}")) == ["malformed"]
    finally:
        desk.close()
    assert exchange(path, Wait(id=REVIEW)) == ["review_unavailable"]


@pytest.mark.control("RUN-05")
def test_the_desk_answers_its_own_user_alone(tmp_path: Path) -> None:
    import os

    answers, path = Answers(), tmp_path / "tools.sock"
    desk = ReviewDesk(path, os.getuid(), answers, lambda _line: None)
    desk.start()
    try:
        desk._server.uid = 2000
        assert exchange(path, Wait(id=REVIEW)) == ["review_unavailable"]
        assert answers.asked == []
        desk._server.uid = os.getuid()
        assert exchange(path, Wait(id=REVIEW)) == [view()]
    finally:
        desk.close()


def test_a_desk_with_too_many_questions_says_so_and_a_fault_of_one_is_no_fault_of_all(tmp_path: Path) -> None:
    import os
    import threading

    answers, path, log = Answers(), tmp_path / "tools.sock", []
    gate = threading.Event()

    def hold() -> ToolView:
        gate.wait(60)
        return view()

    answers.end = hold
    desk = ReviewDesk(path, os.getuid(), answers, log.append)
    desk.start()
    try:

        async def crowd() -> list[ToolView | str]:
            async def one() -> ToolView | str:
                try:
                    return await desk_client(str(path))(Wait(id=REVIEW))
                except ReviewRefused as error:
                    gate.set()
                    return error.code

            return list(await asyncio.gather(*(one() for _ in range(MAX_ASKING + 1))))

        assert sorted(map(str, asyncio.run(crowd()))).count("review_unavailable") == 1

        def fault() -> ToolView:
            raise RuntimeError("a fault")

        answers.end = fault
        assert exchange(path, Wait(id=REVIEW)) == ["review_unavailable"]
        assert "a fault" in log[-1]
        answers.end = view
        assert exchange(path, Wait(id=REVIEW)) == [view()]
    finally:
        desk.close()
