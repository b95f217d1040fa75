"""A perimeter asks for approved calls: with the same secret until it has an answer, with another one for each call."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import msgspec
import pytest

from saw.gateway import review_send
from saw.gateway.errors import ReviewUnavailable
from saw.gateway.review_link import ReviewLink
from saw.gateway.review_send import Sender
from saw.review.messages import Claimed, ClaimReview, ReviewedAnswer, ReviewedCall

CALL = ReviewedCall(method="POST", scheme="https", host="api.example.com", port=443, path="/", headers=(), body=b"x")


def claimed(number: int, secret: str) -> Claimed:
    return Claimed(
        id=f"rv-{number:032x}", claim=secret, claim_ends_at="2099-01-01T00:00:00.000Z", workspace_id="ws", call=CALL,
        policy_digest="a" * 64, request_digest="b" * 64,
    )  # fmt: skip


class Link:
    """Says to each question what is next; the last word ends the run."""

    def __init__(self, *words: str) -> None:
        self.words = list(words)
        self.secrets: list[str] = []
        self.over = asyncio.Event()

    async def claim(self, wait: int, secret: str) -> Claimed | None:
        assert wait == 10
        self.secrets.append(secret)
        if not self.words:
            self.over.set()
            await asyncio.Event().wait()
        word = self.words.pop(0)
        if word == "lost":
            raise ReviewUnavailable("the broker does not answer")
        return claimed(len(self.words), secret) if word == "call" else None


@pytest.mark.control("REV-03")
def test_a_secret_is_kept_until_there_is_a_call_and_then_another_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review_send, "RETRY_FIRST_S", 0.0)
    monkeypatch.setattr(review_send, "RETRY_MOST_S", 0.0)
    sent: list[str] = []

    async def scenario() -> list[str]:
        link = Link("nothing", "lost", "lost", "call", "call", "lost", "call")
        nothing: Any = SimpleNamespace()
        sender = Sender(
            nothing, link, nothing, nothing, nothing, socket=Path("none"), doubt=lambda: "", now=lambda: datetime.now(UTC),
            wait_s=10,
        )  # type: ignore[arg-type]  # fmt: skip

        async def execute(one: Claimed) -> None:
            sent.append(one.claim)

        monkeypatch.setattr(sender, "execute", execute)
        task = asyncio.create_task(sender.run_forever())
        await asyncio.wait_for(link.over.wait(), 60)
        task.cancel()
        return link.secrets

    one, *rest = asyncio.run(scenario())
    assert rest[:3] == [one] * 3
    second, third, again, last = rest[3:]
    assert third == again
    assert len({one, second, third, last}) == 4
    assert sent == [one, second, third]


def test_an_answer_whose_list_waits_to_be_kept_holds_up_nothing_that_other_calls_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go, begun = threading.Event(), threading.Event()

    def stored(answer: ReviewedAnswer, *_: object) -> ReviewedAnswer:
        begun.set()
        assert go.wait(300)
        return answer

    monkeypatch.setattr(review_send, "stored_answer", stored)
    nothing: Any = SimpleNamespace()
    sender = Sender(
        nothing, nothing, nothing, nothing, nothing, socket=Path("none"), doubt=lambda: "", now=lambda: datetime.now(UTC),
        wait_s=10,
    )  # fmt: skip
    answer = ReviewedAnswer(status=200, headers=(), body=b"", truncated=False)

    async def scenario() -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        try:
            async with asyncio.timeout(60):
                kept = asyncio.create_task(sender._looked_at(claimed(1, "s"), nothing, answer))
                while not begun.is_set():  # noqa: ASYNC110 - another thread's work
                    await asyncio.sleep(0.01)
                assert await asyncio.to_thread(lambda: "decided") == "decided"
                go.set()
                assert await kept == answer
        finally:
            go.set()

    asyncio.run(scenario())


def test_the_secret_is_told_in_the_body_and_is_one_as_the_contract_wants_it() -> None:
    asked: list[ClaimReview] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(msgspec.json.decode(request.content, type=ClaimReview))
        return httpx.Response(200, json={})

    async def scenario() -> None:
        link = ReviewLink(SimpleNamespace(broker_name="b"))  # type: ignore[arg-type]
        client = httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="https://b")
        link._client = lambda: client  # type: ignore[method-assign]
        assert await link.claim(3, review_send._new_secret()) is None
        await client.aclose()

    asyncio.run(scenario())
    [told] = asked
    assert told.wait == 3
    assert len(str(told.claim)) == 43
