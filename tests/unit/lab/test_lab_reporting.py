"""Steps, the control report, and the far end's certificates."""

from __future__ import annotations

import json
import ssl
from pathlib import Path

import pytest
from cryptography import x509

from saw.lab import demo_pki
from saw.lab.report import Report
from saw.lab.steps import Progress

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


def test_the_report_marks_what_is_not_as_expected(tmp_path: Path) -> None:
    wrong = {**CALL, "name": "admin", "verdict": "allow", "expected": "deny", "ok": False}
    report = Report(ok=False, steps=[], calls=[CALL, wrong], attestation={}, audit={"complete": False})
    lines = report.table().splitlines()
    assert any(line.startswith("!admin") for line in lines)
    assert any(line.startswith(" clone") for line in lines)
    assert "audit trail: NOT complete, 0 events" in lines
    assert lines[-1] == "RESULT: NOT as expected - see the lines marked !"
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text())["calls"][1]["ok"] is False


def test_a_report_of_a_good_run_says_so() -> None:
    good = {"complete": True, "events": 7}
    report = Report(ok=True, steps=[], calls=[CALL], attestation={"verdict": "attested"}, audit=good)
    assert report.table().endswith("RESULT: everything as expected")
    assert "audit trail: complete, 7 events" in report.table()


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
