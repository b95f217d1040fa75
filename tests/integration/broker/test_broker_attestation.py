"""From the recorded endorsement key to SVID, lease and SSH certificate, with a real TPM (swtpm) and the real verifier."""

from __future__ import annotations

import base64
import subprocess
from datetime import UTC, datetime

import pytest
from attest_lab import boot_events, boot_pcrs, entries, event_log, release, spki
from broker_rig import GOVERNANCE, encode, image_record
from swtpm_lab import Machine, SwTpm

from saw.attest.verifier import quote_binding
from saw.broker.client import BrokerRefusal
from saw.identity.x509 import new_key_and_csr, parse_svid


def b64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A booted TPM with its keys; each test uses it under a workspace id of its own."""
    directory = tmp_path_factory.mktemp("tpm")
    (directory / "template").mkdir()
    subprocess.run(
        ["swtpm_setup", "--tpm2", "--tpmstate", str(directory / "template"), "--pcr-banks", "sha256"],
        check=True,
        capture_output=True,
        timeout=60,
    )
    swtpm = SwTpm(directory, directory / "template")
    swtpm.start()
    try:
        yield Machine(swtpm, directory / "machine")
    finally:
        swtpm.stop()


class Agent:
    """The workspace's side of the protocol."""

    def __init__(self, lab, machine: Machine, client, name: str) -> None:
        self.lab, self.machine, self.client, self.name = lab, machine, client, name
        self.key = b""

    def register(self) -> None:
        pcrs = {str(pcr): value for pcr, value in release(boot_pcrs(boot_events())).items()}
        self.lab.register_image(image_record("measured", "3" * 64, pcrs))
        body = {"id": self.name, "sponsor": "ada", "blueprint": "coding", "ring": "stable", "image": "measured"}
        self.lab.operator.request("POST", "/v1/workspaces", body)
        self.lab.operator.request("PUT", f"/v1/workspaces/{self.name}/ek", {"ek_pub_pem": self.machine.ek_pem.decode()})
        for to in ("provisioning", "attesting"):
            self.lab.step(self.name, to)

    def enrol(self):
        body = {
            "workspace_id": self.name,
            "ek_pub_pem": self.machine.ek_pem.decode(),
            "ak_pub_b64": b64(self.machine.ak_pub),
        }
        challenge = self.client.post("/v1/attest/enrol", json=body)
        assert challenge.status_code == 200, challenge.text
        found = challenge.json()
        blob, secret = (base64.b64decode(found[field]) for field in ("credential_blob_b64", "secret_b64"))
        answer = {
            "challenge_id": found["challenge_id"],
            "secret_b64": b64(self.machine.tpm.activate_credential(blob, secret)),
        }
        return answer, self.client.post("/v1/attest/activate", json=answer)

    def nonce(self) -> bytes:
        answer = self.client.post("/v1/attest/nonce", json={"workspace_id": self.name})
        assert answer.status_code == 200, answer.text
        return base64.b64decode(answer.json()["nonce_b64"])

    def evidence(self, nonce: bytes, *digests: str) -> dict:
        self.key, csr = new_key_and_csr(self.name)
        quote = self.machine.tpm.quote(quote_binding(nonce, spki(csr)))
        log = entries(*digests)
        return {
            "workspace_id": self.name,
            "nonce_b64": b64(nonce),
            "quote_b64": b64(quote.attest),
            "signature_b64": b64(quote.signature),
            "pcrs": {str(pcr): value.hex() for pcr, value in quote.pcrs.items()},
            "event_log_b64": b64(event_log(self.machine.events)),
            "policy_log": [
                {"seq": item.seq, "policy_digest": item.policy_digest, "revision": item.revision} for item in log
            ],
            "csr_pem": csr.decode(),
            "ssh_host_pub": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIKHEChAAQHmFMGgr3tzkfSZKmjY0Qfsqkk0RzKwnYLAw",
        }

    def quote(self, evidence: dict):
        return self.client.post("/v1/attest/quote", json=evidence)


def failures(answer) -> set[str]:
    assert answer.status_code == 403, answer.text
    assert answer.json()["error"] == "not_attested"
    return {failure["code"] for failure in answer.json()["failures"]}


@pytest.mark.control("POL-03")
@pytest.mark.control("POL-05")
@pytest.mark.control("ID-04")
@pytest.mark.control("ID-02")
@pytest.mark.control("P0-04")
def test_no_good_quote_no_identity_and_a_good_one_gives_identity_lease_and_session(own_broker, machine) -> None:
    lab = own_broker
    digest, publication = lab.officers.publication(1)
    lab.operator.request("POST", "/v1/policy/publish", encode(publication))
    with lab.tls() as client:
        agent = Agent(lab, machine, client, "ws-a")
        agent.register()
        ssh = {"workspace_id": "ws-a", "public_key": agent.evidence(bytes(32), digest)["ssh_host_pub"], "ttl_s": 60}

        # The key in the quote is unknown until the recorded TPM has proved that it holds it.
        assert failures(agent.quote(agent.evidence(agent.nonce(), digest))) == {"ak_unknown"}
        stranger = "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n"
        body = {"workspace_id": "ws-a", "ek_pub_pem": stranger, "ak_pub_b64": b64(machine.ak_pub)}
        assert client.post("/v1/attest/enrol", json=body).json()["code"] == "ek_malformed"
        answer, activated = agent.enrol()
        assert activated.status_code == 200, activated.text
        assert client.post("/v1/attest/activate", json=answer).json()["code"] == "challenge_unknown"

        # Not the released policy, then a nonce used twice: refused, and nothing is granted.
        assert failures(agent.quote(agent.evidence(agent.nonce(), digest))) == {"policy_pcr_mismatch"}
        with pytest.raises(BrokerRefusal) as caught:
            lab.operator.request("POST", "/v1/certificates/ssh", ssh)
        assert caught.value.code == "workspace_not_admitted"
        machine.tpm.extend_policy(digest)
        nonce = agent.nonce()
        bad = {**agent.evidence(nonce, digest), "event_log_b64": b64(event_log(boot_events()[:-1]))}
        assert "event_log_mismatch" in failures(agent.quote(bad))
        assert failures(agent.quote(agent.evidence(nonce, digest))) == {"nonce_unknown"}
        before = lab.operator.request("GET", "/v1/workspaces/ws-a")
        assert before["state"] == "attesting"

        # The good quote.
        evidence = agent.evidence(agent.nonce(), digest)
        good = agent.quote(evidence)
        assert good.status_code == 200, good.text
        granted = good.json()
        svid = parse_svid(granted["svid_pem"])
        assert (svid.workspace_id, svid.policy_digest, granted["policy_digest"]) == ("ws-a", digest, digest)
        assert granted["lease"]["ttl_s"] == 90
        assert lab.operator.request("GET", "/v1/workspaces/ws-a")["version"] == before["version"] + 1
        assert "offline_s" not in granted["lease"], "the policy grants none"
        assert 80 < (datetime.fromisoformat(granted["lease"]["expires_at"]) - datetime.now(UTC)).total_seconds() <= 90
        assert granted["ssh_host_cert"].startswith("ssh-ed25519-cert-v01@openssh.com ")
        assert failures(agent.quote(evidence)) == {"nonce_unknown"}
        with lab.tls("perimeter", "edge") as edge:
            state = edge.get("/v1/perimeter/state").json()
        entry = state["workspaces"][0]
        assert (entry["state"], entry["svid_sha256"], entry["policy_digest"]) == ("active", svid.sha256, digest)
        assert (entry["released_digest"], list(state["releases"])) == (digest, [digest])
        assert state["policy_keys"]["threshold"] == 2
        session = lab.operator.request("POST", "/v1/certificates/ssh", ssh)
        assert session["certificate"].startswith("ssh-ed25519-cert-v01@openssh.com ")

        # Its report counts as verified over its own SVID only, and it cannot speak for another workspace.
        report = {"workspace_id": "ws-a", "kind": "policy_state", "state": "loaded", "policy_digest": digest}
        with lab.tls(pair=(agent.key, granted["svid_pem"].encode())) as own:
            assert own.post("/v1/workspace/report", json=report).json() == {"recorded": True, "verified": True}
            lab.workspace("ws-b")
            foreign = own.post("/v1/workspace/report", json={**report, "workspace_id": "ws-b"})
            assert (foreign.status_code, foreign.json()["code"]) == (403, "foreign_report")
            assert own.get("/v1/perimeter/state").json()["code"] == "not_a_perimeter"
        assert not client.post("/v1/workspace/report", json=report).json()["verified"]

        # A new release: the lease stays, the perimeter sees the difference, the old policy no longer attests.
        lab.officers.directory = lab.config.tuf_dir
        granting = GOVERNANCE.replace("ttl: 90s", "ttl: 90s, offline_ttl: 5m")
        newer, publication = lab.officers.publication(2, governance=granting)
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        shown = lab.operator.request("GET", "/v1/workspaces/ws-a")
        assert shown["lease_expires_at"] == entry["lease_expires_at"]
        watched = client.get("/v1/workspace/watch?workspace_id=ws-a").json()
        assert (watched["policy_digest"], watched["revision"]) == (newer, 2)
        assert failures(agent.quote(agent.evidence(agent.nonce(), digest))) == {"policy_not_current"}
        machine.tpm.extend_policy(newer)
        seen = lab.operator.request("GET", "/v1/workspaces?limit=1")["seq"]
        assert agent.quote(agent.evidence(agent.nonce(), digest, newer)).status_code == 200
        told = lab.operator.request("GET", f"/v1/workspace-changes?after={seen}")
        assert [(one["id"], one["policy_digest"]) for one in told["workspaces"]] == [("ws-a", newer)]

        # An image that is deprecated still attests; a revoked one loses its grants at once and attests no more.
        lab.move_image("measured", "deprecated")
        counted = lab.operator.request("GET", "/v1/workspaces/ws-a")["version"]
        seen = lab.operator.request("GET", "/v1/workspaces?limit=1")["seq"]
        renewed = agent.quote(agent.evidence(agent.nonce(), digest, newer))
        assert renewed.status_code == 200
        assert lab.operator.request("GET", f"/v1/workspace-changes?after={seen}")["workspaces"] == [], "a lease alone"
        assert lab.operator.request("GET", "/v1/workspaces/ws-a")["version"] == counted, "a lease is not a change"
        assert (renewed.json()["lease"]["ttl_s"], renewed.json()["lease"]["offline_s"]) == (90, 300)
        key = agent.key
        assert lab.move_image("measured", "revoked")["workspaces_cut_off"] == ["ws-a"]
        assert lab.operator.request("GET", "/v1/workspaces/ws-a")["lease_expires_at"] is None
        assert failures(agent.quote(agent.evidence(agent.nonce(), digest, newer))) == {"image_revoked"}

        # Killed: no nonce, no lease, no session, no word; evidence asked for before the kill is worth nothing.
        nonce = agent.nonce()
        with lab.tls(pair=(key, renewed.json()["svid_pem"].encode())) as own:
            assert own.post("/v1/workspace/report", json=report).json()["verified"]
            lab.operator.request("POST", "/v1/workspaces/ws-a/kill", {"reason": "drill"})
            calls = {**report, "kind": "calls", "state": "", "calls": {"allowed": 1, "denied": {}, "window_s": 10}}
            for speaker, said in ((own, report), (client, report), (own, calls)):
                refused = speaker.post("/v1/workspace/report", json=said)
                assert (refused.status_code, refused.json()["code"]) == (403, "workspace_not_admitted")
        assert failures(agent.quote(agent.evidence(nonce, digest, newer))) == {"workspace_not_admitted"}
        assert lab.operator.request("GET", "/v1/workspaces/ws-a")["lease_expires_at"] is None
        with pytest.raises(BrokerRefusal):
            lab.operator.request("POST", "/v1/certificates/ssh", ssh)

    # The whole story is in the trail, names its subjects, and is complete.
    ours = [event["event"] for event in lab.events()]
    quotes = [event for event in ours if event.get("auth_protocol") == "tpm2-quote"]
    assert len(quotes) == 3
    assert {event["policy"]["uid"] for event in quotes} == {digest, newer}
    assert any(event.get("status_detail") == "not_attested" for event in ours)
    sessions = [event for event in ours if event.get("auth_protocol") == "ssh-certificate"]
    assert session["session_id"] in {event["session"]["uid"] for event in sessions if event["status_id"] == 1}
    assert sessions[0]["unmapped"]["saw"]["principal"] == "operator:root"
    assert lab.operator.request("GET", "/v1/audit/verify")["complete"]


@pytest.mark.control("POL-03")
@pytest.mark.regression("CVE-2025-13609")
def test_another_endorsement_key_is_neither_recorded_nor_enrolled(broker, machine) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import rsa

    other = rsa.generate_private_key(65537, 2048).public_key()
    other_pem = other.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
    broker.workspace("ek", to="attesting")
    with broker.tls() as client:
        body = {"workspace_id": "ek", "ek_pub_pem": machine.ek_pem.decode(), "ak_pub_b64": b64(machine.ak_pub)}
        refused = client.post("/v1/attest/enrol", json=body)
        assert (refused.status_code, refused.json()["code"]) == (403, "unknown_ek")
        record = {"ek_pub_pem": machine.ek_pem.decode()}
        assert broker.operator.request("PUT", "/v1/workspaces/ek/ek", record)["changed"]
        assert not broker.operator.request("PUT", "/v1/workspaces/ek/ek", record)["changed"]
        with pytest.raises(BrokerRefusal) as caught:
            broker.operator.request("PUT", "/v1/workspaces/ek/ek", {"ek_pub_pem": other_pem})
        assert caught.value.code == "ek_recorded"
        refused = client.post("/v1/attest/enrol", json={**body, "ek_pub_pem": other_pem})
        assert refused.json()["code"] == "unknown_ek"
        assert client.post("/v1/attest/enrol", json=body).status_code == 200
        challenge = client.post("/v1/attest/enrol", json=body).json()["challenge_id"]
        wrong = {"challenge_id": challenge, "secret_b64": b64(bytes(32))}
        assert client.post("/v1/attest/activate", json=wrong).json()["code"] == "challenge_failed"
        assert client.post("/v1/attest/activate", json=wrong).json()["code"] == "challenge_unknown"
