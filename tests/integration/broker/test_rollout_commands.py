"""The operator's commands on a real broker: watch a ring take a release, break it, see it halted and rolled back."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest
from broker_rig import Lab, cli, encode

from databases import beside
from saw.cli.policy_signing import save_publication
from saw.identity.x509 import Authority, new_key_and_csr
from saw.policy.tuf_changes import roll_back
from saw.policy.tuf_draft import contribute
from saw.policy.tuf_repository import adopt_publication
from saw.policy.tuf_rings import held_revision


class Ring:
    """A ring of one broker; workspaces report under identities of the broker's own authority."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.digests: dict[int, str] = {}

    def publish(self, revision: int) -> str:
        content = POLICY.replace("REVISION", str(revision))
        self.digests[revision], made = self.lab.officers.publication(revision, content=content)
        self.lab.operator.request("POST", "/v1/policy/publish", encode(made))
        adopt_publication(self.lab.officers.directory, made)
        return self.digests[revision]

    def attest(self, name: str, digest: str) -> None:
        with beside(self.lab.config) as database:
            database.execute("UPDATE workspaces SET state='active', policy_digest=? WHERE id=?", (digest, name))

    def say(self, name: str, state: str, revision: int, reason: str = "") -> None:
        digest = self.digests[revision]
        key, csr = new_key_and_csr(name)
        authority = Authority.load(self.lab.config.keys / "x509")
        pair = (key, authority.issue_svid(csr, name, digest, datetime.now(UTC)))
        body = {"workspace_id": name, "kind": "policy_state", "state": state, "reason": reason, "policy_digest": digest}
        with self.lab.tls(pair=pair) as client:
            assert client.post("/v1/workspace/report", json={**body, "revision": revision}).status_code == 200

    def load(self, name: str, revision: int) -> None:
        self.attest(name, self.digests[revision])
        self.say(name, "loaded", revision)

    def saw(self, *arguments: str) -> tuple[int, dict]:
        done = cli(self.lab, "policy", *arguments, "--json")
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    def rollback(self, to: int, signers: int = 2) -> str:
        directory = self.lab.officers.directory
        now = datetime.now(UTC).replace(microsecond=0)
        old = held_revision(directory, "stable", "coding", to)
        draft = roll_back(directory, "stable", "coding", old, now=now, validity=timedelta(days=1))
        made = contribute(draft, self.lab.officers.keys[:signers]).publication
        path = str(self.lab.directory / f"rollback-{to}-{signers}")
        save_publication(path, made)
        return path


POLICY = """version: 1
network_policies:
  git:
    endpoints: [{host: git.example.com, port: 443, protocol: rest, access: read-only}]
    binaries: [{path: /usr/bin/gitREVISION}]
"""


@pytest.fixture
def ring(own_broker):
    """Two workspaces on revision 1; revision 2 just published."""
    made = Ring(own_broker)
    made.publish(1)
    for name in ("a", "b"):
        own_broker.workspace(name)
        made.load(name, 1)
    made.publish(2)
    return made


@pytest.mark.control("POL-02")
def test_watch_ends_well_when_everyone_loaded_it_and_badly_when_it_is_late(ring):
    code, seen = ring.saw("watch", "--ring", "stable", "--timeout", "0")
    assert (code, seen["outcome"]) == (1, "timeout")
    context = ring.lab.directory / "context.json"
    command = [sys.executable, "-m", "saw.cli.main", "policy", "watch", "--ring", "stable", "--context", str(context)]
    watching = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    first = watching.stdout.readline()
    assert "revision 2 running: loaded 0" in first
    ring.load("a", 2)
    ring.load("b", 2)
    rest = watching.stdout.read()
    assert watching.wait(20) == 0
    assert "every running workspace has loaded it" in rest
    code, status = ring.saw("status", "a")
    assert (code, status["given_revision"], status["history"][0]["state"]) == (0, 2, "loaded")


@pytest.mark.control("LIF-03")
def test_a_broken_release_is_halted_rolled_back_and_stays_so_over_a_kill(ring):
    code, refused = ring.saw("escrow", ring.rollback(1, signers=1), "--ring", "stable")
    assert (code, refused["error"]["code"]) == (1, "threshold")
    path = ring.rollback(1)
    assert ring.saw("escrow", path, "--ring", "stable")[0] == 0
    ring.load("a", 2)
    ring.say("b", "refused", 2, "validate_failed")
    code, seen = ring.saw("watch", "--ring", "stable", "--timeout", "0")
    # A watcher who begins now follows the rollback.
    assert (code, seen["rollouts"][0]["revision"], seen["rollouts"][0]["returns_to"]) == (1, 3, 1)
    assert seen["outcome"] == "timeout"
    # Who asks for the release that was rolled back is told so, and about no other.
    code, asked = ring.saw("watch", "--ring", "stable", "--revision", "2", "--timeout", "0")
    assert (code, asked["outcome"], asked["rollouts"][0]["revision"]) == (1, "halted", 2)
    code, unknown = ring.saw("watch", "--ring", "stable", "--revision", "9", "--timeout", "0")
    assert (code, unknown["error"]["message"]) == (1, "no revision 9 rolls out to ring stable")
    ring.lab.process.kill()
    ring.lab.process.wait(10)
    ring.lab.start()
    found = ring.lab.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"]
    assert [(one["revision"], one["state"]) for one in found] == [(3, "running"), (2, "halted"), (1, "superseded")]
    ring.digests[3] = found[0]["policy_digest"]
    ring.load("a", 3)
    ring.load("b", 3)
    assert ring.saw("watch", "--ring", "stable", "--timeout", "0")[0] == 0


@pytest.mark.control("POL-02")
def test_without_a_rollback_in_escrow_a_halt_holds_back_and_names_the_command(ring):
    ring.say("b", "refused", 2, "validate_failed")
    done = cli(ring.lab, "policy", "watch", "--ring", "stable", "--timeout", "0")
    assert done.returncode == 1
    assert "saw policy rollback --repository OFFICERS_COPY --ring stable --blueprint coding --to 1" in done.stdout
    code, status = ring.saw("status", "a")
    assert (code, status["given_revision"]) == (0, 1)
    assert ring.saw("resume", "--ring", "stable", "--reason", "fixed the image")[0] == 0
    assert ring.saw("status", "a")[1]["given_revision"] == 2
    assert ring.saw("halt", "--ring", "stable", "--reason", "look again")[0] == 0
    ring.lab.process.kill()
    ring.lab.process.wait(10)
    ring.lab.start()
    found = ring.lab.operator.request("GET", "/v1/policy/rollouts/stable")["rollouts"][0]
    assert (found["state"], found["reason"]) == ("halted", "look again")
    code, refused = ring.saw("escrow", ring.rollback(1), "--ring", "stable")
    assert (code, refused["error"]["code"]) == (1, "halted")


def test_the_calls_about_rollouts_are_for_operators_alone(ring):
    with ring.lab.tls() as client:
        assert client.get("/v1/policy/rollouts").status_code == 404
        assert client.post("/v1/policy/rollouts/stable/halt", json={"reason": "x"}).status_code == 404
        given = client.get("/v1/workspace/bundle?workspace_id=a").json()
    assert given["policy_digest"] == ring.digests[2]
