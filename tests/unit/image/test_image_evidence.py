"""Bills of materials, provenance, the search for known vulnerabilities and its gate, with the real tools."""

from __future__ import annotations

import json
import os
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from saw.attest.image_record import RecordInvalid, parse_record
from saw.cli.image import main
from saw.errors import SawError
from saw.image.disk import ImageError, digest_of
from saw.image.sbom import Sources, components, make_sboms
from saw.image.vulnerabilities import Finding, Waiver, judge, read_database, read_waivers
from saw.image.vulnerabilities import scan as search

ROOT = Path(__file__).resolve().parents[3]
TODAY = date(2026, 11, 29)


def database(**cves: dict[str, Any]) -> dict[str, Any]:
    """The tracker's form: the kernel, and ``cves`` of openssh."""
    settled = {"status": "resolved", "fixed_version": "6.1.1-1", "urgency": "low"}
    return {
        "linux": {"CVE-2025-1000": {"releases": {"trixie": settled}}},
        "openssh": {name.replace("_", "-"): {"releases": {"trixie": about}} for name, about in cves.items()},
    }


OPEN_HIGH = {"status": "open", "urgency": "high"}
OPEN_LOW = {"status": "open", "urgency": "low"}
FIXED = {"status": "resolved", "fixed_version": "1:10.0p1-8", "urgency": "low"}
NEVER_THERE = {"status": "resolved", "fixed_version": "0", "urgency": "high"}
ALREADY = {"status": "resolved", "fixed_version": "1:10.0p1-7", "urgency": "high"}


def mirrored(tmp_path: Path, content: Any) -> Path:
    """The database as a file of this moment."""
    path = tmp_path / "tracker.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def record_of(image: Path) -> dict[str, Any]:
    """The unsigned record."""
    return dict(json.loads((image / "release.json").read_text(encoding="utf-8")))


# --- bills of materials and provenance -------------------------------------------------------------------------------------


@pytest.mark.control("IMG-01")
def test_every_package_wheel_and_npm_module_is_in_a_bill(built: Path) -> None:
    for bill in ("debian.cdx.json", "debian.spdx.json"):
        assert {("openssh-server", "1:10.0p1-7"), ("linux-image-6.12-cloud-amd64", "6.12.10-1")} <= set(
            components(built / "sbom" / bill)
        )
    assert set(components(built / "sbom/python.cdx.json")) == {
        ("typing-extensions", "4.16.0"), ("secure-agent-workspace", "0.1.0"),
    }  # fmt: skip
    lock = json.loads((ROOT / "packer/mcp/package-lock.json").read_text(encoding="utf-8"))["packages"]
    locked = {(place.split("node_modules/")[-1], about["version"]) for place, about in lock.items() if place}
    for bill in ("npm.cdx.json", "npm.spdx.json"):
        named = set(components(built / "sbom" / bill))
        short = {(name.rpartition("/")[2], version) for name, version in named}  # CycloneDX keeps the scope apart
        assert {(name.rpartition("/")[2], version) for name, version in locked} <= short


@pytest.mark.thorough
def test_equal_inputs_give_equal_bills_and_another_seed_another_number(
    sources: Sources, built: Path, tmp_path: Path
) -> None:
    again = make_sboms(sources, tmp_path / "again", name="workspace-1", seed="1" * 64)
    named = record_of(built)["evidence"]
    assert again == {path: digest for path, digest in named.items() if path.startswith("sbom/")}
    other = make_sboms(sources, tmp_path / "other", name="workspace-1", seed="3" * 64)
    assert not set(other.values()) & set(again.values())


def test_a_tree_without_packages_gets_no_bill(sources: Sources, tmp_path: Path) -> None:
    empty = tmp_path / "tree/var/lib/dpkg"
    empty.mkdir(parents=True)
    (empty / "status").write_text("", encoding="utf-8")
    with pytest.raises(ImageError):
        make_sboms(Sources(tmp_path / "tree", sources.wheels, sources.servers), tmp_path / "out", name="x", seed="1")


@pytest.mark.control("IMG-01")
def test_provenance_names_the_image_its_inputs_and_its_bills(built: Path) -> None:
    told = json.loads((built / "provenance.json").read_bytes())
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["predicateType"] == "https://slsa.dev/provenance/v1"
    assert told["subject"] == [{"name": "workspace-1", "digest": {"sha256": digest_of(built / "image.qcow2")}}]
    resolved = {
        one["uri"]: one["digest"]["sha256"] for one in told["predicate"]["buildDefinition"]["resolvedDependencies"]
    }
    assert resolved["file:uv.lock"] == "2" * 64
    assert resolved["file:base.tar"] == digest_of(built / "base.tar")
    assert "file:typing_extensions-4.16.0-py3-none-any.whl" in resolved
    bills = {one["name"] for one in told["predicate"]["runDetails"]["byproducts"]}
    assert bills == {path for path in record_of(built)["evidence"] if path.startswith("sbom/")}


@pytest.mark.control("IMG-01")
def test_a_file_that_is_not_the_one_of_the_record_shows(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence", str(image / "release.json")]) == 0
    bill = image / "sbom/python.cdx.json"
    bill.write_text(bill.read_text(encoding="utf-8").replace("4.16.0", "4.16.1"), encoding="utf-8")
    (image / "provenance.json").unlink()
    capsys.readouterr()
    assert main(["evidence", str(image / "release.json"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == [
        "provenance.json is missing", "sbom/python.cdx.json is another file than the record names",
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd"])
def test_a_record_cannot_name_files_elsewhere(image: Path, path: str, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(image)
    record["evidence"] = {path: "0" * 64}
    (image / "release.json").write_text(json.dumps(record), encoding="utf-8")
    assert main(["evidence", str(image / "release.json")]) == 1
    assert f"{path} leads out of the image's directory" in capsys.readouterr().out


# --- vulnerabilities ---------------------------------------------------------------------------------------------------------


def found(image: Path, tmp_path: Path, **cves: dict[str, Any]) -> list[tuple[str, str]]:
    """What a search finds: number and fixing version."""
    bill = image / "sbom/debian.cdx.json"
    return [(one.cve, one.fixed_in) for one in search(bill, mirrored(tmp_path, database(**cves)), "trixie")]


def test_what_the_image_has_is_found_and_what_it_has_not_is_not(image: Path, tmp_path: Path) -> None:
    cves = {
        "CVE_2026_1": OPEN_LOW, "CVE_2026_2": FIXED, "CVE_2026_3": NEVER_THERE, "CVE_2026_4": ALREADY, "CVE_2026_5": OPEN_HIGH,
    }  # fmt: skip
    assert found(image, tmp_path, **cves) == [("CVE-2026-5", ""), ("CVE-2026-1", ""), ("CVE-2026-2", "1:10.0p1-8")]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({}, "it is not the whole database"),
        ([], "it is not the whole database"),
        ({"linux": {"CVE-1": {"releases": {"bookworm": OPEN_LOW}}}}, "knows nothing of linux in trixie"),
        ("text", "it is not the whole database"),
    ],
    ids=["empty", "a list", "another release", "a text"],
)
def test_a_database_that_says_nothing_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(ImageError, match=words):
        read_database(mirrored(tmp_path, content), "trixie", longest=timedelta(days=7), now=datetime.now(UTC))


def test_an_old_database_is_refused_and_a_new_one_is_taken(tmp_path: Path) -> None:
    path = mirrored(tmp_path, database())
    now = datetime.now(UTC)
    assert read_database(path, "trixie", longest=timedelta(days=7), now=now) == digest_of(path)
    os.utime(path, (now.timestamp() - 8 * 86_400,) * 2)
    with pytest.raises(ImageError, match="is 8 days old, more than 7"):
        read_database(path, "trixie", longest=timedelta(days=7), now=now)


def test_a_bill_of_something_else_is_not_searched(built: Path, tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="it is not a bill of an image"):
        search(built / "sbom/python.cdx.json", mirrored(tmp_path, database()), "trixie")


HIGH = Finding("CVE-2026-5", "openssh", "1:10.0p1-7", "high")
LOW = Finding("CVE-2026-1", "openssh", "1:10.0p1-7", "low")
FIX = Finding("CVE-2026-2", "openssh", "1:10.0p1-7", "low", "1:10.0p1-8")


def waiver(cve: str = "CVE-2026-5", expires: date = TODAY, package: str = "openssh") -> Waiver:
    return Waiver(cve, package, "platform", "not reachable", expires)


@pytest.mark.control("IMG-01")
@pytest.mark.parametrize(
    ("findings", "waivers", "fail_on", "problems"),
    [
        ([LOW], [], "high", []),
        ([LOW], [], "low", ["CVE-2026-1 in openssh 1:10.0p1-7 is open and its urgency is low"]),
        ([HIGH], [], "high", ["CVE-2026-5 in openssh 1:10.0p1-7 is open and its urgency is high"]),
        ([FIX], [], "high", ["CVE-2026-2 in openssh 1:10.0p1-7 is fixed in 1:10.0p1-8"]),
        ([HIGH], [waiver()], "high", []),
        ([HIGH], [waiver(package="linux")], "high", ["CVE-2026-5 in openssh 1:10.0p1-7 is open and its urgency is high"]),
        ([FIX], [waiver("CVE-2026-2")], "high", []),
        (
            [HIGH], [waiver(expires=TODAY - timedelta(days=1))], "high",
            [
                "the waiver of CVE-2026-5 in openssh (platform: not reachable) ran out on 2026-11-28",
                "CVE-2026-5 in openssh 1:10.0p1-7 is open and its urgency is high",
            ],
        ),
        (
            [], [waiver(expires=TODAY - timedelta(days=1))], "high",
            ["the waiver of CVE-2026-5 in openssh (platform: not reachable) ran out on 2026-11-28"],
        ),
    ],
    ids=["below", "at", "high", "a released fix", "waived", "waiver of another", "fix waived", "run out", "run out, not needed"],
)  # fmt: skip
def test_the_gate(findings: list[Finding], waivers: list[Waiver], fail_on: Any, problems: list[str]) -> None:
    verdict = judge(findings, waivers, fail_on=fail_on, today=TODAY)
    assert list(verdict.problems) == problems


def test_waivers_that_nothing_needs_are_named_and_bound_nothing() -> None:
    verdict = judge([LOW], [waiver()], fail_on="high", today=TODAY)
    assert (verdict.unused, verdict.waived_until) == (("CVE-2026-5 in openssh",), None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("waivers: [{cve: C, package: p, owner: o, expires: 2026-12-01}]", "reason"),
        (
            "waivers: [{cve: C, package: p, owner: ' ', reason: r, expires: 2026-12-01}]",
            "a waiver of C in p has no owner",
        ),
        ("waivers: [{cve: C, package: p, owner: o, reason: r, expires: soon}]", "expires"),
        ("waivers: []\nwaivers: []", "waivers comes twice"),
        ("a: &a []\nwaivers: *a", "aliases"),
        ("waiver: []", "waiver"),
    ],
)
def test_waivers_are_read_strictly(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "waivers.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SawError, match=words):
        read_waivers(path)


@pytest.mark.control("IMG-01")
def test_a_passed_search_is_in_the_record_and_a_failed_one_takes_it_out(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = mirrored(tmp_path, database(CVE_2026_1=OPEN_LOW))
    assert main(["scan", str(image / "release.json"), "--database", str(clean)]) == 0
    noted = record_of(image)["scan"]
    assert (noted["database_sha256"], noted["open"], noted["fail_on"]) == (digest_of(clean), 1, "high")
    (report,) = image.glob("vulnerabilities-*.json")
    assert report.name == f"vulnerabilities-{digest_of(report)[:12]}.json"
    assert record_of(image)["evidence"][report.name] == digest_of(report)
    assert [one["cve"] for one in json.loads(report.read_text(encoding="utf-8"))["open"]] == ["CVE-2026-1"]
    # The same search later is no news, so that what officers signed goes on to be the record.
    kept = {**record_of(image), "scan": {**noted, "scanned_at": "2026-11-28T00:00:00Z"}}
    (image / "release.json").write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    capsys.readouterr()
    assert main(["scan", str(image / "release.json"), "--database", str(clean), "--json"]) == 0
    assert (json.loads(capsys.readouterr().out)["changed"], record_of(image)) == (False, kept)
    bad = mirrored(tmp_path, database(CVE_2026_5=OPEN_HIGH))
    assert main(["scan", str(image / "release.json"), "--database", str(bad), "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == ["CVE-2026-5 in openssh 1:10.0p1-7 is open and its urgency is high"]
    assert "scan" not in record_of(image)
    assert not [name for name in record_of(image)["evidence"] if name.startswith("vulnerabilities")]
    failed = image / answer["report"]
    assert [one["cve"] for one in json.loads(failed.read_text(encoding="utf-8"))["open"]] == ["CVE-2026-5"]


@pytest.mark.control("IMG-01")
def test_a_later_search_leaves_the_report_that_a_signed_record_names(image: Path, tmp_path: Path) -> None:
    record, names = image / "release.json", []
    for number, (found, code) in enumerate(((OPEN_LOW, 0), (OPEN_HIGH, 1), (OPEN_HIGH, 1), (OPEN_LOW, 0))):
        place = tmp_path / str(number)
        place.mkdir()
        source = mirrored(place, database(**{f"CVE_2026_{number}": found}))
        assert main(["scan", str(record), "--database", str(source)]) == code
        names += [name for name in record_of(image)["evidence"] if name.startswith("vulnerabilities")]
        if number == 0:
            (image / "signed.json").write_bytes(record.read_bytes())  # what officers signed then
    assert len(set(names)) == len(names) == 2
    # Both passed ones are there, of those that failed none: no record names one.
    assert sorted(file.name for file in image.glob("vulnerabilities*")) == sorted(names)
    assert main(["evidence", str(image / "signed.json"), "--image-directory", str(image)]) == 0
    assert main(["evidence", str(record)]) == 0


def test_a_bill_that_was_exchanged_is_not_searched(image: Path, tmp_path: Path) -> None:
    bill = image / "sbom/debian.cdx.json"
    bill.write_text(bill.read_text(encoding="utf-8").replace("1:10.0p1-7", "1:10.0p1-9"), encoding="utf-8")
    with pytest.raises(SawError, match="is not the one that"):
        main(["scan", str(image / "release.json"), "--database", str(mirrored(tmp_path, database()))])
    assert "scan" not in record_of(image)


def test_a_signed_record_counts_no_longer_than_what_somebody_answers_for(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from saw.cli.policy import main as policy

    assert policy(["keys", "create", "--dir", str(tmp_path), "--name", "a"]) == 0
    until = datetime.now(UTC).date() + timedelta(days=3)
    waivers = tmp_path / "waivers.yml"
    entry = f"{{cve: CVE-2026-5, package: openssh, owner: platform, reason: not reachable, expires: {until}}}"
    waivers.write_text(f"waivers: [{entry}]\n", encoding="utf-8")
    data = mirrored(tmp_path, database(CVE_2026_5=OPEN_HIGH))
    assert main(["scan", str(image / "release.json"), "--database", str(data), "--waivers", str(waivers)]) == 0
    capsys.readouterr()
    arguments = ["sign", str(image / "release.json"), "--key", str(tmp_path / "a.key"), "--json"]
    assert main([*arguments, "--out", str(tmp_path / "signed.json")]) == 0
    end = datetime.fromisoformat(json.loads(capsys.readouterr().out)["not_after"])
    assert end == datetime.combine(until + timedelta(days=1), datetime.min.time(), UTC)
    assert record_of(image)["scan"]["waived"] == [f"CVE-2026-5 in openssh until {until} (platform: not reachable)"]
    assert main([*arguments, "--for", "1d", "--out", str(tmp_path / "shorter.json")]) == 0
    shorter = datetime.fromisoformat(json.loads(capsys.readouterr().out)["not_after"])
    assert shorter < end


# --- the record --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"evidence": {"sbom/debian.cdx.json": "abc"}}, "evidence"),
        ({"scan": {"database_sha256": "0" * 64}}, "scan"),
        ({"scan": {"database_sha256": "0" * 64, "scanned_at": "2026-11-29T00:00:00", "fail_on": "high", "open": 0}}, "zone"),
        ({"scan": {"database_sha256": "0" * 64, "scanned_at": "2026-11-29T00:00:00Z", "fail_on": "high", "open": -1}}, "open"),
        ({"signed": True}, "signed"),
    ],
)  # fmt: skip
def test_a_record_is_read_strictly(built: Path, change: dict[str, Any], words: str) -> None:
    record = {**record_of(built), "not_after": "2027-01-01T00:00:00Z"}
    assert parse_record(json.dumps(record).encode()).missing(["sbom", "provenance"]) == []
    assert parse_record(json.dumps(record).encode()).missing(["scan"]) == ["scan"]
    with pytest.raises(RecordInvalid, match=words):
        parse_record(json.dumps({**record, **change}).encode())
