"""The SSH authority, read back by OpenSSH itself."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from saw.identity.names import IdentityError
from saw.identity.ssh import SshAuthority

pytestmark = pytest.mark.control("ID-02")
NOW = datetime(2026, 11, 23, 12, 0, 0, tzinfo=UTC)


def line(key):
    return key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("ssh") / "ca"


@pytest.fixture(scope="module")
def authority(directory):
    return SshAuthority.create(directory)


@pytest.fixture(scope="module")
def public_key():
    return line(ed25519.Ed25519PrivateKey.generate())


def listed(certificate, tmp_path):
    """What ``ssh-keygen -L`` says, as lines without indentation."""
    path = tmp_path / "cert.pub"
    path.write_text(certificate + "\n")
    done = subprocess.run(
        ["ssh-keygen", "-L", "-f", str(path)],
        capture_output=True,
        text=True,
        check=True,
        env={"TZ": "UTC", "PATH": "/usr/bin"},
    )
    return [text.strip() for text in done.stdout.splitlines()]


def test_a_user_certificate_is_for_one_workspace_and_minutes(authority, public_key, tmp_path):
    certificate = authority.issue_user(
        public_key, "ws-demo", "S1-abc", NOW, 120, source_address="192.0.2.7", force_command="saw-record --session S1"
    )
    lines = listed(certificate + " anything", tmp_path)
    assert "Type: ssh-ed25519-cert-v01@openssh.com user certificate" in lines
    assert 'Key ID: "S1-abc"' in lines
    assert "Valid: from 2026-11-23T11:59:30 to 2026-11-23T12:02:00" in lines
    after = lines[lines.index("Principals:") :]
    assert after == [
        "Principals:",
        "ws-demo",
        "Critical Options:",
        "force-command saw-record --session S1",
        "source-address 192.0.2.7/32",
        "Extensions:",
        "permit-pty",
    ]


def test_a_host_certificate_comes_from_the_other_key(authority, public_key, tmp_path):
    lines = listed(authority.issue_host(public_key, ["ws-demo", "10.210.1.2"], NOW, timedelta(days=1)), tmp_path)
    assert "Type: ssh-ed25519-cert-v01@openssh.com host certificate" in lines
    assert lines[lines.index("Principals:") + 1 :][:2] == ["ws-demo", "10.210.1.2"]
    assert authority.user_ca != authority.host_ca
    (tmp_path / "host-ca.pub").write_text(authority.host_ca)
    printed = subprocess.run(
        ["ssh-keygen", "-l", "-f", str(tmp_path / "host-ca.pub")], capture_output=True, text=True, check=True
    )
    assert any(text.startswith("Signing CA") and printed.stdout.split()[1] in text for text in lines)


@pytest.mark.parametrize("ttl", [0, -5, 301, timedelta(hours=1)])
def test_a_user_certificate_never_lives_longer_than_five_minutes(authority, public_key, ttl):
    assert authority.issue_user(public_key, "ws-demo", "s1", NOW, 300)
    with pytest.raises(IdentityError, match="cannot live"):
        authority.issue_user(public_key, "ws-demo", "s1", NOW, ttl)


@pytest.mark.parametrize(
    "change",
    [
        {"workspace_id": "ws,other"},
        {"workspace_id": ""},
        {"session_id": "a b"},
        {"source_address": "everywhere"},
        {"source_address": ""},
        {"force_command": ""},
        {"force_command": "a\nb"},
    ],
)
def test_unusable_names_and_options_are_refused(authority, public_key, change):
    good = {"workspace_id": "ws-demo", "session_id": "s1", "now": NOW}
    assert authority.issue_user(public_key, **good)
    with pytest.raises(IdentityError):
        authority.issue_user(public_key, **good | change)


def test_only_plain_strong_keys_are_signed(authority, public_key):
    assert authority.issue_user(public_key + " a comment", "ws-demo", "s1", NOW)
    bad = [
        authority.issue_user(public_key, "ws-demo", "s1", NOW),  # a certificate
        line(rsa.generate_private_key(65537, 2048)),
        "ssh-ed25519 AAAA",
        "",
        public_key + "\n" + public_key,
    ]
    for text in bad:
        with pytest.raises(IdentityError):
            authority.issue_user(text, "ws-demo", "s1", NOW)


def test_host_certificates_need_principals(authority, public_key):
    for principals in ([], ["*"], ["a,b"]):
        with pytest.raises(IdentityError):
            authority.issue_host(public_key, principals, NOW, 60)


def test_the_keys_survive_a_restart_and_stay_private(authority, directory):
    again = SshAuthority.load(directory)
    assert (again.user_ca, again.host_ca) == (authority.user_ca, authority.host_ca)
    assert {path.stat().st_mode & 0o777 for path in directory.iterdir()} == {0o600}
    with pytest.raises(IdentityError, match="already holds"):
        SshAuthority.create(directory)


def test_keys_open_to_others_are_not_loaded(tmp_path):
    SshAuthority.create(tmp_path / "ca")
    (tmp_path / "ca" / "ssh-user-ca").chmod(0o644)
    with pytest.raises(IdentityError, match="open to group"):
        SshAuthority.load(tmp_path / "ca")
