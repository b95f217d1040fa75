"""curl, git, rclone (a Go program) and psql inside the sandbox; the last refusals for those that show no more than a status."""

from __future__ import annotations

import json
import subprocess
from functools import partial
from pathlib import Path

import clients_far_ends as far_ends
import pytest
from clients_rig import Workspace


@pytest.mark.control("RUN-01")
def test_curl_is_allowed_or_refused(workspace: Workspace) -> None:
    done = workspace.client("curl", "-sS", "https://api.example.com/v1/things")
    assert json.loads(done.out)["path"] == "/v1/things"
    refused = workspace.client("curl", "-sS", "https://api.example.com/v2/things")
    assert json.loads(refused.out)["reason"] == "method_or_path_not_allowed"
    hidden = workspace.client("curl", "-sS", "https://hidden.example.com/")
    assert (hidden.code, "response 403" in hidden.err) == (56, True), hidden.words


@pytest.mark.control("RUN-01")
def test_git_clones_what_the_policy_names_and_nothing_else(workspace: Workspace, tmp_path: Path) -> None:
    for name in ("team", "others"):
        (tmp_path / name).mkdir()
        subprocess.run(["git", "init", "-q", "--bare", str(tmp_path / name / "demo.git")], check=True)
    tree = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
    bare, who = (
        ("git", "-C", str(tmp_path / "team" / "demo.git")),
        ("-c", "user.name=a", "-c", "user.email=a@example.com"),
    )
    subprocess.run([*bare, "hash-object", "-w", "-t", "tree", "--stdin"], input=b"", check=True, capture_output=True)
    commit = subprocess.run(
        [*bare, *who, "commit-tree", "-m", "first", tree], check=True, capture_output=True, text=True
    )
    subprocess.run([*bare, "update-ref", "HEAD", commit.stdout.strip()], check=True)
    workspace.far.handlers["git.example.com"] = partial(far_ends.git, tmp_path)
    done = workspace.client("git", "clone", "-q", "https://git.example.com/team/demo.git", "/tmp/demo")
    assert done.code == 0, done.words
    told = workspace.client("git", "-C", "/tmp/demo", "log", "--format=%s").out
    assert told == "first\n"
    refused = workspace.client("git", "clone", "-q", "https://git.example.com/others/demo.git", "/tmp/others")
    assert (refused.code, "403" in refused.err) == (128, True), refused.words
    assert workspace.told() == ("method_or_path_not_allowed", "git.example.com")


@pytest.mark.control("RUN-01")
def test_a_go_program_finds_proxy_and_authorities_by_itself(workspace: Workspace) -> None:
    fetch = (
        "rclone",
        "--config",
        "/tmp/rclone.conf",
        "--retries",
        "1",
        "--low-level-retries",
        "1",
        "copyurl",
        "--stdout",
    )
    done = workspace.client(*fetch, "https://api.example.com/v1/things")
    assert (done.code, json.loads(done.out)["path"]) == (0, "/v1/things"), done.words
    for url, host in (
        ("https://api.example.com/v2/things", "api.example.com"),
        ("https://hidden.example.com/", "hidden.example.com"),
    ):
        refused = workspace.client(*fetch, url)
        assert (refused.code != 0, "Forbidden" in refused.err) == (True, True), refused.words
        assert workspace.told()[1] == host


@pytest.mark.control("RUN-01")
def test_the_last_refusals_can_be_read_in_the_sandbox_newest_first_and_without_queries(workspace: Workspace) -> None:
    for number in range(25):
        workspace.client("curl", "-sS", "-f", f"https://api.example.com/v2/{number}?secret=1")
    told = json.loads(workspace.client("curl", "-sS", "http://ring1.saw.internal/refusals").out)["refusals"]
    assert [one["path"] for one in told] == [f"/v2/{number}" for number in range(24, 4, -1)]
    assert told[0]["next_steps"]
    assert told[0]["binary"] == "/usr/bin/curl"
    assert "secret" not in json.dumps(told)
    status = ("curl", "-sS", "--path-as-is", "-o", "/dev/null", "-w", "%{http_code}")
    for words in (
        ("-X", "POST", "/refusals"),
        ("-X", "PUT", "/refusals"),
        ("/status",),
        ("/decide",),
        ("/refusals/../status",),
    ):
        other = workspace.client(*status, *words[:-1], f"http://ring1.saw.internal{words[-1]}")
        assert other.out in {"403", "503"}, words


@pytest.mark.control("RUN-01")
def test_the_policy_is_read_in_the_sandbox_by_its_own_environment_and_an_ask_allows_nothing(
    workspace: Workspace,
) -> None:
    for url in ("http://policy.local/", "https://policy.local/", "https://policy.local/v1/policy"):
        told = json.loads(workspace.client("curl", "-sS", url).out)
        assert told["policy_digest"] == workspace.digest
        assert "api.example.com" in {one["host"] for one in told["hosts"]}
    by_python = "import urllib.request as u; print(u.urlopen('https://policy.local/text').read().decode())"
    assert f"policy {workspace.digest[:16]}" in workspace.python(by_python).out
    wish = json.dumps({"host": "unlisted.example.com", "reason": "the task"})
    asked = json.loads(workspace.client("curl", "-sS", "http://policy.local/v1/requests", "-d", wish).out)
    assert asked["error"] == "ask_unavailable"  # no policy agent runs beside this sandbox
    assert workspace.client("curl", "-sSf", "https://unlisted.example.com/").code != 0
    last = json.loads(workspace.client("curl", "-sS", "http://ring1.saw.internal/refusals").out)["refusals"][0]
    assert any("http://policy.local/v1/requests" in step for step in last["next_steps"])
    for path in ("/decide", "/status", "/counts"):
        done = workspace.client("curl", "-sS", "-o", "/dev/null", "-w", "%{http_code}", f"http://policy.local{path}")
        assert done.out == "404", path


@pytest.mark.control("RUN-01")
def test_a_database_client_reaches_nothing_as_plain_tcp_has_no_way_out(workspace: Workspace) -> None:
    for host, words in (("db.example.com", "name resolution"), ("10.99.0.5", "Permission denied")):
        done = workspace.client("psql", f"postgresql://agent@{host}/demo", "-c", "select 1")
        assert (done.code, words in done.err) == (2, True), done.words
