"""Governed calls through ring 2: what passes, with which credential, and what is refused for which reason."""

from __future__ import annotations

import base64
import json
import socket
import ssl
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ring2_policy import POLICY
from ring2_rig import BROKER, FAR, SECRET, TRAP, Answer, Rig, wait_for

from saw.audit.chain import verify_chain

PUSH_ROOT = "/team/app.git/git-receive-pack"
OLD, NEW = b"1" * 40, b"2" * 40


def push(ref: str, size: int) -> bytes:
    """Return the body of a push of one ref with ``size`` bytes of pack."""
    line = OLD + b" " + NEW + b" " + ref.encode() + b"\0 report-status\n"
    return f"{len(line) + 4:04x}".encode() + line + b"0000PACK" + b"\x5a" * size


def arrived_headers(rig: Rig) -> dict[str, str]:
    """Return the headers of the one request that arrived."""
    assert len(rig.far.arrived) == 1
    names = [name for name, _ in rig.far.arrived[0]["headers"]]
    assert len(names) == len(set(names)), names
    return dict(rig.far.arrived[0]["headers"])


@pytest.mark.control("POL-04")
@pytest.mark.control("CRED-01")
def test_an_allowed_call_arrives_with_the_credential_that_the_caller_never_has(rig: Rig) -> None:
    sent = {"x-api-key": "openshell:resolve:env:API", "authorization": "Bearer openshell:resolve:env:API"}
    answer = rig.call(target="/v1/things?page=2", headers=sent)
    assert (answer.status, answer.body) == (200, b"from the far end")
    headers = arrived_headers(rig)
    assert headers["x-api-key"] == SECRET["api-token"]
    assert "authorization" not in headers
    assert headers["host"] == "api.example.com"
    assert rig.far.arrived[0]["target"] == "/v1/things?page=2"
    assert not [name for name in headers if name.startswith(("x-saw-", "x-forwarded-client", "x-envoy-"))]
    assert not any(value in str(answer.headers) for value in SECRET.values())


@pytest.mark.control("POL-04")
def test_http_2_as_ring_1_speaks_it_is_judged_alike(rig: Rig) -> None:
    certificate, key = rig.svid_files()
    common = (
        "curl", "--silent", "--http2", "--cacert", str(rig.directory / "ca" / "ca.pem"), "--cert", str(certificate),
        "--key", str(key), "--resolve", "ring2.saw.internal:8443:10.210.1.1", "--path-as-is", "--output", "/dev/null",
        "--write-out", "%{http_version} %{http_code}", "--header", "host: api.example.com",
        "--header", "x-saw-binary: /usr/bin/curl", "--header", f"x-saw-upstream: {TRAP}:443",
    )  # fmt: skip
    base = "https://ring2.saw.internal:8443"
    assert rig.namespace.sh(*common, f"{base}/v1/things") == "2 200"
    assert rig.namespace.sh(*common, f"{base}/v1/../v1/things") == "2 403"
    assert rig.namespace.sh(*common, "--request", "DELETE", f"{base}/v1/things") == "2 403"
    assert [seen["target"] for seen in rig.far.arrived] == ["/v1/things"]
    assert rig.trap.arrived == []


@pytest.mark.control("CRED-01")
def test_a_refused_call_uses_no_credential_and_never_arrives(rig: Rig) -> None:
    assert rig.call("DELETE", "/v1/things").outcome == (403, "method_or_path_not_allowed")
    assert rig.far.arrived == []


@pytest.mark.control("CRED-01")
def test_a_credential_that_is_not_at_hand_refuses_the_call(rig: Rig) -> None:
    path = rig.directory / "credentials" / "api-token"
    path.chmod(0o644)
    try:
        assert rig.call().outcome == (403, "credential_unavailable")
    finally:
        path.chmod(0o600)
    assert rig.call().status == 200


@pytest.mark.control("POL-04")
def test_without_a_certificate_of_our_authority_there_is_no_connection(rig: Rig) -> None:
    for context in (rig.context(), rig.svid(authority=rig.stranger), rig.svid(age=700)):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            rig.call(context=context)
    perimeter = rig.context(rig.directory / "edge.pem", rig.directory / "edge.key")
    with pytest.raises((ssl.SSLError, ConnectionError)):
        rig.call(context=perimeter)
    assert rig.call(context=rig.svid(age=300)).status == 200
    assert len(rig.far.arrived) == 1


@pytest.mark.control("POL-04")
def test_an_unregistered_workspace_or_another_network_is_no_identity(rig: Rig) -> None:
    assert rig.call(context=rig.svid("ws-9")).outcome == (403, "no_identity")
    for headers in ({}, {"x-saw-listener": "2"}):
        assert rig.call(context=rig.svid("ws-2"), number=1, headers=headers).outcome == (403, "no_identity")
    assert rig.call(context=rig.svid("ws-2"), number=2).status == 200


@pytest.mark.control("POL-05")
def test_a_lapsed_lease_denies(rig: Rig) -> None:
    rig.settle(lease_expires_at=-1)
    assert rig.call().outcome == (403, "lease_expired")
    rig.settle(lease_expires_at=60)
    assert rig.call().status == 200


@pytest.mark.control("POL-04")
def test_the_attested_the_loaded_and_the_released_digest_must_agree(rig: Rig) -> None:
    assert rig.call(context=rig.svid(digest="ab" * 32)).outcome == (403, "digest_mismatch")
    rig.settle(policy_digest="ab" * 32)
    assert rig.call(context=rig.svid(digest="ab" * 32)).outcome == (403, "not_released")
    rig.settle(policy_digest=rig.digest)
    assert rig.call().status == 200


@pytest.mark.control("POL-04")
@pytest.mark.control("POL-05")
def test_a_release_counts_only_with_enough_officers_whatever_the_broker_says(rig: Rig) -> None:
    for revision, signers, outcome in ((2, 1, (403, "not_released")), (3, 2, (200, ""))):
        digest, bundle = rig.signer.release(revision, signers=signers)
        rig.broker.releases = {digest: bundle}
        rig.settle(policy_digest=digest, released_digest=digest)
        assert rig.call(context=rig.svid(digest=digest)).outcome == outcome
    # Revision 3 was released, so the broker cannot go back to revision 1 later on.
    rig.broker.releases = {rig.digest: rig.bundle}
    rig.settle(policy_digest=rig.digest, released_digest=rig.digest)
    assert rig.call().outcome == (403, "not_released")
    # Going back is a new revision with the old content.
    rig.digest, rig.bundle = rig.signer.release(4)


def test_the_release_before_counts_for_a_while_after_a_new_one(rig: Rig) -> None:
    policy = POLICY.replace("/v1/notes", "/v1/remarks")
    digest, bundle = rig.signer.release(5, policy=policy)
    rig.broker.releases = {rig.digest: rig.bundle, digest: bundle}
    rig.settle(released_digest=digest)
    assert rig.call().status == 200
    rig.settle(policy_digest=digest)
    assert rig.call(context=rig.svid(digest=digest)).status == 200
    rig.digest, rig.bundle = rig.signer.release(6)


@pytest.mark.control("NET-01")
@pytest.mark.parametrize(
    ("host", "target", "reason"),
    [
        ("evil.example.com", "/v1/things", "host_not_allowed"),
        ("api.example.com:8443", "/v1/things", "host_not_allowed"),
        ("user@api.example.com", "/v1/things", "not_canonical"),
        ("api.example.com.", "/v1/things", "not_canonical"),
        ("169.254.169.254", "/latest/meta-data", "destination_blocked"),
        ("2852039166", "/", "destination_blocked"),
        ("api.example.com", "/v1/admin/users", "deny_rule"),
        ("api.example.com", "/v1/../v1/things", "not_canonical"),
        ("api.example.com", "/v1/%2e%2e/v1/things", "not_canonical"),
        ("api.example.com", "/v1//things", "not_canonical"),
        ("api.example.com", "/v1/things;a=b", "not_canonical"),
        ("api.example.com", "/v1/a%2Fadmin", "not_canonical"),
        ("api.example.com", "/v2/things", "method_or_path_not_allowed"),
    ],
)
def test_what_policy_does_not_name_is_refused(rig: Rig, host: str, target: str, reason: str) -> None:
    answer = rig.call(target=target, host=host)
    assert answer.outcome == (403, reason), answer.body
    assert rig.far.arrived == []
    body = answer.json
    assert (body["error"], body["layer"], body["method"]) == ("policy_denied", "ring2", "GET")
    assert body["path"] == target
    assert body["request_id"]


def test_a_process_that_policy_does_not_name_is_refused(rig: Rig) -> None:
    assert rig.call(binary="/usr/bin/evil").outcome == (403, "binary_not_allowed")
    helper = {"x-saw-ancestors": "/usr/bin/bash,/usr/bin/curl"}
    assert rig.call(binary="/usr/bin/helper", headers=helper).status == 200


@pytest.mark.control("NET-03")
@pytest.mark.parametrize(
    "addresses",
    ["127.0.0.1", "169.254.169.254", "0.0.0.0", "::1", "::ffff:169.254.169.254", "10.210.2.2", f"{FAR} 127.0.0.1"],
)
def test_a_name_that_leads_to_a_forbidden_address_is_refused(rig: Rig, addresses: str) -> None:
    assert rig.call().status == 200
    rig.name_hosts(api_example_com=addresses)
    assert rig.call().outcome == (403, "destination_blocked")
    assert len(rig.far.arrived) == 1


@pytest.mark.control("NET-03")
def test_a_private_address_needs_the_exact_host_in_policy(rig: Rig) -> None:
    rig.name_hosts(x_wild_example_com=FAR)
    assert rig.call(host="x.wild.example.com").outcome == (403, "destination_blocked")
    assert rig.call().status == 200


@pytest.mark.control("NET-01")
@pytest.mark.parametrize(
    "header",
    [
        ("x-saw-upstream", f"{TRAP}:443"),
        ("x-saw-authority", "impostor.example.com"),
        ("x-saw-transport", "plain"),
        ("x-saw-path", "/v1/admin/users"),
        ("x-saw-target", "/v1/admin/users"),
        ("x-saw-method", "DELETE"),
        ("x-saw-listener", "2"),
        ("x-forwarded-client-cert", 'Hash=00;Cert="forged"'),
        ("x-envoy-original-path", "/v1/admin/users"),
        ("x-envoy-original-dst-host", f"{TRAP}:443"),
        ("x-envoy-auth-partial-body", "true"),
    ],
)
def test_headers_that_ring_2_relies_on_cannot_be_smuggled_in(rig: Rig, header: tuple[str, str]) -> None:
    for headers in ([header], [header, header], [(header[0].title(), header[1])]):
        assert rig.call(headers=headers).status == 200
    assert {(seen["method"], seen["target"], seen["at"]) for seen in rig.far.arrived} == {("GET", "/v1/things", FAR)}
    assert not [name for seen in rig.far.arrived for name, _ in seen["headers"] if name == header[0]]
    assert rig.trap.arrived == []


def test_headers_with_underscores_do_not_pass(rig: Rig) -> None:
    assert rig.call(headers={"x_saw_upstream": f"{TRAP}:443"}).status == 400
    assert rig.far.arrived == []


@pytest.mark.control("NET-03")
def test_a_name_that_leads_elsewhere_at_the_next_call_is_checked_again(rig: Rig) -> None:
    """DNS rebinding: each call is resolved once, checked and dialled at that address, on an open connection as well."""
    import http.client

    sock = rig.svid().wrap_socket(rig.connect("10.210.1.1", 8443), server_hostname="ring2.saw.internal")
    connection = http.client.HTTPConnection("ring2", timeout=60)
    connection.sock = sock

    def asked() -> int:
        headers = {"host": "api.example.com", "x-saw-ring1": "allow", "x-saw-binary": "/usr/bin/curl"}
        connection.request("GET", "/v1/things", headers=headers)
        answer = connection.getresponse()
        if answer.status == 403:
            assert json.loads(answer.read())["reason"] == "destination_blocked"
        answer.read()
        return answer.status

    try:
        assert asked() == 200
        for address in ("169.254.169.254", "127.0.0.1", "10.210.2.2", f"{FAR} 169.254.169.254"):
            rig.name_hosts(api_example_com=address)
            assert asked() == 403
        rig.name_hosts(api_example_com=f"{FAR} {TRAP}")
        assert asked() == 200
    finally:
        connection.close()
    assert (len(rig.far.arrived), rig.trap.arrived) == (2, [])


def failed(answer: Answer) -> tuple[int, str]:
    """Return status and reason of a call that was allowed and came to nothing, as the agent reads them."""
    told = answer.json
    assert (told["error"], told["layer"]) == ("service_failed", "ring2")
    assert told["detail"]
    assert told["next_steps"]
    assert told["host"] == "api.example.com"
    return answer.status, told["reason"]


def test_a_service_that_is_away_or_does_not_answer_is_told_apart(rig: Rig) -> None:
    rig.name_hosts(api_example_com=BROKER)  # nobody listens there on port 443
    assert failed(rig.call()) == (503, "service_unreachable")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(rig.directory / "far.pem", rig.directory / "far.key")

    def hang_up(listening: socket.socket) -> bytes:
        with context.wrap_socket(listening.accept()[0], server_side=True) as link:
            return link.recv(65536)

    with rig.listen(BROKER, 443) as listening, ThreadPoolExecutor(1) as pool:
        listening.settimeout(60)
        read = pool.submit(hang_up, listening)
        assert failed(rig.call()) == (503, "service_gave_no_answer")
        assert read.result(60).startswith(b"GET /v1/things HTTP/1.1")
    rig.name_hosts()
    assert rig.call().status == 200


def test_an_unused_connection_is_closed_before_the_service_may_close_it(rig: Rig) -> None:
    """A call that met a service's end of a kept connection would be sent, and nobody would know what came of it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(rig.directory / "far.pem", rig.directory / "far.key")

    def answer_and_keep(listening: socket.socket) -> bytes:
        with context.wrap_socket(listening.accept()[0], server_side=True) as link:
            link.settimeout(60)
            link.recv(65536)
            link.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            return link.recv(1)

    rig.name_hosts(api_example_com=BROKER)
    with rig.listen(BROKER, 443) as listening, ThreadPoolExecutor(1) as pool:
        listening.settimeout(60)
        left = pool.submit(answer_and_keep, listening)
        assert rig.call().status == 200
        assert left.result(120) == b""
    rig.name_hosts()
    assert rig.call().status == 200


def test_an_upstream_that_cannot_prove_its_name_gets_nothing(rig: Rig) -> None:
    rig.name_hosts(api_example_com=TRAP)
    assert failed(rig.call()) == (503, "service_unreachable")
    assert rig.trap.arrived == []
    rig.name_hosts()
    assert rig.call().status == 200


def test_a_plain_http_destination_is_reached_only_as_policy_says(rig: Rig) -> None:
    plain = {"x-saw-scheme": "http", "x-saw-port": "8080"}
    assert rig.call(target="/plain/x", headers=plain).status == 200
    assert arrived_headers(rig)["host"] == "api.example.com:8080"
    assert rig.call(target="/plain/x", headers={"x-saw-port": "8080"}).outcome == (403, "host_not_allowed")
    assert rig.call(headers={"x-saw-scheme": "http", "x-saw-port": "443"}).outcome == (403, "host_not_allowed")


@pytest.mark.control("CRED-01")
def test_a_push_to_an_agent_branch_streams_through_with_the_credential(rig: Rig) -> None:
    body = push("refs/heads/agent/topic", 3_000_000)
    answer = rig.call("POST", PUSH_ROOT, host="git.example.com", binary="/usr/bin/git", body=body)
    assert answer.status == 200, answer.body
    headers = arrived_headers(rig)
    expected = base64.b64encode(f"x-access-token:{SECRET['git-token']}".encode()).decode()
    assert headers["authorization"] == f"Basic {expected}"
    assert rig.far.arrived[0]["size"] == len(body)


@pytest.mark.control("REV-01")
def test_a_push_to_another_branch_waits_for_review(rig: Rig) -> None:
    body = push("refs/heads/main", 3_000_000)
    answer = rig.call("POST", PUSH_ROOT, host="git.example.com", binary="/usr/bin/git", body=body)
    assert (answer.status, answer.headers["x-saw-review"]) == (200, "pending")
    assert b"ng refs/heads/main waiting for review rv-" in answer.body
    assert rig.far.arrived == []


@pytest.mark.control("INF-01")
def test_inference_goes_to_the_routed_service_with_its_key(rig: Rig) -> None:
    prompt = json.dumps({"model": "demo-small", "messages": [{"role": "user", "content": "x" * 300_000}]}).encode()
    sent = {"content-type": "application/json", "authorization": "Bearer openshell:resolve:env:MODEL"}
    answer = rig.call("POST", "/v1/chat/completions", host="inference.local", headers=sent, body=prompt)
    assert answer.status == 200, answer.body
    headers = arrived_headers(rig)
    assert (headers["host"], headers["authorization"]) == ("models.example.com", f"Bearer {SECRET['model-key']}")
    assert rig.far.arrived[0]["target"] == "/api/v1/chat/completions"
    assert rig.far.arrived[0]["size"] == len(prompt)


@pytest.mark.control("INF-01")
def test_a_model_that_is_not_routed_is_refused_before_the_call_leaves(rig: Rig) -> None:
    prompt = json.dumps({"model": "other-large"}).encode()
    answer = rig.call("POST", "/v1/chat/completions", host="inference.local", body=prompt)
    assert answer.outcome == (403, "model_not_allowed")
    assert rig.call(host="models.example.com").outcome == (403, "host_not_allowed")
    assert rig.far.arrived == []


@pytest.mark.control("LIF-02")
def test_a_kill_refuses_at_once_and_takes_the_listeners_away(rig: Rig) -> None:
    context = rig.svid()
    assert rig.call(context=context).status == 200
    passing = rig.connect("10.210.1.1", 8444)
    rig.broker.put("ws-1", state="quarantined")

    def refused() -> bool:
        try:
            return rig.call(context=context).outcome == (403, "workspace_not_active")
        except (OSError, ssl.SSLError):
            return True

    wait_for(refused, "the refusal")
    passing.settimeout(60)
    assert passing.recv(1) == b""
    passing.close()
    wait_for(lambda: not rig.listens("10.210.1.1", 8443), "the end of the listener")
    assert not rig.listens(FAR, 22001)
    assert rig.call(context=rig.svid("ws-2"), number=2).status == 200
    rig.settle(state="active")
    wait_for(lambda: rig.listens("10.210.1.1", 8443), "the listener")


@pytest.mark.control("LIF-02")
def test_an_open_connection_is_refused_on_its_next_request_after_a_kill(rig: Rig) -> None:
    import http.client

    sock = rig.svid("ws-2").wrap_socket(rig.connect("10.210.2.1", 8443), server_hostname="ring2.saw.internal")
    connection = http.client.HTTPConnection("ring2", timeout=10)
    connection.sock = sock
    headers = {"host": "api.example.com", "x-saw-binary": "/usr/bin/curl"}
    connection.request("GET", "/v1/things", headers=headers)
    assert connection.getresponse().read() == b"from the far end"
    rig.broker.put("ws-2", state="stopped")
    rig.settled()
    try:
        connection.request("GET", "/v1/things", headers=headers)
        answer = connection.getresponse()
        assert answer.status == 403
        assert json.loads(answer.read())["reason"] == "workspace_not_active"
    except (OSError, http.client.HTTPException):
        pass
    finally:
        connection.close()
    assert len(rig.far.arrived) == 1


def test_the_broker_and_ssh_pass_through_untouched(rig: Rig) -> None:
    # TLS is the broker's own: it answers who shows a perimeter certificate and nobody else.
    anonymous = rig.context().wrap_socket(rig.connect("10.210.1.1", 8444), server_hostname="broker.saw.internal")
    try:
        anonymous.sendall(b"GET /v1/perimeter/state?after=0&wait=0 HTTP/1.1\r\nhost: x\r\n\r\n")
        answered = anonymous.recv(100)
    except (ssl.SSLError, ConnectionError):
        answered = b""
    assert answered == b""
    anonymous.close()
    context = rig.context(rig.directory / "edge.pem", rig.directory / "edge.key")
    with context.wrap_socket(rig.connect("10.210.1.1", 8444), server_hostname="broker.saw.internal") as sock:
        sock.sendall(b"GET /v1/perimeter/state?after=0&wait=0 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert sock.recv(15) == b"HTTP/1.1 200 OK"
    vm = rig.listen("10.210.1.2", 22)
    inward = rig.connect(FAR, 22001)
    accepted, _ = vm.accept()
    accepted.sendall(b"SSH-2.0-vm\r\n")
    assert inward.recv(20) == b"SSH-2.0-vm\r\n"
    for sock in (accepted, inward, vm):
        sock.close()


@pytest.mark.control("AUD-01")
@pytest.mark.control("CRED-01")
def test_every_decision_is_a_chained_event_without_any_secret(rig: Rig) -> None:
    allowed = rig.call()
    refused = rig.call("DELETE", "/v1/things")
    request_id = refused.json["request_id"]
    assert allowed.status == 200

    def found() -> bool:
        return any(event.event["metadata"].get("correlation_uid") == request_id for event in list(rig.broker.events))

    wait_for(found, "the event at the broker")
    report = verify_chain(rig.broker.events)
    assert report.complete, report.findings
    last = rig.broker.events[-1].event["unmapped"]["saw"]
    before = rig.broker.events[-2].event["unmapped"]["saw"]
    assert (last["verdict"], last["reason"], last["workspace"]) == ("deny", "method_or_path_not_allowed", "ws-1")
    expected = {
        "verdict": "allow",
        "principal": "mia@example.com",
        "agent": "agent-1",
        "workspace": "ws-1",
        "policy_digest": rig.digest,
        "credential": "api-token",
        "upstream": f"{FAR}:443",
    }
    assert {name: before[name] for name in expected} == expected
    assert before["request_id"] == dict(rig.far.arrived[0]["headers"])["x-request-id"]
    everything = b"".join(
        path.read_bytes()
        for folder in ("state", "xds", "")
        for path in (rig.directory / folder).iterdir()
        if path.is_file()
    )
    everything += str(rig.broker.events).encode()
    encoded = base64.b64encode(f"x-access-token:{SECRET['git-token']}".encode())
    for value in (*(secret.encode() for secret in SECRET.values()), encoded):
        assert value not in everything


def test_envoy_accepts_the_rendered_configuration(rig: Rig) -> None:
    out = rig.saw("gateway", "render", "--check", "--numbers", "1,2,250", "--config", str(rig.config_path))
    assert "accepts" in out
    assert Path(rig.config.ring2.xds_dir / "lds.json").exists()
    assert BROKER in (rig.config.ring2.xds_dir / "cds.json").read_text()
