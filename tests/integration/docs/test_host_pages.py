"""The pages on broker and perimeter hosts as they are written: a broker that serves, a perimeter before it does."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from broker_rig import Lab
from page import run_page

HERE = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.fixture
def lab() -> Iterator[Lab]:
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab = Lab(directory)
    try:
        lab.start()
        lab.workspace("ws-demo", to="attesting")
        yield lab
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.control("AUD-01")
def test_the_page_on_the_broker(lab: Lab, tmp_path: Path) -> None:
    (tmp_path / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
    places = {"/etc/saw/broker.json": str(lab.config_file), "/var/lib/saw/broker": str(lab.config.state)}
    places["/run/saw/broker/operator.sock"] = lab.config.operator_socket
    run_page(
        "docs/broker.md", tmp_path, {"SAW_CONTEXT": str(tmp_path / "context.json"), "PATH": HERE}, lambda _: {}, places
    )
    copy = json.loads((tmp_path / "copy.json").read_text())
    assert copy["complete"] is True
    events = (tmp_path / "trail.jsonl").read_text().splitlines()
    assert sum(chain["events"] for chain in copy["chains"]) == len(events) > 0
    with closing(sqlite3.connect(tmp_path / "broker-copy.db")) as store:
        assert [row[0] for row in store.execute("SELECT id FROM workspaces")] == ["ws-demo"]
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert (tmp_path / "keys" / "x509" / "ca.pem").read_bytes() == lab.ca_file.read_bytes()


@pytest.mark.control("NET-01")
def test_the_page_on_the_perimeter(tmp_path: Path) -> None:
    def place(name: str) -> str:
        return str(tmp_path / name)

    ring2 = {name: place(name) for name in ("xds_dir", "tls_dir", "send_socket")} | {
        "upstream_ca_file": "/etc/ssl/certs/ca-certificates.crt",
        "ingress_address": "127.0.0.1",
        "broker_address": "10.0.0.3:8443",
        "envoy": str(Path(sys.executable).with_name("envoy")),
    }
    files = (
        "ca_file",
        "cert_file",
        "key_file",
        "tuf_root_file",
        "state_dir",
        "authz_socket",
        "review_socket",
        "credentials_dir",
    )
    config = {name: place(name) for name in files} | {"name": "edge", "broker_url": "https://broker.saw.internal:8443"}
    config_file = tmp_path / "gatekeeper.json"
    config_file.write_text(json.dumps({**config, "ring2": {**ring2, "xds_dir": place("xds")}}))
    run_page(
        "docs/perimeter.md", tmp_path, {"PATH": HERE}, lambda _: {}, {"/etc/saw/gatekeeper.json": str(config_file)}
    )
    rules = (tmp_path / "saw.nft").read_text()
    assert "table inet saw" in rules and "policy drop" in rules
    assert (tmp_path / "key_file").stat().st_mode & 0o777 == 0o600
