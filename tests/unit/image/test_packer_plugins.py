"""What newer Packer releases fetch is what the template uses; the release that is tested has it built in."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

PACKER = Path(__file__).resolve().parents[3] / "packer"
CORE = {"null", "shell-local"}
"""Parts that every release has built in."""
pytestmark = pytest.mark.control("P0-02")


def test_the_named_plugins_are_those_that_the_template_uses() -> None:
    text = "\n".join(path.read_text() for path in PACKER.glob("*.pkr.hcl"))
    used = set(re.findall(r'^\s*(?:source|provisioner|post-processor) "([a-z-]+)"', text, re.MULTILINE)) - CORE
    required = (PACKER / "plugins/required.pkr.hcl").read_text()
    named = re.findall(
        r'^ +([a-z]+) = \{\n +source  = "github\.com/hashicorp/([a-z]+)"\n +version = ">= [0-9.]+"\n +\}$',
        required,
        re.MULTILINE,
    )
    assert {name for name, _ in named} == {source for _, source in named} == used == {"ansible", "qemu"}


@pytest.mark.skipif(shutil.which("packer") is None, reason="packer is not installed")
def test_the_release_with_built_in_plugins_takes_the_template_and_not_that_file() -> None:
    def takes(folder: Path) -> bool:
        command = ["packer", "validate", "-syntax-only", str(folder)]
        return subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0

    version = subprocess.run(["packer", "version"], capture_output=True, text=True, check=True, timeout=60).stdout
    if not version.startswith("Packer v1.6."):
        pytest.skip(f"{version.strip()} is another release")
    assert takes(PACKER)
    assert not takes(PACKER / "plugins")
