"""An image that something uses is never removed: disks of VMs, release records, records in force, and what the caller names."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Self

import pytest
from image_rig import finished, small_repository

from saw.cli.image import main
from saw.errors import SawError
from saw.image import usage
from saw.image.build import ImageBuild
from saw.image.disk import ImageError
from saw.image.finished import GoldenImage
from saw.image.inputs import Inputs
from saw.image.usage import backing_of, by_disks

pytestmark = pytest.mark.control("P0-02")


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def build(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> ImageBuild:
    monkeypatch.setattr(usage, "MACHINE", tmp_path / "machine")
    return ImageBuild(small_repository(tmp_path / "repository"), tmp_path / "build", said.append)


def several(build: ImageBuild, count: int = 5) -> list[GoldenImage]:
    """Finished images, the oldest first."""
    return [
        finished(build, Inputs(f"{number}" * 64, {}), f"2026-01-0{number + 1}T00:00:00+00:00")
        for number in range(count)
    ]


def disk(build: ImageBuild, image: str, *, name: str = "root.qcow2", place: str = "lab/hosts/edge/root") -> Path:
    """A root disk of a VM, as the driver makes it, that reads from an image as the hypervisor sees it."""
    path = build.build / place / "var/lib/saw/vms/ws-demo" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    backing = f"/var/lib/saw/images/{image}/image.qcow2"
    subprocess.run(
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b", backing, str(path), "1M"], check=True
    )
    return path


def left(build: ImageBuild) -> set[str]:
    return {path.name for path in build.images.iterdir()}


def test_the_newest_two_stay_and_what_nothing_uses_goes(build: ImageBuild, said: list[str]) -> None:
    images = several(build)
    (build.images / ".workspace-aaaa.partial").mkdir()
    build.prune()
    assert left(build) == {image.name for image in images[3:]}
    assert said == [f"  removing {image.name}: nothing uses it" for image in reversed(images[:3])]


def test_what_is_used_stays_and_the_reason_is_told(build: ImageBuild, said: list[str]) -> None:
    images = several(build)
    disk(build, images[0].name)
    Path(images[1].directory, "release.json").write_text("{}")
    build.prune(images[2].name)
    assert left(build) == {image.name for image in images}
    assert said == [
        f"  kept {images[1].name}: it has a release record, and the broker was not asked",
        f"  kept {images[0].name}: the root disk of ws-demo reads from it",
    ]


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("root.qcow2.new", "lab/hosts/edge/root"),
        ("root.qcow2", "molecule/hosts/edge/root"),
        ("root.qcow2", "../machine"),
    ],
)
def test_every_root_disk_on_the_machine_counts(build: ImageBuild, name: str, place: str) -> None:
    images = several(build)
    disk(build, images[0].name, name=name, place=place)
    build.prune()
    assert left(build) == {image.name for image in (images[0], *images[3:])}


def test_a_disk_that_cannot_be_read_stops_it_before_anything_is_removed(build: ImageBuild) -> None:
    images = several(build)
    path = disk(build, images[0].name)
    path.write_bytes(b"QFI")
    with pytest.raises(ImageError, match="is no qcow2 disk"):
        build.prune()
    assert left(build) == {image.name for image in images}
    path.write_bytes(b"QFI\xfb" + bytes(4) + (1 << 20).to_bytes(8, "big") + (5000).to_bytes(4, "big"))
    with pytest.raises(ImageError, match="is no qcow2 disk"):
        build.prune()
    path.unlink()
    build.prune()
    assert len(left(build)) == 2


@pytest.mark.parametrize(
    "place", ["lab/hosts", "lab/hosts/edge/root/var/lib/saw/vms", "lab/hosts/edge/root/var/lib/saw/vms/a"]
)
def test_a_folder_that_cannot_be_looked_into_stops_it_too(build: ImageBuild, place: str) -> None:
    images = several(build)
    path = build.build / place
    path.parent.mkdir(parents=True)
    path.symlink_to(path.name)  # a loop, which root cannot follow either
    with pytest.raises(ImageError, match=f"cannot look for disks of VMs in .*{place}: "):
        build.prune()
    assert left(build) == {image.name for image in images}
    path.unlink()
    build.prune()
    assert len(left(build)) == 2


def test_a_disk_without_a_backing_file_uses_no_image(build: ImageBuild) -> None:
    path = build.build / "lab/hosts/edge/root/var/lib/saw/vms/a/root.qcow2"
    path.parent.mkdir(parents=True)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), "1M"], check=True)
    assert (backing_of(path), by_disks(build.build)) == ("", {})


def test_the_broker_knows_which_records_are_in_force(build: ImageBuild, said: list[str]) -> None:
    images = several(build)
    for image in images:
        Path(image.directory, "release.json").write_text("{}")

    def asked(*, dry: bool = False) -> None:
        names = [image.name for image, _ in build.ours()]
        usage.prune(
            build.build, names, said.append, in_force={images[0].name: "its record is stable"}, dry=dry,
            registered={image.name for image in images},
        )  # fmt: skip

    asked(dry=True)
    assert left(build) == {image.name for image in images}
    assert f"  would remove {images[1].name}: nothing uses it" in said
    asked()
    assert left(build) == {image.name for image in (images[0], *images[3:])}


def test_a_record_that_the_broker_does_not_know_is_a_use(build: ImageBuild, said: list[str]) -> None:
    images = several(build)
    for image in images[:2]:
        Path(image.directory, "release.json").write_text("{}")
    names = [image.name for image, _ in build.ours()]
    usage.prune(build.build, names, said.append, in_force={}, registered={images[1].name})
    assert left(build) == {image.name for image in (images[0], *images[3:])}
    assert f"  kept {images[0].name}: it has a record that this broker does not know" in said


def test_a_build_directory_that_was_moved_keeps_its_images(build: ImageBuild, said: list[str]) -> None:
    images = several(build, 2)
    moved = build.build.rename(build.build.with_name("elsewhere"))
    there = ImageBuild(build.repository, moved, said.append)
    found = {image.name: image for image, _ in there.ours()}
    assert found.keys() == {image.name for image in images}
    for name, image in found.items():
        assert (image.directory, image.image) == (
            str(moved / "images" / name),
            str(moved / f"images/{name}/image.qcow2"),
        )
    with pytest.raises(ImageError, match="is a finished image"):
        there._make_way(moved / "images" / images[0].name)
    (moved / "images" / images[0].name / "image.qcow2").unlink()
    assert [image.name for image, _ in there.ours()] == [images[1].name]


def test_an_interrupted_removal_leaves_nothing_that_looks_finished(
    build: ImageBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = several(build, 3)

    class Cut(Exception):
        pass

    def cut(path: Path, **_: object) -> None:
        if path.exists():
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(usage.shutil, "rmtree", cut)
        with pytest.raises(Cut):
            build.prune()
    assert [image.name for image, _ in build.ours()] == [images[2].name, images[1].name]
    build.prune()
    assert left(build) == {images[1].name, images[2].name}


# --- a finished image is never replaced ----------------------------------------------------------------------------------


def test_a_finished_image_is_not_built_over(build: ImageBuild) -> None:
    image = several(build, 1)[0]
    with pytest.raises(ImageError, match="is a finished image"):
        build._make_way(Path(image.directory))
    Path(image.directory, "build.json").write_text("{")
    Path(image.directory, "release.json").write_text("{}")
    with pytest.raises(ImageError, match="is no whole image any more, and is used: it has a release record"):
        build._make_way(Path(image.directory))
    Path(image.directory, "release.json").unlink()
    made = disk(build, image.name)
    with pytest.raises(ImageError, match="is used: the root disk of ws-demo reads from it"):
        build._make_way(Path(image.directory))
    assert Path(image.image).exists()
    made.unlink()
    build._make_way(Path(image.directory))
    assert left(build) == set()


# --- commands ------------------------------------------------------------------------------------------------------------


class Broker:
    """What the broker lists: images by state, and workspaces by their image."""

    def __init__(self, images: dict[str, str], workspaces: dict[str, str]) -> None:
        day = {"created": "2026-01-01T00:00:00Z", "not_after": "2099-01-01T00:00:00Z"}
        self.images = [
            {"name": name, "image_sha256": "0" * 64, "state": state, **day} for name, state in images.items()
        ]
        self.workspaces = [
            {"id": name, "state": "active", "image": image, "image_sha256": "0" * 64}
            for name, image in workspaces.items()
        ]

    def session(self) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def request(self, _method: str, path: str, *_: object) -> dict[str, object]:
        assert path == "/v1/images"
        return {"images": self.images}


def test_the_command_asks_the_broker_and_removes_what_is_not_in_force(
    build: ImageBuild, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images = several(build)
    for image in images:
        Path(image.directory, "release.json").write_text("{}")
    waits = finished(build, Inputs("a" * 64, {}), "2025-12-01T00:00:00+00:00")
    Path(waits.directory, "release.json").write_text("{}")
    broker = Broker(
        {images[0].name: "deprecated", images[1].name: "deprecated", images[2].name: "stable"}, {"ws-a": images[1].name}
    )
    monkeypatch.setattr("saw.broker.client.OperatorClient.from_context", lambda _: broker)
    monkeypatch.setattr("saw.broker.client.listed_workspaces", lambda _: broker.workspaces)
    options = ["prune", "--repository", str(build.repository), "--build", str(build.build), "--json"]
    assert main([*options, "--dry-run"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["changed"], told["removed"]) == (False, [images[0].name])
    assert main(options) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["changed"], told["removed"]) == (True, [images[0].name])
    assert {one["name"]: one["why"] for one in told["images"]}[images[1].name] == [
        "its record is deprecated, and ws-a made of it"
    ]
    assert left(build) == {image.name for image in (waits, *images[1:])}
    assert main(["local", *options[1:]]) == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    assert [(row["name"], row["age_days"], row["used"]) for row in rows] == [
        (image.name, None, ["release record"]) for image in (*reversed(images[1:]), waits)
    ]


def test_without_the_broker_the_command_removes_nothing(build: ImageBuild, tmp_path: Path) -> None:
    images = several(build)
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"broker": {"socket": str(tmp_path / "none.sock"), "ssh": None}}))
    with pytest.raises(SawError):
        main(["prune", "--build", str(build.build), "--context", str(context)])
    assert left(build) == {image.name for image in images}
    with pytest.raises(SawError, match="there are no images"):
        main(["prune", "--build", str(tmp_path / "elsewhere"), "--context", str(context)])
