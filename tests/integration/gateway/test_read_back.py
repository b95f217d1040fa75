"""An approved push without an answer is read back through the real ring 2: judged, with the credential, and never sent again."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from ring2_rig import SECRET, Rig, wait_for

from saw.review.messages import ReadBackResult

pytestmark = pytest.mark.control("REV-03")
PATH = "/team/app.git"


async def dies(_scope: Any, send: Any) -> None:
    """Break off in the middle of an answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
    await send({"type": "http.response.body", "body": b"begun", "more_body": True})
    raise ConnectionResetError


class Repository:
    """What the far end has; it lists its refs as Git does, and takes a push without ever answering it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.git("init", "-q", "--bare", ".")
        tree = self.git("hash-object", "-w", "-t", "tree", "/dev/null")
        self.old, self.new = (self.git("commit-tree", tree, "-m", message) for message in ("old", "new"))
        self.takes = True

    def git(self, *arguments: str) -> str:
        command = ["git", "-C", str(self.folder), "-c", "user.name=a", "-c", "user.email=a@example.com", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    @property
    def push(self) -> bytes:
        """The request of a push that moves main from ``old`` to ``new``."""
        command = f"{self.old} {self.new} refs/heads/main\0 report-status".encode()
        return f"{len(command) + 4:04x}".encode() + command + b"0000PACK"

    def refs(self) -> bytes:
        """Return how Git lists the refs before a push."""
        command = ["git", "receive-pack", "--stateless-rpc", "--advertise-refs", str(self.folder)]
        said = subprocess.run(command, capture_output=True, check=True).stdout
        return b"001f# service=git-receive-pack\n0000" + said

    async def respond(self, scope: Any, send: Any) -> None:
        """Answer as the server."""
        if scope["method"] == "POST":
            if self.takes:
                self.git("update-ref", "refs/heads/main", self.new)
            await dies(scope, send)
        headers = [(b"content-type", b"application/x-git-receive-pack-advertisement")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.refs()})


@pytest.fixture
def repository(rig: Rig, tmp_path: Path) -> Repository:
    made = Repository(tmp_path)
    made.git("update-ref", "refs/heads/main", made.old)
    rig.far.respond = made.respond
    return made


def unknown(rig: Rig, repository: Repository) -> str:
    """Make a push, approve it, and return its review, which has ended without an answer."""
    answer = rig.call(
        "POST", f"{PATH}/git-receive-pack", host="git.example.com", binary="/usr/bin/git", body=repository.push
    )
    review = str(answer.headers["x-saw-review-id"])
    rig.broker.reviews.move(review, "approved")
    wait_for(lambda: bool(rig.broker.reviews.all[review].results), "the push has ended")
    assert [one.outcome for one in rig.broker.reviews.all[review].results] == ["unknown"]
    return review


def read_back(rig: Rig, review: str) -> ReadBackResult:
    """Have the perimeter look, and return what it told."""
    before = len(rig.broker.reviews.read_back)
    rig.broker.reviews.ask(review)
    wait_for(lambda: len(rig.broker.reviews.read_back) > before, "the perimeter tells what it read")
    found, result = rig.broker.reviews.read_back[-1]
    assert found == review
    return result


@pytest.mark.parametrize(("takes", "outcome"), [(True, "arrived"), (False, "not_arrived")])
def test_whether_the_push_arrived_is_read_from_the_far_end_and_it_is_sent_once(
    rig: Rig, repository: Repository, *, takes: bool, outcome: str
) -> None:
    repository.takes = takes
    review = unknown(rig, repository)
    result = read_back(rig, review)
    assert (result.outcome, "refs/heads/main" in result.detail) == (outcome, True)
    assert [one["method"] for one in rig.far.arrived] == ["POST", "GET"]
    asked = rig.far.arrived[1]
    headers = dict(asked["headers"])
    assert asked["target"] == f"{PATH}/info/refs?service=git-receive-pack"
    assert headers["authorization"].startswith("Basic ")
    assert SECRET["git-token"] not in str(result)
    assert "idempotency-key" not in headers
    assert not [name for name in headers if name.startswith(("x-saw-", "x-envoy-"))]
    assert rig.broker.reviews.all[review].claims == 1


def test_policy_decides_on_the_question_as_on_any_call(rig: Rig, repository: Repository) -> None:
    review = unknown(rig, repository)
    rig.settle(state="quarantined")
    wait_for(lambda: not rig.listens("10.210.1.1", 8443), "the listener is gone")
    result = read_back(rig, review)
    assert (result.outcome, result.detail.partition(":")[0]) == ("undecided", "workspace_not_active")
    assert [one["method"] for one in rig.far.arrived] == ["POST"]
    rig.settle(state="active")
    wait_for(lambda: rig.listens("10.210.1.1", 8443), "the listener is back")
    assert read_back(rig, review).outcome == "arrived"


def test_a_far_end_that_does_not_answer_is_unreached_and_an_answer_that_is_no_list_undecided(
    rig: Rig, repository: Repository
) -> None:
    review = unknown(rig, repository)

    async def refuses(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 401, "headers": []})
        await send({"type": "http.response.body", "body": b"who are you"})

    async def busy(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": []})
        await send({"type": "http.response.body", "body": b"later"})

    for away in (dies, busy):
        rig.far.respond = away
        assert read_back(rig, review).outcome == "unreached"
    rig.name_hosts(git_example_com="10.99.0.77")
    assert read_back(rig, review).outcome == "unreached", "nobody is there"
    rig.name_hosts()
    rig.far.respond = refuses
    result = read_back(rig, review)
    assert (result.outcome, result.detail) == ("undecided", "the far end answered 401")
    rig.far.respond = repository.respond
    assert read_back(rig, review).outcome == "arrived"
