"""An agent that eats memory, forks and fills its file systems is stopped at its limits while the workspace's services stay well.

Memory and tasks are counted by cgroup v2, which light hosts do not have. So this boots a kernel under emulation, with the base
tree of those hosts as its initial file system: no disk, no network, only a console on which one script reports.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import pytest

from conftest import PYTHON, ROOT, SOURCE
from saw.policy.sandbox_limits import SandboxLimits
from saw.runtime import sandbox_bounds, sandbox_units
from saw.runtime.limits import Machine, limits_of
from saw.runtime.policyd_usage import read_usage
from saw.runtime.sandbox import RuntimePaths

TARS = sorted((ROOT / "build/cache").glob("base-host-*.tar"), key=lambda path: path.stat().st_mtime)
KERNELS = sorted((ROOT / "build/images").glob("*/vmlinuz"), key=lambda path: path.stat().st_mtime)
PACKAGES = "/usr/lib/python3/dist-packages"
PROBE = Path(__file__).with_name("limits_probe.py")
SCRIPT = Path(__file__).with_name("limits_inside.py")
LIMITS = SandboxLimits(
    memory="256MiB", tasks=128, cpu="0.5", tmp="32MiB", shm="16MiB", inodes=1024, files=256, cpu_weight=10
)
MACHINE = Machine(2 * 1024**3)

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to lay out the tree of a host"),
    pytest.mark.skipif(not TARS or not KERNELS, reason="no base tree or kernel in build: run `make workspace` once"),
    pytest.mark.control("RUN-03"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What the script in the VM reported, by name."""
    folder = tmp_path_factory.mktemp("vm")
    try:
        yield _boot(folder, _tree(folder / "root"))
    finally:
        shutil.rmtree(folder)


def _tree(root: Path) -> Path:
    """Lay out the base tree with the compiled units, and make it one archive."""
    from test_sandbox_spec import build

    root.mkdir()
    leave_out = ("usr/share/doc", "usr/share/locale", "usr/share/man", "usr/lib/modules", "var/cache", "var/lib/apt")
    words = ["tar", "-C", str(root), "--numeric-owner", *(f"--exclude=./{name}" for name in leave_out), "-xpf"]
    subprocess.run([*words, str(TARS[-1])], check=True)
    shutil.copytree(SOURCE / "saw/runtime", Path(f"{root}{PACKAGES}/saw/runtime"))
    shutil.copy(SOURCE / "saw/errors.py", Path(f"{root}{PACKAGES}/saw/errors.py"))
    shutil.copy(SOURCE / "saw/__init__.py", Path(f"{root}{PACKAGES}/saw/__init__.py"))
    spec = build(compatibility="best_effort", best_effort="true")
    server = replace(spec.mcp_servers[0], command=(PYTHON, "/usr/local/lib/limits_probe.py", "memory", "1024"))
    spec = replace(
        spec,
        paths=RuntimePaths(PYTHON, f"{PACKAGES}/saw/runtime"),
        limits=limits_of(LIMITS, MACHINE),
        mcp_servers=(server,),
    )
    with (root / "etc/passwd").open("a") as stream:
        stream.write("agent:x:2000:2000::/home/agent:/bin/sh\nsaw-mcp:x:2001:2001::/var/empty:/bin/sh\n")
    (root / "etc/group").open("a").write("agent:x:2000:\nsaw-mcp:x:2001:\n")
    project = root / "home/agent/project"
    project.mkdir(parents=True)
    os.chown(project.parent, 2000, 2000)
    os.chown(project, 2000, 2000)
    files = {f"etc/systemd/system/{name}": text for name, text in sandbox_units.compile_units(spec).items()}
    # The VM has the version of systemd of the base tree, which knows no private PID namespaces in units.
    files = {name: text.replace("PrivatePIDs=yes\n", "") for name, text in files.items()}
    files["etc/systemd/system/saw-sandbox-net.service"] = (
        "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=/bin/ip netns add saw-sandbox\n"
    )
    files["etc/systemd/system/neighbour.service"] = (
        "[Service]\nExecStart=/usr/bin/sleep infinity\nOOMScoreAdjust=-900\nRestart=no\n"
    )
    files["etc/systemd/system/inside.service"] = (
        "[Unit]\nAfter=basic.target\nWants=neighbour.service\n"
        f"[Service]\nType=oneshot\nExecStart={PYTHON} /usr/local/lib/limits_inside.py\nStandardOutput=tty\n"
        "StandardError=tty\nTTYPath=/dev/ttyS0\nTimeoutStartSec=infinity\n"
        "ExecStopPost=/usr/bin/systemctl poweroff --force --force\n"
    )
    for name, text in files.items():
        (root / name).write_text(text)
    for name, launch in sandbox_units.compile_launch_files(spec).items():
        (root / "usr/local/lib" / name).write_bytes(launch)
    less = replace(
        spec, limits=limits_of(msgspec.structs.replace(LIMITS, memory="200MiB", tasks=100, cpu="all"), MACHINE)
    )
    (root / "usr/local/lib/narrower.json").write_text(json.dumps(sandbox_bounds.slice_words(less)))
    for program in (PROBE, SCRIPT):
        shutil.copy(program, root / "usr/local/lib")
    wants = root / "etc/systemd/system/inside.target.wants"
    wants.mkdir()
    (root / "etc/systemd/system/inside.target").write_text("[Unit]\nRequires=basic.target\nAfter=basic.target\n")
    (wants / "inside.service").symlink_to("../inside.service")
    archive = root.parent / "initrd"
    (root / "init").symlink_to("usr/lib/systemd/systemd")
    with archive.open("wb") as stream:
        for place in sorted(root.rglob("*")):
            _add(stream, place.relative_to(root).as_posix(), place)
        _add(stream, "TRAILER!!!", None)
    shutil.rmtree(root)
    return archive


def _add(stream: BinaryIO, name: str, place: Path | None) -> None:
    """Write one entry of a cpio archive of the kind "newc" (cpio(5)), which the kernel unpacks. Hard links become copies."""
    state = os.lstat(place) if place else os.stat_result((0,) * 10)
    content = b""
    if place and stat.S_ISREG(state.st_mode):
        content = place.read_bytes()
    elif place and stat.S_ISLNK(state.st_mode):
        content = os.fsencode(place.readlink())
    raw = name.encode() + b"\0"
    numbers = (0, state.st_mode, state.st_uid, state.st_gid, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % number for number in numbers) + raw
    stream.write(head + b"\0" * (-len(head) % 4) + content + b"\0" * (-len(content) % 4))


def _boot(folder: Path, archive: Path) -> dict[str, Any]:
    console = folder / "console"
    arguments = "console=ttyS0 systemd.unit=inside.target systemd.show_status=0 quiet systemd.unified_cgroup_hierarchy=1 panic=-1"
    words = [
        "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2560", "-nodefaults", "-no-reboot",
        "-display", "none", "-serial", f"file:{console}", "-kernel", str(KERNELS[-1]), "-initrd", str(archive),
        "-append", arguments,
    ]  # fmt: skip
    subprocess.run(words, check=True, timeout=900, stdin=subprocess.DEVNULL)
    text = console.read_text(errors="replace")
    lines = [line.split("SAW ", 1)[1] for line in text.splitlines() if "SAW " in line]
    found = {name: value for line in lines for name, value in json.loads(line).items()}
    assert found.get("done"), text[-6000:]
    return found


def test_a_memory_eater_is_ended_at_the_limit_and_nothing_else_is(told: dict[str, Any]) -> None:
    assert told["memory"]["code"] == 137
    assert told["memory"]["oom_kills"] >= 1
    assert told["memory"]["peak_mib"] <= 256
    assert told["modest memory"] == {"code": 0, "count": 100, "stopped": ""}


def test_mcp_servers_and_shell_have_the_memory_together(told: dict[str, Any]) -> None:
    assert told["memory of both"]["oom_kills"] > told["memory"]["oom_kills"]
    assert told["memory of both"]["peak_mib"] <= 256


def test_a_fork_bomb_ends_at_the_limit_while_the_host_starts_programs(told: dict[str, Any]) -> None:
    assert told["tasks"]["stopped"] == "EAGAIN"
    assert 64 < told["tasks"]["count"] < 128
    assert told["bomb"] == {"at_limit": True, "host_starts": True}
    assert told["modest tasks"] == {"code": 0, "count": 50, "stopped": ""}


@pytest.mark.parametrize("place", ["/tmp", "/var/tmp", "/dev/shm"])
def test_temporary_directories_end_by_bytes_and_by_files(told: dict[str, Any], place: str) -> None:
    most = 16 if place == "/dev/shm" else 32
    full, many, modest = told[f"bytes {place}"], told[f"inodes {place}"], told[f"modest {place}"]
    assert (full["stopped"], most - 1 <= full["count"] <= most) == ("ENOSPC", True)
    assert (many["stopped"], 900 < many["count"] < 1024) == ("ENOSPC", True)
    assert modest == {"code": 0, "count": 8, "stopped": ""}


def test_the_directory_of_the_sockets_is_no_part_of_run(told: dict[str, Any]) -> None:
    assert told["bytes /run/saw/shell"]["stopped"] == "ENOSPC"
    assert told["inodes /run/saw/shell"]["stopped"] == "ENOSPC"
    assert told["host writes"] is True


def test_descriptors_and_processor_have_an_end(told: dict[str, Any]) -> None:
    assert told["files"]["stopped"] == "EMFILE"
    assert told["files"]["count"] < 256
    assert told["modest files"] == {"code": 0, "count": 100, "stopped": ""}
    assert told["cpu"] == {"max": "50000 100000", "weight": "10"}


def test_the_services_and_the_sandbox_itself_are_as_they_were(told: dict[str, Any]) -> None:
    assert told["after"] == told["before"]
    assert told["before"]["neighbour"] != "0"
    assert told["oom"] == {"neighbour": "-900", "shell": "500"}


@pytest.mark.control("AUD-01")
def test_what_was_used_is_counted(told: dict[str, Any], tmp_path: Path) -> None:
    for name, text in told["groups"].items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    usage = read_usage(tmp_path)
    assert usage is not None
    shell = usage.units["saw-shell.service"]
    assert usage.total.cpu_ms >= shell.cpu_ms > 0
    assert usage.total.oom_kills == told["memory of both"]["oom_kills"]
    assert 200 * 1024**2 < usage.total.memory_peak <= 256 * 1024**2
    assert usage.total.refused_tasks == shell.refused_tasks > 0


def test_a_narrower_policy_counts_for_what_already_runs(told: dict[str, Any]) -> None:
    assert told["narrower"] == {"slice": str(200 * 1024**2), "tasks": "100", "cpu": "max 100000"}
