"""What the main job checks before it touches anything: all that is missing at once, each with its cure."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from private_ns import private, sh

from saw.errors import SawError, UnavailableError
from saw.lab import up
from saw.lab.topology import Lab

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="makes private namespaces")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab whose build directory every user may enter."""
    with tempfile.TemporaryDirectory(prefix="saw-preflight-") as place:
        Path(place).chmod(0o755)
        build = Path(place, "build")
        build.mkdir()
        yield Lab(ROOT, build)


def refusal(lab: Lab) -> str:
    """Return what preflight says, or nothing when it is content."""
    try:
        up.preflight(lab)
    except UnavailableError as error:
        return f"{error.message} ({error.cure})"
    return ""


def programs(directory: Path, *, without: tuple[str, ...] = ()) -> str:
    """Return a PATH that has every needed program but ``without`` (the lookup is all that preflight does with most)."""
    directory.mkdir()
    for name in up.PROGRAMS:
        if name not in without:
            real = Path("/usr/sbin/ip" if Path("/usr/sbin/ip").exists() else "/usr/bin/ip")
            (directory / name).symlink_to(real if name == "ip" else "/bin/true")
    return str(directory)


def test_a_ready_machine_passes(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin") + ":" + os.environ["PATH"])
    assert private(lambda: refusal(lab)) == ""


def test_another_user_is_told_to_use_sudo(lab: Lab) -> None:
    text = private(lambda: refusal(lab), uid=65534)
    assert "root is needed" in text
    assert "run it with sudo" in text


def test_an_empty_path_names_every_package_and_nothing_hides_the_list(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = refusal(lab)
    assert "programs are missing: apt-get install " in text
    named = text.partition("apt-get install ")[2].partition("\n")[0].partition(" (")[0].split()
    assert named == sorted(set(up.PROGRAMS.values()))


def test_one_missing_program_names_its_package_alone(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", without=("mcopy",)))
    assert "programs are missing: apt-get install mtools" in refusal(lab)


def test_a_small_disk_is_refused_with_both_numbers_and_the_cure(lab: Lab) -> None:
    text = private(lambda: refusal(lab), tmpfs={str(lab.build): "16m"})
    assert f"{lab.build} has 16 MiB free, {up.NEED_BYTES // 1024**2} MiB are needed" in text
    assert "free disk space, or set SAW_BUILD to a directory on a larger disk" in text
    assert "MiB free" not in private(lambda: refusal(lab))


@pytest.mark.parametrize(
    ("address", "refused"),
    [("10.77.0.5/24", True), ("10.210.3.1/30", True), ("10.88.0.5/24", False)],
)
def test_an_address_range_in_use_is_refused(lab: Lab, address: str, refused: bool) -> None:
    def taken() -> list[str]:
        sh("ip", "link", "add", "other0", "type", "bridge")
        sh("ip", "addr", "add", address, "dev", "other0")
        sh("ip", "link", "set", "other0", "up")
        return up.taken_addresses(lab)

    problems = private(taken)
    assert bool(problems) == refused
    if refused:
        assert "is already in use here" in problems[0]
        assert "dev other0" in problems[0]
        assert "remove that route or interface" in problems[0]


def test_the_labs_own_uplink_is_no_stranger(lab: Lab) -> None:
    def own() -> list[str]:
        lab.network.up()
        return up.taken_addresses(lab)

    assert private(own) == []


def test_a_second_run_is_refused_while_the_first_holds_the_lock_and_goes_on_after(lab: Lab) -> None:
    with (lab.build / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(up.LabBusy, match="another run uses this build directory") as refused, up.exclusive(lab):
            pass
        assert refused.value.cure == "wait for it, or end it"
        assert refused.value.code == "lab_busy"
    with up.exclusive(lab):
        pass


def test_a_build_directory_of_root_is_refused_to_another_user_with_the_cure(lab: Lab) -> None:
    with up.exclusive(lab):
        pass

    def attempt() -> str:
        try:
            with up.exclusive(lab):
                return ""
        except SawError as error:
            return str(error)

    text = private(attempt, uid=65534)
    assert f"cannot write in {lab.build}: Permission denied" in text
    assert "run it with sudo" in text
