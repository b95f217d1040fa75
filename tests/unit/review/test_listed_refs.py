"""What a far end's list of refs says about a push that may have arrived; the lists are made by Git itself."""

from __future__ import annotations

import gzip
import subprocess
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saw.review.messages import ReviewedAnswer, ReviewedCall
from saw.review.read_back import Unreadable, advertised, compare, question_of

pytestmark = pytest.mark.control("REV-03")
ZERO, KIND = "0" * 40, (("content-type", "application/x-git-receive-pack-advertisement"),)
HEAD = b"001f# service=git-receive-pack\n0000"


def line(text: bytes) -> bytes:
    return f"{len(text) + 4:04x}".encode() + text


def push(
    *commands: tuple[str, str, str], encoded: bool = False, path: str = "/team/app.git/git-receive-pack"
) -> ReviewedCall:
    body = b""
    for index, command in enumerate(commands):
        body += line(" ".join(command).encode() + (b"\0 report-status side-band-64k" if not index else b"\n"))
    body += b"0000PACK"
    headers = (("content-encoding", "gzip"),) if encoded else ()
    return ReviewedCall(
        method="POST", scheme="https", host="git.example.com", port=443, path=path, headers=headers,
        body=gzip.compress(body) if encoded else body,
    )  # fmt: skip


def answer(body: bytes, **changes: object) -> ReviewedAnswer:
    return msgspec.convert({"status": 200, "headers": KIND, "body": body, **changes}, ReviewedAnswer)


class Server:
    """A repository as the far end has it; ``refs`` is how it lists them before a push."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "--bare", ".")
        self.tree = self.git("hash-object", "-w", "-t", "tree", "/dev/null")

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.folder), "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    def commit(self, message: str) -> str:
        return self.git("commit-tree", self.tree, "-m", message)

    @property
    def refs(self) -> ReviewedAnswer:
        command = ["git", "receive-pack", "--stateless-rpc", "--advertise-refs", str(self.folder)]
        return answer(HEAD + subprocess.run(command, capture_output=True, check=True).stdout)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return Server(tmp_path_factory.mktemp("far"))


def test_a_push_is_there_is_not_there_or_somebody_else_was(server: Server) -> None:
    one, two, three = (server.commit(message) for message in ("one", "two", "three"))
    create, update = push((ZERO, one, "refs/heads/main")), push((one, two, "refs/heads/main"))
    assert compare(create, server.refs) == ("not_arrived", "the far end has refs/heads/main as before the push")
    server.git("update-ref", "refs/heads/main", one)
    server.git("update-ref", "refs/tags/v1", one)
    assert compare(create, server.refs)[0] == "arrived"
    assert compare(update, server.refs)[0] == "not_arrived"
    server.git("update-ref", "refs/heads/main", two)
    assert compare(update, server.refs) == ("arrived", "the far end has refs/heads/main as the push makes it")
    assert compare(push((one, two, "refs/heads/main"), encoded=True), server.refs)[0] == "arrived"
    server.git("update-ref", "refs/heads/main", three)
    outcome, why = compare(update, server.refs)
    assert outcome == "undecided"
    assert "refs/heads/main" in why


def test_of_several_refs_all_must_be_as_the_push_makes_them_and_a_deleted_one_must_be_gone(server: Server) -> None:
    one, two = server.commit("one"), server.commit("two")
    for name in ("kept", "gone"):
        server.git("update-ref", f"refs/heads/{name}", one)
    both = push((one, two, "refs/heads/kept"), (one, ZERO, "refs/heads/gone"))
    assert compare(both, server.refs)[0] == "not_arrived"
    server.git("update-ref", "refs/heads/kept", two)
    assert compare(both, server.refs)[0] == "undecided"
    server.git("update-ref", "-d", "refs/heads/gone")
    assert compare(both, server.refs)[0] == "arrived"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": 401}, "answered 401"),
        ({"status": 302}, "answered 302"),
        ({"headers": (("content-type", "text/html"),)}, "text/html"),
        ({"truncated": True}, "longer than"),
        ({"body": b""}, "no list of refs"),
        ({"body": b"<html>"}, "not in pkt-lines"),
        ({"body": HEAD.replace(b"001f", b"001e").replace(b"receive", b"upload") + b"0005x0000"}, "no list of refs"),
        ({"body": HEAD}, "no list of refs"),
        ({"body": HEAD + line(b"1" * 40 + b" refs/heads/main")}, "no list of refs"),
        ({"body": HEAD + line(b"1" * 39 + b" refs/heads/main") + b"0000"}, "cannot be read"),
        ({"body": HEAD + b"00ff" + b"1" * 40}, "cut"),
        ({"body": HEAD + b"0000"}, "no list of refs"),
    ],
)
def test_what_is_no_whole_list_of_refs_decides_nothing(changes: dict[str, object], said: str) -> None:
    good = HEAD + line(b"2" * 40 + b" refs/heads/main\0caps\n") + b"0000"
    call = push(("1" * 40, "2" * 40, "refs/heads/main"))
    assert compare(call, answer(good))[0] == "arrived"
    outcome, why = compare(call, answer(**{"body": good, **changes}))
    assert (outcome, said in why) == ("undecided", True), why


def test_a_push_that_cannot_be_read_or_changes_nothing_is_undecided() -> None:
    good = answer(HEAD + line(b"2" * 40 + b" refs/heads/main\0caps\n") + b"0000")
    for body in (b"0000", b"junk", b""):
        assert compare(msgspec.structs.replace(push(), body=body), good)[0] == "undecided"


def test_only_a_push_is_asked_about_and_the_question_is_a_read_of_the_same_repository() -> None:
    asked = question_of(push(("1" * 40, "2" * 40, "refs/heads/main")))
    assert asked is not None
    assert (asked.method, asked.host, asked.path) == (
        "GET",
        "git.example.com",
        "/team/app.git/info/refs?service=git-receive-pack",
    )
    assert (asked.headers, asked.body) == ((), b"")
    for path in (
        "/v1/notes",
        "/team/app.git/git-upload-pack",
        "/team/app.git/git-receive-pack?x=1",
        "/git-receive-packs",
    ):
        assert question_of(push(path=path)) is None
    assert question_of(msgspec.structs.replace(push(), method="PUT")) is None


@given(st.binary(max_size=300), st.integers(0, 300))
def test_nothing_that_a_far_end_answers_raises_anything_else(data: bytes, cut: int) -> None:
    good = HEAD + line(b"2" * 40 + b" refs/heads/main\0caps\n") + b"0000"
    for body in (data, HEAD + data, good[:cut] + data):
        try:
            advertised(answer(body))
        except Unreadable:
            continue
