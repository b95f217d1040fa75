"""docs/break-glass.md as it is written: its setting is taken, its commands break and look after, its tables are the code's."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from broker_rig import Lab, cli, running_broker
from page import ROOT, run_page

from databases import beside
from saw.broker.break_glass import OWED
from saw.broker.break_glass_settings import BreakGlassSettings
from saw.policy.keys import create_key

PAGE = (ROOT / "docs/break-glass.md").read_text(encoding="utf-8")
SETTING = yaml.safe_load(PAGE.partition("```yaml\n")[2].partition("```")[0])["broker_break_glass"]
POLICY = "a" * 64


def waiting(lab: Lab, workspace: str) -> str:
    """Open a review as the perimeter does and return its id."""
    asked = {
        "workspace_id": workspace, "policy_digest": POLICY, "group": "maintainers", "quorum": 1, "expires_in_s": 3600,
        "call": {"method": "POST", "scheme": "https", "host": "pay.example.com", "port": 443, "path": "/run"},
    }  # fmt: skip
    with lab.tls("perimeter", "edge") as client:
        answer = client.post("/v1/perimeter/reviews", json=asked)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])


@pytest.mark.control("REV-02")
def test_the_page_breaks_the_glass_and_looks_at_it_afterwards(tmp_path: Path) -> None:
    with running_broker(break_glass=BreakGlassSettings(**SETTING)) as lab:
        for name in ("ws-demo", "ws-other"):
            lab.workspace(name, to="attesting")
        with beside(lab.config) as store:
            lease = "2099-01-01T00:00:00.000Z"
            store.execute(
                "UPDATE workspaces SET state = 'active', lease_expires_at = ?, policy_digest = ?", (lease, POLICY)
            )
        for name, group in (("dora", SETTING["group"]), ("emil", SETTING["group"]), ("ben", "maintainers")):
            create_key(tmp_path, name)
            body = {"groups": [group], "public_key": (tmp_path / f"{name}.pub").read_text()}
            lab.operator.request("PUT", f"/v1/reviewers/{name}@example.com", body)
        review, other = waiting(lab, "ws-demo"), waiting(lab, "ws-other")
        for name in ("dora", "emil"):
            key = str(tmp_path / f"{name}.key")
            done = cli(lab, "review", "break-glass", other, "--key", key, "--comment", "before", "--yes")
            assert done.returncode == 0, done.stderr
        (tmp_path / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        told = {"SAW_CONTEXT": str(tmp_path / "context.json"), "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        run_page("docs/break-glass.md", tmp_path, {**told, "REVIEW": review, "OTHER": other})
        found = lab.operator.request("GET", "/v1/reviews")["reviews"]
    assert {one["id"]: one["after_state"] for one in found} == {review: "upheld", other: "rejected"}


def rows(heading: str) -> list[str]:
    """Return the names in the first column of the table whose first heading is ``heading``."""
    table = PAGE.partition(f"\n| {heading} |")[2].partition("\n\n")[0]
    return [
        name
        for cell in re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
        for name in re.findall(r"`([a-z_]+)`", cell)
    ]


def test_the_page_names_every_field_state_finding_and_refusal() -> None:
    assert rows("field") == list(BreakGlassSettings.__struct_fields__)
    assert set(rows("`after_state`")) == OWED | {"upheld", "rejected"}
    source = (ROOT / "src/saw/broker/break_glass.py").read_text(encoding="utf-8")
    kinds = {name.lower() for name in re.findall(r"Kind\.([A-Z_]+), (?:title|\")", source)}
    assert set(rows("`finding_info.types`")) == kinds
    assert set(re.findall(r'code="([a-z_]+)"', source)) <= set(rows("code"))
