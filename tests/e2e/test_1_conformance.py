"""The conformance kit on the real workspace, before anybody has root in it: each attack refused for its own reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from vm_access import Workspace

from saw.conformance import catalogue

FAR_END_LOG = "build/lab/hosts/enterprise/root/var/log/nginx/arrivals.jsonl"
GIVEN = {
    "v4", "v4_number", "v4_hex", "proxy", "proxy_port", "http_proxy", "sibling", "cgroup", "beyond_tmp", "beyond_shm",
    "beyond_inodes", *(f"{name}_{part}" for name in ("allowed", "second") for part in ("host", "authority", "path")),
}  # fmt: skip
"""What the command below says about this lab. The rest needs recorders at addresses, or far ends, that it does not have."""
LEAST = {"network": 16, "sockets": 26, "addressing": 43, "http": 87, "credentials": 14, "process": 57, "files": 93}
"""Of each suite, how many cases can be tried with that: what the catalogue has, without those that need more."""


@pytest.mark.control("RUN-01")
@pytest.mark.control("RUN-02")
@pytest.mark.control("RUN-03")
@pytest.mark.control("NET-01")
@pytest.mark.control("NET-03")
def test_every_attack_of_the_kit_is_refused_for_its_own_reason_and_its_twin_works(
    workspace: Workspace, tmp_path: Path
) -> None:
    workspace.saw(
        "conformance", "run", "--target", f"workspace:{workspace.id}", "--output", str(tmp_path),
        "--proxy", "10.200.0.1:3128", "--allowed-url", "https://api.example.com/v1/items",
        "--second-url", "https://git.example.com/", "--recorder", "10.77.0.1",
        "--arrivals", str(workspace.checkout / FAR_END_LOG), check=False, timeout=900,
    )  # fmt: skip
    told = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    tried = [case for case in told["cases"] if case["result"] != "not_applicable"]
    wrong = [
        case
        for case in tried
        if case["result"] != "refused" or not case["reason_ok"] or case["twin"]["result"] == "broken"
    ]
    assert wrong == []
    assert (told["ok"], told["problems"]) == (True, [])
    ran = {case["id"] for case in tried}
    can = {case.id: case.suite for case in catalogue.attacks() if case.facts() <= GIVEN}
    assert sorted(set(can) - ran) == []
    assert {suite: list(can.values()).count(suite) for suite in LEAST} == LEAST
    web = [case for case in tried if case["suite"] == "http"]
    assert {case["twin"]["result"] for case in web} == {"works"}
    assert not [case["id"] for case in tried if case["arrived"]]
