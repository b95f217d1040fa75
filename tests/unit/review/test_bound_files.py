"""The files that a change is bound to: all of them, by content, and nothing that leads out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from saw.review.gate import GateRefused
from saw.review.tree import bound_files


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    (folder / "roles/update").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("ref")
    (folder / "update.yml").write_text("- hosts: all\n")
    (folder / "roles/update/run").write_text("#!/bin/sh\n")
    (folder / "roles/update/run").chmod(0o755)
    (folder / "again.yml").symlink_to("update.yml")
    return folder


def bind(folder: Path, *exclude: str) -> dict[str, tuple[str, str]]:
    return {item.path: (item.kind, item.sha256) for item in bound_files([(folder, "")], exclude or (".git",))}


def test_every_file_is_bound_by_name_kind_and_content(project: Path) -> None:
    def digest(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    assert bind(project) == {
        "again.yml": ("link", digest("update.yml")),
        "roles/update/run": ("program", digest("#!/bin/sh\n")),
        "update.yml": ("file", digest("- hosts: all\n")),
    }
    assert ".git/HEAD" in bind(project, "*.pyc")
    assert list(bind(project)) == sorted(bind(project))
    both = bound_files([(project / "roles", "/opt/roles"), (project / "update.yml", "one.yml")], ())
    assert [item.path for item in both] == ["/opt/roles/update/run", "one.yml"]


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "update.yml").write_text("- hosts: all \n"),
        lambda folder: (folder / "update.yml").chmod(0o755),
        lambda folder: (folder / "update.yml").rename(folder / "updates.yml"),
        lambda folder: (folder / "roles/update/new.yml").write_text(""),
        lambda folder: (folder / "roles/update/run").unlink(),
        lambda folder: ((folder / "again.yml").unlink(), (folder / "again.yml").symlink_to("roles/update/run")),
    ],
)
def test_each_change_below_the_folder_is_another_tree(project: Path, change: Callable[[Path], object]) -> None:
    before = bind(project)
    os.utime(project / "update.yml")
    assert bind(project) == before
    (project / ".git/HEAD").write_text("other")
    assert bind(project) == before
    change(project)
    assert bind(project) != before


@pytest.mark.control("REV-02")
def test_a_link_leads_to_what_is_bound_or_is_refused(project: Path) -> None:
    outside = project.parent / "outside.yml"
    outside.write_text("")
    (project / "out.yml").symlink_to(outside)
    with pytest.raises(GateRefused, match=r"out\.yml leads to .*outside\.yml, which is not bound"):
        bind(project)
    assert "out.yml" in {item.path for item in bound_files([(project, ""), (outside, "outside.yml")], (".git",))}
    assert "out.yml" not in bind(project, ".git", "out.yml")
    (project / "out.yml").unlink()
    (project / "hidden.yml").symlink_to(".git/HEAD")
    with pytest.raises(GateRefused, match="which is not bound"):
        bind(project)
    assert bind(project, "nothing")["hidden.yml"][0] == "link"


def test_what_is_no_file_or_not_there_is_refused(project: Path) -> None:
    with pytest.raises(GateRefused, match=r"cannot read .*missing"):
        bound_files([(project / "missing", "missing")], ())
    os.mkfifo(project / "pipe")
    with pytest.raises(GateRefused, match="neither a file nor a link"):
        bind(project)
    assert "update.yml" in bind(project, ".git", "pipe")
