"""Failures that became public in OpenSSH and in Go's SSH library, tried on the servers of the bastion and of a workspace.

What the library lost between two ways of authenticating cannot be lost where there is one. docs/regressions.md says more.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import jinja2
import pytest
from session_rig import ROOT, SSHD, Bastion, make_key

pytestmark = pytest.mark.control("ID-02")
TEMPLATES = {"bastion": "saw-bastion", "workspace": "coder", "ports": "saw-forward"}
"""Server → the account whose settings are asked for."""


def settings(folder: Path, server: str, before: str = "", behind: str = "") -> dict[str, str]:
    """What sshd makes of a role's file with ``before`` and ``behind`` around it, for the account of the server."""
    role = "bastion" if server == "bastion" else "ssh_access"
    text = jinja2.Template((ROOT / f"roles/{role}/templates/sshd.conf.j2").read_text()).render(
        ansible_managed="test", bastion_port=2222, bastion_listen_address="127.0.0.1", bastion_host_directory=folder,
        bastion_user="saw-bastion", bastion_command="/bin/false", ssh_access_user="coder", ssh_access_system={"penalties": True},
    )  # fmt: skip
    folder.mkdir(exist_ok=True)
    if not (folder / "ssh_host_ed25519_key").exists():
        make_key(folder / "ssh_host_ed25519_key")
    text = text.replace("/etc/ssh/ssh_host_ed25519_key", str(folder / "ssh_host_ed25519_key"))
    # there is no certificate here, and the test's own sshd may be older than the workspace's
    lines = [line for line in text.splitlines() if not line.startswith(("HostCertificate", "PerSourcePenalties"))]
    first = next((number for number, line in enumerate(lines) if line.startswith("Match ")), len(lines))
    (folder / "sshd.conf").write_text("\n".join([before, *lines[:first], behind, *lines[first:], ""]))
    told = f"user={TEMPLATES[server]},host=x,addr=127.0.0.1"
    done = subprocess.run(
        [SSHD, "-T", "-C", told, "-f", str(folder / "sshd.conf")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: value for name, _, value in (line.partition(" ") for line in done.stdout.splitlines())}


@pytest.mark.regression("CVE-2026-59999")
@pytest.mark.parametrize("server", TEMPLATES)
def test_cve_2026_59999_tunnels_are_refused_by_their_own_name_and_not_only_with_all_forwarding(
    tmp_path: Path, server: str
) -> None:
    refused = {
        "disableforwarding": "yes", "permittunnel": "no", "allowtcpforwarding": "no", "allowagentforwarding": "no",
        "allowstreamlocalforwarding": "no", "x11forwarding": "no", "gatewayports": "no",
    }  # fmt: skip
    found = settings(tmp_path / "sshd", server)
    assert {name: found[name] for name in refused} == refused
    # What somebody writes behind it does not count. The twin: in front of it, it does, so the name is heeded.
    assert settings(tmp_path / "sshd", server, behind="PermitTunnel yes")["permittunnel"] == "no"
    assert settings(tmp_path / "sshd", server, before="PermitTunnel yes")["permittunnel"] == "yes"


@pytest.mark.regression("CVE-2026-39828")
@pytest.mark.regression("CVE-2026-56854")
@pytest.mark.parametrize("server", TEMPLATES)
def test_cve_2026_39828_there_is_one_way_to_authenticate_and_no_second_step(tmp_path: Path, server: str) -> None:
    found = settings(tmp_path / "sshd", server)
    ways = {name: found[name] for name in found if name.endswith("authentication") and found[name] == "yes"}
    assert ways == {"pubkeyauthentication": "yes"}
    assert found["authenticationmethods"] == "publickey"
    assert found["authorizedkeysfile"] == "none"
    # The twin: more ways would be seen.
    more = settings(
        tmp_path / "sshd", server, before="PasswordAuthentication yes\nAuthenticationMethods publickey,password"
    )
    assert more["passwordauthentication"] == "yes"


def bound(bastion: Bastion, folder: Path, session: str, *options: str) -> None:
    """Have the session's key certified again, with critical options of our choice."""
    authority = bastion.lab.config.keys / "ssh-sessions" / "ssh-user-ca"
    line = ["ssh-keygen", "-q", "-s", str(authority), "-I", session, "-n", session, "-V", "-1m:+5m"]
    subprocess.run([*line, *(part for one in options for part in ("-O", one)), str(folder / "key.pub")], check=True)


WAYS = ("password", "keyboard-interactive", "hostbased", "gssapi-with-mic", "none")


@pytest.mark.regression("CVE-2026-39828")
@pytest.mark.regression("CVE-2026-46595")
@pytest.mark.regression("CVE-2026-56854")
def test_cve_2026_56854_what_binds_a_certificate_holds_whatever_was_tried_before_it(
    bastion: Bastion, tmp_path: Path
) -> None:
    folder, session = bastion.certify()
    plain = tmp_path / "plain"
    make_key(plain)
    bound(bastion, folder, session, "source-address=127.0.0.1/32", "force-command=echo forced")
    # Other ways and another key first: none is taken, and what binds the certificate is not lost on the way.
    before = ("-i", str(plain), "-o", "IdentitiesOnly=yes")
    for way in WAYS:
        order = ("-o", f"PreferredAuthentications={way},publickey", "-o", "NumberOfPasswordPrompts=1")
        moved = bastion.ssh(folder, "echo in-the-workspace", extra=(*before, *order, "-b", "127.0.0.2"))
        assert (moved.returncode, moved.stdout) == (255, ""), (way, moved.stderr)
        alone = bastion.ssh(folder, "echo in-the-workspace", extra=("-o", f"PreferredAuthentications={way}"))
        assert (alone.returncode, alone.stdout) == (255, "")
        assert "Permission denied (publickey)" in alone.stderr, alone.stderr
    assert bastion.show(session)["state"] == "requested"
    # The twin: from its address, and behind the same first tries, it opens the session, and the server's own command runs.
    order = ("-o", "PreferredAuthentications=keyboard-interactive,publickey")
    opened = bastion.ssh(folder, "echo in-the-workspace", extra=(*before, *order, "-b", "127.0.0.1"))
    assert opened.stdout == "in-the-workspace\n", opened.stderr
    assert bastion.closed(session)["from"] == "127.0.0.1"


def test_sshd_is_there() -> None:
    """Without it the checks above would be skipped nowhere, and say so here."""
    assert shutil.which(SSHD)
