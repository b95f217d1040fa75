"""A broker that runs jobs, without network, and its worker: each call as the routes make it."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import msgspec
from review_world import OPERATOR, World

from saw.attest.verifier import RELEASED_PCRS
from saw.broker.context import Caller
from saw.broker.gate_settings import MachineSettings
from saw.broker.job_settings import JobSettings
from saw.broker.schema import images
from saw.jobs.messages import AskClaim, AskJob, Beat, BeatAnswer, Cancel, End, Work

WORKER = Caller("worker:saw-worker", "operator-socket", "request-5")
OTHER = Caller("machine:runner", "10.0.0.9", "request-6")
ASKER = Caller("machine:portal", "10.0.0.8", "request-7")
STRANGER = Caller("machine:stranger", "10.0.0.7", "request-8")
MACHINES = {
    "runner": MachineSettings(scopes=("jobs:run",)),
    "portal": MachineSettings(scopes=("jobs:ask",)),
    "stranger": MachineSettings(scopes=()),
}
CREATE = {
    "sponsor": "ada@example.com",
    "blueprint": "coding",
    "ring": "canary",
    "image": "debian",
    "image_path": "/var/lib/saw/images/debian.raw",
}


class JobWorld(World):
    """Two active workspaces, ``ws-a`` and ``ws-b``; an image that may be used in the ring ``canary``."""

    def __init__(self, directory: Path, **settings: Any) -> None:
        super().__init__(directory, **{"jobs": JobSettings(), "machines": MACHINES, **settings})
        record = {
            "format": "saw-image-release/2",
            "name": "debian",
            "image_sha256": "2" * 64,
            "inputs_digest": "inputs",
            "created": "2026-11-23T00:00:00Z",
            "not_after": "2026-12-23T00:00:00Z",
            "boot": {"pcrs": {str(pcr): f"{pcr:064x}" for pcr in RELEASED_PCRS}},
        }
        with self.broker.services.store.write() as tx:
            told = {"record": msgspec.json.encode(record).decode(), "registered_at": "2026-11-23T00:00:00.000Z"}
            tx.connection.execute(images.insert().values(name="debian", image_sha256="2" * 64, envelope="x", **told))

    def ask(self, kind: str = "stop", workspace: str = "ws-a", caller: Caller = OPERATOR, **how: Any) -> dict[str, Any]:
        """Ask for a job; ``key`` is the idempotency key, everything else a parameter."""
        self.later(milliseconds=1)  # the queue is in the order of time
        key = how.pop("key", secrets.token_hex(8))
        body = {"kind": kind, "workspace": workspace, "idempotency_key": key, "parameters": how}
        return self.broker.jobs.ask(caller, msgspec.convert(body, AskJob))

    def claim(self, token: str | None = None, caller: Caller = WORKER, kinds: tuple[str, ...] = ()) -> Work | None:
        token = token or token_of("a")
        body = msgspec.convert({"claim": token, "executor": "ansible", "kinds": kinds}, AskClaim)
        return self.broker.job_work.claim(caller, body).claimed

    def beat(self, job: str, token: str | None = None, caller: Caller = WORKER, **said: Any) -> BeatAnswer:
        return self.broker.job_work.beat(caller, job, msgspec.convert({"claim": token or token_of("a"), **said}, Beat))

    def end(self, job: str, outcome: str = "succeeded", caller: Caller = WORKER, **said: Any) -> dict[str, Any]:
        body = {"claim": token_of("a"), "outcome": outcome, **said}
        return self.broker.job_work.end(caller, job, msgspec.convert(body, End))

    def cancel(self, job: str, caller: Caller = OPERATOR) -> dict[str, Any]:
        return self.broker.jobs.cancel(caller, job, Cancel("changed my mind"))

    def show(self, job: str) -> dict[str, Any]:
        return self.broker.jobs.show(OPERATOR, job)

    def audited(self, job: str) -> list[tuple[str, str]]:
        """What the trail says of a job: who did it, and what."""
        found = []
        for item in self.broker.trail.page("broker", 0, 1000)["events"]:
            if item.event.get("entity") == {"type": "job", "uid": job}:
                said = item.event["unmapped"]["saw"]
                what = said.get("to") or said.get("cancel") or said.get("reason") or said.get("external_id") or ""
                found.append((said["principal"], str(what)))
        return found


def token_of(letter: str) -> str:
    """A claim of a worker."""
    return letter * 43
