"""docs/policy-ansible.md as it is written: shown, approved, signed, released and taken back by playbooks."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from broker_rig import Lab, encode
from cryptography.hazmat.primitives import serialization
from page import ROOT, run_page

from saw.files import write_private
from saw.policy.tuf_repository import adopt_publication


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[tuple[Lab, Path]]:
    """The officers' machine with the repository's policies; the ring ``canary`` runs a narrower revision 6 of ``coding``."""
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab = Lab(directory)
    try:
        lab.start()
        _, made = lab.officers.publication(6, ring="canary")
        lab.operator.request("POST", "/v1/policy/publish", encode(made))
        adopt_publication(lab.officers.directory, made)
        shutil.copytree(ROOT / "policies", tmp_path / "policies")
        (tmp_path / "build/policy").mkdir(parents=True)
        (tmp_path / "build/policy/repository").symlink_to(lab.officers.directory)
        (tmp_path / "keys").mkdir()
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for name, key in zip(("ada", "ben", "cleo"), lab.officers.keys, strict=True):
            write_private(tmp_path / f"keys/{name}.key", key.private_bytes(*form))
        (tmp_path / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        link = tmp_path / "installed/ansible_collections/secure_agent/workspace"
        link.parent.mkdir(parents=True)
        link.symlink_to(ROOT)
        yield lab, tmp_path
    finally:
        lab.stop()
        shutil.rmtree(directory)


def _approve(printed: str) -> Mapping[str, str]:
    """Read the list, and approve what it shows."""
    found = re.search(r"reach digest[^0-9a-f]*([0-9a-f]{64})", printed)
    return {"APPROVED": found[1]} if found else {}


@pytest.mark.thorough
def test_every_command_of_the_page_does_what_the_page_says(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk
    environment = {
        "SAW_CONTEXT": str(folder / "context.json"),
        "ANSIBLE_COLLECTIONS_PATH": str(folder / "installed"),
        "ANSIBLE_NOCOLOR": "1",
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
    }
    run_page("docs/policy-ansible.md", folder, environment, _approve)
    found = lab.operator.request("GET", "/v1/policy/rollouts/canary")["rollouts"]
    assert [(one["revision"], one["returns_to"]) for one in found] == [(8, 6), (7, None), (6, None)]
