from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saw.cli import vm as vm_cli
from saw.vm import data_disk, golden, measure, qemu, released, spec

SYSTEMCTL = """#!/bin/sh
echo "$@" >> "{log}"
case "$1" in
  is-active) [ -e "{flag}" ] ;;
  start) : > "{flag}" ;;
  stop) rm -f "{flag}" ;;
esac
"""


@pytest.fixture
def hypervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Private state and runtime directories of the driver; the service manager at the far end is a small program.

    Release records are not asked for here but in test_released_image.py, which is about them.
    """
    settings = tmp_path / "hypervisor.json"
    settings.write_text('{"image_records": "unchecked"}')
    monkeypatch.setattr(released, "SETTINGS", settings)
    state, runtime = tmp_path / "lib/vms", tmp_path / "run"
    for module in (spec, qemu, vm_cli, measure, golden, data_disk):
        for name, value in (("STATE", state), ("RUNTIME", runtime)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(measure, "PLACE", tmp_path / "lib/measure")
    monkeypatch.setattr(measure, "RUNTIME_PLACE", tmp_path / "run-measure")
    monkeypatch.setattr(golden, "IMAGES", tmp_path / "lib/images")
    state.mkdir(parents=True)
    firmware = tmp_path / "vars.fd"
    firmware.write_bytes(b"factory")
    monkeypatch.setattr(qemu, "FIRMWARE_VARS", firmware)
    tools = tmp_path / "tools"
    tools.mkdir()
    fake = tools / "systemctl"
    fake.write_text(SYSTEMCTL.format(log=tmp_path / "systemctl.log", flag=tmp_path / "active"))
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    return tmp_path


@pytest.fixture(scope="session")
def made_tpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vTPM that the driver manufactured once for all tests that are not about its making."""
    place = tmp_path_factory.mktemp("tpm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spec, "STATE", place / "vms")
        patch.setattr(qemu, "STATE", place / "vms")
        vm = spec.VmSpec(id="template", number=1, image="/none", image_sha256="0" * 64)
        vm.directory.mkdir(parents=True)
        assert qemu.make_tpm(vm)
        return vm.directory / "tpm"


@pytest.fixture
def make_spec(hypervisor: Path, request: pytest.FixtureRequest) -> Callable[..., spec.VmSpec]:
    """Make a specification on a real (empty) golden image; ``name`` picks the image, ``tpm`` places a made vTPM."""

    def make(*, name: str = "golden", tpm: bool = False, **fields: Any) -> spec.VmSpec:
        # In a folder of its own: images are looked for two folders up, where those of other tests would lie otherwise.
        image = hypervisor / "golden" / f"{name}.qcow2"
        image.parent.mkdir(exist_ok=True)
        if not image.exists():
            size = "64M" if name == "golden" else "65M"
            subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), size], check=True)
        digest = hashlib.sha256(image.read_bytes()).hexdigest()
        vm = spec.VmSpec(
            **{"id": "ws-t", "number": 7, "image": str(image), "image_sha256": digest, "data_disk_mib": 64, **fields}
        )
        if tpm:
            shutil.copytree(request.getfixturevalue("made_tpm"), vm.directory / "tpm")
        return vm

    return make
