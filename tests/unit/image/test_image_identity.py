"""Nothing that makes a machine itself gets into an image: the build ends when a tree holds it, and the role removes it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from saw.errors import SawError
from saw.image import disk
from saw.image.disk import assemble
from saw.image.identity import EMPTY_BEFORE_BOOT, TRACES, IdentityError, refuse_traces, traces

ROOT = Path(__file__).resolve().parents[3]
NAMES = {pattern: pattern.replace("ssh_host_*", "ssh_host_ed25519_key").replace("*", "some") for pattern in TRACES}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree without any identity."""
    root = tmp_path / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/machine-id").touch()
    for folder in ("var/lib/dhcp", "var/log/journal", "root/.ssh", "var/lib/cloud", "var/lib/systemd/network"):
        (root / folder).mkdir(parents=True)
    return root


def test_an_empty_machine_id_and_empty_folders_identify_nobody(tree: Path) -> None:
    assert traces(tree) == []
    (tree / "var/lib/dbus").mkdir()
    (tree / "var/lib/dbus/machine-id").symlink_to("/etc/machine-id")
    assert traces(tree) == []
    refuse_traces(tree)


@pytest.mark.parametrize("pattern", sorted(TRACES))
def test_what_identifies_a_machine_is_found(tree: Path, pattern: str) -> None:
    path = tree / NAMES[pattern]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    assert traces(tree) == [f"{NAMES[pattern]}: {TRACES[pattern]}"]
    with pytest.raises(IdentityError, match="the same identity") as refused:
        refuse_traces(tree)
    assert refused.value.details == {"traces": traces(tree)}


@pytest.mark.parametrize("name", sorted(EMPTY_BEFORE_BOOT))
def test_a_tree_without_the_empty_file_is_refused(tree: Path, name: str) -> None:
    (tree / name).unlink()
    assert traces(tree) == [f"{name}: missing; it has to be there and empty"]
    (tree / name).symlink_to("/run/machine-id")
    assert any(found.startswith(f"{name}: ") for found in traces(tree))


@pytest.mark.control("IMG-01")
def test_no_disk_is_made_of_a_tree_with_an_identity(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot_program(root: Path, output: Path, command_line: str, initrd: Path | None) -> None:
        output.write_bytes(b"program")

    monkeypatch.setattr(disk, "build_uki", boot_program)
    monkeypatch.setattr(disk, "SPARE_BYTES", 32 * disk.MIB)
    (tree / "boot").mkdir()
    (tree / "boot/vmlinuz-6.12.1").touch()
    seed = tree / "var/lib/systemd/random-seed"
    seed.write_bytes(b"seed")
    output = tmp_path / "out/image.qcow2"
    with pytest.raises(SawError, match="random-seed: seed of random numbers"):
        assemble(tree, output, seed="s")
    assert list(output.parent.iterdir()) == []
    seed.unlink()
    assemble(tree, output, seed="s")
    assert output.exists()


def test_the_role_removes_all_that_the_build_looks_for() -> None:
    text = (ROOT / "roles/image_hygiene/tasks/main.yml").read_text(encoding="utf-8")
    listed = re.search(r'identity="([^"]+)"', text)
    assert listed is not None
    assert {word.removeprefix("/") for word in listed[1].split()} == TRACES.keys() - EMPTY_BEFORE_BOOT
