"""docs/drift.md as it is written: its command shows a report, and its waivers are a file of waivers."""

from __future__ import annotations

import os
import re
import sys
from datetime import UTC, datetime
from pathlib import Path

from page import ROOT, run_page

from saw.drift.look import Seen
from saw.drift.observed import Changed, Lost
from saw.drift.report import judge, read_waivers, write_report

MODULE = "secure_agent.workspace.component"
BROKER = Changed("control1", "", "broker", "Configure", MODULE, "/etc/saw/broker.json", hidden=False, applied=False)
WORDS = ("Configure the packet filter", MODULE, "/etc/nftables.conf")
FILTER = Changed("edge1", "", "perimeter", *WORDS, hidden=False, applied=False)
AWAY = Lost("edge2", "Perimeter", "", "", MODULE, "unreachable")


def test_the_page_shows_a_report_and_its_waivers_are_taken(tmp_path: Path) -> None:
    page = (ROOT / "docs/drift.md").read_text(encoding="utf-8")
    waivers = re.search(r"^```yaml\n(waivers:.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert waivers is not None
    (tmp_path / "waivers.yml").write_text(waivers[1])
    seen = Seen(
        playbook="secure_agent.workspace.control_plane", hosts=("control1", "edge1", "edge2"), missed=(),
        changed=(BROKER, FILTER), lost=(AWAY,), blind=(), problems=(),
    )  # fmt: skip
    write_report(tmp_path / "report.json", judge([seen], read_waivers(tmp_path / "waivers.yml"), datetime.now(UTC)))
    run_page("docs/drift.md", tmp_path, {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
