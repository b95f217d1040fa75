"""People open sessions with their own workspaces after a sign-in, and lose them with it: a real provider, broker and bastion."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from session_rig import RULES, Bastion, Terminal, running
from sign_in_rig import SAW, certify, connect, sign_in
from sso_rig import SsoLab, logout_token, sso_lab

pytestmark = pytest.mark.control("ID-03")


@pytest.fixture(scope="module")
def there() -> Iterator[tuple[SsoLab, Bastion]]:
    """A broker with a sign-in and a bastion; ``ws-a`` is ada's."""
    directory = Path(tempfile.mkdtemp(prefix="saw-people-"))
    with sso_lab(directory, sessions=RULES) as lab, running(lab, directory) as bastion:
        yield lab, bastion


def run(line: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.thorough
@pytest.mark.control("ID-01")
def test_who_is_signed_in_reaches_their_own_workspace_and_nobody_elses(
    there: tuple[SsoLab, Bastion], tmp_path: Path
) -> None:
    lab, bastion = there
    ada, ben = sign_in(lab, tmp_path / "ada", "u-ada"), sign_in(lab, tmp_path / "ben", "u-ben")
    good = run(connect(bastion, ada, "echo in-the-workspace"))
    assert (good.returncode, good.stdout) == (0, "in-the-workspace\n"), good.stderr
    [session] = lab.operator.request("GET", "/v1/sessions")["sessions"]
    assert (session["who"], session["workspace"]) == ("user:ada@example.com", "ws-a")
    refused = run(connect(bastion, ben, "echo in-the-workspace"))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "ws-a is not the workspace of ben@example.com" in refused.stderr
    assert lab.audited(class_uid=3002, status_detail="not_your_workspace")


@pytest.mark.thorough
@pytest.mark.parametrize("loss", ["signed-out", "at-the-provider", "role"])
def test_a_live_session_goes_with_its_sign_in(there: tuple[SsoLab, Bastion], tmp_path: Path, loss: str) -> None:
    lab, bastion = there
    ada = sign_in(lab, tmp_path / "ada", "u-ada")
    other = sign_in(lab, tmp_path / "other", "u-ada") if loss == "signed-out" else None
    clients = [Terminal(connect(bastion, each)) for each in (ada, other) if each is not None]
    for client in clients:
        client.type("stty -echo; echo live-$((40+2))\n")
        client.until("live-42")
    mine = {row["id"] for row in lab.operator.request("GET", "/v1/sessions")["sessions"] if row["state"] == "open"}
    assert len(mine) == len(clients)
    try:
        if loss == "signed-out":
            subprocess.run([*SAW, "logout"], env=ada, check=True, capture_output=True, timeout=60)
        elif loss == "at-the-provider":
            with lab.browser() as browser:
                assert browser.http.post(
                    "/logout/backchannel", data={"logout_token": logout_token(lab, "u-ada")}
                ).is_success
        else:
            lab.provider.change("u-ada", groups=["auditors"])
            long_ago = (datetime.now(UTC) - timedelta(minutes=10)).isoformat()
            bastion.sql("UPDATE sso_sessions SET checked_at = ?", long_ago)
            subprocess.run([*SAW, "whoami"], env=ada, check=True, capture_output=True, timeout=60)
        assert clients[0].ends() == 255
        assert re.search(rb"the session has ended: (sign_in_ended|not_entitled)", clients[0].seen)
        gone = [row for row in lab.operator.request("GET", "/v1/sessions")["sessions"] if row["id"] in mine]
        expected = "not_entitled" if loss == "role" else "sign_in_ended"
        assert expected in {row["reason"] for row in gone}
        refused = run(connect(bastion, ada, "echo in-the-workspace"))
        assert refused.returncode == 1
        assert "in-the-workspace" not in refused.stdout
        for client in clients[1:]:
            client.type("echo still-$((40+3)); exit\n")
            client.until("still-43")
            assert client.ends() == 0
    finally:
        lab.provider.change("u-ada", groups=["staff", "approvers", "maintainers"])
        for client in clients:
            if client.process.poll() is None:
                client.process.kill()
                client.process.wait()


def test_a_sign_in_that_ends_between_asking_and_logging_in_opens_nothing(
    there: tuple[SsoLab, Bastion], tmp_path: Path
) -> None:
    lab, bastion = there
    ada = sign_in(lab, tmp_path / "ada", "u-ada")
    before = {row["id"] for row in lab.operator.request("GET", "/v1/sessions")["sessions"]}
    folder = certify(bastion, ada, tmp_path / "kept")
    [session] = {row["id"] for row in lab.operator.request("GET", "/v1/sessions")["sessions"]} - before
    subprocess.run([*SAW, "logout"], env=ada, check=True, capture_output=True, timeout=60)
    refused = bastion.ssh(folder, "echo in-the-workspace")
    assert (refused.returncode, refused.stdout) == (77, "")
    assert bastion.show(session)["reason"] == "sign_in_ended"
