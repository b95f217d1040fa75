"""PyPI and npm packages of images in force: their bills have to be the record's own, and findings say whose package it is."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from saw.audit import validate
from saw.audit.events import EventFactory
from saw.image.vulnerabilities import Finding, Verdict
from saw.patching.images import BILL, ImageReport, Record, report_on
from saw.patching.vulnerable import events_of

NOW = datetime(2026, 11, 30, tzinfo=UTC)
NPM = "sbom/npm.cdx.json"


def judged(folder: Path, evidence: dict[str, str]) -> ImageReport:
    record = Record("one", "1" * 64, NOW, NOW + timedelta(days=1), "stable", evidence)
    return report_on(
        record, (), folder, lambda _: Verdict((), (), (), ()), longest=timedelta(days=9), now=NOW, bills=(BILL, NPM)
    )


@pytest.mark.control("IMG-01")
def test_every_bill_that_is_searched_is_the_records_own(tmp_path: Path) -> None:
    evidence = {}
    for name in (BILL, NPM):
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text(name, encoding="utf-8")
        evidence[name] = hashlib.sha256(name.encode()).hexdigest()
    assert judged(tmp_path, evidence).judged
    assert f"its record names no {NPM}" in judged(tmp_path, {BILL: evidence[BILL]}).problems[0]
    (tmp_path / "one" / NPM).write_text("another", encoding="utf-8")
    changed = judged(tmp_path, evidence)
    assert not changed.judged
    assert "is not the bill that its record names" in changed.problems[0]


def test_a_finding_says_whose_package_it_is() -> None:
    found = [
        Finding("CVE-2026-1", "demo", "1", "high"),
        Finding("CVE-2026-1", "demo", "1", "high", "2", "pypi", ("GHSA-1",)),
        Finding("GHSA-2", "demo", "1", "low", "", "npm"),
    ]
    factory = EventFactory("saw-patching", host="h", new_uid=lambda: "1")
    events = events_of("image one", found, factory, NOW)
    for event in events:
        validate(event)
    told = [(one["unmapped"]["saw"].get("ecosystem"), one["vulnerabilities"][0]) for one in events]
    assert [name for name, _ in told] == [None, "pypi", "npm"]
    managers = [one["affected_packages"][0]["package_manager"] for _, one in told]
    assert managers == ["dpkg", "pip", "npm"]
    assert [one["cve"]["uid"] for _, one in told] == ["CVE-2026-1", "CVE-2026-1", "GHSA-2"]
