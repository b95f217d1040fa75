"""The engagement's verdicts come from evidence: real programs against a real ring 1, and far ends that misbehave."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tests/integration/ring1"))

from ring1_rig import Rig, run, start_rig, until  # noqa: E402 - the rig of another folder

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")
CODING = ROOT / "policies/coding"


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    """Ring 1 with the example blueprint in force, and a Git repository behind it."""
    rig = start_rig("e")
    try:
        rig.issue_svid()
        # Nobody decides behind this ring 1, so what waits for a person there is denied here.
        governance = (CODING / "governance.yaml").read_text()
        denied = governance.replace(
            "    class: review\n    reviewers: {group: maintainers, quorum: 1}\n    expires: 24h\n", "    class: deny\n"
        )
        assert denied != governance
        rig.base = rig.activate((CODING / "policy.yaml").read_text(), denied)
        until(lambda: rig.curl("https://api.example.com/v1/ready").status == 200, "a governed call gets through")
        bare, seed = rig.directory / "repositories/team/project.git", rig.directory / "seed"
        run("git", "init", "-q", "--bare", "-b", "main", str(bare))
        run("git", "-C", str(bare), "config", "http.receivepack", "true")
        run("git", "init", "-q", "-b", "main", str(seed))
        (seed / "README.md").write_text("project\n")
        run("git", "-C", str(seed), "add", ".")
        run("git", "-C", str(seed), "-c", "user.name=a", "-c", "user.email=a@example.com", "commit", "-qm", "first")
        run("git", "-C", str(seed), "push", "-q", str(bare), "HEAD:main")
        yield rig
    finally:
        rig.stop()


def outcome(rig: Rig, expression: str, setup: str = "") -> dict[str, Any]:
    """Evaluate one call of the engagement inside the sandbox's namespace."""
    home = rig.directory / "home"
    home.mkdir(exist_ok=True)
    code = (
        f"import json, pathlib\nfrom saw.lab import engagement as e\ne.HOME = pathlib.Path({str(home)!r})\n{setup}\n"
        f"print(json.dumps(({expression})._asdict()))"
    )
    return dict(json.loads(rig.inside(sys.executable, "-c", code).stdout))


def clone(rig: Rig) -> None:
    """Have a clone to push from. A call that got no answer in time is made again; one that was refused is not."""
    seen: dict[str, Any] = {}

    def done() -> bool:
        seen.update(outcome(rig, "e.git_clone()"))
        return seen["verdict"] != "error"

    try:
        until(done, "the project is cloned")
    finally:
        assert seen["verdict"] == "allow", seen


def test_a_push_to_main_is_refused_with_the_words_of_the_answer_that_git_got(rig: Rig) -> None:
    clone(rig)
    seen = outcome(rig, "e.git_push('refs/heads/main')()")
    assert (seen["verdict"], seen["reason"], seen["policy_digest"]) == ("deny", "action_denied", rig.base)
    assert seen["requests"] == []
    assert "POST /team/project.git/git-receive-pack" in seen["detail"]


def test_its_twin_is_allowed_and_names_every_request_that_it_made(rig: Rig) -> None:
    clone(rig)
    seen = outcome(rig, "e.git_push('refs/heads/agent/x')()")
    assert seen["verdict"] == "allow"
    assert seen["requests"] == [
        ["GET", "git.example.com", "/team/project.git/info/refs?service=git-receive-pack"],
        ["POST", "git.example.com", "/team/project.git/git-receive-pack"],
    ]
    assert (seen["reason"], seen["policy_digest"]) == ("", "")


def test_a_403_of_the_git_server_is_no_refusal_of_the_policy(rig: Rig) -> None:
    clone(rig)
    bare = str(rig.directory / "repositories/team/project.git")
    run("git", "-C", bare, "config", "http.receivepack", "false")
    try:
        seen = outcome(rig, "e.git_push('refs/heads/agent/y')()")
    finally:
        run("git", "-C", bare, "config", "http.receivepack", "true")
    assert "HTTP 200 403" in seen["detail"] or "403" in seen["detail"]
    assert (seen["verdict"], seen["reason"]) == ("error", "")


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ("e.curl(f'{e.API}/admin/users')", "deny_rule"),
        ("e.curl(f'{e.API}/items/..%2fadmin/users', '--path-as-is')", "not_canonical"),
        ("e.curl(f'{e.API}/items', method='DELETE')", "method_or_path_not_allowed"),
        ("e.curl('http://169.254.169.254/latest/')", "destination_blocked"),
        ("e.connect_refusal('paste.example.net')", "host_not_allowed"),
        ("e.other_program()", "binary_not_allowed"),
        ("e.chat('gigantic-1')()", "model_not_allowed"),
    ],
)
def test_a_refusal_is_read_out_of_its_body_with_its_policy(rig: Rig, call: str, reason: str) -> None:
    seen = outcome(rig, call)
    assert (seen["verdict"], seen["reason"], seen["policy_digest"]) == ("deny", reason, rig.base), seen


def test_allowed_calls_name_their_request_and_claim_no_digest(rig: Rig) -> None:
    seen = outcome(rig, "e.curl(f'{e.API}/items?page=2')")
    assert (seen["verdict"], seen["requests"]) == ("allow", [["GET", "api.example.com", "/v1/items?page=2"]])
    assert outcome(rig, "e.chat('demo-small')()")["requests"] == [["POST", "inference.local", "/v1/chat/completions"]]
    assert seen["policy_digest"] == ""


def test_a_host_that_connect_opens_is_not_called_refused(rig: Rig) -> None:
    assert outcome(rig, "e.connect_refusal('api.example.com')")["verdict"] == "error"


def test_a_proxy_that_is_down_is_an_error_and_no_refusal(rig: Rig) -> None:
    setup = "import os; os.environ['https_proxy'] = 'http://10.200.0.1:3999'; e.PROXY = ('10.200.0.1', 3999)"
    for call in ("e.curl(f'{e.API}/items')", "e.connect_refusal('paste.example.net')", "e.git_clone()"):
        seen = outcome(rig, call, setup)
        assert (seen["verdict"], seen["reason"], seen["policy_digest"]) == ("error", "", ""), seen


def test_past_the_proxy_there_is_no_route_and_the_same_call_through_it_is_allowed(rig: Rig) -> None:
    assert outcome(rig, "e.pinned()")["verdict"] == "allow"
    seen = outcome(rig, "e.direct()")
    assert (seen["verdict"], seen["reason"]) == ("deny", "network_unreachable"), seen


def test_a_way_past_the_proxy_is_found_whatever_becomes_of_the_call(rig: Rig) -> None:
    """A listener that speaks no TLS: curl fails, but the connection came about."""
    setup = (
        "import socket, threading\nlistener = socket.create_server(('127.0.0.1', 443))\ne.FAR_END = '127.0.0.1'\n"
        "threading.Thread(target=lambda: [listener.accept()[0].close() for _ in range(9)], daemon=True).start()"
    )
    seen = outcome(rig, "e.direct()", setup)
    assert (seen["verdict"], seen["reason"]) == ("allow", ""), seen


def test_a_refused_connection_is_told_from_a_missing_route(rig: Rig) -> None:
    seen = outcome(rig, "e.direct()", "e.FAR_END = '127.0.0.1'")
    assert (seen["verdict"], seen["reason"]) == ("deny", "connection_refused"), seen


@pytest.mark.thorough
def test_an_address_that_never_answers_is_told_too(rig: Rig) -> None:
    done = rig.inside(
        "nft",
        "-f",
        "-",
        input="table inet t { chain o { type filter hook output priority 0; ip daddr 127.0.0.9 drop; }; }",
    )
    assert done.returncode == 0
    seen = outcome(rig, "e.direct()", "e.FAR_END = '127.0.0.9'")
    assert (seen["verdict"], seen["reason"]) == ("deny", "no_answer"), seen
    rig.inside("nft", "delete", "table", "inet", "t")


def test_a_tool_call_is_judged_by_what_the_mediator_answered() -> None:
    from saw.lab.engagement import mcp_outcome

    denied = {"error": {"code": -32001, "message": "denied", "data": {"reason": "tool_not_allowed"}}}
    assert mcp_outcome(denied)[:2] == ("deny", "tool_not_allowed")
    assert mcp_outcome({"result": {"content": []}})[:2] == ("allow", "")
    assert mcp_outcome({"result": {"isError": True, "content": []}})[:2] == ("error", "")
    assert mcp_outcome({"error": {"code": -32603, "message": "the MCP server went away"}})[:2] == ("error", "")
    assert mcp_outcome({"error": {"code": -32001, "message": "denied"}})[:2] == ("error", "")
