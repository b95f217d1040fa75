"""What a killed run left working is found by its mark and ended; whatever else runs is left alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from private_ns import private, sh

from saw.errors import UnavailableError
from saw.lab import up
from saw.lab.process import start_time, wait_for
from saw.lab.strays import MARK, clear_scratch, end_marked, mark_children, unmarked
from saw.lab.topology import Lab

Start = Callable[..., int]
SLEEP = shutil.which("sleep") or "/bin/sleep"


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A build directory; the mark that a test sets is taken away again."""
    monkeypatch.delenv(MARK, raising=False)
    (tmp_path / "build").mkdir()
    return tmp_path / "build"


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a process of its own session with an environment; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(*argv: str, environment: dict[str, str] | None = None) -> int:
        child = subprocess.Popen(
            argv, env=environment, start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
        )
        started.append(child)
        return child.pid

    yield begin
    for child in started:
        with suppress(ProcessLookupError):
            child.kill()
        child.communicate()


def named(name: str, tmp_path: Path) -> str:
    """A real, long-running program under the name of one that a bring-up starts."""
    place = tmp_path / name
    shutil.copyfile(SLEEP, place)
    place.chmod(0o755)
    return str(place)


@pytest.mark.parametrize("name", ["mmdebstrap", "pip", "uv", "ukify", "mkfs.ext4", "qemu-img", "ssh", "packer"])
def test_every_program_of_a_killed_run_is_ended(name: str, build: Path, tmp_path: Path, start: Start) -> None:
    mark_children(build)
    pid = start(named(name, tmp_path), "60")
    os.environ.pop(MARK)
    wait_for("its start", lambda: Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"60\0"), patience=60)
    assert end_marked(build) == 1
    assert start_time(pid) is None


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_a_program_that_renames_itself_is_ended_too(build: Path, start: Start) -> None:
    script = "process.title = 'npm ci'; setInterval(() => {}, 1000)"
    pid = start(shutil.which("node") or "", "-e", script, environment={**os.environ, MARK: str(build)})
    wait_for("its new name", lambda: b"npm ci" in Path(f"/proc/{pid}/cmdline").read_bytes(), patience=10)
    assert end_marked(build) == 1
    assert start_time(pid) is None


def test_a_leader_that_was_killed_alone_leaves_children_that_are_found(build: Path, start: Start) -> None:
    """The leader marks its children as the main job does; they start children of their own, in other sessions."""
    script = (
        "import subprocess, sys, time\nfrom pathlib import Path\nfrom saw.lab.strays import mark_children\n"
        f"mark_children(Path({str(build)!r}))\n"
        "child = subprocess.Popen(['sh', '-c', 'setsid sleep 61 & sleep 62'])\n"
        f"Path({str(build)!r}, 'child').write_text(str(child.pid))\ntime.sleep(60)"
    )
    leader = start(sys.executable, "-c", script, environment={**os.environ, "PYTHONPATH": ":".join(sys.path)})
    wait_for("its children", lambda: (build / "child").exists() and len(marked_pids(build)) == 3, patience=10)
    os.kill(leader, signal.SIGKILL)
    pids = marked_pids(build)
    assert end_marked(build) == 3
    assert [pid for pid in pids if start_time(pid)] == []


def marked_pids(build: Path) -> list[int]:
    from saw.lab.strays import marked

    found = []
    for pid, descriptor in marked(build):
        os.close(descriptor)
        found.append(pid)
    return found


def test_another_build_directory_and_a_reader_of_ours_are_left_alone(build: Path, tmp_path: Path, start: Start) -> None:
    other = start(SLEEP, "60", environment={**os.environ, MARK: f"{build}-of-another-checkout"})
    reader = start("tail", "-f", str(build / "report.json"), environment=unmarked())
    elsewhere = start(SLEEP, "60", environment={**os.environ, "OTHER": f"{MARK}={build}"})
    ours = start(SLEEP, "60", environment={**os.environ, MARK: str(build)})
    wait_for("all of them", lambda: ours in marked_pids(build), patience=60)
    assert end_marked(build) == 1
    assert start_time(ours) is None
    assert all(start_time(pid) for pid in (other, elsewhere))
    assert reader  # tail may have ended by itself: there is no such file
    assert end_marked(build) == 0


def test_the_lock_marks_what_a_run_starts_and_a_light_host_is_not_marked(build: Path) -> None:
    with up.exclusive(Lab(build, build)):
        assert sh("printenv", MARK).strip() == str(build)
        assert MARK not in unmarked()
    assert MARK not in os.environ


def test_the_next_run_ends_the_strays_and_says_so(build: Path, start: Start, capfd: pytest.CaptureFixture[str]) -> None:
    (build / "cache/.mmdebstrap-abc/tree").mkdir(parents=True)
    pid = start(SLEEP, "60", environment={**os.environ, MARK: str(build)})
    wait_for("its start", lambda: pid in marked_pids(build), patience=60)
    with up.exclusive(Lab(build, build)):
        assert start_time(pid) is None
        assert not (build / "cache/.mmdebstrap-abc").exists()
    assert "an earlier run was cut off: 1 processes of it ended, 1 scratch folders removed" in capfd.readouterr().out


def test_scratch_of_an_installer_goes_and_finished_work_stays(build: Path) -> None:
    (build / "cache/.mmdebstrap-1/etc").mkdir(parents=True)
    (build / "cache/base-host-1.tar").touch()
    assert clear_scratch(build) == [".mmdebstrap-1"]
    assert [path.name for path in (build / "cache").iterdir()] == ["base-host-1.tar"]
    assert clear_scratch(build) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts")
def test_scratch_with_a_mount_below_stays_and_is_named(build: Path) -> None:
    place = build / "cache/.mmdebstrap-1/proc"
    place.mkdir(parents=True)

    def attempt() -> str:
        sh("mount", "-t", "tmpfs", "tmpfs", str(place))
        with pytest.raises(UnavailableError) as refused:
            clear_scratch(build)
        return str(refused.value)

    assert private(attempt) == f"{place} is still mounted below {place.parent} (umount {place})"
    assert place.exists()
