"""The embedded default goes past its images: those that no workspace is made of are deprecated and removed, the others stay."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from image_rig import finished, small_repository

from saw.errors import UnavailableError
from saw.image import usage
from saw.image.build import ImageBuild
from saw.image.inputs import Inputs
from saw.lab import image_release
from saw.lab.retire import retire_images
from saw.lab.topology import Lab
from saw.lab.up import Bringup

pytestmark = pytest.mark.control("P0-02")


class Broker:
    """Answers as ``saw --json`` does, and takes images to another state."""

    def __init__(self, images: dict[str, str], workspaces: dict[str, tuple[str, str]]) -> None:
        self.images, self.workspaces = images, workspaces
        self.steps: list[tuple[str, ...]] = []
        self.back: dict[str, str] = {}
        self.refusal = "no_earlier_image"

    def saw(self, *words: str) -> dict[str, Any]:
        if words[:2] == ("workspace", "list"):
            rows = self.workspaces.items()
            return {
                "workspaces": [
                    {"id": name, "image": image, "image_sha256": "0" * 64, "state": state}
                    for name, (image, state) in rows
                ]
            }
        if words[:2] == ("image", "list"):
            return {
                "images": [
                    {"name": name, "image_sha256": "0" * 64, "state": state} for name, state in self.images.items()
                ]
            }
        if words[:2] == ("workspace", "way-back"):
            if words[2] not in self.back:
                raise UnavailableError("`saw workspace way-back` failed", details={"error": {"code": self.refusal}})
            return {"workspace": words[2], "image": {"name": self.back[words[2]], "image_sha256": "0" * 64}}
        self.steps.append(words)
        if words[1] == "register":
            return {"state": "deprecated"}
        self.images[words[2]] = {"deprecate": "deprecated", "promote": "stable"}[words[1]]
        return {}


def test_what_no_workspace_is_made_of_is_deprecated_and_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MACHINE", tmp_path / "machine")
    build = ImageBuild(small_repository(tmp_path / "repository"), tmp_path / "build", lambda _: None)
    images = [finished(build, Inputs(f"{number}" * 64, {}), f"2026-01-0{number + 1}") for number in range(6)]
    for image in images:
        Path(image.directory, "release.json").write_text("{}")
    names = [image.name for image in images]
    broker = Broker(
        {**dict.fromkeys(names, "stable"), names[1]: "revoked", "elsewhere": "stable"},
        {"ws-a": (names[0], "active"), "ws-gone": (names[2], "decommissioned"), "ws-b": (names[5], "active")},
    )
    said: list[str] = []
    retire_images(build.build, broker.saw, said.append, images[3])
    assert {path.name for path in build.images.iterdir()} == {names[0], names[3], names[4], names[5]}
    assert broker.steps == [
        ("image", "deprecate", names[2], "--sha256", "0" * 64, "--reason", f"superseded by {names[3]}")
    ]
    assert f"  kept {names[0]}: ws-a is made of it" in said
    retire_images(build.build, broker.saw, said.append, images[3])
    assert len(broker.steps) == 1


def test_the_image_that_a_workspace_goes_back_to_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "MACHINE", tmp_path / "machine")
    build = ImageBuild(small_repository(tmp_path / "repository"), tmp_path / "build", lambda _: None)
    images = [finished(build, Inputs(f"{number}" * 64, {}), f"2026-01-0{number + 1}") for number in range(5)]
    names = [image.name for image in images]
    broker = Broker(dict.fromkeys(names, "stable"), {"ws-a": (names[4], "active"), "ws-b": (names[4], "stopped")})
    broker.back = {"ws-a": names[0]}
    said: list[str] = []
    broker.refusal = "forbidden"
    with pytest.raises(UnavailableError):
        retire_images(build.build, broker.saw, said.append, images[4])
    assert (broker.steps, len(list(build.images.iterdir()))) == ([], 5)
    broker.refusal = "no_earlier_image"
    retire_images(build.build, broker.saw, said.append, images[4])
    assert {path.name for path in build.images.iterdir()} == {names[0], names[3], names[4]}
    assert {words[2] for words in broker.steps} == {names[1], names[2]}
    assert f"  kept {names[0]}: ws-a goes back to it" in said


def test_without_the_broker_no_image_is_removed(tmp_path: Path) -> None:
    build = ImageBuild(small_repository(tmp_path / "repository"), tmp_path / "build", lambda _: None)
    images = [finished(build, Inputs(f"{number}" * 64, {}), f"2026-01-0{number + 1}") for number in range(4)]

    def away(*_: str) -> dict[str, Any]:
        raise UnavailableError("the broker does not answer")

    with pytest.raises(UnavailableError):
        retire_images(build.build, away, lambda _: None, images[3])
    assert len(list(build.images.iterdir())) == 4


def test_an_image_that_the_lab_went_past_is_promoted_again_when_it_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = Broker({}, {})
    monkeypatch.setattr(image_release, "serves", lambda *_: True)
    record = tmp_path / "release.json"
    record.write_text(json.dumps({"name": "workspace-1"}))
    (tmp_path / "lab").mkdir()
    (tmp_path / "lab/workspace-1.release.signed.json").write_text("signed")
    image_release.release_image(Lab(tmp_path, tmp_path), broker.saw, record, None)  # type: ignore[arg-type]
    assert [words[:3] for words in broker.steps][-1] == ("image", "promote", "workspace-1")
    # The hypervisor looks for it beside the image.
    assert (tmp_path / "release.signed.json").read_text() == "signed"


def test_the_lab_hears_why_the_command_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    refused = json.dumps({"ok": False, "error": {"code": "no_earlier_image", "message": "none"}})
    monkeypatch.setattr(
        "saw.lab.up.subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 1, refused, "")
    )  # fmt: skip
    bringup = Bringup.__new__(Bringup)
    bringup.lab = Lab(tmp_path, tmp_path)
    with pytest.raises(UnavailableError) as error:
        bringup.saw("workspace", "way-back", "ws-a")
    assert error.value.details == {"error": {"code": "no_earlier_image", "message": "none"}}
