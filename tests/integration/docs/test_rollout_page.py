"""docs/rollout.md as it is written: the way back is signed, the ring loads, is halted, and returns."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from broker_rig import Lab, encode
from cryptography.hazmat.primitives import serialization
from page import run_page

from databases import beside
from saw.broker.config import RolloutSettings
from saw.cli.policy_signing import save_publication
from saw.files import write_private
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.tuf_repository import adopt_publication

POLICY = """version: 1
network_policies:
  git:
    endpoints: [{host: git.example.com, port: 443, protocol: rest, access: read-only}]
    binaries: [{path: /usr/bin/gitREVISION}]
"""


class Obedient:
    """A workspace that loads what it is given; the attestation of its TPM is written straight into the register."""

    def __init__(self, lab: Lab, name: str) -> None:
        self._lab, self._name = lab, name
        lab.workspace(name, to="attesting")
        self._authority = Authority.load(lab.config.keys / "x509")
        self._stop = threading.Event()
        self._loaded = ""
        self._attest("0" * 64)
        self._thread = threading.Thread(target=self._follow)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(60)

    def _attest(self, digest: str) -> tuple[bytes, bytes]:
        with beside(self._lab.config) as store:
            store.execute(
                "UPDATE workspaces SET state = 'active', policy_digest = ? WHERE id = ?", (digest, self._name)
            )
        key, csr = new_key_and_csr(self._name)
        return key, self._authority.issue_svid(csr, self._name, digest, datetime.now(UTC))

    def _follow(self) -> None:
        with self._lab.tls() as anybody:
            while not self._stop.is_set():
                watched = anybody.get(f"/v1/workspace/watch?workspace_id={self._name}&after=0&wait=0").json()
                digest = watched["policy_digest"]
                if digest in {None, self._loaded}:
                    self._stop.wait(0.1)
                    continue
                body = {"workspace_id": self._name, "kind": "policy_state", "state": "loaded", "policy_digest": digest}
                with self._lab.tls(pair=self._attest(digest)) as client:
                    answer = client.post("/v1/workspace/report", json={**body, "revision": watched["revision"]})
                assert answer.status_code == 200, answer.text
                self._loaded = digest


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[tuple[Lab, Path]]:
    """A broker that wants a way back; revision 6 runs in ``stable``, and revision 7 is signed in ``publication``."""
    directory = Path(tempfile.mkdtemp(prefix="saw-page-"))
    lab = Lab(directory, rollout=RolloutSettings(require_rollback=True))
    try:
        lab.start()
        for revision in (6, 7):
            _, made = lab.officers.publication(revision, content=POLICY.replace("REVISION", str(revision)))
            if revision == 6:
                lab.operator.request("POST", "/v1/policy/publish", encode(made))
                adopt_publication(lab.officers.directory, made)
            save_publication(str(tmp_path / "publication"), made)
        (tmp_path / "officers").symlink_to(lab.officers.directory)
        (tmp_path / "keys").mkdir()
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        for name, key in zip(("ada", "ben", "cleo"), lab.officers.keys, strict=True):
            write_private(tmp_path / f"keys/{name}.key", key.private_bytes(*form))
        (tmp_path / "context.json").write_text(json.dumps({"broker": {"socket": lab.config.operator_socket}}))
        workspace = Obedient(lab, "ws-demo")
        try:
            yield lab, tmp_path
        finally:
            workspace.stop()
    finally:
        lab.stop()
        shutil.rmtree(directory)


@pytest.mark.control("LIF-03")
def test_every_command_of_the_page_does_what_the_page_says(desk: tuple[Lab, Path]) -> None:
    lab, folder = desk
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    printed = run_page("docs/rollout.md", folder, {"SAW_CONTEXT": str(folder / "context.json"), "PATH": path})
    assert len(printed) == 2
    found = lab.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"]
    assert [(one["revision"], one["state"]) for one in found[:2]] == [(8, "running"), (7, "halted")]
