"""Always-on agents: what the policy may say, the unit it compiles to, and its end when the policy has it no longer."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from test_sandbox_spec import ACCOUNT, POLICY

from saw.cli import sandbox as cli
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_governance, load_members, load_policy
from saw.policy.openshell_runtime import plan
from saw.policy.reach_diff import diff_bundles
from saw.runtime import sandbox, sandbox_agents, sandbox_bounds, sandbox_prepare, sandbox_units
from saw.runtime.generation import switch
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


class Starts:
    """What `saw sandbox start-agents` starts beside a :class:`Machine`."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.fail = machine, ""
        self.record = machine.units.parent / "started.json"

    def __call__(self, spec, digest: str = "a" * 64) -> list[str]:
        asked = []

        def start(unit: str) -> None:
            asked.append(unit.removeprefix("saw-agent@").removesuffix(".service"))
            if asked[-1] == self.fail:
                raise SandboxError(f"{unit}: told to")

        places = {"launch_directory": str(self.machine.launches), "unit_directory": str(self.machine.units)}
        if self.fail:
            with pytest.raises(SandboxError, match="told to"):
                sandbox_agents.start_agents(spec, digest, start, **places, record=self.record)
        else:
            sandbox_agents.start_agents(spec, digest, start, **places, record=self.record)
        return asked


THREE = "{ever: {command: [/bin/a]}, mended: {command: [/bin/b], restart: on-failure}, once: {command: [/bin/c], restart: no}}"


def test_an_agent_that_ended_is_started_again_by_a_policy_a_boot_or_another_unit_and_by_nothing_else(
    tmp_path: Path,
) -> None:
    machine, spec = Machine(tmp_path), build(THREE)
    machine.write(spec)
    starts = Starts(machine)
    assert starts(spec) == ["ever", "mended", "once"]
    assert starts(spec) == starts(spec) == ["ever"], "files that come and go beside the generation start nobody"
    assert starts(spec, "b" * 64) == ["ever", "mended", "once"], "another policy comes into force"
    ever, mended, once = spec.agents
    other = replace(spec, agents=(ever, mended, replace(once, command=("/bin/d",))))
    machine.write(other)
    assert starts(other, "b" * 64) == ["ever", "once"]
    assert starts(replace(other, agents=(ever, mended)), "b" * 64) == ["ever"]
    assert starts(other, "b" * 64) == ["ever", "once"], "it was gone in between"
    for broken in (b"", b"[]", b'{"a": 1}'):
        starts.record.write_bytes(broken)
        assert starts(other, "b" * 64) == ["ever", "mended", "once"]
    starts.record.unlink()
    assert starts(other, "b" * 64) == ["ever", "mended", "once"], "after a boot the record is gone"


def test_a_start_that_systemd_refuses_is_tried_again_and_holds_up_no_other(tmp_path: Path) -> None:
    machine, spec = Machine(tmp_path), build(THREE)
    machine.write(spec)
    starts = Starts(machine)
    starts.fail = "mended"
    assert starts(spec) == ["ever", "mended", "once"]
    starts.fail = ""
    assert starts(spec) == ["ever", "mended"]
    (machine.units / "saw-agent@once.service").unlink()
    with pytest.raises(SandboxError, match="is not prepared"):
        starts(spec)


def test_the_command_starts_agents_of_the_generation_in_force_without_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, spec = Machine(tmp_path), build()
    machine.write(spec)
    (tmp_path / ("c" * 64)).mkdir()
    (tmp_path / "current").symlink_to("c" * 64)
    loaded: list[Path] = []
    monkeypatch.setattr(sandbox, "load_spec", lambda place: loaded.append(place) or spec)
    places = {"launch_directory": str(machine.launches), "record": tmp_path / "started.json"}
    keywords = {**sandbox_agents.start_agents.__kwdefaults__, **places}
    monkeypatch.setattr(sandbox_agents.start_agents, "__kwdefaults__", keywords)
    program = tmp_path / "systemctl"
    program.write_text('#!/bin/sh\necho "$@" >>"${0%/*}/asked"\nexit $(cat "${0%/*}/code")\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    words = ["start-agents", "--json", "--generation", str(tmp_path / "current"), "--units", str(machine.units)]
    (tmp_path / "code").write_text("1")
    with pytest.raises(SandboxError, match=r"did not start saw-agent@triage\.service"):
        cli.main(words)
    (tmp_path / "code").write_text("0")
    assert [cli.main(words), cli.main(words)] == [0, 0]
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == 2 * ["start --no-block -- saw-agent@triage.service"]
    assert set(loaded) == {tmp_path / ("c" * 64)}


ROLES = Path(__file__).resolve().parents[3] / "roles"
APPLY = ROLES / "sandbox/templates/saw-sandbox-apply.service.j2"
HAND_OVER = ROLES / "runtime_openshell/templates/saw-openshell-apply.service.j2"


def policy_in_force(generations: Path, name: str = "d" * 64) -> None:
    (generations / name).mkdir(parents=True)
    (generations / name / "policy.yaml").touch()
    switch(generations, name)


def applied(template: Path, place: Path) -> subprocess.CompletedProcess[bytes]:
    """Run what the unit runs, with the programs in ``place``."""
    text = template.read_text()
    script = text[text.index("'rm") + 1 : text.rindex("'")].replace("\\\n", "\n").replace("$$", "$")
    for theirs, ours in (
        ("/run/saw/generations", place / "generations"),
        ("/run/systemd/system", place / "units"),
        ("/opt/saw/bin/saw", place / "saw"),
    ):
        script = script.replace(theirs, str(ours))
    return subprocess.run(["/bin/sh", "-ec", script], check=False, timeout=60, env={"PATH": f"{place}:/usr/bin:/bin"})


@pytest.mark.parametrize("fails", ["", "prepare", "start-agents", "saw-shell.service"])
def test_an_apply_starts_agents_by_their_own_command_and_fails_with_any_part(tmp_path: Path, fails: str) -> None:
    policy_in_force(tmp_path / "generations")
    (tmp_path / "units").mkdir()
    for name in (
        "saw-agent@a.service",
        "saw-mcp-git.service",
        "saw-mcp-server-git@.service",
        "saw-mcp-server-git.socket",
    ):
        (tmp_path / "units" / name).touch()
    for name in ("saw", "systemctl"):
        place = tmp_path / name
        place.write_text(
            f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\ncase " $* " in *" {fails or "never"} "*) exit 1;; esac\n'
        )
        place.chmod(0o755)
    done = applied(APPLY, tmp_path)
    steps = [
        "saw sandbox prepare",
        "systemctl daemon-reload",
        "saw sandbox start-agents",
        "systemctl start -- saw-shell.service saw-mcp-git.service saw-mcp-server-git.socket",
    ]
    assert (tmp_path / "asked").read_text().splitlines() == (steps[:1] if fails == "prepare" else steps)
    assert (done.returncode == 0) is (not fails)
    assert not (tmp_path / "generations/switched").exists(), "the path unit would start it again at once"


@pytest.mark.parametrize("template", [APPLY, HAND_OVER], ids=["sandbox", "openshell"])
def test_what_waits_for_a_generation_misses_none_and_needs_one(tmp_path: Path, template: Path) -> None:
    """Its path unit starts it as long as the file lies there: a switch that nobody saw is found when it looks again."""
    path = template.with_name(template.name.replace(".service", ".path")).read_text().splitlines()
    assert "PathExists=/run/saw/generations/switched" in path
    assert "ConditionPathExists" not in template.read_text(), "what is skipped leaves the file"
    (tmp_path / "units").mkdir()
    for name in ("saw", "systemctl"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{tmp_path}/asked\n')
        (tmp_path / name).chmod(0o755)
    generations = tmp_path / "generations"
    generations.mkdir()
    (generations / "closed").mkdir()
    switch(generations, "closed")
    assert (applied(template, tmp_path).returncode, (tmp_path / "asked").exists()) == (0, False)
    assert not (generations / "switched").exists()

    policy_in_force(generations, "e" * 64)
    new = generations / ("f" * 64)
    meanwhile = (
        f"mkdir {new}; touch {new}/policy.yaml; ln -sfn {new.name} {generations}/current; touch {generations}/switched"
    )
    with (tmp_path / "saw").open("a") as program:
        program.write(f"[ -e {new} ] || {{ {meanwhile}; }}\n")
    assert applied(template, tmp_path).returncode == 0
    rounds = [line for line in (tmp_path / "asked").read_text().splitlines() if line.endswith((" prepare", " apply"))]
    assert len(rounds) == 2, "the generation that came meanwhile"
    assert (generations / "switched").exists(), "and it is looked at once more"


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
