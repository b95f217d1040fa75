"""Always-on agents: what the policy may say, the unit it compiles to, and its end when the policy has it no longer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_sandbox_spec import ACCOUNT, POLICY

from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_governance, load_members, load_policy
from saw.policy.openshell_runtime import plan
from saw.policy.reach_diff import diff_bundles
from saw.runtime import sandbox_bounds, sandbox_prepare, sandbox_units
from saw.runtime.limits import SLICE
from saw.runtime.sandbox import SandboxError, compile_spec, encode_launch

pytestmark = pytest.mark.control("RUN-03")
HEAD = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\nlandlock: {minimum_abi: 6}\n"
TRIAGE = "{triage: {command: [/usr/bin/triage, --watch], restart: on-failure}}"


def governance(agents: str) -> bytes:
    return f"{HEAD}sandbox: {{agents: {agents}}}\n".encode()


def policy() -> bytes:
    return POLICY.format(read_only="", read_write="", compatibility="hard_requirement").encode()


def build(agents: str = TRIAGE):
    return compile_spec(load_policy(policy()), load_governance(governance(agents)), account=ACCOUNT)


def bundle(agents: str) -> Bundle:
    return load_members({"policy.yaml": policy(), "governance.yaml": governance(agents)})


@pytest.mark.parametrize(
    ("refused", "why", "allowed"),
    [
        ("{triage: {command: [triage]}}", "absolute path", "{triage: {command: [/usr/bin/triage]}}"),
        ("{triage: {command: []}}", "absolute path", "{triage: {command: [/opt/a]}}"),
        ("{triage: {command: [/usr/../x]}}", "absolute path", "{triage: {command: [/usr/..x]}}"),
        ('{triage: {command: ["/usr/bin/a b"]}}', "absolute path", '{triage: {command: [/usr/bin/a, "a b"]}}'),
        (
            '{triage: {command: [/bin/a, "x\\nUser=root"]}}',
            "control characters",
            '{triage: {command: [/bin/a, "%h $HOME"]}}',
        ),
        ("{Triage: {command: [/bin/a]}}", "not the name", "{t: {command: [/bin/a]}}"),
        ("{a-: {command: [/bin/a]}}", "not the name", "{a-b: {command: [/bin/a]}}"),
        ("{a@b: {command: [/bin/a]}}", "not the name", "{a1: {command: [/bin/a]}}"),
        (f"{{{'a' * 33}: {{command: [/bin/a]}}}}", "not the name", f"{{{'a' * 32}: {{command: [/bin/a]}}}}"),
        ("{a: {command: [/bin/a], restart: sometimes}}", "restart", "{a: {command: [/bin/a], restart: no}}"),
        ("{a: {command: [/bin/a], user: root}}", "user", "{a: {command: [/bin/a], restart: always}}"),
        (
            "{" + ", ".join(f"a{n}: {{command: [/bin/a]}}" for n in range(17)) + "}",
            "more than 16 agents",
            "{" + ", ".join(f"a{n}: {{command: [/bin/a]}}" for n in range(16)) + "}",
        ),
    ],
)
def test_what_is_no_agent_is_refused(refused: str, why: str, allowed: str) -> None:
    with pytest.raises(PolicyError, match=why):
        load_governance(governance(refused))
    load_governance(governance(allowed))


def test_an_agent_has_a_unit_with_the_shells_confinement_and_bounds() -> None:
    spec = build()
    units = sandbox_units.compile_units(spec)
    lines = units["saw-agent@triage.service"].splitlines()
    for line in (
        "Requires=saw-sandbox-net.service",
        "ConditionPathExists=/run/saw/generations/current/policy.yaml",
        "Restart=on-failure",
        "RestartSteps=8",
        "RestartMaxDelaySec=5min",
        "StartLimitIntervalSec=0",
        f"Slice={SLICE}",
        "OOMPolicy=continue",
        "NetworkNamespacePath=/run/netns/saw-sandbox",
        "User=agent",
        "BindPaths=/run/saw/scratch/agent-triage/tmp:/tmp",
    ):
        assert line in lines, line
    assert not [line for line in lines if "/run/saw/shell" in line], "commands sent there run in the main sandbox"
    assert "/run/saw/shell" in spec.shell_launch().read_write
    assert "/run/saw/shell" not in spec.agent_launch().read_write
    start = next(line for line in lines if line.startswith("ExecStart="))
    assert "saw.runtime.launcher --launch /run/saw/sandbox/agent-triage.json -- " in start
    assert start.endswith("/agent_init.py /usr/bin/triage --watch")
    shell = units["saw-shell.service"].splitlines()
    own = ("ExecStart", "Restart", "Description", "RequiresMountsFor", "BindPaths", "WantedBy", "[Install]")
    assert {x for x in shell if not x.startswith(own)} <= set(lines), "what confines the shell confines the agent"
    assert sandbox_units.compile_launch_files(spec)["agent-triage.json"] == encode_launch(spec.agent_launch())
    sandbox_units.verify_units(sandbox_units.compile_units(spec, systemd=252))
    assert "RestartSteps" not in sandbox_units.agent_unit(spec, spec.agents[0], systemd=252)


def test_the_mounts_of_names_with_dashes_are_named_as_systemd_wants_it() -> None:
    spec = build("{night-watch: {command: [/bin/a]}}")
    units = sandbox_units.compile_units(spec, systemd=252)
    name = "run-saw-scratch-agent\\x2dnight\\x2dwatch-tmp.mount"
    assert sandbox_bounds.mount_name("/run/saw/scratch/agent-night-watch/tmp") == name
    assert "Where=/run/saw/scratch/agent-night-watch/tmp" in units[name]
    sandbox_units.verify_units(units)


class Machine:
    """Units and launch files as `saw sandbox prepare` leaves them, and what is stopped."""

    def __init__(self, folder: Path) -> None:
        self.units, self.launches = folder / "units", folder / "launches"
        self.units.mkdir()
        self.launches.mkdir()
        self.stopped: list[str] = []

    def write(self, spec) -> None:
        for name, text in sandbox_units.compile_units(spec).items():
            (self.units / name).write_text(text)
        for name, content in sandbox_units.compile_launch_files(spec).items():
            (self.launches / name).write_bytes(content)

    def retire(self, spec) -> list[str]:
        self.stopped.clear()
        places = {"launch_directory": str(self.launches), "unit_directory": str(self.units)}
        removed = sandbox_prepare.retire(spec, self.stopped.extend, **places)
        return sorted(Path(path).name for path in removed)


def test_an_agent_that_left_the_policy_is_stopped_and_removed(tmp_path: Path) -> None:
    machine, both = Machine(tmp_path), build("{triage: {command: [/bin/a]}, other: {command: [/bin/b]}}")
    machine.write(both)
    (machine.units / "saw-agent@of-others.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert (machine.retire(both), machine.stopped) == ([], [])
    one = replace(both, agents=tuple(agent for agent in both.agents if agent.name == "other"))

    def fail(_: list[str]) -> None:
        raise SandboxError("told to")

    with pytest.raises(SandboxError):
        sandbox_prepare.retire(one, fail, launch_directory=str(machine.launches), unit_directory=str(machine.units))
    assert (machine.units / "saw-agent@triage.service").exists()
    assert machine.retire(one) == [
        "agent-triage.json",
        "run-saw-scratch-agent\\x2dtriage-tmp.mount",
        "run-saw-scratch-agent\\x2dtriage-var.mount",
        "saw-agent@triage.service",
    ]
    assert "saw-agent@triage.service" in machine.stopped
    assert not [name for name in machine.stopped if "other" in name]
    for kept in ("saw-agent@other.service", "saw-agent@of-others.service", "saw-shell.service"):
        assert (machine.units / kept).exists()
    assert {path.name for path in machine.launches.iterdir()} == {"agent-other.json", "shell.json", "apt.conf"}


@pytest.mark.parametrize("change", ["command", "restart", "files"])
def test_an_agent_that_the_policy_has_otherwise_is_stopped_to_be_started_anew(tmp_path: Path, change: str) -> None:
    machine, before = Machine(tmp_path), build("{triage: {command: [/bin/a]}, other: {command: [/bin/b]}}")
    machine.write(before)
    other, triage = before.agents
    after = {
        "command": replace(before, agents=(other, replace(triage, command=("/bin/c",)))),
        "restart": replace(before, agents=(other, replace(triage, restart="no"))),
        "files": replace(before, read_only=(*before.read_only, "/srv/data")),
    }[change]
    assert machine.retire(after) == []
    wanted = {"saw-agent@triage.service"} | ({"saw-agent@other.service"} if change == "files" else set())
    assert set(machine.stopped) == wanted
    machine.write(after)
    assert (machine.retire(after), machine.stopped) == ([], [])


def gained(old: str, new: str) -> list[tuple[str, str, str]]:
    return [(one.what, one.why, str(one.risk)) for one in diff_bundles(bundle(old), bundle(new)).gained]


def test_a_new_agent_or_another_command_is_a_widening() -> None:
    shown = "sandbox.agents[triage]: ['/usr/bin/triage', '--watch'], restart on-failure"
    assert gained("{}", TRIAGE) == [(shown, "was no such agent", "medium")]
    assert gained(TRIAGE, "{}") == []
    assert gained(TRIAGE, TRIAGE) == []
    assert len(gained(TRIAGE, TRIAGE.replace("--watch", "--all"))) == 1
    assert len(gained(TRIAGE, TRIAGE.replace("on-failure", "always"))) == 1
    assert gained(TRIAGE, TRIAGE.replace("on-failure", "no")) == []


def test_openshell_does_not_leave_an_agent_out_in_silence() -> None:
    accepted = ("governance.persistence",)
    with pytest.raises(PolicyError, match=r"governance\.sandbox\.agents\.triage"):
        plan(bundle(TRIAGE), accept=accepted)
    plan(bundle(TRIAGE), accept=(*accepted, "governance.sandbox.agents.triage"))
