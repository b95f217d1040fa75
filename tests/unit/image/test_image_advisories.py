"""The search for known vulnerabilities of PyPI and npm packages: what is read, what is found once, and what ends it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import zipfile
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from test_image_evidence import database, mirrored, record_of

from saw.cli.image import main
from saw.cli.image_scan import BILL
from saw.cli.patch_cves import _Gate, _packages
from saw.errors import SawError
from saw.image.advisories import LEAST, components_of, search
from saw.image.disk import ImageError, digest_of

NOW = datetime.now(UTC)
WEEK = timedelta(days=7)


def osv(
    name: str = "GHSA-1", package: str = "typing_extensions", ecosystem: str = "PyPI", **more: Any
) -> dict[str, Any]:
    """A record on ``package`` before 5.0.0, of today."""
    kind = "SEMVER" if ecosystem == "npm" else "ECOSYSTEM"
    events = [{"introduced": "0"}, {"fixed": "5.0.0"}]
    about = {"package": {"name": package, "ecosystem": ecosystem}, "ranges": [{"type": kind, "events": events}]}
    today = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"schema_version": "1.7.0", "id": name, "modified": today, "affected": [about], **more}


OTHER_NPM = osv("GHSA-npm", "nobody-has-this", "npm")
OTHER_PYPI = osv("GHSA-pypi", "nobody-has-this")


def other(number: int, age: timedelta = timedelta()) -> dict[str, Any]:
    """A record on both ecosystems that concerns nothing here."""
    about = [*OTHER_NPM["affected"], *OTHER_PYPI["affected"]]
    return {"id": f"OTHER-{number}", "modified": (NOW - age).isoformat(), "affected": about}


def exported(
    place: Path, *records: dict[str, Any], name: str = "all.zip", others: int = LEAST, age: timedelta = timedelta()
) -> Path:
    """An export as OSV lays it out, with ``others`` records of ``age`` on both ecosystems that concern nothing."""
    with zipfile.ZipFile(place / name, "w") as archive:
        for one in (*(other(number, age) for number in range(others)), *records):
            archive.writestr(f"{one['id']}.json", json.dumps(one))
    return place / name


def found(image: Path, *sources: Path, now: datetime = NOW) -> list[tuple[str, str, str]]:
    """Ecosystem, package and number of what the image has."""
    bills = [image / "sbom/python.cdx.json", image / "sbom/npm.cdx.json"]
    said = search(bills, [str(one) for one in sources], longest=WEEK, now=now)
    return [(one.ecosystem, one.package, one.cve) for one in said.findings]


def a_server(image: Path) -> str:
    """A scoped npm package of the image."""
    names = {one.name for one in components_of([image / "sbom/npm.cdx.json"])}
    return min(one for one in names if one.startswith("@"))


@pytest.mark.control("IMG-01")
def test_packages_of_the_bills_are_found_in_archives_and_folders(image: Path, tmp_path: Path) -> None:
    server = a_server(image)
    archive = exported(tmp_path, osv(aliases=["CVE-2026-10"]), osv("GHSA-2", server, "npm"))
    everything = [("npm", server, "GHSA-2"), ("pypi", "typing-extensions", "CVE-2026-10")]
    assert found(image, archive) == everything
    folder = tmp_path / "folder/deeper"
    folder.mkdir(parents=True)
    (folder / "one.json").write_text(json.dumps(osv("GHSA-3", "Typing.Extensions")), encoding="utf-8")
    assert found(image, archive, tmp_path / "folder") == [
        ("npm", server, "GHSA-2"), ("pypi", "typing-extensions", "CVE-2026-10"), ("pypi", "typing-extensions", "GHSA-3"),
    ]  # fmt: skip


def test_one_vulnerability_of_several_databases_is_found_once(image: Path, tmp_path: Path) -> None:
    ghsa = osv("GHSA-1", aliases=["CVE-2026-10"], database_specific={"severity": "LOW"})
    pysec = osv("PYSEC-2026-1", aliases=["CVE-2026-10", "GHSA-1"], database_specific={"severity": "HIGH"})
    between = osv("GHSA-9", aliases=["PYSEC-2026-1"])
    bills = [image / "sbom/python.cdx.json", image / "sbom/npm.cdx.json"]
    source = str(exported(tmp_path, ghsa, pysec, between))
    (one,) = search(bills, [source], longest=WEEK, now=NOW).findings
    assert (one.cve, one.aliases) == ("CVE-2026-10", ("GHSA-1", "GHSA-9", "PYSEC-2026-1"))
    assert (one.urgency, one.fixed_in) == ("high", "5.0.0")
    assert found(image, exported(tmp_path, osv("GHSA-1"), osv("GHSA-2"))) == [
        ("pypi", "typing-extensions", "GHSA-1"), ("pypi", "typing-extensions", "GHSA-2"),
    ]  # fmt: skip


def test_a_withdrawn_advisory_and_one_that_a_newer_record_replaces_say_nothing(image: Path, tmp_path: Path) -> None:
    assert found(image, exported(tmp_path, osv())) == [("pypi", "typing-extensions", "GHSA-1")]
    today = datetime.now(UTC).isoformat()
    assert found(image, exported(tmp_path, osv(withdrawn=today))) == []
    older = osv(modified=(NOW - timedelta(days=3)).isoformat())
    old, new = exported(tmp_path, older, name="a.zip"), exported(tmp_path, osv(withdrawn=today), name="b.zip")
    assert found(image, old, new) == found(image, new, old) == []
    back = exported(tmp_path, osv(), name="c.zip")
    gone = exported(tmp_path, {**older, "withdrawn": today}, name="d.zip")
    assert found(image, gone, back) == [("pypi", "typing-extensions", "GHSA-1")]


@pytest.mark.control("IMG-01")
def test_advisories_that_say_nothing_are_old_or_to_come_are_refused(image: Path, tmp_path: Path) -> None:
    whole = exported(tmp_path)
    assert found(image, whole) == []
    assert found(image, whole, now=NOW + timedelta(days=6)) == []
    os.utime(whole, (NOW.timestamp() + 30 * 86_400,) * 2)  # its records say how old it is, not the file
    with pytest.raises(ImageError, match="the newest advisory about npm is 8 days old, more than 7"):
        found(image, whole, now=NOW + timedelta(days=8))
    with pytest.raises(ImageError, match="which is to come"):
        found(image, whole, now=NOW - timedelta(days=2))
    (tmp_path / "one.json").write_text(json.dumps(osv()), encoding="utf-8")
    with pytest.raises(ImageError, match="no advisory given is about npm"):
        found(image, tmp_path / "one.json")


@pytest.mark.control("IMG-01")
def test_a_new_record_of_ones_own_renews_no_old_export(image: Path, tmp_path: Path) -> None:
    old = exported(tmp_path, name="old.zip", age=timedelta(days=30))
    own = tmp_path / "own"
    own.mkdir()
    (own / "one.json").write_text(json.dumps(other(9)), encoding="utf-8")
    (tmp_path / "mirror").mkdir()
    beside = exported(tmp_path / "mirror", age=timedelta(days=30))
    (tmp_path / "mirror/one.json").write_text(json.dumps(other(9)), encoding="utf-8")
    few = exported(tmp_path, name="few.zip", others=LEAST - 1)
    for sources in ((old, own), (own, old), (old, few), (beside.parent,)):
        with pytest.raises(ImageError, match="the newest advisory about npm is 30 days old"):
            found(image, *sources)
    # its twins: an old record of one's own, and an old export beside a fresh one that is larger
    (own / "one.json").write_text(json.dumps(other(9, timedelta(days=30))), encoding="utf-8")
    fresh = exported(tmp_path, name="fresh.zip", others=LEAST + 1)
    assert found(image, fresh, own) == found(image, old, fresh) == []
    # what is to come is told of the smallest, too
    (own / "one.json").write_text(json.dumps(other(9, timedelta(days=-3))), encoding="utf-8")
    with pytest.raises(ImageError, match="which is to come"):
        found(image, fresh, own)


@pytest.mark.control("IMG-01")
def test_a_few_records_are_no_search(image: Path, tmp_path: Path) -> None:
    few = [exported(tmp_path, name=f"{number}.zip", others=LEAST - 1) for number in range(2)]
    with pytest.raises(ImageError, match=f"has {LEAST - 1} advisories about npm, fewer than {LEAST}"):
        found(image, *few)
    pypi = [{**OTHER_PYPI, "id": f"P-{number}"} for number in range(5)]
    with pytest.raises(ImageError, match=f"has {LEAST - 1} advisories about npm"):
        found(image, exported(tmp_path, *pypi, others=LEAST - 1))
    assert found(image, exported(tmp_path, others=LEAST)) == []


def test_advisories_are_fetched_and_read_once_for_all_images(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, asked = exported(tmp_path, osv()).read_bytes(), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200, content=content)

    monkeypatch.setattr(
        "saw.image.advisories.https_client", lambda *_: httpx.Client(transport=httpx.MockTransport(answer))
    )
    for name in ("one", "two"):
        shutil.copytree(image / "sbom", tmp_path / "images" / name / "sbom")
    (tmp_path / "images/three/sbom").mkdir(parents=True)
    options = argparse.Namespace(
        advisories=["https://mirror.example.org/osv"], max_age="7d", images=tmp_path / "images"
    )
    gate = _Gate(tmp_path, "", "trixie", (), "high", NOW)
    known, packages = _packages(options, gate, ["one", "two", "three"])
    for name in ("one", "two"):
        assert [one.cve for one in packages(tmp_path / "images" / name / BILL)] == ["GHSA-1"]
    assert len(asked) == 2, asked
    assert known is not None and len(known.about.sha256) == 64
    with pytest.raises(ImageError, match="cannot be read as a bill"):
        packages(tmp_path / "images/three" / BILL)
    # what came to the folder after that was not looked for, and is not passed as clean
    late = json.loads((image / "sbom/npm.cdx.json").read_text(encoding="utf-8"))
    late["components"] = [{"name": "late", "version": "1.0.0", "purl": "pkg:npm/late@1.0.0"}]
    (tmp_path / "images/two/sbom/npm.cdx.json").write_text(json.dumps(late), encoding="utf-8")
    with pytest.raises(ImageError, match="no advisories were read for npm package late"):
        packages(tmp_path / "images/two" / BILL)

    content = b"no archive"
    known, packages = _packages(options, gate, ["one", "three"])
    assert known is None
    for _ in range(2):
        with pytest.raises(ImageError, match="cannot be read as an archive"):
            packages(tmp_path / "images/one" / BILL)
    assert len(asked) == 4, "a mirror that fails is asked once"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.json", b"{", "is no OSV record"),
        ("bad.json", b'{"id": "X"}', "is no OSV record"),
        (
            "bad.json",
            b'{"id": "X", "modified": "2026-11-29T00:00:00Z", "affected": [{"ranges": 3}]}',
            "is no OSV record",
        ),
        ("bad.zip", b"PK no archive", "cannot be read as an archive"),
    ],
)
def test_an_export_is_taken_whole_or_not_at_all(
    image: Path, tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    whole = exported(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=words):
        found(image, whole, tmp_path / name)


def test_a_truncated_record_of_an_archive_ends_the_search(image: Path, tmp_path: Path) -> None:
    whole = exported(tmp_path)
    raw = bytearray(whole.read_bytes())
    place = raw.index(b'"id": "OTHER-7"')
    raw[place + 8] ^= 1  # the archive's own checksum tells
    whole.write_bytes(bytes(raw))
    with pytest.raises(ImageError, match="cannot be read as an archive"):
        found(image, whole)


def test_a_place_that_is_none_is_named(image: Path, tmp_path: Path) -> None:
    for place, words in (
        (str(tmp_path / "none"), "no such file or folder"),
        (str(tmp_path / "image"), "is no OSV record"),
        ("http://mirror.example.org/osv", "is no https address"),
        ("https://127.0.0.1:9/osv", "cannot be fetched"),
    ):
        with pytest.raises(ImageError, match=words):
            search([image / "sbom/python.cdx.json"], [place], longest=WEEK, now=NOW)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ImageError, match=r"has neither \.zip nor \.json files"):
        search([image / "sbom/python.cdx.json"], [str(tmp_path / "empty")], longest=WEEK, now=NOW)


def test_a_mirror_is_asked_for_each_ecosystem(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, asked = exported(tmp_path, osv()).read_bytes(), []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(str(request.url))
        return httpx.Response(200 if "npm" in str(request.url) or len(asked) < 3 else 404, content=whole)

    monkeypatch.setattr(
        "saw.image.advisories.https_client", lambda *_: httpx.Client(transport=httpx.MockTransport(answer))
    )
    bills = [image / "sbom/python.cdx.json", image / "sbom/npm.cdx.json"]
    (one,) = search(bills, ["https://mirror.example.org/osv/"], longest=WEEK, now=NOW).findings
    assert one.package == "typing-extensions"
    assert asked == [f"https://mirror.example.org/osv/{name}/all.zip" for name in ("npm", "PyPI")]
    with pytest.raises(ImageError, match="answered 404"):
        search(bills, ["https://mirror.example.org/osv"], longest=WEEK, now=NOW)


@pytest.mark.parametrize(
    "component",
    [{"name": "x", "version": "1"}, {"name": "x", "version": "1", "purl": "pkg:deb/debian/x@1"}, {"purl": "pkg:npm/x"}],
    ids=["no address", "of Debian", "no version"],
)
def test_a_bill_that_names_something_else_is_not_searched(tmp_path: Path, component: dict[str, str]) -> None:
    bill = tmp_path / "bill.cdx.json"
    good = {"name": "y", "version": "1", "purl": "pkg:pypi/Y_y@1"}
    bill.write_text(json.dumps({"components": [good]}), encoding="utf-8")
    assert [(one.ecosystem, one.name, one.version) for one in components_of([bill])] == [("pypi", "y-y", "1")]
    bill.write_text(json.dumps({"components": [good, component]}), encoding="utf-8")
    with pytest.raises(ImageError):
        components_of([bill])


# --- the command --------------------------------------------------------------------------------------------------------------


def scan(image: Path, tmp_path: Path, *options: str) -> int:
    clean = str(mirrored(tmp_path, database()))
    return main(["scan", str(image / "release.json"), "--database", clean, "--json", *options])


@pytest.mark.control("IMG-01")
def test_a_package_with_a_released_fix_fails_and_a_waiver_lets_it_pass(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = exported(tmp_path, osv(aliases=["CVE-2026-10"]))
    assert scan(image, tmp_path, "--advisories", str(source)) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["problems"] == ["CVE-2026-10 in pypi package typing-extensions 4.16.0 is fixed in 5.0.0"]
    assert answer["searched"] == ["debian", "npm", "pypi"]
    assert "scan" not in record_of(image)

    until = NOW.date() + timedelta(days=3)
    waivers = tmp_path / "waivers.yml"
    entry = "{{cve: {}, package: typing-extensions, owner: platform, reason: not reached, expires: {}{}}}"
    for cve, more, code in (
        ("CVE-2026-10", "", 1),  # of Debian's package of that name
        ("CVE-2026-11", ", ecosystem: pypi", 1),
        ("CVE-2026-10", ", ecosystem: npm", 1),
        ("CVE-2026-10", ", ecosystem: pypi", 0),
        ("GHSA-1", ", ecosystem: pypi", 0),
    ):
        waivers.write_text(f"waivers: [{entry.format(cve, until, more)}]\n", encoding="utf-8")
        assert scan(image, tmp_path, "--advisories", str(source), "--waivers", str(waivers)) == code, (cve, more)
    noted = record_of(image)["scan"]
    assert noted["waived"] == [f"GHSA-1 in pypi package typing-extensions until {until} (platform: not reached)"]
    assert noted["waived_until"] == until.isoformat()
    waivers.write_text(f"waivers: [{entry.format('GHSA-1', '2026-11-01', ', ecosystem: pypi')}]\n", encoding="utf-8")
    capsys.readouterr()
    assert scan(image, tmp_path, "--advisories", str(source), "--waivers", str(waivers)) == 1
    assert any("ran out on 2026-11-01" in text for text in json.loads(capsys.readouterr().out)["problems"])


@pytest.mark.control("IMG-01")
def test_the_record_says_which_image_was_searched_and_by_which_advisories(image: Path, tmp_path: Path) -> None:
    assert scan(image, tmp_path, "--advisories", str(exported(tmp_path))) == 0
    noted = record_of(image)["scan"]
    assert noted["image_sha256"] == record_of(image)["image_sha256"]
    assert noted["advisories"]["records"] == {"npm": LEAST, "pypi": LEAST}
    (report,) = image.glob("vulnerabilities-*.json")
    told = json.loads(report.read_text(encoding="utf-8"))
    assert (told["image_sha256"], told["advisories"]) == (noted["image_sha256"], noted["advisories"])


def evidence(image: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    code = main(["evidence", str(image / "release.json"), "--scanned-within", "7d", "--json"])
    problems: list[str] = json.loads(capsys.readouterr().out)["problems"]
    assert code == (1 if problems else 0)
    return problems


@pytest.mark.control("IMG-01")
def test_evidence_asks_for_a_search_of_this_image_that_is_young_and_whole(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = image / "release.json"
    assert evidence(image, capsys) == ["no search for known vulnerabilities passed: saw image scan"]
    assert scan(image, tmp_path) == 0
    assert evidence(image, capsys) == ["PyPI and npm packages were not searched: saw image scan --advisories"]
    assert scan(image, tmp_path, "--advisories", str(exported(tmp_path))) == 0
    assert evidence(image, capsys) == []

    whole = record_of(image)

    def states(**changed: Any) -> None:
        file.write_text(json.dumps({**whole, "scan": {**whole["scan"], **changed}}), encoding="utf-8")

    states(scanned_at="2026-11-01T00:00:00Z")
    assert evidence(image, capsys) == [
        "the search is of 2026-11-01T00:00:00Z, which is too old or to come: saw image scan"
    ]
    # The same search again is news then, so that there is a way out.
    assert scan(image, tmp_path, "--advisories", str(tmp_path / "all.zip")) == 0
    assert evidence(image, capsys) == []
    for moment in ("2099-01-01T00:00:00Z", "2026-11-30T00:00:00", "soon"):
        states(scanned_at=moment)
        assert evidence(image, capsys) == [f"the search is of {moment}, which is too old or to come: saw image scan"]
    states(image_sha256="f" * 64)
    assert evidence(image, capsys) == ["the search does not say that it was of this image: saw image scan"]


@pytest.mark.control("IMG-01")
def test_a_report_of_another_image_shows(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scan(image, tmp_path) == 0
    (report,) = image.glob("vulnerabilities-*.json")
    told = json.loads(report.read_text(encoding="utf-8"))
    report.write_text(json.dumps({**told, "image_sha256": "f" * 64}), encoding="utf-8")
    record = record_of(image)
    record["evidence"][report.name] = digest_of(report)
    (image / "release.json").write_text(json.dumps(record), encoding="utf-8")
    assert f"{report.name} is about another image: SHA-256 {'f' * 64}" in evidence(image, capsys)


def test_a_bill_of_packages_that_was_exchanged_is_not_searched(image: Path, tmp_path: Path) -> None:
    bill = image / "sbom/python.cdx.json"
    bill.write_text(bill.read_text(encoding="utf-8").replace("4.16.0", "5.16.0"), encoding="utf-8")
    with pytest.raises(SawError, match="is not the one that"):
        scan(image, tmp_path, "--advisories", str(exported(tmp_path, osv())))
    assert scan(image, tmp_path) == 0  # it is not looked at there
