"""The operator's side: who may use it, the register, the lifecycle, the kill switch."""

from __future__ import annotations

import concurrent.futures
import json
import subprocess
from pathlib import Path

import pytest
from broker_rig import cli, image_record

from saw.broker.client import BrokerRefusal, listed_workspaces
from saw.identity.x509 import new_key_and_csr
from saw.vm.spec import NAME as VM_NAME

PROBE = """
import socket, sys
with socket.socket(socket.AF_UNIX) as peer:
    peer.connect(sys.argv[1])
    peer.sendall(b"GET /v1/workspaces HTTP/1.1\\r\\nHost: broker\\r\\nConnection: close\\r\\n\\r\\n")
    answer = b""
    while chunk := peer.recv(65536):
        answer += chunk
print(answer.decode())
"""


def as_user(broker, *groups: str) -> str:
    """List the workspaces as an ordinary user with ``groups``; the socket's own mode lets everyone connect."""
    Path(broker.config.operator_socket).chmod(0o666)
    try:
        groups_option = f"--groups={','.join(groups)}" if groups else "--clear-groups"
        return subprocess.run(
            [
                "setpriv",
                "--reuid=65534",
                "--regid=65534",
                groups_option,
                *["/usr/bin/python3", "-S", "-c", PROBE, broker.config.operator_socket],
            ],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        ).stdout
    finally:
        Path(broker.config.operator_socket).chmod(0o660)


@pytest.mark.control("ID-04")
def test_an_ordinary_user_is_refused_by_peer_credentials_and_an_operator_is_not(broker) -> None:
    refused = as_user(broker)
    assert refused.startswith("HTTP/1.1 403")
    assert '"not_an_operator"' in refused
    assert as_user(broker, "daemon").startswith("HTTP/1.1 200")


def test_the_socket_itself_is_closed_to_others(broker) -> None:
    status = Path(broker.config.operator_socket).stat()
    assert (status.st_mode & 0o777, status.st_gid) == (0o660, 1)


@pytest.mark.control("ID-04")
def test_a_workspace_is_registered_with_its_agent_once(broker) -> None:
    made = broker.workspace("reg-once")
    assert (made["state"], made["lease_expires_at"], made["ek_recorded"]) == ("requested", None, False)
    assert made["agent_id"].startswith("agent-")
    with pytest.raises(BrokerRefusal) as caught:
        broker.workspace("reg-once")
    assert (caught.value.code, caught.value.status) == ("workspace_exists", 409)


@pytest.mark.control("ID-04")
def test_nothing_unregistered_gets_a_nonce_or_a_certificate(broker) -> None:
    with broker.tls() as client:
        refused = client.post("/v1/attest/nonce", json={"workspace_id": "nobody"})
        assert (refused.status_code, refused.json()["code"]) == (404, "unknown_workspace")
        broker.workspace("reg-nonce", to="attesting")
        assert client.post("/v1/attest/nonce", json={"workspace_id": "reg-nonce"}).status_code == 200
    with pytest.raises(BrokerRefusal) as caught:
        broker.operator.request(
            "POST", "/v1/certificates/ssh", {"workspace_id": "nobody", "public_key": "ssh-ed25519 AAAA"}
        )
    assert caught.value.code == "unknown_workspace"


def test_an_image_must_be_registered_and_its_record_whole(broker) -> None:
    body = {"id": "reg-image", "sponsor": "ada", "blueprint": "coding", "ring": "stable", "image": "unheard-of"}
    with pytest.raises(BrokerRefusal) as caught:
        broker.operator.request("POST", "/v1/workspaces", body)
    assert caught.value.code == "unknown_image"
    with pytest.raises(BrokerRefusal) as caught:
        broker.register_image(image_record("half", pcrs={"0": "0" * 64}))
    assert caught.value.code == "record_incomplete"
    record = image_record("whole", "2" * 64)
    assert broker.register_image(record)["changed"]
    assert not broker.register_image(record)["changed"]
    assert broker.operator.request("POST", "/v1/workspaces", {**body, "image": "whole"})["image_sha256"] == "2" * 64


@pytest.mark.control("ID-04")
@pytest.mark.parametrize(
    ("name", "valid"),
    [
        ("measure", True),
        ("0", True),
        ("a" * 63, True),
        ("a" * 64, False),
        ("", False),
        ("ws-", False),
        ("-ws", False),
        ("WS", False),
        ("ws_1", False),
        ("ws.1", False),
        ("ws\n", False),
        ("../ws", False),
    ],
)
def test_an_id_is_registered_exactly_when_a_vm_can_have_it(broker, name: str, valid: bool) -> None:
    body = {"id": name, "sponsor": "ada", "blueprint": "coding", "ring": "stable", "image": "ids"}
    broker.register_image(image_record("ids", "3" * 64))
    assert bool(VM_NAME.fullmatch(name)) == valid
    if valid:
        assert broker.operator.request("POST", "/v1/workspaces", body)["id"] == name
        return
    with pytest.raises(BrokerRefusal) as caught:
        broker.operator.request("POST", "/v1/workspaces", body)
    if name:
        assert caught.value.code == "id_refused"
        assert caught.value.message == f"workspace id {name!r} is not valid"
        assert "at most 63" in caught.value.cure


@pytest.mark.control("ID-04")
def test_the_lifecycle_refuses_steps_out_of_order_and_nobody_can_ask_for_active(broker) -> None:
    broker.workspace("life")
    for to in ("attesting", "active", "stopped"):
        with pytest.raises(BrokerRefusal) as caught:
            broker.step("life", to)
        assert caught.value.code == "transition_refused"
    assert broker.step("life", "provisioning")["changed"]
    assert not broker.step("life", "provisioning")["changed"]
    assert broker.step("life", "attesting")["state"] == "attesting"
    with pytest.raises(BrokerRefusal, match="active"):
        broker.step("life", "active")
    broker.step("life", "stopped")
    assert broker.step("life", "decommissioned")["state"] == "decommissioned"
    with pytest.raises(BrokerRefusal):
        broker.step("life", "provisioning")
    with pytest.raises(BrokerRefusal) as caught:
        broker.workspace("life")
    assert caught.value.code == "workspace_exists"


@pytest.mark.control("LIF-02")
def test_a_killed_workspace_gets_nothing_until_an_operator_releases_it(broker) -> None:
    broker.workspace("killed", to="attesting")
    killed = broker.operator.request("POST", "/v1/workspaces/killed/kill", {"reason": "exfiltration"})
    assert (killed["state"], killed["state_reason"], killed["changed"]) == ("quarantined", "exfiltration", True)
    assert not broker.operator.request("POST", "/v1/workspaces/killed/kill", {"reason": "again"})["changed"]
    with broker.tls() as client:
        refused = client.post("/v1/attest/nonce", json={"workspace_id": "killed"})
        assert (refused.status_code, refused.json()["code"]) == (403, "workspace_not_admitted")
        with pytest.raises(BrokerRefusal) as caught:
            broker.step("killed", "attesting")
        assert caught.value.code == "transition_refused"
        broker.step("killed", "stopped")
        broker.step("killed", "attesting")
        assert client.post("/v1/attest/nonce", json={"workspace_id": "killed"}).status_code == 200


@pytest.mark.control("LIF-02")
def test_a_kill_wakes_the_perimeter_and_the_workspace_at_once(broker) -> None:
    broker.workspace("woken", to="attesting")
    with (
        broker.tls("perimeter", "edge-woken") as edge,
        broker.tls() as workspace,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
    ):
        state = edge.get("/v1/perimeter/state").json()
        mine = workspace.get("/v1/workspace/watch?workspace_id=woken").json()
        for _ in range(3):
            perimeter = pool.submit(polled, edge, f"/v1/perimeter/state?after={state['seq']}&wait=30")
            watcher = pool.submit(
                polled, workspace, f"/v1/workspace/watch?workspace_id=woken&after={mine['seq']}&wait=30"
            )
            # Both polls are waiting: an unchanged poll that was sent behind them on a third connection has been answered.
            with broker.tls("perimeter", "edge-probe") as probe:
                probe.get("/v1/perimeter/state?after=0")
            state_before = next(item for item in state["workspaces"] if item["id"] == "woken")["state"]
            assert state_before == "attesting"
            assert not perimeter.done()
            broker.operator.request("POST", "/v1/workspaces/woken/kill", {"reason": "test"})
            # Neither is the answer that a poll gets when its own 30 seconds are over.
            seen, watched = perimeter.result(20), watcher.result(20)
            entry = next(item for item in seen["workspaces"] if item["id"] == "woken")
            assert (entry["state"], entry["lease_expires_at"], entry["svid_sha256"]) == ("quarantined", None, None)
            assert (watched["state"], watched["seq"] > mine["seq"]) == ("quarantined", True)
            for to in ("stopped", "attesting"):
                broker.step("woken", to)
            state = edge.get("/v1/perimeter/state").json()
            mine = workspace.get("/v1/workspace/watch?workspace_id=woken").json()


def polled(client, path: str):
    answer = client.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_poll_without_news_ends_after_its_wait_and_only_certificates_of_perimeters_open_it(broker) -> None:
    with broker.tls("perimeter", "edge-idle") as edge:
        seq = edge.get("/v1/perimeter/state").json()["seq"]
        assert edge.get(f"/v1/perimeter/state?after={seq}&wait=1").json()["seq"] == seq
        assert edge.get("/v1/perimeter/state?wait=soon").json()["code"] == "malformed"
    for kind, name in ((None, ""), ("ring2", "edge-ring2")):
        with broker.tls(kind, name) as other:
            refused = other.get("/v1/perimeter/state")
            assert (refused.status_code, refused.json()["code"]) == (403, "not_a_perimeter")


def test_a_certificate_of_another_authority_does_not_even_connect(broker, tmp_path) -> None:
    from datetime import UTC, datetime

    import httpx

    from saw.identity.x509 import Authority

    foreign = Authority.create(tmp_path / "foreign", "saw.example", datetime.now(UTC))
    key, csr = new_key_and_csr("edge")
    pair = (key, foreign.issue_perimeter(csr, "edge", datetime.now(UTC), 600))
    with broker.tls(pair=pair) as client, pytest.raises(httpx.TransportError):
        client.get("/v1/perimeter/state")


def test_a_perimeter_renews_its_own_certificate_and_no_other(broker) -> None:
    key, csr = new_key_and_csr("anything")
    with broker.tls("perimeter", "edge-renew") as edge:
        renewed = edge.post("/v1/perimeter/renew", json={"csr_pem": csr.decode()})
        assert renewed.status_code == 200
    with broker.tls(pair=(key, renewed.json()["certificate"].encode())) as edge:
        assert edge.post("/v1/perimeter/events", json={"source": "edge-renew", "events": []}).json() == {"accepted": 0}
    with broker.tls() as nobody:
        assert nobody.post("/v1/perimeter/renew", json={"csr_pem": csr.decode()}).json()["code"] == "not_a_perimeter"


def test_malformed_and_oversize_bodies_are_refused_and_named(broker) -> None:
    with broker.tls() as client:
        unknown = client.post("/v1/attest/nonce", json={"workspace_id": "ws", "extra": 1})
        assert (unknown.status_code, unknown.json()["code"]) == (400, "malformed")
        assert "extra" in unknown.json()["message"]
        large = client.post("/v1/attest/nonce", content=b" " * 100_000)
        assert (large.status_code, large.json()["code"]) == (413, "too_large")
        missing = client.get("/v1/nothing")
        assert (missing.status_code, missing.json()["code"]) == (404, "no_such_call")
        assert client.get("/healthz").json()["ok"]


@pytest.mark.regression("CVE-2026-1709")
def test_the_operator_api_is_not_on_the_tls_port(broker) -> None:
    with broker.tls("perimeter", "edge-op") as edge:
        assert edge.get("/v1/workspaces").status_code == 404
        assert edge.post("/v1/workspaces/life/kill", json={"reason": "x"}).status_code == 404


def test_the_command_line_shows_and_refuses_with_a_cure(broker) -> None:
    broker.workspace("shown")
    listed = cli(broker, "workspace", "list")
    assert listed.returncode == 0
    assert "shown" in listed.stdout
    refused = cli(broker, "workspace", "start", "shown", "--json")
    assert refused.returncode == 1
    assert '"transition_refused"' in refused.stdout
    assert "allowed from here" in refused.stderr
    killed = cli(broker, "workspace", "kill", "shown", "--reason", "drill", "--json")
    assert (killed.returncode, '"quarantined"' in killed.stdout) == (0, True)


def test_workspaces_are_listed_by_page_and_by_filter(broker) -> None:
    names = [f"paged-{letter}" for letter in "abcde"]
    for name in names:
        broker.workspace(name, ring="paged" if name != "paged-c" else "other")
    ask = broker.operator.request
    seen, after = [], ""
    for _ in range(3):
        answer = ask("GET", f"/v1/workspaces?text=PAGED-&limit=2&after={after}")
        seen.append([row["id"] for row in answer["workspaces"]])
        after = answer["next"]
    assert seen == [names[:2], names[2:4], names[4:]]
    assert after is None
    assert [row["id"] for row in ask("GET", "/v1/workspaces?ring=paged&ring=none&limit=4")["workspaces"]] == [
        name for name in names if name != "paged-c"
    ]
    whole = ask("GET", "/v1/workspaces")
    assert {row["id"] for row in whole["workspaces"]} >= set(names)
    assert whole["next"] is None
    assert [row for row in whole["workspaces"] if row["id"] == names[0]] == [ask("GET", f"/v1/workspaces/{names[0]}")]
    assert listed_workspaces(broker.operator, 2, text=["paged-"]) == listed_workspaces(broker.operator, text=["paged-"])
    assert ask("GET", "/v1/workspaces?text=paged%25")["workspaces"] == []


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("limit=0", "malformed"),
        ("limit=10001", "malformed"),
        ("limit=x", "malformed"),
        ("after=a&after=b", "malformed"),
        ("owner=ada", "malformed"),
        ("state=gone", "unknown_state"),
    ],
)
def test_a_list_by_what_does_not_exist_is_refused(broker, query: str, code: str) -> None:
    with pytest.raises(BrokerRefusal) as refused:
        broker.operator.request("GET", f"/v1/workspaces?{query}")
    assert (refused.value.code, refused.value.status) == (code, 400)
    assert refused.value.cure


def test_the_command_line_lists_by_filter(broker) -> None:
    broker.workspace("listed-a", ring="listed")
    broker.workspace("listed-b", ring="listed")
    broker.step("listed-b", "decommissioned")
    found = cli(broker, "workspace", "list", "--ring", "listed", "--state", "requested", "--text", "ada@", "--json")
    assert [row["id"] for row in json.loads(found.stdout)["workspaces"]] == ["listed-a"]
    refused = cli(broker, "workspace", "list", "--state", "gone")
    assert refused.returncode == 1
    assert "use one of requested" in refused.stderr


def test_the_socket_tells_what_it_serves(broker) -> None:
    told = broker.operator.request("GET", "/v1/openapi.json")
    assert (told["openapi"], told["paths"]["/v1/workspaces/{id}/kill"]["post"]["x-saw-roles"]) == (
        "3.1.0",
        ["operator", "security"],
    )
