"""The role portal_tls, run for real in a mount namespace of its own: it forecasts, installs, repeats, renews, and refuses."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

ROOT = Path(__file__).resolve().parents[3]
NAME = "saw.example.com"
#: Host → how it runs the role. All are this machine, one after the other.
STEPS = {
    "never": {"portal_tls_certificate": ""},
    "forecast": {"check": True},
    "first": {},
    "second": {},
    "othername": {"portal_tls_names": ["other.example.com"]},
    "endssoon": {"portal_tls_min_days": 60},
    "nokey": {"portal_tls_key": ""},
    "noname": {"portal_tls_names": []},
    "swapped": {"portal_tls_key": "new.key"},
    "refusedinadvance": {"check": True, "portal_tls_key": "new.key"},
    "renewed": {"portal_tls_certificate": "new.pem", "portal_tls_key": "new.key"},
}
Run = tuple[dict[str, tuple[int, int]], Path, str]


def write_pair(folder: Path, name: str) -> None:
    """Write a certificate that signed itself, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    certificate = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(minutes=5))
        .not_valid_after(now + timedelta(days=30))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / f"{name}.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Changed and refused tasks of each step, the folder with the file as each left it, and all words."""
    folder = tmp_path_factory.mktemp("portal-tls")
    link = folder / "installed/ansible_collections/secure_agent/workspace"
    link.parent.mkdir(parents=True)
    link.symlink_to(ROOT)
    programs = Path(sys.executable).parent
    for name in ("old", "new"):
        write_pair(folder, name)
    variables = {
        "portal_tls_certificate": "old.pem",
        "portal_tls_key": "old.key",
        "portal_tls_names": [NAME],
    }
    plays = []
    for host, step in STEPS.items():
        said = {**variables, **{name: value for name, value in step.items() if name != "check"}}
        for name in ("portal_tls_certificate", "portal_tls_key"):
            said[name] = said[name] and f"{folder}/{said[name]}"
        role = {"ansible.builtin.include_role": {"name": "secure_agent.workspace.portal_tls"}}
        keep = {
            "ansible.builtin.shell": f"cp -a /etc/saw/pages.pem {folder}/{host}.left || true",
            "changed_when": False,
            "check_mode": False,
        }
        say = {
            "ansible.builtin.debug": {"msg": "{{ ansible_failed_result.stderr | default(ansible_failed_result.msg) }}"}
        }
        plays.append(
            {
                "hosts": host, "gather_facts": False, "check_mode": step.get("check", False), "connection": "local",
                "vars": said, "tasks": [{"block": [role], "rescue": [say], "always": [keep]}],
            }
        )  # fmt: skip
    (folder / "plays.yml").write_text(yaml.safe_dump(plays, sort_keys=False))
    etc = folder / "etc"
    inside = " && ".join(
        [
            f"mkdir {etc}",
            f"mount -t tmpfs tmpfs {etc}",
            f"cp -a /etc/. {etc}",
            f"mount --bind {etc} /etc",
            "mkdir -p /var/lib/saw",
            "mount -t tmpfs tmpfs /var/lib/saw",
            "mount -t tmpfs tmpfs /opt",
            "mkdir -p /opt/saw/bin",
            f"ln -s {programs}/saw /opt/saw/bin/saw",
            f"exec {programs}/ansible-playbook -i {','.join(STEPS)} -e ansible_python_interpreter={sys.executable} -D plays.yml",
        ]
    )
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", inside],
        capture_output=True, text=True, check=False, timeout=300, cwd=folder,
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(folder / "installed"), "ANSIBLE_HOME": str(folder / "home"),
             "ANSIBLE_NOCOLOR": "1", "ANSIBLE_PIPELINING": "1"},
    )  # fmt: skip
    recap = re.findall(
        r"^(\w+) +: ok=\d+ +changed=(\d+) +unreachable=0 +failed=0 +skipped=\d+ +rescued=(\d+)",
        done.stdout,
        re.MULTILINE,
    )
    return {host: (int(changed), int(failed)) for host, changed, failed in recap}, folder, done.stdout + done.stderr


@pytest.mark.thorough
def test_without_a_certificate_nothing_is_done(run: Run) -> None:
    assert run[0]["never"] == (0, 0), run[2]


def test_check_mode_forecasts_what_one_run_does_and_a_second_run_has_nothing_to_do(run: Run) -> None:
    counts, folder, words = run
    assert [counts[step] for step in ("forecast", "first", "second")] == [(2, 0), (2, 0), (0, 0)], words
    assert not (folder / "forecast.left").exists()


def test_key_and_certificates_are_in_one_file_of_the_broker_alone(run: Run) -> None:
    left, folder = run[1] / "first.left", run[1]
    assert left.read_text().strip() == f"{(folder / 'old.key').read_text()}{(folder / 'old.pem').read_text()}".strip()
    assert (left.stat().st_mode & 0o777, left.stat().st_uid) == (0o640, 0)


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ("othername", "it is not for other.example.com"),
        ("endssoon", "counts now and for 60 days"),
        ("swapped", "not that of the first certificate"),
        ("refusedinadvance", "not that of the first certificate"),
        ("nokey", "portal_tls_key has to name"),
        ("noname", "portal_tls_names has to name"),
    ],
)
def test_what_browsers_would_refuse_leaves_the_old_one(run: Run, step: str, why: str) -> None:
    counts, folder, words = run
    assert counts[step] == (0, 1), words
    assert why in words
    assert (folder / f"{step}.left").read_bytes() == (folder / "first.left").read_bytes()


def test_a_renewed_one_takes_its_place(run: Run) -> None:
    counts, folder, words = run
    assert counts["renewed"] == (1, 0), words
    assert (folder / "new.pem").read_text() in (folder / "renewed.left").read_text()


def test_no_line_of_a_key_is_shown(run: Run) -> None:
    for name in ("old", "new"):
        assert (run[1] / f"{name}.key").read_text().splitlines()[1] not in run[2]
