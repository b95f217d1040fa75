"""Folders that travel from the controller as one archive."""

from __future__ import annotations

import os
import tarfile

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.secure_agent.workspace.plugins.action import python_runtime as runtime_action
from ansible_collections.secure_agent.workspace.plugins.action import tree as tree_action
from ansible_collections.secure_agent.workspace.plugins.modules import tree


@pytest.fixture
def source(tmp_path):
    """A small folder with a program, a link and a nested file."""
    folder = tmp_path / "source"
    (folder / "lib").mkdir(parents=True)
    (folder / "run").write_text("#!/bin/sh\n")
    (folder / "run").chmod(0o755)
    (folder / "lib/data").write_text("1")
    (folder / "link").symlink_to("lib/data")
    return folder


def digest(folder) -> str:
    return tree_action.digest_of(tree_action.list_members(str(folder)))


def test_the_digest_depends_on_content_names_links_and_executable_bits_alone(source):
    before = digest(source)
    os.utime(source / "run")
    assert digest(source) == before
    for change in (
        lambda: (source / "lib/data").write_text("2"),
        lambda: (source / "run").chmod(0o644),
        lambda: (source / "lib/data").rename(source / "lib/other"),
    ):
        before = digest(source)
        change()
        assert digest(source) != before


def ship(source, tmp_path) -> str:
    archive = tmp_path / "shipped.tar"
    with tarfile.open(archive, "w") as stream:
        for path, name in tree_action.list_members(str(source)):
            stream.add(path, arcname=name, recursive=False)
    return str(archive)


def test_a_tree_replaces_the_folder_as_a_whole(source, tmp_path, run_module):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "stale").write_text("old")
    arguments = {"src": str(source), "dest": str(dest), "digest": digest(source)}
    assert run_module(tree, check=True, **arguments)["changed"]
    assert run_module(tree, **arguments)["needs_archive"]
    assert (dest / "stale").exists()
    assert run_module(tree, **arguments, archive=ship(source, tmp_path))["changed"]
    assert not (dest / "stale").exists()
    assert (dest / "link").read_text() == "1"
    assert os.access(dest / "run", os.X_OK)
    assert not run_module(tree, **arguments)["changed"]


def test_an_archive_that_leads_outside_is_refused_and_the_old_folder_stays(source, tmp_path, run_module):
    dest = tmp_path / "dest"
    dest.mkdir()
    (dest / "old").write_text("old")
    archive = tmp_path / "evil.tar"
    with tarfile.open(archive, "w") as stream:
        stream.add(source / "run", arcname="../outside")
    outcome = run_module(tree, src=str(source), dest=str(dest), digest="1", archive=str(archive))
    assert outcome["failure"]["code"] == "tree_failed"
    assert (dest / "old").exists()
    assert not (tmp_path / "outside").exists()


def test_a_lock_with_an_unpinned_requirement_is_refused(tmp_path):
    lock = tmp_path / "requirements.txt"
    lock.write_text("good==1 \\\n    --hash=sha256:00\nbad==2\n")
    with pytest.raises(AnsibleActionFail, match=r"does not pin every requirement by hash: bad==2"):
        runtime_action.read_lock(str(tmp_path))
    lock.write_text("# comment\ngood==1 \\\n    --hash=sha256:00\n")
    assert runtime_action.read_lock(str(tmp_path)).startswith("# comment")


def test_a_wheelhouse_without_lock_is_named(tmp_path):
    with pytest.raises(AnsibleActionFail, match=r"cannot read .*requirements\.txt.*build the wheelhouse first"):
        runtime_action.read_lock(str(tmp_path))
