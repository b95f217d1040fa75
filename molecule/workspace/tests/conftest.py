"""A policy generation in force, for the tests that need the sandbox."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

POLICY = Path(__file__).parents[3] / "policies/coding"
SWITCH = (
    "/opt/saw/bin/python -c 'import pathlib; from saw.runtime.generation import switch; "
    'switch(pathlib.Path("/run/saw/generations"), "one")\''
)
UNITS = "saw-shell.service saw-mcp-files.service saw-mcp-server-files.socket"


@pytest.fixture(scope="module")
def generation(host):
    """Switch to a generation of the example policy by what policyd does it with; take it all down again at the end."""
    policy = (POLICY / "policy.yaml").read_text().replace("hard_requirement", "best_effort")
    governance = (
        (POLICY / "governance.yaml").read_text().replace("minimum_abi: 4", "minimum_abi: 4, allow_best_effort: true")
    )
    host.run_expect([0], "mkdir -p /run/saw/generations/one /run/saw/sandbox && touch /run/saw/sandbox/ca-bundle.pem")
    for name, text in (("policy.yaml", policy), ("governance.yaml", governance)):
        encoded = base64.b64encode(text.encode()).decode()
        host.run_expect([0], f"echo {encoded} | base64 -d > /run/saw/generations/one/{name}")
    host.run_expect([0], SWITCH)
    up = host.run("timeout 60 sh -c 'until saw run -- true 2>/dev/null; do :; done'")
    assert up.rc == 0, host.run("journalctl -u saw-shell -u saw-sandbox-apply --no-pager -n 40").stdout
    yield
    host.run(f"systemctl stop --no-block {UNITS}; systemctl kill --signal=KILL {UNITS}; systemctl stop {UNITS}")
    host.run("rm -rf /run/saw/generations /run/systemd/system/*saw-* /run/systemd/system/sandbox.slice")
    host.run("systemctl daemon-reload; systemctl reset-failed")
