"""A disk that takes no more in the middle of a run: real small file systems, real programs that write to them."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import pytest
from private_ns import private, sh

from saw.cli import main as cli
from saw.errors import SawError
from saw.files import StorageError, describe_file_system, storage_error, write_atomic
from saw.lab import main_job, preflight
from saw.lab.nspawn import LabNetwork, LightHost, key_pair
from saw.lab.topology import Lab

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts small file systems")
ROOT = Path(__file__).resolve().parents[3]
T = TypeVar("T")


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory on which a small file system is mounted in a private namespace."""
    with tempfile.TemporaryDirectory(prefix="saw-full-") as name:
        yield Path(name)


def fill(place: Path) -> None:
    """Write until the file system of ``place`` is full."""
    with contextlib.suppress(OSError), (place / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(65536))
    assert os.statvfs(place).f_bavail == 0


def refused(action: Callable[[], object], *places: Path) -> str:
    """Return how the full file system behind what ``action`` raises is put into words."""
    try:
        action()
    except OSError as error:
        told = storage_error(error, *places)
        assert told is not None
        return str(told)
    return ""


def test_a_full_file_system_is_named_with_cause_and_cure_and_the_old_file_stays(place: Path) -> None:
    def attempt() -> tuple[str, str, list[str]]:
        write_atomic(place / "state", "old")
        fill(place)
        told = refused(lambda: write_atomic(place / "state", bytes(100_000)), place)
        return told, (place / "state").read_text(), sorted(path.name for path in place.iterdir())

    told, state, names = private(attempt, tmpfs={str(place): "1m"})
    assert told.startswith(f"the file system {place} (tmpfs, 0 of 1 MiB and ")
    assert "is full: cannot write" in told
    assert "free space on it, or use a directory on another disk; then run it again" in told
    assert (state, names) == ("old", ["filler", "state"])
    assert private(lambda: refused(lambda: write_atomic(place / "x", "fits"), place), tmpfs={str(place): "1m"}) == ""


def test_a_file_system_without_free_files_is_told_as_full(place: Path) -> None:
    def attempt() -> str:
        (place / "one").touch()
        return refused(lambda: write_atomic(place / "two", "x"), place)

    told = private(attempt, tmpfs={str(place): "64m,nr_inodes=2"})
    assert f"the file system {place} (tmpfs, 64 of 64 MiB and 0 files free) is full" in told


def test_a_read_only_file_system_is_named(place: Path) -> None:
    def attempt() -> str:
        sh("mount", "-o", "remount,ro", str(place))
        return refused(lambda: write_atomic(place / "x", "x"), Path("/proc"), place)

    told = private(attempt, tmpfs={str(place): "1m"})
    assert f"the file system {place} (tmpfs" in told
    assert "is read-only" in told
    assert "mount it for writing again" in told


def test_an_error_without_a_file_is_put_down_to_the_place_that_is_full(place: Path) -> None:
    def attempt() -> str:
        fill(place)
        return str(storage_error(OSError(errno.ENOSPC, "No space left on device"), Path("/proc"), place))

    assert f"the file system {place} " in private(attempt, tmpfs={str(place): "1m"})


def test_a_quota_has_its_own_cure_and_other_errors_are_not_about_space(place: Path) -> None:
    told = storage_error(OSError(errno.EDQUOT, "Disk quota exceeded", str(place / "x")))
    assert told is not None
    assert "is over this user's quota" in told.message
    assert "raise the quota" in told.cure
    assert told.code == "storage_refused"
    assert storage_error(PermissionError(errno.EACCES, "Permission denied", str(place))) is None


def test_a_path_that_is_not_there_yet_belongs_to_the_file_system_above_it(place: Path) -> None:
    told = private(lambda: describe_file_system(place / "a/b/c"), tmpfs={str(place): "1m"})
    assert told.startswith(f"the file system {place} (tmpfs, ")


def test_a_command_says_it_and_ends_with_one(place: Path) -> None:
    def attempt() -> tuple[int, str, str]:
        fill(place)
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = cli.main(["policy", "keys", "create", "--dir", str(place / "keys"), "--name", "a", "--json"])
        return code, out.getvalue(), err.getvalue()

    code, out, err = private(attempt, tmpfs={str(place): "256k"})
    assert code == 1
    error = json.loads(out)["error"]
    assert error["code"] == "storage_refused"
    assert f"the file system {place} (tmpfs" in err
    assert "Traceback" not in err


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A tree of 3 MiB as a tar."""
    source = tmp_path / "source"
    (source / "etc").mkdir(parents=True)
    (source / "large").write_bytes(os.urandom(3 * 1024 * 1024))
    archive = tmp_path / "tree.tar"
    sh("tar", "-C", str(source), "-cf", str(archive), ".")
    return archive


def test_a_tree_that_does_not_fit_is_not_taken_for_unpacked_and_fits_later(place: Path, tar: Path) -> None:
    host = LightHost("h", "10.93.7.10", place, LabNetwork("sawunit", "10.93.7"), booted=False)

    def attempt() -> tuple[str, bool, bool]:
        told = ""
        try:
            host.unpack(tar)
        except SawError as error:
            told = str(main_job.full_disk_behind(error, Lab(ROOT, place)))
        half = (host.directory / "unpacked").exists()
        sh("mount", "-o", "remount,size=16m", str(place))
        host.unpack(tar)
        return told, half, (host.root / "large").stat().st_size == 3 * 1024 * 1024

    told, half, whole = private(attempt, tmpfs={str(place): "2m"})
    assert f"the file system {place} (tmpfs, 0 of 2 MiB" in told
    assert "`tar " in told
    assert not half
    assert whole


def test_a_key_that_could_not_be_written_is_not_taken_for_one(place: Path) -> None:
    def attempt() -> tuple[bool, list[str], str]:
        (place / "ssh").mkdir()
        fill(place)
        with pytest.raises((OSError, SawError)):
            key_pair(place / "ssh/key", "comment")
        left = [path.name for path in (place / "ssh").iterdir()]
        there = (place / "ssh/key").exists()
        (place / "filler").unlink()
        key = key_pair(place / "ssh/key", "comment")
        assert stat.S_IMODE(key.stat().st_mode) == 0o600
        return there, left, sh("ssh-keygen", "-y", "-f", str(key))

    there, left, public = private(attempt, tmpfs={str(place): "256k"})
    assert not there
    assert "key" not in left
    assert public.startswith("ssh-ed25519 ")


class Run:
    """One bring-up on a small file system: exit code, words, and what lies in the build directory afterwards."""

    def __init__(self, build: Path) -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.code = main_job.bring_up(Lab(ROOT, build))
        self.out, self.err = out.getvalue(), err.getvalue()
        report = build / "report.json"
        self.report = json.loads(report.read_text()) if report.exists() else None
        self.names = sorted(str(path.relative_to(build)) for path in build.rglob("*"))


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PATH on which the check of this machine finds every program."""
    directory = tmp_path / "bin"
    directory.mkdir()
    for name in preflight.PROGRAMS:
        if shutil.which(name) is None:
            (directory / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin")


@pytest.mark.usefixtures("programs")
def test_a_bring_up_whose_disk_fills_names_it_reports_it_and_leaves_nothing_that_looks_finished(place: Path) -> None:
    """Plenty of bytes, but no more files: the check at the start passes, the image build does not."""
    seen = private(lambda: Run(place), tmpfs={str(place): "64g,nr_inodes=13"})
    assert seen.code == 1
    assert f"the file system {place} (tmpfs" in seen.err
    assert "is full" in seen.err or "was full" in seen.err
    assert "free space on it, or set SAW_BUILD to a directory on a larger disk" in seen.err
    assert "Traceback" not in seen.err
    assert seen.report is not None, seen.names
    assert (seen.report["ok"], seen.report["error"]["code"]) == (False, "storage_refused")
    assert [(step["name"], step["ok"]) for step in seen.report["steps"]] == [
        ("check this machine", True),
        ("golden image (Packer, Ansible)", False),
    ]
    assert not [name for name in seen.names if name.endswith((".tar", ".qcow2", "build.json"))]


@pytest.mark.usefixtures("programs")
def test_even_the_report_may_not_fit_and_the_old_one_is_gone(place: Path) -> None:
    def attempt() -> Run:
        (place / "report.json").write_text('{"ok": true}')
        (place / "filler").touch()
        (place / ".lock").touch()
        return Run(place)

    seen = private(attempt, tmpfs={str(place): "64g,nr_inodes=4"})
    assert (seen.code, seen.report) == (1, None)
    assert f"the file system {place} (tmpfs" in seen.err
    assert "Traceback" not in seen.err


@pytest.mark.usefixtures("programs")
def test_the_next_run_goes_on_once_there_is_room(place: Path) -> None:
    def attempt() -> tuple[Run, Run]:
        first = Run(place)
        sh("mount", "-o", "remount,nr_inodes=100000", str(place))
        return first, Run(place)

    first, second = private(attempt, tmpfs={str(place): "64g,nr_inodes=13"})
    assert "storage_refused" in json.dumps(first.report)
    assert second.report is not None
    assert "storage_refused" not in json.dumps(second.report)
    assert StorageError.code == "storage_refused"
