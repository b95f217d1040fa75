"""Steps, the control report, and the far end's certificates."""

from __future__ import annotations

import json
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from saw.lab import demo_pki
from saw.lab.report import Report
from saw.lab.steps import Progress, Step

CALL = {
    "name": "clone",
    "control": "NET-01",
    "expected": "allow",
    "verdict": "allow",
    "reason": "",
    "ms": 3,
    "ok": True,
}


def test_a_step_is_recorded_with_its_outcome_and_its_error_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(total=2)
    with progress.step("first"):
        progress.say("detail")
    with pytest.raises(ValueError, match="broken"), progress.step("second"):
        raise ValueError("broken")
    assert [(step.name, step.ok) for step in progress.steps] == [("first", True), ("second", False)]
    seen = capsys.readouterr()
    assert "[ 1/2] first" in seen.out
    assert "        detail" in seen.out
    assert "FAILED after" in seen.err


DIGEST = "d" * 64


def good_report() -> Report:
    """The report of a run in which everything was as it must be."""
    return Report(
        ok=False,
        steps=[Step("all", ok=True, seconds=1.0)],
        calls=[dict(CALL)],
        attestation={"verdict": "attested", "problems": [], "policy_digest": DIGEST, "released_digest": DIGEST},
        audit={"complete": True, "events": 7, "findings": []},
        workspace={"attach": {"ok": True}},
        accelerator={"name": "kvm", "reason": "a kernel booted under KVM", "cure": ""},
    )


def test_a_report_of_a_good_run_says_so(tmp_path: Path) -> None:
    report = good_report()
    assert report.judge()
    assert report.table().endswith("RESULT: everything as expected")
    assert "audit trail: complete, 7 events" in report.table()
    assert "accelerator: kvm (a kernel booted under KVM)" in report.table()
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is True


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"calls": []}, "no call was made"),
        ({"calls": [CALL, {**CALL, "name": "admin", "ok": False, "expected": "deny"}]}, "admin: allow (no reason) where deny"),
        ({"attestation": {}}, "not attested: there is no verdict"),
        (
            {"attestation": {"verdict": "not_attested", "problems": ["there is no lease"], "policy_digest": DIGEST,
                             "released_digest": DIGEST}},
            "not attested: there is no lease",
        ),
        (
            {"attestation": {"verdict": "attested", "policy_digest": DIGEST, "released_digest": "e" * 64}},
            "the attested policy is not the released one",
        ),
        (
            {"attestation": {"verdict": "attested", "policy_digest": "", "released_digest": ""}},
            "the attested policy is not the released one",
        ),
        ({"audit": {}}, "the audit trail is not complete: 0 findings"),
        ({"audit": {"complete": False, "findings": [1, 2]}}, "the audit trail is not complete: 2 findings"),
        ({"workspace": {}}, "attaching to the persistent terminal did not work"),
        ({"workspace": {"attach": {"ok": False}}}, "attaching to the persistent terminal did not work"),
        ({"steps": [Step("boot", ok=False, seconds=2.0)]}, "step 'boot' failed"),
        ({"error": {"code": "x", "message": "the disk is full"}}, "the disk is full"),
    ],
)  # fmt: skip
def test_one_thing_that_does_not_hold_makes_the_whole_not_ok(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    report = good_report()
    for name, value in changes.items():
        setattr(report, name, value)
    assert not report.judge()
    assert [text for text in report.problems if text.startswith(problem)] == report.problems[:1]
    lines = report.table().splitlines()
    assert any(line.startswith(f"! {problem}") for line in lines)
    assert lines[-1] == "RESULT: NOT as expected - see the lines marked !"
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["ok"] is False


def test_the_table_marks_the_call_that_is_not_as_expected() -> None:
    report = good_report()
    report.calls.append({**CALL, "name": "admin", "expected": "deny", "ok": False})
    report.judge()
    lines = report.table().splitlines()
    assert any(line.startswith("!admin") for line in lines)
    assert any(line.startswith(" clone") for line in lines)


def test_the_far_ends_certificate_is_made_once_and_verifies_for_its_names(tmp_path: Path) -> None:
    names = ("git.example.com", "api.example.com")
    place = demo_pki.ensure(tmp_path / "tls", names)
    first = {path.name: path.read_bytes() for path in place.iterdir()}
    assert {path.name: path.read_bytes() for path in demo_pki.ensure(place, names).iterdir()} == first
    assert (place / "server.key").stat().st_mode & 0o077 == 0
    authority, server = (x509.load_pem_x509_certificate(first[name]) for name in ("ca.pem", "server.pem"))
    server.verify_directly_issued_by(authority)
    alternative = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == list(names)
    ssl.create_default_context(cafile=str(place / "ca.pem"))


NAMES = ("git.example.com", "api.example.com")


@pytest.mark.parametrize(
    ("days", "names", "kept"),
    [
        (0, NAMES, True),
        (334, NAMES, True),
        (336, NAMES, False),
        (400, NAMES, False),
        (-2, NAMES, False),
        (0, (*NAMES, "new.example.com"), False),
        (0, NAMES[:1], False),
    ],
)
def test_the_far_ends_certificates_are_made_anew_before_they_end_and_for_other_names(
    tmp_path: Path, days: int, names: tuple[str, ...], kept: bool
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    now = start + timedelta(days=days)
    place = demo_pki.ensure(tmp_path, NAMES, lambda: start)
    first = {path.name: path.read_bytes() for path in place.iterdir()}
    demo_pki.ensure(place, names, lambda: now)
    again = {path.name: path.read_bytes() for path in place.iterdir()}
    assert (again == first) is kept
    authority, server = (x509.load_pem_x509_certificate(again[name]) for name in ("ca.pem", "server.pem"))
    server.verify_directly_issued_by(authority)
    assert authority.not_valid_after_utc >= now + timedelta(days=30)
    alternative = server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert alternative.get_values_for_type(x509.DNSName) == list(names)


@pytest.mark.parametrize(
    ("name", "content"),
    [("server.pem", None), ("server.key", None), ("ca.pem", None), ("server.pem", b"no certificate")],
)
def test_what_is_missing_or_damaged_at_the_far_end_is_made_anew(
    tmp_path: Path, name: str, content: bytes | None
) -> None:
    place = demo_pki.ensure(tmp_path, NAMES)
    first = (place / "ca.pem").read_bytes()
    (place / name).unlink()
    if content is not None:
        (place / name).write_bytes(content)
    demo_pki.ensure(place, NAMES)
    authority, server = (x509.load_pem_x509_certificate((place / one).read_bytes()) for one in ("ca.pem", "server.pem"))
    server.verify_directly_issued_by(authority)
    assert (place / "ca.pem").read_bytes() != first


def test_servers_of_one_authority_have_keys_of_their_own_and_one_that_is_added_makes_all_anew(tmp_path: Path) -> None:
    names: dict[str, tuple[str, ...]] = {"pages": ("saw.example.com",), "identity": ("idp.example.com",)}
    place = demo_pki.servers(tmp_path, names)
    first = {path.name: path.read_bytes() for path in place.iterdir()}
    assert first["pages.key"] != first["identity.key"]
    assert demo_pki.servers(tmp_path, names) == place
    assert {path.name: path.read_bytes() for path in place.iterdir()} == first
    authority = x509.load_pem_x509_certificate(first["ca.pem"])
    known = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    for server in names:
        certificate = x509.load_pem_x509_certificate(first[f"{server}.pem"])
        certificate.verify_directly_issued_by(authority)
        issuer = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
        assert issuer.key_identifier == known
    demo_pki.servers(tmp_path, {**names, "third": ("third.example.com",)})
    assert all((place / name).read_bytes() != content for name, content in first.items())
