"""Writes that wait for a person, through the real ring 2: taken in, looked at, sent once with exactly these bytes, told."""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ring2_reviews import ROOT, Review
from ring2_rig import SECRET, Answer, Rig, wait_for

from saw.gateway.reviews import MOST_OPENING_EACH
from saw.lab.engagement import exchanges
from saw.review.messages import MAX_REVIEWED_ANSWER, MAX_REVIEWED_BODY, Claimed

BODY = b'{"title": "one"}'
ITEM = "/v1/items/1?draft=no"


def write(rig: Rig, target: str = ITEM, body: bytes = BODY, **options: Any) -> Answer:
    """Make a write that waits for a person."""
    headers = {"content-type": "application/json", **options.pop("headers", {})}
    return rig.call("POST", target, body=body, headers=headers, **options)


def opened(rig: Rig, **options: Any) -> str:
    """Make a write that waits, and return the id of its review."""
    answer = write(rig, **options)
    assert answer.status == 202, answer.body
    return str(answer.json["review_id"])


def poll(rig: Rig, review: str, wait: int = 20, **options: Any) -> Answer:
    return rig.call("GET", f"/.well-known/saw/reviews/{review}?wait={wait}", **options)


def approved(rig: Rig, **options: Any) -> Answer:
    """Make a write, approve it, and return what became of it."""
    review = opened(rig, **options)
    rig.broker.reviews.move(review, "approved")
    return poll(rig, review)


def unix(path: Path, method: str, target: str, headers: dict[str, str], body: bytes = b"") -> Answer:
    """Speak HTTP to a Unix socket of the perimeter host, as Envoy does."""
    connection = http.client.HTTPConnection("unix", timeout=20)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.sock.connect(str(path))
    try:
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        return Answer(connection.getresponse())
    finally:
        connection.close()


@pytest.mark.control("REV-01")
def test_a_write_waits_and_nothing_is_sent_until_it_is_approved_then_it_is_sent_once(rig: Rig) -> None:
    sent = {"x-request-tag": "a", "authorization": "Bearer openshell:resolve:env:API", "cookie": "session=1"}
    answer = write(rig, headers=sent)
    assert answer.status == 202
    told = answer.json
    assert told["state"] == "pending"
    assert (answer.headers["location"], answer.headers["retry-after"]) == (told["poll"], "10")
    assert told["poll"] == f"/.well-known/saw/reviews/{told['review_id']}"
    assert poll(rig, told["review_id"], wait=0).status == 202
    assert rig.far.arrived == []

    stored = rig.broker.reviews.one.opened
    assert (stored.group, stored.quorum, stored.expires_in_s, stored.policy_digest) == ("team-x", 1, 86400, rig.digest)
    assert stored.call.headers == (("content-type", "application/json"), ("x-request-tag", "a"))
    assert (stored.call.path, stored.call.body, stored.binary) == (ITEM, BODY, "/usr/bin/curl")

    rig.broker.reviews.move(told["review_id"], "approved")
    done = poll(rig, told["review_id"])
    assert (done.status, done.body, done.headers["x-saw-review"]) == (200, b"from the far end", "done")
    [arrived] = rig.far.arrived
    headers = dict(arrived["headers"])
    assert (arrived["method"], arrived["target"]) == ("POST", ITEM)
    assert arrived["sha256"] == hashlib.sha256(BODY).hexdigest()
    assert (headers["x-api-key"], headers["host"]) == (SECRET["api-token"], "api.example.com")
    assert (headers["idempotency-key"], headers["x-request-tag"]) == (told["review_id"], "a")
    assert not {"authorization", "cookie"} & headers.keys()
    assert not [name for name in headers if name.startswith(("x-saw-", "x-envoy-", "x-forwarded-"))]
    assert poll(rig, told["review_id"]).body == b"from the far end"
    assert len(rig.far.arrived) == 1
    assert rig.broker.reviews.one.claims == 1


@pytest.mark.control("REV-01")
def test_the_same_call_again_is_the_same_review_and_another_body_is_another(rig: Rig) -> None:
    first = opened(rig)
    assert opened(rig) == first
    assert opened(rig, body=BODY + b" ") != first


@pytest.mark.control("REV-01")
def test_who_decides_and_for_how_long_is_what_the_rule_says(rig: Rig) -> None:
    opened(rig, target="/v1/orders")
    asked = rig.broker.reviews.one.opened
    assert (asked.group, asked.quorum, asked.expires_in_s) == ("buyers", 2, 7200)
    assert "actions[" in asked.rule


def test_reads_and_writes_of_class_auto_do_not_wait(rig: Rig) -> None:
    assert rig.call().status == 200
    assert rig.call("POST", "/v1/notes", body=b"{}").status == 200
    assert len(rig.far.arrived) == 2
    assert rig.broker.reviews.all == {}


@pytest.mark.control("REV-01")
def test_what_policy_refuses_opens_no_review_even_when_ring_1_forwards_it(rig: Rig) -> None:
    ring1 = {"x-saw-ring1": "review"}
    assert write(rig, "/v1/else", headers=ring1).outcome == (403, "method_or_path_not_allowed")
    assert write(rig, "/v1/items/../x", headers=ring1).outcome == (403, "not_canonical")
    assert write(rig, binary="/usr/bin/wget").outcome == (403, "binary_not_allowed")
    assert write(rig, host="other.example.com").outcome == (403, "host_not_allowed")
    rig.name_hosts(api_example_com="169.254.169.254")
    assert write(rig).outcome == (403, "destination_blocked")
    rig.name_hosts()
    rig.settle(lease_expires_at=-1)
    assert write(rig).outcome == (403, "lease_expired")
    assert rig.broker.reviews.all == {}
    rig.settle(lease_expires_at=60)
    assert write(rig).status == 202


@pytest.mark.control("REV-01")
def test_what_a_caller_says_of_tickets_and_transports_counts_for_nothing(rig: Rig) -> None:
    forged = {
        "x-saw-transport": "review",
        "x-saw-ticket": "A" * 43,
        "x-saw-send": "A" * 43,
        "x-saw-listener": "approved",
    }
    assert rig.call(headers=forged).body == b"from the far end"
    assert write(rig, headers=forged).status == 202
    assert len(rig.far.arrived) == 1


@pytest.mark.control("REV-01")
def test_a_ticket_is_good_once_and_for_its_own_call(rig: Rig) -> None:
    review_socket, authz_socket = rig.config.sockets().review, rig.config.sockets().authz
    assert review_socket is not None
    certificate, _ = rig.svid_files()
    peer = peer_of(certificate)
    check = {
        "host": "api.example.com", "x-saw-listener": "1", "x-forwarded-client-cert": peer, "x-saw-method": "POST",
        "x-saw-target": ITEM, "x-saw-binary": "/usr/bin/curl",
    }  # fmt: skip

    def ticket() -> str:
        answer = unix(authz_socket, "POST", ITEM, check, BODY)
        assert (answer.status, answer.headers["x-saw-transport"]) == (200, "review")
        return answer.headers["x-saw-ticket"]

    def bring(method: str, target: str, host: str = "api.example.com", **headers: str) -> int:
        return unix(review_socket, method, target, {"host": host, **headers}, BODY).status

    assert bring("POST", ITEM) == 403
    assert bring("POST", ITEM, **{"x-saw-ticket": "A" * 43}) == 403
    for method, target, host in (
        ("POST", "/v1/items/2", "api.example.com"), ("PUT", ITEM, "api.example.com"), ("POST", ITEM, "git.example.com"),
    ):  # fmt: skip
        spent = {"x-saw-ticket": ticket()}
        assert bring(method, target, host, **spent) == 403
        assert bring("POST", ITEM, **spent) == 403
    assert rig.broker.reviews.all == {}
    good = {"x-saw-ticket": ticket()}
    assert bring("POST", ITEM, **good) == 202
    assert bring("POST", ITEM, **good) == 403
    assert len(rig.broker.reviews.all) == 1


def peer_of(certificate: Path) -> str:
    """Return what Envoy says of a client with this certificate."""
    from urllib.parse import quote

    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.x509 import load_pem_x509_certificate

    pem = certificate.read_bytes()
    return f'Hash={load_pem_x509_certificate(pem).fingerprint(SHA256()).hex()};Cert="{quote(pem.decode(), safe="")}"'


@pytest.mark.control("REV-02")
def test_nothing_passes_the_socket_for_approved_calls_without_a_ticket(rig: Rig) -> None:
    for extra in ({}, {"x-saw-send": "A" * 43}, {"x-saw-transport": "tls", "x-saw-upstream": "10.99.0.1:443"}):
        headers = {"host": "api.example.com", "x-saw-binary": "/usr/bin/curl", **extra}
        assert unix(rig.config.sockets().send, "POST", ITEM, headers, BODY).status == 403
    assert rig.far.arrived == []


@pytest.mark.control("REV-01")
def test_a_body_above_the_limit_is_refused_and_one_at_the_limit_waits_and_arrives_whole(rig: Rig) -> None:
    answer = write(rig, body=b"x" * (MAX_REVIEWED_BODY + 1))
    assert (answer.status, answer.json["error"]) == (413, "review_body_too_large")
    assert rig.broker.reviews.all == {}
    body = b"y" * MAX_REVIEWED_BODY
    assert approved(rig, body=body).status == 200
    assert (rig.far.arrived[0]["size"], rig.far.arrived[0]["sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


@pytest.mark.control("REV-01")
def test_only_its_own_workspace_sees_a_review(rig: Rig) -> None:
    review = opened(rig)
    other = poll(rig, review, wait=0, number=2, context=rig.svid("ws-2"))
    assert (other.status, other.json["error"]) == (404, "unknown_review")
    assert poll(rig, f"rv-{'0' * 32}", wait=0).status == 404
    assert poll(rig, review, wait=0).status == 202


@pytest.mark.control("REV-01")
def test_a_question_needs_what_every_call_needs_and_goes_nowhere(rig: Rig) -> None:
    review = opened(rig)
    assert poll(rig, review, host="other.example.com").outcome == (403, "host_not_allowed")
    assert poll(rig, review, binary="/usr/bin/wget").outcome == (403, "binary_not_allowed")
    assert rig.call("POST", f"/.well-known/saw/reviews/{review}").outcome == (403, "method_or_path_not_allowed")
    assert rig.call("GET", f"/.well-known/saw/reviews/{review}/x").outcome == (403, "method_or_path_not_allowed")
    rig.settle(lease_expires_at=-1)
    assert poll(rig, review).outcome == (403, "lease_expired")
    rig.settle(lease_expires_at=60, state="quarantined")
    wait_for(lambda: not rig.listens("10.210.1.1", 8443), "the listener is gone")
    with pytest.raises(OSError):
        poll(rig, review)
    rig.settle(state="active")
    wait_for(lambda: rig.listens("10.210.1.1", 8443), "the listener is back")
    assert poll(rig, review, wait=0).status == 202
    assert poll(rig, review, wait=0, host="git.example.com", binary="/usr/bin/git").status == 202
    assert rig.far.arrived == []


@pytest.mark.parametrize(
    ("state", "status", "error"),
    [
        ("denied", 403, "review_denied"), ("expired", 403, "review_expired"), ("cancelled", 403, "review_cancelled"),
        ("failed", 502, "review_failed"), ("unknown", 504, "review_unknown"),
    ],
)  # fmt: skip
def test_an_ending_without_an_answer_is_told_in_json(rig: Rig, state: str, status: int, error: str) -> None:
    review = opened(rig)
    rig.broker.reviews.move(review, state, detail="not on a Friday")
    answer = poll(rig, review)
    assert (answer.status, answer.json["error"], answer.json["layer"]) == (status, error, "review")
    assert "not on a Friday" in answer.json["detail"]
    assert rig.far.arrived == []


def ended(rig: Rig, review: str) -> Review:
    found = rig.broker.reviews.all[review]
    wait_for(lambda: found.results, "the result")
    return found


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    "change",
    [
        {"body": BODY + b"!"}, {"path": "/v1/items/2?draft=no"}, {"headers": (("content-type", "text/plain"),)},
        {"host": "git.example.com"},
    ],
)  # fmt: skip
def test_a_claim_whose_bytes_are_not_those_that_were_approved_is_not_sent(rig: Rig, change: dict[str, Any]) -> None:
    def spoil(claimed: Claimed) -> Claimed:
        return msgspec.structs.replace(claimed, call=msgspec.structs.replace(claimed.call, **change))

    rig.broker.reviews.spoil = spoil
    answer = approved(rig)
    assert (answer.status, answer.json["error"]) == (502, "review_failed")
    assert "digest" in answer.json["detail"]
    assert rig.far.arrived == []


@pytest.mark.control("REV-02")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"policy_digest": "ab" * 32, "released_digest": "ab" * 32}, "digest_mismatch"),
        ({"lease_expires_at": -1}, "lease_expired"),
        ({"state": "quarantined"}, "workspace_not_active"),
        ({"delegation_required": True}, "outside_delegation"),
    ],
)
def test_what_changed_since_the_approval_counts_when_it_is_sent(rig: Rig, fields: dict[str, Any], reason: str) -> None:
    review = opened(rig)
    rig.settle(**fields)
    rig.broker.reviews.move(review, "approved")
    [result] = ended(rig, review).results
    assert (result.outcome, result.detail.partition(":")[0]) == ("failed", reason)
    assert rig.far.arrived == []
    rig.settle(delegation_required=False, state="active")
    wait_for(lambda: rig.listens("10.210.1.1", 8443), "the listener")


@pytest.mark.control("REV-02")
def test_destination_and_credential_are_looked_at_again_when_it_is_sent(rig: Rig) -> None:
    review = opened(rig)
    rig.name_hosts(api_example_com="169.254.169.254")
    rig.broker.reviews.move(review, "approved")
    assert "destination_blocked" in ended(rig, review).results[0].detail
    rig.name_hosts()
    review = opened(rig)
    path = rig.directory / "credentials" / "api-token"
    path.chmod(0o644)
    try:
        rig.broker.reviews.move(review, "approved")
        assert "credential_unavailable" in ended(rig, review).results[0].detail
    finally:
        path.chmod(0o600)
    assert rig.far.arrived == []
    assert approved(rig).status == 200


@pytest.mark.control("REV-03")
def test_a_far_end_that_cannot_be_reached_or_trusted_got_nothing_and_that_is_told(rig: Rig) -> None:
    for address in ("10.99.0.2", "10.99.0.9"):
        rig.name_hosts(api_example_com=address)
        answer = approved(rig)
        assert (answer.status, answer.json["error"]) == (502, "review_failed"), answer.body
    assert rig.trap.arrived == []
    rig.name_hosts()
    assert approved(rig).status == 200


@pytest.mark.control("REV-03")
def test_a_far_end_that_breaks_off_leaves_the_outcome_unknown_and_is_not_called_again(rig: Rig) -> None:
    async def breaks(_scope: Any, _send: Any) -> None:
        raise ConnectionResetError

    async def halfway(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"100")]})
        await send({"type": "http.response.body", "body": b"begun", "more_body": True})
        raise ConnectionResetError

    rig.far.respond = halfway
    answer = approved(rig)
    assert (answer.status, answer.json["error"]) == (504, "review_unknown")
    assert len(rig.far.arrived) == 1
    rig.far.respond = breaks
    answer = approved(rig)
    # The server answers 500 to a fault: an answer like any other.
    assert (answer.status, answer.headers["x-saw-review"]) == (500, "done")
    assert len(rig.far.arrived) == 2


@pytest.mark.control("REV-03")
def test_a_far_end_cannot_pretend_that_nothing_was_sent(rig: Rig) -> None:
    async def pretends(_scope: Any, send: Any) -> None:
        headers = [(b"x-saw-local", b"UF"), (b"set-cookie", b"a=b"), (b"x-kept", b"yes")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b"busy"})

    rig.far.respond = pretends
    answer = approved(rig)
    assert (answer.status, answer.body, answer.headers["x-saw-review"]) == (503, b"busy", "done")
    assert answer.headers["x-kept"] == "yes"
    assert not {"set-cookie", "x-saw-local"} & answer.headers.keys()


@pytest.mark.control("REV-03")
def test_a_gatekeeper_that_dies_while_the_call_is_out_does_not_send_it_again(rig: Rig) -> None:
    released = threading.Event()

    async def hangs(scope: Any, send: Any) -> None:
        if scope["method"] == "POST":
            await asyncio.to_thread(released.wait, 20)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"late"})

    rig.far.respond = hangs
    review = opened(rig)
    rig.broker.reviews.move(review, "approved")
    wait_for(lambda: rig.far.arrived, "the call at the far end")
    rig.stop_gatekeeper(9)
    rig.start_gatekeeper()
    wait_for(lambda: rig.call().status == 200, "a call through the new gatekeeper")
    released.set()
    found = rig.broker.reviews.all[review]
    assert (found.view.state, found.claims, found.results) == ("executing", 1, [])
    assert [seen["method"] for seen in rig.far.arrived].count("POST") == 1


@pytest.mark.control("REV-01")
def test_without_the_broker_nothing_is_taken_in_and_nothing_is_sent(rig: Rig) -> None:
    review = opened(rig)
    rig.broker.reviews.answering = False
    for answer in (write(rig), poll(rig, review)):
        assert (answer.status, answer.json["error"]) == (503, "review_unavailable")
        assert answer.headers["retry-after"] == "10"
    assert rig.far.arrived == []
    rig.broker.reviews.answering = True
    assert opened(rig) == review


def test_what_the_broker_takes_in_for_no_review_is_told_as_a_refusal(rig: Rig) -> None:
    rig.broker.reviews.refusal = "too_many_reviews"
    answer = write(rig)
    assert (answer.status, answer.json["error"]) == (409, "review_refused")
    assert "too_many_reviews" in answer.json["detail"]
    rig.broker.reviews.refusal = ""
    assert write(rig).status == 202


def test_one_workspace_cannot_fill_the_service_with_bodies_that_never_end(rig: Rig) -> None:
    context, stuck = rig.svid(), []
    head = (
        "POST /v1/items/1 HTTP/1.1\r\nhost: api.example.com\r\nx-saw-binary: /usr/bin/curl\r\n"
        f"content-length: {3 << 20}\r\n\r\n"
    ).encode()

    def ended(connection: ssl.SSLSocket) -> bool:
        connection.settimeout(0)
        try:
            connection.recv(1)
        except (ssl.SSLWantReadError, BlockingIOError):
            return False
        except OSError:
            pass
        return True

    def refused() -> bool:
        """Whether one more is refused. A call that a busy machine gave up is begun anew."""
        stuck[:] = [connection for connection in stuck if not ended(connection)]
        while len(stuck) < MOST_OPENING_EACH:
            stuck.append(context.wrap_socket(rig.connect("10.210.1.1", 8443), server_hostname="ring2.saw.internal"))
            stuck[-1].sendall(head + b"x" * (2 << 20))
        return write(rig).status == 503

    try:
        wait_for(refused, "the refusal of one more")
        assert write(rig, number=2, context=rig.svid("ws-2")).status == 202
    finally:
        for connection in stuck:
            connection.close()
    wait_for(lambda: write(rig).status == 202, "room again")


@pytest.mark.control("REV-01")
def test_a_long_answer_is_kept_up_to_its_bound_and_marked(rig: Rig) -> None:
    async def long(_scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body", "body": b"z" * (MAX_REVIEWED_ANSWER + 10)})

    rig.far.respond = long
    answer = approved(rig)
    assert (answer.status, len(answer.body)) == (201, MAX_REVIEWED_ANSWER)
    assert answer.headers["x-saw-review-truncated"] == "true"


@pytest.mark.control("CRED-01")
@pytest.mark.control("REV-01")
def test_every_step_is_an_event_with_the_review_and_no_secret_is_stored_shown_or_recorded(rig: Rig) -> None:
    review = opened(rig)
    rig.broker.reviews.move(review, "approved")
    answer = poll(rig, review)

    def events() -> list[dict[str, Any]]:
        return [item.event for item in rig.broker.events if item.event["unmapped"]["saw"].get("review") == review]

    wait_for(lambda: any(event.get("api", {}).get("operation") == "review.result" for event in events()), "the events")
    found = events()
    operations = [event["api"]["operation"] for event in found if "api" in event]
    assert operations == ["review.open", "review.result"]
    [sent] = [event for event in found if event["class_uid"] == 4002 and event["http_request"]["http_method"] == "POST"]
    assert (sent["action"], sent["unmapped"]["saw"]["injected"]) == ("Allowed", True)
    assert all(event["unmapped"]["saw"]["workspace"] == "ws-1" for event in found)
    kept = msgspec.json.encode([rig.broker.reviews.one, rig.broker.events]) + answer.body + str(answer.headers).encode()
    assert not any(value.encode() in kept for value in SECRET.values())
    assert not any(value.encode() in (rig.directory / "gatekeeper.log").read_bytes() for value in SECRET.values())


@pytest.mark.control("REV-01")
def test_a_push_that_waits_is_refused_in_words_that_git_prints(rig: Rig, tmp_path: Path) -> None:
    async def advertises(_scope: Any, send: Any) -> None:
        line = b"0" * 40 + b" capabilities^{}\0report-status side-band-64k agent=test\n"
        said = b"001f# service=git-receive-pack\n0000" + f"{len(line) + 4:04x}".encode() + line + b"0000"
        headers = [(b"content-type", b"application/x-git-receive-pack-advertisement")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": said})

    rig.far.respond = advertises
    certificate, key = rig.svid_files()
    environment = {**os.environ, "GIT_SSL_CAINFO": str(rig.directory / "ca" / "ca.pem")}
    environment["GIT_TRACE_CURL"] = str(tmp_path / "trace")

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {
            "user.name": "a", "user.email": "a@example.com", "http.sslCert": str(certificate), "http.sslKey": str(key),
            "http.extraHeader": "x-saw-binary: /usr/bin/git",
            "http.curloptResolve": "ring2.saw.internal:8443:10.210.1.1",
        }  # fmt: skip
        flags = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        flags += ["-c", "http.extraHeader=host: git.example.com"]
        return rig.namespace.run(
            lambda: subprocess.run(
                ["git", "-C", str(tmp_path), *flags, *arguments],
                capture_output=True,
                text=True,
                check=False,
                env=environment,
                timeout=60,
            )
        )

    assert git("init", "-q", "-b", "main").returncode == 0
    assert git("commit", "-q", "--allow-empty", "-m", "one").returncode == 0
    done = git("push", "https://ring2.saw.internal:8443/team/app.git", "HEAD:refs/heads/main")
    assert done.returncode == 1, done
    review = rig.broker.reviews.one.view.id
    assert f"remote: {review} is waiting for review until" in done.stderr
    assert f"(waiting for review {review})" in done.stderr
    assert "[remote rejected] HEAD -> main" in done.stderr
    assert rig.broker.reviews.one.opened.group == "maintainers"
    assert exchanges((tmp_path / "trace").read_text(errors="replace"))[-1].waits_under == rig.digest
    assert [seen["method"] for seen in rig.far.arrived] == ["GET"]


@pytest.mark.control("REV-01")
def test_refs_for_different_people_to_decide_on_are_never_one_review(rig: Rig) -> None:
    def push(*refs: str) -> Answer:
        lines = b""
        for index, ref in enumerate(refs):
            line = b"1" * 40 + b" " + b"2" * 40 + b" " + ref.encode() + (b"\0 report-status\n" if not index else b"\n")
            lines += f"{len(line) + 4:04x}".encode() + line
        return rig.call(
            "POST", "/team/app.git/git-receive-pack", host="git.example.com", binary="/usr/bin/git",
            body=lines + b"0000PACK",
        )  # fmt: skip

    refused = push("refs/heads/docs", "refs/heads/main")
    assert refused.outcome == (403, "review_required")
    assert "one at a time" in refused.json["detail"]
    assert rig.broker.reviews.all == {}
    for ref, group in (("refs/heads/docs", "writers"), ("refs/heads/main", "maintainers")):
        answer = push(ref, "refs/heads/agent/x")
        assert (answer.status, answer.headers["x-saw-review"]) == (200, "pending")
        assert answer.body.startswith(b"000eunpack ok\n")
        asked = rig.broker.reviews.all[answer.headers["x-saw-review-id"]].opened
        assert asked.group == group
    assert json.dumps(rig.far.arrived) == "[]"


def test_the_configuration_with_reviews_is_one_that_envoy_accepts(rig: Rig) -> None:
    assert "accepts" in rig.saw("gateway", "render", "--check", "--config", str(rig.config_path))


@pytest.mark.control("CRED-01")
def test_a_credential_that_comes_back_is_starred_in_the_stored_answer_too(rig: Rig) -> None:
    async def echo(scope: Any, send: Any) -> None:
        headers = dict(scope["headers"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"you sent " + headers[b"x-api-key"]})

    rig.far.respond = echo
    answer = approved(rig)
    assert (answer.status, answer.body) == (200, b"you sent " + b"*" * len(SECRET["api-token"]))


def test_a_gatekeeper_that_ends_while_it_asks_for_a_review_is_not_told_as_a_service(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call was neither allowed nor sent, and is made again once a gatekeeper is there."""
    serve = rig.broker.reviews.serve

    def ending(method: str, path: str, query: str, body: bytes) -> Any:
        if (method, path) == ("POST", ROOT):
            for process in list(rig.gatekeepers.values()):
                process.kill()
        return serve(method, path, query, body)

    with monkeypatch.context() as now:
        now.setattr(rig.broker.reviews, "serve", ending)
        answer = write(rig)
    rig.stop_gatekeeper(signal.SIGKILL)
    rig.start_gatekeeper()
    assert (answer.status, answer.json["error"], answer.json["reason"]) == (
        503,
        "policy_denied",
        "gatekeeper_unavailable",
    )
    assert "nothing was sent" in answer.json["detail"]
    assert rig.far.arrived == []
    rig.settled()
    assert write(rig).status == 202
