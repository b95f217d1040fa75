"""The operating guide's walk through a change of policy, its commands run as they are written, against a real broker.

Officers, broker, rollout, limits, halt and the way back are real. The far end is not: what the guide does in the workspace with
``saw ssh`` arrives here as the reports of a workspace and the events of its perimeter host.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from broker_rig import Lab, encode
from cryptography.hazmat.primitives import serialization
from guide_walk import LOADED, WIDER, commands, exit_codes, last

from databases import beside
from saw.audit import Chain, EventFactory, Head, Subject
from saw.broker.client import OperatorClient
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.tuf_repository import adopt_publication

ROOT = Path(__file__).resolve().parents[3]
FACTORY = EventFactory("saw-gatekeeper", host="edge", new_uid=lambda: "uid")
pytestmark = [pytest.mark.control("POL-01"), pytest.mark.control("LIF-03")]


class Agent(threading.Thread):
    """The workspace ``ws-demo``: loads whatever it is given, and says so under its identity."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(daemon=True)
        self.lab, self.ended, self.loaded = lab, threading.Event(), ""

    def run(self) -> None:
        seq = 0
        with self.lab.tls() as client:
            while not self.ended.is_set():
                given = client.get(f"/v1/workspace/watch?workspace_id=ws-demo&after={seq}&wait=1").json()
                seq = given["seq"]
                if given["policy_digest"] and given["policy_digest"] != self.loaded:
                    self.load(given["policy_digest"], given["revision"])

    def load(self, digest: str, revision: int) -> None:
        """Report the states in their order; the attestation between them is written straight into the register."""
        key, csr = new_key_and_csr("ws-demo")
        authority = Authority.load(self.lab.config.keys / "x509")
        pair = (key, authority.issue_svid(csr, "ws-demo", digest, datetime.now(UTC)))
        with self.lab.tls(pair=pair) as client:
            for state in ("offered", "verified", "loaded"):
                if state == "loaded":
                    with beside(self.lab.config) as database:
                        database.execute("UPDATE workspaces SET state='active', policy_digest=?", (digest,))
                body = {"workspace_id": "ws-demo", "kind": "policy_state", "state": state, "reason": ""}
                answer = client.post(
                    "/v1/workspace/report", json={**body, "policy_digest": digest, "revision": revision}
                )
                assert answer.status_code == 200, answer.text
        self.loaded = digest


class Walk:
    """A folder that looks like a checkout with the embedded default, and the commands of the guide in it."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder, self.agent = lab, folder, Agent(lab)
        shutil.copytree(ROOT / "policies", folder / "policies")
        keys = folder / "build/lab/keys"
        keys.mkdir(parents=True)
        form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        for name, key in zip("abc", lab.officers.keys, strict=True):
            file = keys / f"officer-{name}.key"
            file.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, none))
            file.chmod(0o600)
        (folder / "build/lab/officers").symlink_to(lab.officers.directory)
        context = {"broker": {"socket": lab.config.operator_socket, "ssh": None}}
        (folder / "build/lab/context.json").write_text(json.dumps(context))
        programs = folder / "programs"
        programs.mkdir()
        (programs / "saw").write_text(f'#!/bin/sh\nexec {sys.executable} -m saw.cli.main "$@"\n')
        (programs / "saw").chmod(0o755)
        self.operator = OperatorClient.from_context(folder / "build/lab/context.json")
        self.chain = Chain("edge", Head())
        self.broken = False

    def release(self) -> None:
        """Put ``policies/coding`` in force, as ``make workspace`` does, on a workspace that runs."""
        texts = [(self.folder / "policies/coding" / name).read_text() for name in ("policy.yaml", "governance.yaml")]
        _, made = self.lab.officers.publication(1, content=texts[0], governance=texts[1])
        self.operator.request("POST", "/v1/policy/publish", encode(made))
        adopt_publication(self.lab.officers.directory, made)
        self.lab.workspace("ws-demo", to="attesting")
        self.agent.start()

    def step(self, number: int) -> dict[str, str]:
        """Run a step of the guide; return the output of its commands."""
        return {command: self.run(command) for command in commands(number)}

    def run(self, command: str) -> str:
        if command.startswith("saw ssh ws-demo -- curl "):
            return self.call(25 if "[1-25]" in command else 1)
        environment = {
            **os.environ,
            "SAW_CONTEXT": str(self.folder / "build/lab/context.json"),
            "PATH": f"{self.folder}/programs:{os.environ['PATH']}",
        }
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=environment, capture_output=True, text=True, timeout=330, check=False
        )  # fmt: skip
        assert done.returncode in exit_codes(command), (
            f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    def call(self, times: int) -> str:
        """What the perimeter host ships after calls under the loaded policy: it has no credential ``api-token-next``."""
        state = self.lab_state()
        bundle = next(text for digest, text in state["releases"].items() if digest == self.agent.loaded)
        refused = (
            "api-token-next"
            in base64.b64decode(json.loads(base64.b64decode(bundle))["members"]["governance.yaml"]).decode()
        )
        subject = Subject("workspace:ws-demo", "agent-1", "ws-demo", self.agent.loaded, "req")
        events = [
            FACTORY.http_activity(
                datetime.now(UTC), subject, method="GET", scheme="https", host="api.example.com", port=443,
                path="/v1/items", allowed=not refused, reason="credential_unavailable" if refused else "",
            )
            for _ in range(times)
        ]  # fmt: skip
        shipment = {"source": "edge", "events": [msgspec.to_builtins(self.chain.append(event)) for event in events]}
        with self.lab.tls("perimeter", "edge") as edge:
            assert edge.post("/v1/perimeter/events", json=shipment).status_code == 200
        return "403" if refused else "405"

    def lab_state(self) -> dict[str, Any]:
        with self.lab.tls("perimeter", "edge") as edge:
            return dict(edge.get("/v1/perimeter/state").json())

    def rollouts(self) -> list[dict[str, Any]]:
        return list(self.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"])


@pytest.fixture
def walk(own_broker: Lab, tmp_path: Path) -> Iterator[Walk]:
    made = Walk(own_broker, tmp_path)
    made.release()
    yield made
    made.agent.ended.set()
    made.agent.join(20)


def test_a_change_is_seen_signed_by_two_released_broken_halted_and_rolled_back(walk: Walk) -> None:
    assert "allow" in last(walk.step(1), "saw policy explain")
    assert WIDER in last(walk.step(2), "saw policy diff")
    signed = walk.step(3)
    assert len(signed) == 4
    for command, shown in signed.items():
        assert WIDER in shown, command
        assert "WIDENS the reach of" in shown, command
    taken = walk.step(4)
    assert LOADED in last(taken, "saw policy watch")
    assert [(one["revision"], one["all_loaded"]) for one in walk.rollouts() if one["newest"]] == [(2, True)]
    broken = walk.step(5)
    assert "is in escrow" in last(broken, "saw policy escrow")
    assert LOADED in last(broken, "saw policy watch")
    ended = walk.step(6)
    assert LOADED in last(ended, "saw policy watch")
    found = {one["revision"]: one for one in walk.rollouts()}
    assert (found[3]["state"], found[3]["rollback"]["state"]) == ("halted", "published")
    assert "max_deny_rate_increase" in found[3]["reason"]
    assert (found[4]["newest"], found[4]["returns_to"]) == (True, 2)
    assert walk.agent.loaded == found[4]["policy_digest"]
    own = json.loads(walk.run("saw policy rings --repository build/lab/officers --json"))["rings"]
    assert [one["current"]["revision"] for one in own] == [4], "the officers' copy is what the ring runs"
