"""kill -9 of a build at each of its steps: nothing looks finished that is not, and the next run succeeds."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from image_rig import ROOT, small_repository

from saw.image.base import packages_in
from saw.image.build import ImageBuild
from saw.image.disk import digest_of
from saw.image.finished import packages_of
from saw.lab.process import wait_for
from saw.lab.strays import marked

pytestmark = pytest.mark.control("P0-02")
HERE = Path(__file__).resolve().parent
BOUND_S = 240.0
POINTS = ("base", "before the name of the base", "rootfs", "disk", "before the rename", "after the rename")
INSTALLER = """#!/bin/sh
for word in "$@"; do case "$word" in *.partial) target=$word;; esac; done
if [ "$HALT" = base ]; then head -c 2000 {tree} > "$target"; : > {marker}; exec sleep infinity; fi
cp {tree} "$target"
"""
UNPACKER = """#!/bin/sh
if [ "$HALT" = rootfs ]; then mkdir -p "$2/boot"; : > {marker}; exec sleep infinity; fi
exec {tar} "$@"
"""
PACKER = """#!/bin/sh
for word in "$@"; do case "$word" in output=*) output=${{word#output=}};; esac; done
if [ "$HALT" = disk ]; then head -c 70000 /dev/zero > "$output"; : > {marker}; exec sleep infinity; fi
qemu-img create -q -f qcow2 "$output" 1M
sum=$(sha256sum "$output" | cut -d' ' -f1)
printf '{{"kernel": "6.12.1", "sha256": "%s", "root_hash": ""}}' "$sum" > "${{output%.qcow2}}.disk.json"
"""


@dataclass
class Rig:
    """A repository, a build directory, and the programs of a build in small."""

    folder: Path
    started: list[subprocess.Popen[str]]

    @property
    def build(self) -> ImageBuild:
        return ImageBuild(self.folder / "repository", self.folder / "build", lambda _: None)

    @property
    def marker(self) -> Path:
        return self.folder / "reached"

    def start(self, point: str = "") -> subprocess.Popen[str]:
        """Start the build, to halt at ``point``."""
        command = [
            sys.executable,
            str(HERE / "killed_build.py"),
            str(self.folder / "repository"),
            str(self.folder / "build"),
        ]
        environment = {**os.environ, "HALT": point, "PATH": f"{self.folder / 'tools'}:{os.environ['PATH']}"}
        environment.pop("SAW_LAB_RUN", None)
        child = subprocess.Popen(
            [*command, str(self.marker), point], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self.started.append(child)
        return child

    def kill_at(self, point: str) -> None:
        """Run the build until ``point``, then kill -9 its leader alone, as the memory's end or a person would."""
        self.marker.unlink(missing_ok=True)
        child = self.start(point)
        wait_for(f"the build at {point}", lambda: self.marker.exists() or child.poll() is not None, patience=BOUND_S)
        assert child.poll() is None, child.communicate()
        child.kill()
        child.wait()

    def finish(self) -> dict[str, object]:
        """Run the build to its end; return its answer."""
        out, err = self.start().communicate(timeout=BOUND_S)
        assert out, err
        return dict(json.loads(out))

    def left_working(self) -> list[int]:
        """Pids that a killed run left, without those of this test."""
        found = []
        for pid, descriptor in marked(self.folder / "build"):
            os.close(descriptor)
            found.append(pid)
        return found


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    small_repository(tmp_path / "repository")
    lock = tmp_path / "repository/packer/mcp/package-lock.json"
    lock.parent.mkdir()
    lock.write_text("{}")
    shutil.copyfile(ROOT / "galaxy.yml", tmp_path / "repository/galaxy.yml")
    tree, tools = tmp_path / "tree.tar", tmp_path / "tools"
    contents = {
        "./var/lib/dpkg/status": b"Package: bash\nStatus: install ok installed\nVersion: 5.2-1\n",
        "./boot/vmlinuz-6.12.1": b"kernel" * 1000,
    }
    with tarfile.open(tree, "w") as stream:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            stream.addfile(member, io.BytesIO(content))
    tools.mkdir()
    (tools / "apt-get").write_text("#!/bin/sh\necho 'Packages|Debian|http://archive.example/debian/'\n")
    values = {"tree": tree, "marker": tmp_path / "reached", "tar": shutil.which("tar")}
    for name, text in (("mmdebstrap", INSTALLER), ("tar", UNPACKER), ("packer", PACKER)):
        (tools / name).write_text(text.format(**values))
    for path in tools.iterdir():
        path.chmod(0o755)
    made = Rig(tmp_path, [])
    yield made
    for pid in made.left_working():
        os.kill(pid, signal.SIGKILL)
    for child in made.started:
        child.kill()
        child.communicate()


@pytest.mark.parametrize(
    "point", ["base", "before the name of the base", "rootfs", "disk", "before the rename", "after the rename"]
)
def test_a_build_that_is_killed_leaves_nothing_that_looks_finished_and_the_next_one_succeeds(
    rig: Rig, point: str
) -> None:
    rig.kill_at(point)
    done = point == "after the rename"
    assert [whole(rig.build)] == [done]
    assert len(list(rig.build.images.glob("workspace-*"))) == int(done), "a name is given to what is whole"
    tars = list((rig.folder / "build/cache").glob("base-*.tar"))
    assert [packages_in(tar) for tar in tars] == ([] if point.endswith("base") else [{"bash": "5.2-1"}])
    assert len(rig.left_working()) == (1 if point in {"base", "rootfs", "disk"} else 0), "its child goes on"
    answer = rig.finish()
    assert (answer["ok"], answer["changed"]) == (True, not done)
    assert rig.left_working() == []
    assert whole(rig.build)
    hidden = [path.name for path in rig.build.images.glob(".*")]
    assert hidden == []
    assert [path.name for path in (rig.folder / "build/cache").glob(".*")] == []
    assert rig.finish()["changed"] is False


def test_a_second_build_waits_for_nobody_and_breaks_nothing(rig: Rig) -> None:
    rig.marker.unlink(missing_ok=True)
    first = rig.start("disk")
    wait_for("the first build at its disk", rig.marker.exists, patience=BOUND_S)
    out, err = rig.start().communicate(timeout=BOUND_S)
    assert (out, "another run uses this build directory" in err) == ("", True)
    assert first.poll() is None
    assert len(rig.left_working()) >= 1
    first.kill()
    first.wait()
    assert rig.finish()["ok"] is True


def whole(build: ImageBuild) -> bool:
    """Whether there is one finished image, and it is what its record says."""
    found = build.ours()
    for image, inputs in found:
        assert digest_of(Path(image.image)) == image.image_sha256
        packages = packages_of(image)
        assert packages is not None
        assert inputs.files["packages"] == packages.digest
        assert digest_of(Path(image.directory, "packages.json")) == image.evidence["packages.json"]
    return len(found) == 1
