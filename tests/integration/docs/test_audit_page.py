"""docs/audit.md as it is written: a broker, an rsyslog set up as the page says, a forwarder, a tree and a witness."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from broker_rig import Lab
from page import run_page
from siem_rig import Forwarder, Siem

from saw.audit.otlp import Records
from saw.cli.main import main

HERE = f"{Path(sys.executable).parent}:/usr/sbin:/usr/bin:/sbin:/bin"


@pytest.mark.control("P0-05")
@pytest.mark.control("AUD-02")
def test_the_page_on_the_audit_trail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab, siem = Lab(directory), Siem(tmp_path / "siem")
    forwarder = Forwarder(siem.settings(lab, tmp_path / "ship"))
    try:
        lab.start()
        siem.start()
        lab.workspace("ws-demo", to="attesting")
        end = lab.operator.request("GET", "/v1/audit/log?limit=1")["end"]
        forwarder.start()
        forwarder.until(lambda: forwarder.cursor()["position"] == end, "not everything is shipped")
        desk = tmp_path / "desk"
        desk.mkdir()
        (desk / "audit.log").symlink_to(siem.file)
        exports = [Records().message(one, at, "", "host", 1 << 20) for at, one in enumerate(siem.events(), 1)]
        (desk / "logs.json").write_bytes(b'{"resourceLogs":[' + b",".join(exports) + b"]}\n")
        context = tmp_path / "context.json"
        context.write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        places = {"/etc/saw/audit.json": str(forwarder.config), "/run/saw/broker/audit.sock": lab.config.audit_socket}
        printed = run_page("docs/audit.md", desk, {"SAW_CONTEXT": str(context), "PATH": HERE}, places=places)
    finally:
        forwarder.stop()
        if siem.process is not None:
            siem.kill()
        lab.stop()
        shutil.rmtree(directory)
    assert any('"workspace":"ws-demo"' in text or "ws-demo" in text for text in printed)
    assert len((desk / "trail.jsonl").read_text().splitlines()) == end
    signed = [
        "--checkpoint",
        str(desk / "witnessed"),
        "--key",
        str(desk / "log.key.pub"),
        "--tiles",
        str(desk / "tiles"),
    ]
    assert main(["audit", "verify", *signed, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == end
