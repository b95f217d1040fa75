"""docs/portal.md and docs/sign-in.md as they are written: a real provider and broker, a browser, a command line and a bastion.

The settings are the page's, the commands run in its order, and its tables are the code's.
"""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest
import yaml
from page import ROOT, run_page
from people_rig import SIGN_IN, People, certificate, people, variables

from saw.broker.operator_roles import ALLOWED
from saw.broker.people import Person
from saw.broker.sso import access
from saw.broker.sso_settings import Role, SsoSettings
from saw.broker.terminal.settings import TerminalSettings

PORTAL = (ROOT / "docs/portal.md").read_text(encoding="utf-8")
WORKSPACE = "ws-ada"


@pytest.fixture(scope="module")
def there() -> Iterator[People]:
    """The people of the pages; ``ws-ada`` is ada's."""
    with people(WORKSPACE) as made:
        yield made


def table(page: str, heading: str) -> list[list[str]]:
    """Return the rows of the table whose first heading is ``heading``."""
    text = page.partition(f"\n| {heading} |" if heading else "\n| |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in row.strip("| ").split(" | ")] for row in text.split("\n")[2:]]


@pytest.mark.thorough
@pytest.mark.control("ID-01")
def test_the_portal_page_leads_from_the_browser_into_a_workspace(there: People) -> None:
    context = {
        "broker": {"socket": "/nonexistent", "ssh": None},
        "bastion": {"host": "127.0.0.1", "port": there.bastion.port, "user": "root", "sign_in": True},
    }
    (there.desk / "context.json").write_text(json.dumps(context))
    with there.confirming("u-ada"):
        run_page("docs/portal.md", there.desk, there.environment, places=there.places)
    with there.browser() as ada:
        assert "My workspaces" in ada.sign_in("u-ada").text
        page = ada.get(f"/workspaces/{WORKSPACE}").text
        commands = html.unescape(page.partition('aria-label="Commands to attach">')[2].partition("</pre>")[0])
        written = PORTAL.partition("```sh\n")[2].partition("```")[0]
        assert (
            commands.split("\n") == written.replace("https://saw.example.com:8445", there.lab.origin).split("\n")[:-1]
        )
    [session] = there.lab.operator.request("GET", f"/v1/sessions?workspace_id={WORKSPACE}")["sessions"]
    assert (session["who"], there.bastion.closed(session["id"])["reason"]) == ("user:ada@example.com", "closed")


@pytest.mark.control("ID-02")
def test_a_port_is_granted_and_given_back_in_the_browser_as_the_page_says(there: People) -> None:
    form = {"port": "3000", "hours": "4", "reason": "the new form"}
    with there.browser() as ben, there.browser() as ada:
        ben.sign_in("u-ben")
        ada.sign_in("u-ada")
        path = f"/workspaces/{WORKSPACE}"
        refused = ada.http.post(f"{path}/ports", data={"csrf": ada.csrf(), **form})
        assert refused.status_code == 403
        granted = ben.http.post(f"{path}/ports", data={"csrf": ben.csrf(), **form})
        assert (granted.status_code, granted.headers["location"]) == (303, f"{path}#ports")
        page = ada.get(path).text
        assert f"saw expose {WORKSPACE} --port 3000</pre>" in page
        [one] = re.findall(r'action="(/forwards/[^"]+/revoke)"', page)
        assert ada.http.post(one, data={"csrf": ada.csrf(), "reason": "seen"}).status_code == 303
        assert "No port is granted now." in ada.get(path).text
    listed = there.lab.operator.request("GET", "/v1/forwards?all=1")["forwards"]
    assert [(one["granted_by"], one["revoked_by"]) for one in listed] == [
        ("user:ben@example.com", "user:ada@example.com")
    ]


@pytest.mark.control("ID-01")
def test_the_sign_in_page_signs_in_and_operates(there: People) -> None:
    """Last of those with the lab: the page cuts the workspace off."""
    context = SIGN_IN.partition("The context file\nthen says so")[2].partition("```json\n")[2].partition("```")[0]
    (there.desk / "context.json").write_text(context)
    (there.desk / "new.pem").write_bytes(certificate(there.desk, "saw.example.com").read_bytes())
    with there.confirming("u-ben"):
        printed = run_page("docs/sign-in.md", there.desk, there.environment, places=there.places)
    who = json.loads(printed[2])
    assert (who["name"], who["roles"]) == ("ben@example.com", ["user", "operator"])
    assert there.lab.operator.request("GET", f"/v1/workspaces/{WORKSPACE}")["state"] == "quarantined"
    [killed] = there.lab.audited(principal="user:ben@example.com", message="scans its neighbours", class_uid=6003)
    assert killed["status"] == "Success"


def test_the_play_for_files_of_the_brokers_account_is_one(tmp_path: Path) -> None:
    text = SIGN_IN.partition("### Files of the broker's account")[2].partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "site.yml").write_text(text)
    link = tmp_path / "installed/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    line = [Path(sys.executable).with_name("ansible-playbook"), "--syntax-check", "-i", "control_plane,", "site.yml"]
    told = {"ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "installed"), "ANSIBLE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        line, cwd=tmp_path, env={**os.environ, **told}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (ROOT / "roles/broker/tasks/accounts.yml").is_file()


def test_the_variables_on_the_pages_are_the_roles() -> None:
    specs = [
        yaml.safe_load((ROOT / f"roles/{role}/meta/argument_specs.yml").read_text())
        for role in ("broker", "portal_tls")
    ]
    known = {name for spec in specs for entry in spec["argument_specs"].values() for name in entry["options"]}
    assert set(variables(SIGN_IN, "broker_sso")) <= known
    terminal = variables(PORTAL, "broker_terminal")
    assert set(terminal) <= known
    msgspec.convert({"files_dir": "/opt/saw/share/terminal", **terminal["broker_terminal"]}, TerminalSettings)


def flat(kind: type[msgspec.Struct], prefix: str = "") -> set[str]:
    """Return the fields of a struct; those of a struct in it by ``outer.inner``."""
    found: set[str] = set()
    for field in msgspec.structs.fields(kind):
        inner = next(
            (
                one
                for one in (field.type, *get_args(field.type))
                if isinstance(one, type) and issubclass(one, msgspec.Struct)
            ),
            None,
        )
        found |= flat(inner, f"{prefix}{field.name}.") if inner else {f"{prefix}{field.name}"}
    return found


@pytest.mark.parametrize(
    ("page", "kind", "but"),
    [(SIGN_IN, SsoSettings, set()), (PORTAL, TerminalSettings, {"files_dir", "runtime_dir"})],
    ids=["sign-in", "portal"],
)
def test_the_pages_name_every_field(page: str, kind: type[msgspec.Struct], but: set[str]) -> None:
    assert {name for row in table(page, "field") for name in re.findall(r"`([a-z_.]+)`", row[0])} == flat(kind) - but


def test_the_pages_name_refusals_that_there_are() -> None:
    source = "".join(path.read_text() for path in sorted((ROOT / "src/saw").rglob("*.py")))
    for page in (SIGN_IN, PORTAL):
        for row in table(page, "what is shown"):
            for code in re.findall(r"`([a-z_]+)`", row[0]):
                assert f'"{code}"' in source, code
    assert [row[0] for row in table(SIGN_IN, "role")[:5]] == [
        f"`{name}`" for name in ("user", "approver", "operator", "security", "auditor")
    ]


def test_who_may_do_what_is_what_the_code_says() -> None:
    """The rows of the portal's table that a rule decides by role and sponsorship alone."""
    own, foreign = "ada@example.com", "ben@example.com"
    roles: tuple[Role, ...] = ("user", "approver", "operator", "security", "auditor")

    def person(role: Role) -> Person:
        name = own if role == "user" else f"{role}@example.com"  # sponsors nothing
        return Person(name, (), (role,), "2099-01-01T00:00:00.000Z")

    rules = {
        "see workspaces, sessions, engagements, history": access.sees_workspace,
        "download or play a recording": access.may_replay,
        "end a session": lambda one, holder: access.may_end(one, f"user:{holder}") and access.sees_workspace(one, own),
        "revoke an engagement": access.may_revoke,
        "see granted ports": access.sees_workspace,
        "grant a port to the sponsor": lambda one, _: _allows(one, "/v1/forwards"),
        "revoke a granted port": lambda one, holder: (
            access.may_end(one, f"user:{holder}") and access.sees_workspace(one, own)
        ),
        "cut a workspace off": lambda one, _: access.may_intervene(one),
        "start, stop, rebuild; resume a job": lambda one, _: _allows(one, "/v1/jobs"),
        "cancel a job": lambda one, _: _allows(one, "/v1/jobs/{id}/cancel"),
        "search and download the audit trail": lambda one, _: access.reads_trail(one),
    }
    rows = {row[0]: row[1:] for row in table(PORTAL, "")}
    assert set(rules) <= set(rows)
    for what, allows in rules.items():
        found = [(allows(person(role), own), allows(person(role), foreign)) for role in roles]
        narrow = [
            cell in {"own", "yes", "the person's own"} and role == "user"
            for cell, role in zip(rows[what], roles, strict=True)
        ]
        wanted = [
            (cell != "–", cell != "–" and not own_only) for cell, own_only in zip(rows[what], narrow, strict=True)
        ]
        assert found == wanted, what


def _allows(person: Person, path: str) -> bool:
    return bool(ALLOWED["POST", path] & set(person.roles))
