"""The first day of a person who has a browser and an SSH client, and of those who approve and audit: docs/first-day.md.

Real Chromium, OpenSSH's client, the identity provider of the demonstration, the bastion, the VM. The tests build on one another.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from chromium import ROWS, SAID, Chromium
from person import Person, shown, take, told, type_line
from vm_access import Workspace, wait_until

from saw.lab import people
from saw.lab.attach import Terminal
from saw.lab.topology import Lab


@dataclass
class Day:
    """Who takes part, and what the day has brought so far."""

    sponsor: Person
    approver: Person
    auditor: Person
    mark: str = field(default_factory=lambda: secrets.token_hex(6))
    session: str = ""
    review: str = ""


@pytest.fixture(scope="module")
def day(checkout: Path, report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Day:
    lab, desks = Lab(checkout, checkout / "build"), tmp_path_factory.mktemp("desks")
    names = {"sponsor": "demo.user@example.com", "approver": "approver@example.com", "auditor": "auditor@example.com"}
    return Day(**{part: Person(lab, name, desks / part) for part, name in names.items()})


@pytest.fixture(scope="module")
def page(day: Day) -> Iterator[Chromium]:
    """The sponsor's browser."""
    with day.sponsor.browser() as found:
        yield found


@pytest.mark.control("ID-01")
def test_a_person_signs_in_with_the_password_of_the_enterprise_and_sees_the_workspace(
    day: Day, page: Chromium, workspace: Workspace
) -> None:
    page.go(f"{people.ORIGIN}/")
    page.until("location.pathname === '/sign-in'")
    page.run("document.querySelector('main a.button').click()")
    page.until(f"location.host === '{people.IDENTITY}' && document.readyState === 'complete'")
    take(page, "1-sign-in", 560)
    day.sponsor.fill_in(page, "any")
    page.until("document.querySelector('[role=alert]')")
    assert page.run("location.host") == people.IDENTITY
    day.sponsor.fill_in(page, day.sponsor.password)
    page.until(
        f"location.origin === '{people.ORIGIN}' && document.querySelector('a[href=\"/workspaces/{workspace.id}\"]')"
    )
    page.run(f"document.querySelector('a[href=\"/workspaces/{workspace.id}\"]').click()")
    page.until(f"location.pathname === '/workspaces/{workspace.id}' && document.querySelector('#attach')")
    assert page.run("document.querySelector('.state').innerText") == "active"
    take(page, "2-workspace", 850)


@pytest.mark.control("ID-01")
def test_the_same_person_signs_in_on_the_command_line(day: Day, page: Chromium, workspace: Workspace) -> None:
    found = day.sponsor.log_in(page, "3-code")
    assert (found["name"], found["roles"]) == (day.sponsor.name, ["user"])
    refused = day.sponsor.saw("workspace", "kill", workspace.id, "--reason", "not mine to do", check=False)
    assert refused.returncode == 1, refused.stdout


@pytest.mark.control("ID-02")
def test_an_agent_is_left_running_in_the_terminal_of_the_browser(
    day: Day, page: Chromium, workspace: Workspace
) -> None:
    page.go(f"{people.ORIGIN}/workspaces/{workspace.id}")
    page.run(f"document.querySelector('a[href=\"/workspaces/{workspace.id}/terminal\"]').click()")
    page.until(f"document.getElementById('said') && {SAID}.startsWith('Session ses-')")
    day.session = str(page.run(SAID)).split()[1]

    def shell() -> bool:  # what is typed before the shell reads may be lost
        type_line(page, "clear; echo ready-$((40+2))")
        return bool(page.run(f"{ROWS}.includes('ready-42')"))

    wait_until("a shell in the terminal", shell, patience=180, interval=3.0)
    type_line(page, f"cd ~/work && git fetch -q && git checkout -q -B day origin/main && echo {day.mark} > agent.txt")
    identity = "-c user.name=agent -c user.email=agent@example.com"
    type_line(
        page, f"git add agent.txt && git {identity} commit -qm 'agent: the work of {day.mark}' && echo kept-$((40+2))"
    )
    shown(page, "kept-42")
    # stands for an agent: it asks to push, and goes on whether somebody looks or not
    type_line(
        page, f"agent() {{ git push -q origin HEAD:main; while sleep 2; do echo at-work-{day.mark}; done; }}; agent"
    )
    shown(page, f"\\nat-work-{day.mark}")
    found = re.search(r"waiting for review (rv-[0-9a-f]{32})", page.run(ROWS))
    assert found is not None, page.run(ROWS)
    day.review = found[1]
    take(page, "4-terminal", 520)
    page.go("about:blank")  # as a window that is closed

    def over() -> bool:
        known = {row["id"]: row for row in workspace.sessions()}
        return bool(known[day.session]["recording_stored_at"])

    wait_until("the end of the session", over, patience=120)


@pytest.mark.control("ID-02")
def test_plain_ssh_finds_it_at_work(day: Day, workspace: Workspace) -> None:
    config = day.sponsor.desk / "ssh_config"
    config.write_text(
        day.sponsor.saw(*told("saw ssh --config ws-demo >> ~/.ssh/config", {"ws-demo": workspace.id})).stdout,
        encoding="utf-8",
    )
    ssh = [*day.sponsor.behind, "ssh", "-F", str(config), workspace.id]
    ssh[0] = str(shutil.which(ssh[0]))
    with Terminal(ssh, day.sponsor.environment) as terminal:
        assert terminal.expect(f"at-work-{day.mark}".encode(), 180), terminal.tail()
        terminal.type(b"\x03clear; echo ended-$((40+2))\r")
        assert terminal.expect(b"ended-42", 60), terminal.tail()


@pytest.mark.control("REV-02")
def test_the_push_waits_until_somebody_else_has_read_the_diff_and_approves_it_with_a_passkey(
    day: Day, page: Chromium, workspace: Workspace
) -> None:
    tip = ("git", "-c", "safe.directory=*", "-C", "/srv/git/team/project.git", "log", "-1", "--format=%s", "main")
    seen = f"{people.ORIGIN}/reviews"
    with day.approver.browser() as desk:
        desk.virtual_authenticator()
        day.approver.sign_in(desk)
        desk.go(f"{people.ORIGIN}/passkeys")
        desk.until("document.querySelector('#register button:not(:disabled)')")
        desk.run(
            "document.getElementById('label').value = 'laptop'; document.querySelector('#register button').click()"
        )
        desk.until("document.querySelector('td') && document.body.innerText.includes('laptop')")
        take(desk, "6-passkey", 560)

        desk.go(seen)
        desk.until(f"document.querySelector('main a[href=\"/reviews/{day.review}\"]')")

        def read() -> bool:  # the far end says what the push would change
            desk.go(f"{seen}/{day.review}")
            return bool(
                desk.run(
                    f"[...document.querySelectorAll('section.agent ins')].some((one) => one.innerText === '+ {day.mark}')"
                )
            )

        wait_until("the diff", read, patience=180, interval=2.0)
        assert f"the work of {day.mark}" in desk.run("document.querySelector('section.agent').innerText")
        assert day.mark not in workspace.host("enterprise", " ".join(f"'{word}'" for word in tip))
        # whose agent it is may not approve it
        page.go(f"{seen}/{day.review}")
        assert not page.run("document.querySelector('button[value=approve]')")
        desk.until("document.querySelector('#decide button:not(:disabled)')")
        take(desk, "7-review", 800, "document.querySelector('section.agent ins').closest('pre').previousElementSibling")
        desk.run(
            "document.getElementById('comment').value = 'read and right'; document.querySelector('button[value=approve]').click()"
        )
        desk.until("document.querySelector('.state').innerText !== 'pending'")

        def done() -> bool:
            desk.go(f"{seen}/{day.review}")
            return str(desk.run("document.querySelector('.state').innerText")) == "done"

        wait_until("the push at the far end", done, patience=180)
        take(desk, "8-done", 540, "document.getElementById('facts')")
    assert f"the work of {day.mark}" in workspace.host("enterprise", " ".join(f"'{word}'" for word in tip))
    shown = json.loads(workspace.saw("review", "show", day.review, "--json").stdout)
    [decision] = shown["decisions"]
    assert (decision["approver"], decision["signed_with"]) == (day.approver.name, "passkey")


@pytest.mark.control("ID-02")
def test_the_session_is_played_back_in_the_browser(day: Day, page: Chromium) -> None:
    page.go(f"{people.ORIGIN}/sessions/{day.session}")
    page.until("document.querySelector('#play:not([hidden])')")
    page.run("document.getElementById('speed').value = '0'; document.querySelector('#play button').click()")
    page.until("document.getElementById('said').innerText.includes('It ends here.')")
    assert page.run(f"{ROWS}.includes('at-work-{day.mark}')")
    take(page, "9-replay", 640, "document.getElementById('replay')")


@pytest.mark.control("AUD-02")
def test_an_auditor_proves_the_trail_complete_on_another_machine(
    day: Day, workspace: Workspace, tmp_path: Path
) -> None:
    with day.auditor.browser() as desk:
        day.auditor.sign_in(desk)
        desk.go(f"{people.ORIGIN}/audit?text={day.review}")
        desk.until("document.querySelector('table details')")
        assert day.approver.name in desk.run("document.querySelector('main').innerText")
        take(desk, "10-audit", 850)
        assert day.auditor.log_in(desk)["roles"] == ["auditor"]
    # the platform team makes the key once, and signs the tree
    place, elsewhere = tmp_path / "control", tmp_path / "elsewhere"
    place.mkdir()
    made = {"log.key": str(place / "log.key"), "tiles": str(place / "tiles")}
    workspace.saw(*told("saw audit key --name trail.example.com --out log.key", made))
    workspace.saw(*told("saw audit checkpoint --tiles tiles --key log.key", made))
    trail = day.auditor.saw(*told("saw audit export > trail.jsonl")).stdout
    # another machine: public key, tiles and copy; no network, no context
    shutil.copytree(place / "tiles", elsewhere / "tiles")
    shutil.copy(place / "log.key.pub", elsewhere)
    (elsewhere / "trail.jsonl").write_text(trail, encoding="utf-8")
    proof = "saw audit verify --checkpoint tiles/checkpoint --key log.key.pub --tiles tiles --file trail.jsonl"
    program = [str(workspace.checkout / ".venv/bin/saw"), *told(proof)]
    alone = {"PATH": f"{workspace.checkout}/.venv/bin:{os.environ['PATH']}", "HOME": str(elsewhere)}

    def verify(file: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--net", *program[:-1], file], cwd=elsewhere, env=alone, capture_output=True, text=True,
            check=False, timeout=120,
        )  # fmt: skip

    whole = verify("trail.jsonl")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert day.review in trail
    lines = trail.splitlines(keepends=True)
    about = next(at for at, line in enumerate(lines) if day.review in line)
    (elsewhere / "part.jsonl").write_text("".join(lines[:about] + lines[about + 1 :]), encoding="utf-8")
    assert verify("part.jsonl").returncode == 1
