"""A host without a way to the broker's tree serves, by HTTPS, exactly what a verified archive brought."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

testinfra_hosts = ["edge"]
MIRROR = Path(__file__).resolve().parents[3] / "build/molecule/mirror"
FETCH = "curl --silent --cacert /etc/ssl/mirror/cert.pem --connect-to mirror.test:443:[::1]:443"
SERVED = "https://mirror.test/tuf"
IMPORT = (
    "/opt/saw/bin/saw policy repository-import --json --repository /var/lib/saw/policy-repository "
    "--root /etc/saw/policy-repository.root.json"
)


def listing(host) -> str:
    return host.run("find /var/lib/saw/policy-repository -type f -exec sha256sum {} + | sort").stdout


def test_the_server_runs_enabled_and_nothing_looks_for_a_broker(host):
    unit = host.service("saw-policy-repository")
    assert unit.is_running, host.run("journalctl -u saw-policy-repository --no-pager -n 50").stdout
    assert unit.is_enabled
    timer = host.service("saw-policy-mirror.timer")
    assert not timer.is_running
    assert not timer.is_enabled


@pytest.mark.control("POL-01")
def test_what_is_served_is_what_the_archive_holds(host):
    with tarfile.open(MIRROR / "policy.tar") as archive:
        held = {one.name: archive.extractfile(one).read().decode() for one in archive.getmembers() if one.isfile()}
    served = [name for name in held if name.endswith((".root.json", "timestamp.json", ".bundle.json"))]
    assert any(name.endswith(".bundle.json") for name in served)
    for name in served:
        assert host.run(f"{FETCH} --fail {SERVED}/{name}").stdout == held[name], name


def test_it_is_https_alone_and_the_key_is_no_file_of_the_server(host):
    assert host.run(f"curl --silent --fail {SERVED}/metadata/timestamp.json".replace("mirror.test", "[::1]")).rc == 60
    plain = host.run(
        "curl --silent --output /dev/null --write-out '%{http_code}' http://[::1]:443/tuf/metadata/1.root.json"
    )
    assert plain.stdout == "400"
    for path in ("/etc/ssl/mirror/key.pem", "/run/credentials/saw-policy-repository.service/key.pem"):
        assert host.run(f"setpriv --reuid nobody --clear-groups cat {path}").rc != 0, path
    report = host.run("systemd-analyze security --no-pager saw-policy-repository.service | tail -n 1").stdout
    assert float(report.split(":")[1].split()[0]) < 3.0, report


@pytest.mark.control("POL-01")
def test_an_archive_that_was_changed_on_the_way_replaces_nothing(host):
    before = listing(host)
    script = (
        "import sys, tarfile, io; old = tarfile.open(sys.argv[1]); new = tarfile.open(sys.argv[2], 'w');\n"
        "for one in old.getmembers():\n"
        "    raw = old.extractfile(one).read() if one.isfile() else b''\n"
        "    if one.name.endswith('.bundle.json'): raw = raw.replace(b'a', b'b', 1)\n"
        "    new.addfile(one, io.BytesIO(raw))\n"
        "new.close()"
    )
    archive = "/var/cache/saw-policy-repository.tar"
    host.run_expect([0], f'python3 -c "{script}" {archive} /root/changed.tar')
    refused = host.run(f"{IMPORT} /root/changed.tar")
    assert refused.rc == 1, refused.stdout
    assert listing(host) == before
    taken = host.run(f"{IMPORT} {archive}")
    assert taken.rc == 0, taken.stdout
    assert listing(host) == before
