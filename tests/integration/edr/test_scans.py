"""The scans, with the real clamscan and the real aide: what is found, and the harmless twin that is not."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from edr_rig import EICAR, Host

from saw.edr.packages import packages_of
from saw.edr.scan import scan
from saw.edr.service import factory_of
from saw.edr.store import Store

pytestmark = pytest.mark.control("P0-03")


@pytest.fixture
def scanned(host: Host) -> Host:
    """A host with an integrity database and one scan behind it."""
    assert host.saw("integrity", "--init").returncode == 0
    done = host.saw("scan", "--json")
    assert (done.returncode, json.loads(done.stdout)["new"]) == (0, []), done.stdout + done.stderr
    return host


def test_the_eicar_file_is_found_under_any_name_and_other_text_is_not(scanned: Host) -> None:
    home = scanned.root / "home/ann"
    names = ["eicar.com", "name with a\nline", "ümlaut", "a: Test.Eicar FOUND"]
    for name in names:
        (home / name).write_bytes(EICAR)
    (home / os.fsdecode(b"not-utf8-\xff")).write_bytes(EICAR)
    (home / "harmless.com").write_bytes(EICAR.replace(b"7CC", b"8CC"))
    (home / "about.txt").write_bytes(b"EICAR is a test file\n")
    done = scanned.saw("scan", "--json")
    assert done.returncode == 0, done.stdout
    told = sorted(scanned.subjects("malware"))
    assert told == sorted(f"/home/ann/{name}" for name in ["eicar.com", "name with a\\nline", "ümlaut",
                                                           "a: Test.Eicar FOUND", "not-utf8-\\udcff"])  # fmt: skip
    assert {one.event["unmapped"]["saw"]["signature"] for one in scanned.found("malware")} == {"Test.Eicar.UNOFFICIAL"}
    again = json.loads(scanned.saw("scan", "--json", "--all").stdout)
    assert (again["new"], again["files"]) == ([], 7), "the same files were reported again"


def test_what_cannot_be_read_is_a_problem_until_it_was_looked_at_and_the_rest_is_found(scanned: Host) -> None:
    """A scanner without the right to read private files stands for whatever keeps it from them."""
    malware = msgspec.to_builtins(scanned.config.malware)
    blind = scanned.folder / "blind-clamscan"
    blind.write_text(
        f'#!/bin/sh\nexec setpriv --bounding-set=-dac_override,-dac_read_search {malware["clamscan"]} "$@"\n'
    )
    blind.chmod(0o755)
    scanned.configure(malware={**malware, "clamscan": str(blind)})
    home = scanned.root / "home/ann"
    (home / "open.com").write_bytes(EICAR)
    (home / "private.com").write_bytes(EICAR)
    (home / "private.com").chmod(0o600)
    os.chown(home / "private.com", 4711, 4711)
    for _ in range(2):
        done = scanned.saw("scan")
        assert done.returncode == 1
        assert "malware: 1 of 2 files could not be looked at, the first is" in done.stdout
        assert scanned.subjects("malware") == ["/home/ann/open.com"]
    scanned.configure(malware=malware)
    assert scanned.saw("scan").returncode == 0
    assert scanned.subjects("malware") == ["/home/ann/open.com", "/home/ann/private.com"]


def test_what_lay_there_before_new_signatures_is_scanned_again(scanned: Host) -> None:
    (scanned.root / "tmp/old").write_bytes(b"only new signatures know this")
    assert json.loads(scanned.saw("scan", "--json").stdout)["new"] == []
    signatures = scanned.folder / "signatures/test.ndb"
    signatures.write_text(f"Test.New:0:*:{b'only new signatures'.hex()}\n")
    assert len(json.loads(scanned.saw("scan", "--json").stdout)["new"]) == 1
    assert scanned.subjects("malware") == ["/tmp/old"]


def test_a_changed_system_binary_is_found_once_and_a_touched_one_is_not(scanned: Host) -> None:
    tool = scanned.root / "usr/bin/tool"
    os.utime(tool, (1, 1))
    tool.write_bytes(tool.read_bytes())
    assert json.loads(scanned.saw("scan", "--json").stdout)["differences"] == 0
    tool.write_bytes(Path("/bin/false").read_bytes())
    (scanned.root / "usr/bin/extra").write_bytes(b"#!")
    for _ in range(2):
        assert json.loads(scanned.saw("scan", "--json").stdout)["differences"] == 2
    assert scanned.subjects("system_file_changed") == ["/usr/bin/extra", "/usr/bin/tool"]
    assert {one.event["severity"] for one in scanned.found("system_file_changed")} == {"High"}


def test_differences_are_accepted_under_the_digest_that_was_shown_and_under_no_other(scanned: Host) -> None:
    tool = scanned.root / "usr/bin/tool"
    tool.write_bytes(Path("/bin/false").read_bytes())
    shown = scanned.saw("integrity", "--json")
    assert shown.returncode == 1
    digest = json.loads(shown.stdout)["digest"]
    assert scanned.saw("integrity", "--init").returncode == 1, "a first database was made again"
    (scanned.root / "usr/bin/slipped-in").write_bytes(b"#!")
    refused = scanned.saw("integrity", "--accept", digest)
    assert refused.returncode == 1
    assert "the differences are not those of" in refused.stderr
    assert json.loads(scanned.saw("integrity", "--json").stdout)["added"], "a refused digest was taken"
    digest = json.loads(scanned.saw("integrity", "--json").stdout)["digest"]
    assert scanned.saw("integrity", "--accept", digest).returncode == 0
    assert scanned.saw("integrity").stdout == "no differences\n"


def test_a_difference_that_went_and_comes_again_in_the_same_second_is_a_second_finding(scanned: Host) -> None:
    tool = scanned.root / "usr/bin/tool"
    right = tool.read_bytes()
    config = scanned.config
    begin = datetime.now(UTC).replace(microsecond=0)
    store = Store(config.state, config.spool_limit)
    try:
        for step, content in enumerate((b"other", right, b"other")):
            tool.write_bytes(content)
            moment = begin.replace(microsecond=step)
            assert not scan(config, store, factory_of(), lambda at=moment: at).problems
    finally:
        store.close()
    assert scanned.subjects("system_file_changed") == ["/usr/bin/tool"] * 2


def test_a_file_that_is_as_its_package_says_is_explained_and_another_is_not(tmp_path: Path) -> None:
    there = "/usr/bin/env"
    assert packages_of([there, str(tmp_path / "unknown")]) == {there: "coreutils"}
    (tmp_path / "coreutils.md5sums").write_text(f"{'0' * 32}  usr/bin/env\n")
    assert packages_of([there], tmp_path) == {}, "its content is another"


def test_without_signatures_or_database_a_scan_fails_with_the_cure_and_the_rest_is_done(host: Host) -> None:
    (host.folder / "signatures/test.hdb").unlink()
    done = host.saw("scan")
    assert done.returncode == 1
    assert "there are no signatures in" in done.stdout
    assert "saw edr integrity --init" in done.stdout
    host.saw("integrity", "--init")
    (host.root / "usr/bin/tool").write_bytes(b"other")
    assert host.saw("scan").returncode == 1
    assert host.subjects("system_file_changed") == ["/usr/bin/tool"]
