"""The state that a push would change is read through the real ring 2 from the real git, judged like every call."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ring2_rig import SECRET, Rig, wait_for

from saw.review import git_fetch
from saw.review.git_push import PushShown, show_push
from saw.review.messages import ContextResult, PushContext, ReadContext, ReviewedAnswer

pytestmark = [pytest.mark.control("REV-01"), pytest.mark.control("REV-02")]
REVIEW = f"rv-{7:032x}"
PATH = "/team/app.git"


class Server:
    """A repository that git serves; ``work`` is where the agent made two commits, of which the far end has one."""

    def __init__(self, folder: Path) -> None:
        self.work = folder / "work"
        self.bare = folder / "bare.git"
        self.work.mkdir()
        self.git("init", "-q", "-b", "main")
        self.old = self.commit("one\ntwo\n")
        subprocess.run(["git", "clone", "-q", "--bare", str(self.work), str(self.bare)], check=True)
        self.new = self.commit("one\nTWO\n")
        pack = self.git("pack-objects", "--stdout", "--revs", "--thin", "-q", given=f"{self.new}\n^{self.old}".encode())
        command = f"{self.old} {self.new} refs/heads/main\0 report-status".encode()
        self.push = f"{len(command) + 4:04x}".encode() + command + b"0000" + pack
        self.arrived: list[dict[str, Any]] = []

    def git(self, *arguments: str, given: bytes = b"") -> bytes:
        command = ["git", "-C", str(self.work), "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
        return subprocess.run(command, input=given, capture_output=True, check=True).stdout

    def commit(self, text: str) -> str:
        (self.work / "a.txt").write_text(text)
        (self.work / "stays.txt").write_text("stays\n")
        self.git("add", "-A")
        self.git("commit", "-q", "-m", "change")
        return self.git("rev-parse", "HEAD").decode().strip()

    def allow_filter(self, *, on: bool) -> None:
        subprocess.run(["git", "-C", str(self.bare), "config", "uploadpack.allowFilter", str(on).lower()], check=True)

    def served(self, options: list[str], body: bytes, version: str) -> bytes:
        """Return what git answers."""
        command = ["git", "upload-pack", "--stateless-rpc", *options, str(self.bare)]
        environment = {**os.environ, "GIT_PROTOCOL": version}
        return subprocess.run(command, input=body, capture_output=True, check=False, env=environment).stdout

    async def respond(self, scope: Any, send: Any) -> None:
        """Answer as git over HTTP does; the request was recorded before."""
        seen = self.arrived[-1]
        version = dict(seen["headers"]).get("git-protocol", "")
        kind = "advertisement" if scope["method"] == "GET" else "result"
        options = ["--advertise-refs"] if scope["method"] == "GET" else []
        said = self.served(options, seen["body"], version)
        headers = [(b"content-type", f"application/x-git-upload-pack-{kind}".encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("server"))


@pytest.fixture
def server(rig: Rig, made: Server) -> Iterator[Server]:
    rig.far.respond = made.respond
    made.arrived = rig.far.arrived
    made.allow_filter(on=True)
    yield made
    rig.far.respond = None


def read(rig: Rig, wants: tuple[str, ...], step: int = 1, **changes: Any) -> ContextResult:
    """Have the perimeter read, and return what it told; a far end that was too slow is asked again, as the broker does."""
    for _ in range(4):
        result = once(rig, wants, step, **changes)
        if result.outcome != "unreached":
            break
        rig.far.arrived.clear()
    return result


def once(rig: Rig, wants: tuple[str, ...], step: int = 1, **changes: Any) -> ContextResult:
    """Have the perimeter read once."""
    fields = {
        "id": REVIEW, "workspace_id": "ws-1", "policy_digest": rig.digest, "scheme": "https", "host": "git.example.com",
        "port": 443, "repository": PATH, "wants": wants, "step": step, "binary": "/usr/bin/git",
    }  # fmt: skip
    before = len(rig.broker.reviews.contexts)
    rig.broker.reviews.ask_context(ReadContext(**{**fields, **changes}))
    wait_for(lambda: len(rig.broker.reviews.contexts) > before, "the perimeter tells what it read")
    review, result = rig.broker.reviews.contexts[-1]
    assert (review, result.step) == (REVIEW, step)
    return result


def shown(server: Server, *packs: bytes) -> PushShown:
    return show_push(server.push, "", PushContext(state="read", packs=packs))


def test_commits_come_first_without_contents_and_then_those_that_are_compared(rig: Rig, server: Server) -> None:
    wants = shown(server).commits
    assert wants == (server.old,)
    first = read(rig, wants)
    assert (first.outcome, first.detail) == ("read", "")
    rest = shown(server, first.pack).others
    assert len(rest) == 1, "the content that stays is not asked for"
    second = read(rig, rest, step=2)
    found = shown(server, first.pack, second.pack)
    assert "\n".join(["  one", "- two", "+ TWO"]) in "\n".join(found.lines)
    assert (found.commits, found.others) == ((), ())
    calls = [(one["method"], one["target"]) for one in rig.far.arrived]
    assert calls[-2:] == [("GET", f"{PATH}/info/refs?service=git-upload-pack"), ("POST", f"{PATH}/git-upload-pack")]
    for one in rig.far.arrived:
        headers = dict(one["headers"])
        assert headers["authorization"].startswith("Basic ")
        assert not [name for name in headers if name.startswith(("x-saw-", "x-envoy-"))]
    assert SECRET["git-token"] not in str((first, second))


def test_a_server_that_leaves_nothing_out_tells_everything_at_once(rig: Rig, server: Server) -> None:
    server.allow_filter(on=False)
    found = shown(server, read(rig, (server.old,)).pack)
    assert "- two" in found.lines
    assert (found.commits, found.others) == ((), ())


def test_policy_decides_and_what_it_lets_people_decide_on_is_not_asked(rig: Rig, server: Server) -> None:
    refused = read(rig, (server.old,), repository="/secret/app.git")
    assert (refused.outcome, refused.detail.partition(":")[0]) == ("unreadable", "method_or_path_not_allowed")
    assert rig.far.arrived == []
    asked = read(rig, (server.old,), repository="/team/asked.git")
    assert (asked.outcome, asked.detail.partition(":")[0]) == ("unreadable", "review_required")
    assert [one["method"] for one in rig.far.arrived] == ["GET"]
    assert rig.broker.reviews.all == {}, "no review is opened about a question"
    assert read(rig, (server.old,)).outcome == "read"


def test_what_the_far_end_does_not_have_or_does_not_tell_is_said(rig: Rig, server: Server) -> None:
    missing = read(rig, ("7" * 40,))
    assert missing.outcome == "unreadable"
    assert "the far end says:" in missing.detail

    async def refuses(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"who are you"})

    async def busy(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"later"})

    rig.far.respond = refuses
    result = read(rig, (server.old,))
    assert (result.outcome, result.detail) == (
        "unreadable",
        "the far end answered 401",
    )
    rig.far.respond = busy
    assert once(rig, (server.old,)).outcome == "unreached"
    rig.far.respond = server.respond
    assert read(rig, (server.old,)).outcome == "read"


def answer(body: bytes, media: str = git_fetch.RESULT, **more: Any) -> ReviewedAnswer:
    return ReviewedAnswer(**{"status": 200, "headers": (("content-type", media),), "body": body, **more})


def test_only_an_answer_that_is_one_is_read() -> None:
    good = b"000dpackfile\n" + b"0009\x01PACK" + b"0009\x02info" + b"0009\x01more" + b"0000"
    assert git_fetch.pack_of(answer(good)) == b"PACKmore"
    wrong = [
        answer(good[:20]),
        answer(b"nonsense"),
        answer(b"0000"),
        answer(good, "text/html"),
        answer(good, truncated=True),
    ]
    wrong += [answer(b"0010ERR no, not" + b"x0000"), answer(b"000dpackfile\n000a\x03fatal0000")]
    for one in wrong:
        with pytest.raises(git_fetch.NotOffered):
            git_fetch.pack_of(one)
    offers = b"001e# service=git-upload-pack\n0000000eversion 2\n0019fetch=shallow filter\n0000"
    assert git_fetch.offers_of(answer(offers, git_fetch.ADVERTISED)) == git_fetch.Offers(True, True, "sha1")
    for other in (offers.replace(b"version 2", b"version 1"), offers.replace(b"fetch=", b"felch="), b"0000"):
        with pytest.raises(git_fetch.NotOffered):
            git_fetch.offers_of(answer(other, git_fetch.ADVERTISED))
