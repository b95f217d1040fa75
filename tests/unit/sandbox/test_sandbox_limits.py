"""What an agent may use of its workspace: the words of the policy, what they compile to, and what counts as wider."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from test_sandbox_spec import ACCOUNT, GOVERNANCE, POLICY

from saw.cli import sandbox as cli
from saw.policy.errors import PolicyError
from saw.policy.loader import Bundle, load_governance, load_members, load_policy
from saw.policy.openshell_runtime import plan
from saw.policy.reach_diff import diff_bundles
from saw.policy.sandbox_limits import SandboxLimits, cores, size
from saw.runtime import sandbox, sandbox_prepare, sandbox_units
from saw.runtime.limits import SLICE, Machine, limits_of
from saw.runtime.sandbox import SandboxError, compile_spec, encode_launch
from saw.runtime.sandbox_bounds import hold_running

pytestmark = pytest.mark.control("RUN-03")
MIB = 1024**2
GIB = 1024**3


def governance(limits: str = "{}") -> bytes:
    text = GOVERNANCE.format(best_effort="false", credential="git-token", directory="/home/agent/project")
    return f"{text}sandbox: {{limits: {limits}}}\n".encode()


def policy() -> bytes:
    return POLICY.format(read_only="", read_write="", compatibility="hard_requirement").encode()


def build(limits: str = "{}", memory: int = 8 * GIB):
    read = load_governance(governance(limits))
    return compile_spec(load_policy(policy()), read, account=ACCOUNT, machine=Machine(memory))


def directives(text: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def test_sizes_and_processors_are_read_exactly() -> None:
    assert (size("512MiB"), size("3GiB"), size("0MiB")) == (512 * MIB, 3 * GIB, 0)
    assert (cores("all"), cores("1.5"), cores("0.25")) == (None, Decimal("1.5"), Decimal("0.25"))
    for text in (
        "512",
        "512MB",
        "1.5GiB",
        "-1GiB",
        "01GiB",
        " 1GiB",
        "1GiB\n",
        "１GiB",
        "1TiB",
        "max",
        "infinity",
        "75%",
    ):
        with pytest.raises(ValueError, match="is not a size"):
            size(text)
    for text in ("150%", "-1", "1e3", "1.555", "ALL", "", "1.", "1\n", "NaN", "Infinity"):
        with pytest.raises(ValueError, match="is not a number of processors"):
            cores(text)


@pytest.mark.parametrize(
    ("refused", "why", "allowed"),
    [
        ("{memory: 3GB}", "is not a size", "{memory: 3GiB}"),
        ("{memory: 127MiB}", "too little", "{memory: 128MiB}"),
        ("{memory: 4097GiB}", "more than any", "{memory: 4096GiB}"),
        ("{memory: infinity}", "is not a size", "{memory: 1GiB}"),
        ("{swap: '1'}", "is not a size", "{swap: 0MiB}"),
        ("{tasks: 31}", "number of tasks", "{tasks: 32}"),
        ("{tasks: 32769}", "number of tasks", "{tasks: 32768}"),
        ("{tasks: '64'}", "expected a whole number", "{tasks: 64}"),
        ("{cpu: '0.09'}", "too few", "{cpu: '0.1'}"),
        ("{cpu: '50%'}", "is not a number of processors", "{cpu: all}"),
        ("{cpu_weight: 101}", "number of parts", "{cpu_weight: 100}"),
        ("{io_weight: 0}", "number of parts", "{io_weight: 1}"),
        ("{tmp: 0MiB}", "no size", "{tmp: 1MiB}"),
        ("{shm: 0GiB}", "no size", "{shm: 1GiB}"),
        ("{inodes: 1023}", "files and directories", "{inodes: 1024}"),
        ("{files: 65537}", "open files", "{files: 65536}"),
        ("{processes: 5}", "processes", "{}"),
    ],
)
def test_what_is_no_limit_is_refused(refused: str, why: str, allowed: str) -> None:
    with pytest.raises(PolicyError, match=why):
        load_governance(governance(refused))
    load_governance(governance(allowed))


@pytest.mark.parametrize(
    ("memory", "given"), [(512 * MIB, 256 * MIB), (1536 * MIB, 1024 * MIB), (4 * GIB, 3584 * MIB), (64 * GIB, 60 * GIB)]
)
def test_the_workspaces_own_services_keep_a_reserve_that_no_policy_takes(memory: int, given: int) -> None:
    assert Machine(memory).given == given
    assert build("{memory: 4096GiB}", memory).limits.memory_max == given
    assert build("{memory: 128MiB}", memory).limits.memory_max == 128 * MIB


def test_every_unit_of_the_agents_is_in_one_slice_that_carries_the_limits() -> None:
    words = "{memory: 1GiB, swap: 64MiB, tasks: 200, cpu: '1.5', cpu_weight: 10, io_weight: 20, files: 1000}"
    spec = build(words)
    units = sandbox_units.compile_units(spec, systemd=252)
    held = {
        "MemoryMax": str(GIB),
        "MemorySwapMax": str(64 * MIB),
        "TasksMax": "200",
        "CPUQuota": "150%",
        "CPUWeight": "10",
        "IOWeight": "20",
    }
    assert {name: value for name, value in directives(units[SLICE]).items() if name in held} == held
    assert "-" not in SLICE, "a dash would put it below another slice, whose share would count"
    for name in ("saw-shell.service", "saw-mcp-server-files@.service"):
        found = directives(units[name])
        assert {key: found[key] for key in held} == held
        assert (found["Slice"], found["OOMPolicy"], found["OOMScoreAdjust"]) == (SLICE, "continue", "500")
        assert (found["LimitNOFILE"], found["LimitCORE"]) == ("1000", "0")
    assert dict(spec.shell_launch().rlimits)["nofile"] == 1000
    assert b'"nofile": 1000' in encode_launch(spec.mcp_launch(spec.mcp_servers[0]))
    # The mediator is the workspace's own: it is not in the agent's slice, and has limits that the policy does not set.
    mediator = directives(units["saw-mcp-files.service"])
    assert ("Slice" in mediator, mediator["MemoryMax"], mediator["TasksMax"]) == (False, "256M", "64")
    sandbox_units.verify_units(units)


def test_without_words_there_are_limits_all_the_same() -> None:
    found = directives(sandbox_units.compile_units(build(memory=1536 * MIB))[SLICE])
    assert "CPUQuota" not in found
    assert found["MemoryMax"] == str(1024 * MIB)
    assert (found["MemorySwapMax"], found["TasksMax"], found["CPUWeight"], found["IOWeight"]) == (
        "0",
        "1024",
        "25",
        "25",
    )
    assert limits_of(SandboxLimits(), Machine(8 * GIB)).memory_max == 3 * GIB


def test_temporary_directories_have_a_size_and_a_number_of_files() -> None:
    units = sandbox_units.compile_units(build("{tmp: 64MiB, shm: 32MiB, inodes: 2000}"))
    options = f"rw,nosuid,nodev,mode=1777,size={64 * MIB},nr_inodes=2000"
    for name in ("run-saw-scratch-shell-tmp.mount", "run-saw-scratch-shell-var.mount"):
        assert directives(units[name])["Options"] == options
    shell, server = units["saw-shell.service"], units["saw-mcp-server-files@.service"]
    for line in ("BindPaths=/run/saw/scratch/shell/tmp:/tmp", "BindPaths=/run/saw/scratch/shell/var:/var/tmp"):
        assert line in shell.splitlines()
        assert line not in server
    assert "RequiresMountsFor=/run/saw/shell /run/saw/scratch/shell/tmp /run/saw/scratch/shell/var" in shell
    assert f"TemporaryFileSystem=/tmp:{options}" in server
    assert f"TemporaryFileSystem=/var/tmp:{options}" in server
    for text in (shell, server):
        assert f"/dev/shm:rw,nosuid,nodev,mode=1777,size={32 * MIB},nr_inodes=2000" in text
        assert "PrivateTmp" not in text
    sockets = directives(units["run-saw-shell.mount"])["Options"]
    assert sockets == "rw,nosuid,nodev,noexec,mode=0750,uid=2000,gid=2000,size=256K,nr_inodes=32"


def bundle(limits: str) -> Bundle:
    text = "schema: 1\nblueprint: {name: coding, version: 1.0.0, owner: team}\n"
    members = {"policy.yaml": policy(), "governance.yaml": f"{text}sandbox: {{limits: {limits}}}\n".encode()}
    return load_members(members)


def gained(old: str, new: str) -> list[tuple[str, str, bool]]:
    return [(item.what, str(item.risk), item.exact) for item in diff_bundles(bundle(old), bundle(new)).gained]


@pytest.mark.parametrize(
    ("field", "less", "more", "risk"),
    [
        ("memory", "2048MiB", "3GiB", "medium"),
        ("swap", "0MiB", "1MiB", "medium"),
        ("tasks", "1024", "1025", "medium"),
        ("cpu", "'1.5'", "'1.51'", "medium"),
        ("cpu", "'999'", "all", "medium"),
        ("cpu_weight", "25", "26", "low"),
        ("io_weight", "25", "26", "low"),
        ("tmp", "512MiB", "513MiB", "medium"),
        ("shm", "1GiB", "1025MiB", "medium"),
        ("inodes", "65536", "65537", "medium"),
        ("files", "8192", "8193", "medium"),
    ],
)
def test_more_of_a_resource_is_a_widening_and_less_is_none(field: str, less: str, more: str, risk: str) -> None:
    name = f"sandbox.limits.{field}: {more.strip(chr(39))}"
    assert gained(f"{{{field}: {less}}}", f"{{{field}: {more}}}") == [(name, risk, True)]
    assert gained(f"{{{field}: {more}}}", f"{{{field}: {less}}}") == []


def test_the_same_limit_in_other_words_is_none() -> None:
    assert gained("{memory: 1024MiB, cpu: '1.50'}", "{memory: 1GiB, cpu: '1.5'}") == []
    assert gained("{}", "{memory: 3GiB, tasks: 1024, cpu: all}") == []


def test_openshell_does_not_take_the_limits_over_in_silence() -> None:
    accepted = ("governance.persistence",)
    plan(bundle("{}"), accept=accepted)
    with pytest.raises(PolicyError, match=r"governance\.sandbox\.limits"):
        plan(bundle("{memory: 1GiB}"), accept=accepted)


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A systemctl that writes down what it was asked, and whose answers are exit codes in files."""
    program = tmp_path / "systemctl"
    program.write_text(
        '#!/bin/sh\necho "$@" >>"${0%/*}/asked"\n'
        'case $1 in is-active) exit $(cat "${0%/*}/active");; esac\nexit $(cat "${0%/*}/set")\n'
    )
    program.chmod(0o755)
    (tmp_path / "asked").touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


@pytest.mark.parametrize(("active", "done", "held"), [("0", "0", True), ("3", "0", False), ("0", "1", None)])
def test_what_runs_is_held_to_the_new_limits(systemctl: Path, active: str, done: str, held: bool | None) -> None:
    (systemctl / "active").write_text(active)
    (systemctl / "set").write_text(done)
    noted = systemctl / "control" / f"{SLICE}.d"
    noted.mkdir(parents=True)
    (noted / "50-MemoryMax.conf").touch()
    spec = build("{memory: 1GiB, tasks: 100}")
    if held is None:
        with pytest.raises(SandboxError, match="did not set the limits"):
            hold_running(spec, control=systemctl / "control")
    else:
        assert hold_running(spec, control=systemctl / "control") is held
    asked = (systemctl / "asked").read_text()
    words = f"set-property --runtime {SLICE} MemoryMax={GIB} MemorySwapMax=0 TasksMax=100 CPUWeight=25 IOWeight=25 CPUQuota=\n"
    assert (words in asked) is (active == "0"), "no quota takes an earlier one back"
    assert not noted.exists(), "the unit file says the same, and changes with the policy"


def test_a_note_of_systemds_goes_though_systemctl_hangs(systemctl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noted = systemctl / "control" / f"{SLICE}.d"
    noted.mkdir(parents=True)
    real = subprocess.run

    def hang(words: list[str], **how: Any) -> Any:
        if words[1] == "set-property":
            raise subprocess.TimeoutExpired(words, how["timeout"])
        return real(words, **how)

    (systemctl / "active").write_text("0")
    monkeypatch.setattr(subprocess, "run", hang)
    with pytest.raises(SandboxError, match="did not set the limits"):
        hold_running(build(), control=systemctl / "control")
    assert not noted.exists()


@pytest.mark.parametrize("fails", ["retire", "prepare", ""])
def test_what_runs_is_held_to_the_limits_first_and_at_every_apply(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    done: list[str] = []

    def step(name: str, answer: object = None) -> Callable[..., object]:
        def run(*_: object, **__: object) -> object:
            done.append(name)
            if name == fails:
                raise SandboxError("told to")
            return [] if answer is None else answer

        return run

    spec = build("{memory: 1GiB}")
    monkeypatch.setattr(sandbox, "load_spec", lambda _: spec)
    monkeypatch.setattr(sandbox_units, "systemd_version", lambda: 257)
    monkeypatch.setattr(sandbox_units, "verify_units", lambda _: None)
    monkeypatch.setattr(sandbox_prepare, "hold_running", step("hold"))
    monkeypatch.setattr(sandbox_prepare, "retire", step("retire"))
    monkeypatch.setattr(sandbox_prepare, "prepare", step("prepare"))
    words = ["prepare", "--json", "--units", str(tmp_path)]
    for _ in range(2):
        if fails:
            with pytest.raises(SandboxError, match="told to"):
                cli.main(words)
        else:
            assert cli.main(words) == 0
        assert f"MemoryMax={GIB}" in (tmp_path / SLICE).read_text()
    steps = ["hold", "retire", "prepare"]
    assert done == 2 * (steps[: steps.index(fails) + 1] if fails else steps)


def test_an_apply_that_failed_is_tried_again() -> None:
    template = Path(__file__).resolve().parents[3] / "roles/sandbox/templates/saw-sandbox-apply.service.j2"
    lines = template.read_text().splitlines()
    assert {"Type=oneshot", "Restart=on-failure", "RestartSec=10s", "StartLimitIntervalSec=0"} <= set(lines)
