"""What the main job checks before it touches anything: all that is missing at once, each with its cure."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from private_ns import private, sh

from saw.attest.image_record import BASELINE_REPORT
from saw.errors import SawError, UnavailableError
from saw.image import inputs
from saw.image.base import base_path, set_of
from saw.image.base_os import base_os
from saw.image.finished import GoldenImage
from saw.image.hardening import PARTS
from saw.image.packages import PackageSet, write_set
from saw.lab import preflight, up
from saw.lab.exclusive import LabBusy
from saw.lab.steps import Progress
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
        preflight.preflight(lab)
    except UnavailableError as error:
        return f"{error.message} ({error.cure})"
    return ""


def programs(directory: Path, *, without: tuple[str, ...] = ()) -> str:
    """Return a PATH that has every needed program but ``without`` (the lookup is all that preflight does with most)."""
    directory.mkdir()
    for name in preflight.PROGRAMS:
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
    assert named == sorted(set(preflight.PROGRAMS.values()))


def test_what_preflight_asks_for_is_what_the_main_job_installs() -> None:
    script = (ROOT / "scripts/bootstrap.sh").read_text(encoding="utf-8")
    installed = script.partition('packages="')[2].partition('"')[0].split()
    assert not set(preflight.PROGRAMS.values()) - {*installed, "npm"}
    assert "missing npm" in script  # taken only where no npm is there
    assert PARTS[0].name in preflight.PROGRAMS, "without the scanner no build begins"


def test_one_missing_program_names_its_package_alone(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", programs(tmp_path / "bin", without=("mcopy",)))
    assert "programs are missing: apt-get install mtools" in refusal(lab)


def test_a_small_disk_is_refused_with_both_numbers_the_parts_and_the_cure(lab: Lab) -> None:
    text = private(lambda: refusal(lab), tmpfs={str(lab.build): "16m"})
    need = sum(preflight.still_needed(lab).values())
    assert f"{lab.build} has 16 MiB free, {need} MiB are needed for what is still to be made (golden image " in text
    assert "free disk space, or set SAW_BUILD to a directory on a larger disk" in text
    assert "MiB free" not in private(lambda: refusal(lab))


def make(lab: Lab) -> None:
    """Put there what a finished run leaves, as far as the check looks at it."""
    packages = PackageSet("trixie", "2026-01-01T00:00:00+00:00", "", {"bash": "5.2-1"})
    cache, digest = lab.build / "cache", inputs.collect(ROOT).given(inputs.PACKAGES, packages.digest)
    for name in ("mcp-1", "wheels-1"):
        (cache / name).mkdir(parents=True)
    for name in ("host", "workspace"):
        tar = base_path(ROOT / f"packer/packages/{name}.txt", cache, base_os(ROOT), packages)
        write_set(set_of(tar), packages)
        tar.touch()
    image = lab.images / "workspace-1"
    image.mkdir(parents=True)
    (image / "image.qcow2").touch()
    record = GoldenImage(
        "workspace-1", str(image), str(image / "image.qcow2"), "0" * 64, digest.digest, "2026", 1.0, "6"
    )
    (image / "build.json").write_bytes(msgspec.json.encode(record))
    (image / "inputs.json").write_bytes(msgspec.json.encode(digest))
    for name in lab.host_names:
        (lab.directory / "hosts" / name / "root").mkdir(parents=True)
        (lab.directory / "hosts" / name / "unpacked").touch()
    disk = lab.directory / "hosts/edge/root/var/lib/saw/vms/ws-demo"
    disk.mkdir(parents=True)
    (disk / "data.img").touch()


def test_a_warm_run_asks_for_what_a_run_writes_and_no_more(lab: Lab) -> None:
    cold = preflight.still_needed(lab)
    make(lab)
    assert preflight.still_needed(lab) == {"logs and growth": preflight.NEED_MIB["run"]}
    assert preflight.NEED_MIB["run"] * 4 < sum(cold.values())


@pytest.mark.parametrize(
    ("gone", "parts"),
    [
        ("images/workspace-1/build.json", {"golden image"}),
        ("cache/wheels-1", {"Python wheels"}),
        ("lab/hosts/control/unpacked", {"hosts control"}),
        ("lab/hosts/edge/root/var/lib/saw/vms/ws-demo/data.img", {"workspace"}),
    ],
)
def test_what_is_gone_is_asked_for_again(lab: Lab, gone: str, parts: set[str]) -> None:
    make(lab)
    path = lab.build / gone
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink()
    assert set(preflight.still_needed(lab)) == parts | {"logs and growth"}


def test_an_image_without_a_score_is_not_kept_and_one_with_it_is(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    make(lab)
    monkeypatch.setattr(up.ImageBuild, "news", lambda *_: None)
    job, built = up.Bringup(lab, Progress(total=1)), lab.images / "workspace-1/build.json"
    with pytest.raises(UnavailableError, match="workspace-1 is of an earlier release and has no score") as refused:
        job.image(keep=True)
    assert "without --keep-image" in str(refused.value.cure)
    image = msgspec.json.decode(built.read_bytes(), type=GoldenImage)
    built.write_bytes(msgspec.json.encode(msgspec.structs.replace(image, evidence={BASELINE_REPORT: "1" * 64})))
    assert job.image(keep=True).name == "workspace-1"


def test_an_image_of_other_inputs_is_asked_for_but_its_packages_are_there(lab: Lab) -> None:
    make(lab)
    old = lab.images / "workspace-1/inputs.json"
    old.write_bytes(msgspec.json.encode(inputs.Inputs("0" * 64, {})))
    assert set(preflight.still_needed(lab)) == {"golden image", "logs and growth"}


def test_a_build_directory_that_is_not_there_yet_is_measured_where_it_will_be(lab: Lab) -> None:
    later = Lab(ROOT, lab.build / "deeper/build")
    text = private(lambda: refusal(later), tmpfs={str(lab.build): "16m"})
    assert f"{later.build} has 16 MiB free" in text


@pytest.mark.parametrize(
    ("address", "refused"),
    [("10.77.0.5/24", True), ("10.210.3.1/30", True), ("10.88.0.5/24", False)],
)
def test_an_address_range_in_use_is_refused(lab: Lab, address: str, refused: bool) -> None:
    def taken() -> list[str]:
        sh("ip", "link", "add", "other0", "type", "bridge")
        sh("ip", "addr", "add", address, "dev", "other0")
        sh("ip", "link", "set", "other0", "up")
        return preflight.taken_addresses(lab)

    problems = private(taken)
    assert bool(problems) == refused
    if refused:
        assert "is already in use here" in problems[0]
        assert "dev other0" in problems[0]
        assert "remove that route or interface" in problems[0]


def test_the_labs_own_uplink_is_no_stranger(lab: Lab) -> None:
    def own() -> list[str]:
        lab.network.up()
        return preflight.taken_addresses(lab)

    assert private(own) == []


def test_a_second_run_is_refused_while_the_first_holds_the_lock_and_goes_on_after(lab: Lab) -> None:
    with (lab.build / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(LabBusy, match="another run uses this build directory") as refused, up.exclusive(lab):
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
