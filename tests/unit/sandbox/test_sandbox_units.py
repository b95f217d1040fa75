"""The compiled units are accepted by systemd itself."""

from __future__ import annotations

import pytest
from test_sandbox_spec import build

from saw.runtime import sandbox_units
from saw.runtime.sandbox import SandboxError


@pytest.mark.control("RUN-03")
def test_systemd_accepts_the_units_and_refuses_a_broken_one():
    units = sandbox_units.compile_units(build(), systemd=252)
    assert set(units) == {
        "saw-shell.service",
        "saw-sandbox-net.service",
        "sandbox.slice",
        "run-saw-shell.mount",
        "run-saw-scratch-shell-tmp.mount",
        "run-saw-scratch-shell-var.mount",
        "saw-mcp-files.service",
        "saw-mcp-server-files.socket",
        "saw-mcp-server-files@.service",
    }
    sandbox_units.verify_units(units)
    broken = units["saw-shell.service"].replace("NoNewPrivileges=yes", "NoNewPrivileges=perhaps")
    with pytest.raises(SandboxError, match="Failed to parse boolean"):
        sandbox_units.verify_units({**units, "saw-shell.service": broken})


def test_private_pids_only_where_systemd_knows_it():
    assert "PrivatePIDs=yes" in sandbox_units.shell_unit(build(), systemd=257)
    assert "PrivatePIDs" not in sandbox_units.shell_unit(build(), systemd=252)


@pytest.mark.parametrize("word", ["a b", 'q"q', "$HOME", "50%"])
def test_command_words_survive_quoting(word):
    spec = build()
    from dataclasses import replace

    server = replace(spec.mcp_servers[0], command=("server", word))
    text = sandbox_units.mcp_units(spec, server)["saw-mcp-server-files@.service"]
    line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
    shown = {"a b": '"a b"', 'q"q': '"q\\"q"', "$HOME": "$$HOME", "50%": "50%%"}[word]
    assert line.endswith(shown)


def test_control_characters_cannot_reach_a_unit():
    from dataclasses import replace

    spec = build()
    with pytest.raises(SandboxError, match="control characters"):
        sandbox_units.mcp_units(spec, replace(spec.mcp_servers[0], command=("server", "x\nUser=root")))
