"""The people of the demonstration: passwords that are made on the spot, and settings that broker and provider take."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import msgspec
import pytest

from saw.broker.client import load_context
from saw.broker.sso_settings import SsoSettings, problems_of
from saw.errors import UnavailableError
from saw.lab import people
from saw.lab.topology import Lab

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    found = Lab(ROOT, tmp_path / "build")
    found.directory.mkdir(parents=True)
    return found


def test_passwords_are_made_once_for_each_person_and_are_private(lab: Lab) -> None:
    first = people.passwords(lab)
    assert set(first) == {one.name for one in people.PEOPLE}
    assert len(set(first.values())) == len(first)
    assert all(len(word) >= 20 for word in first.values())
    assert stat.S_IMODE(people.people_file(lab).stat().st_mode) == 0o600
    assert people.passwords(lab) == first
    # somebody who is new gets one, and the others keep theirs
    new, *others = first
    people.people_file(lab).write_text(json.dumps({name: first[name] for name in others}))
    again = people.passwords(lab)
    assert {name: again[name] for name in others} == {name: first[name] for name in others}
    assert again[new] != first[new]


def test_the_providers_keys_and_the_clients_secret_are_made_once_and_are_private(lab: Lab) -> None:
    settings = people.provider_settings(lab)
    assert people.provider_settings(lab) == settings
    assert settings["jwks"]["keys"][0]["d"]
    for path in lab.directory.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_the_broker_takes_the_settings_and_each_person_has_the_role_of_their_part(lab: Lab) -> None:
    told = people.variables(lab)
    settings = msgspec.convert(told["broker_sso"], SsoSettings)
    # files that exist on the control host alone
    assert [text for text in problems_of(settings) if "file" not in text] == []
    held = {one.name: settings.roles_of(one.groups) for one in people.PEOPLE}
    assert held == {
        "demo.user@example.com": ("user",), "approver@example.com": ("approver",),
        "operator@example.com": ("operator",), "auditor@example.com": ("auditor",),
    }  # fmt: skip
    client = told["demo_identity"]["settings"]["client"]
    assert client["redirect_uris"] == [settings.redirect_uri]
    assert told["portal_tls_names"] == ["saw.example.com"]


def test_what_a_person_is_told_and_reads_has_no_secret(lab: Lab) -> None:
    settings = people.provider_settings(lab)
    people.write_context(lab)
    context = load_context(people.context_file(lab), {})
    assert context.broker.sign_in
    assert context.bastion
    assert context.bastion.sign_in
    said = people.how_to_open(lab)
    for text in (said, people.context_file(lab).read_text()):
        assert settings["client"]["client_secret"] not in text
        assert not any(person["password"] in text for person in settings["people"].values())
    for needed in (people.ORIGIN, people.hosts_lines(lab).splitlines()[0], str(people.people_file(lab))):
        assert needed in said


def test_a_provider_that_was_not_installed_is_named_with_its_cure(tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path / "build")
    with pytest.raises(UnavailableError, match="the identity provider is missing") as raised:
        people.need_provider(lab)
    assert raised.value.cure == "scripts/bootstrap.sh workspace"
    for place in ("tests/oidc", "tests/oidc/node"):
        (tmp_path / place / "node_modules").mkdir(parents=True)
        (tmp_path / place / "node_modules/.locked").touch()
    people.need_provider(lab)
