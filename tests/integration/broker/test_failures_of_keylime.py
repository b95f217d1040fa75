"""Failures that became public in another verifier of TPMs (Keylime), tried on ours: a real broker, a real TPM in software.

Each is refused beside what it would look like when all is well. docs/regressions.md says what each was.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from attest_lab import SoftTpm
from broker_rig import Lab, encode, running_broker
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from swtpm_lab import Machine
from test_broker_attestation import Agent, b64, failures, machine

from saw.attest.tpm import TpmError
from saw.broker.client import BrokerRefusal

pytestmark = pytest.mark.control("POL-03")
__all__ = ["machine"]  # the fixture of the other module


class Patient:
    """A client that asks again where it asked too often: a workspace has its share of questions."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        end = time.monotonic() + 60
        while (answer := self._client.request(method, path, **more)).status_code == 429 and time.monotonic() < end:
            time.sleep(0.2)
        return answer

    def post(self, path: str, **more: Any) -> httpx.Response:
        return self.request("POST", path, **more)


class Attested:
    """A workspace that attested, with its TPM, and the broker that knows it."""

    def __init__(self, lab: Lab, tpm: Machine, client: Patient) -> None:
        self.lab, self.tpm, self.client = lab, tpm, client
        self.digest, publication = lab.officers.publication(1)
        lab.operator.request("POST", "/v1/policy/publish", encode(publication))
        self.agent = Agent(lab, tpm, client, "ws-k")
        self.agent.register()
        assert self.agent.enrol()[1].status_code == 200
        tpm.tpm.extend_policy(self.digest)
        assert self.quote().status_code == 200

    def evidence(self, **change: Any) -> dict[str, Any]:
        """Good evidence over a fresh nonce, with ``change`` in it."""
        return {**self.agent.evidence(self.agent.nonce(), self.digest), **change}

    def quote(self, **change: Any) -> httpx.Response:
        return self.agent.quote(self.evidence(**change))

    def enrol(self, ak_pub: bytes, ek_pem: str = "") -> httpx.Response:
        ek = ek_pem or self.tpm.ek_pem.decode()
        return self.client.post(
            "/v1/attest/enrol", json={"workspace_id": "ws-k", "ek_pub_pem": ek, "ak_pub_b64": b64(ak_pub)}
        )

    def activate(self, challenge: dict[str, str], secret: bytes) -> httpx.Response:
        body = {"challenge_id": challenge["challenge_id"], "secret_b64": b64(secret)}
        return self.client.post("/v1/attest/activate", json=body)

    def solved(self, challenge: dict[str, str]) -> bytes:
        """What the TPM makes of a challenge; raises :class:`TpmError` when it is not for its keys."""
        blob, secret = (base64.b64decode(challenge[name]) for name in ("credential_blob_b64", "secret_b64"))
        return self.tpm.tpm.activate_credential(blob, secret)

    def shown(self) -> dict[str, Any]:
        return dict(self.lab.operator.request("GET", "/v1/workspaces/ws-k"))


@pytest.fixture(scope="module")
def there(machine: Machine) -> Iterator[Attested]:
    with running_broker() as lab, lab.tls() as client:
        yield Attested(lab, machine, Patient(client))


def other_ek() -> str:
    key = rsa.generate_private_key(65537, 2048).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.mark.regression("CVE-2022-1053")
def test_cve_2022_1053_a_key_that_the_recorded_tpm_did_not_activate_never_verifies_a_quote(there: Attested) -> None:
    fake = SoftTpm()

    def by_software() -> set[str]:
        """Try the right values, signed by a key of software."""
        good = there.evidence()
        return failures(
            there.agent.quote({**good, "signature_b64": b64(fake.sign(base64.b64decode(good["quote_b64"])))})
        )

    # The real TPM's endorsement key is shown again, with a key of software: that one is asked, and is not yet believed.
    asked = there.enrol(fake.ak_pub())
    assert asked.status_code == 200
    assert by_software() == {"signature_invalid"}
    # The TPM does not answer for it, and the answer to another challenge is none to this one.
    with pytest.raises(TpmError):
        there.solved(asked.json())
    secret = there.solved(there.enrol(there.tpm.ak_pub).json())
    assert there.activate(asked.json(), secret).json()["code"] == "challenge_failed"
    assert by_software() == {"signature_invalid"}
    # The twin: the key that was activated verifies, as before, and so does one that the TPM answers for now.
    assert there.quote().status_code == 200
    again = there.enrol(there.tpm.ak_pub).json()
    assert there.activate(again, there.solved(again)).status_code == 200
    assert there.quote().status_code == 200


@pytest.mark.regression("CVE-2022-3500")
def test_cve_2022_3500_evidence_that_breaks_the_verifier_prolongs_nothing_and_the_next_good_one_counts(
    there: Attested,
) -> None:
    assert there.quote().status_code == 200
    before = there.shown()["lease_expires_at"]
    good = there.evidence()
    log = base64.b64decode(good["event_log_b64"])
    broken: list[dict[str, Any]] = [
        {"quote_b64": ""},
        {"quote_b64": b64(b"\xff" * 4096)},
        {"signature_b64": b64(b"\x00\x18\x00\x0b\xff\xff")},
        {"event_log_b64": b64(log[:-1])},
        {"event_log_b64": b64(log + b"\xff" * 64)},
        {"event_log_b64": b64(b"\xff" * 100_000)},
        {"pcrs": {}},
        {"pcrs": {"4294967296": "00" * 32}},
        {"pcrs": {"-1": "zz"}},
        {"pcrs": {**good["pcrs"], "x": "00" * 32}},
        {"policy_log": [{"seq": 2**62, "policy_digest": "\x00", "revision": 0}]},
        {"policy_log": []},
        {"csr_pem": "-----BEGIN CERTIFICATE REQUEST-----\nMIIB\n-----END CERTIFICATE REQUEST-----\n"},
        {"csr_pem": "\x00"},
        {"ssh_host_pub": "ssh-ed25519 AAAA"},
    ]
    for change in broken:
        answer = there.quote(**change)
        assert answer.status_code in {400, 403}, (change, answer.text)
        shown = there.shown()
        assert shown["lease_expires_at"] == before, change
    refused = [event["event"] for event in there.lab.events() if event["event"].get("status_detail") == "not_attested"]
    assert refused, "and it is in the trail"
    assert there.lab.process is not None
    assert there.lab.process.poll() is None
    # The twin: the verifier still looks, and a good quote counts.
    assert there.quote().status_code == 200
    assert there.shown()["lease_expires_at"] > before


@pytest.mark.regression("CVE-2023-38201")
def test_cve_2023_38201_a_refused_answer_tells_nothing_of_the_right_one_and_ends_the_challenge(there: Attested) -> None:
    challenge = there.enrol(there.tpm.ak_pub).json()
    secret = there.solved(challenge)
    refused = there.activate(challenge, bytes(32))
    assert (refused.status_code, refused.json()["code"]) == (403, "challenge_failed")
    digest = hashlib.sha256(secret).digest()
    shown = refused.text + str(refused.headers) + there.lab.log() + cli_log(there)
    for form in (secret, digest):
        assert form.hex() not in shown.lower()
        assert b64(form) not in shown
        assert base64.urlsafe_b64encode(form).decode().rstrip("=") not in shown
    # Not even the right answer counts after a wrong one; to a new challenge it does.
    assert there.activate(challenge, secret).json()["code"] == "challenge_unknown"
    new = there.enrol(there.tpm.ak_pub).json()
    assert there.activate(new, there.solved(new)).status_code == 200


def cli_log(there: Attested) -> str:
    """The trail, as it is exported."""
    return "".join(str(event) for event in there.lab.events())


@pytest.mark.regression("CVE-2025-13609")
def test_cve_2025_13609_another_tpm_does_not_take_over_an_id_that_is_registered(there: Attested) -> None:
    other, ours = other_ek(), there.tpm.ek_pem.decode()
    body = {"id": "ws-k", "sponsor": "mallory", "blueprint": "coding", "ring": "stable", "image": "measured"}
    before = there.shown()
    for method, path, told, code in (
        ("POST", "/v1/workspaces", body, "workspace_exists"),
        ("PUT", "/v1/workspaces/ws-k/ek", {"ek_pub_pem": other}, "ek_recorded"),
    ):
        with pytest.raises(BrokerRefusal) as refused:
            there.lab.operator.request(method, path, told)
        assert refused.value.code == code
    for ak_pub in (SoftTpm().ak_pub(), there.tpm.ak_pub):
        assert there.enrol(ak_pub, other).json()["code"] == "unknown_ek"
    assert there.shown() == before
    # The twin: the same key again changes nothing, and the workspace attests.
    assert not there.lab.operator.request("PUT", "/v1/workspaces/ws-k/ek", {"ek_pub_pem": ours})["changed"]
    assert there.quote().status_code == 200


@pytest.mark.regression("CVE-2026-1709")
def test_cve_2026_1709_without_a_certificate_nothing_of_the_operators_is_served(there: Attested) -> None:
    described = there.lab.operator.request("GET", "/v1/openapi.json")["paths"]
    before, tried = there.shown(), 0
    with there.lab.tls("perimeter", "edge-k") as edge:
        for path, calls in described.items():
            place = path.replace("{", "").replace("}", "") if "workspaces" not in path else path.replace("{id}", "ws-k")
            for method in {"get", "put", "post", "delete"} & set(calls):
                for client in (there.client, edge):
                    answer = client.request(method.upper(), place, **({} if method == "get" else {"json": {}}))
                    assert answer.status_code in {401, 403, 404}, (method, place, answer.text)
                    tried += 1
    assert tried > 100
    assert there.shown() == before
    # The twin: an operator, on the socket, sees the workspace, and over TLS it attests without a certificate of a client.
    assert "ws-k" in {one["id"] for one in there.lab.operator.request("GET", "/v1/workspaces")["workspaces"]}
    assert there.quote().status_code == 200
