"""Programs that ask: with a certificate, and as a client of a real identity provider; people decide on their pages."""

from __future__ import annotations

import json
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sso_rig import Authenticator, SsoLab, sso_lab

from saw.broker.client import BrokerRefusal, MachineAccess, TokenSource
from saw.broker.gate_settings import GateSettings, MachineSettings
from saw.broker.machine_client import MachineClient, asking_client
from saw.errors import ConfigError, UnavailableError
from saw.identity.x509 import new_key_and_csr
from saw.review.asking import Question, new_claim
from saw.review.gate import BoundFile, BoundHost, GateStatement

AUDIENCE = "https://saw.example/broker"
GATES = {"update": GateSettings(group="maintainers"), "delete": GateSettings(group="maintainers", quorum=2)}
MACHINES = {
    "awx": MachineSettings(scopes=("gate:update",), oauth_client="awx-jobs"),
    "ci": MachineSettings(scopes=("gate:update", "gate:delete")),
}
STATED = GateStatement(
    gate="update",
    purpose="kernel of November",
    requested_by="ada@example.com",
    total=1,
    hosts=(BoundHost(name="ws-1"),),
    files=(BoundFile(path="update.yml", kind="file", sha256="1" * 64),),
)


@pytest.fixture(scope="module")
def secret() -> str:
    return secrets.token_hex(16)


@pytest.fixture(scope="module")
def lab(secret: str) -> Iterator[SsoLab]:
    """``awx-jobs`` is the machine ``awx``; the provider also knows a client ``other`` that is no machine here."""
    clients = [
        {
            "client_id": name,
            "client_secret": secret,
            "grant_types": ["client_credentials"],
            "redirect_uris": [],
            "response_types": [],
        }
        for name in ("awx-jobs", "other")
    ]
    directory = Path(tempfile.mkdtemp(prefix="saw-machines-"))
    with sso_lab(directory, clients=clients, gates=GATES, machines=MACHINES, machine_audience=AUDIENCE) as found:
        (directory / "client.secret").write_text(secret + "\n")
        yield found


def place(lab: SsoLab) -> dict[str, Any]:
    return {"url": f"https://127.0.0.1:{lab.port}", "ca_file": str(lab.ca_file), "server_name": "broker.saw.internal"}


def by_token(lab: SsoLab, client: str = "awx-jobs", **changes: Any) -> MachineClient:
    source = TokenSource(
        url=f"{lab.provider.issuer}/token",
        client_id=client,
        client_secret_file=str(lab.directory / "client.secret"),
        ca_file=str(lab.provider.ca_file),
        parameters={"resource": AUDIENCE},
    )
    return MachineClient(MachineAccess(**place(lab), token=msgspec.structs.replace(source, **changes)))


def by_certificate(lab: SsoLab, name: str = "ci", kind: str = "machine") -> MachineClient:
    key, csr = new_key_and_csr(name)
    body = {"csr_pem": csr.decode(), "kind": kind, "name": name}
    certificate = lab.operator.request("POST", "/v1/certificates/x509", body)["certificate"]
    folder = Path(tempfile.mkdtemp(dir=lab.directory))
    (folder / "key").write_bytes(key)
    (folder / "certificate").write_text(certificate)
    files = {"certificate_file": str(folder / "certificate"), "key_file": str(folder / "key")}
    return MachineClient(MachineAccess(**place(lab), **files))


def asked(client: MachineClient, **changes: Any) -> dict[str, Any]:
    statement = msgspec.structs.replace(STATED, **changes)
    return client.request("POST", "/v1/gates", {"statement": msgspec.to_builtins(statement)})


def refusal(client: MachineClient, **changes: Any) -> str:
    with pytest.raises(BrokerRefusal) as caught:
        asked(client, **changes)
    assert caught.value.status in {403, 404}
    return caught.value.code


@pytest.mark.control("REV-01")
@pytest.mark.control("REV-02")
def test_a_machine_asks_a_person_approves_with_a_passkey_and_the_machine_claims(lab: SsoLab) -> None:
    question = Question(by_token(lab), lambda: 0.0, lambda _s: None, lambda _v, _w: None)
    view = question.ask(STATED)
    assert view.url == f"{lab.origin}/reviews/{view.id}"
    with lab.browser() as ada, lab.browser() as ben:
        for name, browser in (("ada", ada), ("ben", ben)):
            key = Authenticator()
            browser.fresh(f"u-{name}")
            assert browser.register(key, name).status_code == 200
            page = browser.get(f"/reviews/{view.id}").text
            for text in (
                "May this be run?",
                "ada@example.com</strong> (through machine:awx)",
                "kernel of November",
                "1" * 64,
            ):
                assert text in page
            assert "GATE update: kernel of November" in browser.get("/reviews").text
            assert ("Approve with passkey" in page) == (name == "ben")
            decided = browser.decide(view.id, key)
            if name == "ada":
                assert decided.json()["error"] == "self_approval"
            else:
                assert decided.json()["state"] == "approved"
    claim = new_claim(secrets.token_bytes)
    begun = question.agreed(view.id, claim, lambda: STATED, 60, 1)
    assert (begun.state, begun.approved_by) == ("executing", ("ben@example.com",))
    assert question.end(view.id, claim, "done", "").state == "done"


def test_a_machine_with_a_certificate_asks_within_its_scopes(lab: SsoLab) -> None:
    client = by_certificate(lab)
    assert asked(client, gate="delete", purpose="by certificate")["quorum"] == 2
    assert refusal(by_token(lab), gate="delete") == "out_of_scope"
    with pytest.raises(BrokerRefusal) as caught:
        by_certificate(lab, "stranger")
    assert caught.value.code == "unknown_machine"
    assert refusal(by_certificate(lab, "edge", "perimeter")) == "not_a_machine"


@pytest.mark.control("REV-02")
def test_a_machine_never_decides_and_reaches_nothing_else(lab: SsoLab) -> None:
    for client in (by_certificate(lab), by_token(lab)):
        identifier = asked(client, purpose="who decides")["id"]
        body = {"statement": "{}", "signature": "00"}
        for method, path in (
            ("POST", f"/v1/reviews/{identifier}/decide"),
            ("POST", f"/v1/reviews/{identifier}/nonce"),
            ("POST", f"/v1/reviews/{identifier}/cancel"),
            ("GET", f"/v1/reviews/{identifier}"),
            ("GET", "/v1/workspaces"),
            ("PUT", "/v1/reviewers/awx"),
        ):
            with pytest.raises(BrokerRefusal) as caught:
                client.request(method, path, body)
            assert caught.value.code == "no_such_call"
        for path in ("/v1/perimeter/state", "/v1/perimeter/reviews/claim"):
            with pytest.raises(BrokerRefusal) as caught:
                client.request("POST" if "claim" in path else "GET", path, {})
            assert caught.value.code == "not_a_perimeter"
        assert client.request("GET", f"/v1/gates/{identifier}")["state"] == "pending"


@pytest.mark.control("REV-02")
def test_the_pages_take_no_token_of_a_machine(lab: SsoLab) -> None:
    token = by_token(lab)._bearer(by_token(lab)._access.token)  # type: ignore[arg-type]
    identifier = asked(by_token(lab), purpose="who decides")["id"]
    with lab.browser() as browser:
        head = {"authorization": f"Bearer {token}", "origin": lab.origin}
        for path in (f"/reviews/{identifier}/request", f"/reviews/{identifier}/decide", "/v1/sso/sessions"):
            answer = browser.http.post(path, json={}, headers=head)
            assert (answer.status_code, answer.json()["error"]) == (401, "not_signed_in")


def test_tokens_that_are_not_for_this_broker_or_not_of_a_machine_are_refused_and_audited(lab: SsoLab) -> None:
    assert refusal(by_token(lab, "other")) == "unknown_client"
    with lab.tls() as client:
        body = {"statement": msgspec.to_builtins(STATED)}
        assert client.post("/v1/gates", json=body).json()["error"] == "not_a_machine"
        for token, code in (("x", "malformed_token"), ("a.b.c", "wrong_signature")):
            answer = client.post("/v1/gates", json=body, headers={"authorization": f"Bearer {token}"})
            assert (answer.status_code, answer.json()["error"]) == (403, code)
            assert lab.audited(status_detail=code)
    with lab.tls("perimeter", "edge") as client:
        token = by_token(lab)._bearer(by_token(lab)._access.token)  # type: ignore[arg-type]
        answer = client.post("/v1/gates", json=body, headers={"authorization": f"Bearer {token}"})
        assert answer.json()["error"] == "not_a_machine"  # a perimeter does not become a machine
    assert asked(by_token(lab))["gate"] == "update"


def test_what_is_wrong_with_the_way_to_the_broker_is_named(lab: SsoLab, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gives no token: it answered 40"):
        asked(by_token(lab, parameters={"resource": "https://elsewhere.example"}))
    (tmp_path / "wrong").write_text("wrong")
    with pytest.raises(ConfigError, match="gives no token: it answered 401"):
        asked(by_token(lab, client_secret_file=str(tmp_path / "wrong")))
    with pytest.raises(ConfigError, match="secret of the machine's client cannot be read"):
        asked(by_token(lab, client_secret_file=str(tmp_path / "missing")))
    named = {"client_secret_file": "env:SAW_CLIENT_SECRET"}
    with pytest.raises(ConfigError, match="SAW_CLIENT_SECRET is not set"):
        asked(by_token(lab, **named))
    told = {"SAW_CLIENT_SECRET": str(lab.directory / "client.secret")}
    assert asked(MachineClient(by_token(lab, **named)._access, environ=told))["gate"] == "update"
    with pytest.raises(ConfigError, match="one of the two"):
        MachineClient(MachineAccess(**place(lab)))
    with pytest.raises(ConfigError, match="https"):
        MachineClient(MachineAccess(url="http://b.example", ca_file="/ca", certificate_file="/c"))
    with pytest.raises(UnavailableError):
        asked(
            MachineClient(
                MachineAccess(**{**place(lab), "server_name": "elsewhere.example"}, token=by_token(lab)._access.token)
            )
        )
    context = tmp_path / "context.json"
    source = msgspec.to_builtins(by_token(lab)._access)
    context.write_text(json.dumps({"machine": source}))
    client = asking_client(context)
    assert isinstance(client, MachineClient)
    assert asked(client)["gate"] == "update"


def test_a_token_is_used_until_shortly_before_its_end(lab: SsoLab) -> None:
    now = [0.0]
    client = by_token(lab)
    client._clock = lambda: now[0]
    source = client._access.token
    assert source is not None
    first = client._bearer(source)
    now[0] = 200.0
    assert client._bearer(source) == first
    now[0] = 280.0
    second = client._bearer(source)
    assert second != first
